"""The fast steps of BatchTopK and Matryoshka: SAELens's loss and gradients without dense products.

What sae_steps.py says of TopK holds, with two changes.

1. BatchTopK (Bussmann et al. 2024, 2412.06410, Sec. 3) keeps the k B largest of all scores of a
   batch of B rows. The running threshold that takes their place at inference moves towards the
   smallest kept score (SAELens, `topk_threshold_lr`).
2. Matryoshka (Bussmann et al. 2025, 2503.17547, Sec. 3.1) adds a squared error for every nested
   width m_1 < ... < m_n: with r_j = a[:m_j] W_dec[:m_j] + b_dec - x the loss is sum_j |r_j|^2 / B.
   A latent between m_(j-1) and m_j takes part in r_j to r_n, so with d_j = 2 r_j / B its pull and
   its decoder's gradient come from D_j = d_j + ... + d_n. Each active latent is still touched once.
"""

import math
from typing import Any

import torch
from torch import Tensor

from pipeline.sae_sparse import Scratch, Sparse
from pipeline.sae_steps import SAMPLE_ROWS, Gradients, Outcome, auxk

MARGIN = 1.5  # of the candidates over the n largest, so that a sample seldom asks for too few


def largest_of_all(scores: Tensor, n: int) -> Tensor:
    """Flat indices of the n largest entries, ascending: int64 [n].

    `topk` over all entries of a batch costs more than the encoder's product (measured, 2 cores), so
    a sample of rows sets a floor, and `topk` runs over what is above it.
    """
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


class Nested(Gradients):
    """Gradients of the sum of squared errors of nested dictionaries.

    Args:
        support: where latents are active.
        acts: values on the support.
        x: [batch d_in].
        widths: nested widths, rising to d_sae.

    `r` and `mse` are those of the whole dictionary; `inner` is the sum of the others' errors.
    """

    def __init__(self, sae: Any, support: Sparse, acts: Tensor, x: Tensor, widths: list[int]):
        W_dec = sae.W_dec.detach()
        self.sae, self.xc = sae, x - sae.b_dec
        parts, residuals, r = [], [], -self.xc
        for low, high in zip([0, *widths], widths, strict=False):
            at = ((support.latents >= low) & (support.latents < high)).nonzero()[:, 0]
            shape = (len(x), high - low)
            part = Sparse(support.latents[at] - low, support.rows[at], shape, support.half)
            decoded, pull = part.decode(acts[at], W_dec[low:high])
            r = r + decoded
            residuals.append(r)
            parts.append((at, part, pull))
        errors = [e.pow(2).sum() / len(x) for e in residuals]
        self.r, self.mse, self.inner = r, errors[-1], sum(errors[:-1])
        g, d, rows = torch.empty_like(acts), torch.zeros_like(x), []
        for (at, part, pull), e in zip(reversed(parts), reversed(residuals), strict=True):
            d = d + e * (2 / len(x))
            g[at] = pull(d, None)
            if sae.W_dec.requires_grad:
                rows.append(part.gather(acts[at], d))
        g *= acts > 0
        self.W_dec = torch.cat(rows[::-1]) if rows else None
        self.W_enc = support.gather(g, self.xc)
        self.b_enc, self.b_dec = support.total(g), d.sum(0)


@torch.no_grad()
def _batch(
    sae: Any, x: Tensor, dead: Tensor | None, scratch: Scratch, widths: list[int]
) -> Outcome:
    """One batch of a dictionary whose active latents are the k B largest of all."""
    shape = (len(x), sae.cfg.d_sae)
    rescale = sae.cfg.rescale_acts_by_decoder_norm
    norm = sae.W_dec.norm(dim=1) if rescale else torch.ones_like(sae.b_enc)
    scores = scratch.encode(x - sae.b_dec, sae.W_enc, sae.b_enc, norm)
    at = largest_of_all(scores, int(sae.cfg.k * len(x)))
    kept = scores.view(-1)[at].to(x.dtype).relu()
    rows = torch.div(at, shape[1], rounding_mode="floor")
    support = Sparse(at - rows * shape[1], rows, shape, scratch.half)
    acts = kept / norm[support.latents]
    grads = Nested(sae, support, acts, x, widths)
    loss = grads.mse + grads.inner
    if sae.cfg.aux_loss_coefficient:
        loss = loss + auxk(grads, scores, norm, dead)
    grads.store()
    _move_threshold(sae, kept)
    fired = support.fired(acts)
    return Outcome(loss, grads.mse, support.l0_(acts), fired)


def _move_threshold(sae: Any, kept: Tensor) -> None:
    """The running mean of the smallest positive score, in float64 as SAELens keeps it."""
    smallest = torch.where(kept > 0, kept, torch.inf).min().to(sae.topk_threshold.dtype)
    moved = torch.lerp(sae.topk_threshold, smallest, sae.cfg.topk_threshold_lr)
    sae.topk_threshold = torch.where(smallest.isfinite(), moved, sae.topk_threshold)


def batchtopk(
    sae: Any, x: Tensor, *, dead: Tensor | None, coefficients: dict, step: int, scratch: Scratch
) -> Outcome:
    """One batch of a BatchTopKTrainingSAE; arguments as `sae_steps.reference`."""
    return _batch(sae, x, dead, scratch, [sae.cfg.d_sae])


def matryoshka(
    sae: Any, x: Tensor, *, dead: Tensor | None, coefficients: dict, step: int, scratch: Scratch
) -> Outcome:
    """One batch of a MatryoshkaBatchTopKTrainingSAE; arguments as `sae_steps.reference`."""
    return _batch(sae, x, dead, scratch, sae.cfg.matryoshka_widths)


FAST = {"batchtopk": batchtopk, "matryoshka_batchtopk": matryoshka}
