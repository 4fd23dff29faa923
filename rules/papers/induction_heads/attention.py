"""An attention-only model run with its patterns in hand: scores of heads, and ablations. [torch]

1. `forward` runs a native model layer by layer; it returns the attention patterns, takes given ones
   in their place, and leaves heads out. A test holds its logits equal to the model's own.
2. `prefix_matching` and `previous_token` score patterns (Olsson et al. 2022, Model Analysis, "Head
   activation evaluators").
3. `ablated` is the loss without a head: fully, or with all patterns as they were before, so that
   only what the head writes is lost and not what it does for later heads' attention ("Per-token
   losses, attention head ablations").
"""

from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BATCH_SCORES = 1 << 26  # attention scores of a layer at a time
OFFSETS = tuple(range(-3, 4))  # places after the earlier occurrence; 1 is prefix matching
LAGS = tuple(range(9))  # places before the present token; 1 is previous-token attention
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


def repeated(n: int, pool: Tensor, length: int, times: int, bos: int, seed: int = 0) -> Tensor:
    """BOS and a random segment several times over, [n, 1 + times * length].

    The tokens of a segment are distinct, so that a token has one place to match a repeat.

    Args:
        pool: the tokens that they are drawn from, [tokens].
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(len(pool), generator=generator)[:length] for _ in range(n)]
    body = pool[torch.stack(drawn)].repeat(1, times)
    return torch.cat([torch.full((n, 1), bos), body], 1)


def common(tokens: Tensor) -> Tensor:
    """The tokens of a text but for a tenth each of the most and the least common, ascending."""
    ids, counts = tokens.unique(return_counts=True)
    order, cut = counts.argsort(stable=True), len(ids) // 10
    return ids[order[cut : len(ids) - cut]].sort().values


def prefix_matching(pattern: Tensor, length: int, times: int, offset: int = 1) -> Tensor:
    """Attention to the tokens that followed the present one in earlier repeats, [n_heads].

    Summed over the earlier repeats, averaged over the tokens of all repeats but the first and over
    sequences of `repeated`; 1 for a perfect induction head.

    Args:
        pattern: [batch n_heads query key].
        offset: places after the earlier occurrence; neither BOS nor the future counts.
    """
    found = []
    for query in range(1 + length, 1 + times * length):
        keys = [k + offset for k in range(query - length, 0, -length)]
        keys = [k for k in keys if 1 <= k <= query]
        found.append(pattern[..., query, keys].sum(-1))
    return torch.stack(found).mean(0).mean(0)


def by_place(pattern: Tensor, length: int, times: int) -> list[dict[str, list[float]]]:
    """What each head of a layer looks at, where it is not the token of an induction head.

    Returns:
        a dict a head: by_offset [OFFSETS], `prefix_matching` at each offset; by_lag [LAGS], mean
        attention to the token so many places back, of tokens that have one; to_bos, mean attention
        to BOS of the tokens further on.
    """
    offsets = torch.stack([prefix_matching(pattern, length, times, k) for k in OFFSETS], 1)
    body = pattern[..., 1:, 1:]  # without BOS, which is a place of rest and no lag
    lags = torch.stack([previous_token(body, k) for k in LAGS], 1)
    bos = pattern[..., 1:, 0].mean((0, 2))
    names = ("by_offset", "by_lag", "to_bos")
    columns = zip(offsets.tolist(), lags.tolist(), bos.tolist(), strict=True)
    return [dict(zip(names, values, strict=True)) for values in columns]


def previous_token(pattern: Tensor, lag: int = 1) -> Tensor:
    """Mean attention of a token to the one `lag` before, [n_heads]; [batch n_heads pos pos]."""
    return pattern.diagonal(-lag, -2, -1).mean(-1).mean(0)


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
    """Losses [batch pos] of the model without each group of heads.

    Args:
        groups: name -> the heads left out together.
        keep: whether all patterns stay as they are with all heads.
    """
    out: dict[str, list[Tensor]] = {name: [] for name in groups}
    for x, y in pieces(model, tokens, targets):
        patterns = forward(model, x)[1] if keep else None
        for name, heads in groups.items():
            out[name].append(token_losses(forward(model, x, heads, patterns)[0], y))
    return {name: torch.cat(parts) for name, parts in out.items()}
