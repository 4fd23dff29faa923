"""A tokenizer as its model met it in pretraining, and its tokens as a reader sees them.

1. `plain` turns off what a tokenizer.json may carry from fine-tuning and what changes ids without a
   word: truncation, padding, BPE dropout (Provilkov et al. 2020, a training-time regulariser).
2. `Texts` gives the text of one token as it stands behind another: a tokenizer of the Llama family
   drops the space of a token that it decodes alone ("▁the" and "the" both give "the").
3. A byte-level token may hold part of a character. In a context the whole character stands at the
   token that completes it; a token alone shows its bytes, as <0xC3>.

`load_tokenizer` reads the tokenizer of a store item; `set_document_token` names its BOS. Joined,
the texts of a context are the text that the tokenizer decodes from all its ids at once.
"""

import codecs
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import RetraceError
from pipeline.spec.sources import ModelSpec

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no character
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # a byte token of SentencePiece's byte fallback
CUT = 3  # bytes of a UTF-8 character behind its first


def _as_bytes(error: UnicodeDecodeError) -> tuple[str, int]:
    """Bytes that are no character, written as SentencePiece writes them."""
    wrong = error.object[error.start : error.end]
    return "".join(f"<0x{b:02X}>" for b in wrong), error.end


codecs.register_error("retrace_bytes", _as_bytes)


def plain(tokenizer: Any) -> Any:
    """The tokenizer, changed in place to encode the whole text, always alike, without padding."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    if getattr(backend.model, "dropout", None):
        backend.model.dropout = None
    return tokenizer


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text, without BOS.

    Raises:
        RetraceError: it holds a character that a tokenizer of characters does not know.
    """
    try:
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    except Exception as e:  # of tokenizers, of no class of its own
        if "Unk token" not in str(e):
            raise
        known = tokenizer.get_vocab()
        unknown = "".join(dict.fromkeys(c for c in text if c not in known))
        raise RetraceError(
            f"text {text[:60]!r}: the tokenizer has no token for {unknown!r}; leave these "
            f"characters out, or make the tokenizer from a text that has them"
        ) from e


def following(tokenizer: Any, before: str, text: str) -> list[int]:
    """Ids of `text` where it follows `before`: what the model is asked to predict there.

    Encoded alone, " cat" is two tokens of a Llama tokenizer, "▁" and "▁cat", but one in a sentence.
    Empty where the two melt together at the border, as "c" + "at" may.
    """
    front, whole = encode(tokenizer, before), encode(tokenizer, before + text)
    return whole[len(front) :] if whole[: len(front)] == front else []


def byte_alphabet() -> dict[str, int]:
    """Character -> byte, of byte-level BPE (Radford et al. 2019, section 2.2).

    A printable byte of Latin-1 is its own character; the others follow, in order, from U+0100 on.
    """
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(0xAE, 0x100)]
    moved = [b for b in range(256) if b not in own]
    return {chr(b): b for b in own} | {chr(256 + i): b for i, b in enumerate(moved)}


class Texts:
    """The text of every token of a tokenizer, alone and in a context.

    Attributes:
        ids: all ids that are tokens, ascending; a model's vocabulary may be padded beyond them.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.ids = sorted(set(tokenizer.get_vocab().values()))
        backend = tokenizer.backend_tokenizer
        names = tokenizer.convert_ids_to_tokens(self.ids)
        found = zip(self.ids, names, _behind_another(backend, self.ids), strict=True)
        alphabet = byte_alphabet()
        self._bytes = {i: _bytes_of(name, text, alphabet) for i, name, text in found}

    def alone(self, id: int) -> str:
        """Text of one token, its space included; bytes that are no character as <0xC3>."""
        return self._bytes.get(id, b"").decode(errors="retrace_bytes")

    def context(self, ids: Sequence[int], before: Sequence[int] = ()) -> list[str]:
        """Text of each of the ids; a character that is cut up stands at its last token.

        Args:
            before: ids that stand before them, which may hold a character's first bytes.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("retrace_bytes")
        parts = [self._bytes.get(int(id), b"") for id in [*before[-CUT:], *ids]]
        texts = [decoder.decode(part, final=i == len(parts)) for i, part in enumerate(parts, 1)]
        return texts[len(parts) - len(ids) :]


def _behind_another(backend: Any, ids: list[int]) -> list[str]:
    """What each token adds to the text where it stands behind another token."""

    def decode(many: list[list[int]]) -> list[str]:
        return backend.decode_batch(many, skip_special_tokens=False)

    alone = decode([[i] for i in ids])
    words = [(i, t) for i, t in zip(ids, alone, strict=True) if t.isalnum()]
    twice = decode([[i, i] for i, _ in words])
    fronts = [w for w, two in zip(words, twice, strict=True) if two.startswith(w[1])]
    if not fronts:
        return alone
    front, front_text = fronts[0]
    pairs = zip(decode([[front, i] for i in ids]), alone, strict=True)
    return [p.removeprefix(front_text) if p.startswith(front_text) else a for p, a in pairs]


