"""Which edges of a compiled model belong to its circuit, by three sources. [torch]

wired     what is built in (pipeline/circuits/wired.py); of the trained model what it was trained
          for. No method made it.
authors   the canonical circuit of the ACDC repository (acdc/tracr_task/utils.py). Its docstrings
          say that it is what ACDC found with zero ablation and a tiny threshold.
swapped   what must stay for the output when tokens are swapped for others (Miller, Chughtai &
          Saunders 2024, 2407.08734; official_circuits/circuits/tracr in their auto-circuit).
"""

import torch
from torch import Tensor

from pipeline.circuits.edge_graph import EdgeGraph
from pipeline.circuits.patching import Edge
from pipeline.circuits.wired import wired
from pipeline.models.pairs import Node

# source > target; a query, key or value is layer.head.slot, and stands alone for its use.
AUTHORS = {
    "reverse": "3.0 > logits; 3.0.v; 3.0.k; 3.0.q; embed > 3.0.v; pos > 3.0.k; mlp2 > 3.0.q; "
    "mlp1 > mlp2; mlp0 > mlp1; embed > mlp1; pos > mlp1; 0.0 > mlp0; embed > mlp0; 0.0.v; "
    "embed > 0.0.v",
    "xproportion": "1.0 > logits; 1.0.v; 1.0.k; 1.0.q; mlp0 > 1.0.v; embed > 1.0.k; pos > 1.0.k; "
    "embed > 1.0.q; pos > 1.0.q; embed > mlp0",
}
SWAPPED = {
    "reverse": "3.0 > logits; 3.0.v; embed > 3.0.v",
    "xproportion": "1.0 > logits; 1.0.v; mlp0 > 1.0.v; embed > mlp0",
}
TRAINED = SWAPPED["xproportion"]  # the places that siit.py gives the program's parts

SOURCES = ("wired", "authors", "swapped")


def node(name: str) -> tuple[Node, str]:
    """('3.0.k') -> (head 3.0, 'k'); ('mlp2') -> (MLP 2, '')."""
    if name in ("embed", "pos", "logits"):
        return Node(name, -1 if name == "logits" else 0), ""
    if name.startswith("mlp"):
        return Node("mlp", int(name[3:])), ""
    layer, head, *slot = name.split(".")
    return Node("head", int(layer), int(head)), "".join(slot)


def edge(text: str) -> Edge:
    """One edge of the lists above."""
    source, _, target = text.strip().partition(" > ")
    if not target:
        head, slot = node(source)
        return Edge(Node("input", head.layer, head.head), head, slot)
    return Edge(node(source)[0], *node(target))


def listed(graph: EdgeGraph, text: str) -> Tensor:
    """The edges of a list, bool [edges]; KeyError for one that the graph has not."""
    out = torch.zeros(len(graph.edges), dtype=torch.bool)
    out[[graph.at[edge(part)] for part in text.split(";")]] = True
    return out


def truths(graph: EdgeGraph, model: str) -> dict[str, Tensor]:
    """Source -> its circuit, bool [edges]; no edges where a source does not speak of a model.

    In a trained model everything is wired with everything: it has the circuit of its training.
    """
    out = {"wired": wired(graph) if model in AUTHORS else listed(graph, TRAINED)}
    for name, lists in (("authors", AUTHORS), ("swapped", SWAPPED)):
        none = torch.zeros_like(out["wired"])
        out[name] = listed(graph, lists[model]) if model in lists else none
    return out
