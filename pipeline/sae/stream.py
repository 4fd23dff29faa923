"""The rows that every dictionary of a job is trained on, in an order that the seed decides.

1. An epoch permutes contiguous chunks of rows, and reads CHUNKS of them at a time into a buffer,
   whose rows are permuted again. The two permutations are drawn from (seed, epoch) and from
   (seed, epoch, buffer), so that a killed and resumed job gets the batches of an undisturbed one.
2. Epochs follow each other without a gap: batch s is rows s B to (s + 1) B of an endless stream.
3. Transcoders see the rows of two hooks side by side, in the same order, each with its own scale.
4. Rows are scaled to a mean norm of sqrt(d_in) (Conerly et al. 2024, "April update"), so that one
   learning rate and one L1 coefficient fit all layers and models.

Where the rows are made a window ahead (store/window.py), a WindowStream takes the shards in a drawn
order and mixes those that are open; the rest is the same.

The store is read in chunks, never row by row. The chunks of a buffer are read in the order of the
store. While one buffer is used, a thread reads the next one: two are in memory. With a GPU a few
threads read further ahead, hook by hook into pinned memory, and copy to the device, where the hooks
come side by side.
"""

import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from pipeline.errors import RetraceError
from pipeline.store import tables
from pipeline.store.shards import PairedRows, Rows, keep_open
from pipeline.store.window import Window, buffers, start_of

Plan = tuple[np.ndarray, np.ndarray, np.ndarray, Sequence[int]]  # see `Stream._plans`

CHUNKS = 64  # in a buffer; by default a chunk is a thousand rows, about a megabyte
AHEAD = 4  # chunks that the disk is asked for before they are read
READERS = {"cuda": 4}  # threads that read one buffer each; one thread on a CPU
# Variance, as a share of the mean square, below which rows are constant: rounding leaves constant
# float32 rows 1e-14.
CONSTANT = 1e-10


def picked(rows: Shaped[Tensor, "rows d"], at: Int[Tensor, " some"]) -> Shaped[Tensor, "some d"]:
    """rows[at]. On a CPU index_select copies whole rows, in a quarter of an index's time."""
    return rows.index_select(0, at) if rows.device.type == "cpu" else rows[at]


