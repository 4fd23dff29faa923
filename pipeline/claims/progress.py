"""Where a run is, in one line; for a second terminal beside snakemake.

    python -m pipeline progress               one line
    python -m pipeline progress --every 5     the line, again every five seconds, until the run ends

It reads what snakemake and the stages write anyway: the newest log below .snakemake/log, and the
logs of the jobs that run. It changes nothing, and snakemake needs not know of it. The time left is
what the running stages themselves foresee; what comes after them nobody has measured.
"""

import argparse
import contextlib
import re
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from pipeline.claims.costs import duration
from pipeline.claims.summary import read_lines
from pipeline.errors import RetraceError, command

STAMP = re.compile(r"^\[(\w{3} \w{3} +\d+ [\d:]{8} \d{4})\]$")
RULE = re.compile(r"^(?:local)?(?:rule|checkpoint) (\w+):$")
KEY = re.compile(r"^    (jobid|log): (.+)$")
FINISHED = re.compile(r"^Finished jobid: (\d+)")
FAILED = re.compile(r"^Error in (?:rule|group) (\w+):$")
COUNTED = re.compile(r"^(\w+) +(\d+)$")
STAGE = re.compile(r"(\S+ +\d+ %  .+ left)$")  # a line of cli.Progress
BEGINS = ("Job stats:", "Nothing to be done")
LONGEST = 86_400  # seconds between two lines
ENDS = ("Complete log(s):", "Nothing to be done", "Exiting because a job execution failed")


@dataclass
class Job:
    """A job that was started."""

    rule: str
    began: datetime
    log: str = ""


@dataclass
class State:
    """What snakemake's log tells of a run."""

    total: int = 0
    papers: int = 0
    papers_done: int = 0
    began: datetime | None = None
    last: datetime | None = None
    ended: bool = False
    failed: list[str] = field(default_factory=list)
    done: int = 0
    running: dict[str, Job] = field(default_factory=dict)


def state(lines: list[str]) -> State:
    """The state of a run, out of the lines of snakemake's log."""
    out, job = State(), None
    for line in lines:
        if found := STAMP.match(line):
            job = None
            with contextlib.suppress(ValueError):  # no date, as in a log that was cut
                out.last = datetime.strptime(found[1], "%a %b %d %H:%M:%S %Y")
            out.began = out.began or out.last
        elif (found := RULE.match(line)) and out.last:
            job = Job(found[1], out.last)
        elif (found := KEY.match(line)) and job:
            if found[1] == "log":
                job.log = found[2]
            else:
                out.running[found[2]] = job
        elif found and found[1] == "jobid":  # in the block of a failure
            out.running.pop(found[2], None)
        elif found := FINISHED.match(line):
            ended = out.running.pop(found[1], None)
            out.done += 1
            out.papers_done += bool(ended and ended.rule.endswith("report_html"))
        elif found := FAILED.match(line):
            out.failed.append(found[1])
        elif found := COUNTED.match(line):
            if found[1] == "total":
                out.total = int(found[2])
            out.papers += int(found[2]) * found[1].endswith("report_html")
        out.ended = out.ended or line.startswith(ENDS)
    return out


def line(found: State, now: datetime, folder: Path) -> str:
    """The state in one line: papers and jobs done, time so far, and what runs, longest first."""
    parts = [f"{found.done} of {found.total} jobs"]
    if found.papers:
        parts.append(f"{found.papers_done} of {found.papers} papers")
    if found.failed:
        parts.append(f"failed: {', '.join(dict.fromkeys(found.failed))}")
    if found.ended or not found.began:
        took = (found.last - found.began).total_seconds() if found.began else 0
        return f"{', '.join(parts)}; ended" + (f" after {duration(took)}" if took else "")
    parts.append(f"{duration((now - found.began).total_seconds())} so far")
    jobs = sorted(found.running.values(), key=lambda j: j.began)
    return f"{', '.join(parts)}; now {', '.join(told(j, now, folder) for j in jobs) or 'nothing'}"


def told(job: Job, now: datetime, folder: Path) -> str:
    """'sae 3 min 20 s (sae 40 %  812 rows/s, 1:20 left)'."""
    age = duration((now - job.began).total_seconds())
    lines = read_lines(folder / job.log) if job.log else []
    stage = [m[1] for ln in lines if (m := STAGE.search(ln))]
    return f"{job.rule} {age}" + (f" ({' '.join(stage[-1].split())})" if stage else "")


def newest(folder: Path) -> Path:
    """The newest log of a run; --list-rules, --lint or --unlock leave logs, too, and run nothing.

    Raises:
        RetraceError: there is none.
    """
    logs = sorted((folder / ".snakemake/log").glob("*.snakemake.log"), reverse=True)
    for log in logs:
        if any(text.startswith(BEGINS) for text in read_lines(log)):
            return log
    raise RetraceError(f"{folder}: no run has a log in .snakemake/log; name --directory")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline progress",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--every", type=float, default=0, help="seconds; default: once")
    parser.add_argument("--directory", type=Path, default=Path(), help="where snakemake runs")
    args = parser.parse_args()
    with command("progress"):
        if not 0 <= args.every <= LONGEST:
            raise RetraceError(f"--every {args.every:g}: take seconds from 0 to {LONGEST}")
        try:
            follow(args.directory, args.every)
        except KeyboardInterrupt:
            print()


def follow(folder: Path, every: float) -> None:
    """Print the state of the newest run: once if `every` is 0, else until it has ended."""
    terminal = sys.stdout.isatty()
    while True:
        found = state(newest(folder).read_text(errors="replace", encoding="utf-8").splitlines())
        text = line(found, datetime.now(), folder)
        print(f"\r\x1b[K{text}" if terminal and every else text, end="", flush=True)
        if found.ended or not every:
            break
        print("" if terminal else "\n", end="")
        time.sleep(every)
    print()
