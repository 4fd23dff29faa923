"""Loss and gradients of one batch, written so that a CUDA graph can hold them.

The numbers are SAELens's `training_forward_pass` and autograd (the tests hold them against it);
nothing here waits for the device, has a shape that depends on data, or takes a number from the
host's memory, as `torch.where` does with one. A step has the signature of
pipeline/sae/steps.py, but for `dead`, which is None where no latent is dead, and the coefficients,
which are tensors. With B rows x, x_c = x - b_dec and p = x_c W_enc + b_enc:

batchtopk       Keeps the k B largest of relu(p n) over the batch, n the norms of W_dec's rows
                (Bussmann et al. 2024). SAELens keeps p n and decodes with W_dec / n, which is p
                decoded with W_dec; n takes part in the choice alone.
matryoshka      The same latents; latents 1 … w reconstruct for every width w of a list, and the
                squared errors are summed (Bussmann et al. 2025). With r_w = x_hat_w - x, the pull
                on a latent is the sum of 2 r_w / B over the widths that contain it. Batchtopk is
                the case of one width.
standard        relu(p), and an L1 penalty l1 a n (Bricken et al. 2023).
jumprelu        p where p > theta, and a penalty on L0; theta learns by the rectangle kernel
                (Rajamanoharan et al. 2024).
matching_pursuit  Takes the latent with the largest product with the residual, subtracts it, k times
                over; encoder and decoder are one (Costa et al. 2025).
"""

from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.job.source import import_file
from pipeline.sae.sparse import Dense, Scratch, Sparse, largest
from pipeline.sae.steps import Gradients, Outcome


@torch.no_grad()
def batchtopk(
    sae: Any, x: Tensor, *, dead: Tensor | None, coefficients: dict, step: int, scratch: Scratch,
    capacity: int | None = None,
) -> Outcome:  # fmt: skip
    """One batch of a BatchTopKTrainingSAE or a MatryoshkaBatchTopKTrainingSAE.

    Args:
        capacity: the most latents that may be dead; default: all of them.
    """
    xc, norm = x - sae.b_dec, sae.W_dec.norm(dim=1)
    pre = torch.addmm(sae.b_enc, xc, sae.W_enc)
    scores = pre * norm
    kept = _batch_largest(sae, scores)
    acts = pre * kept
    widths = getattr(sae.cfg, "matryoshka_widths", [sae.cfg.d_sae])
    levels = [slice(a, b) for a, b in pairwise([0, *widths])]
    residuals = _nested(sae.W_dec, acts, xc, levels)
    total = sum(r.pow(2).sum() for r in residuals) / len(x)
    pulls = _pulls(residuals, len(x))
    g, W_dec = torch.empty_like(pre), torch.empty_like(sae.W_dec)
    for level, pull in zip(levels, pulls, strict=True):
        torch.mm(pull, sae.W_dec[level].T, out=g[:, level])
        torch.mm(acts[:, level].T, pull, out=W_dec[level])
    g *= kept
    loss = total
    if dead is not None:
        parts = [(slice(0, sae.cfg.d_sae), residuals[-1])]  # all latents, the whole residual
        if getattr(sae.cfg, "use_matryoshka_aux_loss", False):
            parts = list(zip(levels, residuals, strict=True))
        for level, r in parts:
            loss = loss + _auxk(sae, pre, scores, r, dead, level, g, W_dec, capacity)
    _store(sae, xc, g, W_dec, pulls[0])
    mse = residuals[-1].pow(2).sum() / len(x)
    return Outcome(loss, mse, kept.sum() / len(x), kept.any(0))


def _batch_largest(sae: Any, scores: Tensor) -> Tensor:
    """The k B largest entries above zero: bool [batch d_sae]. Moves SAELens's running threshold."""
    best = largest(scores.view(1, -1), int(sae.cfg.k * len(scores)))[0]
    least = best.min().clamp(min=0)
    # strictly above zero, and not below the smallest of the best
    kept = (scores >= least) & (scores > 0)
    lowest = best.masked_fill(best <= 0, torch.inf).min().double()
    rate = sae.cfg.topk_threshold_lr
    moved = (1 - rate) * sae.topk_threshold + rate * lowest
    sae.topk_threshold.copy_(torch.where(lowest.isinf(), sae.topk_threshold, moved))
    return kept


