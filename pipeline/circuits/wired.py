"""Which edges of a graph the weights make, for models trained or compiled here. [torch]

An edge u -> v is wired if v reads a residual dimension that u can write, and if it lies on a way
from the embeddings to the logits. In a dense model that is every edge; in a compiled one it is the
program.
"""

import torch
from torch import Tensor

from pipeline.circuits.edge_graph import EdgeGraph
from pipeline.models.heads import SLOTS
from pipeline.models.pairs import Node


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
