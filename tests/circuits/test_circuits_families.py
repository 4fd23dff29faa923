"""Circuits of families beside those of test_patching.py, exact against plain hooked passes.

Parallel layers (GPT-NeoX, GPT-J, Phi), norms behind attention and MLP (Gemma 2, OLMo 2), gains of
1 + weight, grouped queries, interleaved joint projections, capped logits, biases of the
unembedding, maps that stand in the layer itself (OPT), residual multipliers (Granite), sliding
windows and norms of queries and keys (Gemma 3), ALiBi and an MLP that adds the stream (Bloom).
"""

import families_check as check
import pytest
import torch

from pipeline.circuits import direct_logit, eap, head_inputs
from pipeline.circuits.edge_graph import EdgeGraph
from pipeline.circuits.patching import (
    Edge,
    Receiver,
    activation_patching,
    changed_by,
    edge_patching,
    path_patching,
)
from pipeline.errors import RetraceError
from pipeline.models import hooks, proof
from pipeline.models.pairs import Node, Pairs, Task

# float32 sums in another order, of logits of size 1 to 10
CLOSE = {"atol": 1e-5, "rtol": 1e-4}
# A window shorter than the prompts, and a cap that bends the logits.
SETTINGS = {
    "gemma2": {"final_logit_softcapping": 3.0, "sliding_window": 3},
    "gemma3_text": {"sliding_window": 3},
}
# Two pairs of unequal length, so that one is padded; the third token differs, and the fifth.
PROMPTS = {
    "clean": [[3, 11, 4, 11, 5], [9, 21, 6, 5, 30, 5]],
    "corrupt": [[3, 11, 7, 11, 8], [9, 21, 7, 5, 1, 5]],
    "answer": [1, 2],
    "foil": [3, 4],
    "positions": {"name": [2, 2], "late": [4, 4]},
}


@pytest.fixture(scope="module", params=check.CIRCUITS, ids=lambda case: f"{case[0]}-{case[1]}")
def task(request):
    kind, variant = request.param
    hf = check.model_of(kind, variant, **SETTINGS.get(kind, {}))
    with torch.no_grad():
        assert proof.prove(hf) == {} and hf.retrace_fails == {}
        return Task.of(hf, Pairs.of(PROMPTS, 0, "cpu"))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def plain(task, tokens=None) -> torch.Tensor:
    """m out of all logits."""
    logits = task.hf(task.pairs.base if tokens is None else tokens).logits
    last = logits[task.pairs.rows, task.pairs.end]
    return last[task.pairs.rows, task.pairs.answer] - last[task.pairs.rows, task.pairs.foil]


