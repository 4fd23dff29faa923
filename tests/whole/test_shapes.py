"""Shapes in signatures are checked in tests, and cost nothing anywhere else."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TORCH_ROOMS, environment

ROOT = Path(__file__).parents[2]


def imported(file: Path) -> set[str]:
    """First names of the packages that a file imports, anywhere in it."""
    out = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        out |= {name.split(".")[0] for name in names}
    return out


def test_a_wrong_shape_is_caught():
    import jaxtyping
    import torch

    from pipeline.models import splice

    x = torch.ones(2, 3, 4)
    assert splice.known(x, 1, 0).sum() == 4
    with pytest.raises(jaxtyping.TypeCheckError, match="typechecking parameter 'x'"):
        splice.known(x[0], 1, 0.0)


def test_two_arguments_agree_on_a_length():
    import jaxtyping
    import torch

    from pipeline.models import lens

    p = torch.full((2, 5), 0.2).log()
    assert lens.kl(p, p).tolist() == [0.0, 0.0]
    with pytest.raises(jaxtyping.TypeCheckError, match="typechecking parameter 'log_q'"):
        lens.kl(p, p[:, :1])


def test_a_check_that_is_remembered_is_as_strict():
    """A call whose like was seen is let pass; any other is checked, and so is any other result."""
    import beartype
    import jaxtyping
    import remembered
    import torch
    from jaxtyping import Float
    from torch import Tensor

    def first_column(x: Float[Tensor, "rows 2"], n: list[int]) -> Float[Tensor, " rows"]:
        ran.append(n)
        return x[: sum(n), 0]

    ran: list = []
    checked = remembered.jaxtyped(first_column, typechecker=beartype.beartype)
    x, wrong = torch.ones(3, 2), jaxtyping.TypeCheckError
    for _ in range(2):
        assert checked(x, [3]).shape == (3,)
        with pytest.raises(wrong, match="return value"):
            checked(x, [2])  # the same key as before
    assert checked(x.double(), n=[1] * 70).shape == (3,) and len(ran) == 5
    for given in [(x[0], [3]), (x.int(), [3]), (x, ["3"]), (x, 3), (x, ["3"] * 70), (x.T, [3])]:
        with pytest.raises(wrong, match="parameter"):
            checked(*given)
    assert len(ran) == 5


def doubled(n: int, later: "Pair | None" = None) -> int:
    return n * 2 if n < 9 else str(n)


@dataclasses.dataclass
class Pair:
    left: int
    right: list[str]


def test_what_has_no_shape_is_checked_on_every_call():
    import beartype
    import remembered

    checked = remembered.jaxtyped(doubled, typechecker=beartype.beartype)
    pair = remembered.jaxtyped(Pair, typechecker=beartype.beartype)
    for _ in range(2):
        assert checked(4) == 8 and pair(1, ["a"]).right == ["a"]
        for wrong in (lambda: checked("4"), lambda: checked(9), lambda: pair("1", [])):
            with pytest.raises(Exception, match=r"type hint|Expected type"):
                wrong()
        with pytest.raises(Exception, match=r"type hint|Expected type"):
            pair(1, [2])


def test_the_switch_imports_no_torch():
    """Tests of a room without torch do not wait for it."""
    code = "import conftest, sys; assert not {'torch', 'beartype'} & set(sys.modules)"
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    subprocess.run([sys.executable, "-c", code], env=environment() | path, check=True)


def test_stages_check_nothing():
    """No stage imports a checker; shapes are named where torch, which takes longer, is imported."""
    checkers = {"beartype", "jaxtyping"}
    for file in (ROOT / "pipeline").rglob("*.py"):
        named = any(name in file.read_text() for name in checkers)  # no other needs to be parsed
        found = imported(file) & checkers if named else set()
        assert "beartype" not in found, file
        assert not found or file.parent.name in TORCH_ROOMS, file
