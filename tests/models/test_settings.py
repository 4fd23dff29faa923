"""Settings and types that no other test names: stored values, edits and circuits are plain hooks'.

Each is a tiny random model in float32. Prompts are longer than its windows and than the few tokens
that a model is proved on. What is expected comes from plain_hooks.py, which knows no layout.
"""

import plain_hooks as plain
import pytest
import torch
from torch import Tensor, nn

from pipeline.circuits import head_inputs
from pipeline.circuits.edge_graph import EdgeGraph
from pipeline.circuits.patching import activation_patching
from pipeline.errors import RetraceError
from pipeline.families import tiny_models
from pipeline.models import hooks, inner, modules, proof, splice
from pipeline.models.pairs import Node, Pairs, Task
from pipeline.spec import families
from pipeline.tracing.linear import Linear

TOKENS = torch.randint(3, 40, (3, 13), generator=torch.Generator().manual_seed(1))
# Two pairs of unequal length; the third token of each differs, and one of the later ones.
CLEAN = torch.randint(5, 38, (2, 12), generator=torch.Generator().manual_seed(3)).tolist()
CLEAN = [CLEAN[0][:9], CLEAN[1]]
CORRUPT = [[*ids[:2], 39, *ids[3:late], 38, *ids[late + 1 :]]
           for ids, late in zip(CLEAN, (6, 8), strict=True)]  # fmt: skip
PROMPTS = {"clean": CLEAN, "corrupt": CORRUPT, "answer": [1, 2], "foil": [3, 4],
           "positions": {"name": [2, 2], "late": [6, 8]}}  # fmt: skip
CLOSE = 1e-5  # of the largest value
LOCAL = ["sliding_attention", "full_attention"]


def rope(kind: str, **more: object) -> dict:
    return {"rope_parameters": {"rope_theta": 10000.0, "rope_type": kind, **more}}


