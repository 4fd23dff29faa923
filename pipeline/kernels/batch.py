"""The n largest scores of a whole batch above zero, for a GPU. [torch, triton]

A bfloat16 above zero, read as an integer, is one of 32,767 keys in the order of the floats, so that
the n-th largest can be counted off in place of sorting:

1. A row's columns are cut into slices, and the largest key across them is kept, as in
   choice.py (`_maxima`).
2. The n-th largest of these maxima is found four bits at a time (`_at_least`). No score below it is
   among the n largest, so that from here on few are read.
3. The scores from there on are counted by key, and the counts are added up from above: the key of
   the n-th largest, and how many that equal it are kept (`_counts`, `_cut`).
4. Each row counts what it keeps (`_kept_by_row`), the sums over rows say where its entries begin,
   and it writes them there, latents ascending (`_write`). Of equal scores the first are kept.

Counts are integers, so that the order in which they are added does not matter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.kernels.choice import groups_of as choice_groups

KEYS = 2**15
BLOCK = 4096  # maxima that a program counts
WARPS = 4


@triton.jit
def _key(x):
    """A bfloat16 above zero as an integer, in the order of the floats; any other as 0."""
    bits = x.to(tl.int16, bitcast=True).to(tl.int32)
    return tl.where((bits > 0) & (bits <= 0x7F80), bits, 0)


@triton.jit
def _maxima(scores, out, columns, width, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """One row."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    key = tl.zeros([WIDTH], tl.int32)
    for some in range(0, GROUPS, 4):
        for one in tl.static_range(4):  # four loads on their way at a time
            group = some + one
            there = (at < width) & (group < GROUPS)
            x = tl.load(scores + row * columns + group * width + at, mask=there, other=0.0)
            key = tl.maximum(key, _key(x))
    tl.store(out + row * width + at, key.to(tl.int16), mask=at < width)


@triton.jit
def _found(counts, n, DONE: tl.constexpr):
    """The leading hexadecimal digits of the n-th largest key, out of the counts of `_at_least`."""
    digit, key = tl.arange(0, 16), 0
    for level in tl.static_range(DONE):
        count = tl.load(counts + level * 16 + digit)
        enough = tl.sum(((count >= n) & (digit > 0)).to(tl.int32))
        key += enough << (12 - 4 * level)
    return key


@triton.jit
def _at_least(maxima, counts, n, size, DONE: tl.constexpr, BLOCK: tl.constexpr):
    """Counts the keys that are not below each value of the next digit, over one block."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(maxima + i, mask=i < size, other=-1).to(tl.int32)
    known = _found(counts, n, DONE)
    for digit in tl.static_range(1, 16):
        bound = known + (digit << (12 - 4 * DONE))
        total = tl.sum((key >= bound).to(tl.int32))
        tl.atomic_add(counts + DONE * 16 + digit, total, mask=total > 0, sem="relaxed")


@triton.jit
def _counts(
    scores, maxima, counts, by_key, n, columns, width, GROUPS: tl.constexpr, WIDTH: tl.constexpr
):
    """One row."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    least = tl.maximum(_found(counts, n, 4), 1)
    best = tl.load(maxima + row * width + at, mask=at < width, other=0).to(tl.int32)
    for group in range(GROUPS):
        to = scores + row * columns + group * width + at
        key = _key(tl.load(to, mask=best >= least, other=0.0))
        one = tl.full([WIDTH], 1, tl.int32)
        tl.atomic_add(by_key + key, one, mask=key >= least, sem="relaxed")


@triton.jit
def _cut(by_key, out, n, KEYS: tl.constexpr):
    """The key of the n-th largest, and how many of those that equal it are kept."""
    key = tl.arange(0, KEYS)
    count = tl.load(by_key + key)
    below = tl.cumsum(count, 0) - count
    from_here = tl.sum(count) - below
    last = tl.maximum(tl.sum((from_here >= n).to(tl.int32)) - 1, 1)
    above = tl.sum(tl.where(key > last, count, 0))
    tl.store(out, last)
    tl.store(out + 1, n - above)


