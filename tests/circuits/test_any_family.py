"""Types and settings that test_circuits_families.py does not name: exact, or refused in a sentence.

Each case goes through the same checks against plain hooked passes. What is refused is refused by
the model's own proof, before anything is computed on it.
"""

import families_check as check
import pytest
import test_circuits_families as exact
import torch

from pipeline.errors import RetraceError
from pipeline.families import tiny_models
from pipeline.models import hooks, proof, splice
from pipeline.models.pairs import Pairs, Task
from pipeline.models.taps import OF_EDGES, OF_NODES

DYNAMIC = {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 4.0}
LONG = {"rope_theta": 10000.0, "rope_type": "longrope", "original_max_position_embeddings": 4,
        "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}  # fmt: skip
# Of these something was once wrong: gains, missing biases, tensors changed in place, MLPs that
# count dimensions, positions behind the context, and a cache of another class.
FOUND = [
    ("nemotron", {}), ("mpt", {}), ("mixtral", {}), ("olmoe", {"clip_qkv": 0.1}),
    ("opt", {"layer_norm_elementwise_affine": False}), ("gpt_oss", {}),
    ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 4}),
]  # fmt: skip
SETTINGS = [
    ("llama", {"tie_word_embeddings": True}), ("llama", {"head_dim": 16}),
    ("llama", {"attention_bias": True, "mlp_bias": True}), ("llama", {"num_key_value_heads": 1}),
    ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 4}),
    ("mistral", {"sliding_window": 3}), ("mixtral", {"sliding_window": 3}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0}),
    ("gemma2", {"final_logit_softcapping": None, "query_pre_attn_scalar": 5}),
    ("gpt_neox", {"rotary_pct": 1.0, "attention_bias": False}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False}),
    ("gpt_neo", {"window_size": 3}), ("gptj", {"tie_word_embeddings": True}),
    ("opt", {"_remove_final_layer_norm": True}), ("opt", {"enable_bias": False}),
    ("falcon", {"alibi": True}), ("falcon", {"bias": True}), ("phi", {"qk_layernorm": True}),
    ("stablelm", {"qk_layernorm": True, "use_qkv_bias": True}), ("olmo", {"clip_qkv": 0.1}),
    ("mpt", {"attn_config": {"qk_ln": True}}), ("cohere", {"use_qk_norm": True}),
    ("cohere2", {"sliding_window": 3}), ("granite", {"attention_multiplier": 0.7}),
    ("starcoder2", {"sliding_window": 3, "use_bias": False}), ("gpt_oss", {"sliding_window": 3}),
    ("exaone4", {"sliding_window": 3, "sliding_window_pattern": 2}), ("xglm", {}), ("arcee", {}),
    ("qwen3_moe", {"mlp_only_layers": [0]}), ("smollm3", {"no_rope_layers": [0, 1]}),
    ("qwen3", {"attention_bias": True, "head_dim": 16}), ("seed_oss", {"mlp_bias": True}),
]  # fmt: skip
TYPES = [("glm", {}), ("glm4", {}), ("glm4_moe", {}), ("codegen", {}), ("qwen2_moe", {}),
         ("ernie4_5_moe", {}), ("granitemoe", {}), ("flex_olmo", {}), ("minimax_m2", {}),
         ("apertus", {}), ("hunyuan_v1_dense", {}), ("olmo3", {}), ("ministral3", {}),
         ("vaultgemma", {}), ("internlm3", {}), ("bitnet", {}), ("llama4_text", {})]  # fmt: skip
# What the proof says: which part of a model it could not reproduce.
REFUSED = [
    ("opt", {"do_layer_norm_before": False}, "has no heads here"),  # OPT-350m: norms behind
    ("opt", {"word_embed_proj_dim": 16}, "unembedding of its last stream"),
    ("mpt", {"logit_scale": 2.0}, "unembedding of its last stream"),
    ("bloom", {"apply_residual_connection_post_layernorm": True}, "has no heads here"),
    ("deepseek_v3", {}, "has no attn.hook_q"),
    ("lfm2", {}, "has no attn.hook_z"),
    ("falcon_h1", {}, "has no hook_attn_out"),
]


