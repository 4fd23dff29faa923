"""What a run shows while it lasts: its lines, its bar, its faults at the end."""

import fcntl
import io
import logging
import os
import pty
import re
import struct
import subprocess
import termios
from pathlib import Path
from types import SimpleNamespace

import pytest
import warm

from pipeline.claims import terminal
from pipeline.claims.terminal import Terminal, shortened
from pipeline.job import events
from pipeline.job.events import Journal

ROOT = Path(__file__).parents[2]
TARGETS = {"all"}


class Kept(logging.Handler):
    """Stands for snakemake's own handler: keeps what it is handed."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(str(record.msg))


def record(event: str | None = None, msg: str = "", level: int = logging.INFO, **fields):
    """A log record as snakemake hands one to its handlers."""
    given = {"name": "snakemake", "msg": msg, "levelno": level, **fields}
    return logging.makeLogRecord(given | ({"event": event} if event else {}))


def info(id: int, rule: str, measured: bool = False, **wildcards: str):
    log, output = f"logs/{id}.log", [f"out/{id}", "b"]
    return record(
        "job_info", jobid=id, rule_name=rule, wildcards=wildcards, log=[log], output=output,
        benchmark="x.tsv" if measured else None,
    )  # fmt: skip


def done(id: int):
    return record("job_finished", job_id=id)


def begun(**stats: int):
    return record("run_info", stats={**stats, "total": sum(stats.values())})


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """(terminal, its lines without the time): of a log, as a pipe and CI have it."""
    monkeypatch.chdir(tmp_path)
    made = Terminal(
        Journal("2026.snakemake.log"), Kept(), stream=io.StringIO(), command="snakemake -c2",
        papers_of=lambda w: [w["paper"]] if "paper" in w else ["a_paper", "another"],
        is_target=TARGETS.__contains__,
    )  # fmt: skip

    def lines() -> list[str]:
        found = made.stream.getvalue().splitlines()
        assert all(re.match(r"\d\d:\d\d:\d\d  ", line) for line in found)
        return [re.sub(r"\d+\.\d s", "T", line[10:]) for line in found]

    yield made, lines
    made.close()


def feed(shown: Terminal, *records: logging.LogRecord) -> None:
    for one in records:
        shown.emit(one)


# --- lines ---------------------------------------------------------------------------------


def test_a_job_that_is_measured_has_two_lines_and_quick_ones_share_one(shown):
    made, lines = shown
    feed(made, begun(all=1, sae=1, toy_own=1, figures=3, report_html=1))
    feed(made, info(1, "sae", True, sae="gpt2-hook-0123456789ab"), info(2, "toy_own", paper="toy"))
    feed(made, done(2), info(3, "figures", paper="toy", figure="one"))
    feed(made, info(4, "figures", paper="toy", figure="two"), done(3), done(1), done(4))
    feed(made, info(5, "figures", paper="toy", figure="three"), done(5))
    feed(made, info(6, "report_html", paper="toy"), done(6), done(0))
    assert lines() == [
        "6 jobs; Snakemake's own text: 2026.snakemake.log",
        "     a_paper and 1 more sae gpt2-hook started",
        "1/6  toy own  T",
        "3/6  a_paper and 1 more sae gpt2-hook  T",
        "5/6  toy figures: one, two, three  T",
        "6/6  toy report_html  T",
        "6 jobs done in T",
    ]


def test_no_line_is_longer_than_120_characters(shown):
    made, lines = shown
    name = "a_long_name_of_a_dictionary_" * 5
    feed(made, begun(sae=2, figures=99), info(1, "sae", True, paper="toy", arm=name), done(1))
    for i in range(2, 101):
        feed(made, info(i, "figures", paper="toy", figure=f"{name}{i}"), done(i))
    feed(made, info(101, "sae", True, paper="toy"), done(101))
    assert len(lines()) == 7
    assert max(len(line) + 10 for line in lines()) <= 120


def test_a_minute_of_silence_is_broken_by_what_runs(shown, tmp_path):
    made, lines = shown
    log = tmp_path / "logs/1.log"
    log.parent.mkdir()
    log.write_text("10:00:00 sae  40 %  1,812 rows/s, 1:20 left\n10:00:01 a warning\n")
    feed(made, begun(sae=5), info(1, "sae", True, paper="toy"))
    feed(made, *(info(i, "sae", paper="b", arm=f"arm{i}") for i in range(2, 6)))
    made.look()
    assert len(lines()) == 2  # nothing, as something has just been said
    made.said -= terminal.SILENCE + 1
    made.look()
    made.look()
    (line,) = lines()[2:]
    running = "toy sae T, 40 %, 1,812 rows/s, 1:20 left; b sae arm2 T; b sae arm3 T; and 2 more"
    assert line == f"0/5  running: {running}"
    assert terminal.SILENCE + terminal.SECOND < 60


def test_quiet_says_nothing_of_jobs(tmp_path, capsys):
    out = io.StringIO()
    made = Terminal(Journal(tmp_path / "a.snakemake.log"), Kept(), quiet=True, stream=out)
    feed(made, begun(sae=1), info(1, "sae", True, paper="toy"), done(1))
    made.close()
    assert out.getvalue() == "" and events.read(made.journal.path).done == 1


# --- what snakemake says beside its events -------------------------------------------------


def test_of_snakemakes_own_words_warnings_and_faults_pass(shown):
    made, _ = shown
    feed(made, record(msg="Config file is extended"), record("workflow_started", "SNAKEMAKE"))
    feed(made, record(msg="Building DAG"), record(msg="Nothing to be done (all is there)"))
    feed(made, *[record(msg="Will exit after finishing currently running jobs")] * 3)
    feed(made, begun(sae=1), record(msg="Select jobs to execute..."), info(1, "sae", True, a="b"))
    feed(made, record("shellcmd", "Shell command: x"), record("progress", ""))
    feed(made, record(msg="a warning", level=logging.WARNING))
    feed(made, record("error", "MissingOutputException", level=logging.ERROR))
    passed = ["Config file is extended", "Nothing to be done (all is there)"]
    passed += ["Will exit after finishing currently running jobs", "a warning"]
    assert made.plain.texts == [*passed, "MissingOutputException"]


def test_a_fault_comes_last_with_its_sentence_and_its_command(shown, tmp_path, capsys):
    made, lines = shown
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/1.log").write_text("work\nerror in stage sae: k is 0; give k\n")
    feed(made, begun(sae=2), info(1, "sae", True, paper="toy"))
    feed(made, record("job_error", "Error in rule sae", logging.ERROR, jobid=1))
    words = ["Exiting because a job execution failed.", "At least one job did not complete"]
    feed(made, *(record("error", text, logging.ERROR) for text in words))
    assert lines()[-1] == "     toy sae failed after T" and made.plain.texts == []
    made.close()
    said = capsys.readouterr().err.splitlines()
    assert said[-2:] == [
        "error in stage sae: k is 0; give k", "  this job alone: snakemake -c2 -- out/1"
    ]  # fmt: skip
    assert "  | work" in said


def test_another_attempt_that_succeeds_is_no_fault(shown, capsys):
    made, lines = shown
    feed(made, begun(sae=1), info(1, "sae", True, paper="toy"))
    feed(made, record("job_error", "", logging.ERROR, jobid=1), info(1, "sae", True, paper="toy"))
    feed(made, done(1))
    made.close()
    assert capsys.readouterr().err == "" and lines()[-1] == "1 job done in T"


def test_a_fault_of_ours_does_not_end_the_run(shown, capsys):
    made, _ = shown
    feed(made, record("job_info"))
    assert "AttributeError" in capsys.readouterr().err


# --- in snakemake's place ------------------------------------------------------------------


def manager(logs: list[str], *handlers: logging.Handler, **asked):
    """As snakemake's LoggerManager."""
    logger = logging.Logger("of the test")
    for handler in handlers:
        logger.addHandler(handler)
    settings = {"printshellcmds": False, "verbose": False, "debug_dag": False, "quiet": None}
    return SimpleNamespace(
        logger=logger, get_logfile=lambda: logs, settings=SimpleNamespace(**settings | asked)
    )


