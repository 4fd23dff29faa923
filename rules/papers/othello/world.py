"""Stage `world`: what a model of Othello knows of the board, and whether it uses it. [torch]

For every model of the section training, after its last step and before its first (the null arm),
on games that no model learned from:

1. moves    share of plies whose likeliest next square is illegal, and the probability on illegal
            squares, ply by ply; beside them a uniform guess among the empty squares.
2. probes   linear probes of every square, layer by layer, on other games than those judged on. A
            square is empty, or of the side to move (mine) or of the other (theirs); or it is empty,
            black or white (colour), read by one probe for all plies, or by one for even and one for
            odd plies (colour_parity), which only differ from mine by names. The null that sees no
            model reads the set of squares that were played (layer -1).
3. squares  accuracy of the mine/theirs probe by layer, ply and square.
4. flips    the last position is written on, at layer `first` and all behind: along the probe's
            direction theirs - mine of one square, as far behind the border between the two as it
            lay before it, times `scales`. Judged by the board with that square flipped: where n
            squares are legal, the n likeliest are named. Only flips count that change legality.
            `wrong` is the share of squares whose legality changed that are named wrongly; `error`
            counts all wrong squares, missing and superfluous (Li et al. 2023, section 4.2). Null
            arms: nothing, the same lengths in random directions, and another square's direction.
            Beside the probe's the difference of means of theirs and mine, across its own middle.

Board numbers: squares `row * size + column`. Sides are those after the ply that was read.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch import Tensor

from pipeline.errors import RetraceError
from pipeline.job import cli, own
from pipeline.job.source import import_file
from pipeline.models import hooks
from pipeline.probes import logistic
from pipeline.probes.logistic import Tasks
from pipeline.spec.base import Section
from pipeline.weights import trained

HERE = Path(__file__).parent
boards = import_file(HERE / "boards.py")
data = import_file(HERE / "data.py")
TABLES = ["moves", "probes", "squares", "flips"]
BASES = ("mine", "colour", "even", "odd")  # the last two: colour on these plies alone
BATCH = 512  # games that a model reads at once
U = np.uint64


class Options(Section):
    """Section own.world of paper.yaml."""

    tables: list[str]
    n_games: int = Field(ge=10, description="held-out games of the moves and flips")
    n_probe_games: int = Field(ge=10, description="held-out games of the probes, whose last fifth "
                               "is judged on")  # fmt: skip
    l2: float = Field(default=10.0, gt=0, description="of the probes, as in the section probes")
    first: int = Field(ge=0, description="flips: the first layer behind which is written")
    scales: list[float] = Field(min_length=1, description="flips: how far behind the border")
    plies: tuple[int, int] = Field(description="flips: the first and last ply that is read")
    seed: int = Field(default=0, ge=0, description="of flipped squares and random directions")


# --- boards --------------------------------------------------------------------------------


class Games:
    """Held-out games with their boards.

    Attributes:
        tokens: [games plies].
        mine, theirs: words of the side to move after each ply and of the other, [games plies].
        black: words, [games plies].
        legal: words of the next ply's legal squares, [games plies].
    """

    def __init__(self, tokens: np.ndarray, size: int) -> None:
        self.tokens, self.size = tokens, size
        self.black, white = boards.states(tokens, size)
        even = np.arange(tokens.shape[1]) % 2 == 0  # black has played, so white is to move
        self.mine = np.where(even, white, self.black)
        self.theirs = np.where(even, self.black, white)
        self.legal = boards.legal(self.mine.ravel(), self.theirs.ravel(), size)
        self.legal = self.legal.reshape(tokens.shape)

    def codes(self, basis: str) -> np.ndarray:
        """0 empty, 1 mine or black, 2 theirs or white; int64 [games plies squares]."""
        one = self.mine if basis == "mine" else self.black
        every = np.arange(self.size**2)
        first, taken = boards.bits(one, every), boards.bits(self.mine | self.theirs, every)
        return np.where(first, 1, np.where(taken, 2, 0))


def legality(words: np.ndarray, size: int) -> np.ndarray:
    """Which tokens are legal, bool [... tokens]."""
    return boards.bits(words, boards.squares(size))


# --- models --------------------------------------------------------------------------------


def stream_hooks(n_layers: int) -> list[str]:
    """The embeddings with their positions, and the stream behind every layer."""
    return ["blocks.0.hook_resid_pre", *(f"blocks.{i}.hook_resid_post" for i in range(n_layers))]


def logits_of(model: Any, tokens: np.ndarray, device: Any) -> Tensor:
    """Logits of the next ply, [games plies tokens], on the CPU."""
    x = torch.from_numpy(tokens.astype(np.int64))
    return torch.cat([model(part.to(device)).logits.cpu() for part in x.split(BATCH)])


def streams(model: Any, tokens: np.ndarray, device: Any) -> Tensor:
    """The stream at `stream_hooks`, float32 [layers games*plies d], on the device."""
    names, parts = stream_hooks(model.config.n_layers), []
    for part in torch.from_numpy(tokens.astype(np.int64)).split(BATCH):
        with hooks.capture(model, names) as acts:
            model(part.to(device))
        parts.append(torch.stack([acts[n].float().flatten(0, 1) for n in names]))
    return torch.cat(parts, 1)


def move_rows(model: Any, games: Games, device: Any) -> list[dict[str, Any]]:
    """Rows of the table moves: a row for each ply that is predicted."""
    z = logits_of(model, games.tokens[:, :-1], device)
    legal = torch.from_numpy(legality(games.legal[:, :-1], games.size))
    best = legal.gather(-1, z.argmax(-1, keepdim=True))[..., 0]
    mass = (z.softmax(-1) * ~legal).sum(-1)
    empty = ~(games.mine | games.theirs)[:, :-1]
    free = torch.from_numpy(legality(empty, games.size)).sum(-1)
    guess = 1 - legal.sum(-1) / free
    columns = {"illegal": ~best, "illegal_mass": mass, "uniform": guess}
    means = {name: x.double().mean(0).tolist() for name, x in columns.items()}
    return [
        {"ply": ply + 2, **{name: x[ply] for name, x in means.items()}} for ply in range(z.shape[1])
    ]


# --- probes --------------------------------------------------------------------------------


class Board:
    """Probes of all squares and bases, for each layer.

    Attributes:
        W: [layers d+1 tasks 3] for standardised rows; tasks are BASES x squares.
        mean, sd: [layers d].
        of_mine, of_theirs: mean stream where a square is mine, or theirs, [layers squares d].
    """

    def __init__(self, X: Tensor, codes: Tensor, l2: float) -> None:
        self.mean, self.sd = logistic.moments(X)
        tasks = Tasks(codes, [3] * len(codes))
        self.W = logistic.fit(self.standard(X), tasks, l2, tolerance=1e-6).W
        mine = codes[: len(codes) // len(BASES)]
        self.of_mine, self.of_theirs = (self._means(X, mine == code) for code in (1, 2))

    @staticmethod
    def _means(X: Tensor, where: Tensor) -> Tensor:
        return where.to(X) @ X / where.sum(1).clamp(min=1)[:, None]

    def standard(self, X: Tensor) -> Tensor:
        return (X - self.mean[:, None]) / self.sd[:, None]

    def guesses(self, X: Tensor) -> Tensor:
        """Most likely codes, [layers rows tasks]."""
        parts = [logistic.logits(self.standard(x), self.W, [3] * self.W.shape[2]).argmax(-1)
                 for x in X.split(1 << 13, 1)]  # fmt: skip
        return torch.cat(parts, 1)

    def border(self, layer: int, squares: Tensor) -> tuple[Tensor, Tensor]:
        """(w [n d], b [n]) with w x + b > 0 where the square is theirs rather than mine."""
        W = self.W[layer][:, squares, 2] - self.W[layer][:, squares, 1]  # basis mine comes first
        w = W[:-1].T / self.sd[layer]
        return w, W[-1] - w @ self.mean[layer]

    def middle(self, layer: int, squares: Tensor) -> tuple[Tensor, Tensor]:
        """The same along the difference of the means, b halfway between them."""
        theirs, mine = self.of_theirs[layer, squares], self.of_mine[layer, squares]
        return theirs - mine, -((theirs - mine) * (theirs + mine)).sum(1) / 2


def targets(games: Games) -> Tensor:
    """Codes of all tasks, BASES x squares, [tasks games plies]; -1 where a basis does not count."""
    found = {basis: games.codes(basis) for basis in ("mine", "colour")}
    even = (np.arange(games.tokens.shape[1]) % 2 == 0)[None, :, None]
    found |= {"even": np.where(even, found["colour"], -1)}
    found |= {"odd": np.where(even, -1, found["colour"])}
    every = np.concatenate([found[basis] for basis in BASES], -1)
    return torch.from_numpy(np.moveaxis(every, -1, 0).copy())


def bag(games: Games) -> Tensor:
    """The set of squares that were played, float32 [1 games*plies tokens]."""
    one = np.eye(games.size**2 - 4, dtype=np.float32)[games.tokens]
    return torch.from_numpy(one.cumsum(1).reshape(1, -1, one.shape[-1]))


def probe_rows(
    X: Tensor, codes: Tensor, n_train: int, l2: float, first_layer: int
) -> tuple[Board, list[dict[str, Any]], Tensor]:
    """Probes, rows of the table probes, and which guesses of `mine` are right.

    Args:
        X: [layers games*plies d].
        codes: [tasks games plies].
        n_train: games that are learned from, the first.

    Returns:
        right: bool [layers games plies squares], of the games that are judged on.
    """
    n_tasks, n, plies = codes.shape
    flat = codes.flatten(1).to(X.device)
    cut = n_train * plies
    board = Board(X[:, :cut], flat[:, :cut], l2)
    right = board.guesses(X[:, cut:]) == flat[:, cut:].T
    known = (flat[:, cut:] >= 0).T
    size2, out = n_tasks // len(BASES), []
    for layer in range(len(X)):
        share = {}
        for i, basis in enumerate(BASES):
            at = slice(i * size2, (i + 1) * size2)
            share[basis] = float(right[layer][:, at][known[:, at]].double().mean())
        share["colour_parity"] = (share.pop("even") + share.pop("odd")) / 2
        mine = flat[:size2, cut:].T
        hits, colour = right[layer][:, :size2], right[layer][:, size2 : 2 * size2]
        for name, code in (("is_empty", 0), ("is_mine", 1), ("is_theirs", 2)):
            share[name] = float(hits[mine == code].double().mean())
        for name, found in (("mine_taken", hits), ("colour_taken", colour)):
            share[name] = float(found[mine > 0].double().mean())
        out += [{"layer": first_layer + layer, "basis": k, "accuracy": v} for k, v in share.items()]
    return board, out, right[..., :size2].view(len(X), n - n_train, plies, size2)


def square_rows(right: Tensor) -> pd.DataFrame:
    """Rows of the table squares, of `right` [layers games plies squares]."""
    mean = right.double().mean(1).cpu().numpy()
    layer, ply, square = np.indices(mean.shape).reshape(3, -1)
    size = math.isqrt(mean.shape[-1])
    column = np.array([*"ABCDEFGH"])[square % size]
    place = {"layer": layer, "ply": ply + 1, "row": square // size + 1, "column": column}
    return pd.DataFrame(place | {"accuracy": mean.ravel()})


# --- flips ---------------------------------------------------------------------------------


def flippable(games: Games, ply: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """(game, square, legal words after the flip) of flips that change what is legal, one a game."""
    mine, theirs, legal = games.mine[:, ply], games.theirs[:, ply], games.legal[:, ply]
    after = []
    for square in range(games.size**2):
        bit = U(1) << U(square)
        taken = ((mine | theirs) & bit) != 0
        new = boards.legal(np.where(taken, mine ^ bit, mine), np.where(taken, theirs ^ bit, theirs),
                           games.size)  # fmt: skip
        after.append(np.where(taken & (new != legal), new, U(0)))
    words = np.stack(after, 1)
    rank = rng.random(words.shape) * (words != 0)
    square, rows = rank.argmax(1), np.flatnonzero((words != 0).any(1))
    return rows, square[rows], words[rows, square[rows]]


def written(
    model: Any, tokens: Tensor, first: int, edit: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Logits at the last position, which `edit` changes behind each layer from `first` on."""
    with ExitStack() as stack:
        for layer in range(first, model.config.n_layers):

            def change(x: Tensor, layer: int = layer) -> Tensor:
                return torch.cat([x[:, :-1], edit(layer, x[:, -1])[:, None]], 1)

            stack.enter_context(hooks.edited(model, f"blocks.{layer}.hook_resid_post", change))
        return model(tokens).logits[:, -1]


