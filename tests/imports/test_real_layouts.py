"""Files as publishers have them, beside the tidy ones of the other tests: configurations of real
repositories of the hub, keys of old releases, and files that a download leaves damaged."""

import json
from pathlib import Path

import numpy as np
import published
import pytest
import torch
from published import CODER, IN, OUT, RESID, D, K, N, Z, bring, brought, draw, refused
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from pipeline.errors import RetraceError
from pipeline.imports import saelens
from pipeline.spec.imports import ImportSpec
from pipeline.store import tables

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
X = torch.randn(64, D, generator=torch.Generator().manual_seed(3)) * 2
RELU = {k: v for k, v in draw().items() if k != "threshold"}


@pytest.fixture
def model(tiny_gpt2_json) -> Path:
    return tiny_gpt2_json


def of_saelens_3(folder: Path, more: dict | None = None, **config) -> Path:
    """As SAELens 3 wrote it; the keys of jbloom/GPT2-Small-SAEs-Reformatted."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(published.lengths(**RELU | (more or {})), folder / "sae_weights.safetensors")
    about = {
        "model_name": "gpt2-small", "hook_point": RESID, "hook_point_layer": 1,
        "hook_point_head_index": None, "dataset_path": "Skylion007/openwebtext",
        "context_size": 128, "d_in": D, "d_sae": N, "device": "mps", "dtype": "torch.float32",
        "l1_coefficient": 8e-05, "prepend_bos": True, "use_ghost_grads": False,
    }  # fmt: skip
    published.write_json(folder / "cfg.json", about | config)
    return folder


def test_a_folder_of_saelens_3(model, tmp_path):
    manifest = bring(model, tmp_path / "item", of_saelens_3(tmp_path / "s"), "saelens")
    f = torch.relu((X - RELU["b_dec"]) @ RELU["W_enc"] + RELU["b_enc"])
    torch.testing.assert_close(brought(manifest).encode(X), f, **CLOSE)
    said = tables.read_json(manifest)["original"]
    assert said["hook_name"] == RESID and said["context_size"] == 128 and said["prepend_bos"]


@pytest.mark.parametrize(
    ("more", "config"),
    [({"scaling_factor": torch.ones(N)}, {}), ({}, {"normalize_activations": False}),
     ({}, {"hook_point": "blocks.{layer}.hook_resid_post"})],
    ids=["a scaling_factor of ones", "normalized: false", "a layer of its own"],
)  # fmt: skip
def test_keys_of_saelens_3_that_change_nothing(more, config, model, tmp_path):
    plain = bring(model, tmp_path / "a", of_saelens_3(tmp_path / "s"), "saelens")
    other = bring(model, tmp_path / "b", of_saelens_3(tmp_path / "t", more, **config), "saelens")
    assert torch.equal(brought(plain).encode(X), brought(other).encode(X))
    assert tables.read_json(other)["original"]["hook_name"] == RESID


@pytest.mark.parametrize(
    ("path", "over"),
    [("model.layers.1", {}), ("transformer.h.1", {}), ("model.layers.1.mlp", {"hook": OUT}),
     ("gpt_neox.layers.1.attention", {"hook": "blocks.1.hook_attn_out"})],
)  # fmt: skip
def test_a_hook_that_is_a_module_of_transformers(path, over, model, tmp_path, capsys):
    """SAELens's runner takes AutoModelForCausalLM, too; bew/qwen2.5-lmsys-fft-sae is of such."""
    folder = published.saelens(tmp_path / "s", meta={"hook_name": path})
    said = tables.read_json(bring(model, tmp_path / "item", folder, "saelens", **over))["original"]
    assert said["hook_name"] == over.get("hook", RESID) and not said["notes"]
    other = published.saelens(tmp_path / "t", meta={"hook_name": path.replace("1", "0")})
    line = refused(capsys, model, tmp_path / "other", other, "saelens", **over)
    assert "was made for blocks.0." in line


def test_a_module_that_is_not_known_is_noted(model, tmp_path):
    meta = {"hook_name": "model.layers.1.input_layernorm"}
    folder = published.saelens(tmp_path / "s", meta=meta)
    said = tables.read_json(bring(model, tmp_path / "item", folder, "saelens"))["original"]
    assert said["notes"] == ["reads model.layers.1.input_layernorm, for which no hook is known "
                             "here: compare it with yours"]  # fmt: skip