class Stream:
    """Batches of training rows.

    Args:
        rows: the stored rows of split train.
        batch_size: rows per batch.
        buffer_rows: rows per buffer.
        seed: decides the order of rows.
        normalize: scale rows to a mean norm of sqrt(d_in).
        device: where batches lie.
        target: for transcoders, the rows to reconstruct; they stand to the right of `rows`.

    Attributes:
        n_rows: rows of an epoch.
        scale, target_scale: factors by which `rows` and `target` are multiplied.
    """

    def __init__(
        self,
        rows: Rows | PairedRows,
        *,
        batch_size: int,
        buffer_rows: int,
        seed: int,
        normalize: bool,
        device: torch.device | str = "cpu",
        target: Rows | None = None,
    ) -> None:
        self.rows = PairedRows(rows, target) if target else rows
        self.batch_size, self.seed, self.device = batch_size, seed, torch.device(device)
        self.n_rows = self._rows_of_an_epoch()
        if self.n_rows == 0:
            raise RetraceError(f"{rows.manifest}: holds no training row; raise corpus.n_tokens")
        self.chunk_rows = max(1, min(buffer_rows, self._mixed_rows()) // CHUNKS)
        keep_open(self.rows)
        self.d_in, self.d_out = rows.d_model, (target or rows).d_model
        self.scale = math.sqrt(self.d_in) / self._mean_norm(rows) if normalize else 1.0
        self.target_scale = self.scale
        if target and normalize:
            self.target_scale = math.sqrt(self.d_out) / self._mean_norm(target)

    def _rows_of_an_epoch(self) -> int:
        return self.rows.n_rows

    def _mixed_rows(self) -> int:
        """Rows that a buffer's may be drawn from."""
        return self.n_rows

    def _mean_norm(self, rows: Rows) -> float:
        return mean_norm(rows)

    def _scaled(self, raw: Tensor) -> Tensor:
        """Stored rows in float32, multiplied by their scales; `raw` may be overwritten."""
        x = raw.float()
        if self.target_scale == self.scale:
            return x.mul_(self.scale)
        x[:, : self.d_in] *= self.scale
        x[:, self.d_in :] *= self.target_scale
        return x

    def batches(self, first: int, last: int) -> Iterator[Float[Tensor, "batch d"]]:
        """Batches first to last - 1, float32 and scaled; d is d_in, of transcoders d_in + d_out."""
        parts, need, left = [], self.batch_size, last - first
        for buffer, order in self._buffers(first * self.batch_size, last * self.batch_size):
            at = 0
            while at < len(order) and left:
                taken = order[at : at + need]
                parts.append(picked(buffer, taken))
                at, need = at + len(taken), need - len(taken)
                if need == 0:
                    x = parts[0] if len(parts) == 1 else torch.cat(parts)
                    yield self._scaled(x)
                    parts, need, left = [], self.batch_size, left - 1
            del buffer  # freed before the next but one is read: two in memory at a time

    def sample(self, n: int) -> Float[Tensor, "rows d"]:
        """The first rows of the stream, scaled: n of them, or one buffer if that is less.

        Raises:
            RetraceError: they do not vary, or contain NaN or infinity.
        """
        buffer, order = self._load(*self._first_plan())
        x = self._scaled(buffer[order[:n]])
        where = f"{self.rows.manifest}: activations at {self.rows.hook}"
        if not torch.isfinite(x).all():
            raise RetraceError(f"{where} hold NaN or infinity; store them in bfloat16 or float32")
        for part in self.sides(x):
            if not part.var(0, correction=0).sum() > CONSTANT * part.pow(2).sum(1).mean():
                raise RetraceError(f"{where} do not vary; check the hook and the model")
        return x

    def median(self, n_rows: int) -> Float[Tensor, " d"]:
        """The geometric median of what is reconstructed, on the first rows of the stream."""
        return geometric_median(self.sample(n_rows)[:, -self.d_out :])

    def _first_plan(self) -> tuple[np.ndarray, ...]:
        return next(self._plans(0, 1))[:3]

    def sides(self, x: Float[Tensor, "rows d"]) -> tuple[Tensor, ...]:
        """The columns that are read, and those that are reconstructed."""
        return x[:, : self.d_in], x[:, -self.d_out :]

    def _buffers(self, position: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The buffers that contain the stream from `position` to `stop`.

        Yields:
            Rows in the order of the store, [rows d_in] in the stored dtype; and the order in which
            to use them, int64, which leaves out rows before `position`.
        """
        side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        readers = min(READERS.get(self.device.type, 1), os.cpu_count() or 1)
        ahead: deque[tuple[Future, Sequence[int]]] = deque()

        def first() -> tuple[Tensor, Tensor]:
            future, used = ahead.popleft()
            loaded, copied = future.result()
            self._read(used)
            if copied is not None:
                here = torch.cuda.current_stream(self.device)
                here.wait_event(copied)
                for tensor in loaded:
                    tensor.record_stream(here)
            return loaded

        with ThreadPoolExecutor(readers) as pool:
            for plan in self._plans(position, stop):
                if plan is not None:
                    *where, used = plan
                    ahead.append((pool.submit(self._load_ahead, side, *where), used))
                    if len(ahead) > readers:
                        yield first()
                elif ahead:  # rows that are not there yet; those that are give room
                    yield first()
                else:
                    self._wait()
            while ahead:
                yield first()

    def _read(self, used: Sequence[int]) -> None:
        """Shards that no later buffer reads."""

    def _wait(self) -> None:
        """A moment, in which rows may come to be there."""

    def _plans(self, position: int, stop: int) -> Iterator[Plan | None]:
        """For each buffer: the first row and the end of its chunks, the order of its rows, and
        which shards it uses up; None as long as its rows are not there."""
        epoch, skip = divmod(position, self.rows.n_rows)
        while True:
            starts = np.arange(0, self.rows.n_rows, self.chunk_rows)
            shuffled = np.random.default_rng([self.seed, epoch]).permutation(starts)
            for i, at in enumerate(range(0, len(shuffled), CHUNKS)):
                chunks = np.sort(shuffled[at : at + CHUNKS])
                stops = np.minimum(chunks + self.chunk_rows, self.rows.n_rows)
                n = int((stops - chunks).sum())
                if skip < n:
                    if position >= stop:
                        return
                    order = np.random.default_rng([self.seed, epoch, i]).permutation(n)
                    yield chunks, stops, order[skip:], ()
                    position += n - skip
                skip = max(skip - n, 0)
            epoch += 1

    def _load(
        self, starts: np.ndarray, stops: np.ndarray, order: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """The rows of a plan's chunks, [rows d_in] in the stored dtype; and the order, int64."""
        spans = list(zip(starts.tolist(), stops.tolist(), strict=True))
        order = torch.from_numpy(order)
        if self.device.type == "cuda":
            return self._on_gpu(spans), order.to(self.device, non_blocking=True)
        rows = torch.empty(
            int((stops - starts).sum()), self.rows.d_model, dtype=getattr(torch, self.rows.dtype)
        )
        reader = self.rows.again()  # a reader of this thread's own
        for _ in self._filled(reader, spans, rows):
            pass
        return rows, order

    def _filled(
        self, reader: Rows | PairedRows, spans: Sequence[tuple[int, int]], into: Tensor
    ) -> Iterator[dict[str, np.ndarray]]:
        """Read the rows of some chunks, one chunk after the other; the columns of each."""
        raw = into.view(torch.int16).numpy() if into.dtype == torch.bfloat16 else into.numpy()
        raw, at = raw.view(tables.NUMPY[self.rows.dtype]), 0
        for i, (start, stop) in enumerate(spans):
            for soon in spans[i + AHEAD if i else 1 : i + AHEAD + 1]:
                reader.ahead(*soon)  # the disk is at work while these rows are hashed and copied
            yield reader.read_into(start, stop, raw[at : at + stop - start])
            at += stop - start

    def _on_gpu(self, spans: Sequence[tuple[int, int]]) -> Shaped[Tensor, "rows d"]:
        """The rows of some chunks on the GPU, read hook by hook: what is copied on the CPU, and
        locked there, is one hook's."""
        reader, n = self.rows.again(), sum(stop - start for start, stop in spans)
        dtype, column, first = getattr(torch, self.rows.dtype), 0, []
        out = torch.empty(n, self.rows.d_model, dtype=dtype, device=self.device)
        for i, part in enumerate(reader.parts):
            locked = torch.empty(n, part.d_model, dtype=dtype, pin_memory=out.is_cuda)
            found = list(self._filled(part, spans, locked))
            out[:, column : column + part.d_model].copy_(locked, non_blocking=True)
            column, first = column + part.d_model, first or found
            for one, other in zip(first, found, strict=True) if i else ():
                reader.check_alike(i, one, other)
        return out

    def _load_ahead(self, side: "torch.cuda.Stream | None", *plan: np.ndarray) -> tuple:
        """What `_load` returns, copied on the CUDA stream `side`, and the event after that copy."""
        if side is None:
            return self._load(*plan), None
        with torch.cuda.stream(side):
            loaded = self._load(*plan)
            return loaded, side.record_event()


class WindowStream(Stream):
    """Batches of rows that are made a window ahead and removed when they were read.

    Args:
        window: where they are made.
        hooks: one that is read and, for transcoders, one that is reconstructed.
        norms: mean norm of each hook's rows, of the held-out ones, which are known beforehand.
        total: rows that are read in all.
        kept: the share of an epoch's rows that are stored, at least.
        rest: as of `Stream`.
    """

    def __init__(
        self, window: Window, hooks: Sequence[str], *, norms: Sequence[float], total: int,
        kept: float = 1.0, **rest: Any,
    ) -> None:  # fmt: skip
        self.window, self._norms = window, dict(zip(hooks, norms, strict=True))
        self.total, self.kept = total, kept
        self.wanted: int | None = None  # the row from which on shards were asked for
        rows, *target = (window.rows[hook] for hook in hooks)
        super().__init__(rows, target=target[0] if target else None, **rest)
        most = self._mixed_rows()
        if most < self.batch_size:
            raise RetraceError(
                f"activations.window: the {window.sizes.open} shards that are mixed hold {most:,} "
                f"rows, less than a batch of {self.batch_size:,}; raise it, or lower "
                f"sae.training.batch_size"
            )

    def start_at(self, position: int) -> None:
        """Begin at a row, as a killed job does at its last checkpoint."""
        if self.wanted != position:
            self.go_on(position)

    def go_on(self, position: int) -> None:
        """Have the shards made that the stream reads from row `position` on, in their order."""
        sizes, n_rows = self.window.sizes, self.kept * self.n_rows
        epochs = math.ceil(self.total / n_rows)
        most = math.ceil(self.total / n_rows * len(sizes.rows)) + sizes.open + 1
        open, first = start_of(position, self.window, self.chunk_rows, CHUNKS)
        self.window.want(open, first, max(min(epochs * len(sizes.rows), most), first))
        self.wanted = position

    def median(self, n_rows: int) -> Float[Tensor, " d"]:
        """As of `Stream`; kept beside the window, since its rows are soon gone."""
        file = self.window.folder / "median.json"
        if not file.exists():
            median = super().median(n_rows)
            tables.write_json(file, {"median": median.tolist()}, {"key": self.window.key})
        kept = tables.read_json(file)
        if kept["provenance"]["key"] != self.window.key:
            file.unlink()
            return self.median(n_rows)
        return torch.tensor(kept["median"], device=self.device)

    def _rows_of_an_epoch(self) -> int:
        return sum(self.window.sizes.rows)

    def _mixed_rows(self) -> int:
        return sum(sorted(self.window.sizes.rows)[-self.window.sizes.open :])

    def _mean_norm(self, rows: Rows) -> float:
        return checked_norm(self._norms[rows.hook], rows)

    def _first_plan(self) -> tuple[np.ndarray, ...]:
        if self.wanted is None:
            self.go_on(0)
        for plan in self._plans(0, 1):
            if plan is not None:
                return plan[:3]
            self._wait()
        raise AssertionError("plans end after a row")

    def _read(self, used: Sequence[int]) -> None:
        self.window.remove(used)

    def _wait(self) -> None:
        self.window.wait()

    def _plans(self, position: int, stop: int) -> Iterator[Plan | None]:
        window, at = self.window, 0
        if self.wanted is None:
            self.go_on(position)
        for buffer in buffers(window.seed, window.sizes, self.chunk_rows, CHUNKS, window.rows_of):
            if buffer is None:
                yield None
                continue
            at += len(buffer.order)
            if at <= position:
                continue
            while not all(window.lies_there(j) for j in {piece[0] for piece in buffer.pieces}):
                yield None  # made again for a job that goes on from a checkpoint
            window.planned(buffer)
            starts = np.array([self._starts[j] + a for j, a, _ in buffer.pieces])
            stops = np.array([self._starts[j] + b for j, _, b in buffer.pieces])
            yield starts, stops, buffer.order[len(buffer.order) - (at - position) :], buffer.used
            position = at
            if position >= stop:
                return  # the next buffer may ask for shards of another epoch

    @property
    def _starts(self) -> list[int]:
        return next(iter(self.window.rows.values())).starts


def mean_norm(rows: Rows) -> float:
    """Mean Euclidean norm of the rows, from their manifest.

    Raises:
        RetraceError: it is zero or not finite.
    """
    return checked_norm(sum(s.rows * s.mean_norm for s in rows.shards) / rows.n_rows, rows)


def checked_norm(found: float, rows: Rows) -> float:
    """A mean norm; RetraceError where it is zero or not finite."""
    if not (math.isfinite(found) and found > 0):
        raise RetraceError(
            f"{rows.manifest}: activations at {rows.hook} have a mean norm of {found}; check that "
            f"the hook and the model are right"
        )
    return found


def geometric_median(
    x: Float[Tensor, "rows d_in"], *, tolerance: float = 1e-5, max_steps: int = 200
) -> Float[Tensor, " d_in"]:
    """The point with the least sum of distances to the rows (Weiszfeld's algorithm).

    It starts from the mean; each step averages the rows with weights 1 / distance.

    Args:
        tolerance: stop when a step is shorter than this share of the mean distance.
    """
    median = x.mean(0)
    for _ in range(max_steps):
        distance = torch.linalg.vector_norm(x - median, dim=1).clamp_min(1e-12)
        weights = 1 / distance
        moved = (weights @ x) / weights.sum()
        step = torch.linalg.vector_norm(moved - median)
        median = moved
        if step < tolerance * distance.mean():
            break
    return median