def made(kind: str, settings: dict) -> torch.nn.Module:
    config = tiny_models.tiny_config(kind, **settings)
    hf = tiny_models.tiny_model(tiny_models.with_architecture(config))
    proof.prove(hf)
    return hf


def cases() -> list:
    """FOUND in every run, the others among the slow tests."""
    some = [(case, []) for case in FOUND] + [(c, [pytest.mark.slow]) for c in SETTINGS + TYPES]
    return [pytest.param(*c, marks=m, id=f"{c[0]} {' '.join(c[1])}".strip()) for c, m in some]


@pytest.mark.parametrize(("kind", "settings"), cases())
def test_circuits_are_those_of_whole_passes(kind, settings):
    with torch.no_grad():
        hf = made(kind, settings)
        assert hf.retrace_refused == {} and hf.retrace_fails == {}
        task = Task.of(hf, Pairs.of(exact.PROMPTS, 0, "cpu"), OF_NODES + OF_EDGES)
        exact.test_the_metric_is_that_of_the_logits(task)
        exact.test_patched_nodes_are_whole_forward_passes(task, "")
        exact.test_patched_nodes_are_whole_forward_passes(task, "name")
        exact.test_patched_queries_keys_and_values_are_whole_forward_passes(task)
        exact.test_estimates_are_slopes_of_whole_forward_passes(task)
        # clipped between attn.hook_v and what the pattern is multiplied with; BitNet norms z
        if "clip_qkv" in settings or kind == "bitnet":
            with pytest.raises(RetraceError, match=r"is not attn\.hook_z"):
                proof.prove_patterns(hf, ["blocks.0.attn.hook_pattern"])
        elif kind == "xglm":  # forms its pattern between two products, outside of any module
            with pytest.raises(RetraceError, match="never runs in a forward pass"):
                proof.prove_patterns(hf, ["blocks.0.attn.hook_pattern"])
        else:
            exact.test_patched_patterns_are_whole_forward_passes(task, "")
        exact.test_direct_logits_sum_to_the_metric(task)
        exact.test_an_edge_into_an_mlp_is_a_whole_forward_pass(task)
        exact.test_edges_with_gradients_are_complete(task)
        exact.test_a_graph_without_edges_of_a_part_is_the_model_with_it_patched(task)


@pytest.mark.parametrize(("kind", "settings", "says"), REFUSED)
def test_what_has_no_linear_reading_is_refused_in_a_sentence(kind, settings, says):
    with torch.no_grad():
        hf = made(kind, settings)
        with pytest.raises(RetraceError, match=says) as e:
            Task.of(hf, Pairs.of(exact.PROMPTS, 0, "cpu"))
        assert "\n" not in str(e.value)
        hook = "blocks.1.hook_resid_pre"  # what it has all the same
        x = hooks.run_to(hf, check.TOKENS, [hook])[hook]
        logits = hf(input_ids=check.TOKENS, use_cache=False).logits
        torch.testing.assert_close(splice.resume(hf, hook, check.TOKENS, x), logits)


@pytest.mark.parametrize("kind", ["afmoe", "laguna"])
def test_edges_are_refused_where_a_gate_reads_the_stream(kind):
    with torch.no_grad():
        hf = made(kind, {})
        task = Task.of(hf, Pairs.of(exact.PROMPTS, 0, "cpu"))
        exact.test_patched_nodes_are_whole_forward_passes(task, "name")
        for of_edges in (
            exact.test_edges_with_gradients_are_complete,
            exact.test_a_graph_without_edges_of_a_part_is_the_model_with_it_patched,
        ):
            with pytest.raises(RetraceError, match="more of the stream than queries, keys and val"):
                of_edges(task)


def test_the_table_of_families_names_what_is_tested_here():
    names = {kind for kind, _ in FOUND + SETTINGS + TYPES}
    assert set(check.ALSO) <= names
    assert {kind for kind, _ in check.TESTED} >= names - {"stablelm", "falcon"}
