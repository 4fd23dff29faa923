"""Lists of keys and values, then questions: what value stood behind this key? [torch]

    BOS  k1 v1  k2 v2 … kP vP   q1 a1  q2 a2 … qQ aQ

1. Keys and values are drawn anew for each sequence, keys without repeats; so an answer can only be
   looked up in the list, which takes a head that moves each key to its value and a later one that
   matches (Olsson et al. 2022 call such a pair an induction circuit).
2. The loss is taken at the questions alone.
"""

import torch
from pydantic import Field
from torch import Tensor

from pipeline.errors import RetraceError
from pipeline.spec import Section, parse
from pipeline.training_data import IGNORED, Batches, seeded

HELD_OUT = -1  # no member has this seed


class Options(Section):
    """data.options of a run that learns `lookup`, and the options of its prompts."""

    n_keys: int = Field(ge=3, description="keys of the vocabulary, and values; BOS is one more")
    n_pairs: int = Field(ge=3, description="keys and values of a list")
    n_questions: int = Field(ge=1, description="questions of a sequence")


def checked(options: dict) -> Options:
    """The options; RetraceError where a list has more keys than there are."""
    found = parse(Options, options, "options of lookup")
    if max(found.n_pairs, found.n_questions) > found.n_keys:
        raise RetraceError(
            f"options of lookup: {found.n_pairs} pairs and {found.n_questions} questions need as "
            f"many keys, n_keys is {found.n_keys}; raise it"
        )
    if found.n_questions > found.n_pairs:
        raise RetraceError(
            f"options of lookup: n_questions {found.n_questions} is more than the "
            f"{found.n_pairs} pairs; lower it"
        )
    return found


def draw(n: int, options: Options, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Keys and values of n lists, int64 [n n_pairs] each."""
    keys = torch.rand(n, options.n_keys, generator=generator).argsort(1)[:, : options.n_pairs]
    values = torch.randint(options.n_keys, keys.shape, generator=generator) + options.n_keys
    return keys, values


def sequences(n: int, options: Options, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(tokens, targets) of n lists and questions, [n, 2 (n_pairs + n_questions)] each."""
    keys, values = draw(n, options, generator)
    order = torch.rand(keys.shape, generator=generator).argsort(1)[:, : options.n_questions]
    asked = torch.stack([keys.gather(1, order), values.gather(1, order)], -1).flatten(1)
    bos = torch.full((n, 1), 2 * options.n_keys)
    whole = torch.cat([bos, torch.stack([keys, values], -1).flatten(1), asked], 1)
    targets = torch.full_like(whole[:, 1:], IGNORED)
    targets[:, 2 * options.n_pairs + 1 :: 2] = whole[:, 2 * options.n_pairs + 2 :: 2]
    return whole[:, :-1], targets


def lookup(options: dict, seed: int, batch_size: int, n_ctx: int, device: torch.device) -> Batches:
    """The data of one member; drawn on the CPU, so that every device trains on the same."""
    found = checked(options)
    if (length := 2 * (found.n_pairs + found.n_questions)) != n_ctx:
        raise RetraceError(f"options of lookup: sequences have {length} tokens, n_ctx is {n_ctx}")

    def made(n: int, *identity: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seeded(*identity))
        tokens, targets = sequences(n, found, generator)
        return tokens.to(device), targets.to(device)

    held = made(256, HELD_OUT, 0)
    return Batches(2 * found.n_keys + 1, lambda step: made(batch_size, seed, step), {"val": held})
