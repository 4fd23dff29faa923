"""How good answers are, and how well their probabilities say so; each with an interval.

1. `share` is an accuracy with Wilson's interval (Wilson 1927).
2. `bins` group answers by the probability that they were given, in bins of equal width, or of
   equally many answers (adaptive; Nixon et al. 2019): confidence and accuracy of each bin are the
   axes of a reliability diagram. A probability on a border belongs to the bin below it (Guo et al.
   2017).
3. `calibration_error` is the mean distance of the two, weighted by answers: ECE (Guo et al. 2017).
   Over few answers it is above 0 for calibrated probabilities, too: `floor` says how far.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from scipy import stats

CONFIDENCE = 0.95


def share(right: Bool[np.ndarray, " n"]) -> dict[str, float]:
    """Share of true values with Wilson's 95 % interval: share, low, high, n; NaN where n is 0."""
    n, k = len(right), int(np.sum(right))
    if not n:
        return {"share": np.nan, "low": np.nan, "high": np.nan, "n": 0}
    low, high = stats.binomtest(k, n).proportion_ci(CONFIDENCE, method="wilson")
    return {"share": k / n, "low": float(low), "high": float(high), "n": n}


def parts(
    p: Float[np.ndarray, " n"], n_bins: int = 10, adaptive: bool = False
) -> list[Int[np.ndarray, " some"]]:
    """The answers of each bin that holds any, from the least confident.

    Args:
        p: probability of each answer.
        adaptive: bins of equally many answers, in place of equal width from 0 to 1.
    """
    order = np.argsort(p, kind="stable")
    if adaptive:
        found = np.array_split(order, n_bins)
    else:
        inner = np.linspace(0, 1, n_bins + 1)[1:-1]
        found = np.split(order, np.searchsorted(p[order], inner, side="right"))
    return [rows for rows in found if len(rows)]


def bins(
    p: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"], n_bins: int = 10,
    adaptive: bool = False,
) -> list[dict[str, float]]:  # fmt: skip
    """Each of `parts`: its mean probability (confidence), and the `share` that was right."""
    found = parts(p, n_bins, adaptive)
    return [{"confidence": float(p[i].mean()), **share(right[i])} for i in found]


def calibration_error(
    p: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"], n_bins: int = 10,
    adaptive: bool = False,
) -> float:  # fmt: skip
    """ECE: mean |accuracy - confidence| over bins, weighted by the answers of each."""
    over = right - p
    return float(sum(abs(over[i].sum()) for i in parts(p, n_bins, adaptive)) / len(p))


def bootstrap(
    measure: Callable[..., float], *values: Shaped[np.ndarray, "n ..."], n_draws: int = 200,
    seed: int = 0,
) -> tuple[float, float]:  # fmt: skip
    """The 95 % percentile interval of a measure over rows drawn with replacement."""
    rng, n = np.random.default_rng(seed), len(values[0])
    drawn = [measure(*(v[i] for v in values)) for i in rng.integers(n, size=(n_draws, n))]
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def floor(p: Float[np.ndarray, " n"], n_draws: int = 200, seed: int = 0, **how: Any) -> float:
    """Mean ECE of these probabilities, were each answer right with just its probability."""
    rng = np.random.default_rng(seed)
    drawn = rng.random((n_draws, len(p)))
    return float(np.mean([calibration_error(p, u < p, **how) for u in drawn]))


def errors(
    p: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"], n_bins: int = 10,
    adaptive: bool = False,
) -> dict[str, float]:  # fmt: skip
    """ECE with its bootstrapped 95 % interval, and its floor: ece, low, high, floor."""
    how: dict[str, Any] = {"n_bins": n_bins, "adaptive": adaptive}
    low, high = bootstrap(partial(calibration_error, **how), p, right)
    return {"ece": calibration_error(p, right, **how), "low": low, "high": high,
            "floor": floor(p, **how)}  # fmt: skip
