"""A circuit of latents as a graph: its strongest nodes, and edges between them. [torch]

After Marks et al. 2024 (2403.19647, Sec. 3 and 4).

1. nodes   of largest |latent_ig| at one position, error terms among them, and the logits.
2. edges   of largest |effect| among those (subsets.py).
"""

from collections.abc import Callable

import pandas as pd

from pipeline.latents.sites import ERROR, Effects, Latent, Latents, Sites, scores, strongest
from pipeline.latents.subsets import edges


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
