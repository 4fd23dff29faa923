"""The paper mazes: mazes against plain searches, tokens by hand, and its stage on tiny models."""

from collections import deque
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT

from pipeline.errors import RetraceError
from pipeline.job.source import import_file
from pipeline.text import mazes as MAZES

PAPER = ROOT / "rules/papers/mazes"
DATA = import_file(PAPER / "data.py")
WORLD = import_file(PAPER / "world.py")
EDITS = import_file(PAPER / "edits.py")
METRICS = import_file(PAPER / "metrics.py")


def links(found, i: int) -> dict[int, set[int]]:
    """Cell -> cells connected with it, read off the words one bit at a time."""
    size, out = found.size, {c: set() for c in range(found.size**2)}
    for c in range(size**2):
        for words, step, inside in ((found.right, 1, c % size < size - 1),
                                    (found.down, size, c < size * (size - 1))):  # fmt: skip
            if int(words[i]) >> c & 1:
                assert inside, "a connection that leaves the lattice"
                out[c].add(c + step)
                out[c + step].add(c)
    return out


def steps(graph: dict[int, set[int]], a: int) -> dict[int, int]:
    """Cell -> steps from a, by a plain search."""
    far, queue = {a: 0}, deque([a])
    while queue:
        here = queue.popleft()
        for c in sorted(graph[here] - far.keys()):
            far[c] = far[here] + 1
            queue.append(c)
    return far


@pytest.mark.parametrize("size", [3, 6, 8])
@pytest.mark.parametrize("kind", MAZES.KINDS)
def test_paths_are_shortest_and_kinds_are_what_they_are_called(kind, size):
    found = MAZES.mazes(kind, 12, size, 3, seed=1)
    assert len(found.path) == 12
    for i in range(12):
        graph = links(found, i)
        far = steps(graph, int(found.origin[i]))
        path = [int(c) for c in found.path[i] if c >= 0]
        assert (path[0], path[-1]) == (found.origin[i], found.target[i])
        assert all(b in graph[a] for a, b in pairwise(path))
        assert len(path) == found.length[i] == far[path[-1]] + 1 >= 3
        reached = [c for c in graph if graph[c]]
        edges = sum(map(len, graph.values())) // 2
        if kind in MAZES.TREES:
            assert edges == len(reached) - 1 == len(far) - 1
        if kind == "depth_first":
            assert len(reached) == size**2
        if kind == "sparse":
            assert len(reached) >= size**2 / 2
        if kind == "forkless":
            assert max(map(len, graph.values())) <= 2
        if kind == "percolated":
            assert len(reached) == size**2 and edges >= size**2 - 1


def test_tokens_by_hand():
    """0-1 and 1-3 of a lattice of 2 x 2, from 0 to 3."""
    word = np.array([1], np.uint64), np.array([2], np.uint64)
    found = MAZES.solve(*word, np.array([0]), np.array([3]), 2)
    keys, flips = np.zeros((1, 8)), np.zeros((1, 8))
    keys[0, 4], flips[0, 1] = 1, 0.9  # down of cell 1 first, turned; then right of cell 0
    tokens, start = MAZES.tokens(found, keys, flips)
    # (1,1) <--> (0,1) ; (0,0) <--> (0,1) ; and the path (0,0) (0,1) (1,1)
    cells = {0: 11, 1: 12, 2: 13, 3: 14}
    edges = [cells[3], 8, cells[1], 9, cells[0], 8, cells[1], 9]
    ends = [4, cells[0], 5, 2, cells[3], 3]
    assert tokens[0].tolist() == [0, *edges, 1, *ends, 6, cells[0], cells[1], cells[3], 7]
    assert start.tolist() == [16] and MAZES.longest("sparse", 2) == 4 * 3 + 10 + 4
    number = EDITS.numbers(torch.from_numpy(tokens.astype(np.int64)), 2)[0]
    assert number[[4, 8]].tolist() == [1, 4] and (number >= 0).sum() == 2


def test_mazes_do_not_depend_on_cores_and_do_on_the_seed(monkeypatch):
    found = MAZES.mazes("sparse", 40, 5, 4, seed=0)
    monkeypatch.setattr(MAZES.os, "sched_getaffinity", lambda _: {0})
    again, other = (MAZES.mazes("sparse", 40, 5, 4, seed=s) for s in (0, 1))
    assert (again.path == found.path).all() and (again.right == found.right).all()
    assert not (other.right == found.right).all()


