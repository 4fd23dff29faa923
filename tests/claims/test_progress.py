"""The line that tells where a run is, out of its events and its jobs' own logs."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.claims import progress
from pipeline.errors import RetraceError
from pipeline.job import events

ROOT = Path(__file__).parents[2]
RUN = {"event": "run", "at": 1000.0, "total": 5, "papers": 2, "host": "elsewhere", "process": 1}
SAE = {
    "event": "job", "at": 1000.0, "id": 3, "rule": "sae", "paper": "toy", "what": "",
    "log": "results/logs/sae/x.log", "output": "b", "measured": True,
}  # fmt: skip
REPORT = SAE | {"at": 1010.0, "id": 4, "rule": "report_html", "log": "", "measured": False}
HEAD = [RUN, SAE, REPORT]
DONE = {"event": "done", "at": 1060.0, "id": 4}
FAILED = {"event": "failed", "at": 1120.0, "id": 3}
END = {"event": "end", "at": 1121.0}


def write(folder: Path, *given: dict, name: str = "1") -> Path:
    file = folder / f".snakemake/log/{name}.events.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(event) + "\n" for event in given))
    return file


def line(folder: Path, *given: dict) -> str:
    return progress.line(events.read(write(folder, *given)), 1200.0, folder)


def test_jobs_papers_and_what_runs(tmp_path):
    assert line(tmp_path, *HEAD) == (
        "0 of 5 jobs, 0 of 2 papers, 3 min 20 s so far; now toy sae (3 min 20 s), "
        "toy report_html (3 min 10 s)"
    )
    assert line(tmp_path, *HEAD, DONE) == (
        "1 of 5 jobs, 1 of 2 papers, 3 min 20 s so far; now toy sae (3 min 20 s)"
    )


def test_a_stage_tells_its_rate_and_the_time_left(tmp_path):
    log = tmp_path / "results/logs/sae/x.log"
    log.parent.mkdir(parents=True)
    log.write_text(
        "10:00:05 3 dictionaries\n10:00:10 sae   5 %  100 rows/s, 9:59 left\n"
        "10:00:15 sae  40 %  1,812 rows/s, 1:20 left\nwarning: something\n"
    )
    said = line(tmp_path, *HEAD, DONE)
    assert said.endswith("now toy sae (3 min 20 s, 40 %, 1,812 rows/s, 1:20 left)")


def test_the_pattern_is_that_of_the_stages(caplog):
    from pipeline.job.cli import Progress

    with caplog.at_level("INFO", "retrace"):
        Progress("activations", 10, "tokens").at(10)
    assert events.PROGRESS.search(f"10:00:00 {caplog.messages[0]}")


def test_a_failure_another_attempt_and_the_end(tmp_path):
    failed = [*HEAD, DONE, FAILED]
    assert line(tmp_path, *failed) == (
        "1 of 5 jobs, 1 of 2 papers, failed: toy sae, 3 min 20 s so far; now nothing"
    )
    assert line(tmp_path, *failed, END) == (
        "1 of 5 jobs, 1 of 2 papers, failed: toy sae; ended after 2 min 01 s"
    )
    assert "failed" not in line(tmp_path, *failed, SAE | {"at": 1121.0})


def test_a_run_that_was_killed(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here = {"host": socket.gethostname()}
    assert line(tmp_path, RUN | here | {"process": gone.pid}, SAE).endswith(
        "; killed; call it again and it goes on"
    )
    assert "killed" not in line(tmp_path, RUN | here | {"process": os.getpid()}, SAE)
    assert "killed" not in line(tmp_path, RUN | {"process": gone.pid}, SAE)  # on another machine


def test_without_a_run_it_says_so(tmp_path):
    command = [sys.executable, "-m", "pipeline", "progress", "--directory", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "no run has a log in .snakemake/log" in done.stderr


@pytest.mark.workflow
def test_a_real_run(toy_run):
    command = [sys.executable, "-m", "pipeline", "progress", "--every", "1"]
    done = subprocess.run(command, cwd=toy_run[0], capture_output=True, text=True, timeout=20)
    assert done.stdout.startswith("8 of 8 jobs, 1 of 1 papers; ended after "), done.stdout


def test_the_newest_run_is_told(tmp_path):
    """A call that runs nothing, as snakemake --list-rules, leaves a log and no events."""
    first, second = write(tmp_path, RUN, name="2026-01"), write(tmp_path, RUN, name="2026-02")
    (second.parent / "2026-03.snakemake.log").write_text("Config file a.yaml is extended\n")
    assert progress.newest(tmp_path) == second
    second.unlink()
    first.unlink()
    with pytest.raises(RetraceError, match="no run has a log"):
        progress.newest(tmp_path)
