"""Triton kernels of the sparse products and of the k largest, for a GPU. [torch, triton]

What sae/sparse.py does with `embedding_bag` and `torch.topk`, which on an H100 take most of a step:
their gradients are dense, and `topk` passes a row once for every two bits. Each result is summed
by one program in one order, so it does not depend on scheduling. Sums are float32, whatever the
dtype of the operands. The tests run the kernels in Triton's interpreter where Triton is installed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 4096  # columns of `largest`: a row is held in registers, and wider ones spill
BLOCK = 512  # columns of a bag's block
ENTRIES, LONG_ENTRIES = 8, 16  # of a bag, and of a piece, loaded at a time
LONG = 64  # entries from which on a bag is summed in pieces of so many


@triton.jit
def _largest(scores, indices, columns, k, WIDTH: tl.constexpr, BITS: tl.constexpr):
    """One row: the k-th largest key bit by bit, then the indices of what is not below it."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    x = tl.load(scores + row * columns + at, mask=at < columns, other=float("-inf"))
    own: tl.constexpr = tl.int16 if BITS == 16 else tl.int32
    bits = x.to(own, bitcast=True).to(tl.int32)
    # two's complement, in the order of the floats; columns that are not there stand below all
    key = tl.where(bits < 0, bits ^ ((1 << (BITS - 1)) - 1), bits)
    key = tl.where(at < columns, key, -(2**31))
    lowest = -(2 ** (BITS - 1))
    found = tl.where(tl.sum((key >= 0).to(tl.int32)) >= k, 0, lowest)
    for i in range(BITS - 1):
        more = found + (1 << (BITS - 2 - i))
        found = tl.where(tl.sum((key >= more).to(tl.int32)) >= k, more, found)
    above, equal = (key > found).to(tl.int32), (key == found).to(tl.int32)
    # one running sum for both counts, the ties in the upper half
    count = tl.cumsum(above + (equal << 16), 0)
    place = tl.where(above > 0, (count & 0xFFFF) - 1, tl.sum(above) + (count >> 16) - 1)
    kept = (above + equal > 0) & (place < k) & (at < columns)
    tl.store(indices + row * k + place, at.to(tl.int64), mask=kept)


