"""Training rows that are made a window ahead of their reader and removed behind it.

A corpus larger than the disk is stored a few shards at a time. Two processes share a folder:

    plan.json      by the maker: the size of the window, and the rows of each training shard
    wanted.json    by the reader: which shards, in order
    checked.json   by the maker: it has seen what a killed job left of them; the reader waits for it
    made.jsonl     by the maker: rows, mean norm and digests of every shard; it outlives the shards
    shards/<hook>/part-<j>.parquet     made in the order of j, removed by the reader

1. An epoch takes the training shards in an order drawn from (seed, epoch); j counts on over the
   epochs. `open` of them are open at a time: a shuffle buffer of shards (as WebDataset's of
   samples). The next chunk of rows comes from one of them, drawn at random; within a shard chunks
   come in a drawn order. A shard that is used up gives its place to the next one, and is removed
   once its rows lie in memory.
2. `ahead` more may lie there, made while others are read. At most open + ahead lie on the disk.
3. All is a function of the seed and of the rows of each shard, which made.jsonl keeps. So a killed
   reader that went on from a checkpoint gets the same rows in the same order: the shards that it
   still needs are made again, to the same bytes, and compared with made.jsonl.
"""

import json
import math
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from pipeline.errors import RetraceError
from pipeline.store import provenance, tables
from pipeline.store.shards import Rows, ShardEntry

POLL = 0.02  # seconds between two looks at the folder
ORDER, SLOTS, ROWS = 1, 2, 3  # what a generator is for, beside its seed