def test_gemma_scope_in_lower_case(model, tmp_path):
    """SAELens's reader (gemma_2) takes w_enc for W_enc, and a scaling_factor of ones for none."""
    (tmp_path / "g").mkdir()
    found = {k.replace("W_", "w_"): v.numpy() for k, v in draw().items()}
    np.savez(tmp_path / "g/params.npz", scaling_factor=np.ones(N, np.float32), **found)
    lower = brought(bring(model, tmp_path / "a", tmp_path / "g", "gemma_scope"))
    upper = published.gemma_scope(tmp_path / "h")
    upper = brought(bring(model, tmp_path / "b", upper, "gemma_scope"))
    assert torch.equal(lower.encode(X), upper.encode(X)) and (upper.encode(X) > 0).any()


def test_tensors_of_torch_compile(model, tmp_path):
    folder = published.dictionary_learning(tmp_path / "t", "BatchTopKSAE")
    plain = brought(bring(model, tmp_path / "a", folder, "dictionary_learning"))
    state = torch.load(folder / "ae.pt", weights_only=True)
    torch.save({f"_orig_mod.{k}": v for k, v in state.items()}, folder / "ae.pt")
    other = brought(bring(model, tmp_path / "b", folder, "dictionary_learning"))
    assert torch.equal(plain.encode(X), other.encode(X))


def test_an_embedding_of_gemma_scope(model, tmp_path):
    """It reads embeddings before Gemma's factor sqrt(d_model), and hook_embed shows them behind."""
    w, at = draw(), tmp_path / "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6"
    manifest = bring(model, tmp_path / "item", published.gemma_scope(at), "gemma_scope",
                     hook="hook_embed")  # fmt: skip
    ours, x = brought(manifest), X / D**0.5
    h = x @ w["W_enc"] + w["b_enc"]
    f = torch.relu(h) * (h > w["threshold"])
    assert (f > 0).any() and (f == 0).any()
    torch.testing.assert_close(ours.encode(X), f, **CLOSE)
    x_hat = (f @ w["W_dec"] + w["b_dec"]) * D**0.5
    torch.testing.assert_close(ours(X), x_hat, rtol=1e-5, atol=1e-5 * float(x_hat.abs().max()))


def test_a_folder_of_embeddings_is_no_embedding(model, tmp_path):
    at = tmp_path / "embedding/mine/layer_1/width_16k/average_l0_5"
    manifest = bring(model, tmp_path / "item", published.gemma_scope(at), "gemma_scope")
    assert torch.equal(brought(manifest).W_enc, draw()["W_enc"])


@pytest.mark.parametrize(
    ("names", "over"),
    [("resid_post_all/layer_1_width_16k_l0_big", {}), ("attn_out/layer_1_width_16k_l0_big",
                                                       {"hook": Z}),
     ("mlp_out/layer_1_width_65k_l0_small", {"hook": OUT}),
     ("transcoder_all/layer_1_width_16k_l0_big", CODER)],
)  # fmt: skip
def test_gemma_scope_2_without_a_configuration(names, over, model, tmp_path, capsys):
    """Some folders have none; SAELens reads the names then (_infer_gemma_3_raw_cfg_dict)."""

    def named(names: str) -> Path:
        folder = published.gemma_scope_2(tmp_path / names)
        (folder / "config.json").unlink()
        return folder

    said = tables.read_json(
        bring(model, tmp_path / "item", named(names), "gemma_scope_2", **over)
    )["original"]  # fmt: skip
    assert said["hook_name"] == over.get("hook", RESID)
    other = named(names.replace("layer_1", "layer_0"))
    line = refused(capsys, model, tmp_path / "other", other, "gemma_scope_2", **over)
    assert "was made for blocks.0." in line


def test_a_hookpoint_of_sparsify_that_is_not_known_is_noted(model, tmp_path):
    at = published.sparsify(tmp_path / "layers.1.post_attention_layernorm")
    manifest = bring(model, tmp_path / "item", at, "sparsify")
    (note,) = tables.read_json(manifest)["original"]["notes"]
    assert "reads layers.1.post_attention_layernorm, for which no hook is known here" in note


