"""Settings of formats that change what a dictionary does: folded as the original library has them,
or refused in one sentence; never left out."""

import json
import shutil
from pathlib import Path

import numpy as np
import published
import pytest
import torch
from conftest import rewrite
from published import CODER, IN, RESID, D, K, N, bring, brought, draw, refused
from safetensors.torch import load_file, save_file

from pipeline.store import tables

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
X = torch.randn(64, D, generator=torch.Generator().manual_seed(3)) * 2


@pytest.fixture
def model(tiny_gpt2_json) -> Path:
    return tiny_gpt2_json


def changed(path: Path, change) -> Path:
    """A file of weights with other tensors; `change` takes and gives a dictionary."""
    match path.suffix:
        case ".npz":
            with np.load(path) as found:
                np.savez(path, **change({k: found[k] for k in found.files}))
        case ".safetensors":
            tensors = {k: v.contiguous() for k, v in change(load_file(path)).items()}
            save_file(tensors, path)
        case _:
            torch.save(change(torch.load(path, weights_only=True)), path)
    return path


def one_more(path: Path, name: str = "gate") -> Path:
    """A file with one more tensor of numbers."""
    more = np.ones(N, np.float32) if path.suffix == ".npz" else torch.ones(N)
    return changed(path, lambda t: t | {name: more})


def written(path: Path, **values) -> Path:
    """A JSON file with other values; None takes one away."""
    data = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))
    return path


# --- Llama Scope: Language-Model-SAEs at f0058a58 (SparseAutoEncoder.from_config, encode) ---


def of_llama_scope(w: dict, x: torch.Tensor, d_norm: bool, shift: bool) -> tuple:
    """Latents and reconstruction by their steps: biases standardised, decoder rows of length 1."""
    s = D**0.5 / 2.5
    b_enc, b_dec, W_enc, W_dec = w["b_enc"] / s, w["b_dec"] / s, w["W_enc"], w["W_dec"]
    if d_norm:
        norm = W_dec.norm(dim=1)
        W_dec, W_enc, b_enc = W_dec / norm[:, None], W_enc * norm, b_enc * norm
    h = (x - b_dec * shift) @ W_enc + b_enc
    f = torch.where(h > 0.4, h, 0)
    return f, f @ W_dec + b_dec


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("d_norm", [False, True])
def test_llama_scope_with_its_decoder_norms(d_norm, shift, model, tmp_path):
    """The same latents are active, and x_hat is the same; f is that of SAELens, on scaled rows."""
    w = draw()
    path = published.llama_scope(
        tmp_path / "L1R", w, act_fn="jumprelu", norm_activation="dataset-wise",
        sparsity_include_decoder_norm=d_norm, apply_decoder_bias_to_pre_encoder=shift,
    )  # fmt: skip
    ours = brought(bring(model, tmp_path / "item", path, "llama_scope"))
    f, x_hat = of_llama_scope(w, X, d_norm, shift)
    plain, _ = of_llama_scope(w, X, False, shift)
    assert ((f > 0) != (plain > 0)).any() == d_norm  # the setting decides
    per_f = w["W_dec"].norm(dim=1) if d_norm else torch.ones(N)
    torch.testing.assert_close(ours.encode(X), f / per_f * D**0.5 / 2.5, **CLOSE)
    size = float(x_hat.abs().max())
    torch.testing.assert_close(ours(X), x_hat, rtol=1e-5, atol=1e-5 * size)


def test_llama_scope_that_is_folded_already_is_not_scaled(model, tmp_path):
    w = draw()
    path = published.llama_scope(tmp_path / "L1R", w, norm_activation="inference")
    ours = brought(bring(model, tmp_path / "item", path, "llama_scope"))
    h = X @ w["W_enc"] + w["b_enc"]
    torch.testing.assert_close(ours.encode(X), torch.where(h > 0.4, h, 0), **CLOSE)


# --- BatchTopKSAE with a normalizer (science-of-finetuning at 173f7fa) ----------------------


