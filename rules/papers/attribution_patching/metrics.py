"""Metrics of attribution patching: what they mean, and how the tables give them.

Names are <arm>.<task>.<method>.<group>.<metric>; compared.py has the groups and the thresholds.
Groups of nodes: all (heads, MLPs, queries, keys, values), head, mlp, q, k, v, qk; saturated and
even, the queries and keys of heads whose largest attention weight is above 0.9 or not; early and
late thirds of the layers; resid, the stream at named positions. Group edges: those patched exactly.
"""

from typing import Any

from pipeline.claims.seeds import by_seed, defined, of_rows
from pipeline.latents.fidelity import share

METRICS = {  # the first pattern that fits a name counts
    "*random.*.correlation": "as correlation below, of a null arm: a model as training begins",
    "*random.*.total": "as total, of a null arm: a model as training begins",
    "*.correlation": "Pearson correlation of estimate and exact effect, mean over prompts; of "
    "atp_star and the mean absolute effect",
    "*.spearman": "the same of ranks",
    "*.correlation_without_largest": "Pearson's without the one node or edge whose leaving out "
    "changes it the most; the column largest of the table quality names it",
    "*.sign": "share of nodes or edges that matter (exact effect at least 1 % of the task's change "
    "of logit difference) whose estimate has the sign of the exact effect",
    "*.error": "sum of |estimate - exact| over the sum of |exact|",
    "*.recall": "share of what matters most (largest 5 % by mean absolute exact effect, at least "
    "five) that is as high among the estimates; of edges: of those that are patched exactly, by "
    "the absolute value of the mean",
    "*.effort": "share of the nodes or edges that must be patched exactly, in the order of the "
    "estimate, until 90 % of what matters most is found",
    "*.matter": "nodes or edges whose exact effect is at least 1 % of the task's change of logit "
    "difference",
    "*.missed": "share of those whose estimated size is below a fifth of the exact one: false "
    "negatives",
    "*.completeness_gap": "(sum of estimates of all edges into the logits - total) / |total|",
    "*.seconds": "seconds that the method took for all nodes, or for edges; the two runs on the "
    "prompts and their activations not counted",
    "*.total": "mean over prompts of m(corrupt) - m(clean), m the logit of the right answer minus "
    "that of the wrong one",
    "*.clean": "mean of m on the clean prompts; where it is not above zero, its share kept is "
    "undefined",
    "*.corrupt": "mean of m on the corrupt prompts",
    "*.right": "share of clean prompts with m > 0",
    "*.kept": "m on the corrupt prompts over m on the clean ones",
}
COLUMNS = "correlation spearman correlation_without_largest sign error recall effort".split()
COLUMNS += ["matter", "missed"]


def of_seed(tables: dict[str, Any]) -> dict[str, float]:
    """Every metric at one seed, out of the tables' rows of that seed."""
    out: dict[str, float] = {}
    for row in tables["totals"].to_dict("records"):
        key, total = f"{row['arm']}.{row['task']}", row["total"]
        out |= {f"{key}.{name}": row[name] for name in ("total", "clean", "corrupt", "right")}
        out[f"{key}.kept"] = share(row["corrupt"], row["clean"])
        for method in ("eap", "eap_ig"):
            gap = share(row[f"into_logits_{method}"] - total, abs(total))
            out[f"{key}.{method}.edges.completeness_gap"] = gap
    costs = tables["costs"].assign(unit=tables["costs"]["unit"] + "s")
    out |= of_rows(tables["quality"], ["arm", "task", "method", "group"], COLUMNS)
    return out | of_rows(costs, ["arm", "task", "method", "unit"], ["seconds"])


def metrics(tables: dict[str, Any]) -> dict[str, list[float]]:
    """See METRICS; one value per seed, NaN where a seed has none. What no seed has is left out."""
    names = ("totals", "quality", "costs")
    return defined(by_seed({name: tables[f"estimates/{name}"] for name in names}, of_seed))
