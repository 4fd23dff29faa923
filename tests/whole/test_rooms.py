"""The rooms of pipeline/: imports run one way, and torch stays behind a border of folders."""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text()
# In the order of imports, as CONTRIBUTING's tree has them.
ROOMS = re.findall(
    r"^  (\w+)/ ", GUIDE[GUIDE.index("\npipeline/ ") : GUIDE.index("\nrules/ ")], re.M
)
WITH_TORCH = re.findall(r"^  (\w+)/ .*\[torch\]$", GUIDE, re.M)
# Folders of tests that are no room: rules/papers, what concerns all of the product, and means.
BESIDE = {"replications", "whole", "benchmarks", "circuit_tracer", "libraries", "made_up", "slurm"}
BESIDE |= {"traced"}
LEAST, MOST = 3, 14  # files in a room, beside an empty __init__.py


def modules(room: str) -> list[Path]:
    return sorted((ROOT / "pipeline" / room).glob("*.py"))


@functools.cache
def statements(file: Path) -> list[tuple[ast.Import | ast.ImportFrom, bool]]:
    """(import, whether it stands at the top) of all in a file."""
    tree = ast.parse(file.read_text())
    top = set(map(id, tree.body))
    found = (n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom))
    return [(node, id(node) in top) for node in found]


def imported(file: Path) -> Iterator[tuple[str, bool]]:
    """(module, whether a statement at the top imports it) of all imports in a file."""
    for node, top in statements(file):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write out the room of a relative import"
            below = [f"{node.module}.{a.name}" for a in node.names]
            names = below if node.module == "pipeline" else [node.module]
        yield from ((name, top) for name in names)


def named(file: Path) -> set[str]:
    """Every module that a file's imports may name: `from a import b` names a and a.b."""
    found = [node for node, _ in statements(file) if isinstance(node, ast.ImportFrom)]
    return {n.module for n in found} | {f"{n.module}.{a.name}" for n in found for a in n.names}


def room_of(module: str) -> str:
    return [*module.split("."), ""][1] if module.startswith("pipeline.") else ""


def test_the_tests_stand_in_the_same_rooms():
    assert not list((ROOT / "tests").glob("test_*.py"))
    folders = {f.name for f in (ROOT / "tests").iterdir() if f.is_dir() and f.name != "__pycache__"}
    assert folders == set(ROOMS) | BESIDE


def test_every_module_stands_in_a_room():
    folders = {f.name for f in (ROOT / "pipeline").iterdir() if list(f.glob("*.py"))}
    assert folders == set(ROOMS) and len(ROOMS) == 25 and len(WITH_TORCH) == 14
    for file in (ROOT / "pipeline").glob("*/__init__.py"):
        assert not file.read_text(), file


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_can_be_overlooked(room):
    assert LEAST <= len([f for f in modules(room) if f.name != "__init__.py"]) <= MOST


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room):
    """From a room to those above it in the tree; inside functions as well."""
    above = {"", "errors", "__version__", *ROOMS[: ROOMS.index(room) + 1]}
    wrong = {f"{f.name}: {m}" for f in modules(room) for m, _ in imported(f)
             if room_of(m) not in above}  # fmt: skip
    assert wrong == set()


@pytest.mark.parametrize("room", [r for r in ROOMS if r not in WITH_TORCH])
def test_no_torch_at_the_top_of_a_room_without_it(room):
    for file in modules(room):
        for module, top in imported(file):
            assert not (top and (module.split(".")[0] == "torch" or room_of(module) in WITH_TORCH))


def test_no_stage_is_imported():
    """A stage is a door: what others need of it stands in a module beside it."""
    from pipeline.job import commands

    doors = set(commands.STAGES.values())
    found = {f"{f.name}: {d}" for room in ROOMS for f in modules(room) for d in doors & named(f)}
    assert found == set()


@pytest.mark.workflow
def test_papers_figures_and_metrics_import_no_torch():
    """All of them in one process, which names the first file after which torch is there."""
    files = [f for n in ("figures*", "metrics") for f in ROOT.glob(f"rules/papers/*/{n}.py")]
    code = (
        "import sys; from pipeline.job.source import import_file\n"
        "for file in sys.argv[1:]:\n"
        "    import_file(file); 'torch' in sys.modules and sys.exit(file)"
    )
    command = [sys.executable, "-c", code, *map(str, files)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert len(files) > 25 and done.returncode == 0, done.stderr
