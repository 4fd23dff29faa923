"""A list of random tokens, then the list again from anywhere: what followed this one? [torch]

    BOS  a b c … z   p q … z a b …

1. The tokens of a list differ, and the second time it begins at a random place and goes round; so
   neither the place nor the distance gives the next token, and only a search for the present one
   does: what induction heads are for (Olsson et al. 2022).
2. The loss is taken in the second time alone, and not where the list goes round.
"""

import torch
from pydantic import Field
from torch import Tensor

from pipeline.errors import RetraceError
from pipeline.spec.paper import Section, parse
from pipeline.weights.batches import IGNORED, Batches, seeded

HELD_OUT = -1  # no member has this seed


class Options(Section):
    """data.options of a run that learns `lookup`, and the options of its prompts."""

    n_tokens: int = Field(ge=5, description="random tokens; BOS is token n_tokens")
    length: int = Field(ge=5, description="of the list")


def checked(options: dict) -> Options:
    """The options; RetraceError where a list is longer than there are tokens."""
    found = parse(Options, options, "options of lookup")
    if found.length > found.n_tokens:
        raise RetraceError(
            f"options of lookup: a list of {found.length} different tokens needs as many, n_tokens "
            f"is {found.n_tokens}; raise it"
        )
    return found


def lists(n: int, options: Options, generator: torch.Generator) -> Tensor:
    """n lists, int64 [n length]."""
    order = torch.rand(n, options.n_tokens, generator=generator).argsort(1)
    return order[:, : options.length]


def sequences(n: int, options: Options, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(tokens, targets) of n sequences, [n 2*length] each."""
    length, first = options.length, lists(n, options, generator)
    start = torch.randint(length, (n, 1), generator=generator)
    place = (torch.arange(length) + start) % length
    again = first.gather(1, place)
    bos = torch.full((n, 1), options.n_tokens)
    # behind the list's last token stands its first, which nothing before has shown
    wanted = again[:, 1:].masked_fill(place[:, 1:] == 0, IGNORED)
    nothing = torch.full((n, length + 1), IGNORED)
    return torch.cat([bos, first, again[:, :-1]], 1), torch.cat([nothing, wanted], 1)


def lookup(options: dict, seed: int, batch_size: int, n_ctx: int, device: torch.device) -> Batches:
    """The data of one member; drawn on the CPU, so that every device trains on the same."""
    found = checked(options)
    if 2 * found.length != n_ctx:
        raise RetraceError(
            f"options of lookup: sequences have {2 * found.length} tokens, n_ctx is {n_ctx}"
        )

    def made(n: int, *identity: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seeded(*identity))
        tokens, targets = sequences(n, found, generator)
        return tokens.to(device), targets.to(device)

    held = made(256, HELD_OUT, 0)
    return Batches(found.n_tokens + 1, lambda step: made(batch_size, seed, step), {"val": held})
