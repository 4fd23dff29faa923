"""Published dictionaries of the field's formats, read from disk as SAELens's weights. [torch]

One function a format gives an `Original`: the weights under SAELens's names and shapes, and encode
and decode as the format's own library defines them, on the tensors as they lie in the file.

    SAELens's layout: W_enc [d_in d_sae], W_dec [d_sae d_out], x_hat = f W_dec + b_dec

| format | library and class | f |
| --- | --- | --- |
| llama_scope | He et al. 2024 (2410.20526), Language-Model-SAEs | JumpReLU of scaled rows |
| sparsify | eai-sparsify 1.3.3, `SparseCoder` | TopK(ReLU((x - b_dec) W^T + b)) |
| openai | Gao et al. 2024, `Autoencoder.from_state_dict` | ReLU(W (x - pre_bias) + latent_bias) |
| circuit_tracer | 0.5.0, `load_relu_transcoder` | ReLU or JumpReLU(W x + b_enc) |

SAELens's own folders are saelens.py's, Gemma Scope's gemma_scope.py's, dictionary_learning's
dictionary_learning.py's, and those of an encoder alone encoders.py's.
A file with weights that its format has no place for is refused, as is a setting that would change
f: what is not read would be left out without a word.
What SAELens's decode cannot say (norms of each row, a skip connection, several output layers) is
refused; for the last two layers.py has a place. SAELens's reader of sparsify's folders (6.54)
transposes W_dec and leaves b_dec out of the encoder (a test shows both), so that ours takes its
place.
"""

import math
import re
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import RetraceError
from pipeline.imports.original import (
    PARTS,
    Files,
    Original,
    a_hook,
    agrees,
    decoded,
    fitting,
    jump,
    linear,
    only,
    per_latent,
    positive,
    read_config,
    skip_of,
    skipping,
    take,
    tensors,
    top,
    whole,
)

LEAST = 1e-30  # of a decoder row's length, so that a threshold over it is a number


def llama_scope(files: Files) -> Original:
    """final.safetensors and hyperparams.json of Llama Scope, an SAE or a transcoder (LXTC).

    What a transcoder writes has a scale of its own, by the mean norm of its hook.
    Rows are scaled to a mean norm of sqrt(d); SAELens scales the threshold by the same factor, so
    that f is that of scaled rows. Where `sparsity_include_decoder_norm` says so, h_j |W_dec_j| is
    held against the threshold (Language-Model-SAEs, `SparseAutoEncoder.from_config`, which gives
    decoder rows length 1); SAELens's reader takes h_j whatever it says. The two agree on rows of
    length 1.
    """
    config, name = read_config(files, "hyperparams.json"), "hyperparams.json"
    names = ("encoder.weight", "decoder.weight", "encoder.bias", "decoder.bias")
    found = tensors(files.weights)
    W, W_d, b_enc, b_dec = take(found, files, "llama_scope", *names)
    only(found, files, "llama_scope", *names)
    fitting(files, W, W_d, b_enc, b_dec)
    agrees(config, files, name, d_model=W.shape[1], d_sae=len(W))
    point, out = config.get("hook_point_in"), config.get("hook_point_out")
    point = point and a_hook(point, files, name)
    writes = out not in (None, point)
    scale = _llama_scale(files, config, W.shape[1])
    threshold = positive(config, files, name, "jump_relu_threshold") * scale
    s = files.factor or scale
    to = _llama_scale(files, config, len(b_dec), "out") if writes else s
    thresholds = torch.full((len(W),), threshold)
    if config.get("sparsity_include_decoder_norm"):
        thresholds /= W_d.norm(dim=0).clamp_min(LEAST)
    shift = bool(config.get("apply_decoder_bias_to_pre_encoder"))
    if shift and writes:
        raise RetraceError(
            f"{files.beside[name]}: apply_decoder_bias_to_pre_encoder of a transcoder takes what "
            f"it writes off what it reads; take one without"
        )
    about = {"hook_name": point, "norm_scaling_factor": s}
    return Original(
        "jumprelu_transcoder" if writes else "jumprelu",
        {
            "W_enc": (W * s).T, "W_dec": (W_d / to).T, "b_enc": b_enc, "b_dec": b_dec / to,
            "threshold": thresholds,
        },
        lambda x: jump(linear(x * s - b_dec.to(x) * shift, W, b_enc), thresholds),
        lambda f: decoded(f, W_d.T, b_dec) / to,
        about | ({"hook_name_out": a_hook(out, files, name)} if writes else {}),
        apply_b_dec_to_input=shift,
        writes=writes if out else None,
    )  # fmt: skip


def _llama_scale(files: Files, config: dict[str, Any], d: int, end: str = "in") -> float:
    """What rows are multiplied with, at an end; one sentence where it differs from row to row, or f
    is not JumpReLU."""
    name = "hyperparams.json"
    where, norm = files.beside[name], config.get("norm_activation", "dataset-wise")
    if norm not in ("dataset-wise", "inference"):
        raise RetraceError(
            f"{where}: norm_activation: {norm} scales every row by itself, which no f W_dec + "
            f"b_dec gives back; take one with dataset-wise"
        )
    act = config.get("act_fn", "jumprelu")  # of topk a threshold makes a JumpReLU at inference
    if act not in ("jumprelu", "topk") or config.get("use_glu_encoder"):
        said = "use_glu_encoder" if config.get("use_glu_encoder") else f"act_fn '{act}'"
        raise RetraceError(f"{where}: {said} is not read; take a dictionary with jumprelu")
    if norm == "inference":
        return 1.0
    return math.sqrt(d) / positive(config, files, name, "dataset_average_activation_norm", end)


