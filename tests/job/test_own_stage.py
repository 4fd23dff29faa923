"""The shared main() of papers' own stages, and progress counted over threads."""

import json
import logging
import sys
from concurrent.futures import ThreadPoolExecutor

from pipeline.job import cli, own
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


def test_progress_is_counted_over_threads(caplog):
    progress = cli.Progress("work", 400, "units")
    with caplog.at_level(logging.INFO, "retrace"), ThreadPoolExecutor(4) as pool:
        list(pool.map(progress.add, [2] * 200))
    assert progress.done == 400 and caplog.messages[-1].startswith("work 100 %  ")
