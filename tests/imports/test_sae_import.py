"""Published dictionaries: each format brought in and compared with its original."""

import json
from pathlib import Path

import published
import pytest
import torch
from published import (
    CLASSES,
    CODER,
    IN,
    OUT,
    RESID,
    D,
    K,
    N,
    Z,
    bring,
    brought,
    draw,
    refused,
)  # fmt: skip
from safetensors.torch import load_file

from pipeline.imports import sae_import, saelens
from pipeline.sharing import verify
from pipeline.store import provenance, tables

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
X = torch.randn(64, D, generator=torch.Generator().manual_seed(3)) * 2


@pytest.fixture
def model(tiny_gpt2_json) -> Path:
    return tiny_gpt2_json


# --- every format, against the loader of SAELens -------------------------------------------


@pytest.fixture
def offline(monkeypatch):
    """SAELens's readers of the hub, on a folder: they see its files as the repository's."""
    from huggingface_hub.utils import EntryNotFoundError
    from sae_lens.loading import pretrained_sae_loaders as loaders

    def on(root: Path):
        def file(repo_id, filename, subfolder=None, **_):
            path = root / (subfolder or "") / filename
            if not path.is_file():
                raise EntryNotFoundError(filename)
            return str(path)

        def shapes(_, filename):
            return {k: list(v.shape) for k, v in load_file(root / filename).items()}

        monkeypatch.setattr(loaders, "hf_hub_download", file)
        monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes)
        return loaders

    return on


def theirs(loaders, name: str, repo: str, folder: str, scale: float = 1.0):
    """The dictionary that a named reader of SAELens gives, as SAE.from_pretrained builds it."""
    from sae_lens import SAE

    read = loaders.NAMED_PRETRAINED_SAE_LOADERS[name]
    over = {"dtype": "float32", "device": "cpu", "d_sae": N, "d_in": D}
    over |= {"d_out": D} if "transcoder" in name else {}
    config, state, _ = read(repo, folder, "cpu", False, over)
    sae = SAE.from_dict(loaders.handle_config_defaulting(config))
    sae.load_state_dict(state, assign=True)
    if scale != 1:
        sae.fold_activation_norm_scaling_factor(scale)
    return sae.float()


def check_equal(ours, other) -> None:
    with torch.no_grad():
        f = other.encode(X)
        assert (f > 0).any() and (f == 0).any()
        torch.testing.assert_close(ours.encode(X), f, **CLOSE)
        torch.testing.assert_close(ours.decode(f), other.decode(f), **CLOSE)


def of_size(x: torch.Tensor) -> dict[str, float]:
    """The tolerance of the stage's own check: 1e-5 of a reconstruction's size, after folds."""
    return {"rtol": 1e-5, "atol": 1e-5 * float(x.abs().max())}


def test_gemma_scope_is_what_saelens_makes_of_it(model, offline, tmp_path):
    folder = "layer_1/width_16k/average_l0_5"
    published.gemma_scope(tmp_path / folder)
    other = theirs(offline(tmp_path), "gemma_2", "google/gemma-scope-2b-pt-res", folder)
    ours = brought(bring(model, tmp_path / "item", tmp_path / folder, "gemma_scope"))
    check_equal(ours, other)


def test_a_gemma_scope_transcoder_is_what_saelens_makes_of_it(model, offline, tmp_path):
    folder = "layer_1/width_16k/average_l0_5"
    published.gemma_scope(tmp_path / folder)
    repo = "google/gemma-scope-2b-pt-transcoders"
    other = theirs(offline(tmp_path), "gemma_2_transcoder", repo, folder)
    manifest = bring(model, tmp_path / "item", tmp_path / folder, "gemma_scope", **CODER)
    check_equal(brought(manifest), other)


