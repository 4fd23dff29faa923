"""Layouts of single releases, each against SAELens's reader of it, and against their own library's
steps where SAELens leaves one out."""

import math
from pathlib import Path

import published
import pytest
import torch
from published import RESID, D, K, N, Z, bring, brought, draw, refused
from safetensors.torch import load_file, save_file
from test_sae_import import X, check_equal, offline, theirs  # noqa: F401

from pipeline.imports import saelens
from pipeline.store import tables

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
QWEN = "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_5"  # k is in its name


@pytest.fixture
def model(tiny_gpt2_json) -> Path:
    return tiny_gpt2_json


def linear(encoder: str = "encoder", decoder: str = "decoder") -> dict[str, torch.Tensor]:
    w = draw()
    return published.lengths(**{
        f"{encoder}.weight": w["W_enc"].T, f"{encoder}.bias": w["b_enc"],
        f"{decoder}.weight": w["W_dec"].T, f"{decoder}.bias": w["b_dec"],
    })  # fmt: skip


def saved(file: Path, state: dict) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, file)
    return file


def qwen_scope(folder: Path, **config) -> Path:
    w = draw()
    state = {"W_enc": w["W_enc"].T, "W_dec": w["W_dec"].T, "b_enc": w["b_enc"], "b_dec": w["b_dec"]}
    about = {"model_type": "topk_sae", "base_model": "Qwen/Qwen3-1.7B-Base", "d_model": D,
             "d_sae": N, "k": K, "num_layers": 28, "hook_point": "resid_post",
             "dtype": "float32"}  # fmt: skip
    published.write_json(folder / "config.json", about | config)
    return saved(folder / "layer1.sae.pt", published.lengths(**state))


def r1_distill(folder: Path, **config) -> Path:
    """The keys of OpenMOSS-Team/Llama-Scope-R1-Distill; a mean norm of 2.5."""
    folder.mkdir(parents=True)
    about = {"sae_type": "sae", "d_model": D, "expansion_factor": 8, "act_fn": "jumprelu",
             "hook_point_in": RESID, "hook_point_out": RESID, "norm_activation": "dataset-wise",
             "sparsity_include_decoder_norm": True, "use_glu_encoder": False,
             "apply_decoder_bias_to_pre_encoder": False}  # fmt: skip
    published.write_json(folder / "config.json", about | config)
    more = {"log_jumprelu_threshold": draw()["threshold"].log(),
            f"dataset_average_activation_norm.{RESID}": torch.tensor(2.5)}  # fmt: skip
    save_file(linear() | more, folder / "sae_weights.safetensors")
    return folder


def hook_z(folder: Path, **config) -> Path:
    name = "gpt2-small_L1_Hcat_z_lr1.20e-03_l11.80e+00_ds24576_v9"
    state = {k: v for k, v in draw().items() if k != "threshold"}
    published.write_json(folder / f"{name}_cfg.json",
                         {"act_size": D, "dict_size": N, "act_name": Z} | config)  # fmt: skip
    return saved(folder / f"{name}.pt", state)


def test_qwen_scope_is_what_saelens_makes_of_it(model, offline, tmp_path):  # noqa: F811
    file = qwen_scope(tmp_path / "q")
    manifest = bring(model, tmp_path / "item", file, "qwen_scope")
    said = tables.read_json(manifest)["original"]
    assert said["model_name"] == "Qwen/Qwen3-1.7B-Base" and said["hook_name"] == RESID
    loaders = offline(file.parent)
    loaders.QWEN_SCOPE_MODEL_INFO["Qwen3-1.7B-Base"] = ("Qwen/Qwen3-1.7B-Base", D)
    check_equal(brought(manifest), theirs(loaders, "qwen_scope", QWEN, file.name))


