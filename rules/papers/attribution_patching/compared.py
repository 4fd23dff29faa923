"""How right an estimate is: of nodes by kind, depth and attention, and of edges.

An estimate that has a sign is compared with the exact effect, mean over prompts; atp_star, which
has none, and every count of what matters, with the mean of its absolute value (Kramár et al. 2024).
"""

from typing import Any

import numpy as np
import pandas as pd

from pipeline.circuits import table
from pipeline.circuits.patching import Edge
from pipeline.latents.agreement import agreement
from pipeline.models.pairs import Node

UNSIGNED = "atp_star"
SHARE, LEAST = 0.05, 5  # what matters most: this share of the nodes, at least so many
MATTERS = 0.01  # of the task's change of logit difference
MISSED = 0.2  # an estimate below this share of the exact effect misses it
FOUND = 0.9  # share of what matters most, at which a search ends
SATURATED = 0.9  # of a head's attention on one token
PARTS = ("head", "mlp", "q", "k", "v")


def most(n: int) -> int:
    """How many of n nodes count as those that matter most."""
    return min(n, max(LEAST, round(SHARE * n)))


def top(size: pd.Series, k: int) -> set:
    """Labels of the k largest."""
    return set(size.nlargest(k).index)


def named(row: Any) -> str:
    """How the node or the edge of a row is called: "mlp 0", "q 3.1", "head 2.4 → mlp 7"."""
    if "source_kind" not in row:
        return table.named(Node(*(row[k] for k in ("kind", "layer", "head", "position"))))
    ends = ("source", "target")
    source, target = (Node(*(row[f"{e}_{k}"] for k in ("kind", "layer", "head"))) for e in ends)
    return table.named(Edge(source, target, row["target_input"]))


def checked(rows: pd.DataFrame) -> np.ndarray:
    """Share of what matters most among the 1, 2, … nodes of largest estimate."""
    wanted = top(rows["exact_size"], most(len(rows)))
    order = rows["size"].sort_values(ascending=False, kind="stable").index
    return np.cumsum([label in wanted for label in order]) / len(wanted)


def search(rows: pd.DataFrame) -> pd.DataFrame:
    """`checked` where it rises: how many nodes were patched exactly by then, and what was found."""
    share = checked(rows)
    rises = np.diff(share, prepend=0) > 0
    return pd.DataFrame({"checked": np.flatnonzero(rises) + 1, "found": share[rises]})


def right(rows: pd.DataFrame, method: str, total: float) -> dict[str, Any]:
    """How right one estimate of some nodes, or edges, is; metrics.py says what the names mean."""
    column, k = "size" if method == UNSIGNED else "score", most(len(rows))
    made, exact = rows[column], rows[f"exact_{column}"]
    found = agreement(made, exact)
    out = {"n": float(len(rows))} | found.correlations
    out["largest"] = named(rows.iloc[found.largest]) if found.largest >= 0 else ""
    out["error"] = float((made - exact).abs().sum() / exact.abs().sum())
    out["recall"] = len(top(rows["size"], k) & top(rows["exact_size"], k)) / k
    out["effort"] = float((np.argmax(checked(rows) >= FOUND) + 1) / len(rows))
    large = rows[rows["exact_size"] >= MATTERS * abs(total)]
    lost = large["size"] < MISSED * large["exact_size"]
    out |= {"matter": float(len(large)), "missed": float(lost.mean())}
    same = np.sign(large["score"]) == np.sign(large["exact_score"])
    known = len(large) and method != UNSIGNED
    return out | {"sign": float(same.mean()) if known else float("nan")}


def groups(nodes: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The nodes of one method by kind, by depth, and inputs of heads by how even attention is."""
    whole = nodes[nodes["kind"].isin(PARTS)]
    third = 3 * whole["layer"] // whole["n_layers"]
    inputs = whole[whole["kind"].isin(("q", "k"))]
    full = inputs["peak"] >= SATURATED
    found = {"all": whole, "early": whole[third == 0], "late": whole[third == 2]}
    found |= {"qk": inputs, "saturated": inputs[full], "even": inputs[~full]}
    found |= {kind: whole[whole["kind"] == kind] for kind in PARTS}
    found["resid"] = nodes[nodes["kind"] == "resid"]
    return {name: rows for name, rows in found.items() if len(rows)}


def as_nodes(edges: pd.DataFrame) -> pd.DataFrame:
    """Edges with the columns of nodes; the size of one is the absolute value of its mean."""
    out = edges.rename(columns={"exact": "exact_score"}).reset_index(drop=True)
    return out.assign(size=out["score"].abs(), exact_size=out["exact_score"].abs())


def quality(nodes: pd.DataFrame, edges: pd.DataFrame, total: float) -> pd.DataFrame:
    """A row a method and group, of one model on one task."""
    rows = []
    for method, some in nodes.groupby("method", sort=False):
        for group, part in groups(some.reset_index(drop=True)).items():
            rows.append({"method": method, "group": group, **right(part, method, total)})
    for method, some in edges.groupby("method", sort=False):
        rows.append({"method": method, "group": "edges", **right(as_nodes(some), method, total)})
    return pd.DataFrame(rows)


def searches(nodes: pd.DataFrame, edges: pd.DataFrame) -> pd.DataFrame:
    """`search` of every method, of one model on one task."""
    whole = nodes[nodes["kind"].isin(PARTS)]
    parts = [(m, "node", f.reset_index(drop=True)) for m, f in whole.groupby("method", sort=False)]
    parts += [(m, "edge", as_nodes(f)) for m, f in edges.groupby("method", sort=False)]
    return pd.concat(
        [search(f).assign(method=m, unit=unit, n=len(f)) for m, unit, f in parts],
        ignore_index=True,
    )
