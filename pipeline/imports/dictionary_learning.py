"""ae.pt and config.json of dictionary_learning 0.1.0, by the class in config.json. [torch]

Each class's encode and decode are its own; the threshold of BatchTopK is one number for all latents
and starts at -1, from which the first 1,000 steps of training do not move it.

A fork (Minder et al. 2025, science-of-finetuning, commit 173f7fa) gives BatchTopKSAE a normalizer,
x -> (x - mean) scale, which is folded:

    ((x - mean) scale - b_dec) W = (x - (mean + b_dec / scale)) (scale W)
"""

import math

import torch
from torch import Tensor

from pipeline.errors import RetraceError, nearest
from pipeline.imports.original import (
    Files,
    Original,
    agrees,
    decoded,
    fitting,
    jump,
    linear,
    only,
    per_latent,
    product,
    read_config,
    setting,
    take,
    tensors,
    top,
    whole,
)


def dictionary_learning(files: Files) -> Original:
    """ae.pt and config.json of dictionary_learning, by the class that config.json names."""
    found = {k.removeprefix("_orig_mod."): t for k, t in tensors(files.weights).items()}
    name = "config.json"  # of torch.compile is the prefix
    config = read_config(files, name)
    kind = setting(config, files, name, "trainer", "dict_class")
    if not isinstance(kind, str) or not isinstance(config.get("buffer") or {}, dict):
        raise RetraceError(
            f"{files.beside[name]}: dict_class is no name, or buffer no mapping; fetch it again"
        )
    if "CrossCoder" in kind:
        raise RetraceError(
            f"{files.beside[name]}: dict_class '{kind}' reads several sources, and a dictionary "
            f"that is brought in has one hook; take one of one source"
        )
    if kind not in CLASSES:
        raise RetraceError(
            f"{files.beside[name]}: dict_class '{kind}'{nearest(kind, CLASSES)} is not read; those "
            f"that are: {', '.join(CLASSES)}"
        )
    out = CLASSES[kind](files, found, config)
    d_in, d_sae = out.shape
    agrees(config["trainer"], files, name, activation_dim=d_in, dict_size=d_sae)
    trainer, buffer = config["trainer"], config.get("buffer") or {}
    part = str(trainer.get("submodule_name") or "resid")
    sites = {"resid": "hook_resid_post", "mlp": "hook_mlp_out", "att": "hook_attn_out"}
    site = next((at for word, at in sites.items() if word in part), None)
    layer = trainer.get("layer")
    out.about |= {
        "model_name": trainer.get("lm_name"),
        "hook_name": f"blocks.{layer}.{site}" if site and layer is not None else None,
        "context_size": buffer.get("ctx_len"),
    }
    return out


def _take(found: dict, files: Files, *names: str) -> list[Tensor]:
    """A class's weights, which are all that its file may hold."""
    taken = take(found, files, "dictionary_learning", *names)
    only(found, files, "dictionary_learning", *names)
    return taken


def _auto_encoder(files: Files, found: dict, config: dict) -> Original:
    """AutoEncoder; its reader gives every decoder row length 1 and f its length."""
    W, b_enc, W_d, bias = _take(
        found, files, "encoder.weight", "encoder.bias", "decoder.weight", "bias"
    )
    fitting(files, W, W_d, b_enc, bias)
    norm = W_d.norm(dim=0)
    if torch.allclose(norm, torch.ones_like(norm)):
        norm = torch.ones_like(norm)
    return Original(
        "standard",
        {"W_enc": W.T * norm, "W_dec": (W_d / norm).T, "b_enc": b_enc * norm, "b_dec": bias},
        lambda x: torch.relu(linear(x - bias.to(x), W, b_enc)) * norm.to(x),
        lambda f: decoded(f / norm.to(f), W_d.T, bias),
        apply_b_dec_to_input=True,
    )


def _auto_encoder_new(files: Files, found: dict, config: dict) -> Original:
    W, b_enc, W_d, b_dec = _take(
        found, files, "encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"
    )
    return Original(
        "standard",
        {"W_enc": W.T, "W_dec": W_d.T, "b_enc": b_enc, "b_dec": b_dec},
        lambda x: torch.relu(linear(x, W, b_enc)),
        lambda f: decoded(f, W_d.T, b_dec),
    )


def _gated(files: Files, found: dict, config: dict) -> Original:
    W, W_d, b_dec, r_mag, b_gate, b_mag = _take(
        found, files, "encoder.weight", "decoder.weight", "decoder_bias", "r_mag", "gate_bias",
        "mag_bias",
    )  # fmt: skip

    def encode(x: Tensor) -> Tensor:
        h = linear(x - b_dec.to(x), W, torch.zeros(len(W)))
        return (h + b_gate.to(x) > 0) * torch.relu(r_mag.to(x).exp() * h + b_mag.to(x))

    return Original(
        "gated",
        {
            "W_enc": W.T, "W_dec": W_d.T, "b_dec": b_dec, "r_mag": r_mag, "b_gate": b_gate,
            "b_mag": b_mag,
        },
        encode,
        lambda f: decoded(f, W_d.T, b_dec),
        apply_b_dec_to_input=True,
    )  # fmt: skip


