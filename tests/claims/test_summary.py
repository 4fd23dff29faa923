"""What snakemake prints: claims that line up, costs, and the sentence of a failed stage."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import synthetic

from pipeline.claims import summary

ROW = {"id": "c", "paper_value": "0.5", "ours": "0.51234567", "sd": "", "verdict": "reproduced"}


def test_claims_are_printed_with_costs_and_the_index(made_up, capsys):
    root, _ = made_up
    with synthetic.inside(root):
        failed = summary.print_claims("results/laptop", ["made_up", "not_there"])
    out = capsys.readouterr().out
    assert failed == ["made_up.wrong_way"]
    assert "made_up: 2 of 3 claims judged at this scale are reproduced; 1 not comparable" in out
    assert "made in 3 min 14 s of jobs; the longest: evaluation_trained 2 min 05 s" in out
    assert str(root / "results/laptop/made_up/report.html") in out
    assert out.strip().endswith(str(root / "results/laptop/index.html"))


@pytest.mark.parametrize("columns", [40, 80, 120, 400])
def test_columns_line_up_and_fit(columns):
    long = {**ROW, "id": "a_longer_name", "paper_value": "x" * 90, "ours": "y" * 50}
    lines = summary.aligned(
        [ROW, long, {**ROW, "sd": "0.0123", "ours": "", "paper_value": ""}], columns
    )
    bars = [[i for i, c in enumerate(line) if c in "|+"] for line in lines]
    assert all(b == bars[0] for b in bars)
    # ids and verdicts are never cut, so a very narrow terminal wraps
    assert max(map(len, lines)) <= max(columns, 70)


def test_numbers_are_short_and_nothing_is_a_dash():
    assert summary.shown(ROW, "ours") == "0.5123"
    assert summary.shown({**ROW, "sd": "0.00123"}, "ours") == "0.5123 ± 0.00123"
    assert summary.shown({**ROW, "ours": ""}, "ours") == "-"
    assert summary.headline(summary.tally([])) == "no claims"


WORKFLOW = """
import sys
sys.path.insert(0, {root!r})
from pipeline.claims import summary

onerror:
    summary.print_failure(log, summary.without_targets(sys.argv, ["all"]))

rule all:
    input: "a.txt", "b.txt", "c.txt"

rule told:
    output: "a.txt"
    log: "logs/a b.log"
    shell: "(echo work; echo 'error in stage told: x is 3; make it 4'; exit 1) 2> {{log:q}} >&2"

rule crashed:
    output: "b.txt"
    log: "logs/b.log"
    shell: "(echo 'Traceback' >&2; echo 'KeyError: 7' >&2; exit 1) 2> {{log:q}}"

rule fine:
    output: "c.txt"
    log: "logs/c.log"
    shell: "(echo 'error in stage fine: not shown' >&2; touch {{output}}) 2> {{log:q}}"
"""


@pytest.mark.workflow
def test_a_failure_is_told_with_its_log(tmp_path):
    root = str(Path(__file__).parents[2])
    (tmp_path / "Snakefile").write_text(WORKFLOW.format(root=root))
    command = [sys.executable, "-m", "snakemake", "-c2", "--keep-going"]
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 1
    assert "error in stage told: x is 3; make it 4\n  log: logs/a b.log" in done.stderr
    assert "rule crashed failed; its log ends: KeyError: 7\n  log: logs/b.log" in done.stderr
    assert "not shown" not in done.stderr
    assert "  log: logs/b.log\n  | Traceback\n  | KeyError: 7\n" in done.stderr
    assert "  log: logs/a b.log\n  | work\n" in done.stderr
    alone = re.findall(r"^  this job alone: (.+)$", done.stderr, re.M)
    assert len(alone) == 2 and "see shell: in " in done.stderr
    for line in alone:  # each fails again, by itself
        again = subprocess.run(shlex.split(line), cwd=tmp_path, capture_output=True, env=env)
        assert again.returncode == 1 and again.stderr.count(b"Error in rule") == 1, again.stderr


@pytest.mark.parametrize(
    "argv, command",
    [
        (["bin/snakemake", "-c2"], "bin/snakemake -c2"),
        (["bin/snakemake", "-c2", "toy"], "bin/snakemake -c2"),
        (["bin/snakemake", "-c2", "results/laptop/toy/claims.csv"], "bin/snakemake -c2"),
        (["bin/snakemake", "--config", "scale=smoke", "--", "toy"],
         "bin/snakemake --config scale=smoke"),
        (["x/snakemake/__main__.py", "--directory", "a b"],
         f"{sys.executable} -m snakemake --directory 'a b'"),
    ],
)  # fmt: skip
def test_the_command_line_without_its_targets(argv, command):
    assert summary.without_targets(argv, ["toy"]) == command


def test_a_lost_log_is_no_second_failure(tmp_path, capsys):
    summary.print_failure([str(tmp_path / "none.log")])
    log = tmp_path / "snakemake.log"
    log.write_text("Error in rule x:\n    jobid: 1\n    log: gone.log (check log file(s) for …)\n")
    summary.print_failure(str(log))
    assert "rule x failed and left no log" in capsys.readouterr().err
