"""The paper othello: boards against plain rules, and its stage on a tiny model."""

import numpy as np
import pytest
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
