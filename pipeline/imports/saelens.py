"""Folders of SAELens, and its list of what others have published, as originals. [torch]

1. `listed` looks up a release and an id in the pretrained_saes.yaml of the installed SAELens: the
   repository, the path in it, the format, and the factor of the norm.
2. `saelens` reads a folder by `SAE.load_from_disk`. Two settings are folded into the weights by
   SAELens's own methods: a factor of the norm (`expected_average_only_in`), and decoder norms that
   choose among TopK's latents (`rescale_acts_by_decoder_norm`), under which x_hat is not
   f W_dec + b_dec. Norms of each row (`layer_norm`, `constant_norm_rescale`) cannot be folded.
"""

import copy
import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
import yaml
from jaxtyping import Float
from torch import Tensor

from pipeline.errors import RetraceError, nearest
from pipeline.imports.original import (
    Files,
    Original,
    a_hook,
    of_module,
    read_config,
    setting,
    skip_of,
    skipping,
    take,
    tensors,
)

KNOWN = ("standard", "gated", "topk", "jumprelu", "matching_pursuit", "transcoder",
         "jumprelu_transcoder", "skip_transcoder", "jumprelu_skip_transcoder")  # fmt: skip
PURSUIT = ("residual_threshold", "max_iterations", "stop_on_duplicate_support")
HOOKS = ("hook_name", "hook_name_out")
BY_ROW = ("layer_norm", "constant_norm_rescale")
FOLDED = ("none", "expected_average_only_in")
# SAELens's readers of other formats, by the names of its list -> ours.
CONVERSIONS = {
    None: "saelens",
    "gemma_2": "gemma_scope",
    "gemma_2_transcoder": "gemma_scope",
    "gemma_3": "gemma_scope_2",
    "llama_scope": "llama_scope",
    "dictionary_learning_1": "dictionary_learning",
    "sparsify": "sparsify",
    "mwhanna_transcoder": "circuit_tracer",
    "qwen_scope": "qwen_scope",
    "llama_scope_r1_distill": "llama_scope_r1_distill",
    "goodfire": "goodfire",
    "deepseek_r1": "deepseek_r1",
    "connor_rob_hook_z": "connor_rob_hook_z",
}
# Readers without a format, and why.
UNREAD = {
    "temporal": "a latent of a token depends on the tokens before it, and a dictionary here reads "
    "one row",
    "mntss_clt_layer_transcoder": "sums a cross-layer transcoder's decoders, which is no "
    "reconstruction; bring in its repository with format: circuit_tracer and layers: cross",
}
ABOUT = ("model_name", "hook_name", "hook_name_out", "context_size", "prepend_bos", "dataset_path",
         "exclude_special_tokens", "seqpos_slice", "model_from_pretrained_kwargs",
         "sae_lens_version")  # fmt: skip


class Listed(NamedTuple):
    """An entry of SAELens's list."""

    repo: str
    path: str
    format: str
    about: dict[str, Any]
    factor: float


def listed(release: str, id: str) -> Listed:
    """What SAELens's list says of a dictionary; one sentence where it does not know it."""
    found = _list()
    version = importlib.metadata.version("sae-lens")
    if release not in found:
        raise RetraceError(
            f"release '{release}'{nearest(release, found)} is not in the list of sae-lens {version}"
        )
    entries = {str(entry["id"]): entry for entry in found[release]["saes"]}
    if id not in entries:
        raise RetraceError(
            f"release '{release}': no id '{id}'{nearest(id, entries)} in the list of sae-lens "
            f"{version}; it has {len(entries)}, such as {next(iter(entries))}"
        )
    conversion = found[release].get("conversion_func")
    if conversion not in CONVERSIONS:
        why = UNREAD.get(conversion, "there is no format of that kind here")
        raise RetraceError(
            f"release '{release}': SAELens converts it by '{conversion}', which is not read: {why}"
        )
    about = {"model_name": found[release]["model"], "sae_lens_list": version}
    over = found[release].get("config_overrides") or {}
    if other := sorted(set(over) - set(ABOUT)):
        raise RetraceError(
            f"release '{release}': the list of sae-lens {version} sets {other[0]}: "
            f"{over[other[0]]}, which is no part of f W_dec + b_dec; take another release"
        )
    about |= over
    entry = entries[id]
    return Listed(
        found[release]["repo_id"],
        str(entry["path"]),
        CONVERSIONS[conversion],
        about,
        float(entry.get("norm_scaling_factor") or 0),
    )