ORIGINAL = {"original_max_position_embeddings": 8}
LONG = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "factor": 4.0} | ORIGINAL
FOUND = [
    # A window of layer 0 was counted over stored keys (the proof looked at the upper half).
    ("gpt_neo", {"attention_types": [[["local", "global"], 1]], "window_size": 4}),
    ("gpt_neo", {"attention_types": [[["local", "global"], 1]], "window_size": 10}),
    # Falcon 40B's norm of the MLP was not known, nor the one norm of Falcon 2.
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 1, "num_ln_in_parallel_attn": 1}),
    # Llama 4 counts positions over stored keys, and scales queries of far ones.
    ("llama4_text", {"num_hidden_layers": 4, "floor_scale": 4, "interleave_moe_layer_step": 2}),
]
SETTINGS = [
    ("llama", rope("linear", factor=3.0)),
    ("llama", rope("dynamic", factor=3.0) | {"max_position_embeddings": 8}),
    ("llama", rope("yarn", factor=4.0, **ORIGINAL)),
    ("llama", rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, **ORIGINAL)),
    ("llama", rope("longrope", **LONG)),
    ("phi3", rope("longrope", **LONG) | ORIGINAL),
    ("llama", rope("default", partial_rotary_factor=0.5)),
    ("llama", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True, "head_dim": 12,
               "tie_word_embeddings": True}),
    ("llama", {"hidden_act": "gelu", "pretraining_tp": 2}),
    ("mistral", {"head_dim": 16, "sliding_window": 4, "tie_word_embeddings": True}),
    ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 4}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "layer_types": LOCAL}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "layer_types": LOCAL,
               "num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("qwen2_moe", {"decoder_sparse_step": 2, "norm_topk_prob": True}),
    ("gemma", {"num_key_value_heads": 1, "head_dim": 16, "attention_bias": True}),
    ("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0, "sliding_window": 4,
                "num_key_value_heads": 1, "head_dim": 16}),
    ("gemma3_text", {"final_logit_softcapping": 4.0, "sliding_window": 4, "layer_types": LOCAL}),
    ("vaultgemma", {"sliding_window": 4, "layer_types": LOCAL}),
    ("granite", {"residual_multiplier": 0.3, "attention_multiplier": 0.4, "logits_scaling": 5.0,
                 "embedding_multiplier": 7.0, "attention_bias": True, "mlp_bias": True}),
    ("granitemoe", {"attention_multiplier": 0.3, "num_experts_per_tok": 1}),
    ("cohere", {"logit_scale": 0.3, "tie_word_embeddings": False, "num_key_value_heads": 1}),
    ("cohere2", {"logit_scale": 2.0, "sliding_window": 4, "layer_types": LOCAL, "head_dim": 16}),
    ("gptj", {"rotary_dim": 8}),
    ("gpt_neox", {"rotary_pct": 0.5, "use_parallel_residual": False}),
    ("gpt_neox", {"tie_word_embeddings": True, "hidden_act": "gelu_new"}),
    ("phi", {"partial_rotary_factor": 1.0, "num_key_value_heads": 2}),
    ("falcon", {"multi_query": True, "alibi": True, "parallel_attn": False, "bias": True}),
    ("falcon", {"multi_query": False, "alibi": True, "num_kv_heads": 4}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": True}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 4, "multi_query": False,
                "num_ln_in_parallel_attn": 2, "num_hidden_layers": 3}),
    ("granitemoehybrid", {"layer_types": ["attention"] * 2, "num_local_experts": 0,
                          "position_embedding_type": "rope", "shared_intermediate_size": 20}),
    ("mpt", {"attn_config": {"alibi": True, "clip_qkv": 0.5}}),
    ("bloom", {"n_head": 3, "hidden_size": 24}),
    ("mpt", {"attn_config": {"alibi": False, "softmax_scale": 0.3}, "n_heads": 3, "d_model": 24}),
    ("gpt2", {"scale_attn_weights": False, "activation_function": "relu", "n_inner": 20}),
    ("gpt_bigcode", {"multi_query": True, "scale_attn_weights": False}),
    ("opt", {"activation_function": "gelu"}),
    ("codegen", {"rotary_dim": 8, "tie_word_embeddings": True}),
    ("stablelm", {"num_key_value_heads": 1, "use_parallel_residual": True, "qk_layernorm": True}),
    ("starcoder2", {"num_key_value_heads": 1, "sliding_window": 4, "tie_word_embeddings": False}),
    ("olmo2", {"num_key_value_heads": 1, "attention_bias": True}),
    ("olmo3", {"sliding_window": 4, "layer_types": LOCAL}),
    ("smollm3", {"no_rope_layers": [1, 0], "use_sliding_window": True, "sliding_window": 4,
                 "layer_types": LOCAL}),
    ("exaone4", {"sliding_window": 4, "layer_types": LOCAL, "num_key_value_heads": 1}),
    ("seed_oss", {"attention_out_bias": True, "num_key_value_heads": 1, "head_dim": 16}),
    ("glm4", {"attention_bias": True, "head_dim": 16}),
    ("glm4_moe", {"first_k_dense_replace": 0, "routed_scaling_factor": 2.5, "n_shared_experts": 2}),
    ("ernie4_5_moe", {"use_bias": True, "moe_layer_start_index": 1}),
    ("nemotron", {"attention_bias": True, "mlp_bias": True, "partial_rotary_factor": 1.0}),
    ("apertus", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    ("nanochat", {"num_hidden_layers": 3, "final_logit_softcapping": 2.0}),
    ("nanochat", {"attention_bias": True, "final_logit_softcapping": None,
                  "num_key_value_heads": 1}),
    ("arcee", {"attention_bias": True, "mlp_bias": True}),
    ("gpt_oss", {"sliding_window": 4, "layer_types": LOCAL, "num_key_value_heads": 1}),
    ("llama4_text", {"no_rope_layers": [1, 0], "attention_chunk_size": 4,
                     "layer_types": ["chunked_attention", "full_attention"]}),
    ("dots1", {"sliding_window": 4, "layer_types": LOCAL}), ("exaone_moe", {}), ("hy_v3", {}),
    ("diffllama", {}), ("doge", {}), ("cwm", {"sliding_window": 4}), ("ministral", {}),
    ("hunyuan_v1_moe", {}), ("solar_open", {}), ("granite_swa", {"residual_multiplier": 0.5}),
]  # fmt: skip
# Upper layers take keys and values of lower ones, so that all run when one is resumed.
SHARED = [("gemma4_text", {"num_kv_shared_layers": 2, "num_hidden_layers": 4,
                           "layer_types": LOCAL * 2, "sliding_window": 4})]  # fmt: skip
