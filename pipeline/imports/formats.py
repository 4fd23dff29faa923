"""Published dictionaries of the field's formats, read from disk as SAELens's weights. [torch]

One function a format gives an `Original`: the weights under SAELens's names and shapes, and encode
and decode as the format's own library defines them, on the tensors as they lie in the file.

    SAELens's layout: W_enc [d_in d_sae], W_dec [d_sae d_out], x_hat = f W_dec + b_dec

| format | library and class | f |
| --- | --- | --- |
| gemma_scope | Lieberum et al. 2024 (2408.05147), params.npz | JumpReLU(x W_enc + b_enc) |
| gemma_scope_2 | params.safetensors, lower-case names | the same |
| llama_scope | He et al. 2024 (2410.20526), as SAELens reads it | the same, of scaled rows |
| sparsify | eai-sparsify 1.3.3, `SparseCoder` | TopK(ReLU((x - b_dec) W^T + b)) |
| openai | Gao et al. 2024, `Autoencoder.from_state_dict` | ReLU(W (x - pre_bias) + latent_bias) |
| circuit_tracer | 0.5.0, `load_relu_transcoder` | ReLU or JumpReLU(W x + b_enc) |

SAELens's own folders are saelens.py's, dictionary_learning's dictionary_learning.py's, and those of
an encoder alone encoders.py's.
What SAELens's decode cannot say (norms of each row, a skip connection, several output layers) is
refused. SAELens's reader of sparsify's folders (6.54) transposes W_dec and leaves b_dec out of the
encoder (a test shows both), so that ours takes its place.
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
    decoded,
    jump,
    kind_of,
    linear,
    product,
    read_config,
    refuse_skip,
    setting,
    take,
    tensors,
    top,
)


def gemma_scope(files: Files) -> Original:
    """params.npz of Gemma Scope: SAELens's own names."""
    names = ["W_enc", "W_dec", "b_enc", "b_dec", "threshold"]
    W_enc, W_dec, b_enc, b_dec, threshold = values = take(
        tensors(files.weights), files, "gemma_scope", *names
    )
    if "embedding" in files.weights.as_posix():
        raise RetraceError(
            f"{files.weights}: reads embeddings before they are scaled by sqrt(d_model), which is "
            f"no hook here; take one of a layer"
        )
    return Original(
        kind_of(files, True),
        dict(zip(names, values, strict=True)),
        lambda x: jump(product(x, W_enc, b_enc), threshold),
        lambda f: decoded(f, W_dec, b_dec),
    )


POINTS = {  # Gemma Scope 2's names of places in a layer -> ours
    "output": "hook_resid_post",
    "self_attn.o_proj.input": "attn.hook_z",
    "post_feedforward_layernorm.output": "hook_mlp_out",
    "pre_feedforward_layernorm.output": "mlp.hook_in",
}


def gemma_scope_2(files: Files) -> Original:
    """params.safetensors of Gemma Scope 2; config.json says where it lies."""
    found, config = tensors(files.weights), read_config(files, "config.json")
    names = ["w_enc", "w_dec", "b_enc", "b_dec", "threshold"]
    W_enc, W_dec, b_enc, b_dec, threshold = take(found, files, "gemma_scope_2", *names)
    if W_dec.ndim == 3:
        raise RetraceError(
            f"{files.weights}: writes into {W_dec.shape[1]} layers (a cross-layer transcoder), and "
            f"a dictionary has one output_hook; take a transcoder of one layer"
        )
    refuse_skip(files, found, "affine_skip_connection")

    def hook(key: str) -> str | None:
        point = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", str(config.get(key)))
        place = POINTS.get(point[2]) if point else None
        return f"blocks.{point[1]}.{place}" if place else None

    return Original(
        kind_of(files, True),
        {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec, "threshold": threshold},
        lambda x: jump(product(x, W_enc, b_enc), threshold),
        lambda f: decoded(f, W_dec, b_dec),
        {
            "model_name": config.get("model_name"),
            "hook_name": hook("hf_hook_point_in"),
            "hook_name_out": hook("hf_hook_point_out"),
        },
    )


def llama_scope(files: Files) -> Original:
    """final.safetensors and hyperparams.json of Llama Scope.

    Rows are scaled to a mean norm of sqrt(d); SAELens scales the threshold by the same factor.
    """
    config, name = read_config(files, "hyperparams.json"), "hyperparams.json"
    W, W_d, b_enc, b_dec = take(
        tensors(files.weights), files, "llama_scope",
        "encoder.weight", "decoder.weight", "encoder.bias", "decoder.bias",
    )  # fmt: skip
    point, out = config.get("hook_point_in"), config.get("hook_point_out")
    if out not in (None, point):
        raise RetraceError(
            f"{files.beside[name]}: reads {point} and writes {out}, whose scales differ; take an "
            f"SAE of one hook"
        )
    norm = float(setting(config, files, name, "dataset_average_activation_norm", "in"))
    scale = math.sqrt(W.shape[1]) / norm
    threshold = float(setting(config, files, name, "jump_relu_threshold")) * scale
    s = files.factor or scale
    thresholds = torch.full((len(W),), threshold)
    return Original(
        "jumprelu",
        {
            "W_enc": (W * s).T, "W_dec": (W_d / s).T, "b_enc": b_enc, "b_dec": b_dec / s,
            "threshold": thresholds,
        },
        lambda x: jump(linear(x * s, W, b_enc), thresholds),
        lambda f: decoded(f, W_d.T, b_dec) / s,
        {"hook_name": point, "norm_scaling_factor": s},
    )  # fmt: skip


