"""Metrics of circuit discovery: what they mean, and how the tables give them.

Names are <task>.<ablation>.<method>.<truth>.<unit>; a reset network's begin with <task>.reset. The
truths are those of truth.py: wired, authors, swapped. ACDC's method is acdc where its edges were
cut in an order that was drawn, one for each seed, and acdc_canonical in that of the authors' code.
"""

from typing import Any

import pandas as pd

from pipeline.latents.agreement import correlation

METRICS = {  # the first pattern that fits a name counts
    "*.n.*": "edges of a known circuit",
    "*.authors_wired": "share of the authors' circuit that is wired in the weights",
    "*.edges": "area under the ROC curve of a method's edges against a known circuit, pessimistic "
    "between the points (pipeline/claims/roc.py); of random scores the mean of 50 orders",
    "*.nodes": "the same of the nodes that these edges touch",
    "siit.error.*": "largest mean squared error of the trained model over nodes: its outputs "
    "(behaviour), with a part of the program swapped (interchange), with anything else (strict)",
    "*.correlation": "Pearson correlation of |score| and |rise of the loss when the edge alone is "
    "cut| over all edges",
    "*.acdc.n_edges": "edges that ACDC keeps at the smallest threshold, in a drawn order",
    "*.acdc.loss": "squared distance of that circuit's outputs to the model's",
    "*.acdc.order_differs": "edges that one of the two orders keeps and the other cuts, at the "
    "threshold where they are most",
}
KEYS = ["task", "weights", "ablation"]
TRUTHS = ("wired", "authors", "swapped")


def prefix(task: str, weights: str, ablation: str) -> str:
    """What the name of a metric begins with."""
    return f"{task}.{ablation}" if weights == "trained" else f"{task}.{weights}.{ablation}"


def order_differs(edges: pd.DataFrame) -> list[float]:
    """Most of ACDC's edges of one graph, over thresholds, that the drawn and the canonical order do
    not both keep; one value a seed."""
    kept = edges.assign(kept=edges["score"] >= edges["threshold"])
    drawn, other = (kept[kept["method"] == m] for m in ("acdc", "acdc_canonical"))
    differs = drawn.assign(differs=drawn["kept"].to_numpy() != other["kept"].to_numpy())
    each = differs.groupby(["seed", "threshold"], sort=False)["differs"].sum()
    return each.groupby(level=0, sort=False).max().astype(float).tolist()


def of_truth(rows: pd.DataFrame) -> dict[str, float]:
    """Sizes of the known circuits of one task, and how the authors' agrees with the wired one."""
    out = {f"n.{name}": float(rows[name].sum()) for name in TRUTHS}
    if rows["authors"].any():
        wired, authors = rows["wired"].to_numpy(bool), rows["authors"].to_numpy(bool)
        out["authors_wired"] = float((wired & authors).sum() / authors.sum())
    return out


def metrics(tables: dict[str, Any]) -> dict[str, Any]:
    """See METRICS; one value per seed where seeds differ."""
    names = ("edges", "truth", "sets", "areas")
    edges, truth, sets, areas = (tables[f"discovery/{name}"] for name in names)
    out: dict[str, Any] = {
        f"siit.error.{check}": rows.groupby("seed", sort=False)["error"].max().tolist()
        for check, rows in tables["siit/checks"].groupby("check")
    }
    for (*key, method, name), rows in areas.groupby([*KEYS, "method", "truth"], sort=False):
        for unit in ("edges", "nodes"):
            out[f"{prefix(*key)}.{method}.{name}.{unit}"] = rows[unit].tolist()
    for task, rows in truth.groupby("task", sort=False):
        out |= {f"{task}.{name}": value for name, value in of_truth(rows).items()}
    by_acdc = edges["threshold"].notna()
    for (*key, method), rows in edges[~by_acdc].groupby([*KEYS, "method"], sort=False):
        sizes = rows[["score", "exact"]].abs().groupby(rows["seed"], sort=False)
        found = [correlation(some["score"], some["exact"]) for _, some in sizes]
        out[f"{prefix(*key)}.{method}.correlation"] = found
    for key, rows in edges[by_acdc].groupby(KEYS, sort=False):
        out[f"{prefix(*key)}.acdc.order_differs"] = order_differs(rows)
    left = sets[sets["method"] == "acdc"].groupby([*KEYS, "seed"], sort=False).last()
    for key, rows in left.groupby(KEYS, sort=False):
        for name in ("n_edges", "loss"):
            out[f"{prefix(*key)}.acdc.{name}"] = rows[name].astype(float).tolist()
    return out
