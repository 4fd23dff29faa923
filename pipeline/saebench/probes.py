"""Sparse probes: how well k latents tell a label, as SAEBench 0.6.0 measures it. [torch]

For each label in turn (Karvonen et al. 2025, 2503.09532, Section 3.4; Gurnee et al. 2023):

1. `drawn`: all texts of the label, and as many of all others, drawn at random.
2. `selected`: the k dimensions whose mean differs most between the two, on training texts.
3. `fitted`: logistic regression with an L2 penalty on these k, and its accuracy on other texts.

Random numbers are drawn in SAEBench's order, so that the same seed gives the same texts and, the
optimum being one, the same accuracy but for texts on the boundary. A test holds this against its
own functions. Its probe on all dimensions is not followed: it keeps, of 100 epochs, the one of best
accuracy on the test texts, which a test shows to be above that of the last. Here it is the same
regression on all dimensions.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from pipeline.errors import RetraceError

PENALTY = 1.0  # C of scikit-learn's LogisticRegression, whose loss is |w|^2 / 2 + C sum of losses
STEPS = 1000
ALL = 0  # k of the probe on every dimension
Labelled = tuple[Float[Tensor, "texts width"], Float[Tensor, " texts"]]


def drawn(acts: dict[str, Tensor], label: str, generator: torch.Generator) -> Labelled:
    """Texts of a label (1) and as many of all others (0), shuffled.

    Args:
        acts: label -> [texts width], as many texts of each.
    """
    n, others = len(acts[label]), [name for name in acts if name != label]
    each = math.ceil(n / len(others))

    def some(x: Tensor, most: int) -> Tensor:
        return x[torch.randperm(len(x), generator=generator)[:most]]

    negative = some(torch.cat([some(acts[name], each) for name in others]), n)
    x = torch.cat([acts[label], negative])
    y = torch.cat([torch.ones(n), torch.zeros(n)])
    order = torch.randperm(2 * n, generator=generator)
    return x[order], y[order]


def selected(x: Float[Tensor, "texts width"], y: Float[Tensor, " texts"], k: int) -> Int64[
    Tensor, " k"
]:  # fmt: skip
    """The k dimensions of largest |mean of the label - mean of the others|."""
    difference = (x[y == 1].mean(0) - x[y == 0].mean(0)).abs()
    return difference.argsort(descending=True)[:k]


def fitted(x: np.ndarray, y: np.ndarray, balanced: bool = False) -> np.ndarray:
    """Weights and, last, intercept of min_w |w|^2 / 2 + sum C log(1 + exp(-s (x w + b))).

    Args:
        x: [texts width].
        y: 0 or 1; s = 2 y - 1.
        balanced: C is divided by twice the share of the texts that have the same y.
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    x, s = x.astype(np.float64), 2.0 * y - 1
    C = PENALTY * len(y) / (2 * np.where(y == 1, (y == 1).sum(), (y == 0).sum()))
    C = C if balanced else np.full(len(y), PENALTY)

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        margin = s * (x @ w[:-1] + w[-1])
        slope = -C * s * expit(-margin)
        value = w[:-1] @ w[:-1] / 2 + C @ np.logaddexp(0, -margin)
        return value, np.append(w[:-1] + slope @ x, slope.sum())

    start = np.zeros(x.shape[1] + 1)
    options = {"maxiter": STEPS, "ftol": 1e-12, "gtol": 1e-6}
    return minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x


def accuracy(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
    """Share of texts on whose side of the boundary they are."""
    return float(((x @ weights[:-1] + weights[-1] > 0) == (y == 1)).mean())


def probed(
    train: dict[str, Tensor], test: dict[str, Tensor], k: int, seed: int
) -> Iterator[dict[str, Any]]:
    """A row for each label: the accuracy of a probe on k dimensions, on texts it was not fitted on.

    Args:
        train, test: label -> means [texts width].
        k: ALL for every dimension.

    Raises:
        RetraceError: k is more than there are dimensions.
    """
    width = next(iter(train.values())).shape[1]
    if k > width:
        raise RetraceError(f"benchmarks.ks: a probe on {k} of {width} dimensions; lower it")
    generator = torch.Generator().manual_seed(seed)
    for label in train:
        (x, y), (x_test, y_test) = (drawn(acts, label, generator) for acts in (train, test))
        picked = selected(x, y, k) if k else torch.arange(x.shape[1])
        parts = (x[:, picked], y, x_test[:, picked], y_test)
        x, y, x_test, y_test = (part.numpy() for part in parts)
        yield {"label": label, "accuracy": accuracy(x_test, y_test, fitted(x, y))}


def rows(
    train: dict[str, Tensor], test: dict[str, Tensor], ks: Iterable[int], seeds: Iterable[int]
) -> list[dict[str, Any]]:
    """The rows of `probed` for each k and each seed of the draw."""
    return [
        {"k": k, "seed": seed} | row
        for k in ks
        for seed in seeds
        for row in probed(train, test, k, seed)
    ]
