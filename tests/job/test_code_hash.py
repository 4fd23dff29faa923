"""Code hashes move with what code does, and with nothing else."""

import ast
import re
import shutil
from pathlib import Path

import pytest
from snake import forget_code as clear

from pipeline.errors import RetraceError
from pipeline.job import commands, definitions, note, reach, source
from pipeline.job.source import file_code, functions, import_file, job_code, literal, reached

CODE = '''"""Docstring."""

import math


def area(r: float) -> float:
    """Of a circle."""
    return math.pi * r**2  # the classic
'''


def code(tmp_path: Path, text: str) -> str:
    """The hash of a file with this text."""
    name = f"{len(list(tmp_path.iterdir()))}.py"
    (tmp_path / name).write_text(text)
    return file_code(tmp_path / name)


@pytest.mark.parametrize(
    "edit",
    [
        lambda t: t.replace("# the classic", ""),
        lambda t: "# head\n\n\n" + t + "\n\n# tail\n",
        lambda t: t.replace("Docstring.", "Another."),
        lambda t: t.replace("Of a circle.", "Of a disc.\n\n    More text.\n    "),
        lambda t: t.replace('    """Of a circle."""\n', ""),
        lambda t: t.replace('"""Docstring."""\n', ""),
        lambda t: t.replace("area(r: float)", "area(\n    r: float,\n)"),
        lambda t: t.replace("math.pi * r**2", "(math.pi * (r ** 2))"),
        lambda t: t.replace("\n", "\r\n"),
    ],
)
def test_what_does_not_run_does_not_count(tmp_path, edit):
    assert edit(CODE) != CODE
    assert code(tmp_path, edit(CODE)) == code(tmp_path, CODE)


@pytest.mark.parametrize(
    "old, new",
    [
        ("r**2", "r**3"),
        ("area", "disc"),
        ("r: float", "r: int"),
        ("return math", "print('x')\n    return math"),
        ("import math", "import math, os"),
        ("math.pi * r**2", '"text"'),
    ],
)
def test_what_runs_counts(tmp_path, old, new):
    assert code(tmp_path, CODE.replace(old, new)) != code(tmp_path, CODE)


SHAPED = """
from jaxtyping import Float
from torch import Tensor

def n():
    return 1

def f(x: Float[Tensor, " n"], *, y: Float[Tensor, "n pos"] | None = None) -> dict[str, Tensor]:
    return {"x": x}
"""
PLAIN = """
from torch import Tensor

def n():
    return 1

def f(x: Tensor, *, y: Tensor | None = None) -> dict[str, Tensor]:
    return {"x": x}
"""


def test_the_shape_of_a_tensor_does_not_count(tmp_path):
    """Tests alone check it; and its letters are no names that the job reaches."""
    assert code(tmp_path, SHAPED) == code(tmp_path, PLAIN)
    assert definitions.facts(SHAPED) == definitions.facts(PLAIN)
    for old, new in {"dict[str": "dict[int", "x: Tensor": "x: Array"}.items():
        assert code(tmp_path, PLAIN.replace(old, new)) != code(tmp_path, PLAIN)


def test_a_string_that_is_no_docstring_counts(tmp_path):
    one, two = 'x = "one"\n', 'x = "two"\n'
    assert code(tmp_path, one) != code(tmp_path, two)
    late = "def f():\n    x = 1\n    'one'\n    return x\n"  # after the first statement
    assert code(tmp_path, late) != code(tmp_path, late.replace("'one'", "'two'"))


def test_a_function_of_nothing_but_a_docstring(tmp_path):
    one = 'def f():\n    """One."""\n'
    assert code(tmp_path, one) == code(tmp_path, one.replace("One", "Two"))
    assert code(tmp_path, one) != code(tmp_path, "def f():\n    return 1\n")


NESTED = """
if x:
    "one"
    from pipeline import deep
elif y:
    from pipeline import deep
for z in x:
    "two"
    import pipeline.deep
try: ...
except E:
    "three"
    from . import deep
finally:
    f = lambda: "four"
match x:
    case 1:
        "five"
        import os
"""


