"""Patching, path patching and EAP: against TransformerLens, against plain loops, and on paper."""

import pytest
import torch
from conftest import byte_tokenizer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from pipeline.circuits import direct_logit, eap
from pipeline.circuits.knockout import Knockout, group_means
from pipeline.circuits.patching import (
    Edge,
    Receiver,
    activation_patching,
    edge_patching,
    path_patching,
)
from pipeline.errors import RetraceError
from pipeline.families.tiny_models import tiny_config, tiny_model
from pipeline.models import hooks, rerun
from pipeline.models.heads import Heads
from pipeline.models.native import NativeForCausalLM
from pipeline.models.pairs import KEPT, Node, Pairs, Task
from pipeline.spec.training import Architecture

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
KINDS = ["llama", "gpt2", "native"]
# Two pairs of unequal length, so that one is padded; the third token differs, and the fifth.
PROMPTS = {
    "clean": [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5]],
    "corrupt": [[3, 1, 7, 1, 8], [9, 2, 7, 5, 1, 5]],
    "answer": [1, 2],
    "foil": [3, 4],
    "positions": {"name": [2, 2], "late": [4, 4]},
}
EVEN = {k: [v[1]] for k, v in PROMPTS.items() if k != "positions"} | {"positions": {"name": [2]}}


def tiny(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 3}
    if kind == "llama":
        llama = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}
        made = LlamaForCausalLM(LlamaConfig(**sizes, **llama, initializer_range=0.3))
    elif kind == "gpt2":
        shape = {"vocab_size": 300, "n_positions": 32, "n_embd": 16, "n_layer": 3, "n_head": 4}
        made = GPT2LMHeadModel(GPT2Config(**shape, initializer_range=0.3))
        for name, p in made.named_parameters():  # biases are 0 in a new model
            if name.endswith("bias"):
                torch.nn.init.normal_(p, std=0.1)
    else:
        shape = {"n_layers": 3, "d_model": 16, "n_heads": 4, "d_mlp": 24, "n_ctx": 16}
        made = NativeForCausalLM({"d_vocab": 300, **Architecture(**shape).model_dump()})
        for name, p in made.named_parameters():  # queries and keys large: attention is uneven
            torch.nn.init.normal_(p, std=1.0 if ".q." in name or ".k." in name else 0.5)
    return made.eval().requires_grad_(False)


@pytest.fixture(params=KINDS)
def task(request):
    with torch.no_grad():
        yield Task.of(tiny(request.param), Pairs.of(PROMPTS, 0, "cpu"))


