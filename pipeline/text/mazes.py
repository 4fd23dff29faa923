"""Mazes on lattices of up to 8 x 8 cells, many at once, with the tokens of maze-dataset.

Cell `row * size + column` is a bit of one 64-bit word a maze: `right` holds the cells that are
connected to the next in their row, `down` those to the one below, and a flood moves along all
connections by four shifts. Connections are numbered: all cells for `down`, then all for `right`.

Algorithms and tokens are those of maze-dataset 1.4.2 (MIT; arXiv 2309.10498), mode AOTP_UT_uniform:
tests/replications/test_mazes_dataset.py gives both the same random numbers, and finds the same
mazes. As there, no search starts in the last row or column. Of several shortest paths
ours may be another.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from pipeline.errors import RetraceError, nearest

CHUNK = 4096  # mazes that are made at once by one thread
BLOCK = 1 << 15  # mazes that are written at once by one
U = np.uint64
ONE = U(1)
SPECIAL = ("<ADJLIST_START>", "<ADJLIST_END>", "<TARGET_START>", "<TARGET_END>", "<ORIGIN_START>",
           "<ORIGIN_END>", "<PATH_START>", "<PATH_END>", "<-->", ";", "<PADDING>")  # fmt: skip
(LIST_START, LIST_END, TARGET_START, TARGET_END, ORIGIN_START, ORIGIN_END, PATH_START, PATH_END,
 CONNECTOR, SEMICOLON, PADDING) = range(len(SPECIAL))  # fmt: skip
STEPS = ((0, 1), (0, -1), (1, 0), (-1, 0))  # the package's order of a cell's neighbours
TREES = (
    "forkless",
    "depth_first",
    "sparse",
)  # a hallway; all cells (RDFS); some cells, half or more
KINDS = (*TREES, "percolated", "percolation")  # RDFS and other connections (pRDFS); these alone
PERCOLATED, PERCOLATION = (
    0.1,
    0.4,
)  # probability of a connection: the paper's, the package's default


class Mazes(NamedTuple):
    """Mazes with their solutions."""

    size: int
    right: np.ndarray  # words uint64 [n]
    down: np.ndarray
    origin: np.ndarray  # cells, int64 [n]
    target: np.ndarray
    path: np.ndarray  # cells of a shortest path with both ends, -1 behind it, int8 [n cells]

    @property
    def n(self) -> int:
        return len(self.path)

    @property
    def length(self) -> np.ndarray:
        """Cells of each path."""
        return (self.path >= 0).sum(1)

    def rows(self, which: Any) -> "Mazes":
        """The same of some mazes."""
        return Mazes(self.size, *(x[which] for x in self[1:]))

    def connections(self) -> np.ndarray:
        """Which connections there are, bool [n 2*cells]."""
        return np.concatenate([bits(self.down, self.size), bits(self.right, self.size)], 1)


def bits(words: np.ndarray, size: int) -> np.ndarray:
    """The cells of words, bool [... cells]."""
    return (words[..., None] >> np.arange(size * size, dtype=U) & ONE).astype(bool)


@cache
def neighbours(size: int) -> np.ndarray:
    """Cells beside each cell, in the order of STEPS, -1 outside, int64 [cells 4]."""
    if not 2 <= size <= 8:
        raise RetraceError(f"size: {size} cells a side; mazes have 2 to 8")
    row, column = np.divmod(np.arange(size * size), size)
    places = [(row + r, column + c) for r, c in STEPS]
    return np.stack([np.where((r % size == r) & (c % size == c), r * size + c, -1)
                     for r, c in places], 1)  # fmt: skip


@cache
def inside(size: int) -> np.ndarray:
    """Numbers of the connections that the lattice has."""
    return np.flatnonzero(np.concatenate([neighbours(size)[:, k] >= 0 for k in (2, 0)]))


def flood(cells: np.ndarray, right: np.ndarray, down: np.ndarray, size: int) -> np.ndarray:
    """Words of the cells at 0, 1, 2, ... steps of `cells`, uint64 [steps n]."""
    n, front = U(size), ONE << cells.astype(U)
    layers, seen = [front], front
    while front.any():
        along = (front & right) << ONE | (front >> ONE) & right
        front = (along | (front & down) << n | (front >> n) & down) & ~seen
        layers.append(front)
        seen = seen | front
    return np.stack(layers)


def depth_first(
    start: np.ndarray, u: np.ndarray, size: int, *, forks: bool, cells: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(right, down) of randomised depth-first searches.

    Args:
        start: the first cell, [n].
        u: draw k chooses the (k+2)-th cell among the free neighbours, [n cells-1].
        forks: whether a cell is come back to.
        cells: cells at which a search stops, [n].
    """
    near, n = neighbours(size), len(start)
    bit = np.where(near >= 0, ONE << near.clip(0).astype(U), U(0))
    seen, right, down = ONE << start.astype(U), np.zeros(n, U), np.zeros(n, U)
    stack = np.zeros((n, size * size + 1), np.int8)
    stack[:, 0], height, reached = start, np.ones(n, np.int64), np.ones(n, np.int64)
    while (live := np.flatnonzero((height > 0) & (reached < cells))).size:
        height[live] -= 1
        here = stack[live, height[live]]
        free = (bit[here] & ~seen[live, None]) != 0
        count = free.sum(1)
        go = count > 0
        live, here, free, count = live[go], here[go], free[go], count[go]
        k = (free.cumsum(1) > (u[live, reached[live] - 1] * count).astype(int)[:, None]).argmax(1)
        there = near[here, k]
        height[live] += (count > 1) & forks  # `here` stays below, to be come back to
        stack[live, height[live]] = there
        height[live] += 1
        low = ONE << np.minimum(here, there).astype(U)
        right[live] |= np.where(k < 2, low, U(0))
        down[live] |= np.where(k < 2, U(0), low)
        seen[live] |= ONE << there.astype(U)
        reached[live] += 1
    return right, down


