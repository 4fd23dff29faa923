"""JumpReLU of many active latents: what lies between its dense products, for a GPU. [torch, triton]

With p the pre-activations, theta the thresholds, g the pull d W_dec' and w the bandwidth
(sae/steps_gates.py), a latent is active where p > theta, and near where |p - theta| < w / 2:

    a = p on active ones,   pseudo = (theta g + l0) / w on near ones,
    the gradient in p = g on active ones (+ pseudo),   in theta = -sum of pseudo over rows

PyTorch passes a matrix [batch d_sae] twenty times for this; here it is passed twice.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows that a program sums; rows and columns that it loads at a time: a thread holds eight columns
# of all of these rows, so that it adds them up alone.
ROWS, TILE, BLOCK = 128, 4, 1024


@triton.jit
def _opened(p, theta, out, columns, BLOCK: tl.constexpr):
    """One block of one row."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < columns
    x = tl.load(p + row * columns + at, mask=there, other=0.0)
    on = x.to(tl.float32) > tl.load(theta + at, mask=there, other=0.0)
    tl.store(out + row * columns + at, tl.where(on, x, 0.0), mask=there)


def opened(p: Tensor, theta: Tensor, out: Tensor) -> Tensor:
    """p where it is above theta, else 0, written to `out`: [batch d_sae]."""
    (rows, columns), block = p.shape, 4096
    _opened[(rows, triton.cdiv(columns, block))](p, theta, out, columns, block, num_warps=4)
    return out


@triton.jit
def _pulled(
    p, g, theta, pseudos, pulls, counts, rows, columns, l0, width, ROWS: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, TO_INPUT: tl.constexpr,
):  # fmt: skip
    """One block of columns of ROWS rows."""
    part, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    bound = tl.load(theta + at, mask=at < columns, other=0.0)[None, :]
    first, second = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    third = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, ROWS, TILE):
        row = part * ROWS + begin + tl.arange(0, TILE)
        to = row[:, None] * columns + at[None, :]
        there = (row < rows)[:, None] & (at < columns)[None, :]
        above = tl.load(p + to, mask=there, other=float("-inf")).to(tl.float32) - bound
        pull = tl.load(g + to, mask=there, other=0.0).to(tl.float32)
        near = (above > -width / 2) & (above < width / 2)
        pseudo = tl.where(near, (pull * bound + l0) / width, 0.0)
        pull = tl.where(above > 0, pull, 0.0)
        if TO_INPUT:
            pull += pseudo
        tl.store(g + to, pull.to(g.dtype.element_ty), mask=there)
        first += tl.sum(pseudo, 0)
        second += tl.sum(pull, 0)
        third += tl.sum((above > 0).to(tl.float32), 0)
    tl.store(pseudos + part * columns + at, first, mask=at < columns)
    tl.store(pulls + part * columns + at, second, mask=at < columns)
    tl.store(counts + part * columns + at, third, mask=at < columns)


def pulled_(
    p: Tensor, g: Tensor, theta: Tensor, *, l0: float, width: float, to_input: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Make the pull g the gradient in p, in place.

    Args:
        p, g: [batch d_sae].
        theta: float32 [d_sae].
        l0: the coefficient of L0 divided by the number of rows.
        width: the bandwidth.
        to_input: whether the pseudo-derivative is a part of the gradient in p.

    Returns:
        Sums over rows of the pseudo-derivative, of the gradient in p, and of active latents:
        float32 [d_sae] each.
    """
    rows, columns = p.shape
    parts = triton.cdiv(rows, ROWS)
    sums = torch.empty(3, parts, columns, device=p.device)
    _pulled[(parts, triton.cdiv(columns, BLOCK))](
        p, g, theta, *sums, rows, columns, l0, width, ROWS, TILE, BLOCK, to_input, num_warps=4
    )
    return sums.sum(1).unbind()
