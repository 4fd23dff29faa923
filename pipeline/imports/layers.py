"""Published transcoders of all layers, a layer at a time, as originals. [torch]

circuit-tracer (Hanna et al. 2025; decoderesearch/circuit-tracer at 4bb8c0e, `load_transcoder_set`
and `load_clt`) has all layers of a set in one folder:

    f_l = act(x_l W_enc_l^T + b_enc_l)
    y_m = sum_{l <= m} f_l W_dec_l[:, m - l] + b_dec_m (+ x_m W_skip_m^T)

| layout | files of layer l | tensors |
| --- | --- | --- |
| each | layer_<l>.safetensors | W_enc [d_sae d], b_enc, W_dec [d_sae d], b_dec, W_skip [d d] |
| cross | W_enc_<l>, W_dec_<l>.safetensors | W_enc_<l>, …, W_dec_<l> [d_sae n_layers-l d] |

act is JumpReLU where the file holds a threshold, else ReLU; in the layout `each` config.yaml may
say TopK and its k. Its JumpReLU is h [h > threshold] and its TopK keeps the k largest h, both
without a ReLU, so that features can be below 0.

Gemma Scope 2 has cross-layer transcoders as well, with a ReLU (gemma_scope.py). In the other
formats each layer is a folder of its own, which formats.py, gemma_scope.py and
saelens.py read; here they may have a skip connection.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.errors import RetraceError
from pipeline.imports import formats, gemma_scope, saelens
from pipeline.imports.original import (
    Files,
    Map,
    Original,
    check_shapes,
    decoded,
    jump,
    linear,
    only,
    per_latent,
    product,
    read_config,
    take,
    tensors,
    whole,
)

CONFIG = "config.yaml"
KINDS = {"each": "transcoder_set", "cross": "cross_layer_transcoder"}  # its model_kind
OF_A_LAYER: dict[str, Callable[[Files], Original]] = {
    "saelens": saelens.saelens,
    "gemma_scope": gemma_scope.gemma_scope,
    "gemma_scope_2": gemma_scope.gemma_scope_2,
    "sparsify": formats.sparsify,
}
ACTIVATIONS = {"transcoder": "relu", "jumprelu_transcoder": "jumprelu", "topk": "topk"}


@dataclass
class Layer:
    """A layer of a set as published.

    Attributes:
        weights: W_enc [d_sae d], b_enc [d_sae], W_dec [d_sae n d] with the n layers from its own
            on that it writes to, b_dec [d] of its own; threshold [d_sae] and W_skip [d d] (out
            first) where it has them; float32.
        activation: relu, jumprelu or topk, with `k`; `signed` where features can be below 0.
        encode: of the original, rows [rows d] -> features.
        write: of the original, (features, rows) -> [rows n d]: what it adds to each layer.
        about: hook_name, hook_name_out and model_name, where known.
    """

    weights: dict[str, Tensor]
    activation: str
    encode: Map
    write: Callable[[Tensor, Tensor], Tensor]
    k: int = 0
    signed: bool = False
    about: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def form(self) -> dict[str, Any]:
        """What all layers of a set have in common."""
        d_sae, d = self.weights["W_enc"].shape
        skip = "W_skip" in self.weights
        return {"d_in": d, "d_sae": d_sae, "activation": self.activation, "k": self.k, "skip": skip}


def read(files: Files, format: str, layers: str, number: int, n_layers: int) -> Layer:
    """One layer of a set.

    Args:
        layers: each, or cross.
        n_layers: of the set.

    Raises:
        RetraceError: a file is damaged, or of another format than said.
    """
    if format == "gemma_scope_2" and layers == "cross":
        return _of_gemma_scope_2(files, number, n_layers)
    if format != "circuit_tracer":
        return of_original(check_shapes(files, OF_A_LAYER[format](files)), files)
    kind = read_config(files, CONFIG).get("model_kind", KINDS[layers])
    if kind != KINDS[layers]:
        said = {v: k for k, v in KINDS.items()}.get(str(kind), "each or cross")
        raise RetraceError(
            f"{files.beside[CONFIG]}: model_kind is {kind}, and layers says {layers}; write "
            f"layers: {said}"
        )
    about = {k: v for k, v in _about(files, number).items() if v}
    found = _listed(files, layers, number, n_layers)
    if found is None and layers == "cross":
        found = _of_clt(files, number, n_layers)
    elif found is None:
        found = _of_set(files, number)
    found.about = about | {k: v for k, v in found.about.items() if v}
    return found


def _listed(files: Files, layers: str, number: int, n_layers: int) -> Layer | None:
    """A layer whose file config.yaml lists, where it is of Gemma Scope; else None."""
    if not read_config(files, CONFIG).get("transcoders"):
        return None
    if files.weights.suffix == ".npz":
        kind = "gemma_scope"
    elif "w_enc" in _names(files):
        kind = "gemma_scope_2"
    elif layers == "cross":
        raise RetraceError(
            f"{files.weights}: is listed as a layer of a cross-layer transcoder and holds no w_enc "
            f"of Gemma Scope 2; name the folder that has W_enc_{number}.safetensors"
        )
    else:
        return None
    if layers == "cross":
        return _of_gemma_scope_2(files, number, n_layers)
    return of_original(check_shapes(files, OF_A_LAYER[kind](files)), files)


def _names(files: Files) -> set[str]:
    """Names of the tensors in a safetensors file, by its header alone."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(files.weights, "pt") as file:
            return set(file.keys())
    except (OSError, SafetensorError):
        return set(tensors(files.weights))  # which says what is wrong


