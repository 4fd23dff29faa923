"""A killed training resumes at its last checkpoint, and ends with the bytes of an undisturbed run.

`<outputs>.partial/step-<n>/` holds one safetensors per trained thing (a dictionary, the members of
a run) and checkpoint.json: the job's key, the step, and the sha256 of each file. The folder is
written under another name and renamed when all of it is on disk; the previous one is removed after
that. The key is a digest of all that decides the result: spec, code, input, device and versions.
A checkpoint with another key, or with a file that has changed, is never used.

Writing takes at most a tenth of a job's time: what is asked for sooner is left out. So is a
checkpoint that the disk has no room for beside the one before.
"""

import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pipeline.errors import RetraceError
from pipeline.store import intact, provenance, tables

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("retrace")

SHARE = 0.1  # of a job's time, at most, that is spent on writing
QUICK = 1.0  # seconds: what takes less is always written
RATE = 500e6  # bytes a second, assumed of the first one


class Trained(Protocol):
    """What has a state that a checkpoint keeps."""

    name: str

    def tensors(self) -> "dict[str, Tensor]":
        """The whole state."""

    def restore(self, state: "dict[str, Tensor]") -> None:
        """Take up a state that `tensors` gave."""


def write_tensors(path: Path, tensors: "dict[str, Tensor]") -> None:
    """Write a safetensors file, whole or not at all."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        tables.atomically(path, lambda to: save_file(tensors, to))
    except SafetensorError as e:  # its writer wraps the system's error
        raise RetraceError(
            f"{path}: could not be written ({e}); free space, then run snakemake again"
        ) from e


class Checkpoints:
    """The checkpoints of one job.

    Args:
        folder: `<outputs>.partial`.
        key: digest of all that decides the result.
        beside: a folder of finished files that the job adds to, part of every checkpoint.
    """

    def __init__(self, folder: Path, key: str, beside: Path | None = None) -> None:
        self.folder, self.key, self.beside = folder, key, beside
        self._last, self._took, self._size = time.monotonic(), 0.0, 0

    def save(self, step: int, things: Sequence[Trained]) -> None:
        """Keep the state after `step` steps, and drop the one before; or keep the one before, where
        writing another so soon would take too much of the time, or has no room."""
        if not self._size:
            self._size = len(things) * sum(t.nbytes for t in things[0].tensors().values())
            self._took = self._size / RATE
        begun = time.monotonic()
        soon = self._took > QUICK and begun - self._last < self._took / SHARE
        if soon or not self._has_room():
            return
        self._write(step, things)
        self._last = time.monotonic()
        self._took = self._last - begun

    def _has_room(self) -> bool:
        """Whether the disk has room for one more checkpoint; said in the log where it has not."""
        there = next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())
        free = shutil.disk_usage(there).free
        if self._size > free:
            log.warning(
                "%s: a checkpoint of %.1f GB does not fit into the %.1f GB that the disk has left, "
                "so that a killed job goes on from the one before, or begins anew; free space",
                self.folder, self._size / 1e9, free / 1e9,
            )  # fmt: skip
        return self._size <= free

    def _write(self, step: int, things: Sequence[Trained]) -> None:
        old = self._kept()
        writing = self.folder / "writing"
        shutil.rmtree(writing, ignore_errors=True)
        for thing in things:
            write_tensors(writing / f"{thing.name}.safetensors", thing.tensors())
        files = sorted(writing.iterdir())
        kept = sorted(self.beside.glob("*.safetensors")) if self.beside else []
        note = {
            "step": step,
            "files": {file.name: provenance.sha256_file(file) for file in files},
            "beside": {file.name: intact.sha256_once(file) for file in kept},
        }
        tables.write_json(writing / "checkpoint.json", note, {"key": self.key})
        whole = self.folder / f"step-{step:09d}"
        shutil.rmtree(whole, ignore_errors=True)  # damaged, or of another job: `load` left it
        writing.rename(whole)
        for path in old:
            if path != whole:
                shutil.rmtree(path)

    def load(self, things: Sequence[Trained]) -> int:
        """Take up the newest checkpoint of this job; the number of steps that it has done, or 0."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        for path in reversed(self._kept()):
            try:
                note = tables.read_json(path / "checkpoint.json")
                if note["provenance"]["key"] != self.key:
                    log.info("%s: of another spec, code, input or device; not used", path)
                    continue
                self._check(path, note, [f"{d.name}.safetensors" for d in things])
                states = [load_file(path / f"{d.name}.safetensors") for d in things]
                step = int(note["step"])
            except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError,
                    RetraceError, SafetensorError) as e:  # fmt: skip
                log.info("%s: not readable (%s); not used", path, e)
                continue
            for thing, state in zip(things, states, strict=True):
                thing.restore(state)
            log.info("resumed at step %d from %s", step, path)
            return step
        return 0

    def _check(self, path: Path, note: dict, needed: list[str]) -> None:
        """RetraceError where a file of a checkpoint, or one beside it, has changed or no digest."""
        if unknown := set(needed) - set(note["files"]):
            raise RetraceError(f"{path / min(unknown)} has no digest in checkpoint.json")
        wanted = {path / name: sha for name, sha in note["files"].items()}
        wanted |= {self.beside / name: sha for name, sha in note["beside"].items()}
        for file, sha in wanted.items():
            if not file.is_file() or provenance.sha256_file(file) != sha:
                raise RetraceError(f"{file} is missing or has changed")

    def newest(self) -> int:
        """The step that `load` would go on from at most; 0 where there is no checkpoint."""
        return max((int(path.name.removeprefix("step-")) for path in self._kept()), default=0)

    def _kept(self) -> list[Path]:
        """Folders of complete checkpoints, oldest first."""
        return sorted(self.folder.glob("step-*"))