def _bytes_of(name: str, text: str, alphabet: dict[str, int]) -> bytes:
    """UTF-8 of a token, of which `text` shows what is whole characters."""
    if REPLACEMENT not in text:
        return text.encode()
    if byte := BYTE.fullmatch(name):
        return bytes([int(byte[1], 16)])
    if all(c in alphabet for c in name):
        return bytes(alphabet[c] for c in name)
    return text.encode()


def checkpoint_of(model_json: str | Path) -> Path:
    """The Hugging Face folder beside model.json."""
    return Path(model_json).parent / "checkpoint"


def load_tokenizer(model_json: str | Path) -> Any:
    """The model's fast tokenizer; torch is not imported."""
    from transformers import PreTrainedTokenizerFast

    folder = checkpoint_of(model_json)
    return plain(PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True))


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer of a folder, as its tokenizer.json has it.

    transformers 5 builds the classes that are named after models anew around the vocabulary, with
    a pre-tokenizer and added tokens of their own: SmolLM2's digits, which its file splits, would be
    joined. Such a class only serves where there is no tokenizer.json.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    whole = (folder / "tokenizer.json").exists()
    try:
        tokenizer = (PreTrainedTokenizerFast if whole else AutoTokenizer).from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as e:  # beside OSError and ValueError what the Rust side raises: Exception
        said = str(e).strip().splitlines()[0]
        raise RetraceError(f"{folder}: no tokenizer that transformers can load ({said})") from e
    if not tokenizer.is_fast:
        raise RetraceError(f"{folder}: has only a slow tokenizer; add its tokenizer.json")
    return plain(tokenizer)


def document_token(tokenizer: Any, spec: ModelSpec) -> int | None:
    """BOS of a model's tokenizer; None where a model trained here has none."""
    if tokenizer is None or (spec.source == "training" and tokenizer.bos_token is None):
        return None
    return set_document_token(tokenizer, spec.path or spec.repo or spec.run or spec.package)


def set_document_token(tokenizer: Any, folder: Any = "") -> int:
    """Make the token that separated documents in pretraining BOS and EOS; return its id.

    That is the one that the tokenizer itself puts before a text (Llama's <s>, OPT's </s>, BERT's
    CLS), else <|endoftext|> where the vocabulary has it (GPT-2, Pythia, SmolLM2, Qwen; chat models
    declare others), else the tokenizer's own BOS, else its EOS, else its CLS, whose segments end
    with SEP (Devlin et al. 2019, section 3.1). A chat template goes on writing the tokens that the
    tokenizer came with.
    """
    known = tokenizer.get_vocab()
    before = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    own = (*before.values(), tokenizer.cls_token)
    for token in (leading(tokenizer), "<|endoftext|>", *own):
        if token in known:
            break
    else:
        raise RetraceError(
            f"{folder}: the tokenizer has neither <|endoftext|> nor a BOS, EOS or CLS"
        )
    tokenizer.bos_token = token
    if tokenizer.eos_token not in known or token == "<|endoftext|>":
        closes = token == tokenizer.cls_token and tokenizer.sep_token in known
        tokenizer.eos_token = tokenizer.sep_token if closes else token
    changed = {k: v or "" for k, v in before.items() if v != getattr(tokenizer, k)}
    tokenizer.chat_template = _with_tokens(tokenizer.chat_template, changed)
    return known[token]


def leading(tokenizer: Any) -> str | None:
    """The token that a tokenizer puts before a text, if it puts one there."""
    backend = tokenizer.backend_tokenizer
    if backend.post_processor is None:
        return None
    seen: set[int] = set()
    for sample in sorted(backend.get_vocab(with_added_tokens=False)):
        plainly = backend.encode(sample, add_special_tokens=False).ids
        if not plainly or plainly[0] in seen:  # of white space a normalizer may leave nothing
            continue
        first = backend.encode(sample, add_special_tokens=True).ids[0]
        if first != plainly[0]:
            return backend.id_to_token(first)
        seen.add(first)
        if len(seen) == 2:  # one alone may be the token itself
            break
    return None


def _with_tokens(template: Any, tokens: dict[str, str]) -> Any:
    """A chat template, or a mapping of them, that names these tokens itself, where it uses them."""
    if isinstance(template, dict):
        return {name: _with_tokens(one, tokens) for name, one in template.items()}
    used = {k: v for k, v in tokens.items() if template and k in template}
    named = "".join(f"{{% set {k} = {json.dumps(v)} +%}}" for k, v in used.items())
    return f"{named}{template}" if named else template