def test_what_stands_deep_in_a_definition_is_left_out_as_well():
    """Docstrings, or what stands where they do, and imports of ours, in statements of any kind."""
    found = definitions._bare(ast.parse(NESTED))
    assert not [n for n in ast.walk(found) if isinstance(n, ast.ImportFrom)]
    texts = {n.value for n in ast.walk(found) if isinstance(n, ast.Constant)}
    assert {"one", "two", "three", "five"}.isdisjoint(texts) and "four" in texts
    (kept,) = (n for n in ast.walk(found) if isinstance(n, ast.Import))
    assert kept.names[0].name == "os"


FILES = {
    "__init__": "__version__ = '1'",
    "stage": """
from pipeline import tables
from pipeline.job import cli
from pipeline.spec import spec
from pipeline.tables import Table
import math

def unused():
    return 1

def main():
    from pipeline.late import x
    tables.write(Table(), x)
    cli.run("stage", math.pi)
    getattr(spec.Section(), "kept")

if __name__ == "__main__":
    main()
""",
    "tables": """
from pipeline.deep import d
KINDS = {"one": 1}

def write(table, x: "Shape"):
    total = x
    return [total.used() for total in range(3)] + KINDS["one"]

def total():
    return 2

class Shape: ...

class Table:
    size: int = 1

    def __init__(self):
        self.size = d()

    def used(self):
        return 1

    def idle(self):
        return 1

class Other:
    def used(self):
        return 1
""",
    "deep": "def d():\n    return 1\n\ndef e():\n    return 1\n",
    "late": "def x():\n    return 1\n",
    "job/cli": "def run(*args):\n    return 1\n",
    "spec/spec": "class Section:\n    n: int = 1\n\n    def kept(self):\n        return 1\n",
    "other": "def main():\n    return 1\n",
}


@pytest.fixture
def pipeline(tmp_path, monkeypatch) -> Path:
    """A small package in place of ours; `stage` and `other` are its stages."""
    folder = tmp_path / "pipeline"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(text)
    monkeypatch.setattr(source, "PIPELINE", folder)
    made = {name: f"pipeline.{name}" for name in ("stage", "other")}
    monkeypatch.setattr(commands, "MODULES", made)
    clear(note=False)
    yield folder
    clear(note=False)


def hashed(*args) -> str:
    """The code hash of a job as a new process reads it, with the note of earlier ones at hand."""
    clear(note=False)
    return job_code(*args)


EDITS = [  # (file, old, new, whether the hash of `stage` moves)
    ("stage", "return 1", "return 2", False),  # nothing calls `unused`
    ("stage", "math.pi", "math.e", True),
    ("stage", "import math", "import cmath as math", True),  # the same text, another function
    ("stage", "import Table", "import Other as Table", True),
    ("tables", "range(3)", "range(4)", True),
    ("tables", "total = x", "total = x + 1", True),
    ("tables", "def total():\n    return 2", "def total():\n    return 3", False),  # a local's name
    ("tables", '"one": 1', '"one": 2', True),
    ("tables", "size: int = 1", "size: int = 2", True),
    ("tables", "class Shape: ...", "class Shape:\n    x = 1", True),  # an annotation in quotes
    ("tables", "used(self):\n        return 1\n\n    def idle",
     "used(self):\n        return 2\n\n    def idle", True),
    ("tables", "idle(self):\n        return 1", "idle(self):\n        return 2", False),
    ("tables", "class Other:\n    def", "class Other:\n    x = 1\n\n    def", False),
    ("tables", "KINDS = ", "print()\nKINDS = ", True),  # runs when the module is imported
    ("deep", "d():\n    return 1", "d():\n    return 2", True),
    ("deep", "e():\n    return 1", "e():\n    return 2", False),
    ("deep", "def d", "import os\n\ndef d", False),
    ("late", "return 1", "return 2", True),  # imported inside a function
    ("job/cli", "return 1", "return 2", False),  # hands over arguments
    ("spec/spec", "n: int = 1", "n: int = 2", False),  # stands in --spec
    ("spec/spec", "return 1", "return 2", True),  # behaviour, reached by a name in a string
    ("other", "return 1", "return 2", False),
    ("__init__", "'1'", "'2'", False),
    ("__init__", "__version__", "print()\n__version__", True),
]  # fmt: skip


