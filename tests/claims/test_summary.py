"""What snakemake prints: claims that line up, costs, and the sentence of a failed stage."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import synthetic
import warm

from pipeline.claims import summary
from pipeline.job.events import JobState

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
    rows = [ROW, long, {**ROW, "ours": "", "paper_value": ""}]
    head, _, *lines = summary.aligned(rows, columns)
    starts = [head.index(title) for title in ("claim", "paper", "ours", "verdict")]
    assert all(line[start - 1] == " " != line[start] for line in lines for start in starts)
    assert all(line.split()[0] == row["id"] for line, row in zip(lines, rows, strict=True))
    assert all(line.endswith("reproduced") for line in lines)
    # ids and verdicts are never cut, so a very narrow terminal wraps
    assert max(map(len, lines)) <= max(columns, 60)
    assert ("…" in lines[1]) is (columns < 400)


def test_a_terminal_has_colours_and_a_log_has_none():
    coloured = summary.aligned([ROW, ROW | {"verdict": "not reproduced"}], 80, colour=True)
    bare = summary.aligned([ROW, ROW | {"verdict": "not reproduced"}], 80)
    assert "\x1b" not in "".join(bare) and "\x1b[32mreproduced" in coloured[2]
    assert [re.sub(r"\x1b\[[\d;]*m", "", line).rstrip() for line in coloured] == bare


def test_no_table_where_no_claim_is_judged(made_up, capsys, monkeypatch):
    """A smoke run judges nothing: its claims are counted, and the report lists them."""
    rows = [ROW | {"kind": "value", "verdict": "plumbing", "id": "rises"}]
    monkeypatch.setattr(summary, "read_claims", lambda path: rows)
    with synthetic.inside(made_up[0]):
        summary.print_claims("results/laptop", ["made_up"])
    out = capsys.readouterr().out
    assert "made_up: no claim is judged at this scale; 1 plumbing" in out and "rises" not in out


def test_numbers_are_short_and_nothing_is_a_dash():
    assert summary.shown(ROW, "ours") == "0.5123"
    assert summary.shown({**ROW, "sd": "0.00123"}, "ours") == "0.5123 ± 0.00123"
    assert summary.shown({**ROW, "ours": ""}, "ours") == "-"
    assert summary.headline(summary.tally([])) == "no claims"


WORKFLOW = """
import sys
sys.path.insert(0, {root!r})
from pipeline.claims import terminal

terminal.attach(workflow.logger_manager, sys.argv, ["all"])

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
    command = [warm.python(), "-m", "snakemake", "-c2", "--keep-going"]
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 1
    assert re.search(r"told failed after \d+\.\d s$", done.stderr, re.M)
    assert "  log: logs/a b.log\n  | work\n  by hand, in a debugger: see shell: in " in done.stderr
    assert "\nerror in stage told: x is 3; make it 4\n  this job alone: " in done.stderr
    assert "  log: logs/b.log\n  | Traceback\n  | KeyError: 7\n" in done.stderr
    assert "\nrule crashed failed; its log ends: KeyError: 7\n  this job" in done.stderr
    assert "not shown" not in done.stderr and "Exiting" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("  this job alone: ")
    alone = re.findall(r"^  this job alone: (.+)$", done.stderr, re.M)
    assert len(alone) == 2
    for line in alone:  # each fails again, by itself
        again = subprocess.run(shlex.split(line), cwd=tmp_path, capture_output=True, env=env)
        assert again.returncode == 1 and again.stderr.count(b" failed after ") == 1, again.stderr


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
    lost = [JobState(1, "x", log=str(tmp_path / "gone.log")), JobState(2, "y")]
    summary.print_failures(lost, "snakemake", tmp_path / "snakemake.log")
    said = capsys.readouterr().err
    assert "rule x failed and left no log" in said and "rule y failed and left no log" in said
    assert "this job alone" not in said  # no file is known
