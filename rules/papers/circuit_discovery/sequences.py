"""The tasks' sequences of tokens, clean and corrupt. [torch]

reverse       BOS and the six orders of 1, 2, 3; corrupt: another order
xproportion   distinct sequences of four tokens of the ids 0 to 3; corrupt: another of them

As in acdc/tracr_task/utils.py of the authors' repository, but for `letters`.

The authors number the letters w to z from 0. In the compiled vocabulary 0 to 3 are BOS, the padding
token, w and x, so their sequences have BOS in any place; we keep the ids. `letters` is what the
program was written for: BOS, and then four letters.
"""

from itertools import permutations, product

import numpy as np
import torch
from torch import Tensor


def reverse(n: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """(clean, corrupt), [6 4] each, and never the same order; n does not count."""
    clean = torch.tensor([[3, *order] for order in permutations(range(3))])
    return clean, clean[derangement(len(clean), rng)]


def xproportion(n: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """(clean, corrupt), [n 4] each; corrupt is a random order of clean."""
    every = torch.tensor(list(product(range(4), repeat=4)))
    clean = every[rng.choice(len(every), n, replace=False)]
    return clean, clean[rng.permutation(n)]


def letters(n: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """(clean, corrupt), [n 5] each: BOS, and four of w, x, y, z (ids 2 to 5)."""
    every = all_letters()
    clean = every[rng.choice(len(every), n, replace=False)]
    return clean, clean[rng.permutation(n)]


def all_letters() -> Tensor:
    """BOS and four of w, x, y, z, [256 5]."""
    return torch.tensor([[0, *some] for some in product(range(2, 6), repeat=4)])


def derangement(n: int, rng: np.random.Generator) -> list[int]:
    """A random order in which nothing keeps its place."""
    while (order := rng.permutation(n)).tolist() and (order == np.arange(n)).any():
        pass
    return order.tolist()


SEQUENCES = {"reverse": reverse, "xproportion": xproportion, "letters": letters}
