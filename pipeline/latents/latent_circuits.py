"""A circuit of latents: how good it is by its size, and the graph of its strongest nodes. [torch]

After Marks et al. 2024 (2403.19647, Sec. 3 and 4), on the ablations and edges of subsets.py.

1. `curves`  faithfulness and completeness against the number of nodes. Nodes enter in the order of
             |effect| and are judged on other prompts than those on which they were found.
2. `graph`   nodes of largest |latent_ig| at one position, error terms among them, and the edges of
             largest |effect| among these and to the logits.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pandas as pd

from pipeline.latents.sites import Effects, Sites, scores, strongest
from pipeline.latents.subsets import Ablation, edges
from pipeline.latents.units import ERROR, Latent, Latents


class Kind(NamedTuple):
    """A kind of nodes: how the model is ablated by them, and their order.

    Attributes:
        name: with the number of the draw behind it, where the order is drawn.
        taken_out: whether the complement is measured, too.
    """

    name: str
    ablation: Ablation
    order: list[Latent]
    taken_out: bool = False


def sizes(most: int) -> list[int]:
    """1, 2, 4, … and `most`."""
    return [*(2**i for i in range(64) if 2**i < most), most] if most else []


def curves(
    kinds: list[Kind], on_progress: Callable[[int], None] = lambda _: None
) -> list[dict[str, Any]]:
    """m and m of the complement for each kind and number of nodes, and both as shares."""
    rows = []
    for done, (name, ablation, order, taken_out) in enumerate(kinds, 1):
        counts = sizes(len(order))
        circuits = [frozenset(order[:n]) for n in counts]
        none = float(ablation.metric([frozenset()]).mean())
        whole = float(ablation.sites.task.before.mean())
        kept = ablation.metric(circuits).mean(-1).tolist() if circuits else []
        gone = [float("nan")] * len(counts)
        if taken_out:
            gone = ablation.metric(circuits, complement=True).mean(-1).tolist()
        base = whole - none if whole > none else float("nan")  # no share of what is not there
        for n, m, without in [(0, none, whole), *zip(counts, kept, gone, strict=True)]:
            row = {"kind": name.split()[0], "draw": name, "n_nodes": n, "m": m}
            row |= {"m_without": without, "faithfulness": (m - none) / base}
            rows.append(row | {"completeness": (without - none) / base})
        on_progress(done)
    return rows


def name(node: Latent) -> str:
    """Such as 'resid_post 12/345 @1'."""
    number = "error" if node.number == ERROR else node.number
    return f"{node.kind.removesuffix('_error')} {node.layer}/{number} @{node.position}"


def graph(
    found: dict[str, Effects], units: dict[str, Latents], sites: Sites, alphas: list[float],
    n_nodes: int, n_edges: int, on_progress: Callable[[int], None] = lambda _: None,
) -> tuple[pd.DataFrame, pd.DataFrame, list[Latent]]:  # fmt: skip
    """Tables of nodes and edges, and the nodes.

    The columns of nodes: name, hook, layer, kind, number (-1: error), position, activation (mean
    over prompts; of an error its norm), effect. The logits are the node 'logits'.

    Args:
        found: hook -> effects of all nodes there.
        alphas: points of the gradients, as for `sites.effects`.
        on_progress: called with the number of nodes whose edges are known.
    """
    nodes = strongest(found, n_nodes, by_position=True)
    effect = scores(found, nodes).mean(-1).tolist()
    rows = []
    for node, value in zip(nodes, effect, strict=True):
        f, e = units[node.hook].split(sites.base[node.hook])
        size = e[:, node.position].norm(dim=-1) if node.number == ERROR else (
            f[:, node.position, node.number]
        )  # fmt: skip
        row = {"name": name(node), "layer": node.layer, "kind": node.kind} | node._asdict()
        rows.append(row | {"activation": float(size.mean()), "effect": value})
    made, weights = edges(sites, units, nodes, alphas, on_progress)
    end = {"source": "", "target": "logits", "effect": 0.0}
    links = [
        end | {"source": name(e.source), "effect": w}
        | ({"target": name(e.target)} if e.target else {})
        for e, w in zip(made, weights.tolist(), strict=True)
    ]  # fmt: skip
    table = pd.DataFrame([x for x in links if x["effect"]], columns=list(end))
    strong = table["effect"].abs().sort_values(ascending=False, kind="stable").index[:n_edges]
    return pd.DataFrame(rows), table.loc[sorted(strong)].reset_index(drop=True), nodes
