"""Queries, keys and values as nodes, edges in bulk, and AtP*: against plain loops and on paper."""

from contextlib import ExitStack

import families_check as check
import pytest
import torch
from test_patching import CLOSE, KINDS, PROMPTS, logit_diff, small_step, tiny
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pipeline.circuits import atp_star, eap, methods, table
from pipeline.circuits.head_inputs import input_nodes, input_patching, many_edges
from pipeline.circuits.patching import activation_patching, changed_by, edge_patching
from pipeline.errors import RetraceError
from pipeline.models import hooks, proof
from pipeline.models.native import NativeForCausalLM
from pipeline.models.pairs import Node, Pairs, Task, mean_rows
from pipeline.spec.measured import CircuitsSpec
from pipeline.spec.training import Architecture


@pytest.fixture(params=KINDS)
def task(request):
    with torch.no_grad():
        yield Task.of(tiny(request.param), Pairs.of(PROMPTS, 0, "cpu"))


def input_of(task: Task, node: Node, tokens: torch.Tensor) -> torch.Tensor:
    """What a head reads on tokens, [n pos d_head], by a whole forward pass."""
    seen, place = [], task.heads.place(node.layer, node.kind, node.head)
    handle = place.module.register_forward_hook(lambda _, __, out: seen.append(out))
    task.hf(tokens)
    handle.remove()
    return seen[0][..., place.columns]


def with_input(task: Task, node: Node, new: torch.Tensor) -> torch.Tensor:
    """m with it replaced, by a whole forward pass."""
    place = task.heads.place(node.layer, node.kind, node.head)

    def after(_, __, out):
        out = out.clone()
        out[..., place.columns] = new
        return out

    handle = place.module.register_forward_hook(after)
    found = logit_diff(task.hf(task.pairs.base).logits, task.pairs)
    handle.remove()
    return found


# --- against plain loops -------------------------------------------------------------------


def test_patched_inputs_are_whole_forward_passes(task):
    nodes = input_nodes(task)
    assert len(nodes) == 3 * (4 + 2 * task.heads.n_key_heads)
    for node, effect in zip(nodes, input_patching(task, nodes), strict=True):
        want = with_input(task, node, input_of(task, node, task.pairs.source)) - task.before
        torch.testing.assert_close(effect, want, **CLOSE)


def test_edges_in_bulk_are_edges_one_by_one(task):
    edges, _ = eap.edges(task, [0.0])
    told = []
    found = many_edges(task, edges, told.append)
    assert told[-1] == len(edges) and found.abs().max() > 1e-3
    for edge, effect in zip(edges, found, strict=True):
        torch.testing.assert_close(effect, edge_patching(task, edge), **CLOSE)


def test_estimates_of_inputs_are_exact_for_small_changes(task):
    near, nodes = small_step(task, 1e-2), input_nodes(task)
    exact = input_patching(near, nodes)
    for estimate in (eap.attribution_patching, atp_star.qk_fix):
        torch.testing.assert_close(estimate(near, nodes), exact, atol=2e-4, rtol=0.1)


def test_nodes_become_complete_with_points(task):
    """Integrated gradients of the embedding sum to the change itself."""
    nodes = [Node("resid", 0)]
    found = eap.attribution_patching(task, nodes, tuple(eap.midpoints(64)))
    torch.testing.assert_close(found[0].mean(), task.total.mean(), atol=0.02, rtol=0.02)


