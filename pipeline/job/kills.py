"""A killed run is resumed by calling it again, and two runs never share a store unawares.

1. `own` holds a lock on the store for as long as snakemake lives. It is the system's lock on an
   open file (flock), which ends with its process however that ends: SIGKILL, a closed terminal,
   power. A second snakemake waits a moment, and then ends with the name of the first.
2. Whoever holds it knows that no other snakemake works here. Snakemake's own lock files, which a
   killed one leaves behind, are stale then, and are removed. Outputs that it was writing are made
   again (rules/common.smk sets what `--rerun-incomplete` sets).
3. `end_with_parent` ends a stage when the snakemake that called it is gone, so that no orphan
   computes on beside the next call. It waits on the process itself (pidfd_open); Linux's
   PR_SET_PDEATHSIG would watch the shell between the two, and the thread that started it.
"""

import atexit
import fcntl
import json
import os
import re
import select
import shutil
import socket
import sys
import threading
import time
from pathlib import Path

from pipeline.errors import RetraceError

PARENT = "RETRACE_SNAKEMAKE"  # environment: the process that stages end with
PATIENCE = 10.0  # seconds that a second snakemake waits: another may be about to end
EVERY = 0.5  # seconds between two looks at a process, where the system has no pidfd_open
DEEPEST = 8  # processes between a stage and snakemake, at most: shells, time, nice, srun
READS = {"--dry-run", "--dryrun", "--lint", "--list", "--list-rules", "--list-target-rules",
         "--summary", "--detailed-summary", "--dag", "--rulegraph", "--filegraph", "--d3dag",
         "--report", "--unlock", "--archive", "--print-compilation", "--help"}  # fmt: skip
_held: dict[Path, int] = {}


def only_reads(argv: list[str]) -> bool:
    """Whether a call of snakemake runs no job, so that it needs no lock."""
    return any(a.split("=")[0] in READS or re.fullmatch("-[Fkpqr]*n[Fkpqr]*", a) for a in argv)


def own(file: Path, patience: float = PATIENCE) -> bool:
    """Hold the lock until this process ends; whether the system has such locks here.

    Raises:
        RetraceError: another process holds it after `patience` seconds.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if (file := file.resolve()) in _held:
        return True
    held = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)  # not inherited by the stages
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > until:
                raise RetraceError(_taken(file)) from None
            time.sleep(0.1)
        except OSError:  # a file system without locks
            os.close(held)
            return False
    _held[file] = held
    owner = {"process": os.getpid(), "host": socket.gethostname(), "folder": os.getcwd()}
    os.truncate(held, 0)
    os.pwrite(held, json.dumps(owner).encode(), 0)
    atexit.register(os.truncate, held, 0)
    return True


def _taken(file: Path) -> str:
    """Who works on a store, in one sentence."""
    try:
        owner = json.loads(file.read_text(encoding="utf-8"))
        who = "process {process} on {host}, called in {folder},".format(**owner)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        who = "another snakemake"
    return f"{file.parent}: {who} works on it; wait until it ends, or end it, then run this again"


def clear_locks(folder: Path = Path(".snakemake")) -> None:
    """Remove the lock files of a snakemake that is gone; the caller holds the lock of `own`."""
    shutil.rmtree(folder / "locks", ignore_errors=True)


# --- a stage ends with its snakemake -------------------------------------------------------


def name_parent() -> None:
    """Have the stages that this process calls end with it."""
    os.environ[PARENT] = str(os.getpid())


def ancestors() -> list[int]:
    """Processes above this one, the nearest first; only the parent where there is no /proc."""
    found = [os.getppid()]
    while len(found) < DEEPEST and found[-1] > 1:
        try:
            stat = Path(f"/proc/{found[-1]}/stat").read_text(encoding="utf-8")
        except OSError:
            break
        found.append(int(stat.rsplit(")", 1)[1].split()[1]))
    return found


def end_with_parent() -> None:
    """End this process when the snakemake that called it ends; all that it wrote stays whole."""
    named = os.environ.get(PARENT, "")
    if not named.isdecimal():
        return  # called by hand
    parent = int(named)
    if parent in ancestors():
        threading.Thread(target=_wait, args=(parent,), daemon=True).start()
    elif not _lives(parent) and os.getppid() == 1:
        _end()  # it was killed while we started


def _wait(parent: int) -> None:
    try:
        watched = os.pidfd_open(parent)
        select.select([watched], [], [])
    except (AttributeError, OSError):
        while _lives(parent):
            time.sleep(EVERY)
    _end()


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _end() -> None:
    print("snakemake is gone, so this stage ends; run snakemake again", file=sys.stderr, flush=True)
    os._exit(1)
