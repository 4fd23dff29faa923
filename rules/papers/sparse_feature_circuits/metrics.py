"""Metrics of sparse feature circuits: what they mean, and how the tables give them.

Names begin with a kind of nodes (curves.py) and end with a structure of prompts, or with mean or
least: over structures. Every metric has one value a seed.
"""

from typing import Any

import numpy as np

from pipeline.claims.seeds import by_seed, crossing
from pipeline.latents.agreement import agreement

METRICS = {  # the first pattern that fits a name counts
    "logit_diff.*": "mean logit of the right form minus that of the other, held-out prompts",
    "accuracy.*": "share of held-out prompts with a larger logit of the right form",
    "*.n_half.mean": "geometric mean of n_half over structures",
    "*.n_half.*": "number of nodes at which faithfulness first reaches 0.5, interpolated in log n; "
    "of random_nodes on the mean curve; the largest circuit of the curve where none does",
    "*.n_lost.mean": "geometric mean of n_lost over structures",
    "*.n_lost.*": "number of strongest nodes without which half of m(all) - m(none) is lost, "
    "interpolated in log n; the largest circuit of the curve where it never is",
    "*.area.*": "faithfulness, clipped to [0, 1], averaged over log n from one node to the largest "
    "circuit of any kind; behind its own end a curve stays",
    "*.completeness.*": "share of m(all) - m(none) left without as many nodes as the circuit has "
    "that first is half as good as the model",
    "*.last.*": "faithfulness of the largest circuit of the curve",
    "advantage.*": "area of latents minus area of neurons",
    "correlation.*.site*": "Pearson correlation of estimated and exact effects of the latents of "
    "one site (sites in the order of computation, error terms left out), mean over structures",
    "correlation.*.early": "the same of the first site",
    "correlation.*.late": "the same of the last site",
    "correlation.*": "the same, mean over sites and structures",
    "spearman.*": "the same as correlation, of ranks",
    "correlation_without_largest.*": "the same as correlation, without the one latent of each site "
    "and structure whose leaving out changes it the most",
    "gap.*": "|sum of estimates over all nodes of a site - exact effect of patching the site| over "
    "|exact|, mean over sites and structures",
    "none_spread": "largest difference of m(none) between kinds of nodes, over m(all) - m(none)",
}
HALF = 0.5


def reached(n: np.ndarray, values: np.ndarray, level: float) -> float:
    """Where values first reach a level from below, interpolated in log n (rising, from 1); the last
    n if they never do, nan where they are undefined."""
    if np.isnan(values).any():
        return float("nan")
    at = crossing(np.log(n), values, level)
    return float(np.exp(at) if np.isfinite(at) else n[-1])


def area(n: np.ndarray, values: np.ndarray, last: int) -> float:
    """Mean of the clipped curve over log n from 1 to `last`; behind its end a curve stays."""
    grid = np.linspace(0, np.log(max(last, 2)), 200)
    return float(np.interp(grid, np.log(n), np.clip(values, 0, 1)).mean())


def of_curves(rows: Any) -> dict[str, float]:
    """The metrics of one structure; curves are means over draws, without the empty circuit."""
    out, some = {}, rows[rows["n_nodes"] > 0]
    means = some.groupby(["kind", "n_nodes"], sort=False)[["faithfulness", "completeness"]].mean()
    last = int(some["n_nodes"].max())
    for kind, own in means.groupby(level=0, sort=False):
        curve = own.droplevel(0).sort_index()
        n = curve.index.to_numpy(float)
        faithful, without = (curve[c].to_numpy() for c in ("faithfulness", "completeness"))
        out[f"{kind}.n_half"] = reached(n, faithful, HALF)
        out[f"{kind}.area"] = area(n, faithful, last)
        out[f"{kind}.last"] = float(faithful[-1])
        if kind in ("latents", "neurons"):  # the kinds that are taken out, too
            out[f"{kind}.n_lost"] = reached(n, -without, -HALF)
            half = np.log(out[f"{kind}.n_half"])
            out[f"{kind}.completeness"] = float(np.interp(half, np.log(n), without))
    out["advantage"] = out["latents.area"] - out["neurons.area"]
    none = rows[rows["n_nodes"] == 0]
    whole = float(none["m_without"].iloc[0] - none["m"].mean())
    out["none_spread"] = float((none["m"].max() - none["m"].min()) / abs(whole))
    return out


def over_structures(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """Every metric of every structure, and its mean and least."""
    out: dict[str, float] = {}
    for structure, values in found.items():
        out |= {f"{name}.{structure}": v for name, v in values.items() if name != "none_spread"}
    for name in next(iter(found.values())):
        values = np.array([v[name] for v in found.values() if name in v])
        if name == "none_spread":
            out[name] = float(values.max())
            continue
        counts = name.endswith(("n_half", "n_lost"))
        out[f"{name}.mean"] = float(np.exp(np.log(values).mean()) if counts else values.mean())
        out[f"{name}.least"] = float(values.min())
    return out


def of_estimates(nodes: Any, sites: Any) -> dict[str, float]:
    """How right both estimates are."""
    out: dict[str, float] = {}
    nodes, order = nodes[nodes["number"] >= 0], list(dict.fromkeys(sites["hook"]))
    for method in ("ig", "attribution"):
        found = {
            hook: [agreement(own["exact"], own[method]) for _, own in rows.groupby("structure")]
            for hook, rows in nodes.groupby("hook")
        }
        for name in found[order[0]][0].correlations:
            by_site = {h: np.nanmean([a.correlations[name] for a in f]) for h, f in found.items()}
            out |= {f"{name}.{method}.site{i}": by_site[h] for i, h in enumerate(order)}
            out[f"{name}.{method}"] = float(np.mean(list(by_site.values())))
            out[f"{name}.{method}.early"] = by_site[order[0]]
            out[f"{name}.{method}.late"] = by_site[order[-1]]
        gap = (sites[method] - sites["whole"]).abs() / sites["whole"].abs()
        out[f"gap.{method}"] = float(gap.mean())
    return out


def of_seed(part: dict[str, Any]) -> dict[str, float]:
    """Every metric at one seed, out of the tables' rows of that seed."""
    rows = part["behaviour"].set_index("structure")
    out: dict[str, float] = {}
    for name in ("logit_diff", "accuracy"):
        out |= {f"{name}.{s}": float(v) for s, v in rows[name].items()}
        out |= {f"{name}.mean": float(rows[name].mean()), f"{name}.least": float(rows[name].min())}
    curves = part["curves"].groupby("structure", sort=False)
    out |= over_structures({s: of_curves(own) for s, own in curves})
    return out | of_estimates(part["nodes"], part["sites"])


def metrics(tables: dict[str, Any]) -> dict[str, list[float]]:
    """See METRICS; one value per seed, NaN where a seed has none."""
    names = ("behaviour", "curves", "nodes", "sites")
    return by_seed({name: tables[f"agreement/{name}"] for name in names}, of_seed)
