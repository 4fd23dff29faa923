"""A config.yaml of circuit-tracer that lists its layers' files, as mwhanna/gemma-scope-transcoders'
does: of other repositories, each at a commit, and beside it."""

import shutil
from pathlib import Path

import published
import pytest
import torch
import yaml
from loopback_hub import COMMIT, serving
from published import D, bring_layers, brought_layers, layers_of
from pydantic import ValidationError
from test_imported_from_hub import PAIRS
from test_transcoders_import import said

from pipeline.errors import RetraceError
from pipeline.spec.imports import Entry, ImportedLayers, entries_of
from pipeline.store import tables

X = 3 * torch.randn(50, 2, D, generator=torch.Generator().manual_seed(3))
CLOSE = {"rtol": 1e-5, "atol": 1e-4}
SCOPE = "google/gemma-scope-2b-pt-transcoders"
ONE = f"hf://{SCOPE}/layer_0/width_16k/average_l0_76/params.npz"
OTHER = f"hf://mwhanna/qwen3-4b-transcoders/layer_1.safetensors?revision={COMMIT}"


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """The folder of a repository in the hub's cache, at a commit."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def at(repo: str, commit: str = COMMIT) -> Path:
        folder = tmp_path / "hub" / f"models--{repo.replace('/', '--')}/snapshots" / commit
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    return at


def scope(folder: Path, w: dict, layer: int = 0) -> None:
    """A transcoder of Gemma Scope of a layer."""
    other = {k: w[k] for k in ("W_dec", "b_enc", "b_dec", "threshold")} | {"W_enc": w["W_enc"].T}
    at = folder / f"layer_{layer}/width_16k/average_l0_76"
    published.gemma_scope(at, published.lengths(**other))


def both(cached) -> list[dict]:
    """Layer 0 in one repository, in Gemma Scope's format, layer 1 in another."""
    found = layers_of()
    scope(cached(SCOPE), found[0])
    published.transcoder_set(cached("mwhanna/qwen3-4b-transcoders"), found)
    return found


def listing(folder: Path, *entries: str, **config) -> Path:
    # feature_input_hook: behind a LayerNorm's gain, and so what the MLP of GPT-2 reads
    about = {"feature_input_hook": "ln2.hook_normalized", "transcoders": list(entries)}
    return published.about_set(folder, "transcoder_set", **about | config)


def test_layers_of_two_repositories(cached, tiny_gpt2_json, tmp_path):
    found = both(cached)
    folder = listing(tmp_path / "set", ONE, OTHER)
    manifest = bring_layers(tiny_gpt2_json, tmp_path / "item", [folder], revisions={SCOPE: COMMIT})
    ours = brought_layers(manifest)
    torch.testing.assert_close(ours.forward(X), said(found, "jumprelu", False), **CLOSE)
    origin = tables.read_json(manifest)["original"]
    assert set(origin["files"]) == {
        "config.yaml", f"{SCOPE}/layer_0/width_16k/average_l0_76/params.npz",
        "mwhanna/qwen3-4b-transcoders/layer_1.safetensors",
    }  # fmt: skip
    assert {r: about["revision"] for r, about in origin["listed"].items()} == {
        SCOPE: COMMIT, "mwhanna/qwen3-4b-transcoders": COMMIT
    }  # fmt: skip
    assert origin["hook_name"] == "blocks.0.ln2.hook_normalized"


def test_files_beside_it(tiny_gpt2_json, tmp_path):
    found = layers_of(skip=True)
    folder = published.transcoder_set(tmp_path / "set", found)
    for n in range(2):
        (folder / f"layer_{n}.safetensors").rename(folder / f"{'ab'[n]}.safetensors")
    listing(folder, "a.safetensors", "b.safetensors")
    ours = brought_layers(bring_layers(tiny_gpt2_json, tmp_path / "item", [folder]))
    torch.testing.assert_close(ours.forward(X), said(found, "jumprelu", False), **CLOSE)


def test_a_cross_layer_transcoder_of_gemma_scope_2(cached, tiny_gpt2_json, tmp_path):
    """As mwhanna/gemma-scope-2-*/clt lists the files of google/gemma-scope-2-*."""
    from test_gemma_scope_2 import JumpReLUMultiLayerSAE, written

    repo = "google/gemma-scope-2-1b-pt"
    clt = written(tmp_path / "clt", "clt", skip=True)
    shutil.copytree(clt, cached(repo) / "clt/w")
    entries = [f"hf://{repo}/clt/w/params_layer_{n}.safetensors" for n in range(2)]
    folder = listing(tmp_path / "set", *entries, model_kind="cross_layer_transcoder",
                     feature_input_hook="mlp.hook_in")  # fmt: skip
    manifest = bring_layers(tiny_gpt2_json, tmp_path / "item", [folder], layers="cross",
                            revisions={repo: COMMIT})  # fmt: skip
    theirs = JumpReLUMultiLayerSAE(clt).forward(X)
    torch.testing.assert_close(brought_layers(manifest).forward(X), theirs, **CLOSE)


