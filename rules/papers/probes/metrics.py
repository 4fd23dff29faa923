"""Numbers of probes that compare layers: which layer is best depends on what is asked."""

from typing import Any

import numpy as np

METRICS = {
    "*.layers.*.accuracy": "accuracy of the logistic probe on held-out documents, mean over the "
    "hooks behind the embeddings, one value a seed",
    "*.layers.*.gain": "that minus the accuracy at the embeddings",
    "*.layers.*.accuracy_rise": "accuracy at the last hook minus that at the first behind the "
    "embeddings",
    "*.layers.*.selectivity_rise": "the same of its selectivity",
    "*.layers.*.code_rise": "the same of its control's codelength over its own",
}
COLUMNS = ("accuracy", "selectivity", "code")


def layers(arm: str, table: Any) -> dict[str, np.ndarray]:
    """How a label's probes change from the first hook behind the embeddings to the last.

    Args:
        table: scores of an arm, hooks in the order of computation.
    """
    rows = table[(table["probe"] == "logistic") & (table["split"] == "document")]
    rows = rows.assign(code=rows["control_codelength"] / rows["codelength"])
    out = {}
    for label, own in rows.groupby("label", sort=False):
        hooks = [h for h in dict.fromkeys(own["hook"]) if h != "hook_embed"]
        value = {c: own.pivot(index="seed", columns="hook", values=c) for c in COLUMNS}
        for column in COLUMNS:
            change = (value[column][hooks[-1]] - value[column][hooks[0]]).to_numpy()
            if np.isfinite(change).all():
                out[f"{arm}.layers.{label}.{column}_rise"] = change
        mean = value["accuracy"][hooks].mean(axis=1)
        out[f"{arm}.layers.{label}.accuracy"] = mean.to_numpy()
        if "hook_embed" in value["accuracy"]:
            out[f"{arm}.layers.{label}.gain"] = (mean - value["accuracy"]["hook_embed"]).to_numpy()
    return out


def metrics(tables: dict[str, Any]) -> dict[str, Any]:
    """The numbers of METRICS."""
    out: dict[str, Any] = {}
    for name, table in tables.items():
        if name.startswith("probes/") and name.endswith("_scores"):
            arm = name.removeprefix("probes/").removesuffix("_scores")
            out |= layers(arm, table[table["hook"] != ""])
    return out
