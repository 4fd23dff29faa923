"""An attention-only model run with its patterns in hand: losses, and ablations. [torch]

1. `forward` runs a native model layer by layer; it returns the attention patterns, takes given ones
   in their place, and leaves heads out. A test holds its logits equal to the model's own.
2. `ablated` is the loss without a head: fully, or with all patterns as they were before, so that
   only what the head writes is lost and not what it does for later heads' attention (Olsson et al.
   2022, "Per-token losses, attention head ablations").
"""

from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BATCH_SCORES = 1 << 26  # attention scores of a layer at a time
Head = tuple[int, int]  # layer, head


def forward(
    model: Any, tokens: Tensor, without: Collection[Head] = (), patterns: list[Tensor] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Logits [batch pos d_vocab], and of every layer the patterns [batch n_heads pos pos].

    Args:
        model: a pipeline.models.native model without MLPs.
        tokens: [batch pos].
        without: heads whose result is replaced by zero.
        patterns: attention to use in place of the model's own.
    """
    body, used = model.model, []
    x = body.tok_embed(tokens)
    if hasattr(body, "pos"):
        x = x + body.pos.weight[: tokens.shape[-1]]
    for i, layer in enumerate(body.layers):
        attn, read = layer.attn, layer.ln1(x)
        used.append(attn.pattern(read) if patterns is None else patterns[i])
        z = used[-1] @ attn.heads(attn.v(read))
        for _, head in (h for h in without if h[0] == i):
            z[:, head] = 0
        x = x + attn.o(z.transpose(-2, -3).flatten(-2))
    return body.head(body.ln_out(x)), used


def common(tokens: Tensor) -> Tensor:
    """The tokens of a text but for a tenth each of the most and the least common, ascending."""
    ids, counts = tokens.unique(return_counts=True)
    order, cut = counts.argsort(stable=True), len(ids) // 10
    return ids[order[cut : len(ids) - cut]].sort().values


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every target, nats, [batch pos]."""
    return F.cross_entropy(logits.mT, targets, reduction="none")


def pieces(model: Any, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of the tensors in batches that fit into memory."""
    per = model.config.n_heads * tensors[0].shape[-1] ** 2
    return zip(*(t.split(max(1, BATCH_SCORES // per)) for t in tensors), strict=True)


def ablated(
    model: Any, tokens: Tensor, targets: Tensor, groups: dict[str, Collection[Head]], keep: bool
) -> dict[str, Tensor]:
    """Losses [batch pos] of the model without each group of heads (name -> those left out
    together); with `keep` all patterns stay as they are with all heads."""
    out: dict[str, list[Tensor]] = {name: [] for name in groups}
    for x, y in pieces(model, tokens, targets):
        patterns = forward(model, x)[1] if keep else None
        for name, heads in groups.items():
            out[name].append(token_losses(forward(model, x, heads, patterns)[0], y))
    return {name: torch.cat(parts) for name, parts in out.items()}