def test_turned_patterns_are_those_of_patched_inputs(task):
    """The patched pattern of a head times its base values is its z: by the plain way."""
    turns, heads = atp_star.turned(task, [Node("q", 1, 1), Node("k", 1, 1)]), task.heads
    share = heads.n_heads // heads.n_key_heads
    for slot in ("q", "k"):
        node = Node(slot, 1, 1)
        new, seen = input_of(task, node, task.pairs.source), []
        with heads.z_edited(1, lambda z, seen=seen: seen.append(z.clone())):
            with_input(task, node, new)
        for h in range(heads.n_heads) if slot == "k" else [1]:
            if slot == "k" and h // share != 1:
                continue
            v = input_of(task, Node("v", 1, h // share), task.pairs.base)
            at = slice(h * heads.d_head, (h + 1) * heads.d_head)
            change = (seen[0] - task.base.z[1])[..., at]
            torch.testing.assert_close(turns[slot][1][:, h] @ v, change, **CLOSE)


def test_patterns_are_asked_for_where_queries_or_keys_are_scored_alone(task, monkeypatch):
    """Models that form no pattern (XGLM) have scores of heads and MLPs all the same."""
    heads = [Node("head", 1, 2), Node("mlp", 0), Node("v", 0, 0)]
    both = atp_star.atp_star(task, [*heads, Node("q", 0, 1)])

    def none(*_):
        raise AssertionError("patterns were asked for")

    monkeypatch.setattr(type(task.heads), "patterns", none)
    torch.testing.assert_close(atp_star.atp_star(task, heads), both[:3], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["afmoe", "bitnet"])
def test_the_fix_is_refused_where_a_pattern_times_v_is_not_z(kind):
    """A gate or a norm stands between them, so that a turned pattern says another effect."""
    hf = check.model_of(kind, 0)
    with torch.no_grad():
        proof.prove(hf)
        prompts = PROMPTS | {k: [[t % 40 for t in ids] for ids in PROMPTS[k]]
                             for k in ("clean", "corrupt")}  # fmt: skip
        task = Task.of(hf, Pairs.of(prompts, 0, "cpu"))
    with pytest.raises(RetraceError, match=r"times attn\.hook_v it is not attn\.hook_z"):
        atp_star.qk_fix(task, [Node("k", 0, 0)])
    others = [Node("head", 0, 1), Node("mlp", 1), Node("v", 0, 0)]
    torch.testing.assert_close(
        atp_star.qk_fix(task, others), eap.attribution_patching(task, others)
    )


def detached(task: Task, layer: int, nodes: list[Node]) -> torch.Tensor:
    """Attribution patching in a model whose `layer` passes no gradient on, the plain way."""
    quiet = lambda out: out.detach() + 0 * out  # noqa: E731
    with ExitStack() as stack:
        for module in (task.heads.attn(layer), task.heads.layers[layer].mlp):

            def after(_, __, out):
                return (quiet(out[0]), *out[1:]) if isinstance(out, tuple) else quiet(out)

            stack.callback(module.register_forward_hook(after).remove)
        return eap.attribution_patching(task, nodes)


def test_dropped_gradients_are_those_of_detached_layers(task):
    nodes = [Node(kind, i) for i in range(3) for kind in ("attn", "mlp")]
    nodes += [n for n in table.parts(task) if n.kind == "head"]
    nodes += [n for n in input_nodes(task) if n.kind == "v"]
    nodes += [Node("resid", i, -1, "late") for i in range(3)]
    for layer, grads in enumerate(atp_star.dropped(task)):
        found = eap.scored(task, nodes, eap.by_part(task, grads))
        own = [i for i, n in enumerate(nodes) if n.kind != "resid" and n.layer == layer]
        other = [i for i in range(len(nodes)) if i not in own]
        assert not found[own].any() and found[other].any(-1).sum() > len(other) / 2
        # the detached model has the gradient of m by what the layer writes, not past it
        inside = [i for i in own if nodes[i].kind not in ("attn", "mlp")]
        at = [*other, *inside]
        want = detached(task, layer, [nodes[i] for i in at])
        torch.testing.assert_close(found[at], want, **CLOSE)


def frozen(task: Task, layer: int, node: Node, by: float) -> torch.Tensor:
    """m where the node moves by this part of its change and `layer` writes what it wrote, [n].

    Whole forward passes; the layer's output is put back behind the change of the node.
    """
    mask = task.pairs.mask(node.position)[..., None]
    stream = {"attn": "hook_attn_out", "mlp": "hook_mlp_out", "resid": "hook_resid_pre"}
    with ExitStack() as stack:
        if node.kind == "head":
            at = slice(node.head * task.heads.d_head, (node.head + 1) * task.heads.d_head)
            change = (task.source.z[node.layer] - task.base.z[node.layer]) * mask

            def moved(z: torch.Tensor) -> torch.Tensor:
                z = z.clone()
                z[..., at] += by * change[..., at]
                return z

            stack.enter_context(task.heads.z_edited(node.layer, moved))
        else:
            name = f"blocks.{node.layer}.{stream[node.kind]}"
            change = changed_by(task, node)
            stack.enter_context(hooks.edited(task.hf, name, lambda x: x + by * change))
        for part in ("attn", "mlp"):
            kept = getattr(task.base, part)(layer)
            name = f"blocks.{layer}.hook_{part}_out"
            stack.enter_context(hooks.edited(task.hf, name, lambda _, kept=kept: kept))
        return logit_diff(task.hf(task.pairs.base).logits, task.pairs)


def test_atp_star_is_the_papers_formula(task, monkeypatch):
    """GradDrop, Eq. 11: L/(L-1) times the mean over layers l of |slope of m along the node's
    change where l writes what it wrote|; by central differences of whole passes in float64."""

    def exact_norm(norm: LlamaRMSNorm, x: torch.Tensor) -> torch.Tensor:  # its own is in float32
        return torch.nn.functional.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    task, h = Task.of(task.hf.double(), task.pairs), 1e-5
    nodes = [Node("head", i, j) for i in range(3) for j in (0, 3)]
    nodes += [Node(kind, i) for i in range(3) for kind in ("attn", "mlp")]
    nodes += [Node("mlp", 1, -1, "late"), *(Node("resid", i, -1, "late") for i in range(3))]
    found = atp_star.atp_star(task, nodes)
    for node, score in zip(nodes, found, strict=True):
        slopes = [
            (frozen(task, i, node, h) - frozen(task, i, node, -h)).abs() / (2 * h) for i in range(3)
        ]
        want = sum(slopes) / (3 if node.kind == "resid" else 2)
        torch.testing.assert_close(score, want, atol=1e-7, rtol=1e-6)


def test_inert_layers_change_no_score_of_a_stream():
    """Where layers write nothing a drop changes nothing: a stream's score is its plain estimate."""
    with torch.no_grad():
        task = on(blank(), [1, 2], [1, 0])  # the last token is the foil: m falls by 1
        nodes = [Node("resid", i, -1, p) for i in range(2) for p in ("@0", "@1")]
        want = torch.tensor([[0.0], [1.0], [0.0], [1.0]])
        torch.testing.assert_close(eap.attribution_patching(task, nodes), -want)
        torch.testing.assert_close(atp_star.atp_star(task, nodes), want)


# --- on paper ------------------------------------------------------------------------------


def blank() -> NativeForCausalLM:
    """Two layers that do nothing; embedding and unembedding are the identity, a head a layer."""
    shape = {"n_layers": 2, "d_model": 4, "n_heads": 1, "d_mlp": 2, "n_ctx": 8}
    shape |= {"normalization": "none", "positional": "standard", "bias": "none"}
    hf = NativeForCausalLM({"d_vocab": 4, **Architecture(**shape).model_dump()}).eval()
    for p in hf.requires_grad_(False).parameters():
        p.zero_()
    hf.model.tok_embed.weight.copy_(torch.eye(4))
    hf.model.head.weight.copy_(torch.eye(4))
    return hf


def on(hf: NativeForCausalLM, clean: list[int], corrupt: list[int]) -> Task:
    prompts = {"clean": [clean], "corrupt": [corrupt], "answer": [1], "foil": [0], "positions": {}}
    return Task.of(hf, Pairs.of(prompts, None, "cpu"))


@pytest.mark.parametrize(
    ("kind", "corrupt"), [("q", [1, 0, 3]), ("k", [0, 1, 2])], ids=["query", "keys"]
)
def test_a_saturated_head_is_seen_with_the_fix_alone(kind, corrupt):
    """Token 2 asks for token 1, token 3 for token 0; the head copies what it attends to.

    Its weight is on one token to within exp(-30), so the gradient of its query is nothing; with
    another query, or the keys exchanged, it copies the other token: m goes from 1 to -1.
    """
    with torch.no_grad():
        hf = blank()
        attn = hf.model.layers[0].attn
        attn.q.weight[1, 2] = attn.q.weight[0, 3] = 60.0  # over sqrt(d_head) = 2
        for part in (attn.k, attn.v, attn.o):
            part.weight[:2, :2] = torch.eye(2)
        task = on(hf, [1, 0, 2], corrupt)
        node = [Node(kind, 0, 0)]
        assert task.before.item() == pytest.approx(1)
        assert input_patching(task, node).item() == pytest.approx(-2)
        assert eap.attribution_patching(task, node).item() == pytest.approx(0, abs=1e-6)
        assert atp_star.qk_fix(task, node).item() == pytest.approx(-2)
        # layer 0 dropped: 0; layer 1 dropped: 2
        assert atp_star.atp_star(task, node).item() == pytest.approx(2)


def test_a_node_whose_effects_cancel_is_seen_with_graddrop_alone():
    """Attention is even. Head 0.0 writes the token: -1 at the end when it is patched; head 1.0
    reads it at both places, -1.5 a logit, and takes two thirds of that away: +1."""
    with torch.no_grad():
        hf = blank()
        for layer, sign in ((0, 1.0), (1, -2 / 3)):
            attn = hf.model.layers[layer].attn
            attn.v.weight[:2, :2] = torch.eye(2)
            attn.o.weight[:2, :2] = sign * torch.eye(2)
        task = on(hf, [1, 2], [0, 2])
        node = [Node("head", 0, 0)]
        assert activation_patching(task, node).item() == pytest.approx(0, abs=1e-6)
        for method in (eap.attribution_patching, atp_star.qk_fix):
            assert method(task, node).item() == pytest.approx(0, abs=1e-6)
        assert atp_star.atp_star(task, node).item() == pytest.approx(1)


def test_several_answers_are_the_mean_of_their_logits():
    prompts = PROMPTS | {"answer": [[1, 7], [2]], "foil": [[3, 5, 9], [4, 8]]}
    with torch.no_grad():
        task = Task.of(tiny("llama"), Pairs.of(prompts, 0, "cpu"))
        logits = task.hf(task.pairs.base).logits
    last = logits[torch.arange(2), task.pairs.end]
    want = [last[0, [1, 7]].mean() - last[0, [3, 5, 9]].mean(), last[1, 2] - last[1, [4, 8]].mean()]
    torch.testing.assert_close(task.before, torch.stack(want), **CLOSE)
    rows = torch.arange(12.0).view(4, 3)
    ids = torch.tensor([[0, 1, -1], [3, -1, -1]])
    torch.testing.assert_close(mean_rows(rows, ids), torch.stack([rows[:2].mean(0), rows[3]]))


# --- the stage -----------------------------------------------------------------------------


def test_the_stage_has_atp_star_and_edges_drawn_at_random():
    named = ["activation_patching", "attribution_patching", "atp_star", "eap"]
    spec = CircuitsSpec(prompts="p", methods=named, n_exact=4, n_drawn=30)
    with torch.no_grad():
        frames = methods.measure(Task.of(tiny("llama"), Pairs.of(PROMPTS, 0, "cpu")), spec, 0)
    nodes, edges = frames["nodes"], frames["edges"]
    star = nodes[nodes["method"] == "atp_star"]
    assert len(star) == 15 and (star["score"] >= 0).all() and star["score"].max() > 1e-3
    assert frames["methods"]["method"].tolist() == named
    known = edges["exact"].notna()
    drawn = methods.drawn(len(edges), 30, 0)
    assert known[drawn].all() and 30 <= known.sum() <= 34
    strongest = edges["score"].abs().nlargest(4).index
    assert known[strongest].all()
