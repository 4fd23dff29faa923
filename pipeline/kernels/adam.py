"""Adam on a dictionary's weights without a stored gradient, for a GPU. [torch, triton]

1. `begin` makes Adam's corrections, `finish` the factor of clipping; it moves b_dec.
2. `update` sums each latent's gradient again (gradients.py), and moves the weights, as
   torch.optim.Adam does. While they are in registers it writes what the next step multiplies: W_dec
   and W_enc n in the dtype of operands, n the norm of the decoder's row.
3. Latents without a gradient need neither sums nor norm: they are moved while these are made.

Per weight that is 24 bytes of float32 read and written (the weight and both moments) and 2 bytes
written for its bfloat16 copy; a stored gradient would add 8. The tests compare with plain PyTorch
in Triton's interpreter.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.kernels import gradients
from pipeline.kernels.gradients import Entries, _gradient

# Columns of a block, and warps, of latents without a gradient, as most of a wide dictionary are.
# Their program needs few registers, so that more of them run at a time.
IDLE_BLOCK, IDLE_WARPS = 1024, 4


@triton.jit
def _moved(w, m, v, g, beta1, beta2, eps, size, root):
    """A weight and its moments after Adam's step on a gradient."""
    m += (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * g * g
    return w - size * m / (tl.sqrt(v) / root + eps), m, v


@triton.jit
def _begin(count, lr, factors, log1, log2):
    """The only program."""
    step = tl.load(count) + 1
    # float64: 1 - 0.999 in float32 keeps four digits
    size = (tl.load(lr) / (1 - tl.exp(step.to(tl.float64) * log1))).to(tl.float32)
    root = tl.sqrt(1 - tl.exp(step.to(tl.float64) * log2)).to(tl.float32)
    tl.store(count, step)
    tl.store(factors + 1, size)
    tl.store(factors + 2, root)


@triton.jit
def _finish(
    squares, n_squares, weights, means, seconds, gradient, d, factors, clip, beta1, beta2, eps,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """The only program."""
    at = tl.arange(0, WIDTH)
    g = tl.load(gradient + at, mask=at < d, other=0.0)
    square = g * g
    for begin in range(0, n_squares, WIDTH):
        square += tl.load(squares + begin + at, mask=begin + at < n_squares, other=0.0)
    norm = tl.sqrt(tl.sum(square))
    factor = 1 / tl.maximum((norm + 1e-6) / clip, 1.0)
    tl.store(factors, factor)
    size, root = tl.load(factors + 1), tl.load(factors + 2)
    w = tl.load(weights + at, mask=at < d, other=0.0)
    m = tl.load(means + at, mask=at < d, other=0.0)
    v = tl.load(seconds + at, mask=at < d, other=0.0)
    w, m, v = _moved(w, m, v, g * factor, beta1, beta2, eps, size, root)
    tl.store(weights + at, w, mask=at < d)
    tl.store(means + at, m, mask=at < d)
    tl.store(seconds + at, v, mask=at < d)


@dataclass
class Moved:
    """A parameter and its state in Adam; W_enc's are transposed, [d_sae d_in]."""

    weights: Tensor
    mean: Tensor
    square: Tensor

    def __iter__(self):
        return iter((self.weights, self.mean, self.square))


@dataclass
class How:
    """Adam's constants: its betas, epsilon, and the norm to which gradients are clipped."""

    beta1: float
    beta2: float
    eps: float
    clip: float


def begin(count: Tensor, lr: Tensor, how: How) -> Tensor:
    """Count the step; Adam's corrections, with room for the factor of clipping.

    Args:
        count: number of steps done, a float32 scalar, which rises by one.
        lr: the learning rate, a float32 scalar.

    Returns:
        float32 [3]: undefined, lr / (1 - beta1^step), and sqrt(1 - beta2^step).
    """
    factors = torch.empty(3, device=count.device)
    _begin[(1,)](count, lr, factors, math.log(how.beta1), math.log(how.beta2), num_warps=1)
    return factors


def finish(factors: Tensor, squares: Tensor, gradient: Tensor, b_dec: Moved, how: How) -> None:
    """Move b_dec; the first of the factors becomes what gradients are multiplied by.

    Args:
        factors: of `begin`.
        squares: of `gradients.bias_sums`, as the gradient of b_dec.
    """
    d = len(gradient)
    _finish[(1,)](
        squares, len(squares), *b_dec, gradient, d, factors, how.clip, how.beta1, how.beta2,
        how.eps, triton.next_power_of_2(d), num_warps=8,
    )  # fmt: skip


@triton.jit
def _update(
    starts, rows_enc, rows_dec, acts, pulls, x, dx, part_enc, part_dec, extra, more_enc, more_dec,
    more_b, biases, factors, W_enc, m_enc, v_enc, W_dec, m_dec, v_dec, b_enc, m_b, v_b, enc, dec,
    bias, norm, d, beta1, beta2, eps, LONG: tl.constexpr, BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr, EXTRA: tl.constexpr, RESCALE: tl.constexpr, IDLE: tl.constexpr,
):  # fmt: skip
    """One latent; IDLE: of those without a gradient, else of those with one."""
    latent = tl.program_id(0).to(tl.int64)
    first, last = tl.load(starts + latent), tl.load(starts + latent + 1)
    slot = first * 0 - 1
    if EXTRA:
        slot = tl.load(extra + latent).to(tl.int64)
    if ((last == first) & (slot < 0)) != IDLE:
        return
    factor, size, root = tl.load(factors), tl.load(factors + 1), tl.load(factors + 2)
    square = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, d, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        to, mask = latent * d + at, at < d
        # on their way while the gradient is summed
        w = tl.load(W_dec + to, mask=mask, other=0.0)
        m = tl.load(m_dec + to, mask=mask, other=0.0)
        v = tl.load(v_dec + to, mask=mask, other=0.0)
        g = tl.zeros([BLOCK], tl.float32)
        if not IDLE:
            g = factor * _gradient(
                rows_dec, acts, dx, part_dec, more_dec, slot, first, last, at, d, LONG, BLOCK,
                ENTRIES, EXTRA,
            )  # fmt: skip
        w, m, v = _moved(w, m, v, g, beta1, beta2, eps, size, root)
        tl.store(W_dec + to, w, mask=mask)
        tl.store(m_dec + to, m, mask=mask)
        tl.store(v_dec + to, v, mask=mask)
        tl.store(dec + to, w.to(dec.dtype.element_ty), mask=mask)
        square += w * w
    length = tl.sqrt(tl.sum(square))
    scale = length if RESCALE else length * 0 + 1
    for begin in range(0, d, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        to, mask = latent * d + at, at < d
        # on their way while the gradient is summed
        w = tl.load(W_enc + to, mask=mask, other=0.0)
        m = tl.load(m_enc + to, mask=mask, other=0.0)
        v = tl.load(v_enc + to, mask=mask, other=0.0)
        g = tl.zeros([BLOCK], tl.float32)
        if not IDLE:
            g = factor * _gradient(
                rows_enc, pulls, x, part_enc, more_enc, slot, first, last, at, d, LONG, BLOCK,
                ENTRIES, EXTRA,
            )  # fmt: skip
        w, m, v = _moved(w, m, v, g, beta1, beta2, eps, size, root)
        tl.store(W_enc + to, w, mask=mask)
        tl.store(m_enc + to, m, mask=mask)
        tl.store(v_enc + to, v, mask=mask)
        tl.store(enc + to, (w * scale).to(enc.dtype.element_ty), mask=mask)
    b, m, v = tl.load(b_enc + latent), tl.load(m_b + latent), tl.load(v_b + latent)
    g = 0.0
    if not IDLE:
        g = tl.load(biases + latent) * factor
    b, m, v = _moved(b, m, v, g, beta1, beta2, eps, size, root)
    tl.store(b_enc + latent, b)
    tl.store(m_b + latent, m)
    tl.store(v_b + latent, v)
    tl.store(bias + latent, (b * scale).to(bias.dtype.element_ty))
    tl.store(norm + latent, scale)


@dataclass
class Operands:
    """What a step multiplies, in the dtype of operands; `update` keeps it.

    Attributes:
        enc: W_enc' times `norm`, [d_sae d_in].
        dec: W_dec, [d_sae d_in].
        bias: b_enc times `norm`, [d_sae].
        norm: norms of W_dec's rows where scores are rescaled by them, else ones: float32 [d_sae].
    """

    enc: Tensor
    dec: Tensor
    bias: Tensor
    norm: Tensor


def update(
    entries: Entries,
    sums: tuple[Tensor, Tensor, Tensor] | None,
    factors: Tensor,
    W_enc: Moved,
    W_dec: Moved,
    b_enc: Moved,
    into: Operands,
    how: How,
    rescale: bool,
) -> None:
    """Adam's step on W_enc, W_dec and b_enc in place, and the operands of the next step.

    Args:
        sums: of latents with a gradient, their `pieces` and b_enc's gradient, of `norms`; None: of
            the other latents, which nothing else reads from the forward pass on, so that both can
            be moved at a time.
        factors: of `finish`; without sums, of `begin`.
        rescale: whether scores are rescaled by the decoder's norms.
    """
    d_sae, d = into.enc.shape
    if sums:
        block, at_a_time, warps = gradients.BLOCK, gradients.ENTRIES, gradients.WARPS
    else:
        block, at_a_time, warps = min(IDLE_BLOCK, triton.next_power_of_2(d)), 1, IDLE_WARPS
    _update[(d_sae,)](
        entries.starts, entries.rows_enc, entries.rows_dec, entries.acts, entries.pulls, entries.x,
        entries.d, *(sums or (factors,) * 3)[:2], *entries.slots(), (sums or (factors,))[-1],
        factors, *W_enc, *W_dec, *b_enc, into.enc, into.dec, into.bias, into.norm, d, how.beta1,
        how.beta2, how.eps, gradients.LONG, block, at_a_time, entries.extra is not None, rescale,
        not sums, num_warps=warps,
    )  # fmt: skip