def test_bad_mazes_are_told():
    none = np.zeros(2, np.uint64)
    with pytest.raises(RetraceError, match=r"maze 0: no path leads from \(0, 0\) to \(2, 2\)"):
        MAZES.solve(none, none, np.array([0, 0]), np.array([8, 8]), 3)
    with pytest.raises(RetraceError, match="9 cells a side"):
        MAZES.mazes("sparse", 1, 9, 2, seed=0)
    with pytest.raises(RetraceError, match="no mazes 'dfs'"):
        MAZES.mazes("dfs", 1, 3, 2, seed=0)
    with pytest.raises(RetraceError, match="no forkless maze of 2 x 2 has a path of 5 cells"):
        MAZES.mazes("forkless", 1, 2, 5, seed=0)


OPTIONS = {"size": 3, "kind": "sparse", "shortest": 3, "loss": "path",
           "n_mazes": 10, "n_held_out": 4}  # fmt: skip


def test_data_learn_from_the_path_alone_or_from_all():
    batches = DATA.random_mazes(OPTIONS, 0, 6, 50, torch.device("cpu"))
    (x, y), (x2, _) = batches.batch(0), batches.batch(2)
    assert x.shape == (6, 50) and batches.d_vocab == 20
    assert (x2[0] == x[2]).all()  # maze 12 is maze 2 again
    for row, wanted in zip(x.tolist(), y.tolist(), strict=True):
        known = [i for i, t in enumerate(wanted) if t != DATA.IGNORED]
        assert row[known[0]] == MAZES.TARGET_END and wanted[known[0]] == MAZES.PATH_START
        assert wanted[known[-1]] == MAZES.PATH_END
    every = DATA.random_mazes(OPTIONS | {"loss": "all"}, 0, 6, 50, torch.device("cpu")).batch(0)[1]
    assert ((every == DATA.IGNORED) == (y == DATA.IGNORED))[:, -1].all()
    assert (every[:, :10] != DATA.IGNORED).all()
    with pytest.raises(RetraceError, match=r"up to 51 tokens, architecture\.n_ctx is 49"):
        DATA.random_mazes(OPTIONS, 0, 6, 49, torch.device("cpu"))


# --- the stage -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def held():
    return DATA.written(MAZES.mazes("sparse", 60, 3, 3, seed=2), 2)


class Reader(torch.nn.Module):
    """A model that writes the right path, or one token of it wrongly."""

    def __init__(self, given, wrong: dict[int, int]) -> None:
        super().__init__()
        self.given, self.wrong = given, wrong

    def forward(self, x):
        """Logits of the true next token; mazes are known by their list and ends."""
        out = torch.zeros(*x.shape, 20)
        for i, row in enumerate(x):
            same = [j for j, t in enumerate(self.given.tokens)
                    if (t[: self.given.start[j]] == row[: self.given.start[j]]).all()]  # fmt: skip
            true = torch.nn.functional.pad(self.given.tokens[same[0]], (0, 99))[1 : x.shape[1] + 1]
            out[i, torch.arange(x.shape[1]), true] = 1
            at = int(self.given.start[same[0]]) + 1
            if same[0] in self.wrong and at < x.shape[1]:
                out[i, at, self.wrong[same[0]]] = 2
        return type("Out", (), {"logits": out})


def test_rollouts_are_scored_by_the_rules(held):
    some = DATA.Written(held.mazes.rows(slice(6)), held.tokens[:6], held.start[:6])
    far = next(c for c in range(9) if c not in links(some.mazes, 2)[int(some.mazes.origin[2])])
    model = Reader(some, {1: MAZES.PATH_END, 2: int(MAZES.cell_tokens(3)[far])})
    new = WORLD.rolled(model, some, 10, "cpu")
    found = {k: v.tolist() for k, v in WORLD.scored(new, some.mazes).items()}
    assert found["exact"] == [True, False, False, True, True, True]
    assert found["valid"] == [True, True, False, True, True, True]  # 1 stops at its origin
    assert found["target"] == [True, False, True, True, True, True]
    single = {k: v.tolist() for k, v in WORLD.single(model, some, 0, "cpu").items()}
    assert single["first_choice"] == [True, False, False, True, True, True]
    assert all(single["path_start"]) and all(single["path_end"])