@pytest.mark.parametrize(
    "asked, name, stays",
    [
        ({}, terminal.DEFAULT, False),
        ({"printshellcmds": True}, terminal.DEFAULT, True),
        ({"verbose": True}, terminal.DEFAULT, True),
        ({}, "a handler of --logger", True),
    ],
)
def test_it_takes_the_place_of_snakemakes_handler(asked, name, stays):
    plain = Kept()
    plain.name = name
    given = manager(["a/1.snakemake.log"], plain, **asked)
    for _ in range(2):  # a workflow that is imported as a module twice
        terminal.attach(given, ["snakemake"], [])
    assert (plain in given.logger.handlers) is stays
    (ours,) = [h for h in given.logger.handlers if isinstance(h, Terminal)]
    assert (ours.plain is None) is stays
    assert ours.journal.path == Path("a/1.events.jsonl")


def test_a_dry_run_is_left_alone():
    given = manager([], plain := Kept())
    terminal.attach(given, ["snakemake", "-n"], [])
    assert given.logger.handlers == [plain]


SNAKEFILE = """
import sys
sys.path.insert(0, {root!r})
from pipeline.claims import terminal

def is_target(rule):
    return workflow.get_rule(rule).norun

terminal.attach(
    workflow.logger_manager, sys.argv, ["all"], is_target=is_target,
    papers_of=lambda wildcards: [wildcards["paper"]] if "paper" in wildcards else [],
)

rule all:
    input: "a.txt", expand("toy/figure_{{figure}}.txt", figure="circle line plane square".split())

rule train:
    output: "a.txt"
    log: "logs/train.log"
    benchmark: "train.tsv"
    shell:
        "echo '10:00:00 train  40 %  1,812 rows/s, 1:20 left' > {{log}};"
        " {wait} touch {{output}}"

rule figures:
    output: "{{paper}}/figure_{{figure}}.txt"
    shell: "touch {{output}}"
"""


