"""Which edges the weights make: a model on paper, and a dense one."""

import torch
from test_acdc import CIRCUIT, on_paper, small

from pipeline.circuits.edge_graph import EdgeGraph
from pipeline.circuits.wired import wired


def test_what_is_wired_on_paper():
    graph = EdgeGraph(on_paper(), torch.tensor([[0, 1]]), positions=True)
    assert [e for e, k in zip(graph.edges, wired(graph), strict=True) if k] == CIRCUIT


def test_all_of_a_dense_model_is_wired():
    graph = EdgeGraph(small(), torch.tensor([[0, 1, 2, 3]]), positions=True)
    assert wired(graph).all()
