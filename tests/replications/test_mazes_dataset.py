"""The mazes of paper mazes against maze-dataset; run by tests/libraries/mazes.sh."""

import itertools
import os
import random
import sys

import numpy as np
import pytest

from pipeline.text import mazes as MAZES

LIBRARIES = os.environ.get("RETRACE_MAZES")
if not LIBRARIES:
    pytest.skip("needs maze-dataset: tests/libraries/mazes.sh", allow_module_level=True)
sys.path.append(LIBRARIES)  # behind the project's own packages
N = 60  # mazes of a kind and size


def vocabulary(size: int) -> list[str]:
    """The text of every token of ours."""
    cells = MAZES.token_cells(size)[len(MAZES.SPECIAL) :]
    return [*MAZES.SPECIAL, *(f"({c // size},{c % size})" for c in cells)]


def generated(kind: str, size: int, start, u: np.ndarray, more: np.ndarray, cells: int, patch):
    """The package's maze out of our random numbers: choices u, percolation more."""
    from maze_dataset.generation import generators

    draws = iter(u)
    patch.setattr(generators.random, "choice", lambda seq: seq[int(next(draws) * len(seq))])
    patch.setattr(np.random, "rand", lambda *_: more.reshape(2, size, size).copy())
    made, given = generators.LatticeMazeGenerators, {"start_coord": np.array(start)}
    if kind == "percolation":
        return made.gen_percolation((size, size), p=MAZES.PERCOLATION, **given)
    if kind == "percolated":
        return made.gen_dfs_percolation((size, size), p=MAZES.PERCOLATED, **given)
    forks = kind != "forkless"
    return made.gen_dfs((size, size), do_forks=forks, accessible_cells=cells, **given)


def ours(kind: str, size: int, seed: int):
    """(right, down, start, u, more, cells) of N mazes, with every number that made them."""
    rng = np.random.default_rng(seed)
    square = size * size
    start, u = rng.integers(0, square, N), rng.random((N, square - 1))
    more = rng.random((N, 2, square))
    cells = rng.integers(-(-square // 2), square + 1, N) if kind == "sparse" else [square] * N
    if kind == "percolation":
        right, down = MAZES.percolate(more, MAZES.PERCOLATION, size)
    else:
        forks = kind != "forkless"
        right, down = MAZES.depth_first(start, u, size, forks=forks, cells=np.array(cells))
    if kind == "percolated":
        other = MAZES.percolate(more, MAZES.PERCOLATED, size)
        right, down = right | other[0], down | other[1]
    return right, down, start, u, more, cells


@pytest.mark.parametrize("size", [2, 3, 6, 8])
@pytest.mark.parametrize("kind", MAZES.KINDS)
def test_mazes_paths_and_tokens_are_the_packages(kind, size, monkeypatch):
    from maze_dataset import SolvedMaze
    from maze_dataset.tokenization import MazeTokenizer, TokenizationMode

    tokenizer = MazeTokenizer(tokenization_mode=TokenizationMode.AOTP_UT_uniform, max_grid_size=8)
    assert list(tokenizer.token_arr) == vocabulary(8)
    right, down, start, u, more, cells = ours(kind, size, seed=size)
    rng, words = np.random.default_rng(99), vocabulary(size)
    compared = 0
    for i in range(N):
        patch = pytest.MonkeyPatch()
        with patch.context() as p:
            theirs = generated(
                kind, size, divmod(int(start[i]), size), u[i], more[i], int(cells[i]), p
            )
        one = (right[i : i + 1], down[i : i + 1])
        there = np.stack([MAZES.bits(one[k], size).reshape(size, size) for k in (1, 0)])
        assert (theirs.connection_list == there).all()
        reached = MAZES.bits(np.bitwise_or.reduce(MAZES.flood(start[i : i + 1], *one, size)), size)
        component = {tuple(map(int, c)) for c in theirs.get_connected_component()}
        assert component == {divmod(int(c), size) for c in np.flatnonzero(reached)}
        if len(component) < 2:
            continue
        ends = rng.choice(np.flatnonzero(reached), 2, replace=False)
        found = MAZES.solve(*one, ends[:1], ends[1:], size)
        path = theirs.find_shortest_path(*(divmod(int(e), size) for e in ends))
        mine = np.array([divmod(int(c), size) for c in found.path[0] if c >= 0])
        assert len(path) == len(mine)
        if kind in ("percolated", "percolation"):  # other paths may be as short
            assert all(theirs.nodes_connected(a, b) for a, b in itertools.pairwise(mine))
        else:
            assert (path == mine).all()
        keys, flips = rng.random((2, 1, 2 * size * size))
        edges = np.flatnonzero(found.connections()[0])

        def shuffle(x, by=keys[0, edges]):
            x[:] = x[by.argsort()]

        solved = SolvedMaze.from_lattice_maze(theirs, mine)
        with patch.context() as p:
            p.setattr(np.random, "rand", lambda n, f=flips[0, edges]: f)
            p.setattr(np.random, "shuffle", shuffle)
            told = solved.as_tokens(tokenizer)
        tokens, place = MAZES.tokens(found, keys, flips)
        assert [words[t] for t in tokens[0]] == told
        assert told[place[0]] == "<PATH_START>"
        compared += 1
    assert compared > N / 2


def test_searches_start_where_the_packages_do():
    """Its random start leaves out the last row and column, and so do ours."""
    from maze_dataset.generation.generators import _random_start_coord

    np.random.seed(0)
    theirs = {tuple(map(int, _random_start_coord(np.array([3, 3]), None))) for _ in range(300)}
    assert theirs == {(0, 0), (0, 1), (1, 0), (1, 1)}
    rng, seen = np.random.default_rng(0), set()

    class Told:
        """The generator that notes where searches start."""

        def integers(self, low, high, n):
            found = rng.integers(low, high, n)
            if high == 2:
                seen.update(found.tolist())
            return found

        random = staticmethod(rng.random)

    MAZES.chunk("depth_first", 3, 2, Told())
    assert seen == {0, 1}
    random.seed()
