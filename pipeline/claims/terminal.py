"""What a run of snakemake shows while it lasts, in place of snakemake's own text.

    10:02:13  toy_superposition superposition started
    10:03:20   5/37  toy_superposition superposition  67.2 s
    10:03:31  12/37  toy_superposition figures: pentagon, phase, geometry, intro  9.1 s

1. A job whose cost is measured has a line when it starts and one when it ends; the others, of
   seconds each, have one when they end, those of a stage that follow each other a common one.
2. A terminal has below these a bar that is drawn again every second: the jobs done, those that
   run, and what they say of themselves in their logs: per cent, rate, time left.
3. A pipe or the log of CI gets what the bar would show as a line, where a minute brought no other.
4. Faults come last, each with the end of its log, its sentence and the command that runs it alone.

Snakemake calls this as one of its log handlers (snakemake-interface-logger-plugins names the
events). A plugin would have to be installed and asked for by --logger; the Snakefile hangs in the
handler itself, so a checkout is enough. Snakemake's text is whole in .snakemake/log, and takes its
place on the terminal with -p, --verbose or --debug-dag; a dry run and --logger are left alone.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pipeline.claims import summary
from pipeline.claims.costs import duration
from pipeline.job import events
from pipeline.job.events import JobState, Journal, State

NAME = "Retrace"
DEFAULT = "DefaultStreamHandler"  # snakemake's own; see its logging.py
SILENCE = 55  # seconds without a line; with SECOND less than a minute
SECOND = 1.0  # between two looks at the logs of what runs
NAMED = 3  # jobs that run, of which is told what their logs say
MOST = 120  # characters of a line, where a terminal has no fewer
BESIDE = 30  # of them beside the names of jobs: the time, the count, how long they took
BAR = "{n_fmt}/{total_fmt} {bar:10} "
QUIET = ("ALL", "PROGRESS", "RULES")  # of --quiet; its other words are about snakemake's text
# What snakemake says beside its events of a run whose faults stand at the end.
AFTER_FAULTS = ("Exiting because a job", "At least one job did not complete", "SpawnedJobError")
KEPT = ("Nothing to be done", "Will exit after", "Terminating processes")


class Terminal(logging.Handler):
    """A log handler of snakemake that writes a run's journal and, unless `plain` does, shows it."""

    def __init__(
        self,
        journal: Journal,
        plain: logging.Handler | None,
        *,
        quiet: bool = False,
        papers_of: Callable[[dict[str, str]], list[str]] = lambda wildcards: [],
        is_target: Callable[[str], bool] = lambda rule: False,
        command: str = "",
        stream: Any = None,
    ) -> None:
        """
        Args:
            journal: where the events go.
            plain: snakemake's handler, whose place this takes; None: another one shows the run.
            quiet: nothing is said of jobs, but for faults.
            papers_of, is_target: see `events.of_record`.
            command: the command line without its targets; see `summary.without_targets`.
            stream: where lines go; default: stderr.
        """
        super().__init__()
        self.name = NAME
        self.journal, self.plain, self.quiet = journal, plain, quiet
        self.about, self.command = (papers_of, is_target), command
        self.stream = stream or sys.stderr
        self.state, self.executing, self.closed = State(), False, False
        self.folded: dict[str, list[tuple[JobState, float, str]]] = {}
        self.said = time.monotonic()
        self.repeated: set[str] = set()
        self.bar: Any = None
        self.over = threading.Event()

    # --- what snakemake hands over -----------------------------------------------------------

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if made := events.of_record(record, *self.about):
                self.take(made)
            elif self.plain and self.passes(record):
                self.clear()
                self.plain.handle(record)
        except BrokenPipeError:
            raise
        except Exception:
            self.handleError(record)

    def passes(self, record: logging.LogRecord) -> bool:
        """Whether snakemake's own words are shown: before a run all, in it warnings and faults."""
        event, text = getattr(record, "event", None), str(record.msg)
        if event == "workflow_started":
            self.executing = True
        if record.levelno < logging.WARNING and self.executing:
            kept = text.startswith(KEPT) and text not in self.repeated
            self.repeated |= (
                {text} if kept else set()
            )  # snakemake says "Will exit after …" at every look
            return kept
        told = self.state.failed and any(t in text for t in AFTER_FAULTS)
        return event != "group_error" and not told

    def take(self, event: dict[str, Any]) -> None:
        """Write an event down, follow it and say what there is to say."""
        self.journal.write(event)
        job = self.state.take(event)
        if event["event"] == "run":
            self.begin()
        elif job and event["event"] == "job":
            if job.measured:
                self.line(f"{'':{self.width}}  {job} started")
        elif job and event["event"] == "failed":
            self.line(f"{'':{self.width}}  {job} failed after {self.age(job)}")
        elif job and job.measured:
            self.line(f"{self.count}  {job}  {self.age(job)}")
        elif job:
            named = " ".join(filter(None, (job.paper, job.stage)))
            self.folded.setdefault(named, []).append((job, self.state.last - job.began, self.count))
        if job and self.state.done == self.state.total:
            took = duration(self.state.last - self.state.began)
            self.line(f"{jobs(self.state.total)} done in {took}")
        self.draw()

    def begin(self) -> None:
        """Say how much there is to do and where snakemake's own text goes."""
        log = summary.short_path(self.journal.log)
        self.line(f"{jobs(self.state.total)}; Snakemake's own text: {log}")
        if self.plain and not self.quiet:
            threading.Thread(target=self.watch, daemon=True, name=NAME).start()

    # --- what is shown -----------------------------------------------------------------------

    @property
    def width(self) -> int:
        return 2 * len(str(self.state.total)) + 1

    @property
    def count(self) -> str:
        """' 5/37': the jobs done."""
        return f"{self.state.done}/{self.state.total}".rjust(self.width)

    @property
    def columns(self) -> int:
        """Characters of a line: those of the terminal, at most MOST."""
        try:
            return min(os.get_terminal_size(self.stream.fileno()).columns or MOST, MOST)
        except (OSError, ValueError):  # no terminal; a text in memory has no number
            return MOST

    def age(self, job: JobState) -> str:
        return duration(self.state.last - job.began)

    def line(self, text: str) -> None:
        """Print a line with the time, below those of jobs that wait to be told together."""
        self.unfold()
        self.write(text)

    def unfold(self) -> None:
        """Print the common lines of quick jobs, where no other job of that stage runs."""
        runs = {(j.paper, j.stage) for j in self.state.running.values()}
        for named, ended in list(self.folded.items()):
            if (ended[0][0].paper, ended[0][0].stage) in runs:
                continue
            del self.folded[named]
            self.write(f"{ended[-1][2]}  {common(named, ended, self.columns)}")

    def write(self, text: str) -> None:
        if not self.plain or self.quiet:
            return
        text = shortened(f"{time.strftime('%H:%M:%S')}  {text}", self.columns)
        if self.bar is not None:
            self.bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)
        self.said = time.monotonic()

    def watch(self) -> None:
        """Look at what runs, every second, until the end."""
        while not self.over.wait(SECOND):
            with self.lock:
                if not self.over.is_set():
                    self.look()

    def look(self) -> None:
        """Draw the bar; where there is none, say what runs if nothing was said for a minute."""
        try:
            self.unfold()
            self.draw()
            if self.bar is None and self.state.running and time.monotonic() - self.said > SILENCE:
                self.write(f"{self.count}  running: {self.running()}")
        except (OSError, ValueError):  # the terminal is gone
            self.over.set()

    def running(self, room: int = MOST) -> str:
        """What runs, longest first: each job, and what it says of itself.

        Args:
            room: characters; where they are too few, what tells jobs of a stage apart goes, then
                rates.
        """
        running = sorted(self.state.running.values(), key=lambda job: job.began)
        said = [(job, at(job, time.time(), Path())) for job in running[:NAMED]]
        more = [f"and {len(running) - NAMED} more"] if running[NAMED:] else []
        plain = [(f"{job.paper} {job.stage}".strip(), text) for job, text in said]
        full = [f"{job} {text}" for job, text in said]
        ways = [full, [f"{name} {t}" for name, t in plain], [f"{n} {brief(t)}" for n, t in plain]]
        texts = ["; ".join([*told, *more]) for told in ways]
        return next((text for text in texts if len(text) <= room), texts[-1])

    def draw(self) -> None:
        """The bar of a terminal, while jobs run."""
        if not self.plain or self.quiet or not self.stream.isatty():
            return
        if not self.state.running:
            return self.clear()
        if self.bar is None:
            from tqdm import tqdm

            self.bar = tqdm(
                total=self.state.total, file=self.stream, leave=False, dynamic_ncols=True,
                bar_format=BAR + "{desc}",
            )  # fmt: skip
        self.bar.n = self.state.done
        room = self.columns - len(
            BAR.format(n_fmt=self.state.done, total_fmt=self.state.total, bar="")
        )
        self.bar.set_description_str(self.running(room))

    def clear(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    # --- the end -----------------------------------------------------------------------------

    def close(self) -> None:
        """Snakemake calls it last of all, after its own words on a failed run."""
        if not self.closed:
            self.closed = True
            self.over.set()
            self.state.running.clear()
            self.unfold()
            self.clear()
            if self.state.began and not self.state.ended:
                self.journal.write({"event": "end", "at": round(time.time(), 3)})
            summary.print_failures(self.state.failed.values(), self.command, self.journal.log)
        super().close()


def common(named: str, ended: list[tuple[JobState, float, str]], columns: int = MOST) -> str:
    """'toy figures: circle, line  9.1 s': jobs of one stage, and the seconds of all of them."""
    whats = [job.what for job, _, _ in ended if job.what]
    took = duration(sum(seconds for _, seconds, _ in ended))
    which = f"{':' if len(whats) > 1 else ''} {', '.join(whats)}".rstrip()
    return f"{summary.cut(named + which, columns - BESIDE)}  {took}"


def shortened(text: str, most: int) -> str:
    """A line of at most so many characters, which keeps how long its job took."""
    head, gap, took = text.rpartition("  ")
    if len(text) <= most or len(took) > most // 2:
        return summary.cut(text, most)
    return summary.cut(head, most - len(gap + took)) + gap + took


def brief(said: str) -> str:
    """'25.0 s, 40 %, 1:20 left' of '25.0 s, 40 %, 812 rows/s, 1:20 left'."""
    return ", ".join(part for part in said.split(", ") if not part.endswith("/s"))


def jobs(n: int) -> str:
    return f"{n} job{'s' * (n != 1)}"


def at(job: JobState, now: float, folder: Path) -> str:
    """'3 min 20 s, 40 %, 812 rows/s, 1:20 left': how long a job has run, and what its log says."""
    said = events.of_stage(folder / job.log) if job.log else ""
    return ", ".join(filter(None, (duration(max(now - job.began, 0)), said)))


def attach(manager: Any, argv: list[str], targets: Iterable[str], **about: Any) -> None:
    """Show a run in place of snakemake, or, where snakemake's text is wanted, write it down only.

    Args:
        manager: snakemake's LoggerManager, with its handlers and settings.
        argv: sys.argv.
        targets: names that are targets; see `summary.without_targets`.
        about: papers_of, is_target; see `events.of_record`.
    """
    logs = [f for f in manager.get_logfile() if str(f).endswith(events.LOG)]
    handlers = manager.logger.handlers
    if not logs or any(h.name == NAME for h in handlers):  # a dry run; imported as a module twice
        return
    settings = manager.settings
    plain = next((h for h in handlers if h.name == DEFAULT), None)
    if settings.printshellcmds or settings.verbose or settings.debug_dag:
        plain = None
    if plain:
        manager.logger.removeHandler(plain)
    command = summary.without_targets(argv, list(targets))
    quiet = any(q.name in QUIET for q in settings.quiet or ())
    manager.logger.addHandler(
        Terminal(Journal(logs[0]), plain, quiet=quiet, command=command, **about)
    )
