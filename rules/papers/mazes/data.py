"""Random mazes with their shortest paths, as sequences of tokens. [torch]

With `loss: path` only <PATH_START> and what stands behind it are learned, with `loss: all` every
token but the padding: so the paper trained its models jirpy and hallway (Ivanitskiy et al. 2023,
Section 2.2, footnote 2).
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pipeline.errors import RetraceError
from pipeline.spec.paper import Section, parse
from pipeline.text import mazes
from pipeline.weights.batches import IGNORED, Batches

HELD_OUT = 1 << 31  # no member has this seed; all models are judged on the same mazes


class Options(Section):
    """data.options of a run that learns from random_mazes."""

    size: int = Field(description="cells a side, 2 to 8")
    kind: str = Field(description="of mazes: forkless, depth_first, sparse, ...")
    shortest: int = Field(ge=2, description="cells of a path, at least")
    loss: Literal["path", "all"] = Field(description="tokens that are learned")
    n_mazes: int = Field(ge=1, description="mazes of a member; the run goes round them")
    n_held_out: int = Field(default=512, ge=1, description="mazes of every evaluation")


class Written(NamedTuple):
    """Mazes with their tokens int64 [n longest] and the place of <PATH_START> [n]."""

    mazes: mazes.Mazes
    tokens: Tensor
    start: Tensor


def written(found: mazes.Mazes, seed: int) -> Written:
    """Mazes as tokens, with connections in a random order."""
    tokens, start = mazes.written(found, seed)
    return Written(found, torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(start))


def random_mazes(
    options: dict, seed: int, batch_size: int, n_ctx: int, device: torch.device
) -> Batches:
    """The data of one member: its own mazes in turn, from the first again when they are through."""
    given = parse(Options, options, "data.options of random_mazes")
    width = mazes.longest(given.kind, given.size)
    if width > n_ctx + 1:
        raise RetraceError(f"data.options: {given.kind} mazes of {given.size} x {given.size} have "
                           f"up to {width} tokens, architecture.n_ctx is {n_ctx}; raise it to "
                           f"{width - 1}")  # fmt: skip
    every, at = torch.arange(batch_size, device=device), torch.arange(width - 1, device=device)

    def loaded(n: int, seed: int) -> tuple[Tensor, Tensor]:
        made = mazes.written(mazes.mazes(given.kind, n, given.size, given.shortest, seed), seed)
        tokens = np.full((n, width), mazes.PADDING, np.uint8)  # the same width for all members
        tokens[:, : made[0].shape[1]] = made[0]
        return torch.from_numpy(tokens).to(device), torch.from_numpy(made[1]).to(device)

    def pair(tokens: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        x, y = tokens[:, :-1].long(), tokens[:, 1:].long()
        left_out = y == mazes.PADDING
        if given.loss == "path":
            left_out |= at < start[:, None] - 1  # <PATH_START> itself is learned
        return x, y.masked_fill(left_out, IGNORED)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        rows = (step * batch_size + every) % len(tokens)
        return pair(tokens[rows], start[rows])

    tokens, start = loaded(given.n_mazes, seed)
    held = pair(*loaded(given.n_held_out, HELD_OUT))
    return Batches(len(mazes.token_cells(given.size)), batch, {"val": held})
