"""Which of a machine's GPUs a job takes.

Snakemake counts GPUs and does not name them. On a cluster the scheduler shows a job only its own;
on one machine the jobs agree by lock files, which end with the process that holds them, killed or
not.
"""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

DEVICES = Path("/proc/driver/nvidia/gpus")
_held: list[IO[str]] = []  # closed, a lock would be lost


def count(folder: Path = DEVICES) -> int:
    """How many GPUs a job may see, without torch: at least 1, for one that NVIDIA did not make."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is not None:
        return max(1, len([name for name in shown.split(",") if name.strip()]))
    return max(1, len(list(folder.iterdir()))) if folder.is_dir() else 1


def take(names: list[str], folder: Path | None = None) -> int:
    """Index of a GPU that no other job of this user holds, until this process ends.

    Args:
        names: what tells the GPUs apart on this machine, in torch's order.
        folder: of the lock files.

    Returns:
        The first that is free; where none is, as with more jobs than GPUs, one of them by the
        process's number.
    """
    for i, name in enumerate(names):
        if hold(name, folder):
            return i
    return os.getpid() % len(names)


def hold(name: str, folder: Path | None = None) -> bool:
    """Hold a GPU until this process ends; False where a job, this one among them, holds it."""
    folder = folder or Path(tempfile.gettempdir())
    lock = open(folder / f"retrace-{os.getuid()}-{name}.lock", "w", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return False
    _held.append(lock)
    return True


def others(names: list[str], own: int, folder: Path | None = None) -> Iterator[int]:
    """Indices of further GPUs that no job holds, each held once it is asked for.

    Args:
        names: as of `take`.
        own: the GPU that this job has.
    """
    return (i for i, name in enumerate(names) if i != own and hold(name, folder))
