"""Published crosscoders as originals, their sources side by side. [torch]

CrossCoder and BatchTopKCrossCoder of the forks of dictionary_learning by Minder et al. (2025,
2504.02922; science-of-finetuning/dictionary_learning at 173f7fa), as `save_model` (.pt) or the hub
(model.safetensors) keeps them. With rows x^s of source s, mean m^s and scale c^s of its normalizer:

    z^s = (x^s - m^s) c^s
    f = ReLU(sum_s z^s encoder.weight^s + encoder.bias)
    x_hat^s = (f decoder.weight^s + decoder.bias^s) / (c^s + 1e-8) + m^s

BatchTopK keeps f_j where f_j w_j is above its threshold; w_j is the code normalization: sum_s
|decoder.weight^s_j| (CROSSCODER), the norm of all sources together (SAE), or 1 (NONE).

Mean and scale are folded, so that rows are taken as they are, and latents are theirs.

Crosscoders of Gemma Scope 2 are weakly causal: a latent reads one source and writes to all
(gemma_scope.py). Here their latents stand side by side, W_enc block by block, zero elsewhere.
"""

import re
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.errors import RetraceError
from pipeline.imports import gemma_scope
from pipeline.imports.original import (
    Files,
    Original,
    check_shapes,
    decoded,
    jump,
    only,
    product,
    read_config,
    take,
    tensors,
)

NAMES = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
NORMALIZER = ("activation_mean", "activation_global_scale", "activation_std", "target_rms")
CODES = ("CROSSCODER", "SAE", "MIXED", "NONE", "DECOUPLED")  # by code_normalization_id, from 1
EPS = 1e-8  # that its denormalizer adds to a scale
NEVER = 3e38  # a threshold that nothing passes


