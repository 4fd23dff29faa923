"""The paper othello: boards against plain rules, and its stage on a tiny model."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT

from pipeline.errors import RetraceError
from pipeline.job.source import import_file

PAPER = ROOT / "rules/papers/othello"
BOARDS = import_file(PAPER / "boards.py")

# --- a plain Othello, written from the rules, with nothing of boards.py --------------------


class Plain:
    """A board as rows of characters; black moves first, and no one passes."""

    def __init__(self, size: int) -> None:
        self.size, half = size, size // 2
        self.rows = [["."] * size for _ in range(size)]
        self.rows[half - 1][half - 1] = self.rows[half][half] = "w"
        self.rows[half - 1][half] = self.rows[half][half - 1] = "b"
        self.turn = "b"

    def turned(self, row: int, column: int) -> list[tuple[int, int]]:
        """Discs that a move turns; none where the move is illegal."""
        if self.rows[row][column] != ".":
            return []
        found = []
        for down in (-1, 0, 1):
            for right in (-1, 0, 1):
                line, r, c = [], row + down, column + right
                while 0 <= r < self.size and 0 <= c < self.size and self.rows[r][c] != ".":
                    if self.rows[r][c] == self.turn:
                        found += line
                        break
                    line.append((r, c))
                    r, c = r + down, c + right
        return found

    def legal(self) -> set[int]:
        every = [(r, c) for r in range(self.size) for c in range(self.size)]
        return {r * self.size + c for r, c in every if self.turned(r, c)}

    def move(self, square: int) -> None:
        row, column = divmod(square, self.size)
        for r, c in [*self.turned(row, column), (row, column)]:
            self.rows[r][c] = self.turn
        self.turn = "w" if self.turn == "b" else "b"

    def discs(self, colour: str) -> set[int]:
        flat = [c for row in self.rows for c in row]
        return {i for i, c in enumerate(flat) if c == colour}


def members(word: int) -> set[int]:
    return {i for i in range(64) if int(word) >> i & 1}


@pytest.mark.parametrize(("size", "plies"), [(4, 12), (6, 32), (8, 60)])
def test_games_are_those_of_plain_rules(size, plies):
    tokens = BOARDS.games(20, size, plies, seed=3)
    black, white = BOARDS.states(tokens, size)
    squares = BOARDS.squares(size)
    for game in range(len(tokens)):
        plain = Plain(size)
        for ply in range(plies):
            b, w = (black[game, ply - 1], white[game, ply - 1]) if ply else BOARDS.start(size)
            own, other = (w, b) if ply % 2 else (b, w)
            found = BOARDS.legal(np.array([own], np.uint64), np.array([other], np.uint64), size)
            assert members(found[0]) == plain.legal()
            square = int(squares[tokens[game, ply]])
            assert square in plain.legal()
            plain.move(square)
            assert members(black[game, ply]) == plain.discs("b")
            assert members(white[game, ply]) == plain.discs("w")


def test_games_do_not_depend_on_cores_and_do_on_the_seed(monkeypatch):
    found = BOARDS.games(30, 6, 20, seed=0)
    monkeypatch.setattr(BOARDS.os, "sched_getaffinity", lambda _: {0})
    assert (BOARDS.games(30, 6, 20, seed=0) == found).all()
    assert not (BOARDS.games(30, 6, 20, seed=1) == found).all()
    assert len({tuple(g) for g in found.tolist()}) == 30


def test_every_legal_square_is_drawn_as_often():
    words = np.full(60_000, 0b1011, np.uint64)
    found = BOARDS.draw(words, np.random.default_rng(0))
    shares = [np.mean(found == bit) for bit in (1, 2, 8)]
    assert np.abs(np.array(shares) - 1 / 3).max() < 0.01  # five standard errors
    assert BOARDS.draw(np.zeros(3, np.uint64), np.random.default_rng(0)).tolist() == [0, 0, 0]


def test_an_illegal_game_is_told():
    tokens = BOARDS.games(2, 6, 8, seed=0)
    tokens[1, 3] = tokens[1, 2]
    with pytest.raises(RetraceError, match="game 1: ply 3 on row"):
        BOARDS.states(tokens, 6)
    with pytest.raises(RetraceError, match="5 squares a side"):
        BOARDS.games(1, 5, 4, seed=0)
    with pytest.raises(RetraceError, match="plies: 40 of a board with 32"):
        BOARDS.games(1, 6, 40, seed=0)


# --- the stage -----------------------------------------------------------------------------

WORLD = import_file(PAPER / "world.py")
METRICS = import_file(PAPER / "metrics.py")
SIZE, PLIES = 6, 12


@pytest.fixture(scope="module")
def games():
    return WORLD.Games(BOARDS.games(12, SIZE, PLIES, seed=5), SIZE)


def replayed(games, game: int, ply: int) -> Plain:
    """The plain board after a ply, counted from 0."""
    plain = Plain(SIZE)
    for token in games.tokens[game, : ply + 1]:
        plain.move(int(BOARDS.squares(SIZE)[token]))
    return plain


def test_sides_are_those_of_the_player_who_moves_next(games):
    mine, colour = games.codes("mine"), games.codes("colour")
    for game, ply in ((0, 0), (1, 5), (2, 10)):
        plain = replayed(games, game, ply)
        other = "w" if plain.turn == "b" else "b"
        for codes, sides in ((mine, (plain.turn, other)), (colour, ("b", "w"))):
            for code, side in enumerate(sides, 1):
                found = set(np.flatnonzero(codes[game, ply] == code).tolist())
                assert found == plain.discs(side)


def test_parity_turns_colours_into_sides(games):
    found = WORLD.targets(games).view(len(WORLD.BASES), SIZE**2, len(games.tokens), PLIES)
    mine, _, even, odd = found
    # after an even ply white is to move: mine is white
    swapped = {0: 0, 1: 2, 2: 1}
    assert [swapped[c] for c in mine[..., ::2].flatten().tolist()] == even[
        ..., ::2
    ].flatten().tolist()
    assert (mine[..., 1::2] == odd[..., 1::2]).all()
    assert (even[..., 1::2] == -1).all() and (odd[..., ::2] == -1).all()


def test_flips_change_what_is_legal_as_plain_rules_say(games):
    for ply in (6, 9):
        rows, squares, after = WORLD.flippable(games, ply, np.random.default_rng(0))
        assert len(rows)
        for game, square, word in zip(rows, squares, after, strict=True):
            plain = replayed(games, game, ply)
            before = plain.legal()
            r, c = divmod(int(square), SIZE)
            plain.rows[r][c] = "w" if plain.rows[r][c] == "b" else "b"
            assert members(word) == plain.legal() != before


def test_an_edit_puts_the_stream_as_far_behind_the_border(games):
    rng = torch.Generator().manual_seed(0)
    X = torch.randn(3, 40, 8, generator=rng)
    codes = torch.randint(0, 3, (4 * SIZE**2, 40), generator=rng)
    board = WORLD.Board(X, codes, l2=1.0)
    squares = torch.arange(5)
    edit, x = WORLD.mirrored(board.border, squares, 0.5), X[2, :5]
    w, b = board.border(2, squares)
    before, after = ((v * w).sum(1) + b for v in (x, edit(1, x)))
    assert torch.allclose(after, -0.5 * before, atol=1e-4)
    z = WORLD.logistic.logits(board.standard(X), board.W, [3] * len(codes))
    wanted = z[2, range(5), range(5), 2] - z[2, range(5), range(5), 1]
    assert torch.allclose(before, wanted, atol=1e-4)
    turn = torch.zeros(3, 5, 8)
    turn[..., 0] = 1.0
    moved = WORLD.mirrored(board.border, squares, 0.5, turn)(1, x) - x
    assert torch.allclose(moved.norm(dim=1), (edit(1, x) - x).norm(dim=1), atol=1e-4)
    w, b = board.middle(2, squares)  # between the means of the rows where a square is mine, theirs
    for square, along, offset in zip(squares.tolist(), w, b, strict=True):
        mine, theirs = (X[2][codes[square] == code].mean(0) for code in (1, 2))
        assert torch.allclose(along, theirs - mine, atol=1e-5)
        assert torch.allclose(mine @ along + offset, -(theirs @ along + offset), atol=1e-4)


def test_only_squares_whose_legality_changed_are_judged(games):
    at = BOARDS.squares(SIZE)
    before, after = (
        np.array([sum(1 << int(at[t]) for t in tokens)], np.uint64)
        for tokens in ([0, 1], [0, 2, 3])
    )
    z = torch.zeros(1, len(at))
    z[0, [0, 2, 3]] = torch.tensor([3.0, 2.0, 1.0])
    perfect = WORLD.judged(z, before, after, SIZE)
    assert (perfect["error"], perfect["wrong"], perfect["n"]) == (0, 0, 1)
    z[0, [1, 3]] = torch.tensor([1.0, 0.0])  # 1, no longer legal, in place of 3
    some = WORLD.judged(z, before, after, SIZE)
    assert (some["error"], some["wrong_unchanged"]) == (2, 0)
    assert some["wrong"] == pytest.approx(2 / 3)


def test_metrics_take_the_best_layer_and_the_best_scale():
    probes = pd.DataFrame({"basis": ["mine"] * 3, "layer": [2, 0, 1], "accuracy": [0.8, 0.5, 0.9]})
    found = METRICS.of_probes(probes)
    wanted = {"best": 0.9, "embed": 0.5, "gain": 0.4}
    assert found == {f"probe.mine.{k}": pytest.approx(v) for k, v in wanted.items()}
    flips = {"direction": "probe", "scale": [1, 1, 2], "wrong": [0.2, 0.8, 0.6], "n": [3, 1, 9]}
    flips = pd.DataFrame(flips | {"error": [1.0, 1.0, 9.0], "wrong_unchanged": 0.0})
    found = METRICS.of_flips(flips)
    assert found["flip.probe.wrong"] == pytest.approx(0.35) and found["flip.probe.error"] == 1.0
    moves = pd.DataFrame({"ply": [2, 3, 4], "illegal": [0, 0.2, 0.1], "illegal_mass": 0.1,
                          "uniform": 0.5})  # fmt: skip
    found = METRICS.of_moves(moves)
    assert (found["worst_ply"], found["worst"], found["first_error"]) == (3, 0.2, 3)


def test_data_are_games_in_turn_and_a_wrong_context_is_told():
    data = import_file(PAPER / "data.py")
    options = {"size": 4, "plies": 6, "n_games": 5, "n_held_out": 3}
    batches = data.random_games(options, 0, 4, 5, torch.device("cpu"))
    first, second = batches.batch(0), batches.batch(1)
    assert first[0].shape == (4, 5) and (first[0][:, 1:] == first[1][:, :-1]).all()
    assert (second[0][1] == first[0][0]).all()  # game 5 is game 0 again
    held = BOARDS.games(3, 4, 6, data.HELD_OUT)
    assert (batches.evaluation["val"][0].numpy() == held[:, :-1]).all() and batches.d_vocab == 12
    with pytest.raises(RetraceError, match="n_ctx is 5, not 6"):
        data.random_games(options, 0, 4, 6, torch.device("cpu"))


def test_squares_have_their_names():
    right = torch.zeros(1, 2, 3, SIZE**2, dtype=torch.bool)
    right[0, :, 1, 8] = True
    found = WORLD.square_rows(right)
    hit = found[found["accuracy"] > 0]
    assert len(found) == 3 * SIZE**2 and hit[["ply", "row", "column"]].values.tolist() == [
        [2, 2, "C"]
    ]


# --- the stage play ------------------------------------------------------------------------

PLAY = import_file(PAPER / "play.py")


def tiny_model(n_ctx: int):
    """A model of two layers before training."""
    from pipeline.spec.training import Architecture
    from pipeline.weights import initial

    torch.manual_seed(0)
    shape = Architecture(n_layers=2, d_model=8, n_heads=2, d_mlp=8, n_ctx=n_ctx)
    return initial.build(shape, SIZE**2 - 4).float().eval().requires_grad_(False)


def test_flips_that_are_shown_are_those_of_plain_rules(games):
    squares, after = PLAY.flips(games, 0, 9, 99)
    assert len(squares) > 1 and len(PLAY.flips(games, 0, 9, 2)[0]) == 2
    for square, word in zip(squares, after, strict=True):
        plain = replayed(games, 0, 9)
        before = plain.legal()
        r, c = divmod(int(square), SIZE)
        plain.rows[r][c] = "w" if plain.rows[r][c] == "b" else "b"
        assert members(word) == plain.legal() != before
    p, marks = PLAY.moves(torch.zeros(32), after[0], SIZE)
    assert p.sum() == pytest.approx(1) and p[2 * SIZE + 2] == 0  # no token sets a disc there
    assert set(np.flatnonzero(marks == "legal").tolist()) == members(after[0])


def test_a_shown_game_has_a_row_a_square_and_its_flips_are_the_worlds(games):
    model = tiny_model(PLIES - 1)
    X = WORLD.streams(model, games.tokens[:, :-1], "cpu")
    board = WORLD.Board(X, WORLD.targets(games)[..., :-1].flatten(1), l2=1.0)
    options = PLAY.Options(
        tables=["play"], n_probe_games=12, first=0, scale=1, plies=[8], n_flips=3
    )
    one = WORLD.Games(games.tokens[:1], SIZE)
    found = pd.DataFrame(PLAY.shown(model, board, one, options, "cpu"))
    played = found[found["edit"] == ""]
    assert len(played) == (PLIES - 1) * SIZE**2 * (3 + 1)  # layers and embeddings, and moves
    assert played["value"].between(-1, 1).all()
    marks = played[(played["what"] == "read") & (played["step"] == 8) & (played["layer"] == 0)]
    plain = replayed(games, 0, 7)
    mine = marks[marks["mark"] == "mine"]
    assert set((mine["row"] * SIZE + mine["column"]).tolist()) == plain.discs(plain.turn)
    squares, _ = PLAY.flips(one, 0, 7, 3)
    names = {f"{'ABCDEF'[s % SIZE]}{s // SIZE + 1}" for s in squares.tolist()}
    assert set(found["edit"]) - {""} == names
    x = torch.from_numpy(games.tokens[:1, :8].astype(np.int64))
    to = torch.from_numpy(squares)
    z, stream = PLAY.flipped(model, board, x, to, options)
    edit = WORLD.mirrored(board.border, to, 1)
    assert torch.allclose(z, WORLD.written(model, x.expand(len(to), -1), 0, edit))
    assert stream.shape == (3, len(to), 8)