NAMES = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")  # of sparsify


def sparsify(files: Files) -> Original:
    """cfg.json and sae.safetensors of a sparsify SparseCoder, autoencoder or transcoder."""
    found, name = tensors(files.weights), "cfg.json"
    config = read_config(files, name)
    W, b_enc, W_dec, b_dec = take(found, files, "sparsify", *NAMES)
    only(found, files, "sparsify", *NAMES, "W_skip")
    agrees(config, files, name, d_in=W.shape[1], num_latents=len(W))
    W_skip = skip_of(files, found, "W_skip", said=config.get("skip_connection"))
    k, activation = whole(config, files, name, "k"), config.get("activation", "topk")
    if activation != "topk" or config.get("signed"):
        raise RetraceError(
            f"{files.beside[name]}: activation {'signed ' * bool(config.get('signed'))}{activation}"
            f" is none of SAELens's; take a dictionary with topk"
        )
    # Coders of before February 2025 say nothing of it; theirs took b_dec off x, as this key's lack
    # has the library do today.
    transcode = bool(config.get("transcode"))
    writes = transcode if "transcode" in config else True if W_skip is not None else None
    place = re.search(r"(?:layers|h)[._](\d+)(?:[._](\w+))?$", files.weights.parent.name)
    about: dict[str, Any] = {}
    if files.weights.parent.name == "embed_tokens":
        about["hook_name"] = "hook_embed"
    elif place and (not place[2] or place[2] in PARTS):
        at = f"blocks.{place[1]}." + PARTS.get(place[2], "hook_resid_post")
        about = {"hook_name_out": at} if writes or files.transcoder else {"hook_name": at}
    at = files.weights.parent.name
    notes = [f"reads {at}, for which no hook is known here: compare it with yours"]
    return Original(
        "topk",
        {"W_enc": W.T, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}
        | ({} if W_skip is None else {"W_skip": W_skip}),
        lambda x: top(linear(x if transcode else x - b_dec.to(x), W, b_enc), k),
        lambda f: decoded(f, W_dec, b_dec),
        about,
        k=k,
        apply_b_dec_to_input=not transcode,
        writes=writes,
        notes=notes if place and place[2] and place[2] not in PARTS else [],
        **skipping(W_skip),
    )


def openai(files: Files) -> Original:
    """A state_dict of OpenAI's Autoencoder. Its TopK models normalise each row, and are refused.

    A tied one (`TiedTranspose`) names its decoder after the encoder, and holds it once.
    """
    found = tensors(files.weights)
    tied = found.get("decoder.linear.weight")
    if isinstance(tied, Tensor) and tied.ndim == 2:
        found = {k: v for k, v in found.items() if k != "decoder.linear.weight"}
        found.setdefault("encoder.weight", tied)
        found["decoder.weight"] = tied.T
    W, b_enc, W_d, b_dec = take(
        found, files, "openai", "encoder.weight", "latent_bias", "decoder.weight", "pre_bias"
    )
    only(
        found, files, "openai", "encoder.weight", "latent_bias", "decoder.weight", "pre_bias",
        "latents_activation_frequency", "latents_mean_square", "stats_last_nonzero",
    )  # fmt: skip
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
            f"and a dictionary has one output_hook; bring in its folder with layers: cross"
        )
    if config.get("activation") == "topk":
        raise RetraceError(
            f"{files.beside['config.yaml']}: activation topk keeps latents below 0, and a "
            f"dictionary's TopK does not; bring it in as a transcoder of its layer, with layers: "
            f"[its number]"
        )
    W, b_enc, W_dec, b_dec = take(
        found, files, "circuit_tracer", "W_enc", "b_enc", "W_dec", "b_dec"
    )
    skip_of(files, found, "W_skip")
    if "log_thresholds" in found:
        raise RetraceError(
            f"{files.weights}: holds log_thresholds, which circuit-tracer itself does not read; "
            f"take one with activation_function.threshold"
        )
    only(
        found, files, "circuit_tracer", "W_enc", "b_enc", "W_dec", "b_dec", "W_skip",
        "activation_function.threshold",
    )  # fmt: skip
    weights = {"W_enc": W.T, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}
    threshold = found.get("activation_function.threshold")
    own, said = "relu" if threshold is None else "jumprelu", config.get("activation")
    if said in ("relu", "jumprelu") and said != own:
        raise RetraceError(
            f"{files.weights}: is {own} by its tensors, and config.yaml says {said}; correct "
            f"activation there"
        )
    if threshold is not None:
        (threshold,) = take(found, files, "circuit_tracer", "activation_function.threshold")
        weights["threshold"] = per_latent(threshold, len(W))

    def encode(x: Tensor) -> Tensor:
        h = linear(x, W, b_enc)  # its JumpReLU has no ReLU: latents below 0 can pass it
        return torch.relu(h) if threshold is None else h * (h > threshold.to(h))

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
