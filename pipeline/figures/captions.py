"""Captions with numbers of the run: `{trained.topk.l0}` becomes that metric's mean.

An author writes the metric's name in braces; the same caption is right at every scale.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

PLACE = re.compile(r"\{([A-Za-z]\w*(?:\.\w+)*)\}")
DIGITS = 3  # significant
UNKNOWN = "–"  # a metric that this run did not measure


def metrics_in(caption: str) -> list[str]:
    """The metrics that a caption names, in the order of their first places."""
    return list(dict.fromkeys(PLACE.findall(caption)))


def filled(caption: str, metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """The caption with a number in each place.

    Args:
        metrics: name -> mean, …, as metrics.json has them.
    """
    return PLACE.sub(lambda found: short(metrics.get(found[1], {}).get("mean")), caption)


def short(mean: float | None) -> str:
    """A number for a sentence: 12,345, 0.0312, −2; '–' where it is unknown."""
    if mean is None or not math.isfinite(mean):
        return UNKNOWN
    whole = float(mean).is_integer() or abs(mean) >= 1000
    return (f"{mean:,.0f}" if whole else f"{mean:.{DIGITS}g}").replace("-", "−")
