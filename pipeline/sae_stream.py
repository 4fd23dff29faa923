"""The rows that every dictionary of a job is shown, in an order that is a function of the seed.

1. An epoch permutes contiguous chunks of rows, and mixes the rows of CHUNKS chunks at a time in
   memory. Both permutations are drawn from (seed, epoch) and (seed, epoch, buffer), so that the
   batch of step s is the same whether the job got there in one go or was killed and resumed.
2. Epochs follow each other without a gap: batch s is rows s B to (s + 1) B of that endless stream.
3. Rows are scaled to a mean norm of sqrt(d_in) (Conerly et al. 2024, "April update"), so that one
   learning rate and one L1 coefficient fit all layers and models.

The store is read in chunks, never row by row, and `buffer_rows` rows at most are in memory. The
chunks of a buffer are read in the order of the store, so that a shard is opened once a buffer.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from pipeline import hooks, tables
from pipeline.errors import RetraceError
from pipeline.shards import Rows

CHUNKS = 64  # chunks mixed at a time; by default a chunk is a thousand rows, about a megabyte
CONSTANT = 1e-10  # rounding leaves constant float32 rows a variance of 1e-14 of their mean square


class Stream:
    """Batches of training rows.

    Args:
        rows: the stored rows of split train.
        batch_size: rows a batch.
        buffer_rows: rows mixed in memory at a time.
        seed: of the order.
        normalize: scale rows to a mean norm of sqrt(d_in).
        device: where batches lie.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        batch_size: int,
        buffer_rows: int,
        seed: int,
        normalize: bool,
        device: torch.device | str = "cpu",
    ) -> None:
        self.rows, self.batch_size, self.seed, self.device = rows, batch_size, seed, device
        if rows.n_rows == 0:
            raise RetraceError(f"{rows.manifest}: holds no training row; raise corpus.n_tokens")
        self.chunk_rows = max(1, min(buffer_rows, rows.n_rows) // CHUNKS)
        self.scale = math.sqrt(rows.d_model) / mean_norm(rows) if normalize else 1.0

    def batches(self, first: int, last: int) -> Iterator[Tensor]:
        """Batches first to last - 1: [batch d_in], float32, scaled."""
        parts, need, left = [], self.batch_size, last - first
        for buffer, order in self._buffers(first * self.batch_size):
            at = 0
            while at < len(order) and left:
                taken = order[at : at + need]
                parts.append(buffer[taken])
                at, need = at + len(taken), need - len(taken)
                if need == 0:
                    x = parts[0] if len(parts) == 1 else torch.cat(parts)
                    yield x.float().mul_(self.scale)
                    parts, need, left = [], self.batch_size, left - 1
            if not left:
                return
            del buffer  # before the next is read: one in memory at a time

    def sample(self, n: int) -> Tensor:
        """The first rows of the stream, at most n and a buffer: [rows d_in], float32, scaled.

        Raises:
            RetraceError: they do not vary, or hold NaN or infinity.
        """
        buffer, order = next(self._buffers(0))
        x = buffer[order[:n]].float().mul_(self.scale)
        where = f"{self.rows.manifest}: activations at {self.rows.hook}"
        if not torch.isfinite(x).all():
            raise RetraceError(f"{where} hold NaN or infinity; store them in bfloat16 or float32")
        if not x.var(0, correction=0).sum() > CONSTANT * x.pow(2).sum(1).mean():
            raise RetraceError(f"{where} do not vary; check that the hook and the model are right")
        return x

    def _buffers(self, position: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Buffers from a position of the stream on, without end.

        Yields:
            rows in the order of the store [rows d_in], stored dtype; and the order in which to
            show them, int64, less those before `position`.
        """
        epoch, skip = divmod(position, self.rows.n_rows)
        while True:
            starts = np.arange(0, self.rows.n_rows, self.chunk_rows)
            shuffled = np.random.default_rng([self.seed, epoch]).permutation(starts)
            for i, at in enumerate(range(0, len(shuffled), CHUNKS)):
                chunks = np.sort(shuffled[at : at + CHUNKS])
                stops = np.minimum(chunks + self.chunk_rows, self.rows.n_rows)
                n = int((stops - chunks).sum())
                if skip >= n:
                    skip -= n
                    continue
                order = np.random.default_rng([self.seed, epoch, i]).permutation(n)[skip:]
                yield self._load(chunks, stops, n), torch.from_numpy(order).to(self.device)
                skip = 0
            epoch += 1

    def _load(self, starts: np.ndarray, stops: np.ndarray, n: int) -> Tensor:
        """The rows of some chunks, [n d_in], stored dtype."""
        out = np.empty((n, self.rows.d_model), tables.NUMPY[self.rows.dtype])
        at = 0
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            out[at : at + stop - start] = self.rows.read(start, stop)[0]
            at += stop - start
        return hooks.to_tensor(out, self.rows.dtype, self.device)


def mean_norm(rows: Rows) -> float:
    """Mean Euclidean norm of the rows, from the manifest."""
    found = sum(s.rows * s.mean_norm for s in rows.shards) / rows.n_rows
    if not (math.isfinite(found) and found > 0):
        raise RetraceError(
            f"{rows.manifest}: activations at {rows.hook} have a mean norm of {found}; check that "
            f"the hook and the model are right"
        )
    return found


def geometric_median(x: Tensor, *, tolerance: float = 1e-5, max_steps: int = 200) -> Tensor:
    """The point with the least sum of distances to the rows (Weiszfeld's algorithm).

    Args:
        x: [rows d_in].
        tolerance: stop when a step is shorter than this share of the mean distance.

    Returns:
        [d_in]. It starts from the mean; each step averages the rows with weights 1 / distance.
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
