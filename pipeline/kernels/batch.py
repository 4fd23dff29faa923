"""The n largest scores of a whole batch above zero, for a GPU. [torch, triton]

A bfloat16 above zero, read as an integer, is one of 32,767 keys in the order of the floats, so that
the n-th largest can be counted off in place of sorting:

1. A row's columns are cut into slices, and the largest key across them is kept, as in choice.py
   (`_maxima`).
2. The n-th largest of these maxima is found four bits at a time (`_at_least`), and the n positions
   with the largest maxima are listed row by row (`_by_row`, `_listed`). They contain the n largest
   scores.
3. Scores at these positions are counted by key, and the counts are added up from above: the key of
   the n-th largest, and how many that equal it are kept (`_counts`, `_cut`).
4. Each part of the list counts what it keeps (`_by_part`), the sums over parts say where its
   entries begin, and it writes them there (`_write`).

Of equal keys the first that are met are kept. Counts are integers, so that the order in which they
are added does not matter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.kernels.choice import groups_of as choice_groups

KEYS = 2**15
BLOCK, TIMES = 1024, 4  # maxima that a program counts at a time, and how often
PART = 128  # positions in a part of the list
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
def _at_least(
    maxima, counts, n, size, DONE: tl.constexpr, BLOCK: tl.constexpr, TIMES: tl.constexpr
):
    """Counts the keys that are not below each value of the next digit, over TIMES blocks."""
    known, digit = _found(counts, n, DONE), tl.arange(0, 16)
    found = tl.zeros([16, BLOCK], tl.int32)
    bound = known + (digit << (12 - 4 * DONE))
    for time in range(TIMES):
        i = (tl.program_id(0) * TIMES + time) * BLOCK + tl.arange(0, BLOCK)
        key = tl.load(maxima + i, mask=i < size, other=-1).to(tl.int32)
        found += (key[None, :] >= bound[:, None]).to(tl.int32)
    tl.atomic_add(counts + DONE * 16 + digit, tl.sum(found, 1), mask=digit > 0, sem="relaxed")


@triton.jit
def _by_row(maxima, counts, n, above, equal, width, WIDTH: tl.constexpr):
    """One row: how many maxima are above the n-th largest, and how many equal it."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    last = tl.maximum(_found(counts, n, 4), 1)
    key = tl.load(maxima + row * width + at, mask=at < width, other=0).to(tl.int32)
    tl.store(above + row, tl.sum((key > last).to(tl.int32)))
    tl.store(equal + row, tl.sum((key == last).to(tl.int32)))