def snakefile(folder: Path, wait: str = "") -> list[str]:
    """Write a workflow of five jobs; the command that runs it."""
    (folder / "Snakefile").write_text(SNAKEFILE.format(root=str(ROOT), wait=wait))
    return [warm.python(), "-m", "snakemake", "-c1"]


def env(folder: Path) -> dict[str, str]:
    return {**os.environ, "XDG_CACHE_HOME": str(folder), "TERM": "xterm"}


@pytest.mark.workflow
def test_a_run_in_a_pipe(tmp_path):
    command = snakefile(tmp_path)
    where = {"cwd": tmp_path, "env": env(tmp_path), "text": True, "capture_output": True}
    run = subprocess.run(command, **where)
    lines = [line for line in run.stderr.splitlines() if re.match(r"\d\d:\d\d:\d\d  ", line)]
    assert run.returncode == 0 and run.stdout == ""
    assert len(run.stderr.splitlines()) - len(lines) <= 1  # "Assuming unrestricted …"
    assert "\r" not in run.stderr and "\x1b" not in run.stderr
    assert len(lines) <= 8 and max(map(len, lines)) <= 120
    assert re.search(r"  train started$", run.stderr, re.M)
    assert re.search(r"^.{10}\d/5  train  \d+\.\d s$", run.stderr, re.M)
    assert (
        sum(line.count(name) for line in lines for name in "circle line plane square".split()) == 4
    )
    assert re.search(r"5 jobs done in \d+\.\d s$", run.stderr)
    (log,) = (tmp_path / ".snakemake/log").glob("*.snakemake.log")
    assert "5 of 6 steps" in log.read_text() and "rule train:" in log.read_text()
    (journal,) = (tmp_path / ".snakemake/log").glob("*.events.jsonl")
    found = events.read(journal)
    assert (found.done, found.total, found.ended, found.lost()) == (5, 5, True, False)
    again = subprocess.run(command, **where)  # nothing to do: said, and no journal
    assert "Nothing to be done" in again.stderr and "jobs" not in again.stderr.split("Nothing")[0]
    assert list((tmp_path / ".snakemake/log").glob("*.events.jsonl")) == [journal]
    text = subprocess.run([*command, "-p", "--forceall"], **where).stderr
    assert "rule train:" in text and "5 of 6 steps" in text and "train started" not in text
    plan = subprocess.run([*command, "-n", "--forceall"], **where).stdout
    assert "rule train:" in plan and "This was a dry-run" in plan