BAD = {  # what is wrong -> entries, more of the section, the sentence
    "a commit that is not pinned": ([ONE, OTHER], {}, f"lists params.npz of {SCOPE} at its newest "
                                    f"commit, which can move; add revisions: {{{SCOPE}:"),
    "two commits": ([ONE, OTHER], {"revisions": {SCOPE: COMMIT,
                                                 "mwhanna/qwen3-4b-transcoders": "d" * 40}},
                    "at cccccccccccc, and revisions at dddddddddddd"),
    "a layer too few": ([ONE], {"revisions": {SCOPE: COMMIT}},
                        "lists 1 transcoders, and layers 0 to 1 are asked for"),
    "a layer too many": ([ONE, OTHER, OTHER], {"revisions": {SCOPE: COMMIT}},
                         "lists 3 transcoders, and layers 0 to 1"),
    "a file that is not there": ([ONE, "layer_1.safetensors"], {"revisions": {SCOPE: COMMIT}},
                                 "layer_1.safetensors: is not there, and"),
    "a damaged file": ([ONE, "layer_1.safetensors"], {"revisions": {SCOPE: COMMIT}},
                       "layer_1.safetensors: cannot be read"),
    "layers in another order": (["layer_1.safetensors", ONE], {"revisions": {SCOPE: COMMIT}},
                                "was made for blocks.0."),
    "another way to fetch": (["https://a/b", ONE], {}, "'https://a/b' is no hf://owner/name/file"),
    "a file outside": (["../layer_0.safetensors", ONE], {}, "leads out of the package"),
    "no list": (["{}"], {"raw": "layer_0"}, "transcoders is no list of files"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_list_that_cannot_be_is_one_sentence(what, cached, tiny_gpt2_json, tmp_path, capsys):
    entries, over, sentence = BAD[what]
    over, found = dict(over), both(cached)
    raw = {"transcoders": over.pop("raw")} if "raw" in over else {}
    folder = listing(tmp_path / "set", *entries, **raw)
    if what == "a damaged file":
        (folder / "layer_1.safetensors").write_bytes(b"short")
    if what == "layers in another order":
        published.transcoder_set(tmp_path / "more", found)
        shutil.copy(tmp_path / "more/layer_1.safetensors", folder)
    with pytest.raises(SystemExit):
        bring_layers(tiny_gpt2_json, tmp_path / "item", [folder], **over)
    (line,) = [s for s in capsys.readouterr().err.splitlines() if s.startswith("error")]
    assert sentence in line and "full trace" not in line
    assert not (tmp_path / "item/manifest.json").exists()


def test_what_an_entry_says(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"transcoders": [ONE, OTHER, "a/b.safetensors"]}))
    assert entries_of(config) == [
        Entry(SCOPE, "layer_0/width_16k/average_l0_76/params.npz", ""),
        Entry("mwhanna/qwen3-4b-transcoders", "layer_1.safetensors", COMMIT),
        Entry("", "a/b.safetensors", ""),
    ]  # fmt: skip
    config.write_text("model_kind: transcoder_set\n")
    assert entries_of(config) == []
    config.write_text("transcoders: [hf://a]\n")
    with pytest.raises(RetraceError, match="'hf://a' is no hf://owner/name/file"):
        entries_of(config)


def test_revisions_are_full_commits_of_a_set():
    hub = {"source": "hub", "format": "circuit_tracer", "layers": "each", "repo": "a/b",
           "revision": COMMIT}  # fmt: skip
    assert ImportedLayers(**hub, revisions={SCOPE: COMMIT}).revisions == {SCOPE: COMMIT}
    with pytest.raises(ValidationError, match="is not a full commit"):
        ImportedLayers(**hub, revisions={SCOPE: "main"})
    other = hub | {"format": "sparsify", "path": "{layer}"}
    with pytest.raises(ValidationError, match="revisions: is for format circuit_tracer alone"):
        ImportedLayers(**other, revisions={SCOPE: COMMIT})
    assert "revisions" not in ImportedLayers(**hub).model_dump()


@pytest.mark.workflow
def test_a_list_of_a_hub(tiny_gpt2_json, tmp_path, monkeypatch):
    """Three repositories, one of them with the list alone, downloaded once each."""
    from conftest import stage

    found = layers_of()
    scope(tmp_path / "g", found[0])
    published.transcoder_set(tmp_path / "m", found)
    listing(tmp_path / "l", ONE, OTHER)
    inner = "layer_0/width_16k/average_l0_76/params.npz"
    repos = {
        "mwhanna/list": {"config.yaml": (tmp_path / "l/config.yaml").read_bytes()},
        SCOPE: {inner: (tmp_path / "g" / inner).read_bytes()},
        "mwhanna/qwen3-4b-transcoders": {
            "layer_1.safetensors": (tmp_path / "m/layer_1.safetensors").read_bytes()
        },
    }
    job = {"name": "x", "source": "hub", "format": "circuit_tracer", "layers": "each",
           "paths": ["."], "pairs": PAIRS, "repo": "mwhanna/list", "revision": COMMIT,
           "revisions": {SCOPE: COMMIT}}  # fmt: skip
    out = {"out": tmp_path / "item/manifest.json", "saes": tmp_path / "item/saes"}
    with serving(repos, tmp_path / "hf", monkeypatch) as hub:
        stage("transcoders_import", {"import": job}, cwd=tmp_path, model=tiny_gpt2_json, **out)
        assert len(hub.asked) == len(set(hub.asked)) >= 3
    ours = brought_layers(out["out"])
    torch.testing.assert_close(ours.forward(X), said(found, "jumprelu", False), **CLOSE)
