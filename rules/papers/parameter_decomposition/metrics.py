"""Metrics of this paper, one value a seed: of W by itself, of I and Wᵀ under their names."""

from typing import Any

import numpy as np

METRICS = {
    "*.mmcs": "mean over columns of W of the largest cosine with a part's column",
    "*.ml2r": "mean over columns of W of the length of that part's column over its own",
    "*.mmcs_other": "mmcs with the columns of the next seed's target (one seed: its own)",
    "*.alive": "parts whose importance is above the section's `alive` on some row",
    "*.kept": "parts whose norm is above `kept` times the mean length of the matrix's columns",
    "*.unfaithful": "share of the squared norm of the matrix that the sum of its parts misses",
    "*.identity_error": "importances of single features that are further than 0.2 from the "
    "identity, parts in the best order",
    "*.identity_*": "the same of the identity's parts",
    "*.unembed_*": "the same of the parts of Wᵀ",
    "*.ml2r_when_aligned": "ML2R at the first evaluation where MMCS is at least 0.99",
    "*.ablation_gap": "least change of the output without a part that is alive, on rows with its "
    "feature, over the largest without one that is not, on all rows",
    "*.ablation_gap_permuted": "the same where parts are called alive in the reverse order",
}
LEAST = 1e-12  # a change of the output below it counts as that


def of_models(table: Any) -> dict[str, Any]:
    """Columns of the table models, '<target>.<arm>.<matrix>_<column>'; of W without a matrix."""
    out: dict[str, Any] = {}
    for (target, arm, matrix), rows in table.groupby(["target", "arm", "matrix"], sort=False):
        front = "" if matrix == "embed" else f"{matrix}_"
        for name in rows.columns.difference(["target", "arm", "matrix", "seed"]):
            out[f"{target}.{arm}.{front}{name}"] = rows[name].astype(float).tolist()
    return out


def aligned_length(curve: Any) -> float:
    """ML2R where MMCS first is at least 0.99, NaN where it never is."""
    found = curve.loc[curve["mmcs"] >= 0.99, "ml2r"]
    return float(found.iloc[0]) if len(found) else np.nan


def gap(rows: Any, alive: Any) -> float:
    """Least change on their own rows of the parts that are alive, over the largest of the rest."""
    own, rest = rows.loc[alive, "own"].dropna(), rows.loc[~alive, "mean"]
    if not len(own) or not len(rest):
        return np.nan
    return max(own.min(), LEAST) / max(rest.max(), LEAST)


def of_ablations(rows: Any) -> dict[str, float]:
    """The metrics of one model's parts."""
    alive = rows["alive"].to_numpy()
    return {"ablation_gap": gap(rows, alive), "ablation_gap_permuted": gap(rows, alive[::-1])}


def metrics(tables: dict[str, Any]) -> dict[str, Any]:
    """The numbers of METRICS."""
    of = {name.removeprefix("decomposition/"): table for name, table in tables.items()}
    out = of_models(of["models"])
    each = ["target", "arm", "seed"]
    for (target, arm, _), curve in of["curves"].groupby(each, sort=False):
        value = aligned_length(curve.sort_values("step"))
        out.setdefault(f"{target}.{arm}.ml2r_when_aligned", []).append(value)
    for (target, arm, _), rows in of["ablations"].groupby(each, sort=False):
        for name, value in of_ablations(rows.reset_index(drop=True)).items():
            out.setdefault(f"{target}.{arm}.{name}", []).append(value)
    return out
