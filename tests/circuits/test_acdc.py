"""ACDC and its graph: against plain code, against edge patching and EAP, and on paper."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from test_patching import EVEN, PROMPTS, tiny

from pipeline.circuits import acdc, eap, methods, table
from pipeline.circuits.edge_graph import EdgeGraph
from pipeline.circuits.patching import Edge, edge_patching
from pipeline.errors import RetraceError
from pipeline.models.native import NativeForCausalLM
from pipeline.models.pairs import Node, Pairs, Task
from pipeline.spec.measured import CircuitsSpec
from pipeline.spec.training import Architecture

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
LOGITS = Node("logits", -1)


def small(seed: int = 0, **more) -> NativeForCausalLM:
    """Two layers of two heads, every weight and bias random, and layer norm."""
    shape = {"n_layers": 2, "d_model": 6, "n_heads": 2, "d_head": 4, "d_mlp": 5, "n_ctx": 4}
    config = {"d_vocab": 7, **Architecture(**shape, **more).model_dump()}
    made = NativeForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    for p in made.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator) * 0.7)
    return made.eval().requires_grad_(False)


TOKENS = torch.tensor([[1, 2, 3, 4], [4, 0, 6, 5]])
CORRUPT = torch.tensor([[1, 5, 3, 0], [2, 0, 3, 6]])


class Naive:
    """The same graph in plain code: one graph at a time, a loop over everything."""

    def __init__(self, hf, tokens, corrupt, edges):
        self.body, self.tokens, self.edges = hf.model, tokens, edges
        self.off, self.off_inputs = {}, {}
        self.off = dict.fromkeys(self.forward(tokens, set())[1], 0.0)
        if corrupt is not None:
            self.off = self.forward(corrupt, set())[1]
        inside = {e for e in edges if e.source.kind != "input"}
        self.off_inputs = self.forward(tokens, inside)[2]

    def forward(self, tokens, cut):
        """(logits, what nodes write, what heads use) with a set of edges cut."""
        body, made, used = self.body, {}, {}
        where = body.pos.weight[: tokens.shape[1]]
        made[Node("embed", 0)] = body.tok_embed.weight[tokens]
        made[Node("pos", 0)] = where.expand(*tokens.shape, -1)
        bias = torch.zeros(where.shape[1])

        def read(target, slot):
            x = bias
            for source, value in made.items():
                is_cut = Edge(source, target, slot) in cut
                x = x + (self.off[source] if is_cut else value)
            return x.expand(*tokens.shape, -1)

        for i, layer in enumerate(body.layers):
            written = {}
            for h in range(layer.attn.n_heads):
                at = slice(h * layer.attn.d_head, (h + 1) * layer.attn.d_head)
                part = {}
                for slot in "qkv":
                    linear = getattr(layer.attn, slot)
                    head = Node("head", i, h)
                    x = layer.ln1(read(head, slot))
                    part[slot] = x @ linear.weight[at].T + linear.bias[at]
                    used[i, h, slot] = part[slot]
                    if Edge(Node("input", i, h), head, slot) in cut:
                        part[slot] = self.off_inputs[i, h, slot]
                scores = part["q"] @ part["k"].mT / layer.attn.d_head**0.5
                scores = scores.masked_fill(layer.attn.future[:4, :4], float("-inf"))
                z = scores.softmax(-1) @ part["v"]
                written[Node("head", i, h)] = z @ layer.attn.o.weight[:, at].T
            made |= written
            bias = bias + layer.attn.o.bias
            made[Node("mlp", i)] = layer.mlp(layer.ln2(read(Node("mlp", i), "")))
        return body.head(body.ln_out(read(LOGITS, ""))), made, used

    def acdc(self, loss, tau, order=None):
        """Algorithm 1: the edges that stay."""
        cut, current = set(), loss(self.forward(self.tokens, set())[0])
        for edge in order or self.edges:
            after = loss(self.forward(self.tokens, cut | {edge})[0])
            if after - current < tau:
                cut, current = cut | {edge}, after
        return [e not in cut for e in self.edges]


@pytest.fixture(params=["zero", "corrupt"])
def pair(request):
    """(graph, the same in plain code)."""
    hf, corrupt = small(), CORRUPT if request.param == "corrupt" else None
    with torch.no_grad():
        graph = EdgeGraph(hf, TOKENS, corrupt, positions=True)
        yield graph, Naive(hf, TOKENS, corrupt, graph.edges)


def test_the_graph_has_every_edge_once(pair):
    graph, _ = pair
    assert len(set(graph.edges)) == len(graph.edges)
    # embed and pos into 6 slots of 2 layers, 2 MLPs, logits; what earlier parts write; 12 uses
    slots, layers, embeds, heads = 6, 2, 2, 2
    between = slots * (heads + 1) + heads + (2 * heads + 1) + layers * (heads + 1)
    assert len(graph.edges) == embeds * (layers * slots + layers + 1) + between + layers * slots
    for i, edge in enumerate(graph.edges):
        assert edge.target not in {e.source for e in graph.edges[i:]}  # what it feeds was before
        if edge.source.kind == "input":
            inputs = [e for e in graph.edges[:i] if e[1:] == edge[1:]]
            assert not inputs, "a query is cut whole before its inputs"


def test_the_whole_graph_is_the_model(pair):
    graph, _ = pair
    torch.testing.assert_close(graph.clean, graph.hf(TOKENS).logits, **CLOSE)


def test_every_graph_is_what_plain_code_makes(pair):
    graph, naive = pair
    present = torch.rand(12, len(graph.edges), generator=torch.Generator().manual_seed(1)) > 0.3
    logits = graph.run(present.float())
    for keep, got in zip(present, logits, strict=True):
        cut = {e for e, k in zip(graph.edges, keep.tolist(), strict=True) if not k}
        torch.testing.assert_close(got, naive.forward(TOKENS, cut)[0], **CLOSE)


@pytest.mark.parametrize("kind", ["l2", "kl"])
def test_acdc_is_algorithm_1(pair, kind):
    graph, naive = pair
    end = torch.tensor([3, 2])
    many = (
        acdc.squared_distance(graph.clean, first=1, n_outputs=4)
        if kind == "l2"
        else acdc.kl_divergence(graph.clean, end)
    )

    def plain(logits):
        if kind == "l2":
            return float(((logits - graph.clean)[:, 1:, :4] ** 2).mean())
        p, q = (x[[0, 1], end].log_softmax(-1) for x in (graph.clean, logits))
        return float((p.exp() * (p - q)).sum(-1).mean())

    taus = [0.02, 0.001] if kind == "l2" else [0.002, 0.0001]
    kept, rises = acdc.acdc(graph, many, taus)
    assert 0 < kept[0].sum() < kept[1].sum() < len(graph.edges)
    for row, tau in zip(kept, taus, strict=True):
        assert row.tolist() == naive.acdc(plain, tau)
    assert torch.equal(kept, rises >= torch.tensor(taus)[:, None].double())


def readers_are_done(edges: list[Edge]) -> bool:
    """Whether all that reads what an edge's target writes stands before the edge.

    A head writes to all edges out of it; its query is read by the gate of the query.
    """
    for i, edge in enumerate(edges):
        later, node = edges[i:], edge.target
        whole = edge.source.kind == "input" or node.kind == "mlp"
        gate = Edge(Node("input", node.layer, node.head), node, edge.slot)
        if whole and node in {e.source for e in later}:
            return False
        if not whole and node.kind == "head" and gate in later:
            return False
    return True


def test_drawn_orders_are_those_that_algorithm_1_admits(pair):
    graph, _ = pair
    assert readers_are_done(graph.edges) and not readers_are_done(graph.edges[::-1])
    drawn = [acdc.drawn_order(graph, np.random.default_rng(seed)) for seed in range(5)]
    assert len({tuple(order) for order in drawn}) == 5
    assert drawn[3] == acdc.drawn_order(graph, np.random.default_rng(3))
    for order in drawn:
        assert sorted(order) == list(range(len(graph.edges)))
        edges = [graph.edges[i] for i in order]
        assert readers_are_done(edges)
        into = [(e.target, e.slot, e.source.kind == "input") for e in edges]
        runs = sum(a != b for a, b in pairwise(into)) + 1
        assert runs == len(set(into))  # the edges into one reader follow each other


@pytest.mark.parametrize("seed", [0, 1])
def test_acdc_in_another_order_is_algorithm_1(pair, seed):
    graph, naive = pair
    order = acdc.drawn_order(graph, np.random.default_rng(seed))
    loss, taus = acdc.squared_distance(graph.clean), [0.3, 0.02]
    kept, rises = acdc.acdc(graph, loss, taus, order=order)
    edges = [graph.edges[i] for i in order]
    plain = lambda logits: float(((logits - graph.clean) ** 2).mean())  # noqa: E731
    for row, tau in zip(kept, taus, strict=True):
        assert row.tolist() == naive.acdc(plain, tau, edges)  # edge by edge of graph.edges
    assert torch.equal(kept, rises >= torch.tensor(taus)[:, None].double())
    assert not torch.equal(kept, acdc.acdc(graph, loss, taus)[0])  # the order matters


def test_a_threshold_does_not_depend_on_those_beside_it(pair):
    graph, _ = pair
    loss = acdc.squared_distance(graph.clean)
    both, _ = acdc.acdc(graph, loss, [0.3, 0.02])
    for i, tau in enumerate([0.3, 0.02]):
        assert torch.equal(acdc.acdc(graph, loss, [tau])[0][0], both[i])


def test_exact_cuts_one_edge(pair):
    graph, naive = pair
    loss = acdc.squared_distance(graph.clean)
    alone = acdc.exact(graph, loss)
    for i in range(0, len(graph.edges), 7):
        want = ((naive.forward(TOKENS, {graph.edges[i]})[0] - graph.clean) ** 2).mean()
        torch.testing.assert_close(alone[i], want, **CLOSE)


# --- on paper -------------------------------------------------------------------------------


def on_paper() -> NativeForCausalLM:
    """One head that attends alike to all and copies dimension 0 to 1, which is logit 0.

    Tokens 0 and 1 are 1 and 3 in dimension 0: of the sequence 0 1 the mean is 2, everywhere.
    """
    shape = {"n_layers": 1, "d_model": 2, "n_heads": 1, "n_ctx": 2, "normalization": "none"}
    made = NativeForCausalLM(
        {"d_vocab": 2, "bidirectional": True, **Architecture(**shape).model_dump()}
    )
    for p in made.parameters():
        p.data.zero_()
    made.model.tok_embed.weight.data[:, 0] = torch.tensor([1.0, 3.0])
    attn = made.model.layers[0].attn
    attn.v.weight.data[0, 0] = attn.o.weight.data[1, 0] = made.model.head.weight.data[0, 1] = 1.0
    return made.eval().requires_grad_(False)


CIRCUIT = [
    Edge(Node("head", 0, 0), LOGITS),
    Edge(Node("input", 0, 0), Node("head", 0, 0), "v"),
    Edge(Node("embed", 0), Node("head", 0, 0), "v"),
]


def test_a_graph_on_paper():
    graph = EdgeGraph(on_paper(), torch.tensor([[0, 1]]), positions=True)
    assert graph.clean[0, :, 0].tolist() == [2.0, 2.0]
    loss = acdc.squared_distance(graph.clean, n_outputs=1)
    alone = acdc.exact(graph, loss)
    assert {e: v for e, v in zip(graph.edges, alone.tolist(), strict=True) if v} == dict.fromkeys(
        CIRCUIT,
        4.0,  # the output becomes 0 where it was 2
    )
    kept, _ = acdc.acdc(graph, loss, [5.0, 3.9])
    found = [[e for e, k in zip(graph.edges, row, strict=True) if k] for row in kept.tolist()]
    assert found == [[], CIRCUIT]


def test_corrupt_ablation_on_paper():
    graph = EdgeGraph(on_paper(), torch.tensor([[0, 1]]), torch.tensor([[1, 1]]), positions=True)
    alone = acdc.exact(graph, acdc.squared_distance(graph.clean, n_outputs=1))
    assert {round(v, 6) for v in alone.tolist()} == {0.0, 1.0}  # 3 in the place of 2


def test_eap_on_paper():
    """The output is linear, so one gradient says how far it moves: by -2 of -2 at each position."""
    graph = EdgeGraph(on_paper(), torch.tensor([[0, 1]]), positions=True)
    scores = acdc.attribution(graph, acdc.towards_cut(graph, n_outputs=1), [0.0])
    want = torch.tensor([8**0.5 * (e in CIRCUIT) for e in graph.edges])  # |(-2, -2)|
    torch.testing.assert_close(scores, want)


def test_eap_ig_sums_to_the_loss_on_paper():
    """L = (2 alpha)^2 along the path: its mean gradient times the change is L at the end."""
    graph = EdgeGraph(on_paper(), torch.tensor([[0, 1]]), positions=True)
    loss = acdc.squared_distance(graph.clean, n_outputs=1)
    scores = acdc.attribution(graph, loss, eap.midpoints(5))
    want = torch.tensor([4.0 * (e in CIRCUIT) for e in graph.edges])
    torch.testing.assert_close(scores, want)


# --- beside what the stage had ----------------------------------------------------------------


@pytest.fixture(params=["llama", "gpt2", "native"])
def both(request):
    """(task, graph) on one pair of prompts."""
    with torch.no_grad():
        task = Task.of(tiny(request.param), Pairs.of(EVEN, 0, "cpu"))
        yield task, EdgeGraph(task.hf, task.pairs.base, task.pairs.source)


def change(task, graph):
    """m of logits [k n pos d_vocab] minus m of the clean run, [k]."""

    def measure(y):
        last = y[:, task.pairs.rows, task.pairs.end]
        m = last[:, task.pairs.rows, task.pairs.answer] - last[:, task.pairs.rows, task.pairs.foil]
        return (m - task.before).mean(-1)

    return measure


def older(graph) -> list[Edge]:
    """The graph's edges under the names of eap.py; those inside a head have none."""
    return [
        Edge(Node("resid", 0) if e.source.kind == "embed" else e.source, e.target, e.slot)
        for e in graph.edges
        if e.source.kind != "input"
    ]