def test_mazes_that_do_not_fit_are_told():
    given = DATA.Options(**OPTIONS)
    assert len(WORLD.judged("depth_first", 5, given, 51).tokens) == 5
    with pytest.raises(RetraceError, match="no depth_first maze of 3 x 3 fits into 50 tokens"):
        WORLD.judged("depth_first", 5, given, 50)


def test_policies_keep_to_the_rules(held):
    found = MAZES.mazes("depth_first", 40, 4, 3, seed=3)
    walk, hand = (
        WORLD.scored(WORLD.policy(p, found, 0), found) for p in ("random_walk", "right_hand")
    )
    assert walk["valid"].all() and hand["valid"].all() and hand["target"].all()
    assert (walk["exact"] == walk["target"]).all()  # without a step back a tree has one way
    assert 0 < walk["exact"].mean() < 1 and 0 < hand["exact"].mean() < 1
    row = next(WORLD.shares({"exact": np.array([True, True, False, True])}, "sparse"))
    assert (row["share"], row["n"]) == (0.75, 4) and row["low"] < 0.75 < row["high"]


def test_probes_read_planted_walls(held):
    there = held.mazes.connections()[:, MAZES.inside(3)]
    rng = torch.Generator().manual_seed(0)
    X = torch.from_numpy(there.astype(np.float32)) @ torch.randn(12, 20, generator=rng)
    rows = WORLD.probed(torch.stack([X, torch.randn(60, 20, generator=rng)]), held.mazes, 0.01)[1]
    assert rows[0]["accuracy"] > 0.95 > rows[1]["accuracy"] + 0.1


def test_pairs_differ_in_one_connection_that_the_shorter_path_uses(held):
    pairs = EDITS.pairs(held.mazes, 20, 0)
    a, b = pairs.without.mazes, pairs.joined.mazes
    assert len(a.path) > 5
    for i, (number, part) in enumerate(zip(pairs.number, pairs.part, strict=True)):
        changed = a.connections()[i] != b.connections()[i]
        assert np.flatnonzero(changed).tolist() == [int(number)]
        assert b.length[i] < a.length[i]
        assert (a.path[i, :part] == b.path[i, :part]).all() and a.path[i, part] != b.path[i, part]
        last = pairs.without.tokens[i, pairs.without.start[i] - EDITS.LAST]
        assert last == MAZES.SEMICOLON
    with pytest.raises(RetraceError, match="in none of 1 mazes"):
        EDITS.pairs(MAZES.mazes("forkless", 1, 2, 2, seed=0), 1, 0)


def test_metrics_take_the_best_layer_and_the_best_scale():
    probes = pd.DataFrame({"kind": "sparse", "layer": [2, 0, 1], "accuracy": [0.8, 0.95, 0.9],
                           "majority": 0.6})  # fmt: skip
    found = METRICS.of_probes(probes)
    assert found["probe.sparse.best"] == 0.9 and found["probe.sparse.embed"] == 0.95
    assert found["probe.sparse.depth"] == 0.5
    edits = pd.DataFrame({"edit": ["activate"] * 2 + ["remove"], "direction": "mean", "n": 8,
                          "moved": [0.2, 0.5, 0.1], "solved": 4})  # fmt: skip
    found = METRICS.of_edits(edits)
    assert found == {"edit.activate.mean": 0.5, "edit.remove.mean": 0.1, "edit.solved": 0.5}
    scales = [
        {"edit": "activate", "direction": d, "scale": s, "moved": m, "solved": n}
        for d, s, m, n in (("random", 9, 0.9, 4), ("mean", 1, 0.2, 4), ("mean", 2, 0.5, 4))
    ]
    assert EDITS.best(scales) == 2
    assert EDITS.best([r | {"moved": float("nan"), "solved": 0} for r in scales]) == 1
    heads = pd.DataFrame({"layer": [0, 0, 1], "back_1": [0.4, 0.1, 1], "back_3": [0.4, 0.1, 1]})
    assert METRICS.of_heads(heads) == {"heads.semicolon": 0.5}