Border = Callable[[int, Tensor], tuple[Tensor, Tensor]]  # Board.border or Board.middle


def mirrored(border: Border, squares: Tensor, scale: float, turn: Tensor | None = None) -> Any:
    """An edit that takes the last position across the border of a square.

    Args:
        turn: random directions [layers n d] of length 1 that take the place of the probe's.
    """

    def edit(layer: int, x: Tensor) -> Tensor:
        w, b = border(layer + 1, squares)  # layer 0 of the probes is the embeddings
        length = w.norm(dim=1, keepdim=True)
        far = ((x * w).sum(1) + b)[:, None] / length
        along = w / length if turn is None else turn[layer]
        return x - (1 + scale) * far * along

    return edit


def judged(z: Tensor, before: np.ndarray, after: np.ndarray, size: int) -> dict[str, float]:
    """error and wrong of logits [n tokens] against the board that was flipped."""
    old, new = (torch.from_numpy(legality(w, size)) for w in (before, after))
    rank = z.cpu().argsort(-1, descending=True).argsort(-1)
    named = rank < new.sum(-1, keepdim=True)
    changed = old != new
    wrong = named != new
    return {
        "error": float(wrong.double().sum(-1).mean()),
        "wrong": float((wrong & changed).sum() / changed.sum()),
        "wrong_unchanged": float((wrong & ~changed).double().sum(-1).mean()),
        "n": len(z),
    }