# Without circuits, since they have no queries, keys and values, or states in their place.
STORED = [
    ("deepseek_v2", {"q_lora_rank": None, "first_k_dense_replace": 0, "n_shared_experts": 2}),
    ("deepseek_v3", {"rope_interleave": False, "n_group": 2}), ("deepseek_v32", {}),
    ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 0, "num_experts": 1}),
    ("bamba", {"attn_layer_indices": [0]}), ("lfm2", {"layer_types": ["full_attention", "conv"]}),
    ("falcon_h1", {"lm_head_multiplier": 0.5, "attention_out_multiplier": 0.7}),
    ("nemotron_h", {"layers_block_type": ["mamba", "attention"]}),
    ("gemma4_text", {"hidden_size_per_layer_input": 0}), ("mamba2", {"n_groups": 2}),
    ("recurrent_gemma", {"block_types": ["recurrent", "attention"], "logits_soft_cap": 3.0}),
    ("modernbert-decoder", {"local_attention": 4, "global_attn_every_n_layers": 2}),
    ("granitemoehybrid", {"layer_types": ["mamba", "attention"], "num_local_experts": 0}),
]  # fmt: skip


def cases(some: list, quick: bool = False) -> list:
    marks = [] if quick else [pytest.mark.slow]
    return [pytest.param(*case, marks=marks, id=f"{case[0]} {' '.join(case[1])}") for case in some]


def made(kind: str, settings: dict) -> nn.Module:
    """A proved model; of a type that the table lacks, with the layout of one alike."""
    config = tiny_models.with_architecture(tiny_models.tiny_config(kind, **settings))
    hf = tiny_models.tiny_model(config)
    if kind not in families.types():
        hf.retrace_layout = families.given(modules.alike(hf), config)
    proof.prove(hf)
    return hf