@pytest.mark.parametrize("known", [True, False])
def test_a_normalizer_is_folded(known, model, tmp_path):
    """x -> (x - mean) scale, and back; where mean and deviation are NaN there is none."""
    mean, scale = torch.linspace(-1, 1, D), 0.3
    nothing = torch.full((D,), torch.nan)
    more = {
        "target_rms": torch.tensor(1.0), "activation_mean": mean if known else nothing,
        "activation_std": torch.ones(D) if known else nothing,
        "activation_global_scale": torch.tensor(scale if known else torch.nan),
    }  # fmt: skip
    folder = published.dictionary_learning(tmp_path / "t", "BatchTopKSAE")
    changed(folder / "ae.pt", lambda t: t | more)
    ours = brought(bring(model, tmp_path / "item", folder, "dictionary_learning"))
    w = draw()
    x = (X - mean) * scale if known else X
    f = torch.relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    f = f * (f > 0.7)
    assert (f > 0).any() and (f == 0).any()
    x_hat = f @ w["W_dec"] + w["b_dec"]
    x_hat = x_hat / scale + mean if known else x_hat
    torch.testing.assert_close(ours.encode(X), f, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(ours(X), x_hat, rtol=1e-5, atol=1e-5 * float(x_hat.abs().max()))


# --- half precision, and tied weights ------------------------------------------------------


def halved(dtype: torch.dtype):
    def change(found: dict) -> dict:
        return {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
                for k, v in found.items()}  # fmt: skip

    return change


HALVES = {  # format -> the files, weights within the folder, more of the section
    "saelens": (published.saelens, "sae_weights.safetensors", {}),
    "gemma_scope_2": (published.gemma_scope_2, "params.safetensors", {}),
    "sparsify": (published.sparsify, "sae.safetensors", {}),
    "dictionary_learning": (published.dictionary_learning, "ae.pt", {}),
    "openai": (lambda at: published.openai(at / "1.pt"), "", {}),
    "circuit_tracer": (lambda at: published.circuit_tracer(at / "layer_1.safetensors"), "", CODER),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", HALVES)
def test_half_precision_is_read_as_float32(format, dtype, model, tmp_path):
    make, inside, over = HALVES[format]
    path = make(tmp_path / "at")
    changed(path / inside if inside else path, halved(dtype))
    manifest = bring(model, tmp_path / "item", path, format, **over)
    ours, W_enc = brought(manifest), draw()["W_enc"]
    assert ours.W_enc.dtype == torch.float32
    torch.testing.assert_close(ours.W_enc, W_enc.to(dtype).float(), rtol=0, atol=0)


def test_half_precision_of_numpy(model, tmp_path):
    folder = published.gemma_scope(tmp_path / "g")
    changed(folder / "params.npz", lambda t: {k: v.astype(np.float16) for k, v in t.items()})
    ours = brought(bring(model, tmp_path / "item", folder, "gemma_scope"))
    assert torch.equal(ours.W_enc, draw()["W_enc"].half().float())


def test_a_tied_autoencoder_of_openai(model, tmp_path):
    """Autoencoder(tied=True).state_dict() holds the encoder twice, and no decoder.weight."""
    file, w = published.openai(tmp_path / "1.pt"), draw()

    def tied(found: dict) -> dict:
        left = {k: v for k, v in found.items() if k != "decoder.weight"}
        return left | {"decoder.linear.weight": found["encoder.weight"]}

    ours = brought(bring(model, tmp_path / "item", changed(file, tied), "openai"))
    f = torch.relu((X - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    torch.testing.assert_close(ours(X), f @ w["W_enc"].T + w["b_dec"], rtol=1e-5, atol=1e-3)


# --- Gemma Scope says in its names where it reads -------------------------------------------


def test_gemma_scopes_folder_names_its_layer(model, tmp_path, capsys):
    at = tmp_path / "gemma-scope-2b-pt-mlp/layer_0/width_16k/average_l0_5"
    said = refused(
        capsys, model, tmp_path / "item", published.gemma_scope(at), "gemma_scope", hook=RESID
    )
    assert "was made for blocks.0.hook_mlp_out, and hook says blocks.1.hook_resid_post" in said
    right = {"hook": "blocks.0.hook_mlp_out"}
    said = tables.read_json(bring(model, tmp_path / "item", at, "gemma_scope", **right))
    assert said["original"]["hook_name"] == right["hook"]


def test_a_gemma_scope_transcoder_reads_before_the_gain(tiny_model_json, tmp_path, capsys):
    """2408.05147: it was trained just after the norm, whose gain had been folded away."""
    w, at = draw(d_in=32, d_out=32), tmp_path / "layer_1/width_16k/average_l0_5"
    path = published.gemma_scope(at, w)
    said = refused(capsys, tiny_model_json, tmp_path / "item", path, "gemma_scope", **CODER)
    assert "lies before the norm's gain" in said
    right = CODER | {"hook": "blocks.1.ln2.hook_normalized"}
    bring(tiny_model_json, tmp_path / "item", path, "gemma_scope", **right)


def test_whether_it_is_a_transcoder_is_told_by_its_names(model, tmp_path, capsys):
    """By the repository of Gemma Scope; by the second hook point of Gemma Scope 2."""
    at = tmp_path / "gemma-scope-2b-pt-transcoders/layer_1/width_16k/average_l0_5"
    said = refused(capsys, model, tmp_path / "item", published.gemma_scope(at), "gemma_scope",
                   hook=IN)  # fmt: skip
    assert "is a transcoder; name its output_hook" in said
    at = tmp_path / "gemma-scope-2b-pt-res/layer_1/width_16k/average_l0_5"
    said = refused(capsys, model, tmp_path / "item", published.gemma_scope(at), "gemma_scope",
                   **CODER)  # fmt: skip
    assert "is an autoencoder, which writes what it reads" in said
    layer = "model.layers.1."
    out = layer + "post_feedforward_layernorm.output"
    points = {"hf_hook_point_in": layer + "pre_feedforward_layernorm.output"}
    path = published.gemma_scope_2(tmp_path / "t", **points, hf_hook_point_out=out)
    said = refused(capsys, model, tmp_path / "item", path, "gemma_scope_2", hook=IN)
    assert "is a transcoder; name its output_hook" in said
    path = published.gemma_scope_2(tmp_path / "s", hf_hook_point_out=None)
    said = refused(capsys, model, tmp_path / "item", path, "gemma_scope_2", **CODER)
    assert "is an autoencoder" in said


def test_where_the_gain_is_folded_the_two_are_one(tiny_model_json, tmp_path):
    """Of a model with processing: compatibility the MLP reads what the norm divides."""
    w = draw(d_in=32, d_out=32)
    path = published.gemma_scope(tmp_path / "layer_1/width_16k/average_l0_5", w)
    item = tmp_path / "model"
    shutil.copytree(tiny_model_json.parent, item)
    folded = rewrite(tiny_model_json, item / "model.json", processing="compatibility")
    bring(folded, tmp_path / "item", path, "gemma_scope", **CODER)


def test_a_place_that_is_not_known_is_noted(model, tmp_path, caplog):
    path = published.gemma_scope_2(tmp_path / "g", hf_hook_point_in="model.layers.1.mlp.up.output")
    manifest = bring(model, tmp_path / "item", path, "gemma_scope_2")
    (note,) = tables.read_json(manifest)["original"]["notes"]
    assert "reads model.layers.1.mlp.up.output, for which no hook is known here" in note


# --- refused -------------------------------------------------------------------------------


def stacked(found: dict) -> dict:
    """Gemma Scope 2's crosscoder of three layers."""
    three = {"w_enc": found["w_enc"].expand(3, -1, -1), "b_dec": found["b_dec"].expand(3, -1)}
    return found | three | {"w_dec": found["w_dec"][:, None].expand(-1, 3, -1)}


def llama(**said):
    return lambda at: published.llama_scope(at, **said)


def sparse(**said):
    return lambda at: published.sparsify(at, **said)


def more_of(make, weights: str = ""):
    """Files with a tensor too many."""

    def made(at: Path) -> Path:
        path = make(at)
        one_more(path / weights if weights else path)
        return path

    return made


BAD = {  # what is wrong -> the files, the format that is said, the sentence
    "rows scaled one by one": (llama(norm_activation="token-wise"), "llama_scope",
                               "norm_activation: token-wise scales every row by itself"),
    "a gated linear unit": (llama(use_glu_encoder=True), "llama_scope", "use_glu_encoder is not"),
    "another activation": (llama(act_fn="relu"), "llama_scope", "act_fn 'relu' is not read"),
    "TopK without a threshold": (llama(act_fn="topk", jump_relu_threshold=0), "llama_scope",
                                 "jump_relu_threshold is 0, and not a number above 0"),
    "a norm of zero": (llama(dataset_average_activation_norm={"in": 0, "out": 0}), "llama_scope",
                       "dataset_average_activation_norm.in is 0"),
    "a norm that is text": (llama(dataset_average_activation_norm={"in": "x"}), "llama_scope",
                            "is 'x', and not a number above 0"),
    "k of nothing": (sparse(k=0), "sparsify", "k is 0, and not a number above 0"),
    "k below zero": (sparse(k=-3), "sparsify", "k is -3"),
    "k that is text": (sparse(k="many"), "sparsify", "k is 'many'"),
    "half a latent": (sparse(k=2.5), "sparsify", "k is 2.5, and not a whole number"),
    "a skip connection that is said": (sparse(skip_connection=True), "sparsify",
                                       "says that it has a skip connection, and it holds no"),
    "Gemma Scope 2's, said": (lambda at: published.gemma_scope_2(at, affine_connection=True),
                              "gemma_scope_2", "says that it has a skip connection"),
    "another architecture": (lambda at: published.gemma_scope_2(at, architecture="topk"),
                             "gemma_scope_2", "architecture 'topk' is not read"),
    "Gemma Scope 2's crosscoder": (
        lambda at: changed(published.gemma_scope_2(at) / "params.safetensors", stacked).parent,
        "gemma_scope_2", "reads 3 layers (a crosscoder)",
    ),
    "SAELens's TopK without k": (
        lambda at: written(published.saelens(at, "topk", k=K) / "cfg.json", k=None).parent,
        "saelens", "has no k",
    ),
    "TopK without k": (
        lambda at: changed(
            written(published.dictionary_learning(at) / "config.json",
                    trainer={"dict_class": "AutoEncoderTopK"}).with_name("ae.pt"),
            lambda t: {name: v for name, v in t.items() if name != "k"},
        ).parent, "dictionary_learning", "has no 'trainer.k'",
    ),
    "sources of a normalizer": (
        lambda at: changed(
            published.dictionary_learning(at, "BatchTopKSAE") / "ae.pt",
            lambda t: t | {"activation_mean": torch.zeros(2, D), "activation_std": torch.ones(2, D),
                           "activation_global_scale": torch.ones(2)},
        ).parent, "dictionary_learning", "its normalizer has 2 scales",
    ),
    "a crosscoder": (
        lambda at: published.dictionary_learning(at, named="BatchTopKCrossCoder"),
        "dictionary_learning",
        "dict_class 'BatchTopKCrossCoder' reads several sources",
    ),
    "bfloat16 of numpy": (
        lambda at: changed(
            published.gemma_scope(at) / "params.npz",
            lambda t: {name: v.astype(np.float16).view("V2") for name, v in t.items()},
        ).parent, "gemma_scope", "params.npz: cannot be read",
    ),
    **{f"one more of {format}": (more_of(make, weights), format, "'gate', which format") for
       format, make, weights in (
           ("gemma_scope", published.gemma_scope, "params.npz"),
           ("gemma_scope_2", published.gemma_scope_2, "params.safetensors"),
           ("llama_scope", published.llama_scope, "checkpoints/final.safetensors"),
           ("sparsify", published.sparsify, "sae.safetensors"),
           ("dictionary_learning", published.dictionary_learning, "ae.pt"),
           ("openai", lambda at: published.openai(at / "1.pt"), ""),
       )},
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_would_be_left_out_is_refused(what, model, tmp_path, capsys):
    make, format, sentence = BAD[what]
    said = refused(capsys, model, tmp_path / "item", make(tmp_path / "at"), format)
    assert sentence in said
    assert not (tmp_path / "item/manifest.json").exists()


def test_one_more_of_a_transcoder_set(model, tmp_path, capsys):
    file = one_more(published.circuit_tracer(tmp_path / "layer_1.safetensors"), "W_gate")
    said = refused(capsys, model, tmp_path / "item", file, "circuit_tracer", **CODER)
    assert "'W_gate', which format circuit_tracer has no place for" in said
    assert CODER["hook"] == IN