PARTS = {"mlp": "hook_mlp_out", "attention": "hook_attn_out", "self_attn": "hook_attn_out",
         "attn": "hook_attn_out"}  # fmt: skip


def sparsify(files: Files) -> Original:
    """cfg.json and sae.safetensors of a sparsify SparseCoder, autoencoder or transcoder."""
    found, name = tensors(files.weights), "cfg.json"
    config = read_config(files, name)
    W, b_enc, W_dec, b_dec = take(
        found, files, "sparsify", "encoder.weight", "encoder.bias", "W_dec", "b_dec"
    )
    refuse_skip(files, found, "W_skip")
    k, activation = int(setting(config, files, name, "k")), config.get("activation", "topk")
    if activation != "topk" or config.get("signed"):
        raise RetraceError(
            f"{files.beside[name]}: activation {'signed ' * bool(config.get('signed'))}{activation}"
            f" is none of SAELens's; take a dictionary with topk"
        )
    transcode = bool(config.get("transcode"))
    place = re.search(r"(?:layers|h)[._](\d+)(?:[._](\w+))?$", files.weights.parent.name)
    about: dict[str, Any] = {}
    if files.weights.parent.name == "embed_tokens":
        about["hook_name"] = "hook_embed"
    elif place and (not place[2] or place[2] in PARTS):
        at = f"blocks.{place[1]}." + PARTS.get(place[2], "hook_resid_post")
        about = {"hook_name_out": at} if transcode else {"hook_name": at}
    return Original(
        "topk",
        {"W_enc": W.T, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec},
        lambda x: top(linear(x if transcode else x - b_dec.to(x), W, b_enc), k),
        lambda f: decoded(f, W_dec, b_dec),
        about,
        k=k,
        apply_b_dec_to_input=not transcode,
        writes=transcode,
    )


def openai(files: Files) -> Original:
    """A state_dict of OpenAI's Autoencoder. Its TopK models normalise each row, and are refused."""
    found = tensors(files.weights)
    W, b_enc, W_d, b_dec = take(
        found, files, "openai", "encoder.weight", "latent_bias", "decoder.weight", "pre_bias"
    )
    activation = found.get("activation", "ReLU")
    if activation == "TopK":
        raise RetraceError(
            f"{files.weights}: activation TopK, whose rows are layer-normed one by one; f W_dec + "
            f"b_dec cannot give them back, so take one of the ReLU releases (v1, v4)"
        )
    if activation != "ReLU":
        raise RetraceError(f"{files.weights}: activation '{activation}' is not read; take ReLU")
    return Original(
        "standard",
        {"W_enc": W.T, "W_dec": W_d.T, "b_enc": b_enc, "b_dec": b_dec},
        lambda x: torch.relu(linear(x - b_dec.to(x), W, b_enc)),
        lambda f: decoded(f, W_d.T, b_dec),
        {"model_name": "gpt2"},
        apply_b_dec_to_input=True,
        writes=False,
    )


def circuit_tracer(files: Files) -> Original:
    """One layer of a circuit-tracer transcoder set; config.yaml says which hooks."""
    found, config = tensors(files.weights), read_config(files, "config.yaml")
    if config.get("model_kind", "transcoder_set") != "transcoder_set" or any(
        re.fullmatch(r"W_(enc|dec)_\d+", name) for name in found
    ):
        raise RetraceError(
            f"{files.weights}: is of a cross-layer transcoder, which writes into several layers, "
            f"and a dictionary has one output_hook; take a transcoder_set"
        )
    W, b_enc, W_dec, b_dec = take(
        found, files, "circuit_tracer", "W_enc", "b_enc", "W_dec", "b_dec"
    )
    refuse_skip(files, found, "W_skip")
    if "log_thresholds" in found:
        raise RetraceError(
            f"{files.weights}: holds log_thresholds, which circuit-tracer itself does not read; "
            f"take one with activation_function.threshold"
        )
    weights = {"W_enc": W.T, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}
    threshold = found.get("activation_function.threshold")
    if threshold is not None:
        (threshold,) = take(found, files, "circuit_tracer", "activation_function.threshold")
        weights["threshold"] = threshold.expand(len(W)).contiguous()

    def encode(x: Tensor) -> Tensor:
        h = linear(x, W, b_enc)
        return torch.relu(h) if threshold is None else jump(h, threshold)

    layer = re.search(r"(\d+)$", files.weights.stem)
    hooks = {"hook_name": "feature_input_hook", "hook_name_out": "feature_output_hook"}
    about = {k: f"blocks.{layer[1]}.{config[v]}" for k, v in hooks.items() if layer and v in config}
    return Original(
        "transcoder" if threshold is None else "jumprelu_transcoder",
        weights,
        encode,
        lambda f: decoded(f, W_dec, b_dec),
        {"model_name": config.get("model_name"), **about},
        writes=True,
    )
