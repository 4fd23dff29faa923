"""Metrics of this paper: exponents of the loss in the width, one value a seed."""

from typing import Any

import numpy as np

METRICS = {
    "*.*.exponent": "-slope of log loss on log m; weak: of the largest weight decay, strong: of "
    "the least, untrained: of the latter's models before training; a0p5: α = 0.5",
    "*.*.overlap_exponent": "the same of the mean squared cosine among represented features",
    "*.*.represented": "share of features whose norm is above ½, at the least width",
    "*.*.unlearned_ratio": "loss over that of keeping the m most frequent features alone, mean",
}


def slope(rows: Any, column: str) -> float:
    """-slope of the logarithm of a column on log m; NaN where it is undefined at some width."""
    values = rows[column].to_numpy(float)
    if not (np.isfinite(values) & (values > 0)).all():
        return np.nan
    return -float(np.polyfit(np.log(rows["hidden"]), np.log(values), 1)[0])


def of_models(rows: Any) -> dict[str, float]:
    """The metrics of the models of one seed, a width each."""
    rows = rows.sort_values("hidden")
    return {
        "exponent": slope(rows, "loss"),
        "overlap_exponent": slope(rows, "overlap"),
        "represented": float(rows["represented"].iloc[0]),
        "unlearned_ratio": float((rows["loss"] / rows["unlearned"]).mean()),
    }


def metrics(tables: dict[str, Any]) -> dict[str, Any]:
    """The numbers of METRICS."""
    table, out = tables["scaling/models"], {}
    least, most = table["decay"].min(), table["decay"].max()
    regimes = {"weak": ("trained", most), "strong": ("trained", least),
               "untrained": ("untrained", least)}  # fmt: skip
    for regime, (arm, decay) in regimes.items():
        own = table[(table["arm"] == arm) & (table["decay"] == decay)]
        for (alpha, _), rows in own.groupby(["alpha", "seed"]):
            for name, value in of_models(rows).items():
                at = f"{alpha:g}".replace(".", "p")
                out.setdefault(f"{regime}.a{at}.{name}", []).append(value)
    return out