# --- circuit-tracer ------------------------------------------------------------------------


def _of_set(files: Files, number: int) -> Layer:
    """layer_<l>.safetensors."""
    found = tensors(files.weights)
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    W_enc, b_enc, W_dec, b_dec = take(found, files, "circuit_tracer", *names, deep=True)
    at = "activation_function.threshold"
    _no_log_thresholds(found, files)
    only(found, files, "circuit_tracer", *names, "W_skip", at)
    threshold = take(found, files, "circuit_tracer", at)[0] if at in found else None
    skip = take(found, files, "circuit_tracer", "W_skip")[0] if "W_skip" in found else None
    activation, k = _activation(files, found, threshold)
    if W_dec.ndim != 2:
        raise RetraceError(
            f"{files.weights}: W_dec is {tuple(W_dec.shape)}, and a transcoder writes to its own "
            f"layer alone; fetch it again"
        )
    weights = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec[:, None], "b_dec": b_dec}
    weights |= {} if skip is None else {"W_skip": skip}

    def write(f: Tensor, x: Tensor) -> Tensor:
        y = decoded(f, W_dec, b_dec)
        return (y if skip is None else y + x @ skip.T.to(x))[:, None]

    return _layer(files, weights, threshold, activation, k, write)


def _of_clt(files: Files, number: int, n_layers: int) -> Layer:
    """W_enc_<l>.safetensors and W_dec_<l>.safetensors; `load_clt` knows no TopK."""
    found, decoder = tensors(files.weights), f"W_dec_{number}"
    both = found | tensors(files.beside[f"{decoder}.safetensors"])
    names = [f"{name}_{number}" for name in ("W_enc", "b_enc", "b_dec", "W_dec")]
    W_enc, b_enc, b_dec, W_dec = take(both, files, "circuit_tracer", *names, deep=True)
    at = f"threshold_{number}"
    only(both, files, "circuit_tracer", *names, at)
    threshold = take(both, files, "circuit_tracer", at)[0] if at in both else None
    if read_config(files, CONFIG).get("activation") == "topk":
        raise RetraceError(
            f"{files.beside[CONFIG]}: activation topk of a cross-layer transcoder, which "
            f"circuit-tracer itself reads as ReLU; take one with relu or jumprelu"
        )
    wide = (len(b_enc), n_layers - number, len(b_dec))
    if tuple(W_dec.shape) != wide:
        raise RetraceError(
            f"{files.beside[f'{decoder}.safetensors']}: {decoder} is {tuple(W_dec.shape)}, and "
            f"layer {number} of {n_layers} writes {wide}; it is of a model of other layers, or "
            f"activations.hooks has not all of them"
        )
    weights = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}

    def write(f: Tensor, x: Tensor) -> Tensor:
        y = decoded(f, W_dec.flatten(1), torch.zeros(W_dec[0].numel())).unflatten(-1, wide[1:])
        return torch.cat([y[:, :1] + b_dec.to(y), y[:, 1:]], 1)

    return _layer(files, weights, threshold, "relu" if threshold is None else "jumprelu", 0, write)


