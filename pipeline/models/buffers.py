"""Room for the rows of one shard, on the host and for a GPU once more there. [torch]

The model's rows land where the model is. `fetch` sends them to page-locked memory of the host on a
stream of its own, beside the next shard's computing, and `wait` ends when they are there. Without a
GPU there is one room, and both do nothing. No step between waits for the device: rows that are left
out keep their place until they are written.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class Sums:
    """What a shard's statistics are made of, float64: sum |x|, sum |x|^2, sum x [d]."""

    norm: Any = 0.0
    square: Any = 0.0
    total: Any = 0.0

    def add(self, x: Tensor) -> None:
        """Add rows [rows d]; a row of zeros adds nothing."""
        norms = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64)
        self.norm += norms.sum()
        self.square += norms.square().sum()
        self.total += x.sum(0, dtype=torch.float64)

    def told(self, rows: int) -> dict[str, Any]:
        """mean_norm, mean_square (of |x|) and mean [d], for the shard's metadata."""
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
        parts: of each shard, as `Sums.told` gives it.
    """
    n = sum(p["rows"] for p in parts)
    over = lambda key: sum(np.multiply(p["rows"], p[key]) for p in parts) / n  # noqa: E731
    mean = over("mean")
    variance = (over("mean_square") - float(mean @ mean)) / len(mean)
    return {"mean_norm": float(over("mean_norm")), "variance": max(float(variance), 0.0)}


@dataclass
class Room:
    """A shard's rows in one memory.

    acts: hook -> [rows d], all rows of the shard, stored dtype.
    kept: hook -> bool [rows], those that go into the shard.
    sums: hook -> float64 sums over those.
    """

    acts: dict[str, Tensor]
    kept: dict[str, Tensor]
    sums: dict[str, Sums] = field(default_factory=dict)

    @classmethod
    def empty(cls, rows: int, widths: dict[str, int], dtype: torch.dtype, **where: Any) -> "Room":
        """
        Args:
            where: `device`, or `pin_memory` for the host's.
        """
        return cls(
            {h: torch.empty(rows, d, dtype=dtype, **where) for h, d in widths.items()},
            {h: torch.ones(rows, dtype=torch.bool, **where) for h in widths},
        )

    def add(self, hook: str, at: slice, x: Tensor, keep: Tensor | None) -> None:
        """Put the model's rows in their place and sum them up.

        Args:
            x: [batch rows d].
            keep: bool [batch rows]; None for all.
        """
        here = self.acts[hook][at]
        here.view(x.shape).copy_(x)
        if keep is not None:
            kept = self.kept[hook][at]
            kept.copy_(keep.flatten())
            # a GPU would be waited for to say how many rows a selection has
            here = here.masked_fill(~kept[:, None], 0) if here.is_cuda else here[kept]
        self.sums[hook].add(here)


class Buffers:
    """A shard's room on the host, and the model's own where that is a GPU.

    Args:
        host: where the rows are read.
        gpu: where a GPU's model puts them.
    """

    def __init__(self, host: Room, gpu: Room | None = None) -> None:
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
            return cls(Room.empty(rows, widths, dtype))
        host = Room.empty(rows, widths, dtype, pin_memory=True)
        return cls(host, Room.empty(rows, widths, dtype, device=device))

    def begin(self, n_rows: int) -> Room:
        """The room that the model's rows of the next shard go to."""
        self.n_rows, room = n_rows, self.gpu or self.host
        room.sums = {hook: Sums() for hook in room.acts}
        return room

    def fetch(self) -> None:
        """Send what the model's room holds to the host; return at once."""
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
        """Until what was fetched is there."""
        if self.gpu:
            self.there.synchronize()

    def kept(self, hook: str) -> np.ndarray:
        """Which of the shard's rows are stored: bool [n_rows]."""
        return self.host.kept[hook][: self.n_rows].numpy()

    def rows(self, hook: str) -> int:
        """How many rows of the hook are stored."""
        return int(self.kept(hook).sum())

    def acts(self, hook: str) -> Tensor:
        """The rows that are stored: [rows d]."""
        acts, kept = self.host.acts[hook][: self.n_rows], self.host.kept[hook][: self.n_rows]
        return acts if kept.all() else acts[kept]

    def told(self, hook: str) -> dict[str, Any]:
        """The hook's statistics, see `Sums.told`."""
        return self.host.sums[hook].told(self.rows(hook))