@pytest.mark.parametrize("d_norm", [False, True])
def test_a_transcoder_of_llama_scope(d_norm, model, tmp_path, capsys):
    """fnlp/Llama3_1-8B-Base-LXTC-*: Language-Model-SAEs scales what it reads and what it writes
    to sqrt(d), by the mean norm of each hook (normalize_activations, compute_norm_factor)."""
    w, s, t = draw(), D**0.5 / 2.5, D**0.5 / 8.0
    path = published.llama_scope(
        tmp_path / "L1TC", w, hook_point_in=IN, hook_point_out=OUT, jump_relu_threshold=0.4,
        dataset_average_activation_norm={"in": 2.5, "out": 8.0},
        sparsity_include_decoder_norm=d_norm,
    )  # fmt: skip
    manifest = bring(model, tmp_path / "item", path, "llama_scope", **CODER)
    ours, h = brought(manifest), X * s @ w["W_enc"] + w["b_enc"]
    scores = h * (w["W_dec"].norm(dim=1) if d_norm else 1)
    f = h * (scores > 0.4 * s)
    assert (f > 0).any() and (f == 0).any()
    torch.testing.assert_close(ours.encode(X), f, rtol=1e-5, atol=3e-5)
    y = (f @ w["W_dec"] + w["b_dec"]) / t
    torch.testing.assert_close(ours(X), y, rtol=1e-5, atol=1e-5 * float(y.abs().max()))
    said = refused(capsys, model, tmp_path / "other", path, "llama_scope", hook=IN)
    assert "is a transcoder; name its output_hook" in said


# --- EleutherAI/skip-transcoder-Llama-3.2-1B-131k, layers.5.mlp/cfg.json --------------------

SKIP_TRANSCODER = {"expansion_factor": 32, "normalize_decoder": True, "num_latents": N, "k": K,
                   "multi_topk": False, "skip_connection": True, "d_in": D}  # fmt: skip


def of_sparsify(folder: Path, w: dict, about: dict) -> Path:
    published.sparsify(folder, w)
    (folder / "cfg.json").write_text(json.dumps(about))
    return folder


