"""Hand-made tokenizers of every family: what a file carries unseen, and what a reader sees.

The right ids and texts are those of the tokenizers package, on text as a whole.
"""

import json

import pytest
from conftest import byte_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline.text import corpus, tokens
from pipeline.text.tokens import load_tokenizer, tokenizer_of
from pipeline.weights import model

TEXT = "the cat thecat sat; José saw 🎉 in 1234 cafés"


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama's: "▁" for a space, one before the text, bytes for what the vocabulary lacks."""
    words = ["▁the", "the", "▁cat", "▁sat", "▁", *"catshefinJosw1234;"]
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    pieces += [(f"<0x{b:02X}>", -20.0) for b in range(256)]
    pieces += [(w, -1.0 if len(w) > 1 else -4.0) for w in dict.fromkeys(words)]
    made = Tokenizer(models.Unigram(pieces, 0, byte_fallback=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def metaspace() -> PreTrainedTokenizerFast:
    """As Mistral's and T5's newer files: the same by a pre-tokenizer and a decoder of one piece."""
    made = sentencepiece().backend_tokenizer
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always", split=False)
    spaces = decoders.Metaspace("▁", "always")
    made.decoder = decoders.Sequence([decoders.ByteFallback(), spaces, decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


FAMILIES = {"byte-level": byte_tokenizer, "sentencepiece": sentencepiece, "metaspace": metaspace}


def with_settings(folder, **over):
    """A folder with a tokenizer.json whose top level, or `model`, says more; its raw Tokenizer."""
    byte_tokenizer().save_pretrained(folder)
    file = folder / "tokenizer.json"
    made = json.loads(file.read_text(encoding="utf-8"))
    clean = Tokenizer.from_str(json.dumps(made))
    made["model"] |= over.pop("model", {})
    file.write_text(json.dumps(made | over), encoding="utf-8")
    return clean


# --- settings that act unseen --------------------------------------------------------------

CUT = {"max_length": 16, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
FILL = {"strategy": {"Fixed": 128}, "direction": "Right", "pad_id": 3, "pad_type_id": 0,
        "pad_to_multiple_of": None, "pad_token": "<|unused|>"}  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [{"truncation": CUT}, {"padding": FILL}, {"truncation": CUT, "padding": FILL}],
    ids=" ".join,
)
def test_a_document_is_neither_cut_nor_padded(settings, tmp_path):
    clean = with_settings(tmp_path / "checkpoint", **settings)
    raw = Tokenizer.from_file(str(tmp_path / "checkpoint" / "tokenizer.json"))
    texts = ["abc", TEXT * 3]
    want = [clean.encode(t, add_special_tokens=False).ids for t in texts]
    assert [raw.encode(t, add_special_tokens=False).ids for t in texts] != want  # the file does act
    stored = load_tokenizer(tmp_path / "model.json")
    for made in (stored, tokenizer_of(tmp_path / "checkpoint")):
        assert [e.tolist() for e in corpus.encoder(made)(texts)] == want
        made.save_pretrained(tmp_path / "saved")
        saved = json.loads((tmp_path / "saved" / "tokenizer.json").read_text(encoding="utf-8"))
        assert saved["truncation"] is None and saved["padding"] is None


def test_merges_are_not_dropped_at_random(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "tokenizer.json"
    made = json.loads(file.read_text(encoding="utf-8"))
    made["model"] |= {"merges": [["a", "b"]], "dropout": 1.0}
    made["model"]["vocab"]["ab"] = 260
    file.write_text(json.dumps(made), encoding="utf-8")
    encode = corpus.encoder(load_tokenizer(tmp_path / "model.json"))
    assert encode(["abab"])[0].tolist() == [260, 260]


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2Tokenizer", "GPTNeoXTokenizerFast", None])
def test_tokenizer_json_is_the_whole_tokenizer(name, tmp_path):
    """Digits are split, as in SmolLM2's file, whatever class tokenizer_config.json names."""
    digits = {"type": "Digits", "individual_digits": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": True}  # fmt: skip
    split = {"type": "Sequence", "pretokenizers": [digits, level]}
    with_settings(tmp_path, pre_tokenizer=split, model={"merges": []})
    file = tmp_path / "tokenizer.json"
    made = json.loads(file.read_text(encoding="utf-8"))
    made["model"]["merges"] = [["1", "2"]]
    made["model"]["vocab"]["12"] = 260
    file.write_text(json.dumps(made), encoding="utf-8")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": name, "add_prefix_space": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    want = Tokenizer.from_file(str(file)).encode(TEXT, add_special_tokens=False).ids
    assert 260 not in want
    read = tokenizer_of(tmp_path)
    read.save_pretrained(tmp_path / "checkpoint")
    stored = load_tokenizer(tmp_path / "model.json")
    assert [tokens.encode(t, TEXT) for t in (read, stored)] == [want, want]
    assert len(stored) == 261  # no token is added


def test_a_broken_tokenizer_is_one_sentence(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(model.RetraceError, match="no tokenizer that transformers can load"):
        tokenizer_of(tmp_path)


# --- what a reader sees --------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_texts_of_a_context_join_to_the_text(family):
    made = FAMILIES[family]()
    texts, ids = tokens.Texts(made), tokens.encode(made, TEXT)
    shown = texts.context(ids)
    assert "".join(shown).strip() == made.decode(ids).strip() == TEXT
    for start in range(len(ids)):  # a context may begin inside a character
        assert texts.context(ids[start:], ids[:start]) == shown[start:]
    assert made.decode([i for i in ids if texts.alone(i) == " the"]).count("the") == (
        0 if family == "byte-level" else 2
    )


@pytest.mark.parametrize("family", ["sentencepiece", "metaspace"])
def test_a_token_keeps_the_space_before_it(family):
    made = FAMILIES[family]()
    texts, id_of = tokens.Texts(made), made.convert_tokens_to_ids
    seen = {t: texts.alone(id_of(t)) for t in ("▁the", "the", "▁cat", "▁", "<0xC3>", "<0x41>")}
    assert seen == {"▁the": " the", "the": "the", "▁cat": " cat", "▁": " ", "<0xC3>": "<0xC3>",
                    "<0x41>": "A"}  # fmt: skip


def test_bytes_that_are_no_character_are_shown_as_bytes():
    made = byte_tokenizer()
    texts, ids = tokens.Texts(made), tokens.encode(made, "é🎉")
    assert [texts.alone(i) for i in ids[:2]] == ["<0xC3>", "<0xA9>"]
    assert texts.context(ids) == ["", "é", "", "", "", "🎉"]
    assert texts.context(ids[:1]) == ["<0xC3>"]  # the rest does not come
    assert texts.context([ids[0], *tokens.encode(made, "a")]) == ["", "<0xC3>a"]
    assert texts.alone(9999) == "" and texts.ids == list(range(260))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_word_follows_a_prompt_as_it_stands_in_the_text(family):
    made = FAMILIES[family]()
    found = tokens.following(made, "the", " cat")
    assert tokens.encode(made, "the") + found == tokens.encode(made, "the cat")
    assert len(found) == (4 if family == "byte-level" else 1)
