"""Shards made a window ahead of a reader that removes them: the maker's side. [torch]

1. plan.json says how many shards the window holds (store/window.py has the whole protocol).
2. The reader says which shards it wants. They are made in order, some at a time, as soon as so many
   have room; on a GPU that both share, they and the reader's training so come in turn.
3. Each is noted in made.jsonl with its digests. One that is made again must have the same.
"""

import fcntl
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from torch import nn

from pipeline.activations import checks, files, forward
from pipeline.activations.plan import Plan, Shard, row_bytes
from pipeline.activations.writers import Writers
from pipeline.errors import RetraceError
from pipeline.job import cli
from pipeline.store import chunks, intact, provenance, window
from pipeline.store.shards import COLUMNS, Blocks
from pipeline.store.window import POLL, Made, Sizes

FOOTER = 1 << 14  # bytes of a shard's footer beside the mean of its rows, at most
NUMBER = 24  # bytes of a number in the mean


def sizes(plan: Plan, n_bytes: int) -> Sizes:
    """The window of a plan's training shards.

    Raises:
        RetraceError: it is too small, the disk is, or there are no such shards.
    """
    train = [shard for shard in plan.shards if shard.split == "train"]
    if not train:
        raise RetraceError("activations.window: the corpus has no training block; raise n_tokens")
    rows = [plan.rows(shard) for shard in train]
    cells = row_bytes(plan.spec, plan.widths) + 4 * len(COLUMNS) * len(plan.widths)
    body = max(rows) * cells * (1 + 2 * chunks.SHA256 / chunks.CHUNK)
    footers = sum(FOOTER + NUMBER * d for d in plan.widths.values())
    return window.sized(n_bytes, int(body) + footers, rows, train[0].number)


def check_room(folder: Path, found: Sizes) -> None:
    """RetraceError where the disk has less room than the window may take."""
    there = sum(f.stat().st_size for f in folder.rglob("*.parquet"))
    free, need = shutil.disk_usage(folder).free, found.capacity * found.shard_bytes - there
    if need > free:
        raise RetraceError(
            f"{folder}: the window takes {need:,} bytes and the disk has {free:,}; free space, or "
            f"lower activations.window"
        )