def test_a_cut_edge_is_a_patched_edge(both):
    task, graph = both
    alone = acdc.exact(graph, change(task, graph))
    outer = [i for i, e in enumerate(graph.edges) if e.source.kind != "input"]
    for i, edge in list(zip(outer, older(graph), strict=True))[::9]:
        torch.testing.assert_close(alone[i], edge_patching(task, edge).mean(), **CLOSE)


@pytest.mark.parametrize("alphas", [[0.0], eap.midpoints(3)])
def test_attribution_is_that_of_eap(both, alphas):
    task, graph = both
    edges, scores = eap.edges(task, alphas)
    want = dict(zip(edges, scores.tolist(), strict=True))
    got = acdc.attribution(graph, change(task, graph), alphas)
    outer = [i for i, e in enumerate(graph.edges) if e.source.kind != "input"]
    assert len(outer) == len(want)
    torch.testing.assert_close(
        got[outer], torch.tensor([want[e] for e in older(graph)]), atol=1e-4, rtol=1e-3
    )


@pytest.mark.workflow
@pytest.mark.parametrize("ablation", ["corrupt", "zero"])
def test_the_stage_has_the_method(ablation):
    spec = CircuitsSpec(
        prompts="p", methods=["acdc"], acdc={"ablation": ablation, "thresholds": [0.01, 0.0001]}
    )
    with torch.no_grad():
        task = Task.of(tiny("native"), Pairs.of(PROMPTS, 0, "cpu"))
        frames = methods.measure(task, spec, 0)
    edges, (row,) = frames["edges"], frames["methods"].to_dict("records")
    assert list(edges.columns) == [*table.EDGES, "seed"] and set(edges["method"]) == {"acdc"}
    sizes = [(rows["score"] >= tau).sum() for tau, rows in edges.groupby("threshold")]
    assert sizes[0] > sizes[1] > 0
    assert (edges.groupby("threshold").size() == len(edges) / 2).all()
    assert row["method"] == "acdc" and abs(row["completeness_gap"]) < 1e-3
    low = edges[edges["threshold"] == 0.0001]
    cut = low["score"][low["score"] < 0.0001].sum()
    assert row["total"] == pytest.approx(cut, rel=1e-3, abs=1e-6)
    assert row["correlation"] == pytest.approx(np.corrcoef(low["score"], low["exact"])[0, 1])


def test_a_bidirectional_model_sees_what_is_behind_and_keeps_that(tmp_path):
    from pipeline.models import native

    made = on_paper()
    made.save_pretrained(tmp_path)
    again = native.from_folder(tmp_path)
    assert again.config.bidirectional
    assert torch.equal(again(torch.tensor([[0, 1]])).logits, made(torch.tensor([[0, 1]])).logits)
    assert made(torch.tensor([[0, 1]])).logits[0, 0, 0] == 2.0


def test_a_native_folder_without_a_tokenizer_is_a_model(tmp_path):
    from argparse import Namespace

    from pipeline.spec.sources import ModelSpec
    from pipeline.text.tokens import document_token
    from pipeline.weights import model

    on_paper().save_pretrained(tmp_path)
    spec = ModelSpec(source="folder", path=str(tmp_path))
    hf, tokenizer, *_ = model.open_source(spec, tmp_path / "none", Namespace())
    assert tokenizer is None and document_token(tokenizer, spec) is None
    assert hf.config.bidirectional


def test_a_bidirectional_model_has_no_bridge():
    from pipeline.models import native

    with pytest.raises(RetraceError, match="NativeModel is causal"):
        native.to_bridge(on_paper())