@pytest.mark.parametrize("file, old, new, moves", EDITS)
def test_an_edit_moves_the_hash_where_the_job_reaches_it(pipeline, file, old, new, moves):
    before, text = hashed("stage"), FILES[file]
    assert text.count(old) == 1
    (pipeline / f"{file}.py").write_text(text.replace(old, new))
    assert (hashed("stage") != before) is moves


def test_where_a_definition_stands_does_not_count(pipeline):
    before = hashed("stage")
    (pipeline / "moved.py").write_text(FILES["deep"])
    for name in ("stage", "tables"):
        text = FILES[name].replace("pipeline.deep", "pipeline.moved")
        (pipeline / f"{name}.py").write_text(text)
    assert hashed("stage") == before


@pytest.mark.parametrize(
    "before, after",
    [
        ("from pipeline.deep import d", "from .deep import d"),
        ("from pipeline.deep import d", "from . import deep\nd = deep.d"),
        ("from pipeline.deep import d", "from pipeline.deep import *"),
        (
            "from pipeline.deep import d",
            "try:\n    from pipeline.deep import d\nfinally:\n    y = 1",
        ),
        ("from pipeline.deep import d", "import pipeline.deep\nd = pipeline.deep.d"),
        ("from pipeline.deep import d", "import pipeline.deep as deep\nd = deep.d"),
        ("from pipeline.deep import d", "from pipeline import deep\nd = getattr(deep, 'd')"),
        ("    def __init__", "    from pipeline.deep import d\n    d = d\n\n    def __init__"),
    ],
)
def test_an_import_is_followed_however_it_is_written(pipeline, before, after):
    (pipeline / "tables.py").write_text(FILES["tables"].replace(before, after))
    first = hashed("stage")
    (pipeline / "deep.py").write_text(
        FILES["deep"].replace("d():\n    return 1", "d():\n    return 2")
    )
    assert hashed("stage") != first


def test_a_class_on_one_of_another_package_counts_whole(pipeline):
    text = FILES["tables"].replace("class Table:", "import torch\n\nclass Table(torch.nn.Module):")
    (pipeline / "tables.py").write_text(text)
    before = hashed("stage")
    new = text.replace("idle(self):\n        return 1", "idle(self):\n        return 2")
    (pipeline / "tables.py").write_text(new)
    assert hashed("stage") != before


def test_a_papers_own_files_count_with_what_they_reach(pipeline, tmp_path):
    own = tmp_path / "own.py"
    text = "from pipeline import deep\nfrom pipeline.spec import spec\n\n"
    text += "x = deep.d() + spec.Section().n"
    own.write_text(text)
    before = hashed("mine", [own])
    (pipeline / "other.py").write_text("o = 2")
    (pipeline / "deep.py").write_text(FILES["deep"].replace("e():", "e(x=1):"))
    assert hashed("mine", [own]) == before
    (pipeline / "deep.py").write_text(FILES["deep"].replace("d():", "d(x=1):"))
    second = hashed("mine", [own])
    assert second != before
    own.write_text(f"{text} + 1\n")
    third = hashed("mine", [own])
    assert third not in (before, second)
    # a paper's own section reaches its stage without the defaults of its fields
    (pipeline / "spec/spec.py").write_text(FILES["spec/spec"].replace("n: int = 1", "n: int = 2"))
    assert hashed("mine", [own]) not in (before, second, third)