@cache
def _list() -> dict[str, Any]:
    path = importlib.metadata.distribution("sae-lens").locate_file("sae_lens/pretrained_saes.yaml")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(path.read_text(encoding="utf-8"), Loader=loader)


def saelens(files: Files) -> Original:
    """cfg.json and sae_weights.safetensors, of any version from 3 to 6."""
    from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting

    name = "cfg.json"
    raw = read_config(files, name)
    setting(raw, files, name, "d_in")
    try:
        config = handle_config_defaulting(dict(raw))
    except Exception as e:  # of the registry and of its dataclasses
        raise RetraceError(
            f"{files.beside[name]}: SAELens cannot read it ({e}); correct format"
        ) from e
    check_config(files, raw, config)
    found = tensors(files.weights)
    for part in found:
        take(found, files, "saelens", part, deep=True)
    scaling = found.get("scaling_factor")
    if scaling is not None and not torch.allclose(scaling, torch.ones_like(scaling)):
        raise RetraceError(
            f"{files.weights}: its scaling_factor is not 1, and is no part of SAELens 6; take one "
            f"without"
        )
    W_skip = skip_of(files, found, "W_skip")
    for part in ("W_dec", "b_dec"):
        if part not in found:
            raise RetraceError(
                f"{files.weights}: holds no {part} (a decoder); take a file that is whole"
            )
    scale = files.factor if config["normalize_activations"] != "none" else 1.0
    sae = load(files)
    plain = fold(copy.deepcopy(sae), scale) if scale != 1 or rescaled(sae) else sae
    weights = {k: v for k, v in plain.state_dict().items() if k != "W_skip" or W_skip is not None}
    meta = _metadata(raw, config, files)
    ends = {key: meta[key] for key in HOOKS if meta.get(key)}
    named = {key: hook if "hook_" in hook else of_module(hook) for key, hook in ends.items()}
    meta |= named
    return Original(
        plain.cfg.architecture().replace("skip_", ""),
        weights,
        lambda x: encode(sae, x * scale),
        lambda f: decode(sae, f) / scale,
        {key: meta[key] for key in ABOUT if meta.get(key) is not None}
        | ({"norm_scaling_factor": scale} if scale != 1 else {}),
        k=int(getattr(plain.cfg, "k", 0)),
        settings={key: getattr(plain.cfg, key) for key in PURSUIT if hasattr(plain.cfg, key)},
        apply_b_dec_to_input=bool(plain.cfg.apply_b_dec_to_input),
        writes="transcoder" in plain.cfg.architecture() if meta.get("hook_name") else None,
        notes=[
            f"reads {ends[key]}, for which no hook is known here: compare it with yours"
            for key, hook in named.items()
            if hook is None
        ],
        **skipping(W_skip),
    )


def _metadata(raw: dict[str, Any], config: dict[str, Any], files: Files) -> dict[str, Any]:
    """What is said of the stream; a hook of SAELens 3 may leave its layer to another key."""
    meta = dict(config.get("metadata") or {})
    layer = raw.get("hook_point_layer", raw.get("hook_layer"))
    for key in HOOKS:
        if meta.get(key) is not None:
            said = a_hook(meta[key], files, "cfg.json")
            meta[key] = said.replace("{layer}", str(layer)) if isinstance(layer, int) else said
    return meta