def test_r1_distill_is_what_saelens_makes_of_it(model, offline, tmp_path):  # noqa: F811
    """Where decoder norms do not count; 1.6 is sqrt(16) over the mean norm."""
    r1_distill(tmp_path / "L1R", sparsity_include_decoder_norm=False)
    other = theirs(offline(tmp_path), "llama_scope_r1_distill", "fnlp/any", "L1R", scale=1.6)
    manifest = bring(model, tmp_path / "item", tmp_path / "L1R", "llama_scope_r1_distill")
    check_equal(brought(manifest), other)
    assert tables.read_json(manifest)["original"]["norm_scaling_factor"] == pytest.approx(1.6)


@pytest.mark.parametrize("prefix", ["", "activation_function."])
def test_r1_distill_with_its_decoder_norms(prefix, model, tmp_path):
    """Language-Model-SAEs (SparseAutoEncoder.encode): h |W_dec| is held against the threshold."""
    folder, w = r1_distill(tmp_path / "L1R"), draw()
    file = folder / "sae_weights.safetensors"
    renamed = {"log_jumprelu_threshold": f"{prefix}log_jumprelu_threshold"}
    save_file({renamed.get(k, k): t for k, t in load_file(file).items()}, file)
    ours = brought(bring(model, tmp_path / "item", folder, "llama_scope_r1_distill"))
    h, s = X * 1.6 @ w["W_enc"] + w["b_enc"], math.sqrt(D) / 2.5
    f = h * (h * w["W_dec"].norm(dim=1) > w["threshold"])
    assert ((f > 0) != (h > w["threshold"])).any()  # the norms decide
    torch.testing.assert_close(ours.encode(X), f, rtol=1e-5, atol=2e-5)
    x_hat = (f @ w["W_dec"] + w["b_dec"]) / s
    torch.testing.assert_close(ours(X), x_hat, rtol=1e-5, atol=1e-5 * float(x_hat.abs().max()))


@pytest.mark.parametrize(
    ("format", "name", "state"),
    [("goodfire", "Llama-3.1-8B-Instruct-SAE-l1.pth", linear("encoder_linear", "decoder_linear")),
     ("deepseek_r1", "DeepSeek-R1-Distill-Llama-8B-SAE-l1.pt", linear())],
)  # fmt: skip
def test_two_linear_layers_are_what_saelens_makes_of_them(
    format, name, state, model, offline, tmp_path, monkeypatch  # noqa: F811
):  # fmt: skip
    """SAELens's reader knows Goodfire's two repositories by name."""
    file, loaders = saved(tmp_path / "g" / name, state), offline(tmp_path / "g")
    if format == "goodfire":
        about = {"architecture": "standard", "apply_b_dec_to_input": False, "hook_name": RESID}
        monkeypatch.setattr(loaders, "get_goodfire_config_from_hf", lambda *args: about | args[-1])
    manifest = bring(model, tmp_path / "item", file, format)
    check_equal(brought(manifest), theirs(loaders, format, "any/any", name))
    assert tables.read_json(manifest)["original"]["hook_name"] == RESID


def test_kissanes_attention_saes_are_what_saelens_makes_of_them(
    model, offline, tmp_path  # noqa: F811
):  # fmt: skip
    file = hook_z(tmp_path / "a")
    other = theirs(offline(file.parent), "connor_rob_hook_z", "ckkissane/any", file.name)
    other.turn_off_forward_pass_hook_z_reshaping()
    manifest = bring(model, tmp_path / "item", file, "connor_rob_hook_z", hook=Z)
    check_equal(brought(manifest), other)
    config = tables.read_json(manifest.parent / "saes/x/cfg.json")
    assert config["reshape_activations"] == "hook_z"


