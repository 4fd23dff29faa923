"""Dictionaries of releases whose layout is theirs alone, by SAELens's names of its readers. [torch]

| format | published by | f |
| --- | --- | --- |
| qwen_scope | Qwen, SAE-Res-*: layer<l>.sae.pt | TopK(ReLU(W_enc x + b_enc)) |
| llama_scope_r1_distill | OpenMOSS, Llama-Scope-R1-Distill | JumpReLU of scaled rows |
| goodfire | Goodfire, Llama-3.*-SAE-l<l>: one file | ReLU(W x + b) |
| deepseek_r1 | qresearch, DeepSeek-R1-Distill-*-SAE-l<l>: one file | ReLU(W x + b) |
| connor_rob_hook_z | Kissane et al. 2024: *.pt, *_cfg.json | ReLU((x - b_dec) W_enc + b_enc) |

Language-Model-SAEs (38d976a6), which trained those of R1, scales rows by sqrt(d) over the mean norm
that lies beside the weights, and holds h_j |W_dec_j| against the threshold unless
`sparsity_include_decoder_norm` is false; SAELens's reader takes h_j whatever it says.
"""

import math
import re
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import RetraceError
from pipeline.imports.original import (
    Files,
    Original,
    a_hook,
    agrees,
    decoded,
    fitting,
    jump,
    linear,
    only,
    product,
    read_config,
    setting,
    take,
    tensors,
    top,
    whole,
)

LEAST = 1e-30  # of a decoder row's length, so that a threshold over it is a number
NORM = "dataset_average_activation_norm."


def qwen_scope(files: Files) -> Original:
    """layer<l>.sae.pt of Qwen Scope; k by config.json, or by the repository's name."""
    names = ("W_enc", "W_dec", "b_enc", "b_dec")  # [d_sae d] and [d d_sae]
    W, W_d, b_enc, b_dec = take(found := tensors(files.weights), files, "qwen_scope", *names)
    only(found, files, "qwen_scope", *names)
    fitting(files, W, W_d, b_enc, b_dec)
    config = read_config(files, "config.json")
    agrees(config, files, "config.json", d_model=W.shape[1], d_sae=len(W))
    named = re.search(r"-L0_(\d+)", files.repo)
    if "k" not in config and not named:
        raise RetraceError(
            f"{files.weights}: nothing says its k; bring it in with the config.json of its "
            f"repository beside it"
        )
    k = whole(config, files, "config.json", "k") if "k" in config else int(named[1])
    if named and k != int(named[1]):
        raise RetraceError(
            f"{files.beside['config.json']}: k is {k}, and the repository's name says {named[1]}; "
            f"correct repo"
        )
    layer = re.match(r"layer(\d+)\.", files.weights.name)
    hook = config.get("hook_point", "resid_post")
    return Original(
        "topk",
        {"W_enc": W.T, "W_dec": W_d.T, "b_enc": b_enc, "b_dec": b_dec},
        lambda x: top(linear(x, W, b_enc), k),
        lambda f: decoded(f, W_d.T, b_dec),
        {
            "model_name": config.get("base_model"),
            "hook_name": f"blocks.{layer[1]}.hook_{hook}" if layer else None,
        },
        k=k,
        writes=False,
    )


def llama_scope_r1_distill(files: Files) -> Original:
    """config.json and sae_weights.safetensors of Language-Model-SAEs in 2025."""
    name, kind = "config.json", "llama_scope_r1_distill"
    config, found = read_config(files, name), tensors(files.weights)
    point = a_hook(setting(config, files, name, "hook_point_in"), files, name)
    about = {k: config.get(k) for k in ("act_fn", "norm_activation", "use_glu_encoder")}
    about["hook_point_out"] = config.get("hook_point_out", point)
    known = {"act_fn": "jumprelu", "norm_activation": "dataset-wise", "hook_point_out": point}
    for key, value in about.items():
        if value not in (None, False, known.get(key)):
            raise RetraceError(
                f"{files.beside[name]}: {key} is {value}, and {known.get(key, 'none')} is read; "
                f"take an SAE of one hook with jumprelu and dataset-wise"
            )
    found = {k.removeprefix("activation_function."): t for k, t in found.items()}
    names = ("encoder.weight", "decoder.weight", "encoder.bias", "decoder.bias",
             "log_jumprelu_threshold")  # fmt: skip
    W, W_d, b_enc, b_dec, log_threshold = take(found, files, kind, *names)
    only(found, files, kind, *names, f"{NORM}{point}")
    fitting(files, W, W_d, b_enc, b_dec)
    agrees(config, files, name, d_model=W.shape[1])
    s = files.factor or _of_mean_norm(found, files, point, W.shape[1])
    thresholds = log_threshold.exp()
    if config.get("sparsity_include_decoder_norm", True):
        _same_length(files, thresholds, W)
        thresholds = thresholds / W_d.norm(dim=0).clamp_min(LEAST)
    shift = bool(config.get("apply_decoder_bias_to_pre_encoder"))
    return Original(
        "jumprelu",
        {
            "W_enc": (W * s).T, "W_dec": (W_d / s).T, "b_enc": b_enc, "b_dec": b_dec / s,
            "threshold": thresholds,
        },
        lambda x: jump(linear(x * s - b_dec.to(x) * shift, W, b_enc), thresholds),
        lambda f: decoded(f, W_d.T, b_dec) / s,
        {"hook_name": point, "norm_scaling_factor": s},
        apply_b_dec_to_input=shift,
        writes=False,
    )  # fmt: skip


