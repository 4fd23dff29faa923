"""What cannot be brought in is refused in one sentence; SAELens's list; the section itself."""

import pickle
from pathlib import Path

import numpy as np
import published
import pytest
import torch
from published import CODER, IN, OUT, RESID, D, N, bring, draw, refused
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from synthetic import call

from pipeline.errors import RetraceError
from pipeline.imports import saelens
from pipeline.spec.imports import ImportSpec, listing
from pipeline.store import tables

COMMIT = "a" * 40


@pytest.fixture
def model(tiny_gpt2_json) -> Path:
    return tiny_gpt2_json


# --- refused, in one sentence and before any forward pass ----------------------------------


@pytest.fixture
def no_pass(monkeypatch):
    """No module of the model may run."""
    from transformers import GPT2LMHeadModel

    def ran(*_, **__):
        raise AssertionError("a forward pass")

    monkeypatch.setattr(GPT2LMHeadModel, "forward", ran)


def shortened(path: Path, part: float = 0.6) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    return path


def pickled(path: Path) -> Path:
    """A pickle of more than tensors: a plain class of the standard library."""
    path.write_bytes(pickle.dumps({"encoder.weight": Path("any")}))
    return path


def without(path: Path, name: str) -> Path:
    """A safetensors or .npz file, less one tensor."""
    if path.suffix == ".npz":
        with np.load(path) as found:
            kept = {k: found[k] for k in found.files if k != name}
        np.savez(path, **kept)
    else:
        save_file({k: v for k, v in load_file(path).items() if k != name}, path)
    return path


def less_b_dec(w: dict) -> dict:
    return w | {"b_dec": w["b_dec"][:-1]}


