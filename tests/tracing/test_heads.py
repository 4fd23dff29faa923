"""Heads that carry an edge: what the edge loses when the head is cut, exactly."""

from dataclasses import replace

import drawn
import pytest
import torch

from pipeline.tracing import heads
from pipeline.tracing.graph import Tracer, top_logits, trace


def without(found, layer, head):
    """The replacement model with a head's rows of W_O at zero."""
    attention = found.linear.layers[layer].attention
    W_O = attention.W_O.clone()
    W_O[head * attention.d_head : (head + 1) * attention.d_head] = 0
    layers = list(found.linear.layers)
    layers[layer] = replace(layers[layer], attention=replace(attention, W_O=W_O))
    return replace(found, linear=replace(found.linear, layers=layers))


@pytest.mark.parametrize(
    ("kind", "sort", "reads"),
    [
        ("llama", "cross", "mlp.hook_in"),  # queries share keys
        ("gemma2", "each", "hook_resid_mid"),  # a norm behind attention
        ("gpt_neox", "skip", "mlp.hook_in"),  # MLP beside attention
    ],
)
def test_a_head_carries_what_an_edge_loses_without_it(kind, sort, reads):
    found = drawn.replacement(kind, sort, reads=reads)
    graph = trace(found, top_logits(found, 0.0, 3, 0.9), batch_size=32)
    every = torch.ones_like(graph.edges, dtype=torch.bool)
    edges = heads.between_positions(graph, every, graph.edges.numel())[::50]
    kinds = {e.row >= graph.n_chosen for e in edges}, {e.column < graph.n_chosen for e in edges}
    assert kinds == ({True, False}, {True, False})
    carried = heads.carried(found, graph, edges)
    rows = torch.tensor([e.row for e in edges])
    columns = torch.tensor([e.column for e in edges])
    whole = graph.edges[rows, columns]
    for layer, head in ((0, 1), (1, 0), (2, 3)):
        tracer = Tracer(without(found, layer, head))
        top = torch.full((len(graph.logits.tokens),), 3)
        last = torch.full_like(top, graph.n_pos - 1)
        cut = torch.cat(
            [
                tracer.feature_rows(graph.chosen.flip(0)).flip(0),
                tracer.rows(top, last, graph.logits.directions),
            ]
        )
        lost = whole - cut[rows, columns]
        torch.testing.assert_close(carried[:, layer, head], lost, rtol=1e-3, atol=1e-5)
    assert (carried.abs().sum((1, 2)) > 0).all()  # an edge between positions needs a head
    later = [target_layer(graph, e) for e in edges]
    for by_layer, layer in zip(carried, later, strict=True):
        assert (by_layer[layer + 1 :] == 0).all()  # none above the target


def target_layer(graph, edge):
    return int(graph.levels[edge.row])