BACK = 1e-6  # of a decoder's largest number, below which it writes nothing to a layer


def _of_gemma_scope_2(files: Files, number: int, n_layers: int) -> Layer:
    """params_layer_<l>.safetensors; w_dec is over all layers, zero over those before its own."""
    found = gemma_scope.several(files, files.weights, n_layers, "clt")
    W_dec, b_dec, W = found["w_dec"], found["b_dec"], found["w_enc"]
    size = W_dec.abs().max()
    if bool((W_dec[:, :number].abs() > BACK * size).any()):
        raise RetraceError(
            f"{files.weights}: w_dec of layer {number} writes to layers before its own, and a "
            f"cross-layer transcoder writes to later ones alone; it is of another layer, or fetch "
            f"it again"
        )
    W_dec = W_dec[:, number:].contiguous()
    weights = {"W_enc": W.T, "b_enc": found["b_enc"], "W_dec": W_dec, "b_dec": b_dec,
               "threshold": found["threshold"]}  # fmt: skip
    affine = found.get("affine_skip_connection")
    weights |= {} if affine is None else {"W_skip": affine.T}

    def write(f: Tensor, x: Tensor) -> Tensor:
        y = decoded(f, W_dec.flatten(1), torch.zeros(W_dec[0].numel())).unflatten(
            -1, W_dec.shape[1:]
        )
        own = y[:, :1] + b_dec.to(y)
        own = own if affine is None else own + (x @ affine.to(x))[:, None]
        return torch.cat([own, y[:, 1:]], 1)

    _check(files, weights, 0)
    config = read_config(files, "config.json")
    ends = {"hook_name": "hf_hook_point_in", "hook_name_out": "hf_hook_point_out"}
    about = {ours: gemma_scope.hook(config, key, number) for ours, key in ends.items()}
    return Layer(
        weights, "jumprelu", lambda x: jump(product(x, W, found["b_enc"]), found["threshold"]),
        write, about=about | {"model_name": config.get("model_name")},
    )  # fmt: skip


def _activation(files: Files, found: dict, threshold: Tensor | None) -> tuple[str, int]:
    """The activation of a layer, and TopK's k."""
    config = read_config(files, CONFIG)
    said, kept = config.get("activation"), found.get("k")
    own = "relu" if threshold is None else "jumprelu"
    if said == "topk":
        k = whole(config, files, CONFIG, "k")
        if threshold is not None or (kept is not None and int(kept) != k):
            raise RetraceError(
                f"{files.weights}: holds {'a threshold' if kept is None else f'k {int(kept)}'}, "
                f"and config.yaml says topk with k {k}; fetch both again"
            )
        return "topk", k
    if kept is not None or (said in ("relu", "jumprelu") and said != own):
        raise RetraceError(
            f"{files.weights}: is {'topk' if kept is not None else own} by its tensors, and "
            f"config.yaml says {said or 'nothing of it'}; correct activation there"
        )
    return own, 0


