"""Logistic probes that take rows as the stream has them, and give readings and borders. [torch]

logistic.py fits standardised rows. Here the moments of the rows that a probe learned from go with
it, so that other rows are read, and a border is written, in the stream's own units.
"""

from collections.abc import Iterator

from jaxtyping import Float, Int
from torch import Tensor

from pipeline.probes import logistic
from pipeline.probes.logistic import Tasks

ROWS = 1 << 13  # rows that are read at once
TOLERANCE = 1e-6  # nats a row, as in logistic.fit


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