@triton.jit
def _kept_by_row(
    scores, maxima, cut, above, equal, columns, width, GROUPS: tl.constexpr, WIDTH: tl.constexpr
):
    """One row."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    last = tl.load(cut)
    best = tl.load(maxima + row * width + at, mask=at < width, other=0).to(tl.int32)
    more, same = tl.zeros([WIDTH], tl.int32), tl.zeros([WIDTH], tl.int32)
    for group in range(GROUPS):
        to = scores + row * columns + group * width + at
        key = _key(tl.load(to, mask=best >= last, other=0.0))
        more += (key > last).to(tl.int32)
        same += (key == last).to(tl.int32)
    tl.store(above + row, tl.sum(more))
    tl.store(equal + row, tl.sum(same))


@triton.jit
def _write(
    scores, maxima, cut, above, equal, norm, starts, latents, rows, kept_scores, acts, columns,
    width, n_rows, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One row; above, equal: sums over the rows to this one."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    last, free = tl.load(cut), tl.load(cut + 1)
    before = tl.load(equal + row - 1, mask=row > 0, other=0)
    place = tl.load(above + row - 1, mask=row > 0, other=0) + tl.minimum(before, free)
    tl.store(starts + row, place.to(tl.int64))
    best = tl.load(maxima + row * width + at, mask=at < width, other=0).to(tl.int32)
    left = tl.maximum(free - before, 0)
    for group in range(GROUPS):
        latent = group * width + at
        x = tl.load(scores + row * columns + latent, mask=best >= last, other=0.0)
        key = _key(x)
        same = (key == last).to(tl.int32)
        kept = ((key > last) | ((same > 0) & (tl.cumsum(same, 0) <= left))).to(tl.int32)
        to = place + tl.cumsum(kept, 0) - 1
        score = x.to(tl.float32)
        size = score / tl.load(norm + latent, mask=kept > 0, other=1.0)
        tl.store(latents + to, latent, mask=kept > 0)
        tl.store(rows + to, latent * 0 + row.to(tl.int32), mask=kept > 0)
        tl.store(kept_scores + to, score, mask=kept > 0)
        tl.store(acts + to, size, mask=kept > 0)
        place += tl.sum(kept)
        left = tl.maximum(left - tl.sum(same), 0)
    if row == n_rows - 1:
        tl.store(starts + n_rows, place.to(tl.int64))


def groups_of(columns: int) -> int | None:
    """How many slices a row is cut into; None if this choice does not suit its shape."""
    return choice_groups(columns, 1)


def largest(
    scores: Tensor, norm: Tensor, n: int, groups: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The n largest scores of a batch that are above zero, row by row, latents ascending.

    Args:
        scores: bfloat16 [rows d_sae].
        norm: float32 [d_sae].
        groups: of `groups_of`.

    Returns:
        latents and rows, int32 [n]; scores and scores / norm, float32 [n]; the first entry of each
        row, then the number of entries, int64 [rows + 1]. Where fewer are above zero, the last
        entries are of row 0 and the last latent, with a score of 0.
    """
    (rows, columns), device = scores.shape, scores.device
    width = columns // groups
    slices = (groups, triton.next_power_of_2(width))
    maxima = torch.empty(rows, width, dtype=torch.int16, device=device)
    _maxima[(rows,)](scores, maxima, columns, width, *slices, num_warps=WARPS)
    counts = torch.zeros(64 + KEYS, dtype=torch.int32, device=device)
    counts, by_key = counts[:64], counts[64:]
    size = maxima.numel()
    for done in range(4):
        _at_least[(triton.cdiv(size, BLOCK),)](
            maxima, counts, n, size, done, BLOCK, num_warps=WARPS
        )
    _counts[(rows,)](scores, maxima, counts, by_key, n, columns, width, *slices, num_warps=WARPS)
    cut, kept = (torch.empty(m, dtype=torch.int32, device=device) for m in (2, 2 * rows))
    _cut[(1,)](by_key, cut, n, KEYS, num_warps=16)
    _kept_by_row[(rows,)](
        scores, maxima, cut, kept[:rows], kept[rows:], columns, width, *slices, num_warps=WARPS
    )
    above, equal = kept.view(2, rows).cumsum(1, dtype=torch.int32)
    latents = torch.full((n,), columns - 1, dtype=torch.int32, device=device)
    row_of = torch.zeros_like(latents)
    values = torch.zeros(2, n, device=device)
    starts = torch.empty(rows + 1, dtype=torch.int64, device=device)
    _write[(rows,)](
        scores, maxima, cut, above, equal, norm, starts, latents, row_of, *values, columns, width,
        rows, *slices, num_warps=WARPS,
    )  # fmt: skip
    return latents, row_of, *values, starts
