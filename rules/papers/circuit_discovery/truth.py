"""Which edges of a compiled model belong to its circuit, by three sources. [torch]

wired     what is built in: v reads a residual dimension that u writes, and the edge lies on a way
          from the embeddings to the logits; of the trained model what it was trained for. No method
          made it.
authors   the canonical circuit of the ACDC repository (acdc/tracr_task/utils.py). Its docstrings
          say that it is what ACDC found with zero ablation and a tiny threshold.
swapped   what must stay for the output when tokens are swapped for others (Miller, Chughtai &
          Saunders 2024, 2407.08734; official_circuits/circuits/tracr in their auto-circuit).
"""

import torch
from torch import Tensor

from pipeline.circuits.edge_graph import EdgeGraph
from pipeline.circuits.patching import Edge
from pipeline.models.heads import SLOTS
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
    if name in ("embed", "pos"):
        return Node(name, 0), ""
    if name == "logits":
        return Node("logits", -1), ""
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


def writes(graph: EdgeGraph, source: Node) -> Tensor:
    """The residual dimensions that a source can write, bool [d_model]."""
    model, heads = graph.hf.base_model, graph.heads
    if source.kind == "embed":
        return (model.tok_embed.weight != 0).any(0)
    if source.kind == "pos":
        return (model.pos.weight != 0).any(0)
    layer = heads.layers[source.layer]
    if source.kind == "mlp":
        alive = (layer.mlp.fc_in.weight != 0).any(1)
        return (layer.mlp.fc_out.weight[:, alive] != 0).any(1)
    alive = (heads.place(source.layer, "v", source.head).module.weight != 0).any(1)
    at = slice(source.head * heads.d_head, (source.head + 1) * heads.d_head)
    return (heads.W_O(source.layer)[source.head][alive[at]] != 0).any(0)


def reads(graph: EdgeGraph, target: Node, slot: str) -> Tensor:
    """The residual dimensions that a target reads, bool [d_model]."""
    heads = graph.heads
    if target.kind == "logits":
        return (graph.hf.get_output_embeddings().weight != 0).any(0)
    if target.kind == "mlp":
        return (heads.layers[target.layer].mlp.fc_in.weight != 0).any(0)
    place = heads.place(target.layer, slot, target.head)
    return (place.module.weight[place.columns] != 0).any(0)


def wired(graph: EdgeGraph) -> Tensor:
    """The edges that the weights make, bool [edges].

    1. u -> v joins where u can write a dimension that v reads.
    2. Kept is what reaches the logits, and is reached from an embedding.
    """
    joined = {
        e
        for e in graph.edges
        if e.source.kind != "input"
        and bool((writes(graph, e.source) & reads(graph, e.target, e.slot)).any())
    }
    fed = {Node("embed", 0), Node("pos", 0)}
    for source in graph.sources[graph.n_embeds :]:
        slots = ("v",) if source.kind == "head" else ("",)
        if any(e.source in fed for e in joined if e.target == source and e.slot in slots):
            fed.add(source)
    used, out = {Node("logits", -1)}, torch.zeros(len(graph.edges), dtype=torch.bool)
    for e in graph.edges:  # from the logits down
        if e in joined and e.source in fed and e.target in used:
            used.add(e.source)
            out[graph.at[e]] = True
    heard = {(e.target, e.slot) for e in graph.edges if out[graph.at[e]]}
    for e in graph.edges:
        if e.source.kind == "input" and e.slot in SLOTS and (e.target, e.slot) in heard:
            out[graph.at[e]] = True
    return out


def truths(graph: EdgeGraph, model: str) -> dict[str, Tensor]:
    """Source -> its circuit, bool [edges]; no edges where a source does not speak of a model.

    In a trained model everything is wired with everything: it has the circuit of its training.
    """
    none = torch.zeros(len(graph.edges), dtype=torch.bool)
    out = {"wired": wired(graph) if model in AUTHORS else listed(graph, TRAINED)}
    for name, lists in (("authors", AUTHORS), ("swapped", SWAPPED)):
        out[name] = listed(graph, lists[model]) if model in lists else none
    return out
