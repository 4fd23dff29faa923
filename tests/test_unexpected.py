"""Faults that nobody foresaw: one sentence for the terminal, the trace in the log."""

import subprocess
import sys

import pytest
from conftest import environment
from snake import snakemake, toy_project

from pipeline.claims import summary

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


def called(tmp_path, fault: str, log=None) -> subprocess.CompletedProcess:
    (tmp_path / "own.py").write_text(STAGE.format(fault=fault))
    command = [sys.executable, str(tmp_path / "own.py"), "--spec", "{}"]
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
    main = tmp_path / "snakemake.log"
    main.write_text(f"Error in rule own:\n    output: x.parquet\n    log: {log} (check log file)\n")
    summary.print_failure(str(main))
    shown = capsys.readouterr().err
    assert shown.count("error in stage own: TypeError") == 1
    assert "Traceback" not in shown and "own.py" not in shown


def test_traces_of_libraries_stay_in_the_log_too():
    lines = ["10:00:00 begun", "Traceback (most recent call last):", '  File "a.py", line 1',
             "    x()", "ValueError: no", "last"]  # fmt: skip
    assert summary.without_traces(lines) == ["10:00:00 begun", "last"]


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
    assert "Traceback" not in done.said and "rule claims" in done.said
    assert "Café –" in (project / "results/smoke/toy/report.html").read_text("utf-8")