def percolate(u: np.ndarray, p: float, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(right, down) where u < p, of draws [n 2 cells], those of `down` first."""
    there = np.zeros((len(u), 2 * size * size), bool)
    there[:, inside(size)] = (u < p).reshape(len(u), -1)[:, inside(size)]
    bit = ONE << np.arange(size * size, dtype=U)
    down, right = (there.reshape(u.shape) * bit).sum(2, dtype=U).T
    return right, down


def solve(right: np.ndarray, down: np.ndarray, origin: np.ndarray, target: np.ndarray,
          size: int) -> Mazes:  # fmt: skip
    """Mazes with a shortest path each; of several, one by the order of STEPS.

    Raises:
        RetraceError: names the first maze without a path.
    """
    layers, near, every = flood(target, right, down, size), neighbours(size), np.arange(len(origin))
    at = (layers >> origin.astype(U) & ONE).astype(bool)
    if (lost := np.flatnonzero(~at.any(0))).size:
        first, last = (tuple(divmod(int(cell[lost[0]]), size)) for cell in (origin, target))
        raise RetraceError(
            f"maze {lost[0]}: no path leads from {first} to {last}; connect them or choose others"
        )
    left, here = at.argmax(0), origin.astype(np.int64)
    path = np.full((len(origin), size * size), -1, np.int8)
    path[:, 0] = here
    for step in range(1, int(left.max(initial=0)) + 1):
        found, ahead = here, layers[(left - 1).clip(0), every]
        for k, links in enumerate((right, right, down, down)):
            there = near[here, k].clip(0).astype(U)
            joined = links >> np.minimum(here.astype(U), there) & ahead >> there & ONE
            found = np.where((near[here, k] >= 0) & (joined > 0) & (left > 0), near[here, k], found)
        path[left > 0, step], here, left = found[left > 0], found, (left - 1).clip(0)
    return Mazes(size, right, down, origin, target, path)


def chunk(kind: str, size: int, shortest: int, rng: np.random.Generator) -> Mazes:
    """Of CHUNK random mazes those whose path has `shortest` cells or more."""
    n, square, most = CHUNK, size * size, max(size - 1, 1)
    start = rng.integers(0, most, n) * size + rng.integers(0, most, n)
    right = down = np.zeros(n, U)
    if kind != "percolation":
        cells = rng.integers(-(-square // 2), square + 1, n) if kind == "sparse" else square
        u = rng.random((n, square - 1))
        right, down = depth_first(start, u, size, forks=kind != "forkless", cells=cells)
    if kind not in TREES:
        p = PERCOLATED if kind == "percolated" else PERCOLATION
        more = percolate(rng.random((n, 2, square)), p, size)
        right, down = right | more[0], down | more[1]
    reached = bits(np.bitwise_or.reduce(flood(start, right, down, size)), size)
    rank = rng.random((n, square)) * reached
    keep = reached.sum(1) > 1  # a cell by itself has no path
    target, origin = np.argsort(rank[keep], 1)[:, -2:].T
    made = solve(right[keep], down[keep], origin, target, size)
    return made.rows(made.length >= shortest)


def mazes(kind: str, n: int, size: int, shortest: int, seed: int) -> Mazes:
    """n random mazes of one of KINDS, which do not depend on the number of cores.

    Args:
        shortest: cells of a path, at least; others are drawn again.

    Raises:
        RetraceError: another kind, or no path of that length.
    """
    if kind not in KINDS:
        raise RetraceError(f"kind: no mazes '{kind}'{nearest(kind, KINDS)}")
    made: list[Mazes] = []
    n_threads = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(n_threads) as threads:
        while sum(m.n for m in made) < n:
            seeds = [[seed, KINDS.index(kind), len(made) + i] for i in range(n_threads)]
            draws = map(np.random.default_rng, seeds)
            made += threads.map(lambda rng: chunk(kind, size, shortest, rng), draws)
            if not any(m.n for m in made):
                raise RetraceError(f"shortest: no {kind} maze of {size} x {size} has a path of "
                                   f"{shortest} cells; lower it")  # fmt: skip
    return Mazes(size, *(np.concatenate(x)[:n] for x in list(zip(*made, strict=True))[1:]))


# --- tokens --------------------------------------------------------------------------------


@cache
def cell_tokens(size: int) -> np.ndarray:
    """The token of each cell, int64 [cells]; smaller mazes have the same tokens for theirs."""
    cells = [(r, c) for r in range(size) for c in range(size)]
    inwards = sorted(cells, key=lambda x: (max(x), x if x[0] % 2 == 0 else x[::-1]))
    return np.array([len(SPECIAL) + inwards.index(cell) for cell in cells])


@cache
def token_cells(size: int) -> np.ndarray:
    """The cell of each token, -1 of others."""
    cells = np.argsort(cell_tokens(size))
    return np.concatenate([np.full(len(SPECIAL), -1), cells])


def longest(kind: str, size: int) -> int:
    """Tokens of the longest sequence."""
    return 4 * (size**2 - 1 if kind in TREES else 2 * size * (size - 1)) + 10 + size**2


def tokens(found: Mazes, keys: np.ndarray, flips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(tokens uint8 [n longest], PADDING at the end; place of <PATH_START> [n]).

    Args:
        keys: connections stand in the order of these numbers, [n 2*cells].
        flips: above 0.5, the later cell of a connection is named first, [n 2*cells].
    """
    size, square, there = found.size, found.size**2, found.connections()
    token, n_edges, rows = cell_tokens(size), there.sum(1), np.arange(found.n)
    order = np.where(there, keys, np.inf).argsort(1)[:, : int(n_edges.max(initial=0))]
    low = order % square
    cells = np.stack([low, np.where(order < square, low + size, low + 1).clip(max=square - 1)], -1)
    turn = np.take_along_axis(flips, order, 1) > 0.5
    body = np.empty((*order.shape, 4), np.uint8)
    body[..., ::2] = token[np.where(turn[..., None], cells[..., ::-1], cells)]
    body[..., 1], body[..., 3] = CONNECTOR, SEMICOLON
    out = np.full((found.n, body[0].size + 10 + square), PADDING, np.uint8)
    out[:, 0], out[:, 1 : 1 + body[0].size] = LIST_START, body.reshape(found.n, -1)
    first = 1 + 4 * n_edges
    out[np.arange(out.shape[1]) >= first[:, None]] = PADDING
    ends = (LIST_END, ORIGIN_START, token[found.origin], ORIGIN_END, TARGET_START,
            token[found.target], TARGET_END, PATH_START)  # fmt: skip
    for place, value in enumerate(ends):
        out[rows, first + place] = value
    row, step = np.nonzero(found.path >= 0)
    out[row, first[row] + 8 + step] = token[found.path[row, step]]
    out[rows, first + 8 + found.length] = PATH_END
    return out[:, : int((first + 9 + found.length).max(initial=0))], first + 7


def written(found: Mazes, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`tokens` with connections in a random order; the same for the same seed, on any machine."""

    def part(first: int) -> tuple[np.ndarray, np.ndarray]:
        some = found.rows(slice(first, first + BLOCK))
        rng = np.random.default_rng([seed, 1, first // BLOCK])
        return tokens(some, *rng.random((2, some.n, 2 * found.size**2)))

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        parts = list(threads.map(part, range(0, found.n, BLOCK)))
    width = max(x.shape[1] for x, _ in parts)
    out = np.full((found.n, width), PADDING, np.uint8)
    for i, (x, _) in enumerate(parts):
        out[i * BLOCK : i * BLOCK + len(x), : x.shape[1]] = x
    return out, np.concatenate([start for _, start in parts])