@pytest.mark.parametrize("kind", ["resid_post", "transcoder"])
def test_gemma_scope_2_is_what_saelens_makes_of_it(kind, model, offline, tmp_path):
    folder, at = f"{kind}/layer_1_width_16k_l0_small", {}
    published.gemma_scope_2(tmp_path / folder)
    if kind == "transcoder":
        layer = "model.layers.1."
        published.gemma_scope_2(
            tmp_path / folder, hf_hook_point_in=layer + "pre_feedforward_layernorm.output",
            hf_hook_point_out=layer + "post_feedforward_layernorm.output",
        )  # fmt: skip
        at = CODER
    other = theirs(offline(tmp_path), "gemma_3", "google/gemma-scope-2-1b-pt", folder)
    manifest = bring(model, tmp_path / "item", tmp_path / folder, "gemma_scope_2", **at)
    check_equal(brought(manifest), other)


def test_llama_scope_is_what_saelens_makes_of_it(model, offline, tmp_path):
    """Rows are scaled by 4 / 2.5 = sqrt(d) over their mean norm, and the threshold by the same."""
    published.llama_scope(tmp_path / "L1R")
    other = theirs(offline(tmp_path), "llama_scope", "fnlp/any", "L1R", scale=D**0.5 / 2.5)
    manifest = bring(model, tmp_path / "item", tmp_path / "L1R", "llama_scope")
    check_equal(brought(manifest), other)
    assert tables.read_json(manifest)["original"]["norm_scaling_factor"] == pytest.approx(1.6)


RIGHT = [c for c in CLASSES if c not in ("AutoEncoder", "AutoEncoderNew")]


@pytest.mark.parametrize("dict_class", RIGHT)
def test_dictionary_learning_is_what_saelens_makes_of_it(dict_class, model, offline, tmp_path):
    """But for two classes: SAELens keeps AutoEncoder's decoder norms, and has no AutoEncoderNew."""
    folder = published.dictionary_learning(tmp_path / "t", dict_class)
    other = theirs(offline(tmp_path), "dictionary_learning_1", "canrager/lm_sae", "t")
    check_equal(brought(bring(model, tmp_path / "item", folder, "dictionary_learning")), other)


@pytest.mark.parametrize("dict_class", ["AutoEncoder", "AutoEncoderNew"])
def test_an_l1_autoencoder_of_dictionary_learning(dict_class, model, tmp_path):
    """Its reader gives the decoder rows of AutoEncoder length 1, and f what they had."""
    w, folder = draw(), published.dictionary_learning(tmp_path / "t", dict_class)
    ours = brought(bring(model, tmp_path / "item", folder, "dictionary_learning"))
    old = dict_class == "AutoEncoder"
    f = torch.relu((X - w["b_dec"] * old) @ w["W_enc"] + w["b_enc"])
    x_hat = f @ w["W_dec"] + w["b_dec"]
    f = f * w["W_dec"].norm(dim=1) if old else f
    torch.testing.assert_close(ours.encode(X), f, **CLOSE)
    torch.testing.assert_close(ours(X), x_hat, **of_size(x_hat))
    assert not old or torch.allclose(ours.W_dec.norm(dim=1), torch.ones(N))