def serve(
    hf: nn.Module, plan: Plan, n_bytes: int, blocks: Blocks, folder: Path, made: dict[str, Any]
) -> None:
    """Make what the reader of a window wants, until all of it was made.

    Args:
        plan: all shards of the corpus.
        folder: the window's.
        made: the certificate, written into every shard but for the commit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".maker", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a killed reader's maker is about to end
        key, found = window.key_of(made), sizes(plan, n_bytes)
        _forget_another(folder, key)
        check_room(folder, found)
        window.write(
            folder / "plan.json",
            {"key": key, "sizes": found._asdict(), "widths": plan.widths, "dtype": plan.spec.dtype},
        )
        while not (folder / "wanted.json").exists():
            time.sleep(POLL)
        wanted = json.loads((folder / "wanted.json").read_text(encoding="utf-8"))
        order = [*wanted["open"], *range(wanted["next"], wanted["last"])]
        Maker(hf, plan, found, blocks, folder, made, wanted["seed"]).run(order)


def _forget_another(folder: Path, key: str) -> None:
    """Empty a folder whose shards are of another spec, code or input."""
    note = folder / files.KEY
    if not note.exists() or note.read_text(encoding="utf-8") != key:
        shutil.rmtree(folder / "shards", ignore_errors=True)
        (folder / "made.jsonl").unlink(missing_ok=True)
        note.write_text(key, encoding="utf-8")
    for left in folder.rglob("*.tmp"):
        left.unlink(missing_ok=True)
    if (notes := folder / "made.jsonl").exists():  # a line that was being written
        text = notes.read_bytes()
        os.truncate(notes, text.rfind(b"\n") + 1)


class Maker:
    """Makes shards of a window, in order."""

    def __init__(
        self, hf: nn.Module, plan: Plan, found: Sizes, blocks: Blocks, folder: Path,
        made: dict[str, Any], seed: int,
    ) -> None:  # fmt: skip
        self.hf, self.plan, self.sizes, self.blocks = hf, plan, found, blocks
        self.folder, self.seed = folder, seed
        # Without the commit: a shard that is made again has the same bytes under the same code.
        self.certificate = {k: v for k, v in made.items() if k not in ("git", "paper")}
        self.noted = window.noted(folder / "made.jsonl")
        self.known = {one.number: one.hooks for one in reversed(self.noted)}

    def run(self, order: list[int]) -> None:
        """Make the shards `order`, those that lie there left out."""
        left = [j for j in order if not self._is_whole(j)]
        window.write(self.folder / "checked.json", left[:1])
        progress = cli.Progress("activations ahead", len(left), "shards")
        writers = Writers(
            forward.device_of(self.hf), self.plan, list(map(self._shard, left)), self.folder,
            self.certificate, _write,
        )  # fmt: skip
        with writers.pool:
            while left:
                n = self._room(left)
                self._make(left[:n], writers)
                left = left[n:]
                progress.at(progress.total - len(left))

    def _shard(self, j: int) -> Shard:
        """The j-th shard in the order of training, with that as its number."""
        number = window.number_of(j, self.seed, self.sizes)
        return self.plan.shards[number]._replace(number=j)

    def _is_whole(self, j: int) -> bool:
        """Whether shard j lies there as it was noted."""
        if j >= len(self.noted):
            return False
        for hook, entry in self.noted[j].hooks.items():
            path = self.folder / window.name_of(hook, j)
            if not path.exists() or intact.sha256_once(path) != entry["sha256"]:
                path.unlink(missing_ok=True)
                return False
        return True

    def _room(self, left: list[int]) -> int:
        """Wait until a turn's shards have room; how many have.

        One is enough where a killed job left later shards than the first of `left`: the reader
        removes none of those before it has that one.
        """
        home = self.folder / "shards" / (hook := next(iter(self.plan.widths)))
        while True:
            there = {path.name for path in home.glob("*.parquet")}
            later = any(Path(window.name_of(hook, left[0])).name < name for name in there)
            free = self.sizes.capacity - len(there)
            if free >= (1 if later else min(len(left), self.sizes.turn)):
                return free
            time.sleep(POLL)

    def _make(self, order: list[int], writers: Writers) -> None:
        """Make some shards and note them."""
        shards = list(map(self._shard, order))
        for shard, found in forward.computed(
            self.hf, self.plan, shards, self.blocks, writers.next_free, forward.ignore
        ):
            checks.check_finite(self.hf, self.plan, shard, self.blocks, found)
            checks.check_some_left(self.plan, shard, found)
            if shard.number == 0 and self.plan.rows(shard) > 1:
                for hook in self.plan.spec.hooks:
                    checks.check_varies(hook, self.plan.spec.dtype, [found.statistics(hook)])
            writers.write(shard, found, files.columns(self.plan, shard, self.blocks))
        digests = writers.finish()
        for j in order:
            self._note(j, digests)

    def _note(self, j: int, digests: dict[str, str]) -> None:
        """Note a shard, or compare it with the note that it has already.

        One that is made again the reader knows, so it may have read and removed it by now.
        """
        number, hooks = window.number_of(j, self.seed, self.sizes), {}
        if j < len(self.noted):
            self._compare(j, number, digests)
            return
        for hook in self.plan.spec.hooks:
            file = window.name_of(hook, j)
            about = provenance.read(self.folder / file)
            hooks[hook] = {
                "file": file, "rows": about["rows"], "mean_norm": about["mean_norm"],
                "footer": chunks.tail_sha256(self.folder / file), "sha256": digests[file],
            }  # fmt: skip
        self.known.setdefault(number, hooks)
        self._compare(j, number, digests)
        made = Made(number, hooks)
        with open(self.folder / "made.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(made._asdict()) + "\n")
            f.flush()
            os.fsync(f.fileno())
        self.noted.append(made)

    def _compare(self, j: int, number: int, digests: dict[str, str]) -> None:
        """RetraceError where shard j has other bytes than when its rows were made before."""
        before = self.known[number]
        if any(before[hook]["sha256"] != digests[window.name_of(hook, j)] for hook in before):
            raise RetraceError(
                f"{self.folder / window.name_of(next(iter(before)), j)}: was made again with other "
                f"bytes than before, so the training cannot go on exactly; delete "
                f"{self.folder.parent}, then run snakemake again"
            )


def _write(
    folder: Path, plan: Plan, shard: Shard, buffers: Any, cols: dict[str, Any], made: dict[str, Any]
) -> dict[str, str]:
    """`files.write` of a shard whose number is its place in the order of training."""
    names = {hook: window.name_of(hook, shard.number) for hook in plan.spec.hooks}
    return files.write_hooks(folder, names, plan, shard, buffers, cols, made)
