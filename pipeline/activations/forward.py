"""The forward passes: tokens -> the rows of each shard, in buffers. [torch]

1. Blocks run in batches through the Hugging Face module with plain forward hooks; the pass stops
   behind the last hook.
2. The first positions of a block are dropped (attention sinks), and rows whose norm is above
   `max_norm_ratio` times the median of the first batch (massive activations, Sun et al. 2024).
3. The rest is rounded to the stored dtype and summed up.

On a GPU, the next shard is launched before the previous one is handed on.
"""

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from pipeline.activations.buffers import Buffers
from pipeline.activations.plan import Plan, Shard
from pipeline.models import hooks
from pipeline.store.shards import Blocks

AHEAD = {"cuda": 1}  # shards launched beyond the one that is handed on, per type of device
OnBatch = Callable[[int], None]  # called after each batch with the number of the next block


def ignore(next_block: int) -> None:
    """An OnBatch that shows no progress."""


def widths(hf: nn.Module, names: list[str], n_ctx: int) -> dict[str, int]:
    """Hook -> length of a row, from a short forward pass.

    Args:
        n_ctx: tokens of a block, so many as a row of attention scores has keys.
    """
    n = n_ctx if any(map(hooks.is_by_key, names)) else 2
    acts = hooks.run_to(hf, torch.zeros(1, n, dtype=torch.long, device=device_of(hf)), names)
    return {name: acts[name].shape[-1] for name in names}


def device_of(hf: nn.Module) -> torch.device:
    """Where the model's first weights lie."""
    return next(hf.parameters()).device


def bounds(hf: nn.Module, planned: Plan, blocks: Blocks) -> dict[str, float]:
    """Hook -> max_norm_ratio times the median norm of its rows in the first batch; {} if 0."""
    spec = planned.spec
    if not spec.max_norm_ratio:
        return {}
    start, stop = next(planned.batches(planned.shards[0]))
    tokens = torch.from_numpy(blocks.read(start, stop)[0].astype(np.int64)).to(device_of(hf))
    acts = hooks.run_to(hf, tokens, spec.hooks)
    norms = {h: acts[h][:, spec.skip_first :].float().norm(dim=-1).flatten() for h in spec.hooks}
    return {h: spec.max_norm_ratio * float(n.cpu().median()) for h, n in norms.items()}


@torch.inference_mode()
def compute(
    hf: nn.Module,
    plan: Plan,
    shard: Shard,
    blocks: Blocks,
    into: Buffers,
    on_batch: OnBatch = ignore,
) -> None:
    """Fill the buffers with a shard's rows and sum them up, without waiting for a GPU."""
    spec, device = plan.spec, device_of(hf)
    ids = torch.from_numpy(blocks.read(shard.start, shard.stop)[0])
    if device.type == "cuda":
        ids = ids.pin_memory()  # copies from other memory wait until the GPU is idle
    ids, rows = ids.to(device, non_blocking=True).long(), into.begin(plan.rows(shard))
    for start, stop in plan.batches(shard):
        first, last = start - shard.start, stop - shard.start
        acts = hooks.run_to(hf, ids[first:last], spec.hooks)
        at = slice(first * plan.per_block, last * plan.per_block)
        for hook in spec.hooks:
            x, keep = acts[hook][:, spec.skip_first :], None
            if hook in plan.bounds:
                norm = x.float().norm(dim=-1)
                # rows that are not finite stay, so that checks.py finds them
                keep = (norm <= plan.bounds[hook]) | ~norm.isfinite()
            rows.add(hook, at, x, keep)
        on_batch(stop)
    into.fetch()


def computed(
    hf: nn.Module,
    plan: Plan,
    shards: list[Shard],
    blocks: Blocks,
    next_free: Callable[[], Buffers],
    on_batch: OnBatch,
) -> Iterator[tuple[Shard, Buffers]]:
    """Each shard with its rows, in order.

    Args:
        next_free: returns buffers that nobody uses; it may wait for them.
    """
    ahead = AHEAD.get(device_of(hf).type, 0)
    launched: deque[tuple[Shard, Buffers]] = deque()
    for shard in [*shards, *[None] * ahead]:
        if shard is not None:
            buffers = next_free()
            compute(hf, plan, shard, blocks, buffers, on_batch)
            launched.append((shard, buffers))
        if launched and (shard is None or len(launched) > ahead):
            done, buffers = launched.popleft()
            buffers.wait()
            yield done, buffers
