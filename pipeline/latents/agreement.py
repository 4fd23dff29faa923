"""How well estimates agree with exact values: Pearson's correlation, and what it depends on.

Effects of a model's parts have heavy tails: one part may be a hundred times as large as the rest,
and Pearson's correlation then only says whether that one is right. So two more are reported:

    spearman           Pearson's correlation of ranks, ties at their mean rank
    without_largest    Pearson's correlation without the part of largest influence, that is the part
                       whose removal changes Pearson's correlation most; `largest` is its index
"""

from typing import Any, NamedTuple

import numpy as np
from scipy.stats import rankdata


class Agreement(NamedTuple):
    """The three correlations, and the index of the part of largest influence, -1 for none."""

    pearson: float
    spearman: float
    without_largest: float
    largest: int

    @property
    def correlations(self) -> dict[str, float]:
        """The three correlations under the names of their metrics."""
        names = ("correlation", "spearman", "correlation_without_largest")
        return dict(zip(names, self[:3], strict=True))


def correlation(a: Any, b: Any) -> float:
    """Pearson correlation of two sequences; NaN where either is constant or shorter than 2."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    if len(a) < 2 or np.std(a) == 0 or np.std(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def without_each(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson's correlation with each part left out, [n]; NaN if the others do not vary.

    With x and y the deviations from the means, leaving out i takes n/(n-1) x_i y_i from the sum of
    products and likewise from both sums of squares.
    """
    x, y = a - a.mean(), b - b.mean()
    share = len(a) / (len(a) - 1)
    xy, xx, yy = ((u * v).sum() - share * u * v for u, v in ((x, y), (x, x), (y, y)))
    floor = 1e-12  # of the whole sum: below it a difference of sums is rounding
    varies = (xx > floor * (x * x).sum()) & (yy > floor * (y * y).sum())
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(varies, xy / np.sqrt(xx * yy), np.nan)


def agreement(a: Any, b: Any) -> Agreement:
    """How well estimates a [n] agree with exact values b [n]; NaN if a statistic is undefined.

    A part without which nothing varies has the largest influence.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    pearson = correlation(a, b)
    if not np.isfinite(pearson):
        return Agreement(pearson, float("nan"), float("nan"), -1)
    spearman = correlation(rankdata(a), rankdata(b))
    if len(a) < 3:
        return Agreement(pearson, spearman, float("nan"), -1)
    change = np.abs(without_each(a, b) - pearson)
    largest = int(np.argmax(np.where(np.isnan(change), np.inf, change)))
    rest = correlation(np.delete(a, largest), np.delete(b, largest))
    return Agreement(pearson, spearman, rest, largest)