def test_sparsify_as_its_library_reads_it(model, tmp_path):
    """b_dec is taken off x whatever normalize_decoder says (SparseCoder.encode, 1.3.3)."""
    w, folder = draw(), published.sparsify(tmp_path / "layers.1")
    ours = brought(bring(model, tmp_path / "item", folder, "sparsify"))
    h = torch.relu((X - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    f = h * (h >= h.topk(K).values[:, -1:])
    torch.testing.assert_close(ours.encode(X), f, **CLOSE)
    torch.testing.assert_close(ours(X), f @ w["W_dec"] + w["b_dec"], **CLOSE)


def test_saelens_does_not_read_sparsify(tmp_path):
    """Why ours stands in its place: W_dec lies on its side, and b_dec is not taken off x."""
    from sae_lens.loading.pretrained_sae_loaders import sparsify_disk_loader

    folder = published.sparsify(tmp_path / "gpt2" / "layers.1")
    config, state = sparsify_disk_loader(folder, "cpu", {"dtype": "float32"})
    assert state["W_dec"].shape == (D, N) and state["W_enc"].shape == (D, N)
    assert config["apply_b_dec_to_input"] is False


def test_a_sparsify_transcoder_keeps_b_dec_off_its_input(model, tmp_path):
    w, folder = draw(), published.sparsify(tmp_path / "h.1.mlp", transcode=True)
    ours = brought(bring(model, tmp_path / "item", folder, "sparsify", **CODER))
    h = torch.relu(X @ w["W_enc"] + w["b_enc"])
    torch.testing.assert_close(ours.encode(X), h * (h >= h.topk(K).values[:, -1:]), **CLOSE)


def test_openai_as_its_library_reads_it(model, tmp_path):
    w, file = draw(), published.openai(tmp_path / "8.pt")
    ours = brought(bring(model, tmp_path / "item", file, "openai"))
    f = torch.relu((X - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    torch.testing.assert_close(ours.encode(X), f, **CLOSE)
    torch.testing.assert_close(ours(X), f @ w["W_dec"] + w["b_dec"], **CLOSE)


@pytest.mark.parametrize("jumps", [True, False])
def test_a_layer_of_circuit_tracer(jumps, model, offline, tmp_path):
    """Without thresholds it is what SAELens's reader of such sets makes of it."""
    w = draw() if jumps else {k: v for k, v in draw().items() if k != "threshold"}
    file = published.circuit_tracer(tmp_path / "set" / "layer_1.safetensors", w)
    ours = brought(bring(model, tmp_path / "item", file, "circuit_tracer", **CODER))
    h = X @ w["W_enc"] + w["b_enc"]
    f = torch.relu(h) * (h > w["threshold"]) if jumps else torch.relu(h)
    torch.testing.assert_close(ours.encode(X), f, **CLOSE)
    torch.testing.assert_close(ours(X), f @ w["W_dec"] + w["b_dec"], **CLOSE)
    if not jumps:
        values = {"d_model": D, "d_feature": N, "batch_size": 64}
        about = {k: {"value": v} for k, v in values.items()}
        (tmp_path / "set" / "wandb-config.yaml").write_text(json.dumps(about))
        name = file.name
        check_equal(ours, theirs(offline(file.parent), "mwhanna_transcoder", "any", name))


@pytest.mark.parametrize(
    ("architecture", "more"),
    [("standard", {}), ("gated", {}), ("jumprelu", {"apply_b_dec_to_input": False}),
     ("topk", {"k": K}), ("matching_pursuit", {"max_iterations": K}), ("transcoder", CODER),
     ("jumprelu_transcoder", CODER)],
)  # fmt: skip
def test_a_folder_of_saelens(architecture, more, model, tmp_path):
    from sae_lens import SAE

    at = more if more is CODER else {}
    meta = {"hook_name": IN, "hook_name_out": OUT} if at else {}
    cfg = {} if at else dict(more)
    folder = published.saelens(tmp_path / "s", architecture, meta=meta, **cfg)
    manifest = bring(model, tmp_path / "item", folder, "saelens", **at)
    check_equal(brought(manifest), SAE.load_from_disk(folder))


def test_the_manifest_says_whose_it_is(model, tmp_path):
    folder = published.saelens(tmp_path / "s", meta={"prepend_bos": False, "context_size": 33})
    manifest = bring(model, tmp_path / "item", folder, "saelens")
    said = tables.read_json(manifest)["original"]
    assert said["files"] == {
        f.name: provenance.sha256_file(f) for f in sorted(folder.iterdir(), reverse=True)
    }
    assert {k: said[k] for k in ("model_name", "hook_name", "prepend_bos", "context_size")} == {
        "model_name": "gpt2", "hook_name": RESID, "prepend_bos": False, "context_size": 33
    }  # fmt: skip
    weights = manifest.parent / "saes/x/sae_weights.safetensors"
    assert provenance.read(weights)["source"]["files"] == said["files"]
    assert not verify.faults(manifest)
    meta = tables.read_json(weights.with_name("cfg.json"))["metadata"]
    assert meta["context_size"] == 33 and meta["hook_name_bridge"] == "blocks.1.hook_out"


# --- folded --------------------------------------------------------------------------------


def test_topk_by_decoder_norms_is_folded(model, tmp_path):
    """SAELens divides f by the norms before W_dec: unfolded, f W_dec + b_dec is far off."""
    from sae_lens import SAE

    folder = published.saelens(tmp_path / "s", "topk", k=K, rescale_acts_by_decoder_norm=True)
    other = SAE.load_from_disk(folder)
    ours = brought(bring(model, tmp_path / "item", folder, "saelens"))
    with torch.no_grad():
        f = other.encode(X)
        torch.testing.assert_close(ours.encode(X), f, **CLOSE)
        assert (f @ other.W_dec + other.b_dec - other.decode(f)).abs().max() > 1
        x_hat = other.decode(f)
        torch.testing.assert_close(f @ ours.W_dec + ours.b_dec, x_hat, **of_size(x_hat))


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu", "topk"])
def test_a_factor_of_the_norm_is_folded(architecture, model, tmp_path):
    from sae_lens import SAE

    more = {"k": K} if architecture == "topk" else {}
    folder = published.saelens(
        tmp_path / "s", architecture, normalize_activations="expected_average_only_in", **more
    )
    scaled, s = SAE.load_from_disk(folder), 0.37
    manifest = bring(model, tmp_path / "item", folder, "saelens", norm_scaling_factor=s)
    ours = brought(manifest)
    with torch.no_grad():
        f = scaled.encode(X * s)
        assert (f > 0).any()
        torch.testing.assert_close(ours.encode(X), f, **CLOSE)
        x_hat = scaled.decode(f) / s
        torch.testing.assert_close(ours.decode(f), x_hat, **of_size(x_hat))


def test_heads_side_by_side(model, tmp_path):
    """SAELens reads [... heads d_head] at hook_z; our rows hold them flat."""
    from sae_lens import SAE

    folder = published.saelens(
        tmp_path / "s", "jumprelu", meta={"hook_name": Z}, reshape_activations="hook_z"
    )
    manifest = bring(model, tmp_path / "item", folder, "saelens", hook=Z)
    split = SAE.load_from_disk(manifest.parent / "saes/x")
    with torch.no_grad():
        by_head = split(X.unflatten(1, (4, D // 4)))
        torch.testing.assert_close(by_head.flatten(1), brought(manifest)(X), **CLOSE)


def test_a_skip_connection_of_zeros_is_none(model, tmp_path):
    meta, w = {"hook_name": IN, "hook_name_out": OUT}, draw() | {"W_skip": torch.zeros(D, D)}
    folder = published.saelens(tmp_path / "s", "skip_transcoder", w, meta=meta)
    manifest = bring(model, tmp_path / "item", folder, "saelens", **CODER)
    entry = tables.read_json(manifest)["saes"]["x"]
    assert entry["spec"]["architecture"] == "transcoder"


@pytest.mark.parametrize("part", ["W_enc", "W_dec", "b_enc", "b_dec", "threshold"])
def test_a_weight_that_is_a_little_off_is_not_brought_in(part, model, tmp_path, monkeypatch):
    """The check can fail: one number of one tensor, changed between the file and our folder."""
    before = sae_import.write

    def write(original, *rest):
        tensor = original.weights[part] = original.weights[part].clone()
        tensor.view(-1)[tensor.abs().argmax()] *= 1.1 if part != "threshold" else 1e3
        before(original, *rest)

    monkeypatch.setattr(sae_import, "write", write)
    folder = published.gemma_scope(tmp_path / "g")
    with pytest.raises(SystemExit):
        bring(model, tmp_path / "item", folder, "gemma_scope")
    assert not (tmp_path / "item/manifest.json").exists()
    assert not (tmp_path / "item/saes").exists()


def test_a_missed_fold_is_not_brought_in(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(saelens, "fold", lambda sae, scale: sae)
    folder = published.saelens(tmp_path / "s", normalize_activations="expected_average_only_in")
    said = refused(capsys, model, tmp_path / "item", folder, "saelens", norm_scaling_factor=0.37)
    assert "encode differs from the original's by" in said and "not brought in" in said
