"""What happens in a run of snakemake: its events as lines of JSON, and the state they add up to.

1. Snakemake hands every log handler its events (snakemake-interface-logger-plugins: JOB_INFO,
   JOB_FINISHED, …). `of_record` keeps of each what a reader of a run wants to know.
2. `Journal` appends them to .snakemake/log/<time>.events.jsonl, beside snakemake's own log.
3. `State` follows them: what is done, what runs, what failed. The terminal holds one while the run
   lasts (terminal.py), and `python -m pipeline progress` reads one out of the file, at any time.

Standard library only, since snakemake imports it on every call.
"""

import json
import os
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOG, EVENTS = ".snakemake.log", ".events.jsonl"
DIGEST = re.compile(r"-[0-9a-f]{12}$")  # at the end of a store artefact's name
STORED = re.compile(r" \([a-z, ]+ storage\)$")  # behind a file's name
OF_PAPER = re.compile(r"(?:^|/)results/(?!store/)[^/]+/([^/]+)/")  # rules of own stages name files
PROGRESS = re.compile(r"(\d+ %  .+ left)$")  # the end of a line of cli.Progress in a log
DAMAGED = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)


@dataclass
class JobState:
    """A job that was started.

    Attributes:
        paper: the paper, or the papers, that it works for; '' where that is not known.
        what: what tells it from other jobs of its stage: an arm, a figure, a model.
        log, output: its first log and its first output, as snakemake names them.
        measured: whether its cost is benchmarked, as that of every job that computes is.
        began: seconds since 1970.
    """

    id: int
    rule: str
    paper: str = ""
    what: str = ""
    log: str = ""
    output: str = ""
    measured: bool = False
    began: float = 0.0

    @property
    def stage(self) -> str:
        """The rule's name; of a paper's own rule, without the name of the paper."""
        return self.rule.split(f"{self.paper}_", 1)[-1] if self.paper else self.rule

    def __str__(self) -> str:
        return " ".join(filter(None, (self.paper, self.stage, self.what)))


@dataclass
class State:
    """What the events of a run add up to; times are seconds since 1970."""

    total: int = 0
    papers: int = 0
    papers_done: int = 0
    began: float = 0.0
    last: float = 0.0
    host: str = ""
    process: int = 0
    ended: bool = False
    done: int = 0
    running: dict[int, JobState] = field(default_factory=dict)
    failed: dict[int, JobState] = field(default_factory=dict)

    def take(self, event: dict[str, Any]) -> JobState | None:
        """Follow one event; the job that it is about."""
        kind, self.last = event["event"], float(event["at"])
        if kind == "run":
            self.total, self.papers = int(event["total"]), int(event["papers"])
            self.host, self.process = str(event["host"]), int(event["process"])
            self.began = self.last
        elif kind == "job":
            texts = {k: str(event[k]) for k in ("rule", "paper", "what", "log", "output")}
            job = JobState(
                int(event["id"]), **texts, measured=bool(event["measured"]), began=self.last
            )
            self.running[job.id] = job
            self.failed.pop(job.id, None)  # another attempt
            return job
        elif kind in ("done", "failed"):
            job = self.running.pop(int(event["id"]), None)
            if job and kind == "failed":
                self.failed[job.id] = job
            elif job:
                self.done += 1
                self.papers_done += job.rule.endswith("report_html")
            return job
        self.ended = self.ended or kind == "end"
        return None

    def lost(self) -> bool:
        """Whether the run was killed: its process is gone, here, and it wrote no end."""
        if self.ended or not self.process or self.host != socket.gethostname():
            return False
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):  # another user's
            return False
        return False


class Journal:
    """The file of a run's events; it is begun with the first one."""

    def __init__(self, log: str | Path) -> None:
        """log: snakemake's own log of the run."""
        self.log = Path(log)
        self.path = Path(str(log).removesuffix(LOG) + EVENTS)

    def write(self, event: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as f:
            f.write(json.dumps(event) + "\n")


def read(path: Path) -> State:
    """The state of a run, out of its journal; lines that a kill or a full disk cut are left out."""
    state = State()
    for line in read_lines(path):
        try:
            state.take(json.loads(line))
        except DAMAGED:
            continue
    return state


def of_record(
    record: Any, papers_of: Callable[[dict[str, str]], list[str]], is_target: Callable[[str], bool]
) -> dict[str, Any] | None:
    """One of snakemake's log records as an event; None where it tells nothing of a run's course.

    Args:
        papers_of: wildcards of a job -> the papers that it works for.
        is_target: whether a rule only names files, such as `all`, and does nothing.
    """
    kind, now = str(getattr(record, "event", "")), {"at": round(time.time(), 3)}
    if kind == "run_info":
        stats = {k: n for k, n in record.stats.items() if k != "total" and not is_target(k)}
        papers = sum(n for rule, n in stats.items() if rule.endswith("report_html"))
        who = {"host": socket.gethostname(), "process": os.getpid()}
        return {"event": "run", **now, "total": sum(stats.values()), "papers": papers, **who}
    if kind == "job_info" and not is_target(record.rule_name):
        return {"event": "job", **now, **_job(record, papers_of)}
    if kind == "job_finished":
        return {"event": "done", **now, "id": record.job_id}
    if kind == "job_error":
        return {"event": "failed", **now, "id": record.jobid}
    return None


def _job(record: Any, papers_of: Callable[[dict[str, str]], list[str]]) -> dict[str, Any]:
    """What is kept of a job that starts."""
    wildcards = dict(record.wildcards or {})
    output = STORED.sub("", next(iter(record.output or []), ""))
    papers = papers_of(wildcards) if wildcards else OF_PAPER.findall(output)
    rest = [v for k, v in wildcards.items() if k not in ("scale", "paper")]
    return {
        "id": record.jobid,
        "rule": record.rule_name,
        "paper": " and ".join(papers[:1] + [f"{len(papers) - 1} more"] * (len(papers) > 1)),
        "what": " ".join(DIGEST.sub("", v) for v in rest),
        "log": STORED.sub("", next(iter(record.log or []), "")),
        "output": output,
        "measured": bool(record.benchmark),
    }


def of_stage(log: Path) -> str:
    """'40 %, 812 rows/s, 1:20 left': the last line of progress in a job's log; '' without one."""
    lines = [m[1] for line in read_lines(log) if (m := PROGRESS.search(line))]
    return lines[-1].replace("%  ", "%, ") if lines else ""


def read_lines(log: Path) -> list[str]:
    """The lines of a log that are not blank; none where it is not there."""
    try:
        lines = log.read_text(errors="replace", encoding="utf-8").splitlines()
    except (OSError, ValueError):  # a name that can be none
        return []
    return [line for line in lines if line.strip()]
