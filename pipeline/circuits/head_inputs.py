"""Queries, keys and values of heads as nodes, and edges: exact effects, many in one pass. [torch]

What a head reads is replaced at all positions, and what follows is recomputed from its layer on.

1. `input_patching`: a query, key or value takes the value of the source run (Kramár et al. 2024).
2. `many_edges`: it takes what it would read if one earlier part were patched, as
   `patching.edge_patching` does one edge at a time.

Interventions on one layer are rows of one batch, as in patching.py.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.circuits.patching import Edge, Receiver, changed_by
from pipeline.models.heads import SLOTS
from pipeline.models.pairs import Node, Task
from pipeline.models.rerun import OnDone, ignore, in_passes, patched, rerun


def input_nodes(task: Task) -> list[Node]:
    """Every query, key and value, at all positions at once; keys and values by key head."""
    heads = task.heads
    return [
        Node(slot, i, h)
        for i in range(heads.n_layers)
        for slot in SLOTS
        for h in range(heads.count(slot))
    ]


def replaced(
    task: Task, items: list[tuple[Receiver, Float[Tensor, "batch pos d_head"]]]
) -> Float[Tensor, "items batch"]:
    """m of base runs, each with one input of one layer replaced.

    Args:
        items: an input, and its new values.
    """
    places = task.pairs.suffix(task.pairs.first_change(""))  # before it all is as in base
    n, s = places.shape
    inside = places < task.pairs.base.shape[1]
    row = torch.arange(n, device=places.device)[:, None].expand(n, s)[inside]
    index = torch.arange(s, device=places.device).expand(n, s)
    at = (index if task.base.past else places)[inside]
    given = {}
    for receiver in {r for r, _ in items}:
        has = [j for j, (r, _) in enumerate(items) if r == receiver]
        new = [items[j][1][row, places[inside]] for j in has]
        given[receiver] = torch.cat([j * n + row for j in has]), at.repeat(len(has)), torch.cat(new)
    layer = items[0][0].layer
    x = task.pairs.gathered(task.base.pre[layer], places).expand(len(items), -1, -1, -1)
    with task.heads.set_inputs(given):
        return rerun(task, f"blocks.{layer}.hook_resid_pre", x, places)


def input_patching(
    task: Task, nodes: list[Node], on_done: OnDone = ignore
) -> Float[Tensor, "nodes batch"]:
    """m(patched) - m(base) of queries, keys and values.

    Args:
        nodes: of kind q, k or v, at all positions.
        on_done: called with the number of nodes done so far.
    """

    def new(node: Node) -> tuple[Receiver, Tensor]:
        receiver = Receiver(node.layer, node.kind, node.head)
        return receiver, task.heads.read_by(*receiver, task.source.pre[node.layer])

    def m_of(_: int, some: list[int]) -> Tensor:
        return replaced(task, [new(nodes[i]) for i in some])

    return in_passes(task, [n.layer for n in nodes], m_of, _start(task), on_done)


def many_edges(
    task: Task, edges: list[Edge], on_done: OnDone = ignore
) -> Float[Tensor, "edges batch"]:
    """`patching.edge_patching` of each edge.

    Args:
        on_done: called with the number of edges done so far.
    """
    base, heads, start_of = task.base, task.heads, _start(task)

    def new(edge: Edge) -> tuple[Receiver, Tensor]:
        receiver = Receiver(edge.target.layer, edge.slot, edge.target.head)
        x = base.pre[receiver.layer] + changed_by(task, edge.source)
        return receiver, heads.read_by(*receiver, x)

    def m_of(key: tuple[str, int], some: list[int]) -> Tensor:
        kind, layer = key
        if kind == "head":
            return replaced(task, [new(edges[i]) for i in some])
        changes = torch.stack([changed_by(task, edges[i].source) for i in some])
        if kind == "logits":
            return task.metric(task.pairs.at_end(base.post[-1] + changes))
        written = heads.mlp_writes(layer, base.mlp_input(layer) + changes)
        streams = [base.mid[layer] + one for one in written]
        return patched(task, f"blocks.{layer}.hook_resid_post", streams, start_of(key))

    keys = [(e.target.kind, e.target.layer) for e in edges]
    return in_passes(task, keys, m_of, start_of, on_done)


def _start(task: Task) -> Callable[[object], Tensor]:
    """Key of an intervention -> the first token at which the prompts differ, for all the same."""
    first = task.pairs.first_change("")
    return lambda _: first
