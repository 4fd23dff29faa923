"""Code hashes move with what code does, and with nothing else."""

import shutil
from pathlib import Path

import pytest

from pipeline import source
from pipeline.errors import RetraceError
from pipeline.source import file_code, functions, import_file, job_code, literal, reached

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


def test_a_string_that_is_no_docstring_counts(tmp_path):
    one, two = 'x = "one"\n', 'x = "two"\n'
    assert code(tmp_path, one) != code(tmp_path, two)
    late = "def f():\n    x = 1\n    'one'\n    return x\n"  # after the first statement
    assert code(tmp_path, late) != code(tmp_path, late.replace("'one'", "'two'"))


def test_a_function_of_nothing_but_a_docstring(tmp_path):
    one = 'def f():\n    """One."""\n'
    assert code(tmp_path, one) == code(tmp_path, one.replace("One", "Two"))
    assert code(tmp_path, one) != code(tmp_path, "def f():\n    return 1\n")


@pytest.fixture
def pipeline(tmp_path, monkeypatch) -> Path:
    """A small package in place of ours: stage -> tables -> errors, stage -> cli, other alone."""
    folder = tmp_path / "pipeline"
    folder.mkdir()
    files = {
        "__init__": "__version__ = '1'",
        "stage": "from pipeline import cli, tables\ndef f():\n    from pipeline.late import x\n",
        "tables": "from pipeline.deep import d\n",
        "deep": "d = 1",
        "late": "x = 1",
        "cli": "c = 1",
        "other": "o = 1",
    }
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.setattr(source, "PIPELINE", folder)
    clear()
    yield folder
    clear()


def clear() -> None:
    """Forget what was read: a process hashes a file once."""
    caches = (source.tree, source._facts, source._remembered, source._module_file, source.reached)
    for function in (*caches, source._templates):
        function.cache_clear()


def hashed(*args) -> str:
    clear()
    return job_code(*args)


def test_a_stage_reaches_what_it_imports_but_for_the_frame(pipeline):
    names = {"pipeline.stage", "pipeline.tables", "pipeline.deep", "pipeline.late"}
    assert set(reached(("pipeline.stage",))) == names


@pytest.mark.parametrize(
    "name, moves",
    [("stage", True), ("tables", True), ("deep", True), ("late", True), ("cli", False),
     ("other", False), ("__init__", False)],
)  # fmt: skip
def test_an_edit_moves_the_stages_that_import_the_module(pipeline, name, moves):
    before = hashed("stage")
    with open(pipeline / f"{name}.py", "a") as f:
        f.write("\nmore = 1\n")
    assert (hashed("stage") != before) is moves


def test_a_papers_own_files_count_with_what_they_import(pipeline, tmp_path):
    own = tmp_path / "own.py"
    own.write_text("from pipeline import deep\n\nx = 1\n")
    before = hashed("mine", [own])
    (pipeline / "other.py").write_text("o = 2")
    assert hashed("mine", [own]) == before
    (pipeline / "deep.py").write_text("d = 2")
    second = hashed("mine", [own])
    assert second != before
    own.write_text("from pipeline import deep\n\nx = 2\n")
    assert hashed("mine", [own]) not in (before, second)


def test_where_a_file_lies_does_not_count(pipeline, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "own.py").write_text("x = 1")
    assert hashed("stage", [tmp_path / "a/own.py"]) == hashed("stage", [tmp_path / "b/own.py"])


def test_templates_count_for_the_stages_that_fill_them(pipeline):
    (pipeline / "pages.py").write_text("p = 1")
    (pipeline / "stage.py").write_text("from pipeline import pages\n")
    (pipeline / "templates").mkdir()
    (pipeline / "templates/style.css").write_text("a {}")
    page, other = hashed("stage"), hashed("other")
    (pipeline / "templates/style.css").write_text("b {}")
    assert hashed("stage") != page and hashed("other") == other


def test_modules_that_import_each_other_end(pipeline):
    (pipeline / "deep.py").write_text("from pipeline import tables\n")
    assert hashed("stage")


HEAVY = {"model", "corpus", "activations", "sae", "evaluation", "features", "attribution"}
READING = ("papers", "claims", "figures", "kinds", "report", "pages", "index", "summary")


@pytest.mark.parametrize("stage", sorted(HEAVY))
def test_no_stage_that_computes_reruns_for_an_edit_of_the_reading_side(stage):
    """An edit of a figure must not train a dictionary again."""
    assert not {f"pipeline.{m}" for m in READING} & set(reached((f"pipeline.{stage}",)))


def test_the_hash_of_a_stage_is_the_same_in_any_folder(tmp_path, monkeypatch):
    before = hashed("claims")
    shutil.copytree(source.PIPELINE, tmp_path / "pipeline")
    monkeypatch.setattr(source, "PIPELINE", tmp_path / "pipeline")
    assert hashed("claims") == before
    clear()


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


def test_a_hash_is_remembered_under_the_files_bytes(tmp_path, monkeypatch):
    """An edit is seen though the note is there; a note that is broken is as good as none."""
    monkeypatch.setattr(source, "NOTE", tmp_path / "code.json")
    file = tmp_path / "data.py"
    file.write_text("x = 1\n")
    clear()
    first = source.job_code("none", [file])
    clear()
    monkeypatch.setattr(source, "_read_facts", lambda _: pytest.fail("parsed again"))
    assert source.job_code("none", [file]) == first
    monkeypatch.undo()
    monkeypatch.setattr(source, "NOTE", tmp_path / "code.json")
    file.write_text("x = 2\n")
    clear()
    second = source.job_code("none", [file])
    assert second != first
    (tmp_path / "code.json").write_text("{")
    clear()
    assert source.job_code("none", [file]) == second
    clear()
