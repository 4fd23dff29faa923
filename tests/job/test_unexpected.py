"""Faults that nobody foresaw: one sentence for the terminal, the trace in the log."""

import argparse
import ast
import importlib
import logging
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import warm
from conftest import ROOT, environment
from snake import snakemake, toy_project

from pipeline import errors
from pipeline.claims import summary
from pipeline.job import cli, commands, kills
from pipeline.job.events import JobState

STAGE = '''"""A stage of its own that fails."""
from pathlib import Path
from pipeline.job import cli


def summed(where, values):
    """The sum of a record's values.

    Args:
        where: file and record.
    """
    return {fault}


def work(job):
    for i in range(2):
        summed(f"notes.jsonl: record {{i}}", [1, None][: i + 1])


if __name__ == "__main__":
    cli.run("own", cli.parser("own", __doc__).parse_args(), work)
'''
FAULTS = {
    "sum(values)": "TypeError (unsupported operand",
    "{}[values[-1]]": "KeyError (1)",
    "1 / (values[-1] or 0)": "ZeroDivisionError (division by zero)",
    "__import__('json').loads('[' * 9 ** 6)": "RecursionError (maximum recursion depth",
    "__import__('numpy').zeros(3)[7]": "IndexError (index 7 is out of bounds",
    "(_ for _ in ()).throw(MemoryError())": "MemoryError in",
    "open('/nowhere/at/all')": "/nowhere/at/all: No such file or directory",
}


@pytest.fixture(autouse=True)
def logging_again(monkeypatch):
    """A command that is run in this process may silence its log for the tests behind it."""
    monkeypatch.setattr(logging.root.manager, "disable", logging.NOTSET)


def called(tmp_path, fault: str, log=None) -> subprocess.CompletedProcess:
    (tmp_path / "own.py").write_text(STAGE.format(fault=fault))
    command = [warm.python(), str(tmp_path / "own.py"), "--spec", "{}"]
    env = environment() | {"TMPDIR": str(tmp_path)}
    return subprocess.run(command, env=env, stderr=log or subprocess.PIPE, text=True, cwd=tmp_path)


@pytest.mark.parametrize("fault", FAULTS)
def test_an_unexpected_fault_is_one_sentence(fault, tmp_path):
    """What failed, what was being done, on which record, where the trace lies, what to try."""
    done = called(tmp_path, fault)
    assert done.returncode == 1
    *before, sentence = done.stderr.splitlines()
    assert len(before) <= 1, before  # what was checked of the inputs
    assert sentence.startswith(f"error in stage own: {FAULTS[fault]}")
    if "/nowhere" not in fault:
        assert "in own.summed (The sum of a record's values), at notes.jsonl: record " in sentence
        assert ("batch size" if "MemoryError" in fault else "report it with the trace") in sentence
    (log,) = tmp_path.glob("retrace-own-*.log")
    assert f"full trace: {log}" in sentence
    assert "Traceback (most recent call last)" in log.read_text()


def test_the_trace_stays_in_the_log_of_a_job(tmp_path, capsys):
    """What snakemake shows at the end has the sentence once, and no line of the trace."""
    log = tmp_path / "job.log"
    with log.open("w") as f:
        assert called(tmp_path, "sum(values)", f).returncode == 1
    assert "Traceback (most recent call last)" in log.read_text()
    assert f"full trace: {log}" in log.read_text()
    summary.print_failures([JobState(1, "own", log=str(log))], "", tmp_path / "snakemake.log")
    shown = capsys.readouterr().err
    assert shown.count("error in stage own: TypeError") == 1
    assert "Traceback" not in shown and "own.py" not in shown


def test_traces_of_libraries_stay_in_the_log_too():
    lines = ["10:00:00 begun", "Traceback (most recent call last):", '  File "a.py", line 1',
             "    x()", "ValueError: no", "last"]  # fmt: skip
    assert summary.without_traces(lines) == ["10:00:00 begun", "last"]


# --- every program, stage or not -----------------------------------------------------------