LOADS = [
    'import_file(Path(__file__).with_name("helper.py"))',
    'import_file(HERE / "helper.py").twice',
    "import_file(HELPER)",
    "source.import_file(which())",
    'import_file(HERE / f"{NAME}.py")',
    'runpy.run_path(str(HERE / "helper.py"))',
    "__import__('sys')\n\n\nimport helper",
    "1\n\n\ndef g():\n    from helper import twice\n\n    return twice",
    "None\n\n\nfrom . import helper",
    "None\n\n\nfrom .helper import twice as doubled",
    "None\n\n\nfrom .helper import *",
    "None\n\n\ndef g():\n    from . import helper\n\n    return helper",
]


def a_helper_counts(folder: Path, stage: str, load: str) -> None:
    """An edit of the file that a paper's own file loads moves the hash of a stage."""
    own, helper = folder / "own.py", folder / "helper.py"
    own.write_text(
        "from pathlib import Path\n\nfrom pipeline.job import source\n"
        "from pipeline.job.source import import_file\n\n"
        'HERE = Path(__file__).parent\nHELPER = HERE / "helper.py"\nNAME = "helper"\n\n\n'
        f"def f():\n    return {load}\n"
    )
    helper.write_text("def twice(x):\n    return x * 2\n")
    (folder / "test_own.py").write_text("x = 1\n")
    before, identity = hashed(stage, [own]), source.files_code([own])
    (folder / "test_own.py").write_text("x = 2\n")
    assert hashed(stage, [own]) == before
    helper.write_text("def twice(x):\n    return x * 4\n")
    assert hashed(stage, [own]) != before and source.files_code([own]) != identity
    clear(note=False)


@pytest.mark.parametrize("load", LOADS)
def test_a_helper_that_a_papers_file_loads_counts(pipeline, tmp_path, load):
    a_helper_counts(tmp_path, "stage", load)


@pytest.mark.parametrize("stage", ["metrics", "circuits", "training"])
def test_a_helper_counts_for_our_own_stages(tmp_path, stage):
    a_helper_counts(tmp_path, stage, "import_file(HELPER)")


def test_where_a_file_lies_does_not_count(pipeline, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "own.py").write_text("x = 1")
    assert hashed("stage", [tmp_path / "a/own.py"]) == hashed("stage", [tmp_path / "b/own.py"])


def test_templates_count_for_the_stages_that_fill_them(pipeline):
    (pipeline / "report").mkdir()
    (pipeline / "report/pages.py").write_text("def render(name):\n    return name\n")
    for name in ("stage", "other"):
        text = (
            f'from pipeline.report import pages\n\ndef main():\n    pages.render("{name}.html")\n'
        )
        (pipeline / f"{name}.py").write_text(text)
    templates = pipeline / "report/templates"
    templates.mkdir()
    (templates / "stage.html").write_text('{% extends "base.html" %}')
    (templates / "other.html").write_text("<p>")
    (templates / "base.html").write_text('{{ source("style.css") }}')
    (templates / "style.css").write_text("a {}")
    page, other = hashed("stage"), hashed("other")
    for left in (".style.css.swp", "style.css~", "#style.css#", "4913", ".DS_Store"):
        (templates / left).write_text("x")
    assert (hashed("stage"), hashed("other")) == (page, other)
    (templates / "style.css").write_text("b {}")
    assert hashed("stage") != page and hashed("other") == other


def test_modules_that_import_each_other_end(pipeline):
    (pipeline / "deep.py").write_text("from pipeline import tables\n\ndef d():\n    tables.write()")
    assert hashed("stage")


@pytest.mark.parametrize("build, same", [("2.13.0+cu128", True), ("2.14.0", False)])
def test_the_release_of_a_package_that_decides_numbers_counts(monkeypatch, build, same):
    """torch for what it computes, not for metrics; another build of one release is the same."""
    versions = {"torch": "2.13.0", "pandas": "2.2.0", "pyarrow": "19.0.0"}
    monkeypatch.setattr(source.importlib.metadata, "version", lambda n: versions.get(n, "1.0"))

    def both() -> tuple[str, str]:
        source._version.cache_clear()
        return job_code("training"), job_code("metrics")

    before = both()
    versions |= {"torch": build, "pyarrow": "20.0.0"}  # pyarrow writes files, and decides no number
    first = both()
    assert (first[0] == before[0]) is same and first[1] == before[1]
    versions["pandas"] = "3.0.0"
    second = both()
    assert (second[0] == before[0]) is same and second[1] != before[1]
    source._version.cache_clear()


