"""Sequences in which a random segment stands twice: what induction heads are for. [torch]

    BOS  x x x x [a b c … z] x x x x x [a b c … z]
                 first copy            second copy, to the end

1. All tokens are drawn uniformly and independently; BOS is one token more, for a head that finds
   nothing to attend to (Olsson et al. 2022 prepend one, too).
2. A segment of random length stands at a random place and again at the end. Its length and the
   distance between the copies differ from sequence to sequence, so that no fixed place or distance
   gives the next token; only a search for the present token does.
3. The loss is taken at every position. Outside the second copy nothing can be predicted.
"""

from dataclasses import dataclass

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pipeline.errors import RetraceError
from pipeline.spec.paper import Section, parse
from pipeline.weights.batches import IGNORED, Batches, seeded

HELD_OUT = -1  # no member has this seed; all models see the same held-out sequences


class Options(Section):
    """data.options of a run that learns from repeated_sequences."""

    n_tokens: int = Field(ge=2, description="random tokens; BOS is token n_tokens")
    length: tuple[int, int] = Field(description="of the repeated segment, shortest and longest")
    n_held_out: int = Field(default=256, ge=1, description="sequences of every evaluation")

    @model_validator(mode="after")
    def _ordered(self) -> "Options":
        if not 2 <= self.length[0] <= self.length[1]:
            raise ValueError(f"length: {list(self.length)} is not a shortest and a longest one")
        return self


@dataclass(frozen=True)
class Sequences:
    """Sequences and where their copies lie.

    Attributes:
        tokens, targets: [batch pos]; targets[:, t] follows tokens[:, t].
        first, second: [batch pos], whether the target is in the first or second copy and not the
            copy's first token; so what `second` marks follows from the tokens before.
    """

    tokens: Tensor
    targets: Tensor
    first: Tensor
    second: Tensor


def draw(n: int, options: Options, n_ctx: int, generator: torch.Generator) -> Sequences:
    """n sequences of n_ctx tokens and their targets, drawn on the CPU."""
    shortest, longest = options.length
    size = n_ctx + 1
    x = torch.randint(options.n_tokens, (n, size), generator=generator)
    x[:, 0] = options.n_tokens
    length = torch.randint(shortest, longest + 1, (n, 1), generator=generator)
    again = size - length
    # from 1, after BOS, to where the first copy touches the second
    start = 1 + (torch.rand(n, 1, generator=generator) * (again - length)).long()
    place = torch.arange(size).expand(n, size)
    x = x.gather(1, torch.where(place >= again, place - again + start, place))
    inside = lambda at: ((place > at) & (place < at + length))[:, 1:]  # noqa: E731
    return Sequences(x[:, :-1], x[:, 1:], inside(start), inside(again))


def checked(options: dict, n_ctx: int) -> Options:
    """The options, validated against the context length."""
    found = parse(Options, options, "data.options of repeated_sequences")
    if 2 * found.length[1] > n_ctx:
        raise RetraceError(
            f"data.options: two segments of up to {found.length[1]} tokens and BOS do not fit into "
            f"n_ctx {n_ctx} and the token behind it; lower length"
        )
    return found


def held_out(options: dict, n_ctx: int) -> Sequences:
    """The sequences of every evaluation, the same for all models of these options."""
    found = checked(options, n_ctx)
    return draw(found.n_held_out, found, n_ctx, torch.Generator().manual_seed(seeded(HELD_OUT, 0)))


def repeated_sequences(
    options: dict, seed: int, batch_size: int, n_ctx: int, device: torch.device
) -> Batches:
    """The data of one member; drawn on the CPU, so that every device trains on the same."""
    found, held = checked(options, n_ctx), held_out(options, n_ctx)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seeded(seed, step))
        made = draw(batch_size, found, n_ctx, generator)
        return made.tokens.to(device), made.targets.to(device)

    second = held.targets.masked_fill(~held.second, IGNORED)
    sets = {"all": (held.tokens, held.targets), "second_copy": (held.tokens, second)}
    evaluation = {name: (x.to(device), y.to(device)) for name, (x, y) in sets.items()}
    return Batches(found.n_tokens + 1, batch, evaluation)
