"""Othello on boards of even size up to 8, many games at once: each side is one 64-bit word a game.

Square `row * size + column` is bit `row * size + column`. A shift by 1, size - 1, size or size + 1
moves all discs of all games in one of eight directions; masks keep them from leaving by a side.

    legal   squares from which some line of the opponent's discs ends at one of ours
    play    the disc that is set, with the lines that it turns
    draw    one of the legal squares, each as likely as another
    games   random games, ply by ply, without those in which a side has to pass

The plies of a game without passes belong to black and white in turns, so that the parity of the ply
says who is to move. Such games are not a fair sample of all games, and the card says so.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np

from pipeline.errors import RetraceError

CHUNK = 8192  # games that are played at once by one thread: their words stay in its cache
U = np.uint64
ONE = U(1)


@cache
def directions(size: int) -> tuple[tuple[int, U], ...]:
    """(shift, squares where a disc may land) of the eight directions; a left shift is positive."""
    if size not in (4, 6, 8):
        raise RetraceError(f"a board of {size} squares a side; Othello is played on 4, 6 or 8")
    columns = np.arange(size * size) % size
    every = sum(1 << i for i in range(size * size))
    left, right = (sum(1 << int(i) for i in np.flatnonzero(columns == c)) for c in (0, size - 1))
    lands = {-1: U(every ^ right), 0: U(every), 1: U(every ^ left)}
    steps = [(r, c) for r in (-1, 0, 1) for c in (-1, 0, 1) if r or c]
    return tuple((r * size + c, lands[c]) for r, c in steps)


def shifted(x: np.ndarray, by: int, lands: U) -> np.ndarray:
    """All discs one square on, those that leave the board gone."""
    return (x << U(by) if by > 0 else x >> U(-by)) & lands


def start(size: int) -> tuple[int, int]:
    """(black, white) before the first ply; black is to move."""
    at = [(size // 2 - 1 + r) * size + size // 2 - 1 + c for r in (0, 1) for c in (0, 1)]
    return 1 << at[1] | 1 << at[2], 1 << at[0] | 1 << at[3]


def squares(size: int) -> np.ndarray:
    """The squares that can be played, ascending, [size² - 4]: token i is a disc on squares[i]."""
    taken = start(size)[0] | start(size)[1]
    return np.array([i for i in range(size * size) if not taken >> i & 1])


def legal(own: np.ndarray, other: np.ndarray, size: int) -> np.ndarray:
    """Squares where the side of `own` may set a disc, as words uint64 [games]."""
    found = np.zeros_like(own)
    empty = ~(own | other)
    for by, lands in directions(size):
        inner = other & lands
        line = shifted(own, by, inner)
        for _ in range(size - 3):  # the longest line has size - 2 discs
            line |= shifted(line, by, inner)
        found |= shifted(line, by, lands)
    return found & empty


def play(
    own: np.ndarray, other: np.ndarray, disc: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """(own, other) after own set `disc`, one bit a game, and turned discs by the rules."""
    turned = np.zeros_like(own)
    for by, lands in directions(size):
        inner = other & lands
        line = shifted(disc, by, inner)
        for _ in range(size - 3):
            line |= shifted(line, by, inner)
        ends = shifted(line, by, lands) & own
        turned |= np.where(ends != 0, line, U(0))
    return own | turned | disc, other & ~turned


def draw(words: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One of the set bits of each word, each as likely as another; 0 of a word without any."""
    count = np.bitwise_count(words)
    skip = (rng.random(len(words), np.float32) * count).astype(np.uint8)
    words = words.copy()
    for i in range(int(skip.max(initial=0))):
        words &= np.where(skip > i, words - ONE, ~U(0))
    return words & (~words + ONE)


def chunk(n: int, size: int, plies: int, rng: np.random.Generator) -> np.ndarray:
    """Of n random games those without a pass, as squares uint8 [kept plies]."""
    own, other = (np.full(n, word, U) for word in start(size))
    moves = np.empty((n, plies), np.uint8)
    for ply in range(plies):
        open_to = legal(own, other, size)
        alive = open_to != 0
        if not alive.all():
            own, other, open_to, moves = own[alive], other[alive], open_to[alive], moves[alive]
        disc = draw(open_to, rng)
        moves[:, ply] = np.bitwise_count(disc - ONE)
        other, own = play(own, other, disc, size)
    return moves


def games(n: int, size: int, plies: int, seed: int) -> np.ndarray:
    """n random games without a pass in their first plies, as tokens uint8 [n plies].

    Args:
        seed: of the games; they do not depend on the number of cores.

    Raises:
        RetraceError: more plies than squares, or hardly a game without a pass.
    """
    if not 1 <= plies <= size * size - 4:
        raise RetraceError(f"plies: {plies} of a board with {size * size - 4} squares to play on")
    made: list[np.ndarray] = []
    got = first = 0
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        while got < n:
            share = max(got / (first * CHUNK), 0.01) if first else 0.5
            more = -(-int((n - got) / share) // CHUNK)
            draws = [np.random.default_rng([seed, first + i]) for i in range(more)]
            made += threads.map(lambda rng: chunk(CHUNK, size, plies, rng), draws)
            first += more
            got = sum(map(len, made))
            if not got:
                raise RetraceError(f"plies: no game of {plies} on {size} x {size} without a pass")
    token = np.zeros(size * size, np.uint8)
    token[squares(size)] = np.arange(size * size - 4)
    return token[np.concatenate(made)[:n]]


def states(tokens: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(black, white) after each ply, words uint64 [games plies].

    Raises:
        RetraceError: names the first game and ply that is not legal.
    """
    discs = ONE << squares(size).astype(U)[tokens]
    black, white = (np.full(len(tokens), word, U) for word in start(size))
    out = np.empty((2, *tokens.shape), U)
    for ply in range(tokens.shape[1]):
        own, other = (white, black) if ply % 2 else (black, white)
        if (wrong := np.flatnonzero((legal(own, other, size) & discs[:, ply]) == 0)).size:
            square = int(squares(size)[tokens[wrong[0], ply]])
            raise RetraceError(
                f"game {wrong[0]}: ply {ply} on row {square // size}, column {square % size} is "
                f"illegal; play by the rules of Othello, without a pass"
            )
        own, other = play(own, other, discs[:, ply], size)
        black, white = (other, own) if ply % 2 else (own, other)
        out[:, :, ply] = black, white
    return out[0], out[1]


def bits(words: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Whether each of the squares `at` is set, bool [... squares]."""
    return (words[..., None] >> at.astype(U) & ONE).astype(bool)
