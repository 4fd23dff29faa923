"""Adam on a dictionary's weights without a stored gradient, for a GPU. [torch, triton]

With activations a and their pulls g, the gradients of latent l are sums over the few rows i on
which it is active (sae/steps.py),

    dW_enc[:, l] = sum_i g_il x_i,   dW_dec[l] = sum_i a_il d_i,   db_enc[l] = sum_i g_il,

and rows x_i and d_i of a batch stay in the GPU's cache. So no gradient is written to memory:

1. `pieces` sums the entries of latents that are active on many rows, LONG at a time.
2. `norms` sums each latent's gradient, and keeps its square alone: clipping needs the global norm
   before any weight moves.
3. `bias_sums` and `finish` make b_dec's gradient, the factor of clipping and Adam's corrections,
   and move b_dec.
4. `update` sums each latent's gradient again, and moves the weights, as torch.optim.Adam does.
   While they are in registers it writes what the next step multiplies: W_dec and W_enc n in the
   dtype of operands, n the norm of the decoder's row.

Per weight that is 24 bytes of float32 read and written (the weight and both moments) and 2 bytes
written for its bfloat16 copy; a stored gradient would add 8. Each sum is made by one program in one
order. The tests compare with plain PyTorch in Triton's interpreter.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.kernels.bags import _sum

# Columns of a block, and entries of a latent that are loaded at a time. A thread then holds eight
# columns of every entry, and adds them up alone: with fewer columns a warp, threads of several
# warps share a sum, and wait for each other (ten times as long on an H200).
BLOCK, ENTRIES, WARPS = 256, 8, 1
NORMS_BLOCK, NORMS_ENTRIES, NORMS_WARPS = 512, 4, 2  # of `norms`: a tenth less time than the above
LONG = 32  # entries from which on a latent's gradient is summed in pieces of so many
SLICE = 64  # rows whose weighted sum is one part of `bias_sums`
STREAM = ""  # the cache's policy for weights and moments; "evict_first" took 2 % longer (H200)


@dataclass
class Entries:
    """The active entries of a batch, sorted by latent, rows ascending within a latent.

    Attributes:
        latents: int16 or int32 [n], ascending.
        starts: int64 [d_sae + 1], each latent's first entry, then n.
        rows_enc, rows_dec: int32 [n], the row of x, and that of d, that an entry multiplies.
        acts, pulls: float32 [n], a and g.
        x, d: [rows d_in], the inputs without b_dec, and the gradients in the reconstructions.
        extra: slot of each latent in `more_*`, int32 [d_sae], -1 for none; None: there are none.
        more_enc, more_dec, more_b: further gradients of the latents that have a slot,
            float32 [slots d_in] twice and [slots].
    """

    latents: Tensor
    starts: Tensor
    rows_enc: Tensor
    rows_dec: Tensor
    acts: Tensor
    pulls: Tensor
    x: Tensor
    d: Tensor
    extra: Tensor | None = None
    more_enc: Tensor | None = None
    more_dec: Tensor | None = None
    more_b: Tensor | None = None

    def slots(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The arguments of kernels that say what a latent has besides its entries."""
        if self.extra is None:
            return self.starts, self.acts, self.acts, self.acts  # not read
        return self.extra, self.more_enc, self.more_dec, self.more_b