def off(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference over the largest value, that over 1 at least."""
    if ours.numel() != theirs.numel():
        return float("inf")
    theirs = theirs.view(ours.shape)
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1))


def change(x: Tensor) -> Tensor:
    return 1.3 * x + 0.1 * torch.linspace(-1, 1, x.shape[-1])


def found(hf: nn.Module, tokens: Tensor) -> tuple[dict[str, plain.Spot], dict]:
    """(hook -> where a plain hook has its value, what plain hooks saw) of all but those of norms.

    AssertionError where no module of a fitting name has it.
    """
    names = [n for n in hooks.hook_names(hf) if n.startswith("blocks.")]
    acts = hooks.run_to(hf, tokens, names)
    with plain.recorded(hf) as seen:
        hf(input_ids=tokens, use_cache=False)
    out: dict[str, plain.Spot] = {}
    for name in names:
        _, number, hook = name.split(".", 2)
        if hook.endswith(families.NORM_HOOKS):
            check_norm(hf, int(number), hook, acts[name], seen)
        elif hook == "mlp.hook_expert_weights":
            check_router(hf, int(number), acts[name], seen)
        else:
            there = [s for s in plain.spots(hf, int(number), hook) if (s.module, s.side) in seen]
            far = [(off(acts[name], s.value(seen[s.module, s.side])), s) for s in there]
            fits = [s for distance, s in far if distance <= CLOSE]
            assert fits, f"{name}: {[distance for distance, _ in far]}"
            out[name] = fits[0]
    return out, seen


def check_norm(hf: nn.Module, number: int, hook: str, ours: Tensor, seen: dict) -> None:
    part, _, what = hook.partition(".hook_")
    norm = plain.layers_of(hf)[number].get_submodule(modules.family(hf).parts[part])
    if not isinstance(norm, nn.Identity):
        n, size = plain.normalised(norm, seen[norm, "in"])
        assert off(ours.double(), n if what == "normalized" else size) <= CLOSE, (number, hook)


def check_router(hf: nn.Module, number: int, ours: Tensor, seen: dict) -> None:
    """A softmax or sigmoid of the router's logits, over all experts or over those chosen."""
    layer = plain.layers_of(hf)[number]
    routers = [m for n, m in layer.named_modules() if n.endswith((".gate", ".router"))]
    forms = []
    for router in routers:
        W = router.weight if hasattr(router, "weight") else next(router.parameters())
        logits = seen[router, "in"].float().reshape(-1, W.shape[1]) @ W.T
        bias = getattr(router, "bias", None)
        logits = logits if bias is None else logits + bias
        forms += [logits.softmax(-1), logits.sigmoid()]
        for k in range(1, logits.shape[1]):
            most, which = logits.topk(k)
            for values in (most.softmax(-1), most.sigmoid()):
                forms.append(torch.zeros_like(logits).scatter(1, which, values))
    assert min(off(ours, form) for form in forms) <= CLOSE, number


@torch.no_grad()
def check_values_and_edits(hf: nn.Module) -> dict[str, plain.Spot]:
    places, _ = found(hf, TOKENS)
    resumes = "resume" not in hf.retrace_fails
    for name, spot in places.items():
        if name.endswith("resid_mid"):
            continue  # of two readers; test_families.py replaces it by the layer's own modules
        with plain.edited(spot, change, len(TOKENS)):
            theirs = hf(input_ids=TOKENS, use_cache=False).logits
        with hooks.edited(hf, name, change):
            assert off(hf(input_ids=TOKENS, use_cache=False).logits, theirs) <= 2 * CLOSE, name
        if resumes and name.endswith(("resid_pre", "resid_post", "mlp_out", "hook_z", "hook_post")):
            x = change(splice.stream(hf, name, TOKENS))
            assert off(splice.resume(hf, name, TOKENS, x), theirs) <= 2 * CLOSE, name
            last = splice.resume(hf, name, TOKENS, x, last=2)
            assert off(last, theirs[:, -2:]) <= 2 * CLOSE, name
    if "unembed" not in hf.retrace_fails:
        last = f"blocks.{len(plain.layers_of(hf)) - 1}.hook_resid_post"
        x = hooks.run_to(hf, TOKENS, [last])[last]
        assert off(splice.unembed(hf, x), hf(input_ids=TOKENS, use_cache=False).logits) <= CLOSE
    return places


@torch.no_grad()
def check_patterns(hf: nn.Module) -> None:
    """Those that the model itself gives; or refused in a sentence, where z is more than A v."""
    for i in range(len(plain.layers_of(hf))):
        name = f"blocks.{i}.attn.hook_pattern"
        try:
            proof.prove_patterns(hf, [name])
        except RetraceError as e:
            assert "\n" not in str(e)
            continue
        theirs = hf(input_ids=TOKENS, use_cache=False, output_attentions=True).attentions[i]
        ours = inner.by_head(hooks.run_to(hf, TOKENS, [name])[name], theirs.shape[1])
        assert off(ours, theirs[..., : ours.shape[-1]].contiguous()) <= CLOSE, name


@torch.no_grad()
def check_circuits(hf: nn.Module) -> None:
    """Every head, MLP, attention, stream, query, key and value patched, alone, in a whole pass."""
    task = Task.of(hf, Pairs.of(PROMPTS, 0, "cpu"))
    pairs, d = task.pairs, task.heads.d_head
    places, seen = found(hf, pairs.source)

    def m(tokens: Tensor) -> Tensor:
        logits = hf(input_ids=tokens, use_cache=False).logits[pairs.rows, pairs.end]
        return logits[pairs.rows, pairs.answer] - logits[pairs.rows, pairs.foil]

    before = m(pairs.base)
    assert off(task.before, before) <= CLOSE and off(task.total, m(pairs.source) - before) <= CLOSE

    def patched(node: Node) -> Tensor:
        hook = {"resid": "hook_resid_pre", "attn": "hook_attn_out", "mlp": "hook_mlp_out",
                "head": "attn.hook_z"}.get(node.kind, f"attn.hook_{node.kind}")  # fmt: skip
        columns = slice(node.head * d, (node.head + 1) * d) if node.head >= 0 else slice(None)
        spot, mask = places[f"blocks.{node.layer}.{hook}"], pairs.mask(node.position)
        new = spot.value(seen[spot.module, spot.side]).view(*pairs.base.shape, -1)

        def patch(x: Tensor) -> Tensor:
            x = x.clone()
            x[..., columns] = torch.where(mask[..., None], new[..., columns], x[..., columns])
            return x

        with plain.edited(spot, patch, len(pairs.base)):
            return m(pairs.base) - before

    heads = [("head", h) for h in range(task.heads.n_heads)]
    for position in ("", "name", "late"):
        nodes = [Node(kind, i, h, position) for i in range(task.heads.n_layers)
                 for kind, h in [("resid", -1), ("attn", -1), ("mlp", -1), *heads]]  # fmt: skip
        for node, effect in zip(nodes, activation_patching(task, nodes), strict=True):
            assert off(effect, patched(node)) <= 2 * CLOSE, node
    nodes = head_inputs.input_nodes(task)
    for node, effect in zip(nodes, head_inputs.input_patching(task, nodes), strict=True):
        assert off(effect, patched(node)) <= 2 * CLOSE, node


@pytest.mark.parametrize(("kind", "settings"), cases(FOUND, quick=True) + cases(SETTINGS))
def test_values_edits_and_circuits_are_those_of_plain_hooks(kind, settings):
    hf = made(kind, settings)
    assert hf.retrace_refused == {} and not hf.retrace_fails.keys() - {"edges"}
    check_values_and_edits(hf)
    check_patterns(hf)
    check_circuits(hf)


@pytest.mark.parametrize(("kind", "settings"), cases(SHARED, quick=True) + cases(STORED))
def test_values_and_edits_are_those_of_plain_hooks(kind, settings):
    hf = made(kind, settings)
    assert "resume" not in hf.retrace_fails
    check_values_and_edits(hf)
    with pytest.raises(RetraceError, match=r"has no|computed apart|do not give its logits"):
        Task.of(hf, Pairs.of(PROMPTS, 0, "cpu"))


# --- refused in a sentence -----------------------------------------------------------------


def test_circuits_of_attention_that_looks_ahead_are_refused():
    """A patch at one position would change earlier ones, which circuits do not compute."""
    hf = made("gemma3_text", {"use_bidirectional_attention": True})
    check_values_and_edits(hf)
    with pytest.raises(RetraceError, match="looks at later tokens, too") as e:
        Task.of(hf, Pairs.of(PROMPTS, 0, "cpu"))
    assert "\n" not in str(e.value)
    with pytest.raises(RetraceError, match="looks at later tokens, too"):
        Linear.of(hf, torch.tensor(PROMPTS["clean"][0]), ["blocks.0.mlp.hook_in"])


def test_edges_of_attention_that_looks_ahead_are_cut_in_whole_passes():
    """With no edge cut the model's own logits, with all cut those on the other prompt."""
    hf = made("gemma3_text", {"use_bidirectional_attention": True})
    clean, corrupt = (torch.tensor(PROMPTS[k][:1]) for k in ("clean", "corrupt"))
    graph = EdgeGraph(hf, clean, corrupt)
    with torch.no_grad():
        nothing = graph.run(graph.everything() * 0)[0]
        for got, tokens in ((graph.clean, clean), (nothing, corrupt)):
            torch.testing.assert_close(got, hf(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["granite_swa", "mimo_v2_flash"])
def test_patterns_are_refused_where_a_sink_scales_what_the_softmax_gave(kind):
    hf = made(kind, {})
    check_values_and_edits(hf)
    with pytest.raises(RetraceError, match=r"times attn\.hook_v it is not attn\.hook_z"):
        proof.prove_patterns(hf, ["blocks.0.attn.hook_pattern"])


@pytest.mark.parametrize(
    ("kind", "settings", "n_heads"),
    [
        ("mimo_v2_flash", {}, 4),  # other keys where attention is local
        ("laguna", {"num_attention_heads_per_layer": [4, 2]}, 2),
        ("gemma4_text", {"global_head_dim": 16, "num_kv_shared_layers": 0, "layer_types": LOCAL,
                         "hidden_size_per_layer_input": 0}, 4),
    ],
)  # fmt: skip
@torch.no_grad()
def test_layers_with_other_heads_are_stored_and_have_no_circuits(kind, settings, n_heads):
    """Edges were cut as if all layers had the heads of the first one."""
    hf = made(kind, settings)
    check_values_and_edits(hf)
    with pytest.raises(RetraceError, match=r"its layer 1 has queries, keys and values of") as e:
        EdgeGraph(hf, TOKENS)
    assert "\n" not in str(e.value)
    z, result = (f"blocks.1.attn.hook_{h}" for h in ("z", "result"))

    def first(x: Tensor) -> Tensor:
        """The first head alone."""
        return x * (torch.arange(x.shape[-1]) < x.shape[-1] // n_heads)

    logits = []
    for name in (z, result):
        with hooks.edited(hf, name, first):
            logits.append(hf(input_ids=TOKENS, use_cache=False).logits)
    assert off(*logits) <= CLOSE


def test_patterns_are_refused_where_eager_attention_is_another():
    """transformers' eager Falcon adds ALiBi's bias twice, its fused one, which is loaded, once."""
    hf = made("falcon", {"alibi": True})
    name = "blocks.1.attn.hook_pattern"
    proof.prove_patterns(hf, [name])
    inner._set_attention(hf, "sdpa")
    proof.prove(hf)
    with pytest.raises(RetraceError, match="is not the attention of this model") as e:
        proof.prove_patterns(hf, [name])
    assert "\n" not in str(e.value)
    check_values_and_edits(hf)
    plain_falcon = made("falcon", {})
    inner._set_attention(plain_falcon, "sdpa")
    proof.prove_patterns(plain_falcon, [name])


def test_logits_of_a_stream_that_is_halved_behind_the_last_layer_are_refused():
    """RWKV's: an epsilon alone tells them from those of its last stream."""
    hf = made("rwkv", {"rescale_every": 1})
    assert "changes its last stream before the final norm" in hf.retrace_fails["unembed"]
    assert "unembed" not in made("rwkv", {}).retrace_fails


def test_probabilities_of_a_router_that_draws_one_expert_after_another_are_refused():
    hf = made("phimoe", {})
    name = "blocks.0.mlp.hook_expert_weights"
    with pytest.raises(RetraceError, match="draws one expert after another") as e:
        hooks.run_to(hf, TOKENS, [name])
    assert "\n" not in str(e.value)
    check_values_and_edits(hf)


SEVERAL = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": LOCAL * 2,
           "intermediate_size": 48, "activation_sparsity_pattern": [0.0] * 4, "laurel_rank": 8,
           "altup_num_inputs": 2}  # fmt: skip


@pytest.mark.parametrize(("kind", "settings"), [("gemma3n_text", SEVERAL), ("hy_v4", {})])
def test_a_stream_in_several_copies_is_refused(kind, settings):
    hf = made(kind, settings)
    for at in ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post"):
        with pytest.raises(RetraceError, match="where one row per token is stored"):
            hooks.run_to(hf, TOKENS, [f"blocks.0.{at}"])
    name = "blocks.0.mlp.hook_post"
    assert hooks.run_to(hf, TOKENS, [name])[name].shape[:2] == TOKENS.shape


def test_keys_and_values_are_stored_where_the_proof_allows_it():
    """Else circuits compute whole prompts, and the tests above would not see stored ones."""
    for kind, settings, stores in [
        ("llama", {}, True), ("gpt_neo", {"window_size": 32}, True),
        ("gpt_neo", {"window_size": 20}, False), ("bloom", {}, False),
    ]:  # fmt: skip
        hf = made(kind, settings)
        assert not hf.retrace_past_fails
        task = Task.of(hf, Pairs.of(PROMPTS, 0, "cpu"))
        assert bool(task.base.past) == stores, (kind, settings)
