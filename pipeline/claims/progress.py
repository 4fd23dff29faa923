"""Where a run is, in one line; for a second terminal beside snakemake.

    python -m pipeline progress               one line
    python -m pipeline progress --every 5     the line, again every five seconds, until the run ends

It reads the events that a run writes down (events.py) below .snakemake/log, and the logs of the
jobs that run. It changes nothing. The time left is what the running stages themselves foresee;
what comes after them nobody has measured.
"""

import argparse
import sys
import time
from pathlib import Path

from pipeline.claims.costs import duration
from pipeline.claims.terminal import at
from pipeline.errors import RetraceError, command
from pipeline.job import events
from pipeline.job.events import State

LONGEST = 86_400  # seconds between two lines


def line(state: State, now: float, folder: Path) -> str:
    """The state in one line: papers and jobs done, time so far, and what runs, longest first.

    Args:
        now: seconds since 1970.
        folder: the working directory of the run, in which its jobs' logs are named.
    """
    parts = [f"{state.done} of {state.total} jobs"]
    if state.papers:
        parts.append(f"{state.papers_done} of {state.papers} papers")
    if state.failed:
        parts.append(f"failed: {', '.join(dict.fromkeys(map(str, state.failed.values())))}")
    if state.ended or not state.began:
        took = duration(state.last - state.began) if state.began else ""
        return f"{', '.join(parts)}; ended" + (f" after {took}" if took else "")
    if state.lost():
        return f"{', '.join(parts)}; killed; call it again and it goes on"
    parts.append(f"{duration(now - state.began)} so far")
    jobs = sorted(state.running.values(), key=lambda job: job.began)
    told = ", ".join(f"{job} ({at(job, now, folder)})" for job in jobs)
    return f"{', '.join(parts)}; now {told or 'nothing'}"


def newest(folder: Path) -> Path:
    """The journal of the newest run; a call that runs nothing leaves none.

    Raises:
        RetraceError: there is none.
    """
    journals = sorted((folder / ".snakemake/log").glob(f"*{events.EVENTS}"))
    if not journals:
        raise RetraceError(f"{folder}: no run has a log in .snakemake/log; name --directory")
    return journals[-1]


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
        state = events.read(newest(folder))
        text = line(state, time.time(), folder)
        print(f"\r\x1b[K{text}" if terminal and every else text, end="", flush=True)
        if state.ended or state.lost() or not every:
            break
        print("" if terminal else "\n", end="")
        time.sleep(every)
    print()
