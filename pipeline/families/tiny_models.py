"""A random model of a few thousand weights of any type that transformers has. [torch]

For the table of families, and for tests that hold it in numbers: sizes are set under every name
that a config has for them, and all biases and gains are drawn, so that none is neutral.
"""

from typing import Any

import torch
from torch import nn

# Sizes of a model of a few thousand weights, under every name that a config has for them.
TINY = {
    "vocab_size": 40, "initializer_range": 0.3, "init_std": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "lru_width",
                     "attention_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads",
                     "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
                     "mamba_n_heads", "mamba_num_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_experts_per_tok", "moe_topk",
                     "moe_k", "linear_num_key_heads", "index_n_heads"), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "query_pre_attn_scalar", "qk_nope_head_dim",
                     "v_head_dim", "linear_key_head_dim", "linear_value_head_dim", "state_size",
                     "mamba_d_state", "ssm_state_size", "hidden_size_per_layer_input",
                     "index_head_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 32),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank",
                     "kv_lora_rank", "mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("rotary_dim", "qk_rope_head_dim", "mamba_dt_rank", "time_step_rank",
                     "chunk_size", "mamba_chunk_size", "index_topk"), 4),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_groups", "n_groups", "mamba_n_groups",
                     "first_k_dense_replace", "num_dense_layers"), 1),
    "mamba_d_ssm": 64, "mamba_expand": 2, "n_shared_experts": 1, "qk_head_dim": 12,
    "vocab_size_per_layer_input": 40,
}  # fmt: skip
# What a type needs beside that.
ALSO = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "falcon": {"num_kv_heads": 4},  # without new_decoder_architecture it must be that of queries
    "granite": {"residual_multiplier": 0.25, "logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "granitemoe": {"residual_multiplier": 0.25, "logits_scaling": 4.0},
    # a layer of each kind, where layers differ
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "residual_multiplier": 0.25},
    **{
        kind: {"layer_types": ["linear_attention", "full_attention"]}
        for kind in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid")
    },
}


def tiny_config(kind: str, **changes: Any) -> Any:
    """A transformers config of a type, with small sizes and what else is given."""
    from transformers import AutoConfig

    known = AutoConfig.for_model(kind).to_dict()
    sizes = {k: v for k, v in TINY.items() if k in known}
    if "kv_lora_rank" in known:  # multi-head latent attention: no shared keys
        sizes |= {"num_key_value_heads": 4, "head_dim": 4}
    return AutoConfig.for_model(kind, **sizes | ALSO.get(kind, {}) | changes)


def tiny_model(config: Any, seed: int = 0) -> nn.Module:
    """A random causal LM of a config; biases and gains are drawn, too, so that none is neutral."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    hf = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, p in hf.named_parameters():
            if p.dim() == 1 and name.endswith(("weight", "bias")):
                p.add_(torch.randn_like(p) * 0.1)
    return hf.eval().requires_grad_(False)


def with_architecture(config: Any) -> Any:
    """The config, with the name of the class that AutoModelForCausalLM makes of it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]
    config.architectures = list(names) if isinstance(names, list | tuple) else [names]
    return config
