"""Threads that write shards while the next ones are computed. [torch]"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from pipeline.activations import files, forward
from pipeline.activations.buffers import Buffers
from pipeline.activations.plan import BUFFER_BYTES, Plan, Shard, row_bytes

WRITERS = {"cuda": 4}  # threads that write: one hashes more slowly than a GPU computes


class Writers:
    """Threads that write shards, and the buffers that come back from them.

    Args:
        left: the shards that are still to be written.
        made: the certificate, written into every shard.
        how: writes one, as `files.write` does.
    """

    def __init__(
        self, device: torch.device, plan: Plan, left: list[Shard], folder: Path, made: dict,
        how: Callable[..., dict[str, str]] = files.write,
    ) -> None:  # fmt: skip
        self.plan, self.folder, self.made, self.device = plan, folder, made, device
        self.how = how
        n_writers, ahead = WRITERS.get(device.type, 1), forward.AHEAD.get(device.type, 0)
        self.most_rows = max(map(plan.rows, left), default=0)
        row = row_bytes(plan.spec, plan.widths)
        fit = 4 * BUFFER_BYTES // (self.most_rows * row) if left else 0
        self.unmade = min(max(2 + ahead, min(1 + n_writers + ahead, fit)), len(left))
        self.pool = ThreadPoolExecutor(n_writers)
        self.writing: deque[tuple[Future, Buffers]] = deque()
        self.digests: dict[str, str] = {}

    def next_free(self) -> Buffers:
        """Buffers that nobody uses: written ones, new ones, or the next that will be written.

        New ones are made late, since page-locked memory takes time, in which a GPU already works.
        """
        written = self.writing and self.writing[0][0].done()
        if self.unmade and not written:
            self.unmade -= 1
            dtype = getattr(torch, self.plan.spec.dtype)
            return Buffers.like(self.most_rows, self.plan.widths, dtype, self.device)
        future, buffers = self.writing.popleft()
        self.digests |= future.result()
        return buffers

    def write(self, shard: Shard, buffers: Buffers, cols: dict[str, Any]) -> None:
        """Write a shard in a thread; `next_free` hands its buffers out again."""
        args = (self.folder, self.plan, shard, buffers, cols, self.made)
        self.writing.append((self.pool.submit(self.how, *args), buffers))

    def finish(self) -> dict[str, str]:
        """Wait until all is written; file -> sha256."""
        for future, _ in self.writing:
            self.digests |= future.result()
        return self.digests