def _nested(W_dec: Tensor, acts: Tensor, xc: Tensor, levels: list[slice]) -> list[Tensor]:
    """x_hat_w - x of every width: [batch d_in] each."""
    out, r = [], -xc
    for level in levels:
        r = torch.addmm(r, acts[:, level], W_dec[level])
        out.append(r)
    return out


def _pulls(residuals: list[Tensor], batch: int) -> list[Tensor]:
    """Of each level, the gradient of all losses in what its latents add: [batch d_in] each."""
    out, pull = [], torch.zeros_like(residuals[0])
    for r in reversed(residuals):
        pull = pull + r * (2 / batch)
        out.append(pull)
    return out[::-1]


def _auxk(
    sae: Any, pre: Tensor, scores: Tensor, r: Tensor, dead: Tensor, level: slice, g: Tensor,
    W_dec: Tensor, capacity: int | None,
) -> Tensor:  # fmt: skip
    """AuxK's loss of one level (pipeline/sae/steps.py, 5); its gradients are added to g and W_dec.

    The products run over `capacity` latents, the dead ones among them, so that a step costs what
    its dead latents do and no shape depends on how many they are.

    Args:
        pre, scores, g: [batch d_sae].
        r: [batch d_in], x_hat - x of this level.
        dead: bool [d_sae].
        W_dec: [d_sae d_in], a gradient.
    """
    k_aux, dead = r.shape[1] // 2, dead[level]
    at = (~dead).byte().sort(stable=True).indices[: min(capacity or len(dead), len(dead))]
    on = dead[at]  # the others only fill the capacity, with a value of zero
    share = (dead.sum() / k_aux).clamp(max=1.0)  # none dead in a level: no loss
    at = at + level.start
    acts, kept = pre[:, at], on.to(pre.dtype)
    if len(at) > k_aux:
        among = scores[:, at].masked_fill(~on, -torch.inf)
        kept = torch.zeros_like(acts).scatter_(1, largest(among, k_aux)[1], 1.0) * kept
    acts = acts * kept
    weights = sae.W_dec[at]
    coefficient = sae.cfg.aux_loss_coefficient * share / len(pre)
    error = torch.addmm(r, acts, weights)
    d = error * (2 * coefficient)
    W_dec.index_add_(0, at, acts.T @ d)
    g.index_add_(1, at, (d @ weights.T) * kept)
    return error.pow(2).sum() * coefficient


def _store(sae: Any, xc: Tensor, g: Tensor, W_dec: Tensor, d: Tensor) -> None:
    """Set `.grad` of W_enc, b_enc, W_dec and b_dec.

    Args:
        g: [batch d_sae], gradient in the pre-activations.
        d: [batch d_in], gradient in the reconstruction, of all losses that b_dec takes part in.
    """
    sae.b_enc.grad = g.sum(0)
    sae.W_enc.grad = xc.T @ g
    sae.W_dec.grad = W_dec
    sae.b_dec.grad = d.sum(0) - sae.W_enc @ sae.b_enc.grad


@torch.no_grad()
def standard(
    sae: Any, x: Tensor, *, dead: Tensor | None, coefficients: dict, step: int, scratch: Scratch
) -> Outcome:
    """One batch of a StandardTrainingSAE (pipeline/sae/steps.py, 6), always dense."""
    norm, l1 = sae.W_dec.norm(dim=1), coefficients["l1"] / len(x)
    acts = torch.addmm(sae.b_enc, x - sae.b_dec, sae.W_enc).relu()
    grads = Gradients(sae, Dense(scratch), acts, x, offset=norm * l1)
    sums = acts.sum(0)
    grads.W_dec.addcmul_(sae.W_dec, (sums * l1 / norm)[:, None])
    grads.store()
    on = acts > 0
    loss = grads.mse + (sums * norm).sum() * l1
    return Outcome(loss, grads.mse, on.sum() / len(x), on.any(0))


