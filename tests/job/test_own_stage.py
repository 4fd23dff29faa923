"""The shared main() of papers' own stages, and progress counted over threads."""

import json
import logging
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.job import cli, own, own_stage
from pipeline.spec.base import Section
from pipeline.store import provenance, tables


class Options(Section):
    seed: int = 0


def test_tables_are_written_with_one_certificate(tmp_path, monkeypatch):
    """Inputs are files; code stands elsewhere in the certificate, and a word is no file."""
    given, code = tmp_path / "given.txt", tmp_path / "data.py"
    given.write_text("3")
    code.write_text("")
    out = {name: tmp_path / f"{name}.parquet" for name in ("some", "none")}
    options = [o for name, path in out.items() for o in (f"--{name}", str(path))]
    spec = json.dumps({"own.stage": {"seed": 3}})
    monkeypatch.setattr(sys, "argv", ["stage", "--spec", spec, "--runs", str(given), "--names",
                                      "decay", "--data", str(code), *options])  # fmt: skip

    def work(job: cli.Job, options: Options) -> own.Tables:
        made = own.Tables(out, {"none": ["a"]})
        made.add({"some": [{"a": 1}]}, first={"arm": job.args.names[0]}, seed=options.seed)
        return made

    own.main("stage", "", Options, out, work, runs="runs*", names="names*", data="data.py")
    assert tables.read_table(out["some"]).to_dict("records") == [
        {"arm": "decay", "a": 1, "seed": 3}
    ]
    assert list(tables.read_table(out["none"])) == ["a"]
    for path in out.values():
        made = provenance.read(path)
        assert [name.rsplit("/")[-1] for name in made["inputs"]] == ["given.txt"]
        assert (made["stage"], made["seed"]) == ("stage", 3)


DECLARED = '''"""A stage that a file declares, with a file beside it."""
from pipeline.job import own
from pipeline.spec.base import Section
from . import beside

TABLES = ("some", "labels")
READS = {"word": "a word"}


class Options(Section):
    tables: list[str]


def work(job, options):
    out = own.Tables(TABLES)
    out.add({"some": [{"a": beside.ONE, "word": job.args.word, "models": len(job.args.models)}]})
    return out
'''
SCRIPT = """import beside, sys

if __name__ == "__main__":
    print(beside.ONE, sys.argv[1:])
"""


@pytest.fixture
def called(tmp_path, monkeypatch):
    """Runs a stage of a paper from its text, as rules/own.smk does."""
    (tmp_path / "beside.py").write_text("ONE = 1")

    def run(text: str, *options: str) -> None:
        (tmp_path / "stage.py").write_text(text)
        monkeypatch.setattr(sys, "path", list(sys.path))
        argv = ["own", "counted", str(tmp_path / "stage.py"), *options]
        monkeypatch.setattr(sys, "argv", argv)
        own_stage.main()

    return run


def test_a_stage_that_its_file_declares_is_run_with_its_needs(called, tmp_path):
    spec = json.dumps({"own.counted": {"tables": ["some"]}})
    files = ("--some", str(tmp_path / "some.parquet"), "--models", "a", "b", "--word", "x",
             "--labels", str(tmp_path / "labels.parquet"))  # fmt: skip
    called(DECLARED, "--spec", spec, *files)
    made = tables.read_table(tmp_path / "some.parquet").to_dict("records")
    assert made == [{"a": 1, "word": "x", "models": 2}]
    assert provenance.read(tmp_path / "some.parquet")["stage"] == "counted"


def test_a_stage_with_a_main_of_its_own_is_run_as_a_script(called, capsys):
    called(SCRIPT, "--spec", "{}")
    assert capsys.readouterr().out == "1 ['--spec', '{}']\n"


def test_a_file_that_declares_no_stage_is_told(called):
    with pytest.raises(SystemExit, match=r"stage.py: a stage has .* add TABLES"):
        called("Options = 3")


def test_progress_is_counted_over_threads(caplog):
    progress = cli.Progress("work", 400, "units")
    with caplog.at_level(logging.INFO, "retrace"), ThreadPoolExecutor(4) as pool:
        list(pool.map(progress.add, [2] * 200))
    assert progress.done == 400 and caplog.messages[-1].startswith("work 100 %  ")
