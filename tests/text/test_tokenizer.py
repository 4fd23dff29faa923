"""Tokenizers made from a text: exact inverses, closed vocabularies, and blocks cut with them."""

import json
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, environment, stage

from pipeline.errors import RetraceError
from pipeline.sharing import verify
from pipeline.spec.paper import PaperSpec, parse
from pipeline.spec.sources import TokenizerSpec
from pipeline.store import provenance, tables
from pipeline.text import corpus, tokenizer, tokens
from pipeline.text.tokens import load_tokenizer

TEXT = "First Citizen:\nBefore we proceed,  hear me.\n\nAll:\nSpeak, speak. ' ##a n't\t é 😀\n"


def encode(made, text: str) -> list[int]:
    (ids,) = corpus.encoder(made)([text])
    return ids.tolist()


def test_a_token_for_every_character():
    made = tokenizer.char(["ba", "c\na"])
    assert made.get_vocab() == {"\n": 0, "a": 1, "b": 2, "c": 3}
    assert encode(made, "cab\n\n") == [3, 1, 2, 0, 0]
    assert (made.bos_token_id, made.eos_token_id) == (None, None)


def test_characters_are_numbered_as_in_nanogpt():
    characters = sorted(set(TEXT))
    assert encode(tokenizer.char([TEXT]), TEXT) == [characters.index(c) for c in TEXT]


MADE = {"char": tokenizer.char([TEXT]), "bpe": tokenizer.bpe([TEXT], 300)}


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("text", [TEXT, TEXT * 50, " a", "a ", "  ", "\n", "😀é"])
def test_decoding_undoes_encoding(kind, text, tmp_path):
    MADE[kind].save_pretrained(tmp_path / "checkpoint")
    loaded = load_tokenizer(tmp_path / "model.json")
    for made in (MADE[kind], loaded):
        assert made.decode(encode(made, text)) == text


def test_bytes_outside_the_text_are_tokens_of_bpe():
    assert MADE["bpe"].decode(encode(MADE["bpe"], "Ω≠")) == "Ω≠"


def test_a_character_outside_the_text_is_an_error():
    with pytest.raises(Exception, match="a character that the text does not have"):
        encode(MADE["char"], "Ω")


def test_a_prompt_with_a_character_outside_the_text_is_one_sentence():
    made = tokenizer.char(["ba", "c\na"])
    assert tokens.encode(made, "abc") == [1, 2, 3]
    with pytest.raises(RetraceError, match="text 'aöbü': the tokenizer has no token for 'öü'"):
        tokens.encode(made, "aöbü")


def test_bpe_merges_what_is_frequent_and_ends_at_its_size():
    made = tokenizer.bpe(["the then thaw " * 20], 259)
    vocabulary = made.get_vocab()
    assert len(vocabulary) == 259  # <|endoftext|>, 256 bytes and two merges
    assert vocabulary["<|endoftext|>"] == made.bos_token_id == made.eos_token_id == 0
    assert sorted(vocabulary, key=vocabulary.get)[-2:] in (["th", "Ġth"], ["th", "the"])
    assert encode(made, "<|endoftext|>")[0] != 0  # in a text it is text


@pytest.mark.parametrize(
    "section, said",
    [
        ({"kind": "bpe"}, "kind: bpe needs vocab_size of 257"),
        ({"kind": "bpe", "vocab_size": 256}, "kind: bpe needs vocab_size of 257"),
        ({"kind": "char", "vocab_size": 65}, "kind: char takes its vocabulary from the text"),
        ({"kind": "word"}, "kind: Input should be 'char' or 'bpe'"),
    ],
)
def test_faults_of_a_section(section, said):
    with pytest.raises(RetraceError, match=said):
        parse(TokenizerSpec, section, "paper.yaml")


CARD = {"title": "T", "authors": "A", "year": 2022, "url": "https://example.org", "model": {}}