def largest(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest of every row, in no order: int64 [rows k].

    Args:
        scores: [rows columns], float32, float16 or bfloat16; at most WIDEST columns. Ties go to
            the first column.
    """
    rows, columns = scores.shape
    out = torch.empty(rows, k, dtype=torch.int64, device=scores.device)
    bits = scores.element_size() * 8
    width = triton.next_power_of_2(columns)
    _largest[(rows,)](scores.contiguous(), out, columns, k, width, bits, num_warps=4)
    return out


@triton.jit
def _sum(index, values, weights, d, at, first, last, BLOCK: tl.constexpr, ENTRIES: tl.constexpr):
    """Sum of values[i] weights[index[i]] over entries first to last - 1, one block of columns."""
    total = tl.zeros([BLOCK], tl.float32)
    for e in range(first, last, ENTRIES):
        entry = e + tl.arange(0, ENTRIES)
        there = entry < last
        rows = tl.load(index + entry, mask=there, other=0).to(tl.int64)
        value = tl.load(values + entry, mask=there, other=0.0).to(tl.float32)
        mask = there[:, None] & (at < d)[None, :]
        w = tl.load(weights + rows[:, None] * d + at[None, :], mask=mask, other=0.0)
        total += tl.sum(w.to(tl.float32) * value[:, None], 0)
    return total


@triton.jit
def _bags(
    index, starts, values, weights, out, d, LONG: tl.constexpr, BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
):  # fmt: skip
    """One block of columns of one bag, unless it is long."""
    bag, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first, last = tl.load(starts + bag), tl.load(starts + bag + 1)
    if last - first < LONG:
        total = _sum(index, values, weights, d, at, first, last, BLOCK, ENTRIES)
        tl.store(out + bag * d + at, total, mask=at < d)


@triton.jit
def _bag_of(starts, n_bags, entry, STEPS: tl.constexpr):
    """The bag of an entry, by bisection."""
    low, high = n_bags * 0, n_bags
    for _ in range(STEPS):
        middle = (low + high) // 2
        begun = tl.load(starts + middle) <= entry
        low, high = tl.where(begun, middle, low), tl.where(begun, high, middle)
    return low


@triton.jit
def _pieces(
    index, starts, values, weights, pieces, n, n_bags, d, STEPS: tl.constexpr, LONG: tl.constexpr,
    BLOCK: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """What LONG entries in a row add to the long bags: there are two at most, as many pieces."""
    chunk, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = chunk * LONG
    last = tl.minimum(first + LONG, n)
    before = tl.full([], -1, tl.int64)
    for side in tl.static_range(2):
        bag = _bag_of(starts, n_bags, last - 1 if side else first, STEPS).to(tl.int64)
        begin, end = tl.load(starts + bag), tl.load(starts + bag + 1)
        if (end - begin >= LONG) & (bag != before):
            low, high = tl.maximum(begin, first), tl.minimum(end, last)
            total = _sum(index, values, weights, d, at, low, high, BLOCK, ENTRIES)
            tl.store(pieces + (2 * chunk + side) * d + at, total, mask=at < d)
        before = bag


@triton.jit
def _join(
    starts, pieces, out, n, n_bags, d, STEPS: tl.constexpr, LONG: tl.constexpr, BLOCK: tl.constexpr
):
    """The long bags that begin among LONG entries in a row, out of their pieces."""
    chunk, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = chunk * LONG
    last = tl.minimum(first + LONG, n)
    before = tl.full([], -1, tl.int64)
    for side in tl.static_range(2):
        bag = _bag_of(starts, n_bags, last - 1 if side else first, STEPS).to(tl.int64)
        begin, end = tl.load(starts + bag), tl.load(starts + bag + 1)
        if (end - begin >= LONG) & (begin >= first) & (bag != before):
            total = tl.load(pieces + (2 * chunk + side) * d + at, mask=at < d)
            for next_chunk in range(chunk + 1, tl.cdiv(end, LONG)):
                total += tl.load(pieces + 2 * next_chunk * d + at, mask=at < d)
            tl.store(out + bag * d + at, total, mask=at < d)
        before = bag


def bags(
    index: Tensor, starts: Tensor, values: Tensor, weights: Tensor, most: int | None = None
) -> Tensor:
    """Sum of values[i] weights[index[i]] over each bag: float32 [bags d].

    A latent that is active on every row has a thousand times the entries of others. Long bags are
    summed in pieces of LONG entries, cut where the list of all entries is cut, and then joined.

    Args:
        index, values: [n].
        starts: int64 [bags + 1], where each bag begins, and n.
        weights: [rows d], contiguous.
        most: entries that a bag has at most, where that is known.
    """
    n, n_bags, d = len(index), len(starts) - 1, weights.shape[1]
    out = torch.empty(n_bags, d, device=weights.device)
    blocks, given = triton.cdiv(d, BLOCK), (index, starts, values, weights.contiguous())
    _bags[(n_bags, blocks)](*given, out, d, LONG, BLOCK, ENTRIES, num_warps=1)
    if min(n, n if most is None else most) >= LONG:
        chunks, steps = triton.cdiv(n, LONG), n_bags.bit_length()
        pieces = torch.empty(chunks, 2, d, device=weights.device)
        how = (n, n_bags, d, steps, LONG, BLOCK)
        _pieces[(chunks, blocks)](*given, pieces, *how, LONG_ENTRIES, num_warps=2)
        _join[(chunks, blocks)](starts, pieces, out, *how, num_warps=1)
    return out


@triton.jit
def _scaled(weights, scale, out, d, WIDTH: tl.constexpr):
    """One row."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    w = tl.load(weights + row * d + at, mask=at < d, other=0.0) * tl.load(scale + row)
    tl.store(out + row * d + at, w.to(out.dtype.element_ty), mask=at < d)


def scaled(weights: Tensor, scale: Tensor) -> Tensor:
    """weights * scale[:, None] in bfloat16, rounded once: [rows d].

    PyTorch's kernel, which broadcasts and converts value by value, takes twice as long.

    Args:
        weights: [rows d], contiguous.
        scale: [rows].
    """
    out = torch.empty_like(weights, dtype=torch.bfloat16)
    rows, d = weights.shape
    _scaled[(rows,)](weights, scale, out, d, triton.next_power_of_2(d), num_warps=4)
    return out


@triton.jit
def _dots(index, starts, left, weights, out, d, WIDTH: tl.constexpr, ENTRIES: tl.constexpr):
    """The entries of one row."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    x = tl.load(left + row * d + at, mask=at < d, other=0.0).to(tl.float32)
    first, last = tl.load(starts + row), tl.load(starts + row + 1)
    for e in range(first, last, ENTRIES):
        entry = e + tl.arange(0, ENTRIES)
        there = entry < last
        rows = tl.load(index + entry, mask=there, other=0).to(tl.int64)
        mask = there[:, None] & (at < d)[None, :]
        w = tl.load(weights + rows[:, None] * d + at[None, :], mask=mask, other=0.0)
        tl.store(out + entry, tl.sum(w.to(tl.float32) * x[None, :], 1), mask=there)


def dots(index: Tensor, starts: Tensor, left: Tensor, weights: Tensor) -> Tensor:
    """left[row] · weights[index[i]] for every entry i of every row: float32 [n].

    Args:
        index: [n].
        starts: int64 [rows + 1], where each row's entries begin, and n.
        left: [rows d].
        weights: [columns d], contiguous.
    """
    d = weights.shape[1]
    out = torch.empty(len(index), device=weights.device)
    width = triton.next_power_of_2(d)
    entries = max(1, 16_384 // width)
    _dots[(len(starts) - 1,)](
        index, starts, left.contiguous(), weights.contiguous(), out, d, width, entries, num_warps=4
    )
    return out