BAD = {  # what is wrong -> the files, the format that is said, more of the section, the sentence
    "no k": (lambda at: remove(qwen_scope(at), "config.json"), "qwen_scope", {},
             "layer1.sae.pt: nothing says its k"),
    "Qwen Scope's other layer": (
        lambda at: qwen_scope(at).rename(at / "layer0.sae.pt"), "qwen_scope", {},
        "was made for blocks.0.hook_resid_post, and hook says blocks.1",
    ),
    "a mean norm that is missing": (
        lambda at: without(r1_distill(at), f"dataset_average_activation_norm.{RESID}"),
        "llama_scope_r1_distill", {}, "holds no mean norm",
    ),
    "rows scaled one by one": (
        lambda at: r1_distill(at, norm_activation="token-wise"), "llama_scope_r1_distill", {},
        "norm_activation is token-wise, and dataset-wise is read",
    ),
    "a transcoder of OpenMOSS": (
        lambda at: r1_distill(at, hook_point_out="blocks.1.hook_mlp_out"), "llama_scope_r1_distill",
        {}, "hook_point_out is blocks.1.hook_mlp_out",
    ),
    "no thresholds": (
        lambda at: without(r1_distill(at), "log_jumprelu_threshold"), "llama_scope_r1_distill", {},
        "holds no tensor 'log_jumprelu_threshold'",
    ),
    "no decoder": (
        lambda at: saved(at / "a-l1.pt", {k: v for k, v in linear().items() if "dec" not in k}),
        "deepseek_r1", {}, "holds no tensor 'decoder.weight' (a decoder)",
    ),
    "another linear layer": (
        lambda at: saved(at / "a-l1.pt", linear()), "goodfire", {},
        "holds no tensor 'encoder_linear.weight' of format goodfire",
    ),
    "hook_z elsewhere": (hook_z, "connor_rob_hook_z", {}, f"was made for {Z}, and hook says"),
    "hook_z without its configuration": (
        lambda at: remove(hook_z(at), "gpt2-small_L1_Hcat_z_lr1.20e-03_l11.80e+00_ds24576_v9"
                          "_cfg.json"), "connor_rob_hook_z", {"hook": Z},
        "v9_cfg.json: is not there, and format connor_rob_hook_z needs it",
    ),
}  # fmt: skip


def remove(file: Path, name: str) -> Path:
    (file.parent / name).unlink()
    return file


def without(folder: Path, name: str) -> Path:
    file = folder / "sae_weights.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != name}, file)
    return folder


@pytest.mark.parametrize("what", BAD)
def test_what_does_not_fit_is_one_sentence(what, model, tmp_path, capsys):
    make, format, over, sentence = BAD[what]
    said = refused(capsys, model, tmp_path / "item", make(tmp_path / "at"), format, **over)
    assert sentence in said
    assert not (tmp_path / "item/manifest.json").exists()


def test_a_name_and_its_configuration_agree(model, tmp_path):
    """k of the repository's name, where config.json is not there or says another."""
    from pipeline.errors import RetraceError
    from pipeline.imports.original import Files
    from pipeline.imports.releases import qwen_scope as read

    file = qwen_scope(tmp_path / "q", k=K + 1)
    assert read(Files(file, repo=QWEN)).k == K
    with pytest.raises(RetraceError, match="k is 6, and the repository's name says 5"):
        read(Files(file, {"config.json": file.with_name("config.json")}, repo=QWEN))


def test_an_entry_of_the_list_brings_what_lies_beside_it(model, tmp_path, monkeypatch):
    """The hub's cache holds the commit: a name of the list with dots in it, and its _cfg.json."""
    from huggingface_hub import constants
    from synthetic import call

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    commit, entry = "a" * 40, {"release": "gpt2-small-hook-z-kk", "id": "blocks.1.hook_z"}
    found = saelens.listed(**entry)
    at = tmp_path / "hub" / f"models--{found.repo.replace('/', '--')}/snapshots" / commit
    hook_z(at).rename(at / found.path)
    (config,) = at.glob("*_cfg.json")
    config.rename(at / f"{found.path.removesuffix('.pt')}_cfg.json")
    out, job = tmp_path / "item", {"name": "x", "source": "saelens", "hook": Z, "revision": commit}
    call("sae_import", {"import": job | entry}, model=model, out=out / "manifest.json",
         saes=out / "saes")  # fmt: skip
    said = tables.read_json(out / "manifest.json")["original"]
    assert said["format"] == "connor_rob_hook_z" and said["repo"] == found.repo
    assert set(said["files"]) == {p.name for p in at.iterdir()} and said["hook_name"] == Z
