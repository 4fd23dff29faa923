"""Random games of Othello without passes, as sequences of squares. [torch]

Token i is a disc on the i-th square that can be played. What is predicted at ply t is ply t + 1;
nothing else is told: neither the board, nor whose turn it is, nor the rules (Li et al. 2023).
"""

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pipeline.errors import RetraceError
from pipeline.spec.paper import Section, parse
from pipeline.weights.batches import Batches

from . import boards

HELD_OUT = 1 << 31  # no member has this seed; all models are judged on the same games


class Options(Section):
    """data.options of a run that learns from random_games."""

    size: int = Field(description="squares a side: 4, 6 or 8")
    plies: int = Field(ge=2, description="of a game; shorter ones are its beginning")
    n_games: int = Field(ge=1, description="games of a member; the run goes round them")
    n_held_out: int = Field(default=1024, ge=1, description="games of every evaluation")


def checked(options: dict, n_ctx: int) -> Options:
    """The options, validated against the context length."""
    found = parse(Options, options, "data.options of random_games")
    if n_ctx != found.plies - 1:
        raise RetraceError(
            f"data.options: of {found.plies} plies the last has no next one, so n_ctx is "
            f"{found.plies - 1}, not {n_ctx}; correct it"
        )
    return found


def held_out(options: Options, n: int) -> np.ndarray:
    """Games that no member learns from, uint8 [n plies]; the first are those of the evaluation."""
    return boards.games(n, options.size, options.plies, HELD_OUT)


def random_games(
    options: dict, seed: int, batch_size: int, n_ctx: int, device: torch.device
) -> Batches:
    """The data of one member: its own games in turn, from the first again when they are through."""
    found = checked(options, n_ctx)
    train = boards.games(found.n_games, found.size, found.plies, seed)
    games = torch.from_numpy(train).to(device)
    every = torch.arange(batch_size, device=device)

    def pair(rows: Tensor) -> tuple[Tensor, Tensor]:
        return rows[:, :-1].long(), rows[:, 1:].long()

    held = torch.from_numpy(held_out(found, found.n_held_out)).to(device)
    return Batches(
        found.size**2 - 4,
        lambda step: pair(games[(step * batch_size + every) % len(games)]),
        {"val": pair(held)},
    )
