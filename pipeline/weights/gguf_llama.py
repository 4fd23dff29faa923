"""A Llama model in llama.cpp's GGUF format -> a LlamaForCausalLM and its tokenizer.

1. The metadata give the config; quantised tensors become float32 (`gguf.quants.dequantize`).
2. llama.cpp stores the rows of W_Q and W_K with the two halves of each rotary pair interleaved;
   Hugging Face wants the halves one after the other: per head [d_head/2, 2] -> [2, d_head/2].
3. The byte-level BPE comes out of the metadata's tokens, types and merges; SmolLM2 splits digits
   before bytes.

For SmolLM2-135M-Instruct, Q4_1, weights and logits are equal to the last bit to those of
transformers' own GGUF loader (5.23), whose model cannot be saved again.
"""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from pipeline.errors import RetraceError

CONTROL = 3  # llama.cpp's token type of <|endoftext|> and its like
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def read(path: Path) -> Any:
    """The GGUF file, its metadata as a dict beside it.

    Returns:
        (gguf.GGUFReader, dict of metadata).

    Raises:
        RetraceError: not a GGUF file, or not of the Llama architecture.
    """
    import gguf

    class Reader(gguf.GGUFReader):
        """Slices plain arrays: of a memory map, a hundred thousand slices take seconds."""

        data = property(
            lambda self: self.__dict__["data"],
            lambda self, mapped: self.__dict__.__setitem__("data", np.asarray(mapped)),
        )

        def _get(self, offset: int, *args: Any, **named: Any) -> Any:
            """Behind the file's end: a damaged length would be counted to its end."""
            if offset >= len(self.data):
                raise ValueError(f"it ends at byte {len(self.data)}")
            return super()._get(offset, *args, **named)

    try:
        reader = Reader(path)
        info = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, OSError, LookupError) as e:
        raise RetraceError(f"{path}: not a readable GGUF file ({e}); fetch it again") from e
    kind = info.get("general.architecture")
    if kind != "llama":
        raise RetraceError(f"{path}: GGUF of architecture '{kind}'; only llama can be converted")
    return reader, info


def config(reader: Any, info: dict[str, Any]) -> Any:
    """The LlamaConfig that the metadata describe; embeddings are tied where `output` is absent."""
    from transformers import LlamaConfig

    get = lambda key: info[f"llama.{key}"]  # noqa: E731
    d_model, n_heads = get("embedding_length"), get("attention.head_count")
    return LlamaConfig(
        vocab_size=len(info["tokenizer.ggml.tokens"]),
        hidden_size=d_model,
        intermediate_size=get("feed_forward_length"),
        num_hidden_layers=get("block_count"),
        num_attention_heads=n_heads,
        num_key_value_heads=get("attention.head_count_kv"),
        head_dim=info.get("llama.attention.key_length", d_model // n_heads),
        max_position_embeddings=get("context_length"),
        rms_norm_eps=float(f"{get('attention.layer_norm_rms_epsilon'):.6g}"),  # stored as float32
        rope_parameters={"rope_type": "default", "rope_theta": float(get("rope.freq_base"))},
        tie_word_embeddings=all(t.name != "output.weight" for t in reader.tensors),
    )


def hf_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight."""
    parts = name.split(".")
    try:
        if parts[0] == "blk":
            return f"model.layers.{int(parts[1])}.{LAYER[parts[2]]}.{parts[3]}"
        return f"{TOP[parts[0]]}.{parts[1]}"
    except (KeyError, IndexError, ValueError):
        raise RetraceError(f"GGUF tensor '{name}': a Llama model has none of that name") from None


def undo_interleaving(
    w: Shaped[np.ndarray, "rows d_model"], n_heads: int
) -> Shaped[np.ndarray, "rows d_model"]:
    """Rows of W_Q or W_K from llama.cpp's order of rotary pairs to Hugging Face's.

    Args:
        w: n_heads * d_head rows (pair 0 first, pair 0 second, pair 1 first, …).

    Returns:
        The same shape, rows of a head (all firsts, all seconds).
    """
    pairs = w.reshape(n_heads, -1, 2, *w.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(w.shape)


def weights(reader: Any, cfg: Any) -> dict[str, np.ndarray]:
    """Hugging Face name -> float32 array of every tensor."""
    from gguf import quants

    heads = {"attn_q": cfg.num_attention_heads, "attn_k": cfg.num_key_value_heads}
    out = {}
    for tensor in reader.tensors:
        w = quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        kind = tensor.name.split(".")[-2]
        out[hf_name(tensor.name)] = undo_interleaving(w, heads[kind]) if kind in heads else w
    return out


def tokenizer(info: dict[str, Any]) -> Any:
    """The byte-level BPE as a transformers fast tokenizer."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, types = info["tokenizer.ggml.tokens"], info["tokenizer.ggml.token_type"]
    split = info.get("tokenizer.ggml.pre")
    if info.get("tokenizer.ggml.model") != "gpt2" or split not in ("smollm", "gpt-2"):
        raise RetraceError(f"GGUF tokenizer '{split}': only smollm and gpt-2 BPEs can be converted")
    merges = [tuple(m.split(" ")) for m in info.get("tokenizer.ggml.merges", [])]
    bpe = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    digits = [pre_tokenizers.Digits(individual_digits=True)] if split == "smollm" else []
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*digits, bytes_])
    bpe.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    bpe.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, clean_up_tokenization_spaces=False,
        chat_template=info.get("tokenizer.chat_template"),
    )  # fmt: skip


def load(path: Path) -> tuple[Any, Any, dict[str, Any]]:
    """LlamaForCausalLM in float32, tokenizer, metadata of a GGUF file."""
    import torch
    from transformers import LlamaForCausalLM

    reader, info = read(path)
    cfg = config(reader, info)
    model = LlamaForCausalLM(cfg)
    state = {name: torch.from_numpy(np.array(w)) for name, w in weights(reader, cfg).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = {"lm_head.weight"} if cfg.tie_word_embeddings else set()
    if set(missing) - tied or unexpected:
        raise RetraceError(f"{path}: tensors missing {missing} or unexpected {unexpected}")
    model.tie_weights()
    return model, tokenizer(info), info
