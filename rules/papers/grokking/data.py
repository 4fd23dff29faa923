"""Modular addition: all p² pairs (a, b) as tokens a, b, "=", of which a share is trained on.

The split is that of the released code (transformers.py, gen_train_test): the pairs in order, then
random.seed(seed), random.shuffle, and the first int(frac_train · p²). The answer (a + b) mod p is
read at the last position, "=", whose token has the id p; so there are p classes among p + 1 tokens.
"""

import random
from typing import Any

from pydantic import Field

from pipeline.spec.paper import Section, parse


class Options(Section):
    """training.<run>.data.options of paper.yaml."""

    p: int = Field(ge=3, description="the modulus; odd, so that every frequency has cos and sin")
    frac_train: float = Field(gt=0, lt=1, description="share of the pairs that is trained on")


def split(p: int, frac_train: float, seed: int) -> tuple[list, list]:
    """The pairs (a, b) that are trained on, and the others, as the released code draws them."""
    pairs = [(a, b) for a in range(p) for b in range(p)]
    random.Random(seed).shuffle(pairs)  # the same order as random.seed(seed); random.shuffle
    cut = int(frac_train * len(pairs))
    return pairs[:cut], pairs[cut:]


def sequences(pairs: list, p: int) -> tuple[Any, Any]:
    """Tokens a, b, = and targets, int64 [pairs, 3] each; -100 where no loss is taken."""
    import torch

    a, b = torch.tensor(pairs, dtype=torch.int64).T
    tokens = torch.stack([a, b, torch.full_like(a, p)], 1)
    targets = torch.full_like(tokens, -100)
    targets[:, -1] = (a + b) % p
    return tokens, targets


def modular_addition(options: dict, seed: int, batch_size: int, n_ctx: int, device: Any) -> Any:
    """The full batch of training pairs at every step; the other pairs are the test set."""
    from pipeline.weights.batches import Batches

    given = parse(Options, options, "training: data: options")
    train, test = (
        tuple(t.to(device) for t in sequences(pairs, given.p))
        for pairs in split(given.p, given.frac_train, seed)
    )
    return Batches(
        d_vocab=given.p + 1,
        batch=lambda step: train,
        evaluation={"train": train, "test": test},
        constant=True,
    )
