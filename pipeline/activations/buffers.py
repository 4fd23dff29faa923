"""Buffers for one shard: one in host memory and, with a GPU, a second one on the device. [torch]

The model's rows land where the model is. `fetch` sends them to page-locked host memory on a stream
of its own, while the next shard is computed, and `wait` returns when they are there. Without a GPU
there is one buffer, and both do nothing. Nothing in between waits for the GPU. Rows that are
filtered out are only removed when the shard is written.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass
class Sums:
    """What a shard's statistics are made of, float64: sum |x|, sum |x|^2, sum x [d]."""

    norm: Any = 0.0
    square: Any = 0.0
    total: Any = 0.0

    def add(self, x: Float[Tensor, "rows d"]) -> None:
        """Add rows; a row of zeros adds nothing."""
        norms = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64)
        self.norm += norms.sum()
        self.square += norms.square().sum()
        self.total += x.sum(0, dtype=torch.float64)

    def statistics(self, rows: int) -> dict[str, Any]:
        """rows, mean_norm, mean_square (of |x|) and mean [d], for the shard's metadata."""
        return {
            "rows": rows,
            "mean_norm": float(self.norm) / rows,
            "mean_square": float(self.square) / rows,
            "mean": (self.total / rows).tolist(),
        }


def combined(parts: list[dict[str, Any]]) -> dict[str, float]:
    """Mean norm and variance over the rows of several shards.

        variance = (E|x|^2 - |E x|^2) / d,   the mean over dimensions of each one's variance

    Args:
        parts: one per shard, as `Sums.statistics` gives it.
    """
    n = sum(p["rows"] for p in parts)

    def over(key: str) -> Any:
        """The mean over all rows of something that each part is the mean of."""
        return sum(np.multiply(p["rows"], p[key]) for p in parts) / n

    mean = over("mean")
    variance = (over("mean_square") - float(mean @ mean)) / len(mean)
    return {"mean_norm": float(over("mean_norm")), "variance": max(float(variance), 0.0)}


@dataclass
class ShardRows:
    """A shard's rows in one memory.

    Attributes:
        acts: hook -> [rows d], all rows of the shard, stored dtype.
        kept: hook -> bool [rows], those that go into the shard.
        sums: hook -> float64 sums over those.
    """

    acts: dict[str, Tensor]
    kept: dict[str, Tensor]
    sums: dict[str, Sums] = field(default_factory=dict)

    @classmethod
    def empty(
        cls, rows: int, widths: dict[str, int], dtype: torch.dtype, **where: Any
    ) -> "ShardRows":
        """Memory for so many rows of each hook.

        Args:
            where: `device`, or `pin_memory` for the host's.
        """
        return cls(
            {h: torch.empty(rows, d, dtype=dtype, **where) for h, d in widths.items()},
            {h: torch.ones(rows, dtype=torch.bool, **where) for h in widths},
        )

    def add(
        self,
        hook: str,
        at: slice,
        x: Float[Tensor, "batch pos d"],
        keep: Bool[Tensor, "batch pos"] | None,
    ) -> None:
        """Put the model's rows in their place and sum them up.

        Args:
            at: which rows of the shard they are.
            keep: which of them go into the shard; None for all.
        """
        here = self.acts[hook][at]
        here.view(x.shape).copy_(x)
        if keep is not None:
            kept = self.kept[hook][at]
            kept.copy_(keep.flatten())
            # on a GPU, the size of a selection is only known after waiting for it
            here = here.masked_fill(~kept[:, None], 0) if here.is_cuda else here[kept]
        self.sums[hook].add(here)


class Buffers:
    """A shard's rows in host memory, and before that, with a GPU, in the GPU's.

    Args:
        host: where the rows are read.
        gpu: where a GPU's model puts them.
    """

    def __init__(self, host: ShardRows, gpu: ShardRows | None = None) -> None:
        self.host, self.gpu, self.n_rows = host, gpu, len(next(iter(host.kept.values())))
        if gpu:
            self.device = next(iter(gpu.kept.values())).device
            self.side = torch.cuda.Stream(self.device)
            self.there = torch.cuda.Event(blocking=True)

    @classmethod
    def like(
        cls, rows: int, widths: dict[str, int], dtype: torch.dtype, device: torch.device
    ) -> "Buffers":
        """For shards of at most so many rows."""
        if device.type != "cuda":
            return cls(ShardRows.empty(rows, widths, dtype))
        host = ShardRows.empty(rows, widths, dtype, pin_memory=True)
        return cls(host, ShardRows.empty(rows, widths, dtype, device=device))

    def begin(self, n_rows: int) -> ShardRows:
        """Where the model's rows of the next shard go."""
        self.n_rows, first = n_rows, self.gpu or self.host
        first.sums = {hook: Sums() for hook in first.acts}
        return first

    def fetch(self) -> None:
        """Send what lies on the GPU to the host; return at once."""
        if not self.gpu:
            return
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        n = self.n_rows
        with torch.cuda.stream(self.side):
            for hook, acts in self.gpu.acts.items():
                self.host.acts[hook][:n].copy_(acts[:n], non_blocking=True)
                self.host.kept[hook][:n].copy_(self.gpu.kept[hook][:n], non_blocking=True)
                sums = vars(self.gpu.sums[hook])
                self.host.sums[hook] = Sums(
                    **{key: x.to("cpu", non_blocking=True) for key, x in sums.items()}
                )
            self.there.record(self.side)

    def wait(self) -> None:
        """Return when what `fetch` sent is there."""
        if self.gpu:
            self.there.synchronize()

    def kept(self, hook: str) -> Bool[np.ndarray, " rows"]:
        """Which of the shard's rows are stored."""
        return self.host.kept[hook][: self.n_rows].numpy()

    def rows(self, hook: str) -> int:
        """How many rows of the hook are stored."""
        return int(self.kept(hook).sum())

    def acts(self, hook: str) -> Float[Tensor, "stored d"]:
        """The rows that are stored."""
        acts, kept = self.host.acts[hook][: self.n_rows], self.host.kept[hook][: self.n_rows]
        return acts if kept.all() else acts[kept]

    def statistics(self, hook: str) -> dict[str, Any]:
        """The hook's statistics, see `Sums.statistics`."""
        return self.host.sums[hook].statistics(self.rows(hook))
