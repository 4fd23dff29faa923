"""What stored activations must not be, each fault in a sentence. [torch]

check_fits       the corpus is longer than the model's context, or of another tokenizer
check_finite     NaN, infinity, or more than the stored dtype can hold
check_varies     all rows alike
check_dropped    more rows dropped for their norm than attention sinks are
"""

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.activations.buffers import Buffers, combined
from pipeline.activations.forward import device_of
from pipeline.activations.plan import Plan, Shard
from pipeline.errors import RetraceError
from pipeline.models import hooks
from pipeline.spec.paper import ActivationsSpec
from pipeline.store.shards import Blocks

SURE_ROWS = 10_000  # in a shard of so many rows the share of dropped rows is the corpus's


def check_fits(info: dict[str, Any], blocks: Blocks, path: str) -> None:
    """RetraceError where the corpus is longer than the model's context, or of another tokenizer."""
    if blocks.n_ctx > info["n_ctx"]:
        raise RetraceError(
            f"{path}: blocks of {blocks.n_ctx} tokens, but the model's context is {info['n_ctx']}; "
            f"lower corpus.n_ctx"
        )
    if blocks.bos_id != info["bos_id"]:
        raise RetraceError(f"{path}: was made with another model's tokenizer; run snakemake again")


def check_varies(hook: str, dtype: str, parts: list[dict[str, Any]]) -> None:
    """RetraceError where the rows of a hook are all but equal.

    The bound is one unit in the last place of the stored dtype: no more can be seen behind its
    rounding, and no dictionary can be learned from it.

    Args:
        parts: statistics of shards, see `Sums.statistics`.
    """
    d = len(parts[0]["mean"])
    size = sum(p["rows"] * p["mean_square"] for p in parts) / sum(p["rows"] for p in parts) / d
    if combined(parts)["variance"] <= size * torch.finfo(getattr(torch, dtype)).eps ** 2:
        raise RetraceError(
            f"hook '{hook}': the activations are constant (variance at most {dtype}'s rounding); "
            f"check the model's weights and the text, or store another hook"
        )


def check_finite(hf: nn.Module, plan: Plan, shard: Shard, blocks: Blocks, found: Buffers) -> None:
    """RetraceError naming hook, layer and block of the first value that is not finite."""
    for hook in plan.spec.hooks:
        if math.isfinite(float(found.host.sums[hook].square)):
            continue
        bad = ~torch.isfinite(found.acts(hook)).all(-1)
        row = np.flatnonzero(found.kept(hook))[int(bad.nonzero()[0])]
        block = shard.start + int(row) // plan.per_block
        tokens = torch.from_numpy(blocks.read(block, block + 1)[0].astype(np.int64))
        with torch.inference_mode():
            x = hooks.run_to(hf, tokens.to(device_of(hf)), [hook])[hook]
        where = f"hook '{hook}' (layer {hook.split('.')[1] if '.' in hook else 0}), block {block}"
        if torch.isfinite(x).all():
            raise RetraceError(
                f"{where}: {float(x.abs().max()):.4g} is more than {plan.spec.dtype} can hold "
                f"({torch.finfo(getattr(torch, plan.spec.dtype)).max:.0f}); set activations.dtype "
                f"to bfloat16 or float32, or raise skip_first"
            )
        raise RetraceError(
            f"{where}: the model gives NaN or infinity; check its weights, or set "
            f"activations.model_dtype to float32"
        )


def check_dropped(spec: ActivationsSpec, hook: str, dropped: int, rows: int, most: float) -> None:
    """RetraceError where max_norm_ratio drops more than a share `most` of the rows of a hook."""
    if dropped > most * rows:
        raise RetraceError(
            f"activations.max_norm_ratio: {spec.max_norm_ratio:g} drops {dropped} of {rows} rows "
            f"of hook '{hook}' ({dropped / rows:.1%}), more than attention sinks are; raise it "
            f"(10 leaves ordinary tokens of SmolLM2's stream in), set it to 0, or allow the share "
            f"by activations.max_dropped: {spec.max_dropped:g}"
        )


def check_some_left(plan: Plan, shard: Shard, found: Buffers) -> None:
    """RetraceError where a single shard shows that max_norm_ratio drops more than sinks.

    A small shard may be unlucky, so it fails only where it loses half of its rows. One of at
    least SURE_ROWS may lose at most twice the allowed share.
    """
    rows = plan.rows(shard)
    most = 2 * plan.spec.max_dropped if rows >= SURE_ROWS else 0.5
    for hook in plan.spec.hooks:
        check_dropped(plan.spec, hook, rows - found.rows(hook), rows, min(most, 0.5))
