"""Queries, keys and values of heads as nodes, and edges: exact effects, many in one pass. [torch]

What a head reads is replaced at all positions, and what follows is recomputed from its layer on.

1. `input_patching`: a query, key or value takes the value of the source run (Kramár et al. 2024).
2. `many_edges`: it takes what it would read if one earlier part were patched, as
   `patching.edge_patching` does one edge at a time.

Interventions of a layer are rows of one batch, as in patching.py.
"""

from collections.abc import Callable
from itertools import groupby

import torch
from torch import Tensor

from pipeline.circuits.patching import Edge, Receiver, project
from pipeline.models.heads import SLOTS
from pipeline.models.pairs import Node, Task


def input_nodes(task: Task) -> list[Node]:
    """Every query, key and value, at all positions at once; keys and values by key head."""
    heads = task.heads
    return [
        Node(slot, i, h)
        for i in range(heads.n_layers)
        for slot in SLOTS
        for h in range(heads.count(slot))
    ]


def replaced(task: Task, items: list[tuple[Receiver, Tensor]]) -> Tensor:
    """m [k n] of base runs, each with one input of one layer replaced.

    Args:
        items: an input, and its new values [n pos d_head].
    """
    places = task.suffix(task.first_change(""))  # before it all is as in base
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
    x = task.gathered(task.base.pre[layer], places).expand(len(items), -1, -1, -1)
    with task.heads.set_inputs(given):
        return task.resumed(f"blocks.{layer}.hook_resid_pre", x, places)


def input_patching(
    task: Task, nodes: list[Node], told: Callable[[int], None] = lambda _: None
) -> Tensor:
    """m(patched) - m(base) of queries, keys and values, [nodes n].

    Args:
        nodes: of kind q, k or v, at all positions.
        told: called with the number of nodes done so far.
    """
    receivers = [Receiver(n.layer, n.kind, n.head) for n in nodes]
    new = lambda i: project(task.heads, receivers[i], task.source.pre[nodes[i].layer])  # noqa: E731
    return _grouped(task, [(r.layer,) for r in receivers], _replacing(task, receivers, new), told)


def many_edges(
    task: Task, edges: list[Edge], told: Callable[[int], None] = lambda _: None
) -> Tensor:
    """`patching.edge_patching` of each edge, [edges n]."""
    base, heads = task.base, task.heads
    receivers = [Receiver(e.target.layer, e.slot, e.target.head) for e in edges]
    change = lambda i: task.changed_by(edges[i].source)  # noqa: E731
    new = lambda i: project(heads, receivers[i], base.pre[receivers[i].layer] + change(i))  # noqa: E731
    replacing = _replacing(task, receivers, new)

    def passed(some: list[int]) -> Tensor:
        kind, layer = edges[some[0]].target.kind, edges[some[0]].target.layer
        if kind == "head":
            return replacing(some)
        changes = torch.stack([change(i) for i in some])
        if kind == "logits":
            return task.metric(task.at_end(base.post[-1] + changes))
        mlp = heads.mlp_writes(layer, base.mlp_input(layer) + changes)
        places = task.suffix(task.first_change(""))
        changed = torch.stack([task.gathered(base.mid[layer] + one, places) for one in mlp])
        return task.resumed(f"blocks.{layer}.hook_resid_post", changed, places)

    return _grouped(task, [(e.target.kind, e.target.layer) for e in edges], passed, told)


def _replacing(
    task: Task, receivers: list[Receiver], new: Callable[[int], Tensor]
) -> Callable[[list[int]], Tensor]:
    return lambda some: replaced(task, [(receivers[i], new(i)) for i in some])


def _grouped(
    task: Task, keys: list[tuple], passed: Callable[[list[int]], Tensor], told: Callable
) -> Tensor:
    """m - m(base) of items, [items n]; those of one key share passes, as many as fit."""
    out = torch.zeros(len(keys), len(task.before), device=task.before.device)
    length, done = task.suffix(task.first_change("")).shape[1], 0
    for _, group in groupby(sorted(range(len(keys)), key=keys.__getitem__), key=keys.__getitem__):
        for some in task.pieces(list(group), length):
            out[some] = passed(some) - task.before
            done += len(some)
            told(done)
    return out