@pytest.mark.parametrize(
    ("room", "told"),
    [
        (90, "toy sae gpt2-small-hook T, 40 %, 1,812 rows/s, 1:20 left"),
        (50, "toy sae T, 40 %, 1,812 rows/s, 1:20 left"),
        (38, "toy sae T, 40 %, 1:20 left"),
    ],
)
def test_per_cent_and_time_left_stand_in_a_narrow_bar(shown, room, told):
    made, _ = shown
    feed(made, begun(sae=1), info(1, "sae", True, paper="toy", arm="gpt2-small-hook"))
    Path("logs").mkdir()
    Path("logs/1.log").write_text("10:00:00 sae  40 %  1,812 rows/s, 1:20 left\n")
    assert re.sub(r"\d\.\d s", "T", made.running(room)) == told


@pytest.mark.parametrize("most", [60, 90, 120])
def test_a_line_that_is_cut_keeps_how_long_its_job_took(most):
    line = shortened(f"20:12:36  20/38  toy figures: {'frontier, ' * 20}  27.0 s", most)
    assert len(line) == most and line.endswith("…  27.0 s") and line.startswith("20:12:36  20/38")
    assert shortened("short  1.0 s", most) == "short  1.0 s"


@pytest.mark.workflow
def test_a_run_on_a_terminal_has_a_bar(tmp_path):
    """The job waits until its line of progress has been seen."""
    command = snakefile(tmp_path, "while [ ! -e go ]; do sleep 0.1; done;")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 90, 0, 0))
    run = subprocess.Popen(
        [*command, "a.txt"], cwd=tmp_path, env=env(tmp_path), stdin=theirs, stdout=theirs,
        stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    said = b""
    while chunk := read(ours):
        said += chunk
        if b"40 %, 1,812 rows/s, 1:20 left" in said:
            (tmp_path / "go").touch()
    os.close(ours)
    assert run.wait() == 0
    text = said.decode()
    assert re.search(r"\r0/1 .{10} train \d+\.\d s, 40 %, 1,812 rows/s, 1:20 left", text)
    assert re.search(r"\d\d  1/1  train  \d+\.\d s\r\n", text)
    drawn = re.findall(r"\r(0/1 [^\r]*)", text)
    assert drawn and max(map(len, drawn)) <= 90
    assert re.split(r"[\r\n]", text)[-1].strip() == ""  # the bar is gone


def read(fd: int) -> bytes:
    """What a terminal's program writes next; nothing where it has ended."""
    try:
        return os.read(fd, 4096)
    except OSError:
        return b""


def test_the_paper_of_an_own_stage_is_read_off_its_output(shown):
    """Its rule has no wildcards."""
    made, lines = shown
    about = {"wildcards": {}, "log": ["l"], "benchmark": "x.tsv"}
    own = {"rule_name": "toy_measure", "output": ["results/smoke/toy/measure/a.parquet"]}
    index = {"rule_name": "index", "output": ["results/smoke/index.html"]}
    feed(made, begun(toy_measure=1, index=1))
    feed(made, record("job_info", jobid=1, **own, **about), done(1))
    feed(made, record("job_info", jobid=2, **index, **about), done(2))
    assert [line for line in lines() if "/2" in line] == ["1/2  toy measure  T", "2/2  index  T"]