@triton.jit
def _pieces(
    latents, starts, rows_enc, rows_dec, acts, pulls, x, dx, enc, dec, n, d,
    LONG: tl.constexpr, BLOCK: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """What LONG entries in a row add to the long latents: there are two at most."""
    chunk, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin, end = chunk * LONG, tl.minimum(chunk * LONG + LONG, n)
    before = tl.full([], -1, tl.int64)
    for side in tl.static_range(2):
        latent = tl.load(latents + (end - 1 if side else begin)).to(tl.int64)
        first, last = tl.load(starts + latent), tl.load(starts + latent + 1)
        if (last - first >= LONG) & (latent != before):
            low, high = tl.maximum(first, begin), tl.minimum(last, end)
            to = (2 * chunk + side) * d + at
            total = _sum(rows_enc, pulls, x, d, at, low, high, BLOCK, ENTRIES)
            tl.store(enc + to, total, mask=at < d)
            total = _sum(rows_dec, acts, dx, d, at, low, high, BLOCK, ENTRIES)
            tl.store(dec + to, total, mask=at < d)
        before = latent


def pieces(entries: Entries) -> tuple[Tensor, Tensor]:
    """Sums of LONG entries in a row of the latents with at least LONG: two of [2 chunks, d_in]."""
    n, d, device = len(entries.latents), entries.x.shape[1], entries.x.device
    chunks = triton.cdiv(n, LONG)
    enc, dec = (torch.empty(2 * chunks, d, device=device) for _ in range(2))
    _pieces[(chunks, triton.cdiv(d, BLOCK))](
        entries.latents, entries.starts, entries.rows_enc, entries.rows_dec, entries.acts,
        entries.pulls, entries.x, entries.d, enc, dec, n, d, LONG, BLOCK, ENTRIES, num_warps=WARPS,
    )  # fmt: skip
    return enc, dec


@triton.jit
def _gradient(
    index, values, matrix, pieces, more, slot, first, last, at, d,
    LONG: tl.constexpr, BLOCK: tl.constexpr, ENTRIES: tl.constexpr, EXTRA: tl.constexpr,
):  # fmt: skip
    """One block of columns of a latent's gradient."""
    total = tl.zeros([BLOCK], tl.float32)
    if last - first < LONG:
        total += _sum(index, values, matrix, d, at, first, last, BLOCK, ENTRIES)
    else:
        # It covers its first chunk to the end, as the second of two unless it begins there.
        chunk = first // LONG
        one = 2 * chunk + tl.where(first % LONG == 0, 0, 1)
        total += tl.load(pieces + one * d + at, mask=at < d, other=0.0)
        end = tl.cdiv(last, LONG)
        for begin in range(chunk + 1, end, ENTRIES):
            c = begin + tl.arange(0, ENTRIES)
            mask = (c < end)[:, None] & (at < d)[None, :]
            total += tl.sum(
                tl.load(pieces + 2 * c[:, None] * d + at[None, :], mask=mask, other=0.0), 0
            )
    if EXTRA:
        total += tl.load(more + slot * d + at, mask=(at < d) & (slot >= 0), other=0.0)
    return total


@triton.jit
def _norms(
    starts, rows_enc, rows_dec, acts, pulls, x, dx, enc, dec, extra, more_enc, more_dec, more_b,
    squares, biases, fired, d, LONG: tl.constexpr, BLOCK: tl.constexpr, ENTRIES: tl.constexpr,
    EXTRA: tl.constexpr,
):  # fmt: skip
    """One latent."""
    latent = tl.program_id(0).to(tl.int64)
    first, last = tl.load(starts + latent), tl.load(starts + latent + 1)
    pull, most = tl.zeros([LONG], tl.float32), tl.zeros([LONG], tl.float32)
    for e in range(first, last, LONG):
        entry = e + tl.arange(0, LONG)
        pull += tl.load(pulls + entry, mask=entry < last, other=0.0)
        most = tl.maximum(most, tl.load(acts + entry, mask=entry < last, other=0.0))
    bias, slot = tl.sum(pull), first * 0 - 1
    if EXTRA:
        slot = tl.load(extra + latent).to(tl.int64)
        bias += tl.load(more_b + slot, mask=slot >= 0, other=0.0)
    square = tl.zeros([BLOCK], tl.float32)
    if (last > first) | (slot >= 0):
        for begin in range(0, d, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            g = _gradient(
                rows_enc, pulls, x, enc, more_enc, slot, first, last, at, d, LONG, BLOCK, ENTRIES,
                EXTRA,
            )  # fmt: skip
            square += g * g
            g = _gradient(
                rows_dec, acts, dx, dec, more_dec, slot, first, last, at, d, LONG, BLOCK, ENTRIES,
                EXTRA,
            )  # fmt: skip
            square += g * g
    tl.store(squares + latent, tl.sum(square) + bias * bias)
    tl.store(biases + latent, bias)
    tl.store(fired + latent, (tl.max(most) > 0).to(tl.int8))


def norms(entries: Entries, parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Squared norm of each latent's gradients, b_enc's gradient, and whether the latent fired.

    Args:
        parts: of `pieces`.

    Returns:
        float32 [d_sae] twice, int8 [d_sae].
    """
    d_sae, (_, d), device = len(entries.starts) - 1, entries.x.shape, entries.x.device
    squares, biases = (torch.empty(d_sae, device=device) for _ in range(2))
    fired = torch.empty(d_sae, dtype=torch.int8, device=device)
    _norms[(d_sae,)](
        entries.starts, entries.rows_enc, entries.rows_dec, entries.acts, entries.pulls, entries.x,
        entries.d, *parts, *entries.slots(), squares, biases, fired, d, LONG, NORMS_BLOCK,
        NORMS_ENTRIES, entries.extra is not None, num_warps=NORMS_WARPS,
    )  # fmt: skip
    return squares, biases, fired


@triton.jit
def _bias_sums(
    dx, enc, biases, scale, out, n_rows, n_latents, d, stride, parts_of_rows, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Weighted sum of ROWS rows, one block of columns: first those of dx, then those of enc."""
    part, at = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    if part < parts_of_rows:
        for r in range(0, ROWS, STEP):
            row = (part * ROWS + r + tl.arange(0, STEP)).to(tl.int64)
            mask = (row < n_rows)[:, None] & (at < d)[None, :]
            w = tl.load(dx + row[:, None] * stride + at[None, :], mask=mask, other=0.0)
            total += tl.sum(w.to(tl.float32), 0)
    else:
        for r in range(0, ROWS, STEP):
            row = ((part - parts_of_rows) * ROWS + r + tl.arange(0, STEP)).to(tl.int64)
            there = row < n_latents
            bias = tl.load(biases + row, mask=there, other=0.0)
            there = there & (bias != 0)
            weight = bias / tl.load(scale + row, mask=there, other=1.0)
            mask = there[:, None] & (at < d)[None, :]
            w = tl.load(enc + row[:, None] * d + at[None, :], mask=mask, other=0.0)
            total -= tl.sum(w.to(tl.float32) * weight[:, None], 0)
    tl.store(out + part.to(tl.int64) * d + at, total, mask=at < d)


def bias_sums(d: Tensor, enc: Tensor, biases: Tensor, scale: Tensor) -> Tensor:
    """b_dec's gradient, sum_i d_i - sum_l db_enc[l] W_enc[:, l]: float32 [d_in].

    Args:
        d: [rows d_in]; its columns are contiguous.
        enc, scale: the encoder's rows times a scale, [d_sae d_in], and the scale, [d_sae].
        biases: b_enc's gradient, [d_sae].
    """
    rows, latents = triton.cdiv(len(d), SLICE), triton.cdiv(len(enc), SLICE)
    out = torch.empty(rows + latents, d.shape[1], device=d.device)
    block = 512
    _bias_sums[(rows + latents, triton.cdiv(d.shape[1], block))](
        d, enc, biases, scale, out, len(d), len(enc), d.shape[1], d.stride(0), rows, SLICE, block,
        8, num_warps=2,
    )  # fmt: skip
    return out.sum(0)


@triton.jit
def _moved(w, m, v, g, beta1, beta2, eps, size, root):
    """A weight and its moments after Adam's step on a gradient."""
    m += (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * g * g
    return w - size * m / (tl.sqrt(v) / root + eps), m, v


@triton.jit
def _finish(
    square, weights, means, seconds, gradient, d, count, lr, factors, clip, beta1, beta2, eps, log1,
    log2, WIDTH: tl.constexpr,
):  # fmt: skip
    """The only program."""
    at = tl.arange(0, WIDTH)
    g = tl.load(gradient + at, mask=at < d, other=0.0)
    norm = tl.sqrt(tl.load(square) + tl.sum(g * g))
    factor = 1 / tl.maximum((norm + 1e-6) / clip, 1.0)
    step = tl.load(count) + 1
    # float64: 1 - 0.999 in float32 keeps four digits
    size = (tl.load(lr) / (1 - tl.exp(step.to(tl.float64) * log1))).to(tl.float32)
    root = tl.sqrt(1 - tl.exp(step.to(tl.float64) * log2)).to(tl.float32)
    tl.store(count, step)
    tl.store(factors, factor)
    tl.store(factors + 1, size)
    tl.store(factors + 2, root)
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


def finish(
    squares: Tensor, gradient: Tensor, b_dec: Moved, count: Tensor, lr: Tensor, how: How
) -> Tensor:
    """Move b_dec and count the step; the factors of `update`.

    Args:
        squares: of `norms`.
        gradient: of b_dec.
        count: number of steps done, a float32 scalar, which rises by one.
        lr: the learning rate, a float32 scalar.

    Returns:
        float32 [3]: by what gradients are multiplied, lr / (1 - beta1^step), and
        sqrt(1 - beta2^step).
    """
    factors = torch.empty(3, device=squares.device)
    d = len(gradient)
    _finish[(1,)](
        squares.sum(), *b_dec, gradient, d, count, lr, factors, how.clip, how.beta1, how.beta2,
        how.eps, math.log(how.beta1), math.log(how.beta2), triton.next_power_of_2(d), num_warps=8,
    )  # fmt: skip
    return factors


@triton.jit
def _update(
    starts, rows_enc, rows_dec, acts, pulls, x, dx, part_enc, part_dec, extra, more_enc, more_dec,
    more_b, biases, factors, W_enc, m_enc, v_enc, W_dec, m_dec, v_dec, b_enc, m_b, v_b, enc, dec,
    bias, norm, d, beta1, beta2, eps, LONG: tl.constexpr, BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr, EXTRA: tl.constexpr, RESCALE: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    """One latent."""
    latent = tl.program_id(0).to(tl.int64)
    first, last = tl.load(starts + latent), tl.load(starts + latent + 1)
    factor, size, root = tl.load(factors), tl.load(factors + 1), tl.load(factors + 2)
    slot = first * 0 - 1
    if EXTRA:
        slot = tl.load(extra + latent).to(tl.int64)
    square = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, d, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        to, mask = latent * d + at, at < d
        # on their way while the gradient is summed
        w = tl.load(W_dec + to, mask=mask, other=0.0, eviction_policy=STREAM)
        m = tl.load(m_dec + to, mask=mask, other=0.0, eviction_policy=STREAM)
        v = tl.load(v_dec + to, mask=mask, other=0.0, eviction_policy=STREAM)
        g = _gradient(
            rows_dec, acts, dx, part_dec, more_dec, slot, first, last, at, d, LONG, BLOCK, ENTRIES,
            EXTRA,
        )  # fmt: skip
        w, m, v = _moved(w, m, v, g * factor, beta1, beta2, eps, size, root)
        tl.store(W_dec + to, w, mask=mask, eviction_policy=STREAM)
        tl.store(m_dec + to, m, mask=mask, eviction_policy=STREAM)
        tl.store(v_dec + to, v, mask=mask, eviction_policy=STREAM)
        tl.store(dec + to, w.to(dec.dtype.element_ty), mask=mask)
        square += w * w
    length = tl.sqrt(tl.sum(square))
    scale = length if RESCALE else length * 0 + 1
    for begin in range(0, d, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        to, mask = latent * d + at, at < d
        # on their way while the gradient is summed
        w = tl.load(W_enc + to, mask=mask, other=0.0, eviction_policy=STREAM)
        m = tl.load(m_enc + to, mask=mask, other=0.0, eviction_policy=STREAM)
        v = tl.load(v_enc + to, mask=mask, other=0.0, eviction_policy=STREAM)
        g = _gradient(
            rows_enc, pulls, x, part_enc, more_enc, slot, first, last, at, d, LONG, BLOCK, ENTRIES,
            EXTRA,
        )  # fmt: skip
        w, m, v = _moved(w, m, v, g * factor, beta1, beta2, eps, size, root)
        tl.store(W_enc + to, w, mask=mask, eviction_policy=STREAM)
        tl.store(m_enc + to, m, mask=mask, eviction_policy=STREAM)
        tl.store(v_enc + to, v, mask=mask, eviction_policy=STREAM)
        tl.store(enc + to, (w * scale).to(enc.dtype.element_ty), mask=mask)
    b, m, v = tl.load(b_enc + latent), tl.load(m_b + latent), tl.load(v_b + latent)
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
    parts: tuple[Tensor, Tensor],
    biases: Tensor,
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
        parts: of `pieces`.
        biases: b_enc's gradient, of `norms`.
        factors: of `finish`.
        rescale: whether scores are rescaled by the decoder's norms.
    """
    d_sae, d = into.enc.shape
    _update[(d_sae,)](
        entries.starts, entries.rows_enc, entries.rows_dec, entries.acts, entries.pulls, entries.x,
        entries.d, *parts, *entries.slots(), biases, factors, *W_enc, *W_dec, *b_enc, into.enc,
        into.dec, into.bias, into.norm, d, how.beta1, how.beta2, how.eps, LONG, BLOCK, ENTRIES,
        entries.extra is not None, rescale, STREAM, num_warps=WARPS,
    )  # fmt: skip
