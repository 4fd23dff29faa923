"""What a step does with each row of a batch beside the encoder's product. [torch, triton]

    x_c = x - b_dec,   r = a W_dec - x_c,   d = 2 r / B,   g = d W_dec' on active latents

A row's active latents are a few of tens of thousands: their rows of W_dec are read for r, and again
out of the cache for g. Nested dictionaries (sae/steps_batch.py) are levels of a row's entries. Sums
are float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 8192  # weights that a program loads at a time


@triton.jit
def _centred(x, b_dec, out, d, WIDTH: tl.constexpr):
    """One row."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    there = at < d
    value = tl.load(x + row * d + at, mask=there) - tl.load(b_dec + at, mask=there)
    tl.store(out + row * d + at, value.to(out.dtype.element_ty), mask=there)


def centred(x: Tensor, b_dec: Tensor, dtype: torch.dtype) -> Tensor:
    """x - b_dec in a dtype: [rows d_in]."""
    out, d = torch.empty_like(x, dtype=dtype), x.shape[1]
    _centred[(len(x),)](x.contiguous(), b_dec, out, d, triton.next_power_of_2(d), num_warps=4)
    return out


@triton.jit
def _residual(
    latents, acts, starts, x, b_dec, dec, gradient, pulls, about, r_out, k, d, scale, n_levels,
    WIDTH: tl.constexpr, ENTRIES: tl.constexpr, VARIED: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """One row."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    there = at < d
    begun = tl.load(b_dec + at, mask=there, other=0.0)
    begun -= tl.load(x + row * d + at, mask=there, other=0.0)
    active = tl.zeros([ENTRIES], tl.float32)
    r, every = begun, tl.zeros([WIDTH], tl.float32)
    inner = tl.sum(every)
    for level in range(n_levels):
        first, last = row * k, row * k + k
        if VARIED:
            first = tl.load(starts + row * n_levels + level)
            last = tl.load(starts + row * n_levels + level + 1)
        for e in range(first, last, ENTRIES):
            entry = e + tl.arange(0, ENTRIES)
            latent = tl.load(latents + entry, mask=entry < last, other=0).to(tl.int64)
            a = tl.load(acts + entry, mask=entry < last, other=0.0)
            mask = (a > 0)[:, None] & there[None, :]
            w = tl.load(dec + latent[:, None] * d + at[None, :], mask=mask, other=0.0)
            r += tl.sum(w.to(tl.float32) * a[:, None], 0)
            active += (a > 0).to(tl.float32)
        every += r
        inner += tl.where(level + 1 < n_levels, tl.sum(r * r), 0.0)
    tl.store(about + 3 * row, tl.sum(r * r))
    tl.store(about + 3 * row + 1, tl.sum(active))
    tl.store(about + 3 * row + 2, inner)
    if KEEP:
        tl.store(r_out + row * d + at, r, mask=there)
    # `every` becomes the sum over the levels from this one on, which are summed up once more
    r = begun
    for level in range(n_levels):
        first, last = row * k, row * k + k
        if VARIED:
            first = tl.load(starts + row * n_levels + level)
            last = tl.load(starts + row * n_levels + level + 1)
        own = every * scale
        to = (row * n_levels + level) * d + at
        tl.store(gradient + to, own.to(gradient.dtype.element_ty), mask=there)
        for e in range(first, last, ENTRIES):
            entry = e + tl.arange(0, ENTRIES)
            latent = tl.load(latents + entry, mask=entry < last, other=0).to(tl.int64)
            a = tl.load(acts + entry, mask=entry < last, other=0.0)
            mask = (a > 0)[:, None] & there[None, :]
            w = tl.load(dec + latent[:, None] * d + at[None, :], mask=mask, other=0.0)
            w = w.to(tl.float32)
            tl.store(pulls + entry, tl.sum(w * own[None, :], 1), mask=entry < last)
            if VARIED:
                r += tl.sum(w * a[:, None], 0)
        every -= r


def residual(
    latents: Tensor,
    acts: Tensor,
    x: Tensor,
    b_dec: Tensor,
    dec: Tensor,
    *,
    starts: Tensor | None = None,
    n_levels: int = 1,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of the squared errors in reconstructions and activations.

    With levels, nested dictionaries add their errors: r_j is the residual of the entries of levels
    0 to j, and D_j = 2 (r_j + r_(j+1) + ...) / B takes the place of d for an entry of level j.

    Args:
        latents, acts: int32 and float32 [rows k], or [n], row by row, with `starts`.
        x: float32 [rows d_in].
        dec: W_dec in the dtype of operands, [d_sae d_in].
        starts: int64 [rows n_levels + 1], the first entry of each level of each row, then the
            number of entries; default: k of each row.
        keep: give r of the last level as well.

    Returns:
        D in the dtype of operands [rows n_levels d_in]; g, zero where an activation is, float32 as
        `acts`; float32 [rows 3]: |r|^2 of the last level, the number of active latents, and the sum
        of |r_j|^2 of the others; r, float32 [rows d_in].
    """
    rows, d = x.shape
    gradient = torch.empty(rows, n_levels, d, dtype=dec.dtype, device=x.device)
    pulls, about = torch.zeros_like(acts), torch.empty(rows, 3, device=x.device)
    r = torch.empty_like(x) if keep else None
    width = triton.next_power_of_2(d)
    _residual[(rows,)](
        latents, acts, latents if starts is None else starts, x.contiguous(), b_dec, dec, gradient,
        pulls, about, r if keep else about, latents.shape[-1], d, 2 / rows, n_levels, width,
        max(1, TILE // width), starts is not None, keep, num_warps=8 if width > 1024 else 4,
    )  # fmt: skip
    return gradient, pulls, about, r


@triton.jit
def _levels(latents, starts, widths, out, n_levels, LEVELS: tl.constexpr, ENTRIES: tl.constexpr):
    """One row."""
    row, level = tl.program_id(0).to(tl.int64), tl.arange(0, LEVELS)
    first, last = tl.load(starts + row), tl.load(starts + row + 1)
    width = tl.load(widths + level, mask=level < n_levels, other=0)
    below = tl.zeros([LEVELS], tl.int64)
    for e in range(first, last, ENTRIES):
        entry = e + tl.arange(0, ENTRIES)
        latent = tl.load(latents + entry, mask=entry < last, other=2**31 - 1)
        below += tl.sum((latent[:, None] < width[None, :]).to(tl.int64), 0)
    tl.store(out + row * n_levels + 1 + level, first + below, mask=level < n_levels)


def levels(latents: Tensor, starts: Tensor, widths: Tensor) -> Tensor:
    """First entry of each level of each row, then the number of entries: int64 [rows levels + 1].

    Args:
        latents: int32 [n], ascending within a row.
        starts: int64 [rows + 1].
        widths: int32 [levels], rising to d_sae: latents below the first are level 0, and so on.
    """
    rows, n = len(starts) - 1, len(widths)
    out = torch.zeros(rows * n + 1, dtype=torch.int64, device=starts.device)
    _levels[(rows,)](latents, starts, widths, out, n, triton.next_power_of_2(n), 64, num_warps=1)
    return out


@triton.jit
def _sorted(
    order, acts, pulls, row_of, widths, rows, virtual, acts_out, pulls_out, n, k, n_levels,
    latents, BLOCK: tl.constexpr, VARIED: tl.constexpr,
):  # fmt: skip
    """One block of entries."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = i < n
    e = tl.load(order + i, mask=there, other=0)
    row = (e // k).to(tl.int32)
    if VARIED:
        row = tl.load(row_of + e, mask=there, other=0)
        latent, level = tl.load(latents + e, mask=there, other=0), row * 0
        for j in range(n_levels - 1):
            level += (latent >= tl.load(widths + j)).to(tl.int32)
        tl.store(virtual + i, row * n_levels + level, mask=there)
    tl.store(rows + i, row, mask=there)
    tl.store(acts_out + i, tl.load(acts + e, mask=there), mask=there)
    tl.store(pulls_out + i, tl.load(pulls + e, mask=there), mask=there)


def in_order(
    order: Tensor,
    acts: Tensor,
    pulls: Tensor,
    rows: Tensor | None = None,
    latents: Tensor | None = None,
    widths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Entries in another order: their rows, those rows' levels, activations and pulls, [n] each.

    Args:
        order: int64 [n], indices of acts.
        acts, pulls: float32 [rows k], or [n] with `rows`.
        rows, latents: int32 [n], of each entry of acts.
        widths: as of `levels`.

    Returns:
        int32 twice, row and row levels + level; float32 twice.
    """
    n = len(order)
    at = torch.empty(n, dtype=torch.int32, device=order.device)
    virtual = at if rows is None else torch.empty_like(at)
    acts_out, pulls_out = (torch.empty(n, device=order.device) for _ in range(2))
    varied, block = rows is not None, 512
    given = (rows, widths) if varied else (order, order)  # not read
    _sorted[(triton.cdiv(n, block),)](
        order, acts, pulls, *given, at, virtual, acts_out, pulls_out, n, acts.shape[-1],
        len(widths) if varied else 1, latents if varied else order, block, varied, num_warps=4,
    )  # fmt: skip
    return at, virtual, acts_out, pulls_out