# --- our own package, every definition of it -----------------------------------------------

ROOT = source.PIPELINE.parent
STAGES = sorted(commands.STAGES)
MODULES = sorted(
    str(f.relative_to(source.PIPELINE).with_suffix(""))
    for f in source.PIPELINE.rglob("*.py")
    if "template" not in f.parts
)


def name_of(module: str) -> str:
    return ".".join(["pipeline", *module.split("/")]).removesuffix(".__init__")


def test_the_stages_are_those_of_the_rules():
    called = "".join(r.read_text() for r in ROOT.glob("rules/**/*.smk"))
    assert set(re.findall(r"-m pipeline (\w+) --", called)) == set(STAGES)


def edited(text: str, start: int, indent: int) -> str:
    """The text with a statement put before the one of line `start`."""
    lines = text.splitlines(keepends=True)
    lines.insert(start - 1, " " * indent + "edited = 1\n")
    return "".join(lines)


def functions_of(file: Path) -> list[tuple[str, int, int]]:
    """(function or Class.method, line and indentation of its first statement) of a file."""
    out = []
    for node in ast.parse(file.read_text()).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        for part in inner:
            if isinstance(part, ast.FunctionDef):
                name = part.name if part is node else f"{node.name}.{part.name}"
                body = part.body[1:] if definitions.is_text(part.body[0]) else part.body
                if body and body[0].lineno > part.lineno:  # `def f(): ...` has no line of its own
                    out.append((name, body[0].lineno, body[0].col_offset))
    return out


@pytest.fixture(scope="module")
def whole() -> dict[str, tuple[str, reach.Walk]]:
    """Stage -> its code hash and what it reaches, unedited."""
    clear(note=False)
    return {s: (job_code(s), reached(s)) for s in STAGES}


class Edits:
    """The facts of a module of ours in which one function was edited, for each of its functions.

    Args:
        module: as in MODULES.
    """

    def __init__(self, module: str) -> None:
        self.file, self.name = source.PIPELINE / f"{module}.py", name_of(module)
        self.text = self.file.read_text()
        self.package = self.name if self.file.stem == "__init__" else self.name.rpartition(".")[0]
        read = source._module(self.name) or definitions.facts(self.text, self.package)
        self.read = {k: v for k, v in read.items() if k != "code"}
        body = ast.parse(self.text).body
        imports = [n for n in body if isinstance(n, (ast.Import, ast.ImportFrom))]
        lines = self.text.splitlines(keepends=True)
        self.head = "".join("".join(lines[n.lineno - 1 : n.end_lineno]) for n in imports)
        self.spans = [(span(n), n.end_lineno) for n in body]
        self.alone: dict[int, bool] = {}

    def whole(self, line: int, indent: int) -> dict:
        """The facts of the whole file, read anew."""
        return definitions.facts(edited(self.text, line, indent), self.package)

    def quick(self, line: int, indent: int) -> dict:
        """The same from the edited statement alone, where that gives the facts that stand here."""
        first, last = next(s for s in self.spans if s[0] <= line <= s[1])
        piece = self.head + "".join(self.text.splitlines(keepends=True)[first - 1 : last])
        if first not in self.alone:
            found = definitions.facts(piece, self.package)["defs"]
            self.alone[first] = found.items() <= self.read["defs"].items()
        if not self.alone[first]:
            return self.whole(line, indent)
        at = line - first + 1 + self.head.count("\n")
        found = definitions.facts(edited(piece, at, indent), self.package)
        return {**self.read, "defs": self.read["defs"] | found["defs"]}

    def changed(self, new: dict) -> set[str] | None:
        """Definitions of which nothing but the code differs; None where anything else does."""
        if {**new, "defs": 0} != {**self.read, "defs": 0} or new["defs"].keys() != self.read[
            "defs"
        ].keys():
            return None
        pairs = {n: (d, self.read["defs"][n]) for n, d in new["defs"].items()}
        if any({**a, "code": 0} != {**b, "code": 0} for a, b in pairs.values()):
            return None
        return {n for n, (a, b) in pairs.items() if a["code"] != b["code"]}


