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

from pipeline.kernels.bags import bags

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
    latents, acts, x, b_dec, dec, gradient, pulls, about, r_out, k, d, scale, WIDTH: tl.constexpr,
    ENTRIES: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """One row."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    there = at < d
    r = tl.load(b_dec + at, mask=there, other=0.0)
    r -= tl.load(x + row * d + at, mask=there, other=0.0)
    active = tl.zeros([ENTRIES], tl.float32)
    for e in range(0, k, ENTRIES):
        entry = e + tl.arange(0, ENTRIES)
        latent = tl.load(latents + row * k + entry, mask=entry < k, other=0).to(tl.int64)
        a = tl.load(acts + row * k + entry, mask=entry < k, other=0.0)
        mask = (a > 0)[:, None] & there[None, :]
        w = tl.load(dec + latent[:, None] * d + at[None, :], mask=mask, other=0.0)
        r += tl.sum(w.to(tl.float32) * a[:, None], 0)
        active += (a > 0).to(tl.float32)
    tl.store(about + 3 * row, tl.sum(r * r))
    tl.store(about + 3 * row + 1, tl.sum(active))
    tl.store(about + 3 * row + 2, 0.0)
    if KEEP:
        tl.store(r_out + row * d + at, r, mask=there)
    r *= scale
    tl.store(gradient + row * d + at, r.to(gradient.dtype.element_ty), mask=there)
    for e in range(0, k, ENTRIES):
        entry = e + tl.arange(0, ENTRIES)
        latent = tl.load(latents + row * k + entry, mask=entry < k, other=0).to(tl.int64)
        a = tl.load(acts + row * k + entry, mask=entry < k, other=0.0)
        mask = (a > 0)[:, None] & there[None, :]
        w = tl.load(dec + latent[:, None] * d + at[None, :], mask=mask, other=0.0)
        tl.store(pulls + row * k + entry, tl.sum(w.to(tl.float32) * r[None, :], 1), mask=entry < k)


def residual(
    latents: Tensor, acts: Tensor, x: Tensor, b_dec: Tensor, dec: Tensor, *, keep: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of the squared error in reconstructions and activations.

    Args:
        latents, acts: int32 and float32 [rows k].
        x: float32 [rows d_in].
        dec: W_dec in the dtype of operands, [d_sae d_in].
        keep: give r as well.

    Returns:
        d in the dtype of operands [rows d_in]; g, zero where an activation is, float32 [rows k];
        |r|^2, the number of active latents, and 0: float32 [rows 3]; r, float32 [rows d_in].
    """
    (rows, d), k = x.shape, latents.shape[1]
    gradient, pulls = torch.empty_like(x, dtype=dec.dtype), torch.empty_like(acts)
    about, r = torch.empty(rows, 3, device=x.device), torch.empty_like(x) if keep else None
    width = triton.next_power_of_2(d)
    _residual[(rows,)](
        latents, acts, x.contiguous(), b_dec, dec, gradient, pulls, about, r if keep else about,
        k, d, 2 / rows, width, max(1, TILE // width), keep, num_warps=8 if width > 1024 else 4,
    )  # fmt: skip
    return gradient, pulls, about, r


@triton.jit
def _nested(
    decoded, acts, starts, x, b_dec, gradient, about, r_out, d, scale, n_levels,
    WIDTH: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """One row."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    there = at < d
    begun = tl.load(b_dec + at, mask=there, other=0.0)
    begun -= tl.load(x + row * d + at, mask=there, other=0.0)
    r, every = begun, tl.zeros([WIDTH], tl.float32)
    inner = tl.sum(every)
    for level in range(n_levels):
        to = (row * n_levels + level) * d + at
        r += tl.load(decoded + to, mask=there, other=0.0)
        every += r
        inner += tl.where(level + 1 < n_levels, tl.sum(r * r), 0.0)
    first, last = tl.load(starts + row * n_levels), tl.load(starts + (row + 1) * n_levels)
    active = tl.zeros([128], tl.float32)
    for e in range(first, last, 128):
        entry = e + tl.arange(0, 128)
        active += (tl.load(acts + entry, mask=entry < last, other=0.0) > 0).to(tl.float32)
    tl.store(about + 3 * row, tl.sum(r * r))
    tl.store(about + 3 * row + 1, tl.sum(active))
    tl.store(about + 3 * row + 2, inner)
    if KEEP:
        tl.store(r_out + row * d + at, r, mask=there)
    # `every` becomes the sum over the levels from this one on, which are summed up once more
    r = begun
    for level in range(n_levels):
        to = (row * n_levels + level) * d + at
        tl.store(gradient + to, (every * scale).to(gradient.dtype.element_ty), mask=there)
        r += tl.load(decoded + to, mask=there, other=0.0)
        every -= r


@triton.jit
def _pulls(
    latents, virtual, acts, gradient, dec, out, n, d, ENTRIES: tl.constexpr, BLOCK: tl.constexpr
):
    """Some entries."""
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    a = tl.load(acts + entry, mask=entry < n, other=0.0)
    latent = tl.load(latents + entry, mask=entry < n, other=0).to(tl.int64)
    row = tl.load(virtual + entry, mask=entry < n, other=0).to(tl.int64)
    total = tl.zeros([ENTRIES, BLOCK], tl.float32)
    for begin in range(0, d, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        mask = (a > 0)[:, None] & (at < d)[None, :]
        w = tl.load(dec + latent[:, None] * d + at[None, :], mask=mask, other=0.0)
        g = tl.load(gradient + row[:, None] * d + at[None, :], mask=mask, other=0.0)
        total += w.to(tl.float32) * g.to(tl.float32)
    tl.store(out + entry, tl.sum(total, 1), mask=entry < n)


def nested(
    latents: Tensor,
    virtual: Tensor,
    acts: Tensor,
    starts: Tensor,
    x: Tensor,
    b_dec: Tensor,
    dec: Tensor,
    *,
    n_levels: int,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`residual` of rows with any number of entries, and of nested dictionaries.

    These add their errors: r_j is the residual of the entries of levels 0 to j, and
    D_j = 2 (r_j + r_(j+1) + ...) / B takes the place of d for an entry of level j.

    Args:
        latents, acts: int32 and float32 [n], row by row and level by level.
        virtual: int32 [n], row n_levels + level of each entry.
        starts: int64 [rows n_levels + 1], the first entry of each level of each row, then the
            number of entries.
        x, b_dec, dec, keep: as of `residual`.

    Returns:
        D in the dtype of operands [rows n_levels d_in]; g, zero where an activation is, float32
        [n]; float32 [rows 3]: |r|^2 of the last level, the number of active latents, and the sum
        of |r_j|^2 of the others; r of the last level, float32 [rows d_in].
    """
    (rows, d), n, device = x.shape, len(acts), x.device
    decoded = bags(latents, starts, acts, dec)
    gradient = torch.empty(rows, n_levels, d, dtype=dec.dtype, device=device)
    about, r = torch.empty(rows, 3, device=device), torch.empty_like(x) if keep else None
    width = triton.next_power_of_2(d)
    _nested[(rows,)](
        decoded, acts, starts, x.contiguous(), b_dec, gradient, about, r if keep else about, d,
        2 / rows, n_levels, width, keep, num_warps=8 if width > 1024 else 4,
    )  # fmt: skip
    pulls, entries = torch.empty_like(acts), 8
    _pulls[(triton.cdiv(n, entries),)](
        latents, virtual, acts, gradient, dec, pulls, n, d, entries, 256, num_warps=1
    )
    return gradient, pulls, about, r


@triton.jit
def _sorted(
    order, acts, pulls, rows, virtual, at_out, virtual_out, acts_out, pulls_out, n, k,
    BLOCK: tl.constexpr, VARIED: tl.constexpr,
):  # fmt: skip
    """One block of entries."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = i < n
    e = tl.load(order + i, mask=there, other=0)
    if VARIED:
        tl.store(at_out + i, tl.load(rows + e, mask=there), mask=there)
        tl.store(virtual_out + i, tl.load(virtual + e, mask=there), mask=there)
    else:
        tl.store(at_out + i, (e // k).to(tl.int32), mask=there)
    tl.store(acts_out + i, tl.load(acts + e, mask=there), mask=there)
    tl.store(pulls_out + i, tl.load(pulls + e, mask=there), mask=there)


def in_order(
    order: Tensor,
    acts: Tensor,
    pulls: Tensor,
    rows: Tensor | None = None,
    virtual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Entries in another order: rows, rows with levels, activations and pulls, [n] each.

    Args:
        order: int64 [n], indices of acts.
        acts, pulls: float32 [rows k], or [n] with `rows`.
        rows, virtual: int32 [n], the row of each entry of acts, and row n_levels + level.
    """
    n, varied, block = len(order), rows is not None, 512
    at = torch.empty(n, dtype=torch.int32, device=order.device)
    virtual_out = torch.empty_like(at) if varied else at
    acts_out, pulls_out = (torch.empty(n, device=order.device) for _ in range(2))
    given = (rows, virtual) if varied else (order, order)  # not read
    _sorted[(triton.cdiv(n, block),)](
        order, acts, pulls, *given, at, virtual_out, acts_out, pulls_out, n, acts.shape[-1], block,
        varied, num_warps=4,
    )  # fmt: skip
    return at, virtual_out, acts_out, pulls_out
