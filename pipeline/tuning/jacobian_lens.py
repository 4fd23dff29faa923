"""Fit a Jacobian lens: what a layer's stream makes the model say, now or later. [torch]

Gurnee et al. (2026, 2607.15495), Methods and pseudocode, with the positions of the released code
(jlens/fitting.py): V is all positions of a prompt from `skip_first` on, but the last. For the
stream x_l after l blocks and x_n, which the final norm N reads,

    J_l   = mean over prompts and over t in V of the sum over t' in V of dx_n[t'] / dx_l[t]
    lens  = softmax(W_U N(J_l x_l))

1. A prompt is read once as many times over as rows of J are computed at once. Row i comes of the
   cotangent e_i at all of V; as later positions cannot change earlier ones, the gradient at t is
   the sum over t' >= t. One backward pass gives so many rows of all layers.
2. With the cotangent at one position alone, and the gradient read there, t' = t is all that counts
   (the paper's self-only variant). What lies before that position does not depend on it, so its
   keys and values are kept, and a pass is of one token (`alone`). By `of_prompt`, which a model
   without a plain cache of them takes, a position costs as much as a whole prompt before.
3. Gradients are the model's own, exact, and averaged in float32. J = I is the logit lens.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from pipeline.errors import RetraceError
from pipeline.job import cli
from pipeline.models import hooks, lens, places
from pipeline.spec.base import Section

PASS_TOKENS = 1 << 13  # tokens of a forward pass, about, whose graph is kept
Maps = dict[int, Tensor]  # layer -> J [d_model d_model]


class JacobianLensSpec(Section):
    """Of which prompts a lens is the mean; the defaults are the paper's and its code's."""

    n_prompts: int = Field(default=1000, ge=1, description="training blocks, the first ones")
    n_tokens: int = Field(default=128, ge=2, description="of a prompt, at most")
    skip_first: int = Field(default=16, ge=0, description="positions left out: attention sinks")
    n_alone: int = Field(
        default=0, ge=0, description="positions a prompt whose own later effect alone counts; 0: "
        "all positions, and their effect on all later ones",
    )  # fmt: skip


def groups(n: int, how: JacobianLensSpec) -> Bool[Tensor, "groups pos"]:
    """Positions whose cotangents are set at once: all that count, or each of some alone.

    Raises:
        RetraceError: a prompt of n tokens has no position that counts.
    """
    counted = torch.arange(how.skip_first, n - 1)
    if not len(counted):
        raise RetraceError(
            f"a prompt of {n} tokens has no position behind skip_first {how.skip_first} but its "
            f"last; lower skip_first, or give blocks of more than {how.skip_first + 1} tokens"
        )
    if not how.n_alone:
        return F.one_hot(counted, n).sum(0, keepdim=True).bool()
    even = torch.linspace(0, len(counted) - 1, min(how.n_alone, len(counted)))
    return F.one_hot(counted[even.round().long()], n).bool()


def traced(
    hf: nn.Module, tokens: Int[Tensor, "batch pos"], layers: list[int], **given: Any
) -> tuple[list[Tensor], Tensor]:
    """x_l of each layer and x_n, [batch pos d_model], with the graph between them."""
    names = [f"blocks.{layer}.hook_resid_pre" for layer in layers]
    end = f"blocks.{lens.n_layers(hf) - 1}.hook_resid_post"
    root = names[layers.index(min(layers))]
    with torch.enable_grad(), hooks.edited(hf, root, lambda x: x.detach().requires_grad_()):
        seen = hooks.run_to(hf, tokens, [*names, end], **given)
    return [seen[name] for name in names], seen[end]


def of_prompt(
    hf: nn.Module, tokens: Int[Tensor, " pos"], layers: list[int], at: Bool[Tensor, "groups pos"]
) -> Float[Tensor, "layers d_model d_model"]:
    """J of one prompt: the mean over the positions of `at`, by batched vector-Jacobian products.

    Args:
        at: of each group, where the cotangent is set and the gradient is read.
    """
    d, n_positions = hf.config.hidden_size, at.sum()
    rows = torch.cartesian_prod(torch.arange(len(at)), torch.arange(d)).to(tokens.device)
    at_once = min(max(PASS_TOKENS // len(tokens), 1), len(rows))
    x, end = traced(hf, tokens.expand(at_once, -1), layers)
    out = torch.zeros(len(layers), d, d, device=tokens.device)
    passes = rows.split(at_once)
    for number, some in enumerate(passes):
        (group, row), n = some.T, len(some)
        where = at.to(tokens.device)[group, :, None]
        cotangent = torch.zeros_like(end)
        cotangent[:n] = where * F.one_hot(row, d)[:, None]
        grads = torch.autograd.grad(end, x, cotangent, retain_graph=number + 1 < len(passes))
        for J, grad in zip(out, grads, strict=True):
            found = places.full(grad[:n]).to(J.device).float() * where
            J.index_add_(0, row, found.sum(1) / n_positions)
    return out


def alone(
    hf: nn.Module, tokens: Int[Tensor, " pos"], layers: list[int], at: Bool[Tensor, "groups pos"]
) -> Float[Tensor, "layers d_model d_model"]:
    """`of_prompt` of groups of one position each, from the keys and values of those before it."""
    d, places_ = hf.config.hidden_size, at.nonzero()[:, 1].tolist()
    kept, first, out = DynamicCache(config=hf.config), 0, 0.0
    for t in places_:
        if t > first:
            with torch.no_grad():
                hf.base_model(input_ids=tokens[None, first:t], past_key_values=kept, use_cache=True)
            first = t
        before = copy.deepcopy(kept)
        if t:
            before.batch_repeat_interleave(d)
        one = tokens[t].expand(d, 1)
        x, end = traced(hf, one, layers, past_key_values=before, use_cache=True)
        cotangent = torch.eye(d, device=end.device, dtype=end.dtype)[:, None]
        grads = torch.autograd.grad(end, x, cotangent)
        out = out + torch.stack([places.full(g)[:, 0].to(tokens.device).float() for g in grads])
    return out / len(places_)


def has_cache(hf: nn.Module) -> bool:
    """Whether the model keeps keys and values of earlier tokens in transformers' plain cache."""
    if not isinstance(hf, PreTrainedModel):  # one of ours
        return False
    kept = DynamicCache(config=hf.config)
    token = torch.zeros(1, 1, dtype=torch.long, device=next(hf.parameters()).device)
    try:
        with torch.no_grad():
            hf.base_model(input_ids=token, past_key_values=kept, use_cache=True)
    except (TypeError, ValueError, AttributeError):
        return False
    return kept.get_seq_length() == 1 and not any(kept.is_sliding)


