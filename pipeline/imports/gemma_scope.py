"""Dictionaries of Gemma Scope (Lieberum et al. 2024, 2408.05147) and Gemma Scope 2. [torch]

Both are JumpReLU, f = JumpReLU(x W_enc + b_enc), autoencoders and transcoders. params.npz of the
first says nothing of where it reads; the names of repository and folder do. config.json of the
second does. An affine skip connection has a place in transcoders of all layers.

Crosscoders and cross-layer transcoders of the second have a file of each layer i (its tutorial's
JumpReLUMultiLayerSAE), which layers.py and crosscoders.py put together:

    f^i     = JumpReLU(x^i w_enc^i + b_enc^i)
    x_hat^m = sum_i f^i w_dec^i[:, m] + b_dec^m (+ x^m affine_skip_connection^m)
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import RetraceError
from pipeline.imports.original import (
    Files,
    Original,
    decoded,
    jump,
    kind_of,
    only,
    product,
    read_config,
    skip_of,
    skipping,
    take,
    tensors,
)

ONE = torch.ones(())


def gemma_scope(files: Files) -> Original:
    """params.npz of Gemma Scope: SAELens's own names, or those in lower case.

    A scaling_factor of ones, which SAELens's reader expects in some, scales nothing. Those of the
    embedding read it before Gemma scales it by sqrt(d_model), and hook_embed shows it behind, so
    that the factor is folded; into b_dec as well, which SAELens's reader leaves as it is.
    """
    names = ["W_enc", "W_dec", "b_enc", "b_dec", "threshold"]
    found = {re.sub("^w_", "W_", name): t for name, t in tensors(files.weights).items()}
    if torch.equal(scaling := found.get("scaling_factor", ONE), torch.ones_like(scaling)):
        found.pop("scaling_factor", None)
    W_enc, W_dec, b_enc, b_dec, threshold = values = take(found, files, "gemma_scope", *names)
    only(found, files, "gemma_scope", *names)
    about, writes = _of_gemma_scope(files)
    weights, s = dict(zip(names, values, strict=True)), 1.0
    if "embedding" in files.weights.parts[-4:-1]:
        about, writes, s = {"hook_name": "hook_embed"}, False, W_enc.shape[0] ** -0.5
        weights |= {"W_enc": W_enc * s, "W_dec": W_dec / s, "b_dec": b_dec / s}
    return Original(
        kind_of(files, True),
        weights,
        lambda x: jump(product(x * s, W_enc, b_enc), threshold),
        lambda f: decoded(f, W_dec, b_dec) / s,
        about,
        writes=writes,
    )


SITES = {  # the end of a repository's name -> where its dictionaries read (Gemma Scope's cards)
    "res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z",
    "transcoders": "ln2.hook_normalized",
}  # fmt: skip


def _of_gemma_scope(files: Files) -> tuple[dict[str, Any], bool | None]:
    """The hooks, by the names of repository and folder: layer_12/width_16k/average_l0_82; and
    whether it is a transcoder, None where no name says it.

    A transcoder reads rows just after the norm, before its gain (2408.05147, "Language model
    technical details"), and writes hook_mlp_out.
    """
    parts = [*files.weights.parts[-5:], *files.repo.split("/")]
    layer = next((m[1] for p in parts if (m := re.fullmatch(r"layer_(\d+)", p))), None)
    kind = next((m[1] for p in parts if (m := re.search(r"gemma-scope-.+-(\w+)$", p))), None)
    site = SITES.get("transcoders" if files.transcoder else kind)
    writes = None if kind not in SITES else kind == "transcoders"
    if layer is None or site is None:
        return {}, writes
    out = {"hook_name_out": f"blocks.{layer}.hook_mlp_out"} if files.transcoder else {}
    return {"hook_name": f"blocks.{layer}.{site}"} | out, writes


POINTS = {  # Gemma Scope 2's names of places in a layer -> ours
    "output": "hook_resid_post",
    "self_attn.o_proj.input": "attn.hook_z",
    "post_feedforward_layernorm.output": "hook_mlp_out",
    "pre_feedforward_layernorm.output": "mlp.hook_in",
}


def hook(config: dict[str, Any], key: str, layer: int | str = "") -> str | None:
    """Our name of a place, where config.json names one that is known.

    Args:
        layer: stands for {all} or {5,9,12,15}, where a file is of several layers.
    """
    said = re.sub(r"\{[\w,]+\}", str(layer), str(config.get(key)))
    point = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", said)
    place = POINTS.get(point[2]) if point else None
    return f"blocks.{point[1]}.{place}" if place else None


NAMES = ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")


PLACES = {  # folders of a repository of Gemma Scope 2 -> where its dictionaries read, and write
    "resid_post": ("output", "output"),
    "attn_out": ("self_attn.o_proj.input", "self_attn.o_proj.input"),
    "mlp_out": ("post_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
    "transcoder": ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
}


def _by_names(files: Files) -> dict[str, Any]:
    """What config.json would say, by the names of folders: resid_post_all/layer_3_width_16k_…"""
    *_, kind, folder, _ = ("", "", *files.weights.parts)
    layer, place = re.match(r"layer_(\d+)_width", folder), PLACES.get(kind.removesuffix("_all"))
    if not layer or not place:
        return {}
    ends = zip(("hf_hook_point_in", "hf_hook_point_out"), place, strict=True)
    return {key: f"model.layers.{layer[1]}.{at}" for key, at in ends}


def _check_kind(config: dict[str, Any], files: Files) -> None:
    if (kind := config.get("architecture", "jump_relu")) != "jump_relu":
        raise RetraceError(
            f"{files.beside['config.json']}: architecture '{kind}' is not read; take one with "
            f"jump_relu, which all of Gemma Scope 2 has"
        )


def several(files: Files, weights: Path, n_layers: int, kind: str) -> dict[str, Tensor]:
    """One of the files params_layer_<i> of a crosscoder or of a cross-layer transcoder.

    Args:
        n_layers: that it writes to.
        kind: clt or crosscoder, as config.json has it under `type`.

    Returns:
        w_enc [d d_sae], w_dec [d_sae n_layers d], b_enc, b_dec, threshold; and, where it is not
        zero, affine_skip_connection [d d], in first.
    """
    own = dataclasses.replace(files, weights=weights)
    config = read_config(files, "config.json")
    if (said := config.get("type", kind)) != kind:
        raise RetraceError(
            f"{files.beside['config.json']}: is of type {said}, and a {kind} is wanted; correct "
            f"path, or bring it in as what it is"
        )
    _check_kind(config, files)
    found = tensors(weights)
    out = dict(zip(NAMES, take(found, own, "gemma_scope_2", *NAMES, deep=True), strict=True))
    only(found, own, "gemma_scope_2", *NAMES, "affine_skip_connection")
    d, d_sae = out["b_dec"].numel(), out["b_enc"].numel()
    shapes = {"w_enc": (d, d_sae), "w_dec": (d_sae, n_layers, d), "b_enc": (d_sae,),
              "b_dec": (d,), "threshold": (d_sae,)}  # fmt: skip
    for name, shape in shapes.items():
        if tuple(out[name].shape) != shape:
            raise RetraceError(
                f"{weights}: {name} is {tuple(out[name].shape)}, and not {shape}, as {n_layers} "
                f"layers have it; name as many as it has, or fetch it again"
            )
    skip = skip_of(own, found, "affine_skip_connection", said=config.get("affine_connection"))
    return out if skip is None else out | {"affine_skip_connection": skip}


def gemma_scope_2(files: Files) -> Original:
    """params.safetensors of Gemma Scope 2; config.json says where it lies."""
    found, config = tensors(files.weights), read_config(files, "config.json")
    W_enc, W_dec, b_enc, b_dec, threshold = take(found, files, "gemma_scope_2", *NAMES, deep=True)
    _check_kind(config, files)
    config = config or _by_names(files)
    if W_enc.ndim == 3:
        raise RetraceError(
            f"{files.weights}: reads {W_enc.shape[0]} layers (a crosscoder), and a dictionary has "
            f"one hook; take one of one layer"
        )
    if W_dec.ndim == 3:
        raise RetraceError(
            f"{files.weights}: writes into {W_dec.shape[1]} layers (a cross-layer transcoder, or a "
            f"crosscoder), and a dictionary has one output_hook; bring its folder in with layers: "
            f"cross, or with hooks"
        )
    only(found, files, "gemma_scope_2", *NAMES, "affine_skip_connection")
    affine = skip_of(files, found, "affine_skip_connection", said=config.get("affine_connection"))
    W_skip = None if affine is None else affine.T  # it lies there as [d_in d_out]

    ends = [config.get(f"hf_hook_point_{end}") for end in ("in", "out")]
    told = "hf_hook_point_out" in config
    return Original(
        kind_of(files, True),
        {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec, "threshold": threshold}
        | ({} if W_skip is None else {"W_skip": W_skip}),
        lambda x: jump(product(x, W_enc, b_enc), threshold),
        lambda f: decoded(f, W_dec, b_dec),
        {
            "model_name": config.get("model_name"),
            "hook_name": hook(config, "hf_hook_point_in"),
            "hook_name_out": hook(config, "hf_hook_point_out"),
        },
        writes=ends[1] not in (None, ends[0]) if told else None,
        notes=[
            f"reads {config[key]}, for which no hook is known here: compare it with yours"
            for key in ("hf_hook_point_in", "hf_hook_point_out")
            if config.get(key) and not hook(config, key)
        ],
        **skipping(W_skip),
    )
