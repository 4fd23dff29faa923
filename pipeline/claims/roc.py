"""How well sets of edges agree with a known circuit: ROC curves of edges and nodes.

After Conmy et al. 2023 (2304.14997, Sec. 4): every threshold of a method gives a set of edges and
so a point (false positive rate, true positive rate); (0, 0) and (1, 1) are added. Points below and
to the right of another are dropped, and between two that stay the curve is taken to rise only at
the right one, since nothing in between was found: the area is the pessimistic one.

    AUC = sum_i (1 - fpr_(i+1)) (tpr_(i+1) - tpr_i)

A node is found where an edge that touches it is. Queries, keys and values are nodes, and so are
their inputs, as in the authors' code.
"""

import numpy as np
import pandas as pd

COLUMNS = (
    "source_kind source_layer source_head target_kind target_layer target_head target_input".split()
)


def curve(found: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(false, true positive rates) of the points that no other beats, (0, 0) and (1, 1) with them.

    Args:
        found: bool [sets n]; truth: bool [n].
    """
    found, truth = np.asarray(found, bool), np.asarray(truth, bool)
    fpr = (found & ~truth).sum(1) / max(1, (~truth).sum())
    tpr = (found & truth).sum(1) / max(1, truth.sum())
    points = sorted({(0.0, 0.0), (1.0, 1.0), *zip(fpr.tolist(), tpr.tolist(), strict=True)})
    best = np.maximum.accumulate([y for _, y in points])
    kept = [p for p, y in zip(points, best, strict=True) if p[1] >= y]
    return np.array([x for x, _ in kept]), np.array([y for _, y in kept])


def pessimistic_auc(fpr: np.ndarray, tpr: np.ndarray) -> float:
    """The area under the steps through the points of `curve`."""
    return float(((1 - fpr[1:]) * np.diff(tpr)).sum())


def sets_of_scores(scores: np.ndarray) -> np.ndarray:
    """The edges at or above each value of |score|, bool [values edges]."""
    size = np.abs(np.asarray(scores, float))
    return size >= np.unique(size)[::-1, None]


def ends(edge: tuple) -> tuple[str, str]:
    """The nodes that an edge touches.

    Args:
        edge: the values of COLUMNS.
    """
    kind, layer, head, to, to_layer, to_head, slot = edge
    if kind == "input":
        name = f"{layer}.{head}.{slot}"
        return f"{name} input", name
    source = {"head": f"head {layer}.{head}", "mlp": f"mlp {layer}"}.get(kind, kind)
    if to == "head":
        return source, f"{to_layer}.{to_head}.{slot} input"
    return source, f"mlp {to_layer}" if to == "mlp" else to


def incidence(edges: pd.DataFrame) -> tuple[list[str], np.ndarray]:
    """The nodes of a graph, and which edges touch them, bool [edges nodes].

    Args:
        edges: COLUMNS, a row an edge.
    """
    pairs = [ends(e) for e in edges[COLUMNS].itertuples(index=False, name=None)]
    nodes = sorted({n for pair in pairs for n in pair})
    return nodes, np.array([[n in pair for n in nodes] for pair in pairs])


def areas(touched: np.ndarray, found: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """AUC of edges and of nodes.

    Args:
        touched: of `incidence`, bool [edges nodes].
        found: bool [sets edges]; truth: bool [edges].
    """
    nodes = (found.astype(int) @ touched) > 0, (truth.astype(int) @ touched) > 0
    return {
        "edges": pessimistic_auc(*curve(found, truth)),
        "nodes": pessimistic_auc(*curve(*nodes)),
    }


def found_sets(rows: pd.DataFrame) -> np.ndarray:
    """The circuits of one method, bool [sets edges], out of its rows of the table edges.

    Of a method with thresholds there is one a threshold, in the order of the rows; of others one a
    value of the score. The edges stand in the order of the rows, the same for all thresholds.
    """
    score = rows["score"].to_numpy(float)
    if rows["threshold"].isna().all():
        return sets_of_scores(score)
    tau = rows["threshold"].to_numpy(float)
    return (score >= tau).reshape(len(np.unique(tau)), -1)