def check_config(files: Files, raw: dict[str, Any], config: dict[str, Any]) -> None:
    """Raise for what the weights alone, in SAELens 6, would not say."""
    where, kind = files.beside["cfg.json"], config["architecture"]
    if kind not in KNOWN:
        raise RetraceError(
            f"{where}: architecture '{kind}'{nearest(kind, KNOWN)} is not read; those that are: "
            f"{', '.join(KNOWN)}"
        )
    activation = raw.get("activation_fn") or raw.get("activation_fn_str") or "relu"
    if "topk" in (kind, activation) and not config.get("k"):
        raise RetraceError(
            f"{where}: has no k, and SAELens would take a default; take a folder that is whole"
        )
    if kind == "topk" and (type(k := config["k"]) is not int or k < 1):
        raise RetraceError(f"{where}: k is {k!r}, and not a whole number above 0; fetch it again")
    if not isinstance(taken := config.get("apply_b_dec_to_input", True), bool):
        raise RetraceError(
            f"{where}: apply_b_dec_to_input is {taken!r}, and true or false is meant; fetch it "
            f"again"
        )
    normalize = config.get("normalize_activations", "none")
    if normalize not in FOLDED:
        by_row = "scales every row by itself, which no f W_dec + b_dec gives back"
        why = by_row if normalize in BY_ROW else "needs what its folder does not hold"
        raise RetraceError(
            f"{where}: normalize_activations: {normalize} {why}; take a dictionary with one of "
            f"{', '.join(FOLDED)}"
        )
    if normalize != "none" and kind == "matching_pursuit":
        raise RetraceError(
            f"{where}: normalize_activations: {normalize} of matching pursuit, whose latents are "
            f"chosen by W_dec itself, which cannot take the factor up; take one with none"
        )
    if normalize != "none" and not files.factor:
        raise RetraceError(
            f"{where}: normalize_activations: {normalize} needs norm_scaling_factor: sqrt(d_in) "
            f"over the mean norm of the rows that it was trained on"
        )
    if normalize != "none" and "transcoder" in kind:
        raise RetraceError(
            f"{where}: normalize_activations: {normalize} of a transcoder says nothing of the rows "
            f"that it writes; take one with none"
        )
    if activation not in ("relu", "topk") or (raw.get("activation_fn_kwargs") or {}).get("signed"):
        raise RetraceError(
            f"{where}: activation_fn '{activation}' is none of SAELens 6's, which would take ReLU; "
            f"take a dictionary with relu or topk"
        )
    if (config.get("metadata") or {}).get("hook_head_index") is not None:
        raise RetraceError(
            f"{where}: reads one head alone, and a hook here is all heads of a layer"
        )
    if raw.get("finetuning_scaling_factor"):
        raise RetraceError(
            f"{where}: finetuning_scaling_factor is no part of SAELens 6; take one without"
        )


def load(files: Files) -> Any:
    """SAELens's own object, on rows of all heads side by side."""
    from sae_lens import SAE

    folder = files.weights.parent
    try:
        sae = SAE.load_from_disk(str(folder), device="cpu", dtype="float32")
    except Exception as e:  # SAELens raises what its readers raise
        lines = [line.strip() for line in str(e).splitlines() if line.strip()]
        said = (lines[1:] or lines or [type(e).__name__])[0][:200]  # the first names a class alone
        raise RetraceError(
            f"{folder}: SAELens cannot read it ({said.rstrip('.')}); correct format, or fetch it "
            f"again"
        ) from e
    sae.turn_off_forward_pass_hook_z_reshaping()
    return sae.eval().requires_grad_(False)


def encode(sae: Any, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_sae"]:
    """Latents of rows x, in the dtype of x: float32 or float64."""
    if x.dtype == torch.float32:
        return sae.encode(x)
    spared = "" if rescaled(sae) or "W_enc" not in dict(sae.named_parameters()) else "W_dec"
    with in_float64(sae, spared):
        return sae.encode(x.double())


def decode(sae: Any, f: Float[Tensor, "*rows d_sae"]) -> Float[Tensor, "*rows d_out"]:
    """Rows of latents f, in the dtype of f: float32 or float64."""
    if f.dtype == torch.float32:
        return sae.decode(f)
    with in_float64(sae, "W_enc"):
        return sae.decode(f.double())


@contextmanager
def in_float64(sae: Any, spared: str) -> Iterator[None]:
    """Inside: all parameters but one, which is not needed, are float64."""
    before, dtype = {n: p.data for n, p in sae.named_parameters() if n != spared}, sae.dtype
    try:
        for name, data in before.items():
            getattr(sae, name).data = data.double()
        sae.dtype = torch.float64
        yield
    finally:
        for name, data in before.items():
            getattr(sae, name).data = data
        sae.dtype = dtype


def rescaled(sae: Any) -> bool:
    """Whether decoder norms choose among TopK's latents."""
    return bool(getattr(sae.cfg, "rescale_acts_by_decoder_norm", False))


@torch.no_grad()
def fold(sae: Any, scale: float) -> Any:
    """A dictionary on rows as they are, whose x_hat is f W_dec + b_dec; changed in place."""
    if rescaled(sae):
        sae.fold_W_dec_norm()
        sae.cfg.rescale_acts_by_decoder_norm = False
    if scale != 1:
        sae.fold_activation_norm_scaling_factor(scale)
    return sae