def span(node: ast.stmt) -> int:
    """The first line of a statement, its decorators included."""
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])


@pytest.mark.parametrize("module", MODULES)
def test_an_edit_of_any_function_moves_the_stages_that_reach_it_and_no_other(
    whole, module, monkeypatch
):
    """Every function of ours, one at a time; a stage that never opens the file cannot move.

    A walk goes where the facts lead, whatever the code of a definition: where an edit changes that
    alone, the walks that are there hold. For one function per file a stage that moves and one that
    does not are walked anew all the same.
    """
    edits, read = Edits(module), source._module
    name, found = edits.name, functions_of(edits.file)
    openers = [s for s in STAGES if name in whole[s][1].entered]
    for i, (function, line, indent) in enumerate(found):
        anew = i == len(found) // 2
        new = edits.whole(line, indent) if anew else edits.quick(line, indent)
        changed = edits.changed(new)
        keys = {(name, d) for d in changed or ()}
        moved = {s for s in openers if keys & whole[s][1].edges.keys()}
        if anew or changed is None:
            assert not anew or new == edits.quick(line, indent)
            monkeypatch.setattr(source, "_module", lambda n, new=new: new if n == name else read(n))
            source.reached.cache_clear()
            stay = [s for s in openers if s not in moved]
            again = openers if changed is None else [*sorted(moved)[:1], *stay[:1]]
            walked = {s for s in again if job_code(s) != whole[s][0]}
            assert changed is None or walked == moved & set(again)
            moved = walked if changed is None else moved
            monkeypatch.setattr(source, "_module", read)
        inside = {(name, d) for d in home(new, function)}
        wanted = {s for s in openers if not inside.isdisjoint(whole[s][1].reached)}
        assert moved == wanted, function
    source.reached.cache_clear()


def home(found: dict, function: str) -> set[str]:
    """The definition that holds a function: itself, its class, or the fields of that."""
    owner = function.split(".")[0]
    if function in found["defs"]:
        return {function}
    return {owner} if function.split(".")[-1].startswith("__") else {owner + definitions.FIELDS}


EXACTLY = {  # definition -> the stages that an edit of it must rerun, and no other
    "spec/training:TrainingSpec.members": "training model",
    "spec/training:TrainingSpec.kept": "training",
    "spec/training:TrainingSpec.evaluated": "training",
    "spec/training:TrainingSpec._fits": "",  # what it lets pass stands in --spec
    "spec/sae:SaeSpec.widths": "sae crosscoder transcoders",
    "spec/claims:Claim.judged_at": "claims",
    "spec/paper:PaperSpec.arm_names": "",
    "weights/members:Members.step": "training",
    "weights/lora:LowRank.named": "training",
    "weights/lora:best_cosines": "",  # papers' own stages alone
    "weights/adamw:learning_rate_of": "training",
    "weights/trained:checkpoint_name": "training model",
    "claims/scalars:SAE": "metrics report index",
    "latents/fidelity:loss_recovered": "evaluation",
    "latents/fidelity:density_shares": "evaluation crosscoder_evaluation transcoders_evaluation",
    "latents/agreement:correlation": "attribution circuits graphs",
    "latents/stored:load_saes": "evaluation benchmarks absorption features attribution circuits "
    "steering crosscoder_evaluation graphs",
    "latents/evaluation:main": "evaluation",
    "latents/splicer:next_token_loss": "evaluation",
    "sae/train:train": "sae crosscoder transcoders",
    "sae/optimiser:learning_rate": "sae crosscoder transcoders",
    "sae/dead:DeadLatents.capacity_at": "sae crosscoder transcoders",
    "activations/forward:compute": "activations",
    "weights/gguf_llama:load": "model",
    "claims/judge:judge": "claims",
    "figures/theme:template": "figures",
    "report/pages:render": "report index feature_page",
    "sharing/verify:examined": "",
    "store/provenance:git_state": "",
    "claims/summary:print_claims": "",
}


