"""The line that tells where a run is, out of snakemake's log and the jobs' own."""

import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from pipeline.claims import progress
from pipeline.errors import RetraceError

ROOT = Path(__file__).parents[2]
HEAD = """\
SNAKEMAKE
  Date: 2026-01-05 10:00:00
Job stats:
job            count
-----------  -------
sae                2
report_html        2
all                1
total              5

Select jobs to execute...
[Mon Jan  5 10:00:00 2026]
localrule sae:
    input: a
    output: b
    log: results/logs/sae/x.log
    jobid: 3
    reason: Missing output files: b
[Mon Jan  5 10:00:10 2026]
rule report_html:
    output: r
    log: results/logs/r.log
    jobid: 4
"""
FIRST_DONE = "[Mon Jan  5 10:01:00 2026]\nFinished jobid: 4 (Rule: report_html)\n1 of 5 steps\n"
NOW = datetime(2026, 1, 5, 10, 3, 20)


def line(text: str, folder: Path) -> str:
    return progress.line(progress.state(text.splitlines()), NOW, folder)


def test_jobs_papers_and_what_runs(tmp_path):
    assert line(HEAD, tmp_path) == (
        "0 of 5 jobs, 0 of 2 papers, 3 min 20 s so far; now sae 3 min 20 s, report_html 3 min 10 s"
    )
    assert line(HEAD + FIRST_DONE, tmp_path) == (
        "1 of 5 jobs, 1 of 2 papers, 3 min 20 s so far; now sae 3 min 20 s"
    )


def test_a_stage_tells_its_rate_and_the_time_left(tmp_path):
    log = tmp_path / "results/logs/sae/x.log"
    log.parent.mkdir(parents=True)
    log.write_text(
        "10:00:05 3 dictionaries\n10:00:10 sae   5 %  100 rows/s, 9:59 left\n"
        "10:00:15 sae  40 %  1,812 rows/s, 1:20 left\nwarning: something\n"
    )
    said = line(HEAD + FIRST_DONE, tmp_path)
    assert said.endswith("now sae 3 min 20 s (sae 40 % 1,812 rows/s, 1:20 left)")


def test_the_pattern_is_that_of_the_stages(caplog):
    from pipeline.job.cli import Progress

    with caplog.at_level("INFO", "retrace"):
        Progress("activations", 10, "tokens").at(10)
    assert progress.STAGE.search(f"10:00:00 {caplog.messages[0]}")


def test_a_failure_and_the_end(tmp_path):
    failed = "[Mon Jan  5 10:02:00 2026]\nError in rule sae:\n    jobid: 3\n    log: x\n"
    assert line(HEAD + FIRST_DONE + failed, tmp_path) == (
        "1 of 5 jobs, 1 of 2 papers, failed: sae, 3 min 20 s so far; now nothing"
    )
    ended = HEAD + FIRST_DONE + failed + "Exiting because a job execution failed.\n"
    assert line(ended, tmp_path) == (
        "1 of 5 jobs, 1 of 2 papers, failed: sae; ended after 2 min 00 s"
    )


@pytest.mark.parametrize("text", ["", "Building DAG of jobs...\n", "Nothing to be done (all)\n"])
def test_a_run_that_has_not_begun(tmp_path, text):
    assert line(text, tmp_path).startswith("0 of 0 jobs")


def test_without_a_run_it_says_so(tmp_path):
    command = [sys.executable, "-m", "pipeline", "progress", "--directory", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "no run has a log in .snakemake/log" in done.stderr


@pytest.mark.workflow
def test_a_real_run(toy_run):
    command = [sys.executable, "-m", "pipeline", "progress", "--every", "1"]
    done = subprocess.run(command, cwd=toy_run[0], capture_output=True, text=True, timeout=20)
    assert done.stdout.startswith("9 of 9 jobs, 1 of 1 papers; ended after "), done.stdout


@pytest.mark.parametrize(
    "later", ["", "Config file a.yaml is extended\n", "Unlocked working directory."]
)
def test_a_call_that_runs_nothing_is_no_run(tmp_path, later):
    """snakemake --list-rules after a run: the run is what is told."""
    logs = tmp_path / ".snakemake/log"
    logs.mkdir(parents=True)
    (logs / "2026-01-05T100000.000000.snakemake.log").write_text(HEAD)
    (logs / "2026-01-05T110000.000000.snakemake.log").write_text(later)
    assert progress.newest(tmp_path).read_text() == HEAD
    (logs / "2026-01-05T100000.000000.snakemake.log").unlink()
    with pytest.raises(RetraceError, match="no run has a log"):
        progress.newest(tmp_path)
