"""The k largest scores of a row, for a GPU. [torch, triton]

`torch.topk` passes a row once for every two bits. Here a row is read once:

1. Its columns are cut into slices, and the maximum is taken across them. The k positions
   within a slice with the largest maxima contain the k largest scores (`positions`).
2. Of the scores at these positions in all slices the k largest are kept (`largest_of`).

Both find the k-th largest value bit by bit, in registers. Ties go to the first that is met.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 4096  # columns that a program holds in registers; wider rows spill
WIDTH, GROUPS = 2048, 16  # width of a slice where that divides columns; else slices, at least
WARPS = 4


@triton.jit
def _key(x, BITS: tl.constexpr):
    """A float's bits as an integer, in the order of the floats."""
    own: tl.constexpr = tl.int16 if BITS == 16 else tl.int32
    bits = x.to(own, bitcast=True).to(tl.int32)
    return tl.where(bits < 0, bits ^ ((1 << (BITS - 1)) - 1), bits)


@triton.jit
def _places(key, k, BITS: tl.constexpr):
    """Place of each of the k largest keys among them, and which these are."""
    lowest = -(2 ** (BITS - 1))
    found = tl.where(tl.sum((key >= 0).to(tl.int32)) >= k, 0, lowest)
    for i in range(BITS - 1):
        more = found + (1 << (BITS - 2 - i))
        found = tl.where(tl.sum((key >= more).to(tl.int32)) >= k, more, found)
    above, equal = (key > found).to(tl.int32), (key == found).to(tl.int32)
    # one running sum for both counts, the ties in the upper half
    count = tl.cumsum(above + (equal << 16), 0)
    place = tl.where(above > 0, (count & 0xFFFF) - 1, tl.sum(above) + (count >> 16) - 1)
    return place, (above + equal > 0) & (place < k)


@triton.jit
def _positions(
    scores, out, columns, width, k, GROUPS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr
):
    """One row."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    most = tl.full([WIDTH], float("-inf"), tl.float32)
    for some in range(0, GROUPS, 4):
        for one in tl.static_range(4):  # four loads on their way at a time
            group = some + one
            to = row * columns + group * width + at
            there = (at < width) & (group < GROUPS)
            x = tl.load(scores + to, mask=there, other=float("-inf"))
            most = tl.maximum(most, x.to(tl.float32))
    key = tl.where(at < width, _key(most.to(scores.dtype.element_ty), BITS), -(2**31))
    place, kept = _places(key, k, BITS)
    tl.store(out + row * k + place, at, mask=kept & (at < width))


@triton.jit
def _largest_of(
    scores, positions, norm, latents, acts, columns, width, k, N: tl.constexpr, WIDTH: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """One row."""
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    there = i < N
    at = tl.load(positions + row * k + i % k, mask=there, other=0) + (i // k) * width
    x = tl.load(scores + row * columns + at, mask=there, other=float("-inf"))
    key = tl.where(there, _key(x, BITS), -(2**31))
    place, kept = _places(key, k, BITS)
    kept = kept & there
    size = tl.maximum(x.to(tl.float32), 0.0) / tl.load(norm + at, mask=kept, other=1.0)
    tl.store(latents + row * k + place, at, mask=kept)
    tl.store(acts + row * k + place, size, mask=kept)


def groups_of(columns: int, k: int) -> int | None:
    """How many slices a row is cut into; None if this choice does not suit its shape.

    A slice is a power of two wide where columns allow it: programs work on so many.
    """
    width = min(columns & -columns, WIDTH)
    if columns // width * k > WIDEST // 4 and columns % (2 * WIDTH) == 0:
        width = 2 * WIDTH  # fewer scores are compared in the end
    groups = columns // width
    if not (width >= k and groups >= 4 and groups * k <= 2 * WIDEST):
        groups = max(GROUPS, triton.cdiv(columns, WIDEST))
    fits = columns % groups == 0 and columns // groups >= k and groups * k <= 2 * WIDEST
    return groups if fits else None


def largest(scores: Tensor, norm: Tensor, k: int, groups: int) -> tuple[Tensor, Tensor]:
    """The latents of the k largest scores of every row, and relu(score) / norm: [rows k] each.

    Args:
        scores: [rows d_sae], float32, float16 or bfloat16.
        norm: float32 [d_sae].
        groups: of `groups_of`.

    Returns:
        int32 and float32, in no order.
    """
    rows, columns = scores.shape
    width, bits = columns // groups, scores.element_size() * 8
    among = triton.next_power_of_2(groups * k)
    positions, latents = (
        torch.empty(rows, k, dtype=torch.int32, device=scores.device) for _ in range(2)
    )
    acts = torch.empty(rows, k, device=scores.device)
    _positions[(rows,)](
        scores, positions, columns, width, k, groups, triton.next_power_of_2(width), bits,
        num_warps=WARPS,
    )  # fmt: skip
    _largest_of[(rows,)](
        scores, positions, norm, latents, acts, columns, width, k, groups * k,
        among, bits, num_warps=min(max(among // 512, 1), 8),
    )  # fmt: skip
    return latents, acts
