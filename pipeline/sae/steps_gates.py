"""The fast steps of Gated, JumpReLU and matching pursuit: SAELens's loss and gradients, sparse
where few are active.

With B rows, x_c = x - b_dec, p = x_c W_enc and the pull g = d W_dec' on active latents as in
sae/steps.py:

1. Gated (Rajamanoharan et al. 2024, 2404.16014, Sec. 3.2). The gate is q = relu(p + b_gate); where
   it is positive, the magnitude is m = relu(p exp(r_mag) + b_mag). The loss is the squared error of
   m, the squared error of q in its place, and l1 sum(q n) / B, n the decoder's norms. Only latents
   with an open gate take part. SAELens lets the second error train the decoder, which the paper
   freezes in that term.
2. JumpReLU (Rajamanoharan et al. 2024, 2407.14435, Sec. 3 and 4): a = p' 1[p' > theta] with p' = p
   + b_enc, and the loss adds l0 times the mean number of active latents. Thresholds get the paper's
   pseudo-derivatives: an entry with |p' - theta| < bandwidth / 2 adds -(theta g + l0 / B) /
   bandwidth to theta's gradient and, with `jumprelu_ste_to_input` (Anthropic's), the negative of
   that to the gradient of p'. The support is what is active or in that band.

Above steps.DENSE_SHARE of active latents a step uses dense products, by the same code: `Dense` has
the methods of `Sparse`.

Matching pursuit (Mallat & Zhang 1993) has one dense product per batch. It picks k latents for each
row, one after another. With r_0 = x - b_dec and w_t the decoder row with the largest projection of
r_t:

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

from pipeline.sae.sparse import Dense, Scratch, Sparse, product
from pipeline.sae.steps import DENSE_SHARE, SAMPLE_ROWS, Outcome, laid_out


def _is_dense(on: Tensor, scratch: Scratch) -> bool:
    """Whether a bool matrix is on in many places, or counts as such."""
    some = on[:SAMPLE_ROWS]
    return scratch.dense or bool(some.count_nonzero() > DENSE_SHARE * some.numel())


def support_of(on: Tensor, scratch: Scratch, dtype: torch.dtype) -> tuple[Any, Any]:
    """Where a matrix is on, as a Sparse, or as a Dense if that is in many places.

    Args:
        on: bool [batch d_sae].
        dtype: dtype of the values on a Sparse.

    Returns:
        The support, and a function that takes the values on it from a matrix [batch d_sae]; a Dense
        takes all of them.
    """
    if _is_dense(on, scratch):
        return Dense(scratch), lambda matrix: matrix
    flat = on.view(-1).nonzero()[:, 0]
    rows = torch.div(flat, on.shape[1], rounding_mode="floor")
    support = Sparse(flat - rows * on.shape[1], rows, tuple(on.shape), scratch.half)
    return support, lambda matrix: matrix.view(-1)[flat].to(dtype)


@torch.no_grad()
def gated(
    sae: Any,
    x: Float[Tensor, "batch d_in"],
    *,
    dead: Bool[Tensor, " d_sae"] | None,
    coefficients: dict[str, Any],
    step: int,
    scratch: Scratch,
) -> Outcome:
    """One batch of a GatedTrainingSAE; arguments as `steps.reference`."""
    W_dec, xc, l1 = sae.W_dec.detach(), x - sae.b_dec, coefficients["l1"] / len(x)
    norm, gain = W_dec.norm(dim=1), sae.r_mag.exp()
    p = scratch.encode(xc, sae.W_enc)
    support, pick = support_of(p > -sae.b_gate, scratch, x.dtype)
    p = pick(p)
    q = (p + support.spread(sae.b_gate)).relu()
    open_ = q > 0
    m = (p * support.spread(gain) + support.spread(sae.b_mag)).relu() * open_
    r, d, g = [], [], []
    for acts, offset in ((m, None), (q, norm * l1)):
        decoded, pull = support.decode(acts, W_dec)
        r.append(decoded - xc)
        d.append(r[-1] * (2 / len(x)))
        g.append(pull(d[-1], offset) * (acts > 0))
    both = g[1] + g[0] * support.spread(gain)
    sums = support.total(q)
    if sae.W_dec.requires_grad:
        made = support.gather(m, d[0]) + support.gather(q, d[1])
        sae.W_dec.grad = made.addcmul_(W_dec, (sums * l1 / norm)[:, None])
    sae.W_enc.grad = laid_out(support.gather(both, xc), sae.W_enc)
    sae.r_mag.grad = support.total(g[0] * p) * gain
    sae.b_mag.grad, sae.b_gate.grad = support.total(g[0]), support.total(g[1])
    sae.b_dec.grad = (d[0] + d[1]).sum(0) - sae.W_enc @ support.total(both)
    mse, aux = (e.pow(2).sum() / len(x) for e in r)
    fired = support.fired(m)
    return Outcome(mse + aux + (sums * norm).sum() * l1, mse, support.l0_(m), fired)


@torch.no_grad()
def jumprelu(
    sae: Any,
    x: Float[Tensor, "batch d_in"],
    *,
    dead: Bool[Tensor, " d_sae"] | None,
    coefficients: dict[str, Any],
    step: int,
    scratch: Scratch,
) -> Outcome:
    """One batch of a JumpReLUTrainingSAE with the L0 loss; arguments as `steps.reference`."""
    W_dec, xc, l0 = sae.W_dec.detach(), x - sae.b_dec, coefficients["l0"] / len(x)
    theta = sae.threshold.data.clamp_(min=0).to(x.dtype)  # projected as SAELens does it
    width = sae.bandwidth
    p = scratch.encode(xc, sae.W_enc, sae.b_enc)
    if scratch.half and _is_dense(p[:SAMPLE_ROWS] > theta - width / 2, scratch):
        return _jumprelu_dense(sae, xc, p, theta.float(), coefficients["l0"], scratch)
    support, pick = support_of(p > theta - width / 2, scratch, x.dtype)
    p = pick(p)
    above = p - support.spread(theta)
    acts = p * (above > 0)
    near = (above > -width / 2) & (above < width / 2)
    decoded, pull = support.decode(acts, W_dec)
    r = decoded - xc
    d = r * (2 / len(x))
    g = pull(d, None)
    pseudo = (g * support.spread(theta) + l0) * near / width
    sae.threshold.grad = -support.total(pseudo).to(sae.threshold.dtype)
    g = g * (above > 0)
    if sae.cfg.jumprelu_ste_to_input:
        g += pseudo
    if sae.W_dec.requires_grad:
        sae.W_dec.grad = support.gather(acts, d)
    sae.W_enc.grad = laid_out(support.gather(g, xc), sae.W_enc)
    sae.b_enc.grad = support.total(g)
    sae.b_dec.grad = d.sum(0) - sae.W_enc @ sae.b_enc.grad
    mse, fired = r.pow(2).sum() / len(x), support.fired(acts)
    active = support.l0_(acts)
    return Outcome(mse + coefficients["l0"] * active, mse, active, fired)


def _jumprelu_dense(
    sae: Any, xc: Tensor, p: Tensor, theta: Tensor, coefficient: float, scratch: Scratch
) -> Outcome:
    """`jumprelu` of many active latents on a GPU.

    Args:
        xc: x - b_dec, [batch d_in].
        p: pre-activations, [batch d_sae].
        theta: thresholds, float32 [d_sae].
        coefficient: of the L0 loss.
    """
    from pipeline.kernels import gates

    batch, cast = len(xc), scratch.cast
    acts = gates.opened(p, theta, scratch.matrix("opened", *p.shape, like=p))
    W_dec = cast(sae.W_dec.detach())
    r = product(acts, W_dec).sub_(xc)
    d = r * (2 / batch)
    d_cast, xc_cast = cast(d), cast(xc)
    g = torch.mm(d_cast, W_dec.T, out=scratch.matrix("pull", *p.shape, like=p))
    pseudo, pull, active = gates.pulled_(
        p, g, theta, l0=coefficient / batch, width=sae.bandwidth,
        to_input=sae.cfg.jumprelu_ste_to_input,
    )  # fmt: skip
    sae.threshold.grad = -pseudo.to(sae.threshold.dtype)
    if sae.W_dec.requires_grad:
        sae.W_dec.grad = product(acts.T, d_cast)
    sae.W_enc.grad = laid_out(product(g.T, xc_cast), sae.W_enc)
    sae.b_enc.grad, sae.b_dec.grad = pull, d.sum(0) - sae.W_enc @ pull
    mse, l0 = r.pow(2).sum() / batch, active.sum() / batch
    return Outcome(mse + coefficient * l0, mse, l0, active > 0)


# --- matching pursuit ------------------------------------------------------------------------


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


FAST = {"gated": gated, "jumprelu": jumprelu, "matching_pursuit": matching_pursuit}