def _of_mean_norm(found: dict[str, Any], files: Files, point: str, d: int) -> float:
    """sqrt(d) over the mean norm of rows, which lies beside the weights."""
    norm = found.get(f"{NORM}{point}")
    if not isinstance(norm, Tensor) or norm.numel() != 1 or not 0 < float(norm) < math.inf:
        raise RetraceError(
            f"{files.weights}: holds no mean norm '{NORM}{point}' above 0; give "
            f"norm_scaling_factor: sqrt(d_in) over the mean norm of the rows"
        )
    return math.sqrt(d) / float(norm)


def _same_length(files: Files, thresholds: Tensor, W: Tensor) -> None:
    if thresholds.shape != (len(W),):
        raise RetraceError(
            f"{files.weights}: has thresholds of {tuple(thresholds.shape)} for {len(W)} latents; "
            f"fetch it again"
        )


def _plain(files: Files, format: str, encoder: str, decoder: str) -> Original:
    """Two linear layers with a ReLU between them, of the layer that the file's name ends with."""
    names = [f"{layer}.{part}" for part in ("weight", "bias") for layer in (encoder, decoder)]
    W, W_d, b_enc, b_dec = take(found := tensors(files.weights), files, format, *names)
    only(found, files, format, *names)
    layer = re.search(r"-l(\d+)$", files.weights.stem)
    return Original(
        "standard",
        {"W_enc": W.T, "W_dec": W_d.T, "b_enc": b_enc, "b_dec": b_dec},
        lambda x: torch.relu(linear(x, W, b_enc)),
        lambda f: decoded(f, W_d.T, b_dec),
        {"hook_name": f"blocks.{layer[1]}.hook_resid_post"} if layer else {},
        writes=False,
    )


def goodfire(files: Files) -> Original:
    """A state_dict of Goodfire's SparseAutoEncoder."""
    return _plain(files, "goodfire", "encoder_linear", "decoder_linear")


def deepseek_r1(files: Files) -> Original:
    """A state_dict of qresearch's."""
    return _plain(files, "deepseek_r1", "encoder", "decoder")


def connor_rob_hook_z(files: Files) -> Original:
    """A state_dict of Kissane et al.'s AutoEncoder (2406.17759), on all heads side by side."""
    names = ("W_enc", "W_dec", "b_enc", "b_dec")
    W_enc, W_dec, b_enc, b_dec = values = take(
        found := tensors(files.weights), files, "connor_rob_hook_z", *names
    )
    only(found, files, "connor_rob_hook_z", *names)
    name = f"{files.weights.stem}_cfg.json"
    config = read_config(files, name)
    agrees(config, files, name, act_size=W_enc.shape[0], dict_size=W_enc.shape[1])
    point = a_hook(setting(config, files, name, "act_name"), files, name)
    return Original(
        "standard",
        dict(zip(names, values, strict=True)),
        lambda x: torch.relu(product(x - b_dec.to(x), W_enc, b_enc)),
        lambda f: decoded(f, W_dec, b_dec),
        {"model_name": "gpt2-small", "hook_name": point, "context_size": 128},
        apply_b_dec_to_input=True,
        writes=False,
    )


FORMATS = {
    "qwen_scope": qwen_scope,
    "llama_scope_r1_distill": llama_scope_r1_distill,
    "goodfire": goodfire,
    "deepseek_r1": deepseek_r1,
    "connor_rob_hook_z": connor_rob_hook_z,
}
