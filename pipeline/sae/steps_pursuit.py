"""The fast step of matching pursuit: SAELens's loss and gradients with one dense product per batch.

Matching pursuit (Mallat & Zhang 1993) picks k latents for each row, one after another. With r_0 =
x - b_dec and w_t the decoder row with the largest projection of r_t:

    v_t = relu(r_t . w_t),   r_(t+1) = r_t - v_t w_t,   loss |r_k|^2 / B

1. SAELens multiplies r_t by the whole decoder at every step. Here the scores r_t W_dec' are
   kept, and each step subtracts v_t times a row of the Gram matrix W_dec W_dec'.
2. A row is finished when a step picks none, when |r| is below SAELens's threshold, and, by its
   `stop_on_duplicate_support`, when a step picks a latent that the row already has.
3. Backwards, with l_t the gradient of the loss in r_t, from l_k = 2 r_k / B and s_t = l_(t+1) . w_t
   where v_t > 0: w_t gets -v_t l_(t+1) - s_t r_t, and l_t = l_(t+1) - s_t w_t. b_dec gets -l_0.
4. Where no row is finished early, a GPU takes each row through all steps at once
   (kernels/pursuit.py), and nothing waits for it.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pipeline.sae.sparse import Scratch, Sparse
from pipeline.sae.steps import Outcome


@torch.no_grad()
def matching_pursuit(
    sae: Any,
    x: Float[Tensor, "batch d_in"],
    *,
    dead: Bool[Tensor, " d_sae"] | None,
    coefficients: dict[str, Any],
    step: int,
    scratch: Scratch,
) -> Outcome:
    """One batch of a MatchingPursuitTrainingSAE; arguments as `steps.reference`."""
    W_dec, r = sae.W_dec.detach(), x - sae.b_dec
    once = sae.cfg.stop_on_duplicate_support
    if x.is_cuda and not once and not sae.cfg.residual_threshold:
        return _at_once(sae, r)
    scores = r @ W_dec.T
    gram = W_dec @ W_dec.T
    taken = torch.zeros(scores.shape, dtype=torch.bool, device=x.device)
    going = torch.ones(len(x), dtype=torch.bool, device=x.device)
    steps = []
    for _ in range(sae.cfg.max_iterations):
        at = scores.argmax(1, keepdim=True)
        w = W_dec[at[:, 0]]
        v = (r * w).sum(1).relu() * going
        r = r - v[:, None] * w
        scores.addcmul_(gram[at[:, 0]], v[:, None], value=-1)
        steps.append((at[:, 0], v))
        going &= (v > 0) & ~(taken.gather(1, at)[:, 0] & once)
        going &= r.norm(dim=1) >= sae.cfg.residual_threshold
        taken.scatter_(1, at, taken.gather(1, at) | (v > 0)[:, None])
        if not going.any():
            break
    mse = r.pow(2).sum() / len(x)
    _backward(sae, steps, r)
    return Outcome(mse, mse, taken.sum().to(x.dtype) / len(x), taken.any(0))


def _at_once(sae: Any, xc: Float[Tensor, "batch d_in"]) -> Outcome:
    """All steps of centred rows x - b_dec, by the kernels."""
    from pipeline.kernels import pursuit

    W_dec = sae.W_dec.detach()
    at, values, r, terms, pull = pursuit.pursue(xc, W_dec, sae.cfg.max_iterations)
    acts = xc.new_zeros(len(xc), len(W_dec)).scatter_add_(1, at, values)
    if sae.W_dec.requires_grad:
        entries = torch.arange(at.numel(), device=at.device)
        places = Sparse(at.flatten(), entries, (at.numel(), len(W_dec)))
        sae.W_dec.grad = places.gather(torch.ones_like(values).flatten(), terms.flatten(0, 1))
    sae.b_dec.grad = -pull.sum(0)
    on, mse = acts > 0, r.pow(2).sum() / len(xc)
    return Outcome(mse, mse, on.sum() / len(xc), on.any(0))


def _backward(sae: Any, steps: list[tuple[Tensor, Tensor]], r: Tensor) -> None:
    """Set `.grad` of the parameters.

    Args:
        steps: the latents and values that the rows picked, int64 and float [batch], in order.
        r: the residual after the last step, [batch d_in].
    """
    W_dec, rows = sae.W_dec.detach(), torch.arange(len(r), device=r.device)
    grad, pull = torch.zeros_like(W_dec), r * (2 / len(r))
    for at, v in reversed(steps):
        w = W_dec[at]
        r = r + v[:, None] * w
        s = (pull * w).sum(1) * (v > 0)
        if sae.W_dec.requires_grad:
            place = Sparse(at, rows, (len(r), len(W_dec)))
            grad -= place.gather(v, pull) + place.gather(s, r)
        pull = pull - s[:, None] * w
    sae.b_dec.grad = -pull.sum(0)
    if sae.W_dec.requires_grad:
        sae.W_dec.grad = grad


FAST = {"matching_pursuit": matching_pursuit}