@pytest.mark.parametrize("definition, stages", EXACTLY.items(), ids=str)
def test_what_reruns_exactly(whole, definition, stages):
    """Written down from what the stages do; the test above says that such an edit moves them."""
    module, _, name = definition.partition(":")
    module = name_of(module)
    assert name in source._module(module)["defs"] or name == "TrainingSpec._fits"
    found = {s for s in STAGES if (module, name) in whole[s][1].reached}
    assert found == set(stages.split())


def test_the_definitions_that_count_for_nothing_are_there():
    """A name in FRAME that nobody has would leave its successor in all hashes."""
    for module, names in reach.FRAME.items():
        assert names <= set(source._module(module)["defs"])


COMPUTES = {"model", "corpus", "activations", "sae", "evaluation", "features", "attribution"}
READING = (
    "pipeline.claims.",
    "pipeline.figures.",
    "pipeline.report.",
    "pipeline.papers.",
    "pipeline.sharing.",
)


@pytest.mark.parametrize("stage", sorted(COMPUTES))
def test_no_stage_that_computes_reruns_for_an_edit_of_the_reading_side(whole, stage):
    """An edit of a figure must not train a dictionary again."""
    assert not [m for m, _ in whole[stage][1].reached if m.startswith(READING)]


PAPERS = sorted((ROOT / "rules/papers").glob("*/rules.smk"))


@pytest.mark.parametrize("rules", PAPERS, ids=lambda f: f.parent.name)
def test_a_papers_rule_hashes_the_file_of_its_stage(rules):
    for listed in re.findall(r"code=code_of\((.*?)\)", rules.read_text(), re.S):
        stage, *names = re.findall(r'"([^"]+)"', listed)
        files = [f for name in names for f in sorted(rules.parent.glob(name))]
        own = rules.parent / f"{stage}.py"
        assert not own.exists() or own in source.with_loaded(files)


def test_the_hash_of_a_stage_is_the_same_in_any_folder(tmp_path, monkeypatch):
    before = hashed("claims")
    shutil.copytree(source.PIPELINE, tmp_path / "pipeline")
    monkeypatch.setattr(source, "PIPELINE", tmp_path / "pipeline")
    assert hashed("claims") == before
    clear(note=False)


# --- source files --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, found",
    [
        ('METRICS = {"a": "b"}', {"a": "b"}),
        ('METRICS: dict = {"a": "b"}', {"a": "b"}),
        ("OTHER = 1", {}),
        ("", {}),
    ],
)
def test_a_literal_is_read_without_running_the_file(tmp_path, text, found):
    (tmp_path / "m.py").write_text(f"{text}\nraise SystemExit\n")
    assert literal(tmp_path / "m.py", "METRICS") == found


def test_what_is_no_literal_is_told(tmp_path):
    (tmp_path / "m.py").write_text("import os\nMETRICS = {'a': os.getcwd()}\n")
    with pytest.raises(RetraceError, match=r"m\.py:2: METRICS must be a literal"):
        literal(tmp_path / "m.py", "METRICS")


def test_a_file_that_is_not_there_says_nothing(tmp_path):
    assert literal(tmp_path / "m.py", "METRICS") == {} and functions(tmp_path / "m.py") == set()


def test_functions_of_a_file(tmp_path):
    (tmp_path / "f.py").write_text("def a(): ...\nclass B:\n    def c(self): ...\nb = lambda: 1")
    assert functions(tmp_path / "f.py") == {"a"}
    (tmp_path / "g.py").write_text("from .f import a, B\nfrom .f import a as again\nimport os")
    assert functions(tmp_path / "g.py") == {"a", "again"}


@pytest.mark.parametrize("text", ["def f(", "x = \x00", "\tx = 1\n y = 2"])
def test_what_is_no_python_is_told(tmp_path, text):
    (tmp_path / "f.py").write_text(text)
    with pytest.raises(RetraceError, match=r"f\.py: not valid Python"):
        functions(tmp_path / "f.py")