def test_a_skip_transcoder_that_does_not_say_that_it_is_one(model, tmp_path):
    """Of before `transcode` was a key: the library takes b_dec off x (SparseCoder.encode)."""
    folders = []
    for layer in range(2):
        w = draw(layer) | {"W_skip": torch.randn(D, D, generator=torch.Generator().manual_seed(8))}
        folders.append(of_sparsify(tmp_path / f"layers.{layer}.mlp", w, SKIP_TRANSCODER))
    manifest = published.bring_layers(model, tmp_path / "item", folders, "sparsify")
    ours, x = published.brought_layers(manifest), X[:, None].expand(-1, 2, -1)
    for layer in range(2):
        w = draw(layer)
        h = torch.relu((X - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
        f = h * (h >= h.topk(K).values[:, -1:])
        torch.testing.assert_close(ours.encode(layer, X), f, rtol=1e-5, atol=3e-5)
        skip = load_file(folders[layer] / "sae.safetensors")["W_skip"]
        y = f @ w["W_dec"] + w["b_dec"] + X @ skip.T
        size = float(y.abs().max())
        torch.testing.assert_close(ours.forward(x)[:, layer], y, rtol=1e-5, atol=1e-5 * size)


def test_an_old_coder_of_an_mlp_is_what_paper_yaml_says(model, tmp_path):
    """Without transcode and W_skip nothing tells the two apart: autoencoder, or transcoder."""
    about = {k: v for k, v in SKIP_TRANSCODER.items() if k != "skip_connection"}
    folder = of_sparsify(tmp_path / "layers.1.mlp", draw(), about)
    coder = tables.read_json(bring(model, tmp_path / "a", folder, "sparsify", **CODER))
    auto = tables.read_json(bring(model, tmp_path / "b", folder, "sparsify", hook=OUT))
    assert (coder["hook"], coder["output_hook"]) == (IN, OUT)
    assert auto["hook"] == auto["original"]["hook_name"] == OUT


# --- SAELens's list ------------------------------------------------------------------------


def test_what_the_list_sets_is_not_left_out():
    """mistral-7b-res-wg: its folders say nothing of a norm, and the list does."""
    with pytest.raises(RetraceError, match="sets normalize_activations: constant_norm_rescale"):
        saelens.listed("mistral-7b-res-wg", "blocks.8.hook_resid_pre")
    overs = [about.get("config_overrides") or {} for about in saelens._list().values()]
    assert {key for over in overs for key in over} - set(saelens.ABOUT) == {"normalize_activations"}


# --- damaged, in one sentence --------------------------------------------------------------


def holding(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 302000000\n"
PAGE = "<!DOCTYPE html><html>Access to this model is restricted</html>"


def saved(path: Path, **tensors: torch.Tensor) -> Path:
    """A file of weights with other tensors than it had."""
    match path.suffix:
        case ".npz":
            with np.load(path) as found:
                kept = {k: found[k] for k in found.files}
            np.savez(path, **kept | {k: v.numpy() for k, v in tensors.items()})
        case ".safetensors":
            save_file(published.lengths(**load_file(path) | tensors), path)
        case _:
            torch.save(torch.load(path, weights_only=True) | tensors, path)
    return path.parent


def written(path: Path, **values) -> Path:
    """The folder of a JSON file that was given other values."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return path.parent


def learnt(at: Path, dict_class: str, **tensors: torch.Tensor) -> Path:
    return saved(published.dictionary_learning(at, dict_class) / "ae.pt", **tensors)


def module(path: Path) -> Path:
    torch.save(torch.nn.Linear(2, 2), path)
    return path


def flat(name: str) -> torch.Tensor:
    return draw()[name].reshape(-1)


DAMAGED = {  # what is wrong -> the files, the format that is said, the sentence
    "a pointer of Git LFS": (
        lambda at: holding(published.gemma_scope(at) / "params.npz", POINTER).parent, "gemma_scope",
        "params.npz: is a pointer of Git LFS and not the weights; run git lfs pull",
    ),
    "a page": (
        lambda at: holding(published.dictionary_learning(at) / "ae.pt", PAGE).parent,
        "dictionary_learning", "ae.pt: is no file of torch's, but begins with b'<!DOCTYP'",
    ),
    "safetensors under another name": (
        lambda at: published.sparsify(at).joinpath("sae.safetensors").rename(at / "1.pt"), "openai",
        "1.pt: is no file of torch's",
    ),
    "a module": (
        lambda at: module(published.openai(at / "1.pt")),
        "openai", "would run pickled code (torch.nn.modules.linear.Linear), and only tensors",
    ),
    "NaN of SAELens": (
        lambda at: of_saelens_3(at, {"b_enc": torch.full((N,), torch.nan)}), "saelens",
        "'b_enc' holds no finite numbers",
    ),
    "whole numbers of SAELens": (
        lambda at: of_saelens_3(at, {"W_enc": torch.ones(D, N, dtype=torch.int8)}), "saelens",
        "'W_enc' holds no finite numbers",
    ),
    "SAELens's, on its side": (
        lambda at: of_saelens_3(at, {"W_dec": RELU["W_dec"].T}), "saelens",
        "SAELens cannot read it (size mismatch for W_dec",
    ),
    "a weight of another class": (
        lambda at: of_saelens_3(at, {"r_mag": torch.ones(N)}), "saelens",
        'SAELens cannot read it (Unexpected key(s) in state_dict: "r_mag")',
    ),
    "a scaling_factor": (
        lambda at: of_saelens_3(at, {"scaling_factor": torch.full((N,), 2.0)}), "saelens",
        "its scaling_factor is not 1",
    ),
    "SAELens 3's TopK without k": (
        lambda at: of_saelens_3(at, activation_fn_str="topk"), "saelens", "cfg.json: has no k",
    ),
    "no matrix in .npz": (
        lambda at: saved(published.gemma_scope(at) / "params.npz", W_enc=flat("W_enc")),
        "gemma_scope", "'W_enc' is (640,), and a matrix is wanted",
    ),
    "no matrix in Gemma Scope 2": (
        lambda at: saved(published.gemma_scope_2(at) / "params.safetensors", w_dec=flat("W_dec")),
        "gemma_scope_2", "W_dec is (640,), and a matrix is wanted",
    ),
    "a layer too many": (
        lambda at: saved(published.sparsify(at) / "sae.safetensors", W_dec=draw()["W_dec"][None]),
        "sparsify", "'W_dec' is (1, 40, 16), and a matrix is wanted",
    ),
    "Llama Scope of two sizes": (
        lambda at: saved(
            published.llama_scope(at, sparsity_include_decoder_norm=True)
            / "checkpoints/final.safetensors", **{"decoder.weight": torch.ones(D, N - 1)}
        ).parent,
        "llama_scope", "decoder, encoder bias and decoder bias are [(16, 39), (40,), (16,)] beside",
    ),
    "AutoEncoder of two sizes": (
        lambda at: learnt(at, "AutoEncoder", **{"encoder.bias": torch.ones(N - 1)}),
        "dictionary_learning", "[(16, 40), (39,), (16,)] beside an encoder of (40, 16)",
    ),
    "a whitening": (
        lambda at: published.saelens(at, normalize_activations="covariance_whitening"), "saelens",
        "covariance_whitening needs what its folder does not hold",
    ),
    "a factor of matching pursuit": (
        lambda at: published.saelens(at, "matching_pursuit", max_iterations=K,
                                     normalize_activations="expected_average_only_in"),
        "saelens", "of matching pursuit, whose latents are chosen by W_dec itself",
    ),
    "k of SAELens that is text": (
        lambda at: written(published.saelens(at, "topk", k=K) / "cfg.json", k="32"), "saelens",
        "k is '32', and not a whole number above 0",
    ),
    "k of SAELens below zero": (
        lambda at: written(published.saelens(at, "topk", k=K) / "cfg.json", k=-1), "saelens",
        "k is -1, and not a whole number above 0",
    ),
    "b_dec, or not": (
        lambda at: written(published.saelens(at) / "cfg.json", apply_b_dec_to_input="no"),
        "saelens", "apply_b_dec_to_input is 'no', and true or false is meant",
    ),
    "a hook that is a number": (
        lambda at: written(published.saelens(at) / "cfg.json",
                           metadata={"hook_name": 8, "sae_lens_version": "6.0.0"}), "saelens",
        "reads 8, which is no hook",
    ),
    "a class that is a list": (
        lambda at: published.dictionary_learning(at, named=["a"]), "dictionary_learning",
        "dict_class is no name",
    ),
    "another sparsify's configuration": (
        lambda at: published.sparsify(at, num_latents=64), "sparsify",
        "cfg.json: says num_latents 64, and the weights have 40",
    ),
    "another trainer's configuration": (
        lambda at: published.dictionary_learning(at, activation_dim=512), "dictionary_learning",
        "config.json: says activation_dim 512, and the weights have 16",
    ),
    "another Llama Scope's configuration": (
        lambda at: published.llama_scope(at, d_sae=32768), "llama_scope",
        "hyperparams.json: says d_sae 32768, and the weights have 40",
    ),
    "a bias that is a number": (
        lambda at: saved(published.sparsify(at) / "sae.safetensors",
                         **{"encoder.bias": torch.tensor(0.0)}), "sparsify",
        "'encoder.bias' is (), and a row is wanted",
    ),
    "k of another run": (
        lambda at: published.dictionary_learning(at, "AutoEncoderTopK", k=K + 1),
        "dictionary_learning", "holds k 5, and config.json says 6; the two are of different runs",
    ),
    "k that is text": (
        lambda at: learnt(at, "AutoEncoderTopK", k="many"), "dictionary_learning",
        "its k is 'many', and no number above 0",
    ),
    "groups of another size": (
        lambda at: learnt(at, "MatryoshkaBatchTopKSAE", group_sizes=torch.tensor([N // 4])),
        "dictionary_learning", "group_sizes sum to 10, and it has 40 latents",
    ),
}  # fmt: skip


def test_a_factor_that_would_do_nothing_is_told(model, tmp_path, capsys):
    """Where the files scale no rows; a format that never does is told by the section."""
    folder = published.saelens(tmp_path / "s")
    said = refused(capsys, model, tmp_path / "item", folder, "saelens", norm_scaling_factor=0.37)
    assert "scales no rows, and norm_scaling_factor says 0.37; remove it" in said
    with pytest.raises(ValidationError, match="format gemma_scope scales no rows; remove it"):
        ImportSpec(source="folder", format="gemma_scope", path="x", norm_scaling_factor=0.37)


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_an_activation_that_tensors_deny(activation, model, tmp_path, capsys):
    w = draw() if activation == "relu" else RELU
    file = tmp_path / "layer_1.safetensors"
    published.circuit_tracer(file, w, activation=activation)
    said = refused(capsys, model, tmp_path / "item", file, "circuit_tracer", **CODER)
    assert f"by its tensors, and config.yaml says {activation}" in said


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_file_is_told_by_its_cause(what, model, tmp_path, capsys):
    make, format, sentence = DAMAGED[what]
    said = refused(capsys, model, tmp_path / "item", make(tmp_path / "at"), format)
    assert sentence in said
    assert not (tmp_path / "item/manifest.json").exists()
