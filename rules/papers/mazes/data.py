"""Random mazes with their shortest paths, as sequences of tokens. [torch]

A run learns from mazes of some kinds, in equal shares. With `loss: path` only the tokens behind
<PATH_START> are learned, with `loss: all` every token but the padding: so the paper trained its
models jirpy and hallway (Ivanitskiy et al. 2023, Section 2.2, footnote 2).
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pipeline.errors import RetraceError
from pipeline.spec.paper import Section, parse
from pipeline.weights.batches import IGNORED, Batches

from . import mazes

HELD_OUT = 1 << 31  # no member has this seed; all models are judged on the same mazes


class Options(Section):
    """data.options of a run that learns from random_mazes."""

    size: int = Field(description="cells a side, 2 to 8")
    kinds: list[str] = Field(min_length=1, description="of mazes, in equal shares")
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


def sequences(kinds: list[str], n: int, size: int, shortest: int, seed: int) -> list[np.ndarray]:
    """[tokens uint8 [n longest], place of <PATH_START> [n]] of mazes of some kinds in turn."""
    share, width = -(-n // len(kinds)), max(mazes.longest(kind, size) for kind in kinds)
    out = np.full((share, len(kinds), width), mazes.PADDING, np.uint8)
    start = np.empty((share, len(kinds)), np.int64)
    for i, kind in enumerate(kinds):
        made = mazes.written(mazes.mazes(kind, share, size, shortest, seed), seed)
        out[:, i, : made[0].shape[1]], start[:, i] = made
    return [out.reshape(-1, width)[:n], start.ravel()[:n]]


def random_mazes(
    options: dict, seed: int, batch_size: int, n_ctx: int, device: torch.device
) -> Batches:
    """The data of one member: its own mazes in turn, from the first again when they are through."""
    given = parse(Options, options, "data.options of random_mazes")
    width = max(mazes.longest(kind, given.size) for kind in given.kinds)
    if width > n_ctx + 1:
        raise RetraceError(
            f"data.options: mazes of {given.size} x {given.size} have up to {width} tokens, "
            f"architecture.n_ctx is {n_ctx}; raise it to {width - 1}"
        )
    every, at = torch.arange(batch_size, device=device), torch.arange(width - 1, device=device)

    def loaded(n: int, seed: int) -> list[Tensor]:
        made = sequences(given.kinds, n, given.size, given.shortest, seed)
        return [torch.from_numpy(x).to(device) for x in made]

    def pair(tokens: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        x, y = tokens[:, :-1].long(), tokens[:, 1:].long()
        left_out = y == mazes.PADDING
        if given.loss == "path":
            left_out |= at < start[:, None]
        return x, y.masked_fill(left_out, IGNORED)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        rows = (step * batch_size + every) % len(tokens)
        return pair(tokens[rows], start[rows])

    tokens, start = loaded(given.n_mazes, seed)
    held = pair(*loaded(given.n_held_out, HELD_OUT))
    return Batches(len(mazes.token_cells(given.size)), batch, {"val": held})