def _no_log_thresholds(found: dict, files: Files) -> None:
    if "log_thresholds" in found:
        raise RetraceError(
            f"{files.weights}: holds log_thresholds, which circuit-tracer itself does not read; "
            f"take one with activation_function.threshold"
        )


def _layer(
    files: Files,
    weights: dict[str, Tensor],
    threshold: Tensor | None,
    activation: str,
    k: int,
    write: Callable[[Tensor, Tensor], Tensor],
) -> Layer:
    """A layer whose tensors fit each other, with circuit-tracer's own activation function."""
    W_enc, b_enc = weights["W_enc"], weights["b_enc"]
    if threshold is not None:
        weights = weights | {"threshold": per_latent(threshold, len(b_enc))}
    _check(files, weights, k)

    def encode(x: Float[Tensor, "rows d"]) -> Float[Tensor, "rows d_sae"]:
        h = linear(x, W_enc, b_enc)
        if activation == "topk":
            best = h.topk(k, dim=-1)
            return torch.zeros_like(h).scatter(-1, best.indices, best.values)
        return torch.relu(h) if threshold is None else h * (h > threshold.to(h))

    below = threshold is not None and bool((threshold < 0).any())
    return Layer(weights, activation, encode, write, k, activation == "topk" or below)


def _check(files: Files, weights: dict[str, Tensor], k: int) -> None:
    """Raise where tensors of a layer do not fit each other."""
    W_enc, W_dec = weights["W_enc"], weights["W_dec"]
    if W_enc.ndim != 2:
        raise RetraceError(f"{files.weights}: W_enc is {tuple(W_enc.shape)}, and not [d_sae d]")
    d_sae, d = W_enc.shape
    wanted = {"W_enc": (d_sae, d), "W_dec": (d_sae, W_dec.shape[1], d), "b_dec": (d,)}
    wanted |= {"W_skip": (d, d)}
    for name, tensor in weights.items():
        shape = wanted.get(name, (d_sae,))
        if tuple(tensor.shape) != shape:
            raise RetraceError(
                f"{files.weights}: {name} is {tuple(tensor.shape)} beside an encoder of {d} to "
                f"{d_sae}, and not {shape}; correct format, or fetch it again"
            )
    if k > d_sae:
        raise RetraceError(f"{files.weights}: k {k} is more than its {d_sae} latents")


def _about(files: Files, number: int) -> dict[str, Any]:
    """What config.yaml says of model and hooks."""
    config = read_config(files, CONFIG)
    of = {"hook_name": "feature_input_hook", "hook_name_out": "feature_output_hook"}
    hooks = {k: f"blocks.{number}.{config[v]}" for k, v in of.items() if config.get(v)}
    return {"model_name": config.get("model_name")} | hooks


# --- a folder of each layer ----------------------------------------------------------------


def of_original(original: Original, files: Files) -> Layer:
    """A layer out of a dictionary of its own."""
    kind = ACTIVATIONS.get(original.architecture)
    if kind is None or original.writes is False:
        raise RetraceError(
            f"{files.weights}: is a dictionary of kind {original.architecture} that writes what it "
            f"reads, and no transcoder; name it without layers, under a name of its own"
        )
    own = original.weights
    if original.apply_b_dec_to_input:  # (x - b_dec) W = x W - b_dec W
        off = (own["b_dec"].double() @ own["W_enc"].double()).float()
        own = own | {"b_enc": own["b_enc"] - off}
    weights = {"W_enc": own["W_enc"].T, "b_enc": own["b_enc"], "W_dec": own["W_dec"][:, None]}
    weights |= {n: own[n] for n in ("b_dec", "threshold", "W_skip") if n in own}

    def write(f: Tensor, x: Tensor) -> Tensor:
        y = original.decode(f)
        return (y if original.skip is None else y + original.skip(x))[:, None]

    _check(files, weights, original.k)
    return Layer(
        weights, kind, original.encode, write, original.k, False, original.about, original.notes
    )