@triton.jit
def _listed(
    maxima, counts, n, above, equal, rows, positions, listed, width, n_rows, WIDTH: tl.constexpr
):
    """One row; above, equal: sums over the rows to this one."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    last = tl.maximum(_found(counts, n, 4), 1)
    free = n - tl.load(above + n_rows - 1)  # places for those that equal the last
    before = tl.load(equal + row - 1, mask=row > 0, other=0)
    place = tl.load(above + row - 1, mask=row > 0, other=0) + tl.minimum(before, free)
    key = tl.load(maxima + row * width + at, mask=at < width, other=0).to(tl.int32)
    same = (key == last).to(tl.int32)
    more = (key > last).to(tl.int32)
    # one running sum for both counts, the ties in the upper half
    count = tl.cumsum(more + (same << 16), 0)
    left = tl.maximum(free - before, 0)
    kept = (more > 0) | ((same > 0) & ((count >> 16) <= left))
    to = place + (count & 0xFFFF) + tl.minimum(count >> 16, left) - 1
    tl.store(rows + to, at * 0 + row.to(tl.int32), mask=kept)
    tl.store(positions + to, at, mask=kept)
    if row == n_rows - 1:
        tl.store(listed, place + tl.sum(kept.to(tl.int32)))


@triton.jit
def _candidates(
    scores, rows, positions, listed, columns, width, GROUPS: tl.constexpr, GROUPS_2: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """Row, latent, score and key of the scores at the positions of a part, position by position."""
    i = tl.program_id(0) * PART + tl.arange(0, PART)
    group = tl.arange(0, GROUPS_2)
    there = (i < tl.load(listed))[:, None] & (group < GROUPS)[None, :]
    row = tl.load(rows + i, mask=i < tl.load(listed), other=0)[:, None] + group[None, :] * 0
    latent = tl.load(positions + i, mask=i < tl.load(listed), other=0)[:, None]
    latent = latent + group[None, :] * width
    x = tl.load(scores + row.to(tl.int64) * columns + latent, mask=there, other=0.0)
    return row, latent, x, _key(x)


@triton.jit
def _counts(
    scores, rows, positions, listed, counts, by_key, n, columns, width, GROUPS: tl.constexpr,
    GROUPS_2: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """One part."""
    least = tl.maximum(_found(counts, n, 4), 1)  # none of the n largest is below it
    _, _, _, key = _candidates(
        scores, rows, positions, listed, columns, width, GROUPS, GROUPS_2, PART
    )
    one = tl.full([PART, GROUPS_2], 1, tl.int32)
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
def _by_part(
    scores, rows, positions, listed, cut, above, equal, columns, width, GROUPS: tl.constexpr,
    GROUPS_2: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """One part: how many scores are above the n-th largest, and how many equal it."""
    last = tl.load(cut)
    _, _, _, key = _candidates(
        scores, rows, positions, listed, columns, width, GROUPS, GROUPS_2, PART
    )
    tl.store(above + tl.program_id(0), tl.sum((key > last).to(tl.int32)))
    tl.store(equal + tl.program_id(0), tl.sum((key == last).to(tl.int32)))


@triton.jit
def _write(
    scores, rows, positions, listed, cut, above, equal, norm, latents, row_of, kept_scores, acts,
    columns, width, GROUPS: tl.constexpr, GROUPS_2: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """One part; above, equal: sums over the parts to this one."""
    part, last, free = tl.program_id(0), tl.load(cut), tl.load(cut + 1)
    before = tl.load(equal + part - 1, mask=part > 0, other=0)
    place = tl.load(above + part - 1, mask=part > 0, other=0) + tl.minimum(before, free)
    row, latent, x, key = _candidates(
        scores, rows, positions, listed, columns, width, GROUPS, GROUPS_2, PART
    )
    row, latent = tl.reshape(row, [PART * GROUPS_2]), tl.reshape(latent, [PART * GROUPS_2])
    score = tl.reshape(x.to(tl.float32), [PART * GROUPS_2])
    key = tl.reshape(key, [PART * GROUPS_2])
    more, same = (key > last).to(tl.int32), (key == last).to(tl.int32)
    count = tl.cumsum(more + (same << 16), 0)
    left = tl.maximum(free - before, 0)
    kept = (more > 0) | ((same > 0) & ((count >> 16) <= left))
    to = place + (count & 0xFFFF) + tl.minimum(count >> 16, left) - 1
    tl.store(latents + to, latent, mask=kept)
    tl.store(row_of + to, row, mask=kept)
    tl.store(kept_scores + to, score, mask=kept)
    tl.store(acts + to, score / tl.load(norm + latent, mask=kept, other=1.0), mask=kept)


def groups_of(columns: int) -> int | None:
    """How many slices a row is cut into; None if this choice does not suit its shape."""
    return choice_groups(columns, 1)


def largest(
    scores: Tensor, norm: Tensor, n: int, groups: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The n largest scores of a batch that are above zero, row by row.

    Args:
        scores: bfloat16 [rows d_sae].
        norm: float32 [d_sae].
        groups: of `groups_of`.

    Returns:
        latents and rows, int32 [n]; scores and scores / norm, float32 [n]. Where fewer are above
        zero, the last entries are of the last row and latent, with a score of 0.
    """
    (rows, columns), device, integers = scores.shape, scores.device, {"dtype": torch.int32}
    width = columns // groups
    wide = triton.next_power_of_2(width)
    maxima = torch.empty(rows, width, dtype=torch.int16, device=device)
    _maxima[(rows,)](scores, maxima, columns, width, groups, wide, num_warps=WARPS)
    counts = torch.zeros(64 + KEYS, device=device, **integers)
    counts, by_key = counts[:64], counts[64:]
    size = maxima.numel()
    for done in range(4):
        _at_least[(triton.cdiv(size, BLOCK * TIMES),)](
            maxima, counts, n, size, done, BLOCK, TIMES, num_warps=8
        )
    in_rows = torch.empty(2, rows, device=device, **integers)
    _by_row[(rows,)](maxima, counts, n, *in_rows, width, wide, num_warps=WARPS)
    sums = in_rows.cumsum(1, **integers)
    where, listed = torch.empty(2, n, device=device, **integers), counts.new_empty(1)
    _listed[(rows,)](maxima, counts, n, *sums, *where, listed, width, rows, wide, num_warps=WARPS)
    parts = triton.cdiv(n, PART)
    given = (scores, *where, listed)
    shape = (columns, width, groups, triton.next_power_of_2(groups), PART)
    _counts[(parts,)](*given, counts, by_key, n, *shape, num_warps=WARPS)
    cut, in_parts = counts.new_empty(2), torch.empty(2, parts, device=device, **integers)
    _cut[(1,)](by_key, cut, n, KEYS, num_warps=16)
    _by_part[(parts,)](*given, cut, *in_parts, *shape, num_warps=WARPS)
    sums = in_parts.cumsum(1, **integers)
    latents, row_of = (torch.full((n,), m - 1, device=device, **integers) for m in (columns, rows))
    values = torch.zeros(2, n, device=device)
    _write[(parts,)](*given, cut, *sums, norm, latents, row_of, *values, *shape, num_warps=WARPS)
    return latents, row_of, *values
