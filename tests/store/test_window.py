"""The order of rows that are made a window ahead: every row once, never more shards than fit."""

from itertools import takewhile

import numpy as np
import pytest

from pipeline.errors import RetraceError
from pipeline.store.window import Sizes, buffers, number_of, sized

ROWS = [130, 200, 200, 1, 77, 200, 64, 190, 200, 12]


def window(open: int, ahead: int) -> Sizes:
    return Sizes(open, ahead, 1, ROWS, 0)


def drawn(sizes: Sizes, seed: int = 0, n_epochs: int = 2, chunk: int = 16, n_chunks: int = 4):
    """All buffers of some epochs."""
    rows = lambda j: ROWS[number_of(j, seed, sizes)]  # noqa: E731
    found = buffers(seed, sizes, chunk, n_chunks, rows)
    return list(takewhile(lambda b: b.next < n_epochs * len(ROWS) or b.open, found))


@pytest.mark.parametrize(("open", "ahead"), [(1, 1), (3, 1), (5, 4), (10, 9)])
def test_an_epoch_gives_every_row_once(open, ahead):
    sizes = window(open, ahead)
    found = drawn(sizes)
    for epoch in range(2):
        here = range(epoch * len(ROWS), (epoch + 1) * len(ROWS))
        seen = sorted(
            (number_of(j, 0, sizes), row)
            for b in found
            for j, start, stop in b.pieces
            if j in here
            for row in range(start, stop)
        )
        assert seen == [(i, row) for i, n in enumerate(ROWS) for row in range(n)]
    assert sorted(j for b in found for j in b.used) == list(range(2 * len(ROWS)))
    for b in found:
        assert sorted(b.order.tolist()) == list(range(sum(z - a for _, a, z in b.pieces)))


def test_the_order_is_the_seeds_and_mixes_the_open_shards():
    sizes = window(5, 4)
    one, same, other = drawn(sizes), drawn(sizes), drawn(sizes, seed=1)
    assert [b.pieces for b in one] == [b.pieces for b in same]
    assert [b.pieces for b in one] != [b.pieces for b in other]
    assert np.mean([len({j for j, _, _ in b.pieces}) for b in one]) > 2
    firsts = [number_of(j, 0, sizes) for j in range(2 * len(ROWS))]
    assert firsts[:10] != firsts[10:]  # an order for each epoch


@pytest.mark.parametrize(("open", "ahead"), [(1, 1), (1, 2), (2, 3), (3, 1), (5, 8), (10, 2)])
@pytest.mark.parametrize("lag", [1, 3])
def test_neither_side_waits_for_ever(open, ahead, lag):
    """A maker that waits for room, and a reader whose buffers are loaded `lag` late."""
    sizes, made, there, most = window(open, ahead), 0, set(), 0
    rows = lambda j: ROWS[number_of(j, 0, sizes)] if j < made else None  # noqa: E731
    loading, idle = [], 0
    for b in buffers(0, sizes, 16, 4, rows):
        if b is not None:
            assert {j for j, _, _ in b.pieces} <= there
            loading.append(b.used)
            idle = 0
            if b.next >= 3 * len(ROWS):
                break
        if loading and (b is None or len(loading) > lag):
            there -= set(loading.pop(0))
        elif b is None:
            idle += 1
            assert idle < 3, "a deadlock"
        if sizes.capacity - len(there) >= sizes.turn:
            for _ in range(sizes.capacity - len(there)):
                there.add(made)
                made += 1
        most = max(most, len(there))
    assert most <= sizes.capacity


def test_the_window_is_the_largest_that_fits():
    for n in range(2, 30):
        sizes = sized(n * 100 + 99, 100, ROWS, 0)
        assert sizes.capacity <= n and 1 <= sizes.open <= len(ROWS) and sizes.ahead >= 1
    with pytest.raises(RetraceError, match=r"199 bytes hold 1 of the shards of 200 .*shard_rows"):
        sized(199, 100, ROWS, 0)
