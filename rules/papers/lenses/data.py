"""Arithmetic modulo p, worked out from left to right: a task whose intermediate result is known.

A sequence is one expression of one or two operations on a number, such as "5 +3 = 8 ;" and
"5 +3 *2 = 3 ;". Tokens are the numbers 0 to p - 1, the operations +1 +2 … and *2 *3 …, each one
token, and = and ;. A share of the expressions of two operations is never trained on: who answers
them has worked out the result in between. [torch]
"""

from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pipeline.spec.paper import Section, parse
from pipeline.weights.batches import IGNORED, Batches, seeded

F = 1  # the position of the first operation, at which its result is known


class Options(Section):
    """training.arithmetic.data.options of paper.yaml."""

    p: int = Field(ge=5, description="the modulus")
    n_each: int = Field(ge=1, description="additions, and multiplications")
    held_out: float = Field(gt=0, lt=1, description="share of the expressions of two operations")

    @property
    def d_vocab(self) -> int:
        return self.p + 2 * self.n_each + 2

    def apply(self, x: Any, op: Any) -> Any:
        """The result of operation number `op`: + 1, + 2, …, then * 2, * 3, …."""
        return np.where(op < self.n_each, x + op + 1, x * (op - self.n_each + 2)) % self.p

    def split(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the expressions of two operations that are trained on, and the others."""
        order = np.random.default_rng(seed).permutation(self.p * (2 * self.n_each) ** 2)
        cut = round(self.held_out * len(order))
        return order[cut:], order[:cut]

    def expressions(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens "x f g = y ;" [n 6] of the expressions of two operations, and f(x) [n]."""
        n_ops = 2 * self.n_each
        x, f, g = np.unravel_index(numbers, (self.p, n_ops, n_ops))
        partial = self.apply(x, f)
        equals = np.full_like(x, self.d_vocab - 2)
        y = self.apply(partial, g)
        tokens = np.stack([x, self.p + f, self.p + g, equals, y, equals + 1], -1)
        return tokens.astype(np.int64), partial.astype(np.int64)

    def drawn(self, numbers: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
        """n random expressions out of `numbers`, half of them of f alone: tokens [n 6]."""
        tokens, partial = self.expressions(rng.choice(numbers, n))
        short = rng.random(n) < 0.5
        end = tokens[short, 5]
        tokens[short, 2:5] = np.stack([tokens[short, 3], partial[short], end], -1)
        return tokens


def arithmetic(
    options: dict, seed: int, batch_size: int, n_ctx: int, device: torch.device
) -> Batches:
    """Fresh expressions at every step; judged on the answers of those that are held out."""
    how = parse(Options, options, "training: data: options")
    train, held_out = how.split(seed)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng(seeded(seed, step))
        tokens = torch.from_numpy(how.drawn(train, batch_size, rng)).to(device)
        return tokens[:, :-1], tokens[:, 1:]

    tokens = torch.from_numpy(how.expressions(held_out)[0]).to(device)
    targets = tokens[:, 1:].clone()
    targets[:, [0, 1, 2, 4]] = IGNORED
    return Batches(how.d_vocab, batch, {"test": (tokens[:, :-1], targets)})


def items(how: Options, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens "x f g =" [n 4] of the held-out expressions, f(x) [n], and the answer [n].

    Left out are those whose result in between is their number or their answer.
    """
    tokens, partial = how.expressions(how.split(seed)[1])
    new = (tokens[:, [0, 4]] != partial[:, None]).all(1)
    tokens, partial = torch.from_numpy(tokens[new]), torch.from_numpy(partial[new])
    return tokens[:, :4], partial, tokens[:, 4]
