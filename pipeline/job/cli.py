"""What the main() of every stage shares: arguments, the log, and the sentence of a fault.

A stage is `python -m pipeline <stage> --spec JSON ... `; snakemake calls it so, and so can you,
under a debugger. It exits 0, or prints one sentence and exits 1.
"""

import argparse
import contextlib
import json
import logging
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pipeline.errors import RetraceError, keep_trace, sentence_on
from pipeline.job import gpus, kills, source
from pipeline.spec import paper
from pipeline.store import intact, provenance

log = logging.getLogger("retrace")


class Job:
    """One call of a stage: its parsed arguments, and certificates for what it writes."""

    def __init__(self, stage: str, args: argparse.Namespace) -> None:
        self.stage, self.args = stage, args
        self.spec: dict = json.loads(args.spec)
        self.code = source.job_code(stage, args.code)
        self.hardware = ""

    def check_inputs(self) -> str:
        """What was read to check the job's inputs, and how long it took.

        Raises:
            RetraceError: a file that is to be read is not as it was written.
        """
        started = time.monotonic()
        given = {k: v for k, v in vars(self.args).items() if k not in ("spec", "code", "device")}
        files, size = intact.check_inputs(given, self.stage)
        took = time.monotonic() - started
        return f"{took:.2f} s to check {files} files of {size / 2**20:.1f} MiB"

    def section(self, key: str, cls: type[BaseModel]) -> Any:
        """The section `key` of --spec, validated."""
        return paper.parse(cls, self.spec[key], f"--spec of stage {self.stage}")

    def certificate(self, inputs: list, **more: Any) -> dict:
        """A birth certificate, see `provenance.certificate`.

        With the state of the paper's folder, where a file of it takes part.
        """
        yaml = getattr(self.args, "paper", "") or getattr(self.args, "yaml", "")
        if own := [*filter(None, [yaml]), *self.args.code]:
            more["paper"] = provenance.paper_state(str(Path(own[0]).resolve().parent))
        return provenance.certificate(
            self.stage, self.spec, self.code, inputs, self.hardware, **more
        )

    def device(self) -> Any:
        """The torch device that --device names, and as many threads as --threads says."""
        import torch

        torch.set_num_threads(self.args.threads)
        name = self.args.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name.startswith("cuda") and not torch.cuda.is_available():
            raise RetraceError(f"--device {name}: torch sees no GPU here; use --config device=cpu")
        if name == "cuda" and (n := torch.cuda.device_count()) > 1:
            about = [torch.cuda.get_device_properties(i) for i in range(n)]
            name = f"cuda:{gpus.take([str(gpu.uuid) for gpu in about])}"
        device = torch.device(name)
        if name.startswith("cuda:"):
            torch.cuda.set_device(device)  # graphs and streams are made on the current one
        n = torch.get_num_threads()
        self.hardware = (
            torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else f"{device.type}, {n} thread{'s' * (n > 1)}"
        )
        return device

    def devices(self, n: int) -> list[Any]:
        """`device`, and as many more GPUs as are free, n in all; without a GPU the CPU alone."""
        import torch

        first = self.device()
        if first.type != "cuda" or n < 2:
            return [first]
        own = first.index if first.index is not None else torch.cuda.current_device()
        known = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        more = islice(gpus.others([str(gpu.uuid) for gpu in known], own), n - 1)
        found = [torch.device("cuda", own), *(torch.device("cuda", i) for i in more)]
        if len(found) < n:
            log.warning("%d GPUs were asked for, and %d are free", n, len(found))
        return found


def parser(stage: str, doc: str | None, **paths: str) -> argparse.ArgumentParser:
    """The arguments every stage takes, and one --option a path.

    Args:
        stage: the stage's name.
        doc: the module's docstring, shown by --help.
        paths: option -> help. A help that ends in '*' takes any number of paths.
    """
    out = argparse.ArgumentParser(
        prog=f"python -m pipeline {stage}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("--spec", required=True, help="the sections this stage needs, as JSON")
    for name, text in paths.items():
        many = {"nargs": "*", "default": []} if text.endswith("*") else {"required": True}
        out.add_argument(f"--{name.replace('_', '-')}", help=text.rstrip("*"), **many)
    out.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    out.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    out.add_argument("--paper", default="", help="paper.yaml, of whose folder git is asked")
    out.add_argument("--code", nargs="*", default=[], help="the paper's own .py files, if any")
    return out


def run(stage: str, args: argparse.Namespace, work: Callable[[Job], None]) -> None:
    """Do a stage's work; log what it cost; turn a fault into one sentence and exit code 1."""
    kills.end_with_parent()
    started = time.monotonic()
    startup = _seconds_since_start()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr
    )
    try:
        job = Job(stage, args)
        checked = job.check_inputs()
        work(job)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # a panic of tokenizers' Rust is no Exception
        _fail(stage, sentence_on(e, lambda: keep_trace(stage)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    took = time.monotonic() - started
    log.info(
        "done: %.1f s of work, %.1f s to start, peak %.2f GiB; %s", took, startup, peak, checked
    )


def _fail(stage: str, sentence: str) -> None:
    print(f"error in stage {stage}: {sentence}", file=sys.stderr)
    sys.exit(1)


def _seconds_since_start() -> float:
    """How long this process has lived; 0 where the system does not tell."""
    try:
        ticks = int(
            Path("/proc/self/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[19]
        )
        uptime = float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
        return uptime - ticks / os.sysconf("SC_CLK_TCK")
    except OSError:
        return 0.0


class Progress:
    """A bar on a terminal; in a log, lines such as 'activations 40 %  812 tokens/s, 1:20 left'.

    There is at most one line every 5 seconds; `events.of_stage` reads them.
    """

    def __init__(self, what: str, total: int, unit: str, done: int = 0) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.first, self.started, self.last_line = done, time.monotonic(), time.monotonic()
        self.done, self.lock = done, threading.Lock()
        self.bar: Any = None
        self.open_bars = contextlib.ExitStack()  # until the last unit
        if sys.stderr.isatty():
            from tqdm import tqdm
            from tqdm.contrib.logging import logging_redirect_tqdm

            how = {"unit_scale": True, "dynamic_ncols": True, "leave": False}
            bar = tqdm(desc=what, total=total, initial=done, unit=f" {unit}", **how)
            self.bar = self.open_bars.enter_context(bar)
            self.open_bars.enter_context(logging_redirect_tqdm())

    def add(self, n: int = 1) -> None:
        """Report that `n` more units are finished; any thread may call it."""
        with self.lock:
            self.done += n
            self.at(self.done)

    def at(self, done: int) -> None:
        """Report that `done` of `total` units are finished."""
        if self.bar is not None:
            self.bar.update(done - self.bar.n)
            if done >= self.total:
                self.open_bars.close()
        else:
            self._line(done)

    def _line(self, done: int) -> None:
        now = time.monotonic()
        if now - self.last_line < 5 and done < self.total:
            return
        self.last_line = now
        rate = (done - self.first) / max(now - self.started, 1e-9)
        left = (self.total - done) / rate if rate else 0
        log.info(
            "%s %3.0f %%  %s %s/s, %d:%02d left",
            self.what,
            100 * done / self.total,
            f"{rate:,.0f}",
            self.unit,
            left // 60,
            left % 60,
        )
