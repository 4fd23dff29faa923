"""The fast steps of BatchTopK and Matryoshka: SAELens's loss and gradients without dense products.

They differ from TopK's step (sae/steps.py) in three points.

1. BatchTopK (Bussmann et al. 2024, 2412.06410, Sec. 3) keeps the k B largest of all scores of a
   batch of B rows. At inference a threshold takes the place of this choice; each step moves it
   towards the smallest kept score (SAELens, `topk_threshold_lr`).
2. Matryoshka (Bussmann et al. 2025, 2503.17547, Sec. 3.1) adds a squared error for every nested
   width m_1 < ... < m_n: with r_j = a[:m_j] W_dec[:m_j] + b_dec - x the loss is sum_j |r_j|^2 / B.
   A latent between m_(j-1) and m_j takes part in r_j to r_n, so with d_j = 2 r_j / B its pull and
   its decoder's gradient come from D_j = d_j + ... + d_n. Each active latent still takes part in
   one product of each kind.
3. With SAELens's `use_matryoshka_aux_loss` the dead latents between m_(j-1) and m_j mend r_j, where
   else all mend r_n.

A step always keeps k B entries; those that are not above zero get the value zero. So no shape
depends on the batch and nothing waits for a GPU: a step can be captured as a CUDA graph.
"""

import math
from collections.abc import Iterator
from itertools import pairwise, starmap
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from pipeline.sae.sparse import Scratch, Sparse, largest
from pipeline.sae.steps import SAMPLE_ROWS, Gradients, Outcome, auxk, decoder_norm

MARGIN = 1.5  # candidates per kept entry, so that the floor from a sample is seldom too high


def largest_of_all(scores: Float[Tensor, "batch d_sae"], n: int) -> Int64[Tensor, " n"]:
    """Flat indices of the n largest entries, ascending.

    `topk` over all entries of a batch costs more than the encoder's product (measured, 2 cores), so
    a sample of rows sets a floor, and `topk` runs over the entries above it. Their number would
    have to be read from a GPU: there the batch is treated as one long row of `largest`.
    """
    if scores.is_cuda:
        return largest_at_once(scores, n)
    flat = scores.view(-1)
    some = scores[:SAMPLE_ROWS].flatten()
    rank = min(math.ceil(MARGIN * n / len(flat) * len(some)), len(some))
    floor = some.topk(rank, sorted=False).values.min()
    at = (flat >= floor).nonzero()[:, 0]
    if len(at) < n:
        at = torch.arange(len(flat), device=flat.device)
    kept = torch.zeros(len(at), dtype=torch.bool, device=flat.device)
    kept[flat[at].topk(n, sorted=False).indices] = True
    return at[kept]


def largest_at_once(scores: Float[Tensor, "batch d_sae"], n: int) -> Int64[Tensor, " n"]:
    """`largest_of_all`, with the same operations whatever the scores are."""
    return largest(scores.view(1, -1), n)[1][0].sort().values


class Nested(Gradients):
    """Gradients of the sum of squared errors of nested dictionaries.

    Args:
        support: where latents are active; those of a row ascend.
        acts: activations on the support.
        widths: nested widths, rising to d_sae.

    `r` and `mse` are those of the whole dictionary, `nested` holds r of each width, [batch widths
    d_in]; `inner` is the sum of the errors of the narrower ones.
    """

    def __init__(
        self,
        sae: Any,
        support: Sparse,
        acts: Float[Tensor, " n"],
        x: Float[Tensor, "batch d_in"],
        widths: list[int],
    ) -> None:
        W_dec, (batch, d_in), n = sae.W_dec.detach(), x.shape, len(widths)
        self.sae, self.xc = sae, x - sae.b_dec
        # A row's latents ascend, so those between two widths can be treated as a row of their own.
        level = sum((support.latents >= width).long() for width in widths[:-1])
        split = support.on(support.rows * n + level, batch * n)
        decoded, pull = split.decode(acts, W_dec)
        r = decoded.view(batch, n, d_in)
        r[:, 0] -= self.xc
        for j in range(1, n):
            r[:, j] += r[:, j - 1]
        errors = r.pow(2).sum((0, 2)) / batch
        self.r, self.mse, self.inner = r[:, -1], errors[-1], errors[:-1].sum()
        self.nested = r
        d = r * (2 / batch)
        for j in reversed(range(n - 1)):
            d[:, j] += d[:, j + 1]
        of_level = d.view(batch * n, d_in)
        g = pull(of_level, None)
        torch.ops.aten.threshold_backward.grad_input(g, acts, 0, grad_input=g)
        self.W_dec = split.gather(acts, of_level) if sae.W_dec.requires_grad else None
        self.W_enc = support.gather(g, self.xc)
        self.b_enc, self.b_dec = support.total(g), d[:, 0].sum(0)