def logit_diff(logits: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """m the plain way: all logits."""
    rows = torch.arange(len(logits))
    last = logits[rows, pairs.end]
    return last[rows, pairs.answer] - last[rows, pairs.foil]


def with_z(task: Task, layer: int, head: int, mask: torch.Tensor) -> torch.Tensor:
    """m with a head's z replaced where mask [n pos] says, by a whole forward pass."""
    d = task.heads.d_head

    def patch(z: torch.Tensor) -> torch.Tensor:
        z, at = z.clone(), slice(head * d, (head + 1) * d)
        z[..., at] = torch.where(mask[..., None], task.source.z[layer][..., at], z[..., at])
        return z

    with task.heads.z_edited(layer, patch):
        return logit_diff(task.hf(task.pairs.base).logits, task.pairs)


# --- against plain loops -------------------------------------------------------------------


def test_the_metric_and_the_parts_that_sum_to_it(task):
    m = logit_diff(task.hf(task.pairs.base).logits, task.pairs)
    torch.testing.assert_close(task.before, m, **CLOSE)
    whole = logit_diff(task.hf(task.pairs.source).logits, task.pairs) - m
    torch.testing.assert_close(task.total, whole, **CLOSE)
    found = direct_logit.direct_logit(task, task.base)
    torch.testing.assert_close(sum(found.values()), m, **CLOSE)


@pytest.mark.parametrize("position", ["", "name", "@4", "@6"])  # @6: behind the first's end
@pytest.mark.parametrize("worth", [1, 9999], ids=["by length", "together"])
def test_patched_heads_are_whole_forward_passes(task, position, worth, monkeypatch):
    monkeypatch.setitem(rerun.WORTH_A_PASS, "cpu", worth)
    nodes = [Node("head", i, h, position) for i in range(3) for h in range(4)]
    found = activation_patching(task, nodes)
    for node, effect in zip(nodes, found, strict=True):
        want = with_z(task, node.layer, node.head, task.pairs.mask(position)) - task.before
        torch.testing.assert_close(effect, want, **CLOSE)


@pytest.mark.parametrize(
    "least, want",
    [(1, [[1, 4], [0, 3], [2]]), (9, [[1, 4], [0, 2, 3]]), (10, [[0, 1, 2, 3, 4]])],
)
def test_prompts_of_similar_length_share_a_pass_that_is_large_enough(least, want):
    found = rerun.alike(torch.tensor([3, 5, 1, 3, 5]), 1, least)
    assert [some.tolist() for some in found] == want


@pytest.mark.parametrize(
    ("kind", "hook"), [("resid", "resid_pre"), ("attn", "attn_out"), ("mlp", "mlp_out")]
)
def test_patched_streams_are_whole_forward_passes(task, kind, hook):
    for layer in range(3):
        name = f"blocks.{layer}.hook_{hook}"
        new = hooks.run_to(task.hf, task.pairs.source, [name])[name]
        mask = task.pairs.mask("late")[..., None]
        with hooks.edited(task.hf, name, lambda x, m=mask, new=new: torch.where(m, new, x)):
            want = logit_diff(task.hf(task.pairs.base).logits, task.pairs) - task.before
        (found,) = activation_patching(task, [Node(kind, layer, -1, "late")])
        torch.testing.assert_close(found, want, **CLOSE)


def slow_path(task: Task, sender: tuple, receivers: list[Receiver] | None, place) -> torch.Tensor:
    """Path patching as Wang et al. 2022 describe it: whole forward passes, every head frozen."""
    heads, d = task.heads, task.heads.d_head
    seen = {}
    handles = []
    for layer in range(heads.n_layers):

        def freeze(z: torch.Tensor, layer=layer) -> torch.Tensor:
            z = task.base.z[layer].clone()
            if layer == sender[0]:
                at = slice(sender[1] * d, (sender[1] + 1) * d)
                z[..., at] = task.source.z[layer][..., at]
            return z

        handles.append(heads.z_edited(layer, freeze))
    for handle in handles:
        handle.__enter__()
    for r in receivers or []:
        at = heads.place(*r)
        keep = lambda _, __, out, r=r, at=at: seen.__setitem__(r, out[..., at.columns].clone())  # noqa: E731
        seen[r, "handle"] = at.module.register_forward_hook(keep)
    direct = logit_diff(task.hf(task.pairs.base).logits, task.pairs)
    for handle in handles:
        handle.__exit__(None, None, None)
    if receivers is None:
        return direct - task.before
    given = {}
    for r in receivers:
        seen[r, "handle"].remove()
        given[r] = (task.pairs.rows, place, seen[r][task.pairs.rows, place])
    with heads.set_inputs(given):
        return logit_diff(task.hf(task.pairs.base).logits, task.pairs) - task.before


@pytest.mark.parametrize(
    ("receivers", "at"),
    [
        (None, ""),
        ([Receiver(2, "q", 3)], "late"),
        ([Receiver(1, "v", 1), Receiver(2, "v", 0)], "name"),
        ([Receiver(2, "k", 1), Receiver(2, "k", 0)], "name"),
    ],
)
def test_paths_are_those_of_whole_forward_passes(task, receivers, at):
    senders = [(i, h) for i in range(3) for h in range(4)]
    found = path_patching(task, senders, receivers, at)
    place = task.pairs.place(at) if at else task.pairs.end
    for sender, effect in zip(senders, found, strict=True):
        torch.testing.assert_close(effect, slow_path(task, sender, receivers, place), **CLOSE)
    assert found.abs().max() > 1e-3


def test_a_path_to_a_head_below_does_nothing(task):
    found = path_patching(task, [(1, 0), (2, 0)], [Receiver(1, "q", 1)], "late")
    torch.testing.assert_close(found, torch.zeros_like(found), **CLOSE)


# --- against gradients by hand -------------------------------------------------------------


def small_step(task: Task, share: float) -> Task:
    """The same pairs, the source's runs moved towards the base's."""
    near = Task.of(task.hf, task.pairs)
    for stream in ("pre", "mid", "post", "z"):
        for x, y in zip(getattr(near.base, stream), getattr(near.source, stream), strict=True):
            y.copy_(x + share * (y - x))
    return near


def test_estimates_are_exact_for_small_changes(task):
    """First order: the error of a step is of the step's square."""
    near = small_step(task, 1e-2)
    nodes = [Node("head", 0, 1, "name"), Node("mlp", 0), Node("resid", 1, -1, "late"),
             Node("attn", 1), Node("head", 1, 2)]  # fmt: skip
    exact = activation_patching(near, nodes)
    found = eap.attribution_patching(near, nodes)
    # float32 differences of logits of size 1 are good to 1e-6
    torch.testing.assert_close(found, exact, atol=2e-4, rtol=0.1)
    edges, scores = eap.edges(near, [0.0])
    some = {e: i for i, e in enumerate(edges)}
    for edge in (
        Edge(Node("resid", 0), Node("head", 1, 1), "q" if task.heads.n_key_heads > 2 else "k"),
        Edge(Node("head", 0, 2), Node("head", 1, 1), "v"),
        Edge(Node("head", 0, 1), Node("mlp", 1)),
        Edge(Node("mlp", 0), eap.LOGITS),
    ):
        want = edge_patching(near, edge).mean()
        torch.testing.assert_close(scores[some[edge]], want, atol=2e-4, rtol=0.1)


def test_slopes_of_a_task_are_those_of_a_pass_of_their_own(task, monkeypatch):
    """The base run's own pass gives the same gradients, and attribution needs no other."""
    names = eap.OF_NODES + eap.OF_EDGES
    own = Task.of(task.hf, task.pairs, names)
    for kept, found in zip(own.slopes, eap.gradients(task, [0.0]), strict=True):
        for name in names:
            both = getattr(kept, name), getattr(found, name)
            assert both[0].keys() == both[1].keys() and both[0]
            for key, x in both[0].items():
                assert not x.requires_grad
                torch.testing.assert_close(x, both[1][key], **CLOSE)
    for name in (*KEPT, "past"):
        for x, y in zip(getattr(own.base, name), getattr(task.base, name), strict=True):
            torch.testing.assert_close(x, y, **CLOSE)
    nodes = [Node("head", i, h) for i in range(3) for h in range(4)] + [Node("mlp", 1)]
    want, want_edges = eap.attribution_patching(task, nodes), eap.edges(task, [0.0])[1]
    half = eap.gradients(own, [0.5])[1].pre[0]  # elsewhere on the path they are computed
    torch.testing.assert_close(half, eap.gradients(task, [0.5])[1].pre[0], **CLOSE)
    with monkeypatch.context() as patched:
        patched.setattr(type(task.hf.base_model), "forward", None)
        torch.testing.assert_close(eap.attribution_patching(own, nodes), want, **CLOSE)
        torch.testing.assert_close(eap.edges(own, [0.0])[1], want_edges, **CLOSE)
    few = Task.of(task.hf, task.pairs, eap.OF_NODES)  # edges need more, and take a pass
    torch.testing.assert_close(eap.edges(few, [0.0])[1], want_edges, **CLOSE)


def test_the_last_mlp_of_a_patched_run_sees_last_positions_alone():
    """Attention of the last layer sees the suffix, the keys of what stands before it, no more."""
    with torch.no_grad():
        task = Task.of(tiny("llama"), Pairs.of(PROMPTS, 0, "cpu"))
        layer, seen = task.hf.model.layers[2], {}
        for name in ("mlp", "self_attn"):
            getattr(layer, name).register_forward_hook(
                lambda module, given, kwargs, out, name=name: seen.setdefault(name, []).append(
                    (given or (kwargs["hidden_states"],))[0].shape
                ),
                with_kwargs=True,
            )
        start = task.pairs.place("name")
        activation_patching(task, [Node("head", 1, h, "name") for h in range(4)])
        rows = 4 * len(task.pairs.end)
        length = int((task.pairs.end - start).max()) + 1
        assert sum(x.numel() for x in map(torch.empty, seen["mlp"])) == rows * 16
        assert seen["self_attn"] == [(rows, length, 16)] and length > 1


def test_midpoints_halve_equal_parts():
    assert eap.midpoints(1) == [0.5] and eap.midpoints(4) == [0.125, 0.375, 0.625, 0.875]


def test_edges_to_the_logits_become_complete_with_steps(task):
    """Sum over edges into the logits against the change itself."""
    total = task.total.mean()
    gaps = []
    for alphas in ([0.0], eap.midpoints(64)):
        edges, scores = eap.edges(task, alphas)
        last = [i for i, e in enumerate(edges) if e.target == eap.LOGITS]
        assert len(last) == 1 + 3 * (4 + 1)
        gaps.append(abs(scores[last].sum() - total))
    x = hooks.run_to(task.hf, task.pairs.base, ["hook_embed"])["hook_embed"]
    y = hooks.run_to(task.hf, task.pairs.source, ["hook_embed"])["hook_embed"]
    cut = [Node("resid", 0, -1, p) for p in task.pairs.differing()]
    assert len(cut) == 2 and not torch.equal(x, y)
    grads = eap.gradients(task, eap.midpoints(64), edges=False)[1].pre[0]
    along = (grads.unflatten(0, (64, -1)).sum(0) * (y - x)).sum((1, 2)).mean()
    torch.testing.assert_close(along, total, atol=0.02, rtol=0.02)  # 64 points of a line


def test_edges_that_can_be_computed_on_paper():
    """Two attention layers without norm, biases or MLPs that write.

    The embedding is the identity, W_O of head 0 in layer 0 the identity on half of the stream, and
    the unembedding reads the stream as it is: what head 0 writes in dimension 1 is worth 1 logit of
    token 1, and what it writes is the value it sees, since all attention is even.
    """
    shape = {"n_layers": 2, "d_model": 4, "n_heads": 2, "d_mlp": 2, "n_ctx": 8}
    shape |= {"normalization": "none", "positional": "standard", "bias": "none"}
    hf = NativeForCausalLM({"d_vocab": 4, **Architecture(**shape).model_dump()}).eval()
    for p in hf.requires_grad_(False).parameters():
        p.zero_()
    hf.model.tok_embed.weight.copy_(torch.eye(4))
    hf.model.head.weight.copy_(torch.eye(4))
    attn = hf.model.layers[0].attn
    attn.v.weight[:2, :2] = torch.eye(2)  # head 0 reads dimensions 0 and 1
    attn.o.weight[:2, :2] = torch.eye(2)  # and writes them
    prompts = {"clean": [[1, 2]], "corrupt": [[0, 2]], "answer": [1], "foil": [0], "positions": {}}
    with torch.no_grad():
        task = Task.of(hf, Pairs.of(prompts, None, "cpu"))
        assert task.before.item() == pytest.approx(0.5)  # half of the attention is on token 1
        edges, scores = eap.edges(task, [0.0])
        score = dict(zip(edges, scores.tolist(), strict=True))
        embed, head, late = Node("resid", 0), Node("head", 0, 0), Node("head", 1, 0)
        paper = {
            Edge(embed, head, "v"): -1.0,  # +0.5 turns into -0.5
            Edge(embed, head, "q"): 0.0,
            Edge(head, eap.LOGITS): -1.0,
            Edge(embed, eap.LOGITS): 0.0,  # the last token is the same
            Edge(head, late, "v"): 0.0,  # layer 1 writes nothing
            Edge(Node("head", 0, 1), eap.LOGITS): 0.0,
        }
        for edge, want in paper.items():
            assert score[edge] == pytest.approx(want, abs=1e-6), edge
            assert edge_patching(task, edge).item() == pytest.approx(want, abs=1e-6), edge
        (effect,) = activation_patching(task, [head])
        (path,) = path_patching(task, [(0, 0)])
        assert effect.item() == path.item() == pytest.approx(-1)
        assert direct_logit.direct_logit(task, task.base)[head].item() == pytest.approx(0.5)


# --- against TransformerLens ---------------------------------------------------------------


def bridge_of(hf: torch.nn.Module, folder, compatible: bool = False):
    from transformer_lens.model_bridge import TransformerBridge

    hf.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu")
    if compatible:
        bridge.enable_compatibility_mode()
    return bridge


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_equal_to_transformer_lens(kind, tmp_path):
    from transformer_lens import patching as theirs
    from transformer_lens.tools.analysis import attribution_patching as their_estimate

    hf = tiny(kind)
    with torch.no_grad():
        task = Task.of(hf, Pairs.of(EVEN, 0, "cpu"))
        bridge = bridge_of(hf, tmp_path)
        _, cache = bridge.run_with_cache(task.pairs.source)
        metric = lambda logits: logit_diff(logits, task.pairs).mean()  # noqa: E731
        n_pos = task.pairs.base.shape[1]
        want = theirs.generic_activation_patch(
            bridge, task.pairs.base, cache, metric, theirs.layer_head_vector_patch_setter, "z",
            ("layer", "head"),
        )  # fmt: skip
        nodes = [Node("head", i, h) for i in range(3) for h in range(4)]
        found = activation_patching(task, nodes).mean(1) + task.before.mean()
        torch.testing.assert_close(found, want.flatten(), **CLOSE)
        want = theirs.get_act_patch_mlp_out(bridge, task.pairs.base, cache, metric)
        nodes = [Node("mlp", i, -1, f"@{p}") for i in range(3) for p in range(n_pos)]
        found = activation_patching(task, nodes).mean(1) + task.before.mean()
        torch.testing.assert_close(found, want.flatten(), **CLOSE)
    result = their_estimate.attribution_patch(
        bridge, task.pairs.source, task.pairs.base, metric, their_estimate.EdgeAttributionConfig()
    )
    with torch.no_grad():
        theirs_by = {n: s for n, s in result.node_scores.items() if n.kind != "embed"}
        name = {"attn_head_out": "head", "mlp_out": "mlp"}
        nodes = [
            Node(name[n.kind], n.layer, -1 if n.head is None else n.head, f"@{n.position}")
            for n in theirs_by
        ]
        found = eap.attribution_patching(task, nodes).mean(1)
        torch.testing.assert_close(found, torch.tensor(list(theirs_by.values())), **CLOSE)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_direct_logits_and_patterns_are_transformer_lenss(kind, tmp_path):
    from transformer_lens.tools.analysis import direct_logit_attribution

    hf = tiny(kind)
    if kind == "gpt2":  # in compatibility mode value biases are no head's: they go into b_O
        for layer in hf.transformer.h:
            layer.attn.c_attn.bias.data[32:] = 0
            layer.ln_1.bias.data[:] = 0
    with torch.no_grad():
        task = Task.of(hf, Pairs.of(EVEN, 0, "cpu"))
        bridge = bridge_of(hf, tmp_path, compatible=True)
        _, cache = bridge.run_with_cache(task.pairs.base)
        result = direct_logit_attribution(
            bridge, cache=cache, answer_tokens=task.pairs.answer, incorrect_tokens=task.pairs.foil,
            unit="head", pos=-1,
        )  # fmt: skip
        want = dict(zip(result.labels, result.attribution.flatten().tolist(), strict=True))
        found = direct_logit.direct_logit(task, task.base)
        for i in range(3):
            for h in range(4):
                got = found[Node("head", i, h)].item()
                assert got == pytest.approx(want[f"L{i}H{h}"], abs=1e-4)
        for i, pattern in enumerate(task.heads.patterns(task.pairs.base)):
            torch.testing.assert_close(pattern, cache[f"blocks.{i}.attn.hook_pattern"], **CLOSE)


# --- mean ablation -------------------------------------------------------------------------


def test_means_are_by_template():
    hf = tiny("llama")
    tokens = torch.randint(0, 300, (7, 5), generator=torch.Generator().manual_seed(0))
    groups = torch.tensor([0, 1, 1, 0, 2, 2, 2])
    with torch.no_grad():
        found = group_means(Heads(hf), tokens, groups, piece=3)
        seen = []
        with Heads(hf).z_edited(1, lambda z: seen.append(z)):
            hf(tokens)
    for g in range(3):
        torch.testing.assert_close(found[1][g], seen[0][groups == g].mean(0), **CLOSE)


def test_a_circuit_of_all_heads_is_the_model_and_one_without_them_is_the_mean(task):
    groups = torch.tensor([0, 1])
    means = group_means(task.heads, task.pairs.source, groups)
    knockout = Knockout(task, means, groups)
    whole = knockout.whole()
    one = frozenset({(1, 2, "late")})
    found = knockout.metric([(whole, frozenset()), (frozenset(), frozenset()), (whole, one)])
    torch.testing.assert_close(found[0], task.before, **CLOSE)
    # each group is one prompt, so its mean is its source: the third is activation patching
    torch.testing.assert_close(found[2], with_z(task, 1, 2, task.pairs.mask("late")), **CLOSE)
    kept = knockout.kept(one)
    assert kept.sum() == 2 and kept[1, 0, 5, 2] and kept[1, 1, 5, 2]
    assert knockout.kept(one, one).sum() == 0
    again = knockout.metric([(whole, whole)])
    torch.testing.assert_close(again[0], found[1], **CLOSE)
    run = knockout.run(whole, one)
    torch.testing.assert_close(task.metric(task.pairs.at_end(run.post[-1])), found[2], **CLOSE)
    mean = means[1][groups].unflatten(-1, (4, -1))[:, 5, 2]
    torch.testing.assert_close(run.z[1].unflatten(-1, (4, -1))[:, 5, 2], mean, **CLOSE)
    longer = [torch.nn.functional.pad(m, (0, 0, 0, 3)) for m in means]  # of longer prompts
    assert torch.equal(Knockout(task, longer, groups).metric([(whole, one)])[0], found[2])


# --- faults --------------------------------------------------------------------------------


def test_faults_are_told():
    broken = PROMPTS | {"corrupt": [[3, 1], [9, 2, 7, 5, 1, 5]]}
    with pytest.raises(RetraceError, match="pair 0 has 6 and 3 tokens"):
        Pairs.of(broken, 0, "cpu")
    pairs = Pairs.of(PROMPTS, 0, "cpu")
    with pytest.raises(RetraceError, match="did you mean 'name'"):
        pairs.place("nam")
    assert pairs.end.tolist() == [5, 6] and pairs.place("name").tolist() == [3, 3]
    swapped = Pairs.of(PROMPTS, None, "cpu", denoising=True)
    assert swapped.base.tolist()[1] == PROMPTS["corrupt"][1]

    mamba = tiny_model(tiny_config("mamba"))
    with pytest.raises(RetraceError, match=r"'mamba' has no heads here.*no attn\.hook_z"):
        Heads(mamba)


def first(out):
    """The stream of a module's output, which attention gives with its weights."""
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("length", [4, 5, 6, 7, 11])
def test_a_sliding_window_is_the_models_own(length):
    """Mistral with a window of 6: prompts shorter than it, as long, and longer."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=24, sliding_window=6, initializer_range=0.3,
    )  # fmt: skip
    hf = MistralForCausalLM(config).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(1)
    clean, corrupt = torch.randint(3, 50, (2, 2, length), generator=draw).tolist()
    prompts = {"clean": clean, "corrupt": corrupt, "answer": [1, 2], "foil": [3, 4],
               "positions": {"p": [1, 2]}}  # fmt: skip
    nodes = [Node("resid", 1, position="p"), Node("attn", 1), Node("mlp", 0, position="p")]
    modules = [hf.model.layers[0], hf.model.layers[1].self_attn, hf.model.layers[0].mlp]
    with torch.no_grad():
        pairs = Pairs.of(prompts, None, "cpu")
        before = logit_diff(hf(pairs.base).logits, pairs)
        found = activation_patching(Task.of(hf, pairs), nodes)
        for node, module, got in zip(nodes, modules, found, strict=True):
            kept = []
            handle = module.register_forward_hook(lambda _, a, out, k=kept: k.append(first(out)))
            hf(pairs.source)
            handle.remove()
            mask = pairs.mask(node.position)[..., None]

            def replaced(_, args, out, new=kept[0], at=mask):
                made = torch.where(at, new, first(out))
                return (made, *out[1:]) if isinstance(out, tuple) else made

            handle = module.register_forward_hook(replaced)
            want = logit_diff(hf(pairs.base).logits, pairs) - before
            handle.remove()
            torch.testing.assert_close(got, want, **CLOSE)
            assert want.abs().min() > 1e-3