def test_two_papers_have_files_of_one_name(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.py").write_text(f"NAME = '{name}'")
    one, two = (import_file(tmp_path / n / "metrics.py") for n in ("one", "two"))
    assert (one.NAME, two.NAME) == ("one", "two")


def test_a_papers_folder_is_a_package(tmp_path):
    """Files beside each other import each other, also where two papers' have the same names."""
    for name in ("one", "a.b two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "waves.py").write_text(f"NAME = '{name}'\n")
        (tmp_path / name / "deep.py").write_text("from . import waves\n\nNAME = waves.NAME\n")
        (tmp_path / name / "metrics.py").write_text("from . import waves\nfrom .deep import NAME\n")
    one, two = (import_file(tmp_path / n / "metrics.py") for n in ("one", "a.b two"))
    assert (one.NAME, two.NAME) == ("one", "a.b two")
    assert (one.waves.NAME, two.waves.NAME) == ("one", "a.b two")
    (tmp_path / "one/metrics.py").write_text("from . import wave\n")
    with pytest.raises(ImportError, match="wave"):
        import_file(tmp_path / "one/metrics.py")


def test_a_jobs_hash_is_remembered_until_a_file_of_ours_or_of_the_paper_changes(
    pipeline, tmp_path, monkeypatch
):
    """Another process follows no name again, whichever folder the paper lies in."""
    monkeypatch.setattr(source, "NOTE", tmp_path / "store/digests/code.json")
    (tmp_path / "store").mkdir()
    for paper in ("one", "two"):
        (tmp_path / paper).mkdir()
        (tmp_path / paper / "data.py").write_text("x = 1\n")
    clear()
    first = source.job_code("stage", [tmp_path / "one/data.py"])
    other = source.job_code("other")
    source._remembered().write()  # as at the end of the process
    clear()
    with monkeypatch.context() as m:
        m.setattr(source, "_hashed", lambda *_: pytest.fail("walked again"))
        assert source.job_code("stage", [tmp_path / "two/data.py"]) == first
        assert source.job_code("other") == other
    (tmp_path / "two/data.py").write_text("x = 2\n")
    clear()
    assert source.job_code("stage", [tmp_path / "two/data.py"]) != first
    text = (pipeline / "stage.py").read_text()
    (pipeline / "stage.py").write_text(text.replace("def main():", "def main():\n    print()"))
    clear()
    moved = source.job_code("stage", [tmp_path / "one/data.py"])
    assert moved != first and source.job_code("other") == other
    (pipeline / "stage.py").write_text(text)
    clear()
    assert source.job_code("stage", [tmp_path / "one/data.py"]) == first


def test_a_long_note_keeps_the_files_that_were_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(note, "REMEMBERED", 2)
    (tmp_path / "store").mkdir()
    path = tmp_path / "store/digests/code.json"
    for keys in ("ab", "bcd"):
        kept = note.Note(path)
        for key in keys:
            assert kept.facts(key, lambda key=key: {"of": key}) == {"of": key}
        kept.write()
    assert note.Note(path).files == {k: {"of": k} for k in "bcd"}


def test_a_hash_is_remembered_under_the_files_bytes(pipeline, tmp_path, monkeypatch):
    """An edit is seen though the note is there; a note that is broken is as good as none."""
    monkeypatch.setattr(source, "NOTE", tmp_path / "code.json")
    file = tmp_path / "data.py"
    file.write_text("x = 1\n")
    clear()
    first = source.job_code("none", [file])
    clear()
    with monkeypatch.context() as m:
        m.setattr(source, "_read_facts", lambda *_: pytest.fail("parsed again"))
        assert source.job_code("none", [file]) == first
    file.write_text("x = 2\n")
    clear()
    second = source.job_code("none", [file])
    assert second != first
    (tmp_path / "code.json").write_text("{")
    clear()
    assert source.job_code("none", [file]) == second
    clear()