def flip_rows(
    model: Any, board: Board, games: Games, options: Options, device: Any
) -> Iterator[dict[str, Any]]:
    """Rows of the table flips: for each ply, direction and scale."""
    rng = np.random.default_rng(options.seed)
    n_layers, d = model.config.n_layers, model.config.d_model
    for ply in range(options.plies[0] - 1, options.plies[1]):
        rows, squares, after = flippable(games, ply, rng)
        if not len(rows):
            continue
        tokens = torch.from_numpy(games.tokens[rows, : ply + 1].astype(np.int64)).to(device)
        before = games.legal[rows, ply]
        at = torch.from_numpy(squares).to(device)
        other = torch.from_numpy((squares + rng.integers(1, games.size**2, len(rows)))
                                 % games.size**2).to(device)  # fmt: skip
        turn = torch.from_numpy(rng.normal(size=(n_layers, len(rows), d))).float().to(device)
        turn = turn / turn.norm(dim=-1, keepdim=True)
        cards = {"ply": ply + 1}
        plain = model(tokens).logits[:, -1]
        yield cards | {"direction": "none", "scale": 0.0} | judged(plain, before, after, games.size)
        for scale in options.scales:
            edits = {
                "probe": mirrored(board.border, at, scale),
                "means": mirrored(board.middle, at, scale),
                "random": mirrored(board.border, at, scale, turn),
                "other_square": mirrored(board.border, other, scale),
            }
            for name, edit in edits.items():
                z = written(model, tokens, options.first, edit)
                found = judged(z, before, after, games.size)
                yield cards | {"direction": name, "scale": scale} | found


