"""A SAELens folder, written in the layouts of others: files such as a publisher puts on a hub.

Three layouts are those of the exports (sparsify, dictionary_learning, circuit-tracer). The others
are written here as their publishers describe them or SAELens's loaders read them (pipeline/imports,
formats.py, has the sources).
"""

import json
import math
import shutil
from pathlib import Path

import numpy as np

from pipeline.sharing import export_layouts as layouts
from pipeline.sharing.export_formats import SaeLensConfig

NORM = 3.0  # of Llama Scope's rows; any would do, since it is divided out again


def loaded(folder: Path) -> tuple[SaeLensConfig, dict[str, np.ndarray]]:
    """Configuration and weights of a SAELens folder."""
    from safetensors.numpy import load_file

    config = SaeLensConfig.model_validate(json.loads((folder / "cfg.json").read_text()))
    return config, load_file(folder / "sae_weights.safetensors")


def plain(folder: Path) -> dict[str, np.ndarray]:
    """The weights of one that reads x, not x - b_dec."""
    config, weights = loaded(folder)
    return layouts.shifted(config, weights, False)


def saelens(out: Path, folder: Path) -> Path:
    return Path(shutil.copytree(folder, out / "saelens"))


def gemma_scope(out: Path, folder: Path) -> Path:
    names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    np.savez(out / "params.npz", **{n: plain(folder)[n] for n in names})
    return out


def gemma_scope_2(out: Path, folder: Path) -> Path:
    found = {name.replace("W_", "w_"): w for name, w in plain(folder).items()}
    layouts.save_tensors(out / "params.safetensors", found)
    return out


def llama_scope(out: Path, folder: Path) -> Path:
    """Rows are scaled to a mean norm of sqrt(d); one threshold serves all latents."""
    w = plain(folder)
    scale = math.sqrt(len(w["W_enc"])) / NORM
    found = {
        "encoder.weight": w["W_enc"].T / scale,
        "encoder.bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T * scale,
        "decoder.bias": w["b_dec"] * scale,
    }
    (out / "checkpoints").mkdir()
    layouts.save_tensors(out / "checkpoints/final.safetensors", found)
    said = {"jump_relu_threshold": float(w["threshold"][0]) / scale,
            "dataset_average_activation_norm": {"in": NORM, "out": NORM}}  # fmt: skip
    layouts.write_json(out / "hyperparams.json", said)
    return out


def openai(out: Path, folder: Path) -> Path:
    import torch

    config, weights = loaded(folder)
    w = layouts.shifted(config, weights, True)
    state = {"pre_bias": w["b_dec"], "encoder.weight": w["W_enc"].T, "latent_bias": w["b_enc"],
             "decoder.weight": w["W_dec"].T}  # fmt: skip
    tensors = {name: torch.tensor(value) for name, value in state.items()}
    torch.save(tensors | {"activation": "ReLU"}, out / "autoencoder.pt")
    return out / "autoencoder.pt"


def sparsify(out: Path, folder: Path) -> Path:
    layouts.sparsify(out, *loaded(folder))
    return out


def dictionary_learning(out: Path, folder: Path) -> Path:
    layouts.dictionary_learning(out, *loaded(folder))
    return out


def circuit_tracer(out: Path, folder: Path) -> Path:
    layouts.circuit_tracer(out, *loaded(folder))
    return next(out.glob("layer_*.safetensors"))


WRITERS = {f.__name__: f for f in (saelens, gemma_scope, gemma_scope_2, llama_scope, openai,
                                   sparsify, dictionary_learning, circuit_tracer)}  # fmt: skip