class Sizes(NamedTuple):
    """How many shards a window holds.

    Attributes:
        rows: of every training shard, before any is dropped for its norm.
        first: number of the first one.
    """

    open: int
    ahead: int
    shard_bytes: int
    rows: list[int]
    first: int

    @property
    def capacity(self) -> int:
        """Shards that may lie on the disk."""
        return self.open + self.ahead

    @property
    def turn(self) -> int:
        """Shards that are made in one go, and at most used up by one buffer."""
        return max(1, self.ahead // 2)


def sized(n_bytes: int, shard_bytes: int, rows: list[int], first: int) -> Sizes:
    """The largest window that `n_bytes` hold.

    Raises:
        RetraceError: that are not two shards.
    """
    fit = n_bytes // shard_bytes
    if fit < 2:
        raise RetraceError(
            f"activations.window: {n_bytes:,} bytes hold {fit} of the shards of {max(rows):,} rows "
            f"({shard_bytes:,} bytes), and one is made while another is read; raise it, or lower "
            f"activations.shard_rows"
        )
    fit = min(fit, 2 * len(rows))
    ahead = max(1, fit // 4)
    return Sizes(min(fit - ahead, len(rows)), ahead, shard_bytes, rows, first)


class Made(NamedTuple):
    """What made.jsonl says of a shard: its number in the corpus, and hook -> its entry."""

    number: int
    hooks: dict[str, dict[str, Any]]


def name_of(hook: str, j: int) -> str:
    """Path of shard j below the folder."""
    return f"shards/{hook}/part-{j:08d}.parquet"


def files_of(made: Made, j: int) -> list[str]:
    """Paths of shard j's files below the folder."""
    return [name_of(hook, j) for hook in made.hooks]


def noted(file: Path, skip: int = 0) -> list[Made]:
    """The lines of made.jsonl that are whole; `skip` of them are left out."""
    if not file.exists():
        return []
    text = file.read_text(encoding="utf-8")
    lines = text[: text.rfind("\n") + 1].splitlines()[skip:]
    try:
        return [Made(**json.loads(line)) for line in lines]
    except (ValueError, TypeError) as e:
        raise RetraceError(
            f"{file}: damaged ({e}); delete {file.parent}, then run snakemake again"
        ) from e


def write(path: Path, what: Any) -> None:
    """Write JSON, whole or not at all."""
    tables.atomically(path, lambda to: to.write_text(json.dumps(what), encoding="utf-8") and None)


def number_of(j: int, seed: int, sizes: Sizes) -> int:
    """Which shard of the corpus is the j-th in the order of training."""
    epoch, at = divmod(j, len(sizes.rows))
    return sizes.first + int(_order(seed, epoch, len(sizes.rows))[at])


@cache
def _order(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, ORDER, epoch]).permutation(n)


class Buffer(NamedTuple):
    """What is read into memory at once.

    Attributes:
        pieces: (j, first row, end), ascending.
        order: in which order their rows are used.
        used: shards that are used up with it.
        open: shards that were open before it; the first that was not yet is `next`.
    """

    pieces: list[tuple[int, int, int]]
    order: np.ndarray
    used: list[int]
    open: list[int]
    next: int


def buffers(
    seed: int, sizes: Sizes, chunk_rows: int, n_chunks: int, rows_of: Callable[[int], int | None]
) -> Iterator[Buffer | None]:
    """All buffers from the start, without end.

    Args:
        chunk_rows: rows that are read in one go.
        n_chunks: chunks of a buffer.
        rows_of: rows of shard j, None as long as it is not made.

    Yields:
        None where the next shard is not made; ask again.
    """
    j = 0
    for epoch in range(sys.maxsize):
        rng, end = np.random.default_rng([seed, SLOTS, epoch]), j + len(sizes.rows)
        slots: list[tuple[int, int, list[int]]] = []  # shard, rows, its chunks that are left
        for i in range(sys.maxsize):
            pieces, used, before, upcoming = [], [], [slot[0] for slot in slots], j
            while len(pieces) < n_chunks and (len(used) < sizes.turn or j == end):
                while len(slots) < sizes.open and j < end:
                    while (n := rows_of(j)) is None:
                        yield None
                    left = rng.permutation(math.ceil(n / chunk_rows)).tolist()
                    slots.append((j, n, left))
                    j += 1
                if not slots:
                    break
                at = _drawn(rng, [len(left) for _, _, left in slots], j < end)
                shard, n, left = slots[at]
                if left:
                    start = left.pop() * chunk_rows
                    pieces.append((shard, start, min(start + chunk_rows, n)))
                if not left:
                    used.append(slots.pop(at)[0])
            if not pieces and not used:
                break
            order = np.random.default_rng([seed, ROWS, epoch, i])
            n = sum(stop - start for _, start, stop in pieces)
            yield Buffer(sorted(pieces), order.permutation(n), used, before, upcoming)


def _drawn(rng: np.random.Generator, left: list[int], more: bool) -> int:
    """Which open shard the next chunk comes from.

    Any of them alike, so that new shards are opened at a steady pace; where no more come in this
    epoch, any chunk that is left, so that its last rows are as mixed as the first.

    Args:
        left: chunks of each shard.
    """
    if more or not sum(left):
        return int(rng.integers(len(left)))
    return int(np.searchsorted(np.cumsum(left), rng.integers(sum(left)), side="right"))


class WindowRows(Rows):
    """The rows of one hook in all shards that were made, in the order of j, as one array.

    Those of shards that are gone cannot be read.

    Args:
        folder: of the window.
    """

    def __init__(self, folder: Path, hook: str, d_model: int, dtype: str) -> None:
        self.manifest, self.hook, self.split, self.verify = (
            folder / "made.jsonl",
            hook,
            "train",
            True,
        )
        self.d_model, self.dtype = d_model, dtype
        self.shards, self.starts, self._sha256 = [], [0], {}
        self._forget()

    @property
    def n_rows(self) -> int:
        return self.starts[-1]

    def again(self) -> "WindowRows":
        """As of `Rows`, with shards of its own open: the disk keeps those that stay so."""
        out = super().again()
        out._open = OrderedDict()
        return out

    def add(self, entry: dict[str, Any]) -> None:
        """Take up the next shard."""
        known = ("file", "rows", "mean_norm", "footer")
        self.shards.append(ShardEntry(split="train", **{k: entry[k] for k in known}))
        self.starts.append(self.starts[-1] + entry["rows"])


class Window:
    """The reader's side of a window, and the process that makes its shards.

    Args:
        folder: what a killed job left there is taken up.
        start: starts the maker; given the file that it writes its log to.
        seed: of the order of rows.
    """

    def __init__(
        self, folder: Path, start: Callable[[IO[str]], subprocess.Popen], seed: int
    ) -> None:
        self.folder, self.start, self.seed = folder, start, seed
        self.made: list[Made] = []
        self.rows: dict[str, WindowRows] = {}
        self.maker: subprocess.Popen | None = None
        self.opened = 0  # shards of which a row was planned
        self._open: list[int] = []
        self.last = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._start()
        plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        self.key, self.sizes = plan["key"], Sizes(**plan["sizes"])
        for hook, d_model in plan["widths"].items():
            self.rows[hook] = WindowRows(folder, hook, d_model, plan["dtype"])
        self._read()

    def _start(self) -> None:
        """Start the maker, and wait for its plan."""
        self.stop()
        for name in ("plan.json", "wanted.json", "checked.json"):
            (self.folder / name).unlink(missing_ok=True)
        with open(self.folder / "maker.log", "w", encoding="utf-8") as log:
            self.maker = self.start(log)
        while not (self.folder / "plan.json").exists():
            self._look_at_maker()
            time.sleep(POLL)

    def stop(self) -> None:
        """End the maker."""
        if self.maker is not None:
            self.maker.kill()
            self.maker.wait()

    def _look_at_maker(self) -> None:
        """RetraceError where the maker has failed, with its sentence."""
        if self.maker is None or not self.maker.poll():
            return
        said = (self.folder / "maker.log").read_text(encoding="utf-8", errors="replace")
        last = (said.strip().splitlines() or [f"it ended with {self.maker.returncode}"])[-1]
        raise RetraceError(last.removeprefix("error in stage activations: "))

    def _read(self) -> None:
        """Take up what was made since."""
        for made in noted(self.folder / "made.jsonl", len(self.made)):
            for hook, rows in self.rows.items():
                rows.add(made.hooks[hook])
            self.made.append(made)

    def want(self, open: Sequence[int], next: int, last: int) -> None:
        """Have the open shards, and those from `next` to `last` - 1, made where they are missing.

        Others that lie in the folder are removed.
        """
        if (self.folder / "wanted.json").exists():
            self._start()
        self.last = last
        wanted = [*open, *range(next, last)]
        kept = {name_of(hook, j) for j in wanted[: self.sizes.capacity] for hook in self.rows}
        for file in (self.folder / "shards").rglob("*.parquet"):
            if file.relative_to(self.folder).as_posix() not in kept:
                file.unlink()
        write(
            self.folder / "wanted.json",
            {"open": list(open), "next": next, "last": last, "seed": self.seed},
        )
        self._open, self.opened = list(open), next
        while not (self.folder / "checked.json").exists():
            self._look_at_maker()
            time.sleep(POLL)

    def rows_of(self, j: int) -> int | None:
        """Rows of shard j; None where it was never made."""
        if j >= len(self.made):
            self._read()
        return self.entry(j)["rows"] if j < len(self.made) else None

    def lies_there(self, j: int) -> bool:
        """Whether shard j, of those that were made once, can be read."""
        return all((self.folder / name).exists() for name in files_of(self.made[j], j))

    def entry(self, j: int) -> dict[str, Any]:
        """What is known of shard j, at the first hook."""
        return self.made[j].hooks[next(iter(self.rows))]

    def wait(self) -> None:
        """A moment, in which the maker works; RetraceError where it has failed."""
        self._look_at_maker()
        if (
            self.maker is None or self.maker.returncode == 0
        ):  # more rows were dropped than was reckoned with
            self.want(self._open, self.opened, self.last + self.sizes.capacity)
        time.sleep(POLL)

    def planned(self, buffer: Buffer) -> None:
        """Remember how far the reader's plan has come."""
        end = max([buffer.next, *(j + 1 for j, _, _ in buffer.pieces)])
        still = {*self._open, *buffer.open, *range(buffer.next, end)}
        self._open = sorted(still - set(buffer.used))
        self.opened = max(self.opened, end)

    def remove(self, used: Sequence[int]) -> None:
        """Remove shards whose rows were all read."""
        for j in used:
            for name in files_of(self.made[j], j):
                (self.folder / name).unlink(missing_ok=True)

    def digests(self, n: int) -> dict[str, dict[str, Any]]:
        """The first n shards that were made, named as in a whole store."""
        known = ("rows", "mean_norm", "sha256")
        return {
            f"shards/{hook}/part-{made.number:05d}.parquet": {k: entry[k] for k in known}
            for made in self.made[:n]
            for hook, entry in made.hooks.items()
        }


def start_of(
    position: int, window: Window, chunk_rows: int, n_chunks: int
) -> tuple[list[int], int]:
    """The shards that are open where the stream's row `position` is read, and the next one.

    Raises:
        RetraceError: made.jsonl does not reach so far.
    """

    def known(j: int) -> int | None:
        return window.entry(j)["rows"] if j < len(window.made) else None

    if not position:
        return [], 0
    for buffer in buffers(window.seed, window.sizes, chunk_rows, n_chunks, known):
        if buffer is None:
            raise RetraceError(
                f"{window.folder / 'made.jsonl'}: holds {len(window.made)} shards, fewer than the "
                f"checkpoint beside it has read; delete {window.folder.parent}, then run snakemake "
                f"again"
            )
        position -= len(buffer.order)
        if position < 0:
            return buffer.open, buffer.next
    raise AssertionError("buffers go on for ever")


def key_of(made: dict[str, Any]) -> str:
    """Digest of all that the shards' bytes depend on, from the maker's certificate."""
    kept = {k: made[k] for k in ("spec", "code", "versions", "device")}
    return provenance.digest([kept, sorted(made["inputs"].values())])