@pytest.mark.parametrize(
    "corpus_section, said",
    [
        (None, "section tokenizer needs a section corpus"),
        ({}, "corpus.prepend_bos: true needs a special token"),
        ({"prepend_bos": False}, "corpus.close_documents: true needs a special token"),
        ({"prepend_bos": False, "close_documents": False}, None),
    ],
)
def test_characters_have_no_special_token(corpus_section, said):
    card = CARD | {"tokenizer": {"kind": "char"}, "corpus": corpus_section}
    if said is None:
        assert parse(PaperSpec, card, "paper.yaml").tokenizer.kind == "char"
        return
    with pytest.raises(RetraceError, match=said):
        parse(PaperSpec, card, "paper.yaml")


# --- the stage -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def play(tmp_path_factory):
    """A play of 80 speeches in one .txt."""
    file = tmp_path_factory.mktemp("text") / "play.txt"
    file.write_text("".join(f"Citizen {i}:\nSpeak {i * i}!\n\n" for i in range(80)))
    return file


def section(file, **over):
    return {"source": "local", "path": str(file), "whole_file": True, "n_ctx": 16, "n_tokens": 0,
            "n_eval_tokens": 0, "split": "tail", **over}  # fmt: skip


def make(folder, kind, corpus_section):
    spec = {"tokenizer": {"kind": kind, **({"vocab_size": 280} if kind == "bpe" else {})}}
    spec["corpus"] = corpus_section
    stage("tokenizer", spec, out=folder / "model.json", checkpoint=folder / "checkpoint")
    return folder / "model.json"


@pytest.mark.workflow
@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_a_corpus_cut_with_the_tokenizer_of_its_text(kind, play, tmp_path):
    special = kind == "bpe"
    given = section(play, prepend_bos=special, close_documents=special)
    made = make(tmp_path, kind, given)
    info = tables.read_json(made)
    text = play.read_text()
    assert info["bos_id"] == (0 if special else None)
    assert info["d_vocab"] == (280 if special else len(set(text)))
    assert (info["name"], info["kind"]) == (f"{kind}{info['d_vocab']}", kind)
    assert info["text_sha256"] == provenance.sha256_file(play)
    assert verify.faults(made) == []
    files = {"out": tmp_path / "tokens.parquet", "documents": tmp_path / "documents.parquet"}
    stage("corpus", {"corpus": given}, tokenizer=made, **files)
    blocks = pd.read_parquet(files["out"])
    loaded = load_tokenizer(made)
    ids = {s: np.stack(b["tokens"])[:, special:].ravel() for s, b in blocks.groupby("split")}
    train, held_out = (loaded.decode(ids[s]) for s in ("train", "eval"))
    assert train + held_out in text + "<|endoftext|>"
    assert len(train) + len(held_out) > len(text) - 2 * 16 * (20 if special else 1)
    if kind == "char":
        border = int(len(text) * 0.9)
        assert text[:border].endswith(train) and text[border:].startswith(held_out)


@pytest.mark.workflow
def test_two_runs_give_the_same_files(play, tmp_path):
    made = [make(tmp_path / name, "bpe", section(play)) for name in "ab"]
    assert made[0].read_bytes() == made[1].read_bytes()


@pytest.mark.workflow
def test_a_tokenizer_of_another_text_is_told(play, tmp_path):
    given = section(play, prepend_bos=False, close_documents=False)
    made = make(tmp_path / "made", "char", given)
    other = tmp_path / "other.txt"
    other.write_text(play.read_text()[::-1])
    files = {"out": tmp_path / "tokens.parquet", "documents": tmp_path / "documents.parquet"}
    spec = {"corpus": given | {"path": str(other)}}
    done = stage("corpus", spec, check=False, tokenizer=made, **files)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert re.search("made from a text of sha256 .* delete .*, then run again", line)


@pytest.mark.workflow
def test_torch_is_not_imported(play, tmp_path):
    spec = {"tokenizer": {"kind": "char"}, "corpus": section(play)}
    code = (
        "import runpy, sys\n"
        "runpy.run_module('pipeline', run_name='__main__')\n"
        "assert 'torch' not in sys.modules"
    )
    arguments = ["tokenizer", "--spec", json.dumps(spec), "--out", str(tmp_path / "model.json")]
    arguments += ["--checkpoint", str(tmp_path / "checkpoint")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment(), cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
