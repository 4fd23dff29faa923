"""Features taken out of the true model, beside what the graph says, and the null."""

import drawn
import pytest
import torch
from torch import nn

from pipeline.latents.agreement import correlation
from pipeline.tracing import suppressed
from pipeline.tracing.graph import top_logits, trace
from pipeline.tracing.replacement import Replacement

SIZE = 0.2  # of what the MLPs write: small, so that norms and patterns move little


class Transcoder(nn.Module):
    """An MLP that is a layer of the dictionaries."""

    def __init__(self, found, layer):
        super().__init__()
        self.found, self.layer = found, layer

    def forward(self, x):
        (y,) = self.found.decode(self.layer, self.found.encode(self.layer, x))
        return y + self.found.rest(self.layer, x)


@pytest.fixture(scope="module")
def case():
    """A model whose MLPs are its transcoders, so that a graph has no errors."""
    hf, found = drawn.model(), drawn.dictionaries()
    for layer in range(drawn.N_LAYERS):
        found.W_dec[layer].mul_(SIZE)
        hf.model.layers[layer].mlp = Transcoder(found, layer)
    model = Replacement.of(hf, drawn.TOKENS, found)
    assert max(float(e.abs().max()) for e in model.errors) < 1e-5
    return hf, model, trace(model, top_logits(model, 0.0, 5, 0.99), batch_size=64)


def test_what_a_graph_says_is_carried_on_along_its_edges(case):
    _, _, graph = case
    sources = torch.tensor([0, 5, graph.n_chosen - 1])
    found = suppressed.said(graph, sources)
    n = graph.n_chosen
    # r = M r + e with r the shares: solved at once, the row of the source held at -1
    activation = graph.features.activation[graph.chosen]
    M = (graph.edges[:n, :n] / activation[:, None]).double()
    for row, source in zip(found.double(), sources.tolist(), strict=True):
        held = M.clone()
        held[source] = 0
        e = torch.zeros(n).double()
        e[source] = -1
        share = torch.linalg.solve(torch.eye(n).double() - held, e)
        torch.testing.assert_close(row[:n], share, rtol=1e-3, atol=1e-6)
        logits = graph.edges[n:, :n].double() @ share
        torch.testing.assert_close(row[n:], logits, rtol=1e-3, atol=1e-6)


def test_the_true_model_does_what_the_graph_says_and_not_what_another_feature_would(case):
    hf, model, graph = case
    draw = torch.Generator().manual_seed(0)
    layer = graph.features.layer[graph.chosen]
    sources = (layer < 2).nonzero()[::4, 0]
    found = suppressed.compare(hf, model, graph, sources, draw)
    said, measured, null = (x[~found.measured.isnan()] for x in found)
    # null: whether what is said of a feature fits what a random feature, as active, does
    assert len(said) > 300
    right, by_chance = correlation(said, measured), correlation(said, null)
    # .83 and .19 were seen before these bounds were set: they guard them, no source asks for them.
    assert right > 0.7 and abs(by_chance) < 0.35, (right, by_chance)


def test_what_is_measured_is_the_models_own_change(case):
    """One feature, by hand: its decoder row is taken from what its layer writes."""
    hf, model, graph = case
    features, source = graph.features, int((graph.features.layer == 1).nonzero()[0, 0])
    at, number = int(features.position[source]), int(features.number[source])
    change = features.activation[source] * model.dictionaries.W_dec[1][number, 0]

    def less(_module, _args, out):
        out = out.clone()
        out[:, at] -= change
        return out

    before = hf(drawn.TOKENS[None]).logits[0, -1]
    handle = hf.model.layers[1].mlp.register_forward_hook(less)
    after = hf(drawn.TOKENS[None]).logits[0, -1]
    handle.remove()
    tokens = graph.logits.tokens
    want = (after - after.mean())[tokens] - (before - before.mean())[tokens]
    found = suppressed.compare(hf, model, graph, torch.tensor([source]), torch.Generator())
    torch.testing.assert_close(found.measured[0, graph.n_chosen :], want, rtol=1e-3, atol=1e-5)
    # Nodes of its own layer and below, and at positions before it, are not behind it.
    behind = (features.layer > 1) & (features.position >= at)
    assert (found.measured[0, : graph.n_chosen].isnan() == ~behind).all()
    assert (found.said[0, : graph.n_chosen].isnan() == ~behind).all()


def test_the_null_has_the_length_of_the_feature_and_another_direction(case):
    _, model, _ = case
    draw = torch.Generator().manual_seed(1)
    for i in range(0, len(model.features), 7):
        number = int(model.features.number[i])
        layer, at, change = suppressed._edit(model, i, number)
        other = suppressed._other(model, i, draw)
        assert other[:2] == (layer, at)
        torch.testing.assert_close(other[2].norm(), change.norm())
        assert torch.cosine_similarity(other[2].flatten(), change.flatten(), 0) < 0.9
