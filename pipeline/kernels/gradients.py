"""Sums of a dictionary's gradients that are not stored, for a GPU. [torch, triton]

With activations a and their pulls g, the gradients of latent l are sums over the few rows i on
which it is active (sae/steps.py),

    dW_enc[:, l] = sum_i g_il x_i,   dW_dec[l] = sum_i a_il d_i,   db_enc[l] = sum_i g_il,

and rows x_i and d_i of a batch stay in the GPU's cache. So no gradient is written to memory, but of
the latents that are active on many rows:

1. `pieces` sums the entries of those latents, LONG at a time, and then each latent's pieces.
2. `norms` sums each latent's gradient, and keeps its square alone: clipping needs the global norm
   before any weight moves. Adam's kernel (adam.py) sums it again.
3. `bias_sums` makes b_dec's gradient.

Each sum is made by one program in one order. The tests compare with plain PyTorch in Triton's
interpreter.
"""

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
JOINED, PIECES = 128, 16  # columns of a block whose pieces are summed, and pieces at a time
LONG = 32  # entries from which on a latent's gradient is summed in pieces of so many
SLICE = 64  # rows whose weighted sum is one part of `bias_sums`


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


@triton.jit
def _join(
    latents, starts, enc, dec, n, d, LONG: tl.constexpr, BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
):  # fmt: skip
    """The long latent that begins among LONG entries in a row: its pieces, summed in the first.

    It reaches to the last of them, so there is one at most.
    """
    chunk, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin, end = chunk * LONG, tl.minimum(chunk * LONG + LONG, n)
    latent = tl.load(latents + end - 1).to(tl.int64)
    first, last = tl.load(starts + latent), tl.load(starts + latent + 1)
    if (last - first >= LONG) & (first >= begin):
        pieces = enc
        if tl.program_id(2) == 1:
            pieces = dec
        to, after = _first_piece(first, LONG) * d + at, tl.cdiv(last, LONG)
        total = tl.load(pieces + to, mask=at < d, other=0.0)
        for c in range(chunk + 1, after, PIECES):
            more = c + tl.arange(0, PIECES)
            mask = (more < after)[:, None] & (at < d)[None, :]
            # it is the first latent of every chunk that follows
            where = pieces + 2 * more[:, None] * d + at[None, :]
            total += tl.sum(tl.load(where, mask=mask, other=0.0), 0)
        tl.store(pieces + to, total, mask=at < d)


@triton.jit
def _first_piece(first, LONG: tl.constexpr):
    """The first piece of a long latent: its chunk's second, unless it begins the chunk."""
    return 2 * (first // LONG) + tl.where(first % LONG == 0, 0, 1)


def pieces(entries: Entries) -> tuple[Tensor, Tensor]:
    """Sums of LONG entries in a row of the latents with at least LONG: two of [2 chunks, d_in].

    The first piece of a latent holds the sum of all its pieces.
    """
    n, d, device = len(entries.latents), entries.x.shape[1], entries.x.device
    chunks = triton.cdiv(n, LONG)
    enc, dec = (torch.empty(2 * chunks, d, device=device) for _ in range(2))
    _pieces[(chunks, triton.cdiv(d, BLOCK))](
        entries.latents, entries.starts, entries.rows_enc, entries.rows_dec, entries.acts,
        entries.pulls, entries.x, entries.d, enc, dec, n, d, LONG, BLOCK, ENTRIES, num_warps=WARPS,
    )  # fmt: skip
    _join[(chunks, triton.cdiv(d, JOINED), 2)](
        entries.latents, entries.starts, enc, dec, n, d, LONG, JOINED, PIECES, num_warps=1
    )
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
        total += tl.load(pieces + _first_piece(first, LONG) * d + at, mask=at < d, other=0.0)
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
    dx, enc, biases, scale, squares, out, sums, n_rows, n_latents, d, stride, parts_of_rows,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
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
        row = (part - parts_of_rows) * ROWS + tl.arange(0, ROWS)
        square = tl.load(squares + row, mask=row < n_latents, other=0.0)
        if tl.program_id(1) == 0:
            tl.store(sums + part - parts_of_rows, tl.sum(square))
    tl.store(out + part.to(tl.int64) * d + at, total, mask=at < d)


def bias_sums(
    d: Tensor, enc: Tensor, biases: Tensor, scale: Tensor, squares: Tensor
) -> tuple[Tensor, Tensor]:
    """b_dec's gradient, sum_i d_i - sum_l db_enc[l] W_enc[:, l]; and sums over `squares`.

    Args:
        d: [rows d_in]; its columns are contiguous.
        enc, scale: the encoder's rows times a scale, [d_sae d_in], and the scale, [d_sae].
        biases: b_enc's gradient, [d_sae].
        squares: of `norms`, [d_sae].

    Returns:
        float32 [d_in], and the squares of SLICE latents each: [d_sae / SLICE, rounded up].
    """
    rows, latents = triton.cdiv(len(d), SLICE), triton.cdiv(len(enc), SLICE)
    out, sums = (torch.empty(n, device=d.device) for n in ((rows + latents, d.shape[1]), latents))
    block = 512
    _bias_sums[(rows + latents, triton.cdiv(d.shape[1], block))](
        d, enc, biases, scale, squares, out, sums, len(d), len(enc), d.shape[1], d.stride(0), rows,
        SLICE, block, 8, num_warps=2,
    )  # fmt: skip
    return out.sum(0), sums