NORMS = ("layer_norm", "constant_norm_rescale", "expected_average_only_in")
BAD = {  # what is wrong -> the files, the format that is said, more of the section, the sentence
    "another format": (published.gemma_scope, "sparsify", {}, "is not there, and format sparsify"),
    "another layout": (
        lambda at: published.sparsify(at).joinpath("sae.safetensors").rename(
            at / "params.safetensors"
        ).parent,
        "gemma_scope_2", {}, "holds no tensor 'w_enc' of format gemma_scope_2, but W_dec, b_dec",
    ),
    "another configuration": (
        lambda at: published.saelens(at).joinpath("sae_weights.safetensors").rename(
            at / "sae.safetensors"
        ).parent,
        "sparsify", {}, "holds no tensor 'encoder.weight' of format sparsify",
    ),
    "a cut .npz": (lambda at: shortened(published.gemma_scope(at) / "params.npz").parent,
                   "gemma_scope", {}, "params.npz: cannot be read"),
    "a cut .safetensors": (lambda at: shortened(published.sparsify(at) / "sae.safetensors").parent,
                           "sparsify", {}, "sae.safetensors: cannot be read"),
    "a cut .pt": (lambda at: shortened(published.dictionary_learning(at) / "ae.pt").parent,
                  "dictionary_learning", {}, "ae.pt: cannot be read"),
    "a cut cfg.json": (lambda at: shortened(published.saelens(at) / "cfg.json").parent,
                       "saelens", {}, "cfg.json: not readable JSON"),
    "SAELens's, cut": (
        lambda at: shortened(published.saelens(at) / "sae_weights.safetensors").parent,
        "saelens", {}, "sae_weights.safetensors: cannot be read",
    ),
    "a pickle": (lambda at: pickled(published.openai(at / "1.pt")), "openai", {},
                 "would run pickled code"),
    "pickled ae.pt": (lambda at: pickled(published.dictionary_learning(at) / "ae.pt").parent,
                      "dictionary_learning", {}, "would run pickled code"),
    "no decoder": (lambda at: without(published.sparsify(at) / "sae.safetensors", "W_dec").parent,
                   "sparsify", {}, "holds no tensor 'W_dec' (a decoder)"),
    "no decoder in .npz": (lambda at: without(published.gemma_scope(at) / "params.npz", "W_dec")
                           .parent, "gemma_scope", {}, "holds no tensor 'W_dec' (a decoder)"),
    "SAELens's, no decoder": (
        lambda at: without(published.saelens(at) / "sae_weights.safetensors", "W_dec").parent,
        "saelens", {}, "holds no W_dec (a decoder)",
    ),
    "another width": (lambda at: published.gemma_scope(at, draw(d_in=24, d_out=24)), "gemma_scope",
                      {}, "reads rows of 24, and the model's blocks.1.hook_resid_post has 16"),
    "shapes that do not fit": (lambda at: published.gemma_scope(at, less_b_dec(draw())),
                               "gemma_scope", {}, "b_dec is (15,)"),
    "no numbers": (
        lambda at: published.gemma_scope(at, draw() | {"b_enc": torch.full((N,), torch.nan)}),
        "gemma_scope", {}, "'b_enc' holds no finite numbers",
    ),
    "another hook": (lambda at: published.sparsify(at / "layers.0"), "sparsify", {},
                     "was made for blocks.0.hook_resid_post, and hook says blocks.1"),
    "a hook that is none": (published.gemma_scope, "gemma_scope",
                            {"hook": "blocks.7.hook_resid_post"}, "the model has 2 layers"),
    "a transcoder as a dictionary": (
        lambda at: published.sparsify(at / "h.1.mlp", transcode=True), "sparsify", {"hook": IN},
        "is a transcoder; name its output_hook",
    ),
    "a dictionary as a transcoder": (published.sparsify, "sparsify", CODER,
                                     "is an autoencoder, which writes what it reads"),
    "another output hook": (
        lambda at: published.circuit_tracer(at / "layer_1.safetensors",
                                            feature_output_hook="hook_attn_out"),
        "circuit_tracer", CODER, "was made for blocks.1.hook_attn_out, and output_hook says",
    ),
    "a transcoder of two widths": (
        lambda at: published.gemma_scope(at, draw(d_out=24)), "gemma_scope", {},
        "name its output_hook",
    ),
    "cross-layer": (
        lambda at: published.circuit_tracer(at / "W_enc_1.safetensors", model_kind="cross_layer"),
        "circuit_tracer", CODER, "cross-layer transcoder",
    ),
    "a skip connection": (
        lambda at: published.sparsify(at / "h.1.mlp", draw() | {"W_skip": torch.ones(D, D)},
                                      transcode=True),
        "sparsify", CODER, "has a skip connection 'W_skip'",
    ),
    "SAELens's skip connection": (
        lambda at: published.saelens(at, "skip_transcoder",
                                     meta={"hook_name": IN, "hook_name_out": OUT}),
        "saelens", CODER, "has a skip connection 'W_skip'",
    ),
    "circuit-tracer's skip connection": (
        lambda at: published.circuit_tracer(at / "layer_1.safetensors",
                                            draw() | {"W_skip": torch.ones(D, D)}),
        "circuit_tracer", CODER, "has a skip connection 'W_skip'",
    ),
    "Gemma Scope 2's skip connection": (
        lambda at: published.gemma_scope_2(at, draw() | {"affine_skip_connection":
                                                         torch.ones(D, D)}),
        "gemma_scope_2", {}, "has a skip connection 'affine_skip_connection'",
    ),
    **{norm: (lambda at, norm=norm: published.saelens(at, normalize_activations=norm), "saelens",
              {}, f"normalize_activations: {norm}") for norm in NORMS},
    "OpenAI's TopK": (lambda at: published.openai(at / "1.pt", "TopK"), "openai", {},
                      "layer-normed one by one"),
    "groupmax": (lambda at: published.sparsify(at, activation="groupmax"), "sparsify", {},
                 "activation groupmax is none of SAELens's"),
    "signed TopK": (lambda at: published.sparsify(at, signed=True), "sparsify", {},
                    "activation signed topk"),
    "another class": (
        lambda at: published.dictionary_learning(at, named="IdentityDict"),
        "dictionary_learning", {}, "dict_class 'IdentityDict' is not read",
    ),
    "another sha256": (published.gemma_scope, "gemma_scope", {"sha256": "0" * 64},
                       "but the spec pins 000"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused(what, model, tmp_path, capsys, no_pass):
    make, format, over, sentence = BAD[what]
    said = refused(capsys, model, tmp_path / "item", make(tmp_path / "at"), format, **over)
    assert sentence in said
    assert not (tmp_path / "item/manifest.json").exists()


def test_the_hook_of_a_layer_norm_is_what_the_mlp_reads(model, tmp_path):
    """ln2.hook_normalized lies behind gain and bias of GPT-2's norm, as mlp.hook_in does."""
    file = published.circuit_tracer(
        tmp_path / "layer_1.safetensors", feature_input_hook="ln2.hook_normalized"
    )
    manifest = bring(model, tmp_path / "item", file, "circuit_tracer", **CODER)
    said = tables.read_json(manifest)
    assert said["hook"] == IN and said["original"]["hook_name"] == "blocks.1.ln2.hook_normalized"


def test_in_an_rms_norm_it_lies_before_the_gain(tiny_model_json, tmp_path, capsys):
    w = {k: v for k, v in draw(d_in=32, d_out=32).items() if k != "threshold"}
    file = published.circuit_tracer(
        tmp_path / "layer_1.safetensors", w, feature_input_hook="ln2.hook_normalized"
    )
    said = refused(capsys, tiny_model_json, tmp_path / "item", file, "circuit_tracer", **CODER)
    assert "lies before the norm's gain" in said


# --- SAELens's list ------------------------------------------------------------------------


def test_the_list_of_saelens_says_where_and_in_which_format():
    found = saelens.listed("gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_82")
    assert found.repo == "google/gemma-scope-2b-pt-res" and found.format == "gemma_scope"
    assert found.path == "layer_12/width_16k/average_l0_82" and not found.factor
    assert saelens.listed("gpt2-small-res-jb", "blocks.8.hook_resid_pre").format == "saelens"
    llama = saelens.listed("llama_scope_lxr_8x", "l12r_8x")
    assert llama.format == "llama_scope" and llama.factor > 0


@pytest.mark.parametrize(
    ("release", "id", "sentence"),
    [("gpt2-small-res-jp", "a", "did you mean 'gpt2-small-res-jb'"),
     ("gpt2-small-res-jb", "blocks.8.hook_resid_prr", "did you mean 'blocks.8.hook_resid_pre'")],
)  # fmt: skip
def test_what_the_list_does_not_hold(release, id, sentence):
    with pytest.raises(RetraceError, match=sentence):
        saelens.listed(release, id)


def test_every_release_of_the_list_is_read_or_refused_by_name():
    """Two of SAELens's readers have no counterpart here; they are refused before any download."""
    refused = {}
    for release, about in saelens._list().items():
        try:
            saelens.listed(release, str(about["saes"][0]["id"]))
        except RetraceError as e:
            refused[release] = str(e).split(": ", 1)[1]
    assert set(refused) == {
        "mistral-7b-res-wg", "temporal-sae-gemma-2-2b", "temporal-sae-llama-3.1-8b",
        "mntss-gemma-2-2b-2.5m-clt-as-per-layer",
    }  # fmt: skip
    assert "a latent of a token depends on the tokens before" in refused["temporal-sae-gemma-2-2b"]
    assert "layers: cross" in refused["mntss-gemma-2-2b-2.5m-clt-as-per-layer"]


def test_every_entry_of_the_list_has_files_of_its_format():
    """Of all paths of the list: the file of weights has a suffix that is read."""
    from pipeline.imports.sae_import import FORMATS

    for release, about in saelens._list().items():
        format = saelens.CONVERSIONS.get(about.get("conversion_func"))
        if format is None:
            continue
        assert format in FORMATS, release
        for entry in about["saes"]:
            weights, *_ = listing(format, str(entry["path"]))
            assert weights.endswith((".safetensors", ".npz", ".pt", ".pth")), (release, weights)


def test_a_repository_of_the_hub_gives_what_the_format_needs(model, tmp_path, monkeypatch):
    """The hub's cache holds the commit; an optional file comes where it is there."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    commit = tmp_path / "hub/models--jbloom--GPT2-Small-SAEs-Reformatted/snapshots" / COMMIT
    published.saelens(commit / "blocks.8.hook_resid_pre", meta={"hook_name": RESID})
    job = {"name": "x", "hook": RESID, "revision": COMMIT}
    hub = {"source": "hub", "format": "saelens", "path": "blocks.8.hook_resid_pre",
           "repo": "jbloom/GPT2-Small-SAEs-Reformatted"}  # fmt: skip
    of_list = {"source": "saelens", "release": "gpt2-small-res-jb", "id": "blocks.8.hook_resid_pre"}
    for name, source in {"hub": hub, "list": of_list}.items():
        out = tmp_path / name
        call("sae_import", {"import": job | source}, model=model, out=out / "manifest.json",
             saes=out / "saes")  # fmt: skip
        said = tables.read_json(out / "manifest.json")["original"]
        assert said["repo"] == hub["repo"] and said["revision"] == COMMIT
        assert said["format"] == "saelens" and set(said["files"]) == {
            "cfg.json", "sae_weights.safetensors"
        }  # fmt: skip


# --- the section ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "sentence"),
    [({"source": "folder"}, "source: folder needs format, path (one of saelens, gemma_scope"),
     ({"source": "hub", "format": "saelens", "repo": "a/b", "path": "x"}, "not a full commit"),
     ({"source": "saelens", "release": "a", "id": "b", "revision": "main"}, "not a full commit"),
     ({"source": "saelens", "release": "a", "id": "b", "revision": COMMIT, "repo": "c/d"},
      "source: saelens takes no repo"),
     ({"source": "hub", "format": "openai", "repo": "a/b", "path": "../x", "revision": COMMIT},
      "leads out"),
     ({"source": "package", "format": "sparsify", "package": "a==1", "path": "x",
       "sha256": "0" * 64}, "has cfg.json beside its weights"),
     ({"source": "folder", "format": "gemma", "path": "x"}, "Input should be"),
     ({"source": "folder", "format": "openai", "path": "x", "d_sae": 3}, "unknown key 'd_sae'")],
)  # fmt: skip
def test_a_section_that_cannot_be(section, sentence):
    with pytest.raises(ValidationError) as e:
        ImportSpec(**section)
    assert sentence in str(e.value)


@pytest.mark.parametrize(
    ("format", "path", "weights", "beside"),
    [("sparsify", "a/layers.3", "a/layers.3/sae.safetensors", ["a/layers.3/cfg.json"]),
     ("sparsify", "/a/sae.safetensors", "/a/sae.safetensors", ["/a/cfg.json"]),
     ("llama_scope", "L1R", "L1R/checkpoints/final.safetensors", ["L1R/hyperparams.json"]),
     ("gemma_scope", "layer_1/average_l0_5/params.npz", "layer_1/average_l0_5/params.npz", []),
     ("openai", "8.pt", "8.pt", [])],
)  # fmt: skip
def test_the_files_of_a_format(format, path, weights, beside):
    assert listing(format, path)[:2] == (weights, beside)
