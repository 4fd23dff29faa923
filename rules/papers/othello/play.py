"""Stage `play`: a few games whole, for the figure that one plays with. [torch]

Of the first trained model: what the probes of world.py read of each square, by layer and ply; the
probabilities of the next move; and both after a square was flipped as there, behind layer `first`.
A row is a square, as figures of kind `board` read it:

    read  P(theirs) - P(mine) at a layer; mark: whose it is, of the board as it was flipped
    move  the probability of the square at the next ply; mark: whether it is legal
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pipeline.job import cli, own
from pipeline.job.source import import_file
from pipeline.models import hooks
from pipeline.probes import logistic
from pipeline.weights import trained

world = import_file(Path(__file__).parent / "world.py")
boards, data = world.boards, world.data
TABLES = ["play"]
MARKS = np.array(["", "mine", "theirs"])
U = np.uint64


class Options(own.Options):
    """Section own.play of paper.yaml."""

    n_games: int = Field(default=2, ge=1, description="held-out games that are shown")
    n_probe_games: int = Field(ge=10, description="held-out games that the probes learn from")
    l2: float = Field(default=10.0, gt=0, description="of the probes")
    first: int = Field(ge=0, description="the first layer behind which is written")
    scale: float = Field(gt=0, description="how far behind the border")
    plies: list[int] = Field(description="plies at which squares are flipped")
    n_flips: int = Field(default=8, ge=1, description="squares that are flipped at a ply, at most")


def reading(board: Any, X: Tensor, size: int) -> np.ndarray:
    """P(theirs) - P(mine) of every square, of rows X [layers n d]: [layers n squares]."""
    z = logistic.logits(board.standard(X), board.W, [3] * board.W.shape[2])[:, :, : size**2]
    p = z.softmax(-1)
    return (p[..., 2] - p[..., 1]).cpu().numpy()


def rows(card: dict, values: np.ndarray, marks: np.ndarray, size: int) -> Iterator[dict[str, Any]]:
    """Rows of values [layers squares] of `read`, or [squares] of `move`."""
    for layer, one in enumerate(values) if values.ndim == 2 else [(-1, values)]:
        for square, (value, mark) in enumerate(zip(one.tolist(), marks.tolist(), strict=True)):
            yield card | {"layer": layer, "row": square // size, "column": square % size,
                          "value": value, "mark": mark}  # fmt: skip


def moves(z: Tensor, legal: Any, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(probability, mark) of every square, of logits [tokens] and the word of legal squares."""
    p = np.zeros(size**2)
    p[boards.squares(size)] = z.softmax(-1).cpu().numpy()
    return p, np.where(boards.bits(np.array([legal]), np.arange(size**2))[0], "legal", "")


def flips(games: Any, game: int, ply: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """(squares, legal words) of flips that change what is legal, evenly spaced among all."""
    size, found = games.size, []
    mine, theirs = games.mine[game, ply], games.theirs[game, ply]
    for square in range(size**2):
        bit = U(1) << U(square)
        if (mine | theirs) & bit:
            sides = np.array([[mine ^ bit], [theirs ^ bit]], U)
            after = boards.legal(*sides, size)[0]
            if after not in (games.legal[game, ply], 0):
                found.append((square, after))
    keep = np.unique(np.linspace(0, len(found) - 1, min(most, len(found))).astype(int))
    return tuple(np.array([found[i][k] for i in keep], t) for k, t in ((0, np.int64), (1, U)))


def flipped(model: Any, board: Any, tokens: Tensor, squares: Tensor, options: Options) -> tuple[
    Tensor, Tensor]:  # fmt: skip
    """(logits at the last position [n tokens], stream there [layers n d]), one square a row."""
    x, edit = tokens.expand(len(squares), -1), world.mirrored(board.border, squares, options.scale)
    with ExitStack() as stack:
        for layer in range(options.first, model.config.n_layers):

            def change(h: Tensor, layer: int = layer) -> Tensor:
                return torch.cat([h[:, :-1], edit(layer, h[:, -1])[:, None]], 1)

            stack.enter_context(hooks.edited(model, f"blocks.{layer}.hook_resid_post", change))
        names = world.stream_hooks(model.config.n_layers)
        acts = stack.enter_context(hooks.capture(model, names))  # behind the edits
        z = model(x).logits[:, -1]
    return z, torch.stack([acts[n][:, -1].float() for n in names])


def shown(model: Any, board: Any, games: Any, options: Options, device: Any) -> Iterator[
    dict[str, Any]]:  # fmt: skip
    """Rows of the table play."""
    size, plies = games.size, games.tokens.shape[1] - 1
    z = world.logits_of(model, games.tokens[:, :-1], device)
    read = reading(board, world.streams(model, games.tokens[:, :-1], device), size)
    read = read.reshape(len(read), len(games.tokens), plies, -1)
    codes = games.codes("mine")
    for game in range(len(games.tokens)):
        for ply in range(plies):
            card = {"case": game + 1, "step": ply + 1, "edit": ""}
            marks = MARKS[codes[game, ply]]
            yield from rows(card | {"what": "read"}, read[:, game, ply], marks, size)
            found = moves(z[game, ply], games.legal[game, ply], size)
            yield from rows(card | {"what": "move"}, *found, size)
            squares, after = flips(games, game, ply, options.n_flips)
            if ply + 1 not in options.plies or not len(squares):
                continue
            x = torch.from_numpy(games.tokens[game : game + 1, : ply + 1].astype(np.int64))
            to = torch.from_numpy(squares).to(device)
            new, X = flipped(model, board, x.to(device), to, options)
            again = reading(board, X, size)
            for i, square in enumerate(squares.tolist()):
                card |= {"edit": f"{'ABCDEFGH'[square % size]}{square // size + 1}"}
                marks = MARKS[codes[game, ply]]
                marks[square] = {"mine": "theirs", "theirs": "mine"}[marks[square]]
                yield from rows(card | {"what": "read"}, again[:, i], marks, size)
                found = moves(new[i], after[i], size)
                yield from rows(card | {"what": "move"}, *found, size)


def work(job: cli.Job, options: Options) -> own.Tables:
    out, device = own.Tables(TABLES), job.device()
    run = trained.open_run(job.args.runs[0])
    given = data.checked(run.spec.data.options, run.spec.architecture.n_ctx)
    held = data.held_out(given, options.n_games + options.n_probe_games)
    games, probed = (world.Games(x, given.size) for x in np.split(held, [options.n_games]))
    with torch.no_grad():
        model = run.model(run.members[0], run.steps[-1]).to(device)
        X = world.streams(model, probed.tokens[:, :-1], device)
        codes = world.targets(probed)[..., :-1].flatten(1).to(device)
        board = world.Board(X, codes, options.l2)
        found = list(shown(model, board, games, options, device))
    out.add({"play": found}, {"arm": "trained", "seed": run.seed(run.members[0])})
    return out
