"""Metrics of circuit discovery: what they mean, and how the tables give them.

Names are <task>.<ablation>.<method>.<truth>.<unit>; a reset network's begin with <task>.reset. The
truths are those of truth.py: wired, authors, swapped.
"""

from typing import Any

import numpy as np
import pandas as pd

METRICS = {  # the first pattern that fits a name counts
    "*.n.edges": "edges of the graph",
    "*.n.*": "edges of a known circuit",
    "*.authors_wired": "share of the authors' circuit that is wired in the weights",
    "*.wired_authors": "share of the wired circuit that is in the authors'",
    "*.edges": "area under the ROC curve of a method's edges against a known circuit, pessimistic "
    "between the points (pipeline/roc.py); of random scores the mean of 50 orders",
    "*.nodes": "the same of the nodes that these edges touch",
    "siit.error.*": "largest mean squared error of the trained model over nodes: its outputs "
    "(behaviour), with a part of the program swapped (interchange), with anything else (strict)",
    "*.correlation": "Pearson correlation of |score| and |rise of the loss when the edge alone is "
    "cut| over all edges",
    "*.acdc.n_edges": "edges that ACDC keeps at the smallest threshold",
    "*.acdc.loss": "squared distance of that circuit's outputs to the model's",
}
KEYS = ["task", "weights", "ablation", "method"]
TRUTHS = ("wired", "authors", "swapped")


def prefix(task: str, weights: str, ablation: str) -> str:
    """What the name of a metric begins with."""
    return f"{task}.{ablation}" if weights == "trained" else f"{task}.{weights}.{ablation}"


def correlation(a: pd.Series, b: pd.Series) -> float:
    """Pearson's, of magnitudes; NaN where one does not vary."""
    a, b = a.abs().to_numpy(), b.abs().to_numpy()
    return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else float("nan")


def metrics(tables: dict[str, Any]) -> dict[str, Any]:
    """See METRICS; one value a seed where seeds differ."""
    edges, truth, sets, areas = (
        tables[f"discovery/{t}"] for t in ("edges", "truth", "sets", "areas")
    )
    out: dict[str, Any] = {
        f"siit.error.{check}": float(rows["error"].max())
        for check, rows in tables["siit/checks"].groupby("check")
    }
    for (*key, method, name), rows in areas.groupby([*KEYS, "truth"], sort=False):
        for unit in ("edges", "nodes"):
            out[f"{prefix(*key)}.{method}.{name}.{unit}"] = rows[unit].tolist()
    for task, rows in truth.groupby("task", sort=False):
        out[f"{task}.n.edges"] = float(len(rows))
        for name in TRUTHS:
            out[f"{task}.n.{name}"] = float(rows[name].sum())
        if not rows["authors"].any():
            continue
        wired, authors = rows["wired"].to_numpy(bool), rows["authors"].to_numpy(bool)
        out[f"{task}.authors_wired"] = float((wired & authors).sum() / authors.sum())
        out[f"{task}.wired_authors"] = float((wired & authors).sum() / wired.sum())
    plain = edges[edges["threshold"].isna()]
    for (*key, method), rows in plain.groupby(KEYS, sort=False):
        out[f"{prefix(*key)}.{method}.correlation"] = [
            correlation(some["score"], some["exact"])
            for _, some in rows.groupby("seed", sort=False)
        ]
    last = sets[sets["method"] == "acdc"].groupby([*KEYS, "seed"], sort=False).last()
    for key, rows in last.groupby(["task", "weights", "ablation"], sort=False):
        out[f"{prefix(*key)}.acdc.n_edges"] = rows["n_edges"].astype(float).tolist()
        out[f"{prefix(*key)}.acdc.loss"] = rows["loss"].tolist()
    return out
