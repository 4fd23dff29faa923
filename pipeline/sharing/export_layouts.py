"""One dictionary in the layouts of other libraries: sparsify, dictionary_learning, circuit-tracer.

Each gives the same latents on the same rows when its library reads it:

* sparsify 1.3.3 (`SparseCoder.load_from_disk`): TopK, autoencoders and transcoders.
* dictionary_learning 0.1.0 (`load_dictionary`): L1 as AutoEncoderNew, whose reader leaves decoder
  norms alone, TopK, JumpReLU (BatchTopK among them) and gated autoencoders.
* circuit-tracer 0.5.0 (`load_relu_transcoder`): a layer of a transcoder set. A set has every layer
  from 0 on, side by side in one folder. Transcoders of all layers leave whole, and cross-layer ones
  as `load_clt` of its repository reads them.

A crosscoder leaves twice, under the names and shapes of Minder et al. (2025). With n sources of
width d:

    encoder.weight [n d d_sae], encoder.bias [d_sae], decoder.weight [n d_sae d], decoder.bias [n d]
    f = act(sum_s x^s encoder.weight^s + encoder.bias)
    x_hat^s = f decoder.weight^s + decoder.bias^s

* crosscoder.safetensors, on rows as they are. act is ReLU; with threshold [d_sae] (BatchTopK) a
  latent is zero where it is not above its own.
* model_final.pt, which `from_pretrained` of CrossCoder or, of BatchTopK, BatchTopKCrossCoder reads
  (of JumpReLU, with a threshold of each latent, there is none): their library is a fork of
  dictionary_learning (science-of-finetuning, commit 173f7fa) and on no package index. Its weights
  are those on scaled rows, the scales stand in its normalizer, and its threshold is one number, of
  f_j sum_s |W_dec^s_j|. Decoder norms and latents are then ours.

Whether b_dec is subtracted from x is fixed by each library's class; where a dictionary has it the
other way, the biases of the encoder take it up:

    (x - b_dec) W + b = x W + (b - b_dec W)
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import RetraceError
from pipeline.sharing.export_formats import SaeLensConfig

Weights = dict[str, np.ndarray]
CLASSES = {
    "standard": "AutoEncoderNew",
    "topk": "AutoEncoderTopK",
    "jumprelu": "JumpReluAutoEncoder",
    "gated": "GatedAutoEncoder",
}


def shifted(config: SaeLensConfig, weights: Weights, subtracts: bool) -> Weights:
    """The weights for a library that subtracts b_dec from x, or does not."""
    if config.apply_b_dec_to_input == subtracts:
        return weights
    sign = 1 if subtracts else -1
    shift = sign * (weights["b_dec"].astype(np.float64) @ weights["W_enc"].astype(np.float64))
    moved = {"b_enc": shift, "b_gate": shift}
    if "r_mag" in weights:
        moved["b_mag"] = shift * np.exp(weights["r_mag"].astype(np.float64))
    found = {name: weights[name] + by for name, by in moved.items() if name in weights}
    return weights | {name: b.astype(np.float32) for name, b in found.items()}


def sparsify(folder: Path, config: SaeLensConfig, weights: Weights) -> None:
    """cfg.json and sae.safetensors."""
    _only(config, ("topk",), "sparsify")
    transcode = config.metadata.hook_name_out is not None
    w = weights if transcode else shifted(config, weights, True)
    found = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "W_dec": w["W_dec"]}
    save_tensors(folder / "sae.safetensors", found | {"b_dec": w["b_dec"]})
    about = {
        "activation": "topk",
        "expansion_factor": -(-config.d_sae // config.d_in),
        "normalize_decoder": bool(np.allclose(np.linalg.norm(w["W_dec"], axis=1), 1)),
        "num_latents": config.d_sae,
        "k": config.model_extra["k"],
        "multi_topk": False,
        "skip_connection": False,
        "transcode": transcode,
        "d_in": config.d_in,
    }
    write_json(folder / "cfg.json", about)


def dictionary_learning(folder: Path, config: SaeLensConfig, weights: Weights) -> None:
    """ae.pt and config.json."""
    import torch

    _only(config, tuple(CLASSES), "dictionary_learning")
    if config.metadata.hook_name_out is not None:
        raise RetraceError(
            f"dictionary_learning has no layout for a transcoder, and this writes "
            f"{config.metadata.hook_name_out}; sparsify has one"
        )
    kind = config.architecture
    w = shifted(config, weights, kind in ("topk", "gated"))
    k = config.model_extra.get("k", 0)
    linear = {"encoder.weight": w["W_enc"].T, "decoder.weight": w["W_dec"].T}
    state = {
        "standard": lambda: linear | {"encoder.bias": w["b_enc"], "decoder.bias": w["b_dec"]},
        "topk": lambda: linear | {
            "encoder.bias": w["b_enc"], "b_dec": w["b_dec"], "k": np.int32(k),
            "threshold": np.float32(-1),
        },
        "jumprelu": lambda: {n: w[n] for n in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")},
        "gated": lambda: linear | {
            "decoder_bias": w["b_dec"], "r_mag": w["r_mag"], "gate_bias": w["b_gate"],
            "mag_bias": w["b_mag"],
        },
    }[kind]()  # fmt: skip
    torch.save({n: torch.tensor(v) for n, v in state.items()}, folder / "ae.pt")
    about = config.metadata
    layer, _ = place(about.hook_name)
    trainer = {
        "dict_class": CLASSES[kind], "activation_dim": config.d_in, "dict_size": config.d_sae,
        "layer": layer, "lm_name": about.model_name, "submodule_name": about.hook_name,
    }  # fmt: skip
    trainer |= {"k": k} if k else {}
    write_json(
        folder / "config.json", {"trainer": trainer, "buffer": {"ctx_len": about.context_size}}
    )


def circuit_tracer(folder: Path, config: SaeLensConfig, weights: Weights) -> None:
    """layer_<i>.safetensors and config.yaml."""
    import yaml

    _only(config, ("transcoder", "jumprelu_transcoder"), "circuit_tracer")
    about = config.metadata
    (layer, reads), (written, writes) = place(about.hook_name), place(about.hook_name_out)
    if layer is None or layer != written:
        raise RetraceError(
            f"circuit-tracer's transcoders read and write one layer, and this reads "
            f"{about.hook_name} and writes {about.hook_name_out}; export one of one layer"
        )
    found = {"W_enc": weights["W_enc"].T, **{n: weights[n] for n in ("W_dec", "b_enc", "b_dec")}}
    if "threshold" in weights:
        found["activation_function.threshold"] = weights["threshold"]
    save_tensors(folder / f"layer_{layer}.safetensors", found)
    set_of = {
        "model_name": about.model_name, "model_kind": "transcoder_set", "scan": about.model_name,
        "feature_input_hook": reads, "feature_output_hook": writes,
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(set_of), encoding="utf-8")


def crosscoder(
    folder: Path, config: SaeLensConfig, weights: Weights, sources: list[dict[str, Any]],
    spec: dict[str, Any],
) -> None:  # fmt: skip
    """crosscoder.safetensors, model_final.pt, and config.json, which names the sources in order.

    JumpReLU has a threshold of each latent, for which their library has no class: model_final.pt is
    left out.

    Args:
        weights: of wide rows, the sources side by side.
        sources: of the manifest.
        spec: of the manifest's entry: its architecture, and k of BatchTopK.
    """
    import torch

    k, own = int(spec.get("k") or 0), spec["architecture"] == "jumprelu"

    widths = [source["d_in"] for source in sources]
    if len(set(widths)) > 1:
        raise RetraceError(
            f"sources of widths {', '.join(map(str, widths))} cannot be stacked; read the store's "
            f"folder by SAELens, on rows of all sources side by side"
        )
    w = shifted(config, weights, False)
    n, d = len(widths), widths[0]
    found = {
        "encoder.weight": w["W_enc"].reshape(n, d, -1),
        "encoder.bias": w["b_enc"],
        "decoder.weight": w["W_dec"].reshape(-1, n, d).swapaxes(0, 1),
        "decoder.bias": w["b_dec"].reshape(n, d),
    }
    state = on_scaled_rows(found, np.array([s["scale"] for s in sources]))
    if "threshold" in w:
        found["threshold"] = w["threshold"]
        if not own:
            over = one_threshold(w["threshold"], state, folder)
            state |= {"k": np.int32(k), "threshold": over}
    save_tensors(folder / "crosscoder.safetensors", found)
    if not own:
        tensors = {name: torch.tensor(np.asarray(value)) for name, value in state.items()}
        torch.save(tensors, folder / "model_final.pt")
    jumps, hooks = "threshold" in w, [s["hook"] for s in sources]
    trainer = {
        "dict_class": "BatchTopKCrossCoder" if jumps else "CrossCoder", "activation_dim": d,
        "dict_size": config.d_sae, "layer": place(hooks[0])[0], "submodule_name": hooks[0],
        "lm_name": config.metadata.model_name, "code_normalization": "CROSSCODER",
        **({"k": k} if jumps else {}),
    }  # fmt: skip
    about = {
        "sources": [s["name"] for s in sources], "hooks": hooks,
        "scales": [s["scale"] for s in sources], "activation_dim": d, "num_layers": n,
        "dict_size": config.d_sae, "activation": "jumprelu" if jumps else "relu",
    } | ({} if own else {"trainer": trainer})  # fmt: skip
    write_json(folder / "config.json", about)


CODE_NORM = 1  # CodeNormalization.CROSSCODER: f_j is weighed by sum_s |W_dec^s_j|


def on_scaled_rows(found: Weights, scales: np.ndarray) -> Weights:
    """The state_dict of a CrossCoder whose normalizer multiplies the rows of source s by scales[s].

    Args:
        found: of rows as they are.
        scales: [n].
    """
    n, d = found["decoder.bias"].shape
    by = scales[:, None, None]
    out = {
        "encoder.weight": found["encoder.weight"] / by,
        "encoder.bias": found["encoder.bias"],
        "decoder.weight": found["decoder.weight"] * by,
        "decoder.bias": found["decoder.bias"] * by[..., 0],
        # from the mean and the standard deviations it makes its scale, target_rms / |std|
        "target_rms": np.ones(()),
        "activation_mean": np.zeros((n, d)),
        "activation_std": np.repeat(1 / (scales[:, None] * d**0.5), d, 1),
        "activation_global_scale": scales,
    }
    state = {name: np.asarray(value, np.float32) for name, value in out.items()}
    return state | {"code_normalization_id": np.int64(CODE_NORM)}


def one_threshold(threshold: np.ndarray, state: Weights, folder: Path) -> np.float32:
    """The one threshold of f_j sum_s |W_dec^s_j| that says what each latent's own says of f_j.

    Raises:
        RetraceError: there is none.
    """
    norms = np.linalg.norm(state["decoder.weight"].astype(np.float64), axis=2).sum(0)
    of_norms = (threshold * norms)[norms > 0]
    least, most = (of_norms.min(), of_norms.max()) if len(of_norms) else (0.0, 0.0)
    if most - least > 1e-4 * max(abs(most), abs(least)):
        raise RetraceError(
            f"{folder}: BatchTopKCrossCoder has one threshold for all latents, and here they "
            f"differ from {least:.4g} to {most:.4g}; read the store's folder by SAELens"
        )
    return np.float32(np.median(of_norms) if len(of_norms) else 0)


def transcoders(out: Path, folder: Path) -> None:
    """Transcoders of all layers as circuit-tracer's: they lie so, or as SAELens's folders."""
    from safetensors.numpy import load_file

    shutil.copy2(folder / "config.yaml", out / "config.yaml")
    for file in sorted(folder.glob("*.safetensors")):
        shutil.copy2(file, out / file.name)
    for layer in sorted(path for path in folder.glob("layer_*") if path.is_dir()):
        w = load_file(layer / "sae_weights.safetensors")
        found = {n: w[n] for n in ("W_dec", "b_enc", "b_dec", "W_skip") if n in w}
        found |= {"W_enc": w["W_enc"].T, "activation_function.threshold": w["threshold"]}
        save_tensors(out / f"{layer.name}.safetensors", found)


LAYOUTS: dict[str, Callable[[Path, SaeLensConfig, Weights], None]] = {
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
    "circuit_tracer": circuit_tracer,
}


def place(hook: str) -> tuple[int | None, str]:
    """Layer of a hook, None for the embedding, and its name in the layer."""
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
    return (int(found[1]), found[2]) if found else (None, hook)


def _only(config: SaeLensConfig, kinds: tuple[str, ...], layout: str) -> None:
    if config.architecture not in kinds:
        raise RetraceError(
            f"{layout} has no layout for {config.architecture}; it has one for {', '.join(kinds)}"
        )


def save_tensors(path: Path, found: Weights) -> None:
    """Write a safetensors file of contiguous arrays."""
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(a) for name, a in found.items()}, path)


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")