def dictionary_learning(files: Files) -> tuple[Original, list[int], list[float]]:
    """The crosscoder, and width and scale of each source.

    Raises:
        RetraceError: the file is damaged, or of another class.
    """
    found = {k.removeprefix("_orig_mod."): t for k, t in tensors(files.weights).items()}
    W, b_enc, W_d, b_dec = take(found, files, "dictionary_learning", *NAMES, deep=True)
    only(found, files, "dictionary_learning", *NAMES, "threshold", *NORMALIZER)
    if W.ndim != 3 or W_d.shape != (W.shape[0], W.shape[2], W.shape[1]):
        raise RetraceError(
            f"{files.weights}: encoder.weight is {tuple(W.shape)} and decoder.weight "
            f"{tuple(W_d.shape)}, and not [sources d d_sae] and [sources d_sae d]; it is no "
            f"crosscoder that reads what it writes, so correct format"
        )
    n, d, d_sae = W.shape
    if b_dec.shape != (n, d) or b_enc.shape != (d_sae,):
        raise RetraceError(
            f"{files.weights}: decoder.bias is {tuple(b_dec.shape)} and encoder.bias "
            f"{tuple(b_enc.shape)}, and not {(n, d)} and {(d_sae,)}; fetch it again"
        )
    mean, scale = _normalizer(found, files, n, d)
    code, notes = _code(found, files)
    over, weighs = None, torch.ones(d_sae)
    if "threshold" in found:
        over, weighs = _threshold(found, files, code), _weighs(W_d, code)

    def encode(x: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_sae"]:
        z = (x.unflatten(-1, (n, d)) - mean.to(x)) * scale.to(x)[:, None]
        f = torch.relu(torch.einsum("bld,ldf->bf", z, W.to(x)) + b_enc.to(x))
        return f if over is None else f * (f * weighs.to(x) > over)

    def decode(f: Float[Tensor, "rows d_sae"]) -> Float[Tensor, "rows d_in"]:
        z = torch.einsum("bf,lfd->bld", f, W_d.to(f)) + b_dec.to(f)
        return (z / (scale.to(f)[:, None] + EPS) + mean.to(f)).flatten(-2)

    weights = folded(W, b_enc, W_d, b_dec, mean, scale)
    if over is not None:
        own = torch.where(weighs > 0, over / weighs, NEVER if over >= 0 else over)
        weights["threshold"] = own.clamp(-NEVER, NEVER)
        notes += ["threshold is as before training: f is ReLU, and its L0 not k"] * (over < 0)
    kept = int(found["k"]) if "k" in found else 0
    original = Original(
        "standard" if over is None else "jumprelu", weights, encode, decode,
        {"model_name": _said(files).get("lm_name"), "trained_k": kept or None}, notes=notes,
    )  # fmt: skip
    return check_shapes(files, original), [d] * n, scale.tolist()


def folded(
    W: Float[Tensor, "n d d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    W_d: Float[Tensor, "n d_sae d"],
    b_dec: Float[Tensor, "n d"],
    mean: Float[Tensor, "n d"],
    scale: Float[Tensor, " n"],
) -> dict[str, Tensor]:
    """SAELens's weights for rows as they are, the sources side by side."""
    c, m = scale.double()[:, None], mean.double()
    shift = torch.einsum("ld,ldf->f", m * c, W.double())
    back = W_d.double() / (c[..., None] + EPS)
    wide = {
        "W_enc": (W.double() * c[..., None]).flatten(0, 1),
        "b_enc": b_enc.double() - shift,
        "W_dec": back.transpose(0, 1).flatten(1),
        "b_dec": (b_dec.double() / (c + EPS) + m).flatten(),
    }
    return {name: t.float().contiguous() for name, t in wide.items()}


def _normalizer(found: dict, files: Files, n: int, d: int) -> tuple[Tensor, Tensor]:
    """Mean [n d] and scale [n]; 0 and 1 where there is none, or it is NaN."""
    none = torch.zeros(n, d), torch.ones(n)
    parts = [found.get(name) for name in ("activation_mean", "activation_std")]
    if any(p is None or bool(p.isnan().any()) for p in parts):
        return none
    mean, scale = take(found, files, "dictionary_learning", *NORMALIZER[:2])
    if mean.shape != (n, d) or scale.shape != (n,) or not bool((scale > 0).all()):
        raise RetraceError(
            f"{files.weights}: its normalizer has a mean of {tuple(mean.shape)} and scales "
            f"{tuple(scale.shape)} for {n} sources of {d}; fetch it again"
        )
    return mean, scale


def _said(files: Files) -> dict[str, Any]:
    """config.json: of a training run under `trainer`, of the hub the arguments of the class."""
    config = read_config(files, "config.json")
    trainer = config.get("trainer", config)
    return trainer if isinstance(trainer, dict) else {}


def _code(found: dict, files: Files) -> tuple[str, list[str]]:
    """The code normalization, and a note where nothing says it.

    Raises:
        RetraceError: the file and config.json differ.
    """
    said = _said(files).get("code_normalization")
    names = {str(said).upper()} if said else set()
    if "code_normalization_id" in found:
        number = int(found["code_normalization_id"])
        names |= {CODES[number - 1] if 0 < number <= len(CODES) else str(number)}
    if not names:
        return CODES[0], ["names no code normalization: read as CROSSCODER, as its library does"]
    if len(names) > 1 or not names <= set(CODES):
        raise RetraceError(
            f"{files.weights}: code normalization is {' and '.join(sorted(names))}, and one of "
            f"{', '.join(CODES)} is meant; fetch it and its config.json again"
        )
    return names.pop(), []


def _threshold(found: dict, files: Files, code: str) -> float:
    """BatchTopK's one threshold."""
    if code in ("MIXED", "DECOUPLED"):
        raise RetraceError(
            f"{files.weights}: code normalization {code} has weights or thresholds of its own for "
            f"each source, which no JumpReLU has; take one of CROSSCODER, SAE or NONE"
        )
    (threshold,) = take(found, files, "dictionary_learning", "threshold")
    if threshold.numel() != 1:
        raise RetraceError(
            f"{files.weights}: threshold has {threshold.numel()} numbers, and code normalization "
            f"{code} one; fetch it again"
        )
    return float(threshold)


def _weighs(W_d: Float[Tensor, "n d_sae d"], code: str) -> Float[Tensor, " d_sae"]:
    """What an activation is multiplied with before it is held against the threshold."""
    if code == "CROSSCODER":
        return W_d.norm(dim=2).sum(0)
    return W_d.norm(dim=(0, 2)) if code == "SAE" else torch.ones(W_d.shape[1])


# --- Gemma Scope 2 -------------------------------------------------------------------------


def gemma_scope_2(files: Files) -> tuple[Original, list[int], list[float]]:
    """params_layer_<i>.safetensors of each source, and config.json.

    Raises:
        RetraceError: a file is damaged, or of another layer or kind.
    """
    every = [files.weights, *(p for n, p in files.beside.items() if n.startswith("params_layer_"))]
    n = len(every)
    parts = [gemma_scope.several(files, path, n, "crosscoder") for path in every]
    d, per = len(parts[0]["b_dec"]), [len(part["b_enc"]) for part in parts]
    if any(len(part["b_dec"]) != d for part in parts):
        raise RetraceError(
            f"{files.weights}: reads rows of {d}, and another layer's file of "
            f"{[len(p['b_dec']) for p in parts]}; the files are of different crosscoders"
        )

    def encode(x: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_sae"]:
        own = x.unflatten(-1, (n, d)).unbind(-2)
        return torch.cat(
            [jump(product(x, p["w_enc"], p["b_enc"]), p["threshold"])
             for x, p in zip(own, parts, strict=True)], -1
        )  # fmt: skip

    def decode(f: Float[Tensor, "rows d_sae"]) -> Float[Tensor, "rows d_in"]:
        wide = [decoded(f, p["w_dec"].flatten(1), torch.zeros(n * d))
                for f, p in zip(f.split(per, -1), parts, strict=True)]  # fmt: skip
        return torch.stack(wide).sum(0) + torch.cat([p["b_dec"] for p in parts]).to(f)

    weights = {
        "W_enc": torch.block_diag(*(p["w_enc"] for p in parts)),
        "W_dec": torch.cat([p["w_dec"].flatten(1) for p in parts]),
        **{name: torch.cat([p[name] for p in parts]) for name in ("b_enc", "b_dec", "threshold")},
    }
    config = read_config(files, "config.json")
    said = re.search(r"\{([\d,]+)\}", str(config.get("hf_hook_point_in")))
    hooks = (
        [gemma_scope.hook(config, "hf_hook_point_in", i) for i in said[1].split(",")]
        if said
        else []
    )
    about = {"model_name": config.get("model_name"), "hooks": hooks}
    original = Original("jumprelu", weights, encode, decode, about)
    return check_shapes(files, original), [d] * n, [1.0] * n


READERS = {"dictionary_learning": dictionary_learning, "gemma_scope_2": gemma_scope_2}
