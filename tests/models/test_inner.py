"""Scores, patterns, heads' results and routers' probabilities: against the bridge and by hand."""

import families_check as check
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.errors import RetraceError
from pipeline.models import hooks, inner, modules, places, proof
from pipeline.spec import families

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
BY_KEY = ["attn.hook_attn_scores", "attn.hook_pattern"]
# Plain heads, grouped queries, joint projections, ALiBi, capped scores, windows, post-norms
KINDS = ["llama", "gpt2", "gpt_neox", "gptj", "opt", "phi", "gemma", "gemma2", "olmo", "olmo2",
         "bloom", "mpt", "gpt_neo", "mistral", "codegen", "falcon", "gpt_bigcode"]  # fmt: skip
MOE = ["mixtral", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "deepseek_v3", "jamba"]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def fused(kind: str) -> nn.Module:
    """A tiny model with the attention that it is loaded with, fused where the family has one."""
    from pipeline.families.tiny_models import tiny_config

    hf = check.model_of(kind, 0)
    plain = type(hf)(tiny_config(kind)).eval().requires_grad_(False)
    plain.load_state_dict(hf.state_dict())
    return plain


def layer_hooks(names: list[str]) -> list[str]:
    return [f"blocks.{i}.{h}" for i in range(2) for h in names]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_patterns_are_the_bridges(kind):
    hf = fused(kind)
    before = hf.config._attn_implementation
    acts = hooks.run_to(hf, check.TOKENS, layer_hooks(BY_KEY))
    assert hf.config._attn_implementation == before  # eager within the pass alone
    bridge = check.bridge_of(check.model_of(kind, 0))  # OPT's reads what eager attention returns
    _, cache = bridge.run_with_cache(check.TOKENS)
    for i in range(2):
        n_heads = hf.config.num_attention_heads
        scores, pattern = (inner.by_head(acts[f"blocks.{i}.{h}"], n_heads) for h in BY_KEY)
        theirs = cache[f"blocks.{i}.attn.hook_pattern"]
        torch.testing.assert_close(pattern, theirs, **CLOSE)
        hidden = theirs == 0
        assert hidden.any() and (scores[hidden] == 0).all()
        # not every bridge has scores, and those of some are before a mask or a bias
        ours = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pattern_of_values_is_z(kind):
    hf = fused(kind)
    names = ["attn.hook_pattern", "attn.hook_v", "attn.hook_z"]
    acts = hooks.run_to(hf, check.TOKENS, layer_hooks(names))
    n_heads = hf.config.num_attention_heads
    for i in range(2):
        pattern, v, z = (acts[f"blocks.{i}.{h}"] for h in names)
        d_head = z.shape[-1] // n_heads
        v = inner.by_head(v, v.shape[-1] // d_head)
        v = v.repeat_interleave(n_heads // v.shape[1], 1)
        ours = inner.by_head(pattern, n_heads) @ v
        torch.testing.assert_close(ours, inner.by_head(z, n_heads), **CLOSE)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gemma2", "phi", "gptj"])
def test_results_are_the_bridges_and_sum_to_what_attention_writes(kind):
    hf = fused(kind)
    acts = hooks.run_to(hf, check.TOKENS, layer_hooks(["attn.hook_result"]))
    bridge = check.bridge_of(hf)
    if kind not in ("opt", "gptj"):  # whose bridges have none; they sum, all the same
        bridge.set_use_attn_result(True)
    _, cache = bridge.run_with_cache(check.TOKENS)
    for i, layer in enumerate(modules.layers_of(hf)):
        ours = acts[f"blocks.{i}.attn.hook_result"]
        if kind not in ("opt", "gptj"):
            theirs = cache[f"blocks.{i}.attn.hook_result"].flatten(-2)
            torch.testing.assert_close(ours, theirs, **CLOSE)
        out = modules.submodule(layer, modules.family(hf).place("attn.hook_z")[0])
        with hooks.capture(hf, [f"blocks.{i}.attn.hook_z"]) as z:
            hf(check.TOKENS)
        summed = ours.unflatten(-1, (hf.config.num_attention_heads, -1)).sum(-2)
        whole = out(z[f"blocks.{i}.attn.hook_z"])
        bias = out.bias if out.bias is not None else 0
        torch.testing.assert_close(summed + bias, whole, **CLOSE)


# --- replaced ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "bloom", "gptj", "opt"])
@pytest.mark.parametrize("at", [*BY_KEY, "attn.hook_result"])
def test_an_edit_that_changes_nothing_and_one_that_does(kind, at):
    hf = fused(kind)
    hook = f"blocks.0.{at}"
    hf.set_attn_implementation("eager")
    before = hf(check.TOKENS).logits
    with hooks.edited(hf, hook, lambda x: x.clone()):
        assert torch.equal(hf(check.TOKENS).logits, before)
    change = torch.linspace(0, 2, 8).repeat(4)  # not the same for all keys, nor dimensions

    def fn(x: torch.Tensor) -> torch.Tensor:
        return x * change.repeat(x.shape[-1] // 32)

    with hooks.edited(hf, hook, fn), hooks.capture(hf, [hook]) as seen:
        assert not torch.allclose(hf(check.TOKENS).logits, before, atol=1e-3)
    plain = hooks.run_to(hf, check.TOKENS, [hook])[hook]
    torch.testing.assert_close(seen[hook], fn(plain), **CLOSE)
    assert torch.equal(hf(check.TOKENS).logits, before)


def test_a_replaced_pattern_by_hand():
    """Every head looks at the first token: z is its value; and at none behind the query."""
    hf = fused("llama")
    pattern, z, v = (f"blocks.0.attn.hook_{h}" for h in ("pattern", "z", "v"))
    first = torch.zeros(8)
    first[[0, 7]] = 1  # the last token is seen by the last query alone

    def look(x: torch.Tensor) -> torch.Tensor:
        return first.repeat(x.shape[-1] // 8).expand_as(x)

    with hooks.edited(hf, pattern, look), hooks.capture(hf, [z, v]) as seen:
        hf(check.TOKENS)
    v = seen[v].unflatten(-1, (-1, seen[z].shape[-1] // 4)).repeat_interleave(2, 2).flatten(-2)
    want = v[:, :1].expand_as(v).clone()
    want[:, 7] += v[:, 7]
    torch.testing.assert_close(seen[z], want)


@pytest.mark.parametrize("kind", ["openai-gpt", "codegen", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_behind_a_query_stay_unseen_whatever_a_mask_writes(kind, dtype):
    """GPT-1 puts -10,000 in their place: scores of 0 for all keys attend to those seen alike."""
    hf = fused(kind).to(dtype)
    scores, pattern = (f"blocks.0.{at}" for at in BY_KEY)
    acts = hooks.run_to(hf, check.TOKENS, [scores, pattern])
    later = torch.ones(8, 8).triu(1).bool()
    assert (inner.by_head(acts[scores], 4)[..., later] == 0).all()
    assert (inner.by_head(acts[pattern], 4)[..., later] == 0).all()
    alike = (1 / torch.arange(1, 9)[:, None] * ~later).repeat(1, 4)
    with hooks.edited(hf, scores, torch.zeros_like), hooks.capture(hf, [pattern]) as seen:
        with_scores = hf(check.TOKENS).logits
    found = seen[pattern].float()
    torch.testing.assert_close(found, alike.expand_as(found), atol=4e-3, rtol=1e-2)
    with hooks.edited(hf, pattern, lambda x: seen[pattern] + (x == 0).to(x.dtype)):
        assert torch.equal(hf(check.TOKENS).logits, with_scores)  # no edit shows a hidden key


def test_a_head_patched_by_its_result_is_that_patched_by_z():
    hf = fused("gpt2")
    result, z = "blocks.0.attn.hook_result", "blocks.0.attn.hook_z"
    other = hooks.run_to(hf, check.TOKENS.flip(0), [result, z])
    d_head, d_model = 8, 32

    def patch(d: int, hook: str):
        def fn(x: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            x[..., 2 * d : 3 * d] = other[hook][..., 2 * d : 3 * d]
            return x

        return hooks.edited(hf, hook, fn)

    with patch(d_head, z):
        by_z = hf(check.TOKENS).logits
    with patch(d_model, result):
        torch.testing.assert_close(hf(check.TOKENS).logits, by_z, atol=2e-5, rtol=1e-4)


def test_gradients_flow_to_a_pattern():
    hf = fused("llama")
    x = torch.zeros((), requires_grad=True)
    with torch.enable_grad():
        with hooks.edited(hf, "blocks.0.attn.hook_pattern", lambda p: p * (1 + x)):
            out = hf(check.TOKENS).logits[0, -1, 3]
        (grad,) = torch.autograd.grad(out, x)
    assert grad.abs() > 1e-4


def test_a_pass_that_stops_or_fails_in_a_softmax_leaves_none_behind():
    hf = fused("llama")
    hooks.run_to(hf, check.TOKENS, ["blocks.0.attn.hook_pattern"])  # stops inside attention

    def fail(_: torch.Tensor) -> None:
        raise ValueError("mine")

    with (
        pytest.raises(ValueError, match="mine"),
        hooks.edited(hf, "blocks.1.attn.hook_attn_scores", fail),
    ):
        hf(check.TOKENS)
    assert torch.overrides._get_current_function_mode_stack() == []
    assert not [m for m in hf.modules() if "_retrace_readers" in m.__dict__]
    assert hf.config._attn_implementation == "sdpa"


def test_attention_sinks_show_a_pattern_and_no_scores():
    hf = check.model_of("gpt_oss", 0)
    (pattern,) = hooks.run_to(hf, check.TOKENS, ["blocks.0.attn.hook_pattern"]).values()
    mass = inner.by_head(pattern, 4).sum(-1)
    assert (mass < 1).all() and (mass > 0).all()  # the rest goes to the sink
    with pytest.raises(RetraceError, match=r"take attn\.hook_pattern"):
        hooks.run_to(hf, check.TOKENS, ["blocks.0.attn.hook_attn_scores"])


@pytest.mark.parametrize("kind", ["llama", "gemma2", "bloom", "falcon", "gpt_oss"])
def test_a_model_proves_its_patterns(kind):
    hf = check.model_of(kind, 0)
    proof.prove_patterns(hf, ["hook_embed", *layer_hooks(BY_KEY[1:])])
    own = modules.family(hf).model_dump()
    keys = own["hooks"]["attn.hook_k"]
    hf.retrace_layout = families.Layout(**own | {"hooks": own["hooks"] | {"attn.hook_v": keys}})
    with pytest.raises(RetraceError, match=r"hook_pattern': times .* not attn\.hook_z"):
        proof.prove_patterns(hf, ["blocks.1.attn.hook_attn_scores"])


# --- experts -------------------------------------------------------------------------------


def chosen(hf: nn.Module, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits, weights, numbers) that a router returns, by a plain hook."""
    found = []
    path = modules.family(hf).place("mlp.hook_expert_weights")[0]
    router = modules.submodule(modules.layers_of(hf)[layer], path)
    handle = router.register_forward_hook(lambda _, __, out: found.append(out))
    hf(check.TOKENS)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("kind", MOE)
def test_probabilities_of_a_router(kind):
    hf = check.model_of(kind, 0)
    layer = 1  # the first layer of DeepSeek's is dense
    hook = f"blocks.{layer}.mlp.hook_expert_weights"
    ours = hooks.run_to(hf, check.TOKENS, [hook])[hook]
    found = chosen(hf, layer)
    logits = found if isinstance(found, torch.Tensor) else found[0]
    logits = logits.float().view(2, 8, -1)
    assert ours.shape == logits.shape
    if kind in ("gpt_oss", "granitemoe"):  # the softmax of the chosen alone
        top = logits.topk(2).indices
        want = torch.full_like(logits, float("-inf")).scatter(-1, top, logits.gather(-1, top))
        want = want.softmax(-1)
    else:
        want = logits.sigmoid() if kind == "deepseek_v3" else logits.softmax(-1)
    torch.testing.assert_close(ours, want, **CLOSE)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe"])
def test_probabilities_are_those_of_the_bridges_router(kind):
    hf = check.model_of(kind, 0)
    hook = "blocks.0.mlp.hook_expert_weights"
    _, cache = check.bridge_of(hf).run_with_cache(check.TOKENS)
    theirs = cache["blocks.0.mlp.gate.hook_out"].view(2, 8, -1).softmax(-1)
    torch.testing.assert_close(hooks.run_to(hf, check.TOKENS, [hook])[hook], theirs, **CLOSE)


@pytest.mark.parametrize("kind", ["mixtral", "olmoe"])
def test_what_the_experts_write_is_what_the_block_does(kind):
    hf = check.model_of(kind, 0)
    names = ["blocks.0.mlp.hook_experts_out", "blocks.0.hook_mlp_out"]
    acts = hooks.run_to(hf, check.TOKENS, names)
    torch.testing.assert_close(*acts.values(), **CLOSE)


def test_experts_beside_a_shared_one():
    hf = check.model_of("deepseek_v3", 0)
    at = "blocks.1."
    names = [f"{at}mlp.hook_in", f"{at}mlp.hook_experts_out", f"{at}hook_mlp_out"]
    read, experts, out = hooks.run_to(hf, check.TOKENS, names).values()
    shared = modules.layers_of(hf)[1].mlp.shared_experts(read)
    torch.testing.assert_close(experts + shared, out, **CLOSE)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_probabilities_replaced(kind):
    """Another choice in Mixtral; in GPT-OSS the same choice, all of it for the larger."""
    hf = check.model_of(kind, 0)
    hook, out = "blocks.1.mlp.hook_expert_weights", "blocks.1.mlp.hook_experts_out"
    before = hf(check.TOKENS).logits
    with hooks.edited(hf, hook, lambda x: x.clone()):
        assert torch.equal(hf(check.TOKENS).logits, before)
    with hooks.edited(hf, hook, lambda x: x.flip(-1)), hooks.capture(hf, [hook, out]) as seen:
        assert not torch.allclose(hf(check.TOKENS).logits, before, atol=1e-3)
    if kind == "mixtral":
        read = hooks.run_to(hf, check.TOKENS, ["blocks.1.mlp.hook_in"])["blocks.1.mlp.hook_in"]
        block = modules.layers_of(hf)[1].mlp
        top = seen[hook].topk(2)
        weights = top.values / top.values.sum(-1, keepdim=True)
        want = by_hand(block, read, top.indices, weights)
        torch.testing.assert_close(seen[out], want, **CLOSE)


def by_hand(block: nn.Module, x, numbers, weights) -> torch.Tensor:
    """The experts of Mixtral, token by token."""
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            for e, w in zip(numbers[b, t].tolist(), weights[b, t], strict=True):
                gate, up = F.linear(x[b, t], block.experts.gate_up_proj[e]).chunk(2)
                made = F.linear(block.experts.act_fn(gate) * up, block.experts.down_proj[e])
                out[b, t] += w * made
    return out


def test_directions_of_results_write_into_the_stream():
    from pipeline.models import splice

    hf = fused("gemma2")
    direction = torch.randn(3, 4 * 32)
    got = splice.written(hf, "blocks.0.attn.hook_result", direction)
    _, post = hooks.written_by(hf, modules.layers_of(hf)[0], "attn")
    gain = places.gain(places.as_function(post), got)
    torch.testing.assert_close(got, direction.view(3, 4, 32).sum(1) * gain, **CLOSE)
