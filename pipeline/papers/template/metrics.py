"""Metrics of this paper: what they mean, and how they follow from the tables."""

from typing import Any

# Name or pattern -> definition, in one sentence. A claim may name only what stands here.
METRICS = {
    "cosine.d*": "mean over pairs of |cos| of two random directions of R^d, one value a seed",
}


def metrics(tables: dict[str, Any]) -> dict[str, Any]:
    """Metric -> one value a seed.

    Args:
        tables: name -> DataFrame, named as in paper.yaml.
    """
    cosines = tables["measure/cosines"].groupby("d_model")["cosine"]
    return {f"cosine.d{d}": values.tolist() for d, values in cosines}