@torch.no_grad()
def jumprelu(
    sae: Any, x: Tensor, *, dead: Tensor | None, coefficients: dict, step: int, scratch: Scratch
) -> Outcome:
    """One batch of a JumpReLUTrainingSAE with the penalty `step`; p's own gradient is the gate's.

    d loss / d theta = -(theta g / w + l0 / (w B)) summed over the rows with |p - theta| < w / 2,
    g the gradient in the activations and w the bandwidth.
    """
    sae.threshold.clamp_(min=0)
    l0, width, xc = coefficients["l0"] / len(x), sae.bandwidth, x - sae.b_dec
    pre = torch.addmm(sae.b_enc, xc, sae.W_enc)
    on = pre > sae.threshold
    acts = pre * on
    r = torch.addmm(-xc, acts, sae.W_dec)
    d = r * (2 / len(x))
    g = d @ sae.W_dec.T
    beside = (pre - sae.threshold).abs_() < width / 2
    pull = (g * beside).sum(0)
    sae.threshold.grad = -(sae.threshold * pull + l0 * beside.sum(0)) / width
    _store(sae, xc, g * on, acts.T @ d, d)
    mse = r.pow(2).sum() / len(x)
    return Outcome(mse + l0 * on.sum(), mse, on.sum() / len(x), on.any(0))


@torch.no_grad()
def matching_pursuit(
    sae: Any, x: Tensor, *, dead: Tensor | None, coefficients: dict, step: int, scratch: Scratch
) -> Outcome:
    """One batch of a MatchingPursuitTrainingSAE that always takes k steps.

    r_0 = x_c; i_t = argmax W r_t, v_t = relu(w_i . r_t), r_(t+1) = r_t - v_t w_i. The loss is
    |r_k|^2 / B, and back through a step, with G the gradient in r_(t+1) and a = -w_i . G where
    v_t > 0: w_i gets a r_t - v_t G, and r_t gets G + a w_i.
    """
    xc, k = x - sae.b_dec, sae.cfg.max_iterations
    given = pursuit().pursue(xc, sae.W_dec, k) if x.is_cuda else _pursue(xc, sae.W_dec, k)
    at, values, r, terms, pull = given
    acts = torch.zeros(len(x), sae.cfg.d_sae, device=x.device).scatter_add_(1, at, values)
    entries = torch.arange(at.numel(), device=x.device)
    support = Sparse(at.flatten(), entries, (at.numel(), sae.cfg.d_sae))
    sae.W_dec.grad = support.gather(torch.ones_like(values).flatten(), terms.flatten(0, 1))
    sae.b_dec.grad = -pull.sum(0)
    on, mse = acts > 0, r.pow(2).sum() / len(x)
    return Outcome(mse, mse, on.sum() / len(x), on.any(0))


def _pursue(xc: Tensor, W_dec: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`pursue` of pursuit.py in PyTorch: the same arguments, and what comes back."""
    r, steps = xc, []
    for _ in range(k):
        at = (r @ W_dec.T).argmax(1)
        w = W_dec[at]
        v = (r * w).sum(1, keepdim=True).relu()
        steps.append((at, v, r))
        r = torch.addcmul(r, v, w, value=-1)
    G, terms = r * (2 / len(xc)), []
    for at, v, before in reversed(steps):
        w = W_dec[at]
        a = -(w * G).sum(1, keepdim=True) * (v > 0)
        terms.append(a * before - v * G)
        G = torch.addcmul(G, a, w)
    latents, values, _ = zip(*steps, strict=True)
    return torch.stack(latents, 1), torch.cat(values, 1), r, torch.stack(terms[::-1], 1), G


@cache
def pursuit() -> Any:
    """The module of the kernels, which needs Triton."""
    return import_file(Path(__file__).parent / "pursuit.py")


STEPS = {
    "batchtopk": batchtopk,
    "matryoshka_batchtopk": batchtopk,
    "standard": standard,
    "jumprelu": jumprelu,
    "matching_pursuit": matching_pursuit,
}
