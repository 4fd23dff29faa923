"""Logistic probes of the stream of small models, and their borders, in its own units. [torch]

1. `streams` are the rows of sequences that need not be stored.
2. `Standard` are probes of them: logistic.py fits standardised rows, and here the moments of the
   rows that a probe learned from go with it, so that other rows are read, and a border is written,
   as the stream has them.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pipeline.models import hooks
from pipeline.probes import logistic
from pipeline.probes.logistic import Tasks

SEQUENCES = 512  # that a model reads at once
ROWS = 1 << 13  # rows that are read at once
TOLERANCE = 1e-6  # nats a row, as in logistic.fit


def streams(
    model: nn.Module, tokens: Int[Tensor, "n pos"], device: Any,
    at: Int[Tensor, " n"] | None = None, forward: Callable[[Tensor], Any] | None = None,
) -> Float[Tensor, "layers rows d_model"]:  # fmt: skip
    """The embeddings with their positions, and the stream behind every layer, on the device.

    Args:
        at: one position of each sequence; default: all, so that rows are n * pos.
        forward: runs the model in another way, on up to SEQUENCES of them.
    """
    every, parts = range(model.config.n_layers), []
    names = ["blocks.0.hook_resid_pre", *(f"blocks.{i}.hook_resid_post" for i in every)]
    for rows in torch.arange(len(tokens)).split(SEQUENCES):
        with hooks.capture(model, names) as acts:
            (forward or model)(tokens[rows].to(device))
        found = torch.stack([acts[n].float() for n in names])
        if at is not None:
            found = found[:, torch.arange(len(rows)), at[rows], None]
        parts.append(found.flatten(1, 2))
    return torch.cat(parts, 1)


class Standard:
    """Probes of several tasks, for each layer.

    Attributes:
        W: for standardised rows.
        mean, sd: of the rows that were learned from.
    """

    def __init__(self, X: Float[Tensor, "layers rows dims"], tasks: Tasks, l2: float) -> None:
        self.mean, self.sd = logistic.moments(X)
        self.n_classes = tasks.n_classes
        self.W = logistic.fit(self.standard(X), tasks, l2, tolerance=TOLERANCE).W

    def standard(self, X: Float[Tensor, "layers rows dims"]) -> Float[Tensor, "layers rows dims"]:
        """Rows less their mean, in standard deviations."""
        return (X - self.mean[:, None]) / self.sd[:, None]

    def logits(
        self, X: Float[Tensor, "layers rows dims"]
    ) -> Iterator[Float[Tensor, "layers some_rows tasks classes"]]:
        """Logits, in pieces of rows; -inf for classes that a task does not have."""
        for x in X.split(ROWS, 1):
            yield logistic.logits(self.standard(x), self.W, self.n_classes)

    def border(
        self, layer: int, tasks: Int[Tensor, " n"], above: int, below: int
    ) -> tuple[Float[Tensor, "n dims"], Float[Tensor, " n"]]:
        """(w, b) with w x + b > 0 where class `above` is likelier than `below`."""
        W = self.W[layer][:, tasks, above] - self.W[layer][:, tasks, below]
        w = W[:-1].T / self.sd[layer]
        return w, W[-1] - w @ self.mean[layer]
