"""Which blocks of the corpus go into which shard: a function of spec, model and corpus alone.

    corpus   block 0 | block 1 | … | block n          blocks of n_ctx tokens, of one split each
    shard    blocks start to stop of one split        at most spec.shard_rows rows of each hook
    batch    at most spec.batch_size blocks           one forward pass; never crosses a shard

A shard can so be made on its own, to the same bits. [torch]
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.errors import RetraceError
from pipeline.spec.paper import ActivationsSpec
from pipeline.store import tables
from pipeline.store.shards import Blocks

BUFFER_BYTES = 512 << 20  # of one shard of every hook; about four times that is held at once


class Shard(NamedTuple):
    """Blocks start to stop of one split; number counts from 0 over both splits."""

    number: int
    split: str
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """What goes where.

    Attributes:
        n_ctx: tokens of a block.
        widths: hook -> d, the length of a row.
        bounds: hook -> the largest norm that is stored; empty if all are.
    """

    spec: ActivationsSpec
    n_ctx: int
    widths: dict[str, int]
    shards: list[Shard]
    bounds: dict[str, float] = field(default_factory=dict)

    @property
    def per_block(self) -> int:
        """Rows of a block."""
        return self.n_ctx - self.spec.skip_first

    def rows(self, shard: Shard) -> int:
        """Rows of a shard, before any is dropped for its norm."""
        return (shard.stop - shard.start) * self.per_block

    def batches(self, shard: Shard) -> Iterator[tuple[int, int]]:
        """First block and last block + 1 of each batch of a shard."""
        for start in range(shard.start, shard.stop, self.spec.batch_size):
            yield start, min(start + self.spec.batch_size, shard.stop)


def row_bytes(spec: ActivationsSpec, widths: dict[str, int]) -> int:
    """Bytes of one row, summed over all hooks."""
    return sum(widths.values()) * tables.NUMPY[spec.dtype]().itemsize


def plan(spec: ActivationsSpec, blocks: Blocks, widths: dict[str, int]) -> Plan:
    """Shards of at most spec.shard_rows rows, fewer where many hooks would need much memory.

    Args:
        widths: hook -> d, the length of a row.

    Raises:
        RetraceError: skip_first leaves nothing of a block.
    """
    per_block = blocks.n_ctx - spec.skip_first
    if per_block < 1:
        raise RetraceError(
            f"activations.skip_first: {spec.skip_first} leaves nothing of blocks of {blocks.n_ctx} "
            f"tokens; lower it"
        )
    most = BUFFER_BYTES // row_bytes(spec, widths)
    size = max(1, min(spec.shard_rows, most) // per_block)
    if size > spec.batch_size:
        size -= size % spec.batch_size  # whole batches
    shards: list[Shard] = []
    for split in ("train", "eval"):
        first, last = blocks.range(split)
        for start in range(first, last, size):
            shards.append(Shard(len(shards), split, start, min(start + size, last)))
    return Plan(spec, blocks.n_ctx, widths, shards)