def _top_k(files: Files, found: dict, config: dict) -> Original:
    W, b_enc, W_d, b_dec = _take(
        {k: v for k, v in found.items() if k != "threshold"},  # which its encode does not ask for
        files, "encoder.weight", "encoder.bias", "decoder.weight", "b_dec",
    )  # fmt: skip
    k = _k(found, files, config)
    return Original(
        "topk",
        {"W_enc": W.T, "W_dec": W_d.T, "b_enc": b_enc, "b_dec": b_dec},
        lambda x: top(linear(x - b_dec.to(x), W, b_enc), k),
        lambda f: decoded(f, W_d.T, b_dec),
        k=k,
        apply_b_dec_to_input=True,
    )


def _k(found: dict, files: Files, config: dict) -> int:
    """TopK's k; the library raises as well where file and config.json differ."""
    kept, said = found.get("k"), config["trainer"].get("k")
    if kept is None:
        return whole(config, files, "config.json", "trainer", "k")
    plain = isinstance(kept, Tensor) and kept.numel() == 1 and not kept.is_complex()
    if not plain or not 0 < kept.item() < math.inf:
        raise RetraceError(f"{files.weights}: its k is {kept!r:.60}, and no number above 0")
    if said is not None and said != kept.item():
        raise RetraceError(
            f"{files.weights}: holds k {kept.item()}, and config.json says {said}; the two are of "
            f"different runs, so fetch both again"
        )
    return int(kept)


NORMALIZER = ("activation_mean", "activation_global_scale", "activation_std", "target_rms")


def _batch_top_k(files: Files, found: dict, config: dict) -> Original:
    """BatchTopKSAE and its Matryoshka: at inference a JumpReLU of one threshold."""
    layers = ("encoder.weight", "encoder.bias", "decoder.weight", "b_dec", "threshold")
    plain = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    weights = {k: v for k, v in found.items() if k not in NORMALIZER}
    W, b_enc, W_dec, b_dec, threshold = _take(
        weights, files, *(plain if "W_enc" in found else layers)
    )
    if "W_enc" not in found:
        W, W_dec = W.T, W_dec.T
    groups = found.get("group_sizes")
    if isinstance(groups, Tensor) and int(groups.sum()) != W.shape[1]:
        raise RetraceError(
            f"{files.weights}: group_sizes sum to {int(groups.sum())}, and it has {W.shape[1]} "
            f"latents; fetch it again"
        )
    mean, scale = _normalizer(found, files, len(b_dec))
    notes = ["threshold is as before training: f is ReLU, and its L0 not k"] * bool(threshold < 0)
    thresholds = per_latent(threshold, W.shape[1])
    return Original(
        "jumprelu",
        {
            "W_enc": W * scale, "W_dec": W_dec / scale, "b_enc": b_enc,
            "b_dec": mean + b_dec / scale, "threshold": thresholds,
        },
        lambda x: jump(product((x - mean.to(x)) * scale - b_dec.to(x), W, b_enc), threshold),
        lambda f: decoded(f, W_dec, b_dec) / scale + mean.to(f),
        apply_b_dec_to_input=True,
        notes=notes,
    )  # fmt: skip


def _normalizer(found: dict, files: Files, d: int) -> tuple[Tensor, float]:
    """Mean [d] and scale of the fork's normalizer; 0 and 1 where there is none, or it is NaN."""
    mean, std = found.get("activation_mean"), found.get("activation_std")
    if mean is None or bool(mean.isnan().any()) or bool(std.isnan().any()):
        return torch.zeros(d), 1.0
    mean, scale = take(found, files, "dictionary_learning", *NORMALIZER[:2])
    if scale.numel() != 1 or mean.shape != (d,):
        raise RetraceError(
            f"{files.weights}: its normalizer has {scale.numel()} scales and {mean.numel()} means "
            f"for rows of {d}; take a dictionary of one source"
        )
    return mean, float(scale)


def _jump_relu(files: Files, found: dict, config: dict) -> Original:
    names = ["W_enc", "W_dec", "b_enc", "b_dec", "threshold"]
    W_enc, W_dec, b_enc, b_dec, threshold = values = _take(found, files, *names)
    return Original(
        "jumprelu",
        dict(zip(names, values, strict=True)),
        lambda x: jump(product(x, W_enc, b_enc), threshold),
        lambda f: decoded(f, W_dec, b_dec),
    )


CLASSES = {
    "AutoEncoder": _auto_encoder,
    "AutoEncoderNew": _auto_encoder_new,
    "GatedAutoEncoder": _gated,
    "AutoEncoderTopK": _top_k,
    "BatchTopKSAE": _batch_top_k,
    "MatryoshkaBatchTopKSAE": _batch_top_k,
    "JumpReluAutoEncoder": _jump_relu,
}