# --- the stage -----------------------------------------------------------------------------


def of_run(run: trained.Run, options: Options, device: Any, out: own.Tables) -> None:
    """The rows of all members of a run, trained and not."""
    given = data.checked(run.spec.data.options, run.spec.architecture.n_ctx)
    low, high = options.plies
    if not 1 <= low <= high < given.plies or options.first >= run.spec.architecture.n_layers:
        raise RetraceError(
            f"own.world: plies {low} to {high} and first {options.first} of a run of "
            f"{given.plies} plies and {run.spec.architecture.n_layers} layers; correct it"
        )
    held = data.held_out(given, options.n_games + options.n_probe_games)
    games, probed = (Games(part, given.size) for part in np.split(held, [options.n_games]))
    n_train, codes = options.n_probe_games * 4 // 5, targets(probed)
    card = {"run": run.name, "member": "", "seed": -1, "arm": "moves"}
    out.add({"probes": probe_rows(bag(probed).to(device), codes, n_train, options.l2, -1)[1]}, card)
    progress = cli.Progress("world", 2 * len(run.members), "models")
    for arm, step in (("trained", run.steps[-1]), ("untrained", run.steps[0])):
        for member in run.members:
            model = run.model(member, step).to(device)
            card = {"run": run.name, "member": member, "seed": run.seed(member), "arm": arm}
            out.add({"moves": move_rows(model, games, device)}, card)
            # the last ply has no next one, so no model reads it
            X = streams(model, probed.tokens[:, :-1], device)
            board, rows, right = probe_rows(X, codes[..., :-1], n_train, options.l2, 0)
            out.add({"probes": rows, "squares": square_rows(right)}, card)
            out.add({"flips": list(flip_rows(model, board, games, options, device))}, card)
            progress.add()


def work(job: cli.Job, options: Options) -> own.Tables:
    out = own.Tables(TABLES)
    with torch.no_grad():
        for manifest in job.args.runs:
            of_run(trained.open_run(manifest), options, job.device(), out)
    return out


def main() -> None:
    own.main("world", __doc__, Options, TABLES, work, runs="manifest.json of every run*")


if __name__ == "__main__":
    main()