TOOLS = {  # command -> its arguments, and the function of its that fails
    "adapters": ([], "table"),
    "aliases": ([], "of_transformer_lens"),
    "compare": (["a", "b"], "opened"),
    "crate": (["release.zip", "--out", "crate.zip"], "unpack"),
    "examples": (["page.html"], "example"),
    "figures_js": (["--draw", "a.js", "--out", "b.js"], "write"),
    "lint_paper": (["paper"], "lint"),
    "preview": (["labels", "paper"], "lines"),
    "progress": ([], "newest"),
    "provenance": (["verify", "."], "_verify"),
    "directions": (["d.safetensors", "--activations", "m.json", "--out", "out"], "read"),
    "list": (["papers"], "lines"),
    "show": (["l0"], "shown"),
    "redraw": (["release.zip", "--out", "out"], "opened"),
    "scaffold": (["paper"], "scaffold"),
    "schema": ([], "files"),
    "slide": (["figure.html", "--out", "figure.svg"], "make"),
}
UNFORESEEN = [
    KeyError("x"), ZeroDivisionError(), RecursionError(), MemoryError(), AssertionError("a\nb"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no"), PermissionError(13, "Permission denied", "f"),
]  # fmt: skip


@pytest.fixture
def by_hand(tmp_path, monkeypatch) -> Path:
    """As called in a terminal: standard error is no file, traces are files in this folder."""
    for module in (errors, cli):
        monkeypatch.setattr(module, "keep_trace", errors.trace_file)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def failing(fault: BaseException):
    """A function that takes anything and raises."""

    def fail(*args, **named):
        raise fault

    return fail


def said_by(module, capsys, folder) -> str:
    """What a program writes to the terminal, where its work fails; its trace lies in a file."""
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code not in (0, None)
    said = end.value.code if isinstance(end.value.code, str) else capsys.readouterr().err.strip()
    (log,) = folder.glob("retrace-*.log")
    assert f"full trace: {log}" in said and "Traceback" in log.read_text("utf-8")
    return said


@pytest.mark.parametrize("fault", UNFORESEEN, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("name", TOOLS)
def test_every_tool_ends_in_one_sentence(name, fault, by_hand, monkeypatch, capsys):
    arguments, broken = TOOLS[name]
    module = importlib.import_module(commands.MODULES[name])
    monkeypatch.setattr(module, broken, failing(fault))
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    said = said_by(module, capsys, by_hand)
    assert said.startswith("error: ") and "\n" not in said
    assert (type(fault).__name__ in said) != isinstance(fault, OSError)


@pytest.mark.parametrize("name", sorted({*commands.STAGES} - {*TOOLS}))
def test_every_stage_ends_in_one_sentence(name, by_hand, monkeypatch, capsys):
    given = argparse.Namespace(spec="{}", code=[], device="cpu", threads=1, paper="")
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda *_: given)
    monkeypatch.setattr(cli.Job, "check_inputs", failing(KeyError("x")))
    monkeypatch.setattr(kills, "end_with_parent", lambda: None)
    said = said_by(importlib.import_module(commands.MODULES[name]), capsys, by_hand)
    assert said.startswith(f"error in stage {name}: KeyError") and "\n" not in said


def test_every_tool_is_tried():
    assert TOOLS.keys() == commands.TOOLS.keys() | {"figures_js"}  # a stage without a --spec


def test_every_own_stage_of_a_paper_goes_through_the_same_door():
    files = [*(ROOT / "rules").rglob("*.py"), *(ROOT / "pipeline/papers/template").glob("*.py")]
    stages = [f for f in files if "job: cli.Job" in f.read_text("utf-8")]
    assert len(stages) > 10
    for file in stages:
        text = file.read_text("utf-8")
        tree = ast.parse(text)
        if '__name__ == "__main__"' not in text:  # own_stage.py runs what it declares
            continue
        (main,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "main")
        last = ast.unparse(main.body[-1])
        assert last.startswith(("own.main(", "cli.run(", "with command(")), file


def test_a_reader_that_closes_the_pipe_sees_no_trace(tmp_path):
    """python -m pipeline provenance show … | head -1"""
    code = (
        "from pipeline.errors import command\n"
        "with command('x'):\n    for i in range(99999): print(i)"
    )
    done = subprocess.run(
        f"{sys.executable} -c \"{code}\" | head -1", shell=True, text=True, capture_output=True,
        env=environment(), cwd=tmp_path,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("0\n", "")


@pytest.mark.parametrize("every", ["-1", "nan", "inf", "1e300"])
def test_progress_takes_seconds(every, monkeypatch):
    module = importlib.import_module(commands.MODULES["progress"])
    monkeypatch.setattr(sys, "argv", ["progress", f"--every={every}"])
    with pytest.raises(SystemExit, match="take seconds from 0 to 86400"):
        module.main()


# --- a locale that is not UTF-8 ------------------------------------------------------------

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
ROUND = r"""
import locale, pathlib, sys
from pipeline.text import documents
from pipeline.papers import scaffold
from pipeline.store import tables
from pipeline.spec import yaml_files
assert locale.getpreferredencoding().upper() not in ("UTF-8", "UTF8")
here = pathlib.Path(sys.argv[1])
assert yaml_files.load_yaml(here / "paper.yaml") == {"title": "Caf\u00e9 \u2013 \U0001f389"}
(found,) = documents.read(here / "a.jsonl", documents.Fields("text"))
assert found.text == "caf\u00e9"
tables.write_json(here / "out.json", {"name": found.text}, {})
assert tables.read_json(here / "out.json")["name"] == found.text
scaffold.scaffold("my_paper", here)
print(found.text)
"""


def test_files_are_utf8_in_any_locale(tmp_path):
    """Both ways; and what a terminal cannot show is written with escapes, not a traceback."""
    (tmp_path / "paper.yaml").write_bytes("title: Café – 🎉\n".encode())
    (tmp_path / "a.jsonl").write_bytes('{"text": "café"}\n'.encode())
    done = subprocess.run(
        [sys.executable, "-c", ROUND, str(tmp_path)], env=environment() | ASCII, text=True,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "caf\\xe9\n"
    there = (tmp_path / "my_paper" / "paper.yaml").read_bytes()
    assert there.decode("utf-8") and (tmp_path / "out.json").read_bytes().decode("utf-8")


@pytest.mark.workflow
def test_a_run_in_a_locale_that_is_not_utf8(tmp_path, monkeypatch):
    for name, value in ASCII.items():
        monkeypatch.setenv(name, value)
    project = toy_project(tmp_path / "project")
    card = project / "rules" / "papers" / "toy" / "paper.yaml"
    text = card.read_text("utf-8")
    card.write_text(text.replace("title:", "title: Café –", 1), "utf-8")
    done = snakemake(cwd=project)
    assert "Traceback" not in done.said and "toy claims" in done.said
    assert "Café –" in (project / "results/smoke/toy/report.html").read_text("utf-8")