def fit(
    name: str, hf: nn.Module, blocks: Int[Tensor, "blocks pos"], layers: list[int],
    how: JacobianLensSpec, counts: Iterable[int] = (),
) -> dict[int, Maps]:  # fmt: skip
    """Number of prompts -> J of each layer: of all n_prompts, and of the first so many.

    Args:
        name: the model's, for error messages.
        blocks: prompts, read from their first token on.
        counts: smaller numbers of prompts whose means are wanted too.

    Raises:
        RetraceError: too few or too short prompts, or gradients that are not finite.
    """
    if len(blocks) < how.n_prompts:
        raise RetraceError(
            f"Jacobian lens of {name}: {len(blocks)} training blocks for {how.n_prompts} prompts; "
            f"lower n_prompts, or raise corpus.n_tokens"
        )
    prompts = blocks[: how.n_prompts, : how.n_tokens]
    at, total, out = groups(prompts.shape[1], how), torch.zeros(()), {}
    of = alone if how.n_alone and has_cache(hf) else of_prompt
    progress = cli.Progress(f"Jacobian lens of {name}", how.n_prompts, "prompts")
    for done, tokens in enumerate(prompts, 1):
        total = total.to(tokens.device) + of(hf, tokens, layers, at)
        if done in {*counts, how.n_prompts}:
            out[done] = dict(zip(layers, total / done, strict=True))
        progress.at(done)
    if not total.isfinite().all():
        raise RetraceError(
            f"Jacobian lens of {name}: not finite after {how.n_prompts} prompts; load the model "
            f"in float32"
        )
    return out


def jacobian_lens(hf: nn.Module, maps: Maps) -> lens.Lens:
    """W_U N(J_l x) of a layer l."""
    return lambda layer, x: lens.unembed(hf, F.linear(x, maps[layer]))