@torch.no_grad()
def _batch(
    sae: Any,
    x: Tensor,
    dead: Tensor | None,
    scratch: Scratch,
    widths: list[int],
    capacity: int | None,
) -> Outcome:
    """One batch of a dictionary that keeps the k B largest scores of the batch."""
    shape = (len(x), sae.cfg.d_sae)
    rescale = sae.cfg.rescale_acts_by_decoder_norm
    norm = decoder_norm(sae) if rescale else torch.ones_like(sae.b_enc)
    scores = scratch.encode(x - sae.b_dec, sae.W_enc, sae.b_enc, norm)
    at = largest_of_all(scores, int(sae.cfg.k * len(x)))
    kept = scores.view(-1)[at].to(x.dtype).relu()
    rows = torch.div(at, shape[1], rounding_mode="floor")
    support = Sparse(at - rows * shape[1], rows, shape, scratch.half)
    acts = kept / norm[support.latents]
    grads = Nested(sae, support, acts, x, widths)
    loss = grads.mse + grads.inner
    if sae.cfg.aux_loss_coefficient:
        for some, r in mended(grads, dead, widths):
            loss = loss + auxk(grads, scores, norm, some, scratch, capacity, r)
    grads.store()
    move_threshold(sae, kept)
    fired = support.fired(acts)
    return Outcome(loss, grads.mse, support.l0_(acts), fired)


def mended(
    grads: Nested, dead: Bool[Tensor, " d_sae"] | None, widths: list[int]
) -> Iterator[tuple[Bool[Tensor, " d_sae"] | None, Float[Tensor, "batch d_in"]]]:
    """The dead latents, and x_hat - x that they are to mend; level by level where SAELens does."""
    if dead is None or not getattr(grads.sae.cfg, "use_matryoshka_aux_loss", False):
        yield dead, grads.r
        return
    for j, level in enumerate(starmap(slice, pairwise([0, *widths]))):
        some = torch.zeros_like(dead)
        some[level] = dead[level]
        yield some, grads.nested[:, j]


def move_threshold(sae: Any, kept: Tensor) -> None:
    """Move the running mean of the smallest positive score, in float64 as in SAELens.

    It is changed in place, because a CUDA graph keeps its address.
    """
    mean = sae.topk_threshold
    smallest = kept.masked_fill(kept <= 0, torch.inf).min().to(mean.dtype)
    moved = torch.lerp(mean, smallest, sae.cfg.topk_threshold_lr)
    mean.copy_(torch.where(smallest.isfinite(), moved, mean))


def batchtopk(
    sae: Any,
    x: Float[Tensor, "batch d_in"],
    *,
    dead: Bool[Tensor, " d_sae"] | None,
    coefficients: dict[str, Any],
    step: int,
    scratch: Scratch,
    capacity: int | None = None,
) -> Outcome:
    """One batch of a BatchTopKTrainingSAE; arguments as `steps.topk`."""
    return _batch(sae, x, dead, scratch, [sae.cfg.d_sae], capacity)


def matryoshka(
    sae: Any,
    x: Float[Tensor, "batch d_in"],
    *,
    dead: Bool[Tensor, " d_sae"] | None,
    coefficients: dict[str, Any],
    step: int,
    scratch: Scratch,
    capacity: int | None = None,
) -> Outcome:
    """One batch of a MatryoshkaBatchTopKTrainingSAE; arguments as `steps.topk`."""
    return _batch(sae, x, dead, scratch, sae.cfg.matryoshka_widths, capacity)


STATIC = {batchtopk, matryoshka}
FAST = {"batchtopk": batchtopk, "matryoshka_batchtopk": matryoshka}