def replaced(task, hook: str, columns: slice, mask: torch.Tensor) -> torch.Tensor:
    """m of a whole pass with some columns at a hook as in the source run, where mask says."""
    new = hooks.run_to(task.hf, task.pairs.source, [hook])[hook]

    def patch(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[..., columns] = torch.where(mask[..., None], new[..., columns], x[..., columns])
        return x

    with hooks.edited(task.hf, hook, patch):
        return plain(task)


def test_the_metric_is_that_of_the_logits(task):
    torch.testing.assert_close(task.before, plain(task), **CLOSE)
    whole = plain(task, task.pairs.source) - plain(task)
    torch.testing.assert_close(task.total, whole, **CLOSE)
    assert task.total.abs().min() > 1e-3


@pytest.mark.parametrize("position", ["", "name"])
def test_patched_nodes_are_whole_forward_passes(task, position):
    mask, d = task.pairs.mask(position), task.heads.d_head
    whole = slice(None)
    for layer in range(2):
        at = f"blocks.{layer}."
        wanted = {
            Node("resid", layer, -1, position): (f"{at}hook_resid_pre", whole),
            Node("attn", layer, -1, position): (f"{at}hook_attn_out", whole),
            Node("mlp", layer, -1, position): (f"{at}hook_mlp_out", whole),
        } | {
            Node("head", layer, h, position): (f"{at}attn.hook_z", slice(h * d, (h + 1) * d))
            for h in range(task.heads.n_heads)
        }
        found = activation_patching(task, list(wanted))
        for (node, (hook, columns)), effect in zip(wanted.items(), found, strict=True):
            want = replaced(task, hook, columns, mask) - task.before
            torch.testing.assert_close(effect, want, **CLOSE, msg=f"{node}")


@pytest.mark.parametrize("position", ["", "name"])
def test_patched_patterns_are_whole_forward_passes(task, position):
    """And their estimates are slopes; ALiBi, windows, grouped queries and norms of queries."""
    n, mask = task.pairs.base.shape[1], task.pairs.mask(position)
    nodes = [Node("pattern", i, h, position) for i in range(2) for h in (0, 3)]
    estimates = eap.attribution_patching(task, nodes)
    for node, effect, slope in zip(nodes, activation_patching(task, nodes), estimates, strict=True):
        hook = f"blocks.{node.layer}.attn.hook_pattern"
        columns = slice(node.head * n, (node.head + 1) * n)
        want = replaced(task, hook, columns, mask) - task.before
        torch.testing.assert_close(effect, want, **CLOSE, msg=f"{node}")
        new = hooks.run_to(task.hf, task.pairs.source, [hook])[hook]
        t = torch.zeros(len(task.before), requires_grad=True)

        def step(x, columns=columns, new=new, t=t):
            change = torch.zeros_like(x)
            change[..., columns] = ((new - x.detach()) * mask[..., None])[..., columns]
            return x + t[:, None, None] * change

        with torch.enable_grad(), hooks.edited(task.hf, hook, step):
            (want,) = torch.autograd.grad(plain(task).sum(), t)
        torch.testing.assert_close(slope, want, **CLOSE, msg=f"{node}")


def test_patched_queries_keys_and_values_are_whole_forward_passes(task):
    nodes, d = head_inputs.input_nodes(task), task.heads.d_head
    everywhere = task.pairs.mask("")
    for node, effect in zip(nodes, head_inputs.input_patching(task, nodes), strict=True):
        hook = f"blocks.{node.layer}.attn.hook_{node.kind}"
        columns = slice(node.head * d, (node.head + 1) * d)
        want = replaced(task, hook, columns, everywhere) - task.before
        torch.testing.assert_close(effect, want, **CLOSE, msg=f"{node}")


def test_estimates_are_slopes_of_whole_forward_passes(task):
    """(a' - a) . dm/da is dm/dt of a pass with a + t (a' - a) at a plain hook, at t = 0."""
    nodes = [Node("head", 0, 1), Node("attn", 1), Node("mlp", 0), Node("resid", 1),
             *(Node(slot, 0, 0) for slot in "qkv")]  # fmt: skip
    found = eap.attribution_patching(task, nodes)
    names = {"head": "attn.hook_z", "attn": "hook_attn_out", "mlp": "hook_mlp_out",
             "resid": "hook_resid_pre", **{s: f"attn.hook_{s}" for s in "qkv"}}  # fmt: skip
    for node, effect in zip(nodes, found, strict=True):
        hook, d = f"blocks.{node.layer}.{names[node.kind]}", task.heads.d_head
        columns = slice(node.head * d, (node.head + 1) * d) if node.head >= 0 else slice(None)
        new = hooks.run_to(task.hf, task.pairs.source, [hook])[hook]
        t = torch.zeros(len(task.before), requires_grad=True)

        def step(x, columns=columns, new=new, t=t):
            change = torch.zeros_like(x)
            change[..., columns] = (new - x.detach())[..., columns]
            return x + t[:, None, None] * change

        with torch.enable_grad(), hooks.edited(task.hf, hook, step):
            (want,) = torch.autograd.grad(plain(task).sum(), t)
        torch.testing.assert_close(effect, want, **CLOSE, msg=f"{node}")


def test_direct_logits_sum_to_the_metric(task):
    if task.metric.cap:
        with pytest.raises(RetraceError, match="capped by a tanh"):
            direct_logit.direct_logit(task, task.base)
        return
    found = direct_logit.direct_logit(task, task.base)
    torch.testing.assert_close(sum(found.values()), task.before, **CLOSE)


def test_a_path_to_the_logits_and_an_edge_by_hand(task):
    """The sender's change, carried by the stream past frozen parts, and read by the final norm."""
    change = changed_by(task, Node("head", 1, 2))
    want = task.metric(task.pairs.at_end(task.base.post[-1] + change)) - task.before
    edge = Edge(Node("head", 1, 2), Node("logits", -1))
    torch.testing.assert_close(edge_patching(task, edge), want, **CLOSE)
    if task.heads.parallel:  # nothing of the last layer reads it: the path is the whole effect
        (path,) = path_patching(task, [(1, 2)])
        torch.testing.assert_close(path, want, **CLOSE)
    (into,) = path_patching(task, [(1, 0)], [Receiver(0, "q", 0)])
    assert into.abs().max() == 0  # receivers below the sender


def test_an_edge_into_an_mlp_is_a_whole_forward_pass(task):
    """The MLP's own norm and module read the changed stream, all else runs on as it would."""
    source = Node("mlp", 0)
    change = changed_by(task, source)
    read = task.base.mlp_input(1) + change
    hook = "blocks.1.mlp.hook_in"
    with hooks.edited(task.hf, hook, lambda _: task.heads.mlp_reads(1, read)):
        want = plain(task) - task.before
    edges = [Edge(source, Node("mlp", 1))]
    torch.testing.assert_close(edge_patching(task, edges[0]), want, **CLOSE)
    torch.testing.assert_close(head_inputs.many_edges(task, edges)[0], want, **CLOSE)


def test_edges_with_gradients_are_complete(task):
    """With all edges of a node to all that read it, EAP's scores sum to the node's own."""
    found, scores = eap.edges(task, [0.0])
    out_of = torch.tensor([edge.source == Node("mlp", 0) for edge in found])
    node = eap.attribution_patching(task, [Node("mlp", 0)]).mean(-1)
    torch.testing.assert_close(scores[out_of].sum()[None], node, **CLOSE)


def test_a_graph_without_edges_of_a_part_is_the_model_with_it_patched(task):
    pairs = task.pairs
    graph = EdgeGraph(task.hf, pairs.base, pairs.source)
    logits = task.hf(pairs.base).logits
    torch.testing.assert_close(graph.clean, logits, atol=5e-5, rtol=1e-4)
    parts = {Node("mlp", 0): ("blocks.0.hook_mlp_out", slice(None))}
    if task.heads.post(0, "attn")[1] is None:  # else its heads' parts depend on one another
        d = task.heads.d_head
        parts[Node("head", 0, 1)] = ("blocks.0.attn.hook_z", slice(d, 2 * d))
    for node, (hook, columns) in parts.items():
        present = graph.everything()
        cut = [i for i, edge in enumerate(graph.edges) if edge.source == node]
        present[:, cut] = 0
        last = graph.run(present)[0][task.pairs.rows, pairs.end]
        m = last[task.pairs.rows, pairs.answer] - last[task.pairs.rows, pairs.foil]
        want = replaced(task, hook, columns, pairs.mask(""))
        torch.testing.assert_close(m, want, atol=5e-5, rtol=1e-4, msg=f"{node}")
