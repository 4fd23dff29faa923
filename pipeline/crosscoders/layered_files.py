"""Transcoders of all layers as files: written, and read back for everything that uses them. [torch]

* Cross-layer: circuit-tracer's layout (safety-research/circuit-tracer, `load_clt`). A layer has
  W_enc_<l>.safetensors with W_enc_<l> [d_sae d], b_enc_<l>, b_dec_<l> and, of JumpReLU,
  threshold_<l>; and W_dec_<l>.safetensors with W_dec_<l> [d_sae n_layers-l d]. Its reader knows
  ReLU and JumpReLU alone: a TopK says so in our cfg.json and nowhere else.
* Of each layer: SAELens's folders layer_<l>, `jumprelu_transcoder` or `jumprelu_skip_transcoder`.
  SAELens has no class for TopK; these are circuit-tracer's transcoder set, layer_<l>.safetensors
  (`load_transcoder_set`, with `activation` and `k` of config.yaml), as are those that others have
  published (transcoders_import.py), which may be of some layers alone.

BatchTopK leaves as JumpReLU, as in SAELens. cfg.json beside the files names the hooks, and
config.yaml is circuit-tracer's. Weights take rows as they are: scales and TopK's decoder norms are
folded into them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.crosscoders.layered import Layered
from pipeline.errors import RetraceError
from pipeline.store import provenance, tables
from pipeline.store.checkpoints import write_tensors

THRESHOLD = "activation_function.threshold"  # circuit-tracer's name in a transcoder set
FOLDER_WEIGHTS = "sae_weights.safetensors"


@dataclass(frozen=True)
class LayerWeights:
    """Transcoders of layers 0 to L - 1, or of L layers that were chosen; for rows as they are.

    Attributes:
        layers: each, or cross.
        hooks, output_hooks: that layer l reads and writes; they say which layers these are.
        W_enc: [d_sae d] of each layer, a row per feature. b_enc: [d_sae] of each.
        W_dec: [d_sae n d] of each layer; n is L - l (cross) or 1.
        b_dec: [L d].
        activation: relu, jumprelu or topk, with `threshold` [d_sae] of each layer or `k`.
        signed: whether TopK and JumpReLU keep values below 0, as circuit-tracer's do: TopK where
            fewer than k are above 0, JumpReLU where a threshold is below 0.
        W_skip: [d d] of each layer, out first: y_hat += x W_skip'; or None.
    """

    layers: str
    hooks: list[str]
    output_hooks: list[str]
    W_enc: list[Tensor]
    b_enc: list[Tensor]
    W_dec: list[Tensor]
    b_dec: Float[Tensor, "layers d"]
    activation: str = "relu"
    threshold: list[Tensor] | None = None
    k: int = 0
    W_skip: list[Tensor] | None = None
    signed: bool = False

    @property
    def n_layers(self) -> int:
        return len(self.W_enc)

    def to(self, device: torch.device | str) -> "LayerWeights":
        """The same on another device."""
        moved = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                moved[name] = value.to(device)
            elif isinstance(value, list) and isinstance(value[0], Tensor):
                moved[name] = [t.to(device) for t in value]
            else:
                moved[name] = value
        return LayerWeights(**moved)

    def pre(self, layer: int, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d_sae"]:
        """Pre-activations of a layer on what its hook shows."""
        return x @ self.W_enc[layer].T + self.b_enc[layer]

    def encode(self, layer: int, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d_sae"]:
        """Features of a layer."""
        p = self.pre(layer, x)
        if self.activation == "jumprelu":
            return (p if self.signed else p.relu()) * (p > self.threshold[layer])
        if self.activation == "topk":
            values, at = p.topk(self.k, dim=-1)
            kept = values if self.signed else values.relu()
            return torch.zeros_like(p).scatter_(-1, at, kept)
        return p.relu()

    def written(self, layer: int) -> range:
        """The layers that a layer's features write to."""
        return range(layer, self.n_layers if self.layers == "cross" else layer + 1)

    def decode(
        self, acts: Sequence[Float[Tensor, "rows d_sae"]], x: Float[Tensor, "rows layers d"]
    ) -> Float[Tensor, "rows layers d"]:
        """What all layers are reconstructed as; x is read by skip connections alone."""
        out = self.b_dec.expand(len(x), -1, -1).clone()
        for layer, f in enumerate(acts):
            span = self.written(layer)
            wide = f @ self.W_dec[layer].flatten(1)
            out[:, span.start : span.stop] += wide.view(len(f), len(span), -1)
        for layer, W_skip in enumerate(self.W_skip or []):
            out[:, layer] += x[:, layer] @ W_skip.T
        return out

    def forward(self, x: Float[Tensor, "rows layers d"]) -> Float[Tensor, "rows layers d"]:
        """Outputs of all layers, each layer fed its true input."""
        return self.decode([self.encode(n, x[:, n]) for n in range(self.n_layers)], x)


# --- out of training -----------------------------------------------------------------------


@torch.no_grad()
def folded(
    model: Layered,
    hooks: list[str],
    output_hooks: list[str],
    scales: Sequence[float],
    target_scales: Sequence[float],
) -> LayerWeights:
    """The weights of trained transcoders, on the CPU, for rows as they are.

    Args:
        scales, target_scales: by which each layer's inputs and outputs were multiplied.
    """
    kind, layers = model.spec.architecture, range(model.n_layers)
    W_enc, b_enc, W_dec, threshold = [], [], [], []
    for n in layers:
        norm = torch.ones(model.d_sae) if kind == "jumprelu" else model.norms(n).cpu()
        over = torch.tensor([target_scales[m] for m in model.spans[n]])
        W_enc.append(model.W_enc[n].cpu() * norm[:, None] * scales[n])
        b_enc.append(model.b_enc[n].cpu() * norm)
        W_dec.append(model.W_dec[n].cpu() / norm[:, None, None] / over[:, None])
        if kind == "batchtopk":
            threshold.append(torch.full((model.d_sae,), float(model.topk_threshold[n])))
        elif kind == "jumprelu":
            threshold.append(model.threshold[n].cpu().clamp(min=0))
    b_dec = torch.stack([b.cpu() / target_scales[n] for n, b in enumerate(model.b_dec)])
    W_skip = [W.cpu() * scales[n] / target_scales[n] for n, W in enumerate(model.W_skip)]
    detached = [[t.detach() for t in ts] for ts in (W_enc, b_enc, W_dec, threshold, W_skip)]
    W_enc, b_enc, W_dec, threshold, W_skip = detached
    return LayerWeights(
        "cross" if model.cross else "each", hooks, output_hooks, W_enc, b_enc, W_dec,
        b_dec.detach(), "topk" if kind == "topk" else "jumprelu", threshold or None,
        model.spec.k if kind == "topk" else 0, W_skip or None,
    )  # fmt: skip


def write(
    folder: Path, weights: LayerWeights, metadata: Sequence[dict[str, Any]], certificate: dict
) -> None:
    """Write a folder that `read_layers` reads.

    Args:
        metadata: of each layer, SAELens's SAEMetadata.
    """
    for n, about in enumerate(metadata):
        if weights.layers == "each" and weights.activation != "topk":
            _write_saelens(folder / f"layer_{n}", weights, n, about, certificate)
            continue
        found = {name: getattr(weights, name)[n] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        found |= {"threshold": weights.threshold[n]} if weights.threshold else {}
        found |= {"W_skip": weights.W_skip[n]} if weights.W_skip else {}
        for name, tensors in layer_files(weights.layers, n, found).items():
            _tensors(folder / name, tensors, certificate)
    write_config(folder, config_of(weights), metadata[0]["model_name"], certificate)


def layer_files(
    layers: str, n: int, found: dict[str, Tensor]
) -> dict[str, dict[str, Float[Tensor, "..."]]]:
    """Name of a file -> its tensors, of layer n in circuit-tracer's layouts.

    Args:
        layers: each, or cross.
        found: under the names of `LayerWeights`; threshold and W_skip where there are some.
    """
    if layers == "each":
        names = {"threshold": THRESHOLD}
        own = {names.get(name, name): tensor for name, tensor in found.items()}
        return {f"layer_{n}.safetensors": own | {"W_dec": found["W_dec"][:, 0]}}
    named = {f"{name}_{n}": tensor for name, tensor in found.items()}
    decoder = {f"W_dec_{n}": named.pop(f"W_dec_{n}")}
    return {f"W_enc_{n}.safetensors": named, f"W_dec_{n}.safetensors": decoder}


def config_of(weights: LayerWeights) -> dict[str, Any]:
    """Our cfg.json beside the files of all layers."""
    config = {
        "architecture": {"cross": "clt", "each": "transcoders"}[weights.layers],
        "layers": weights.layers, "activation": weights.activation, "k": weights.k,
        "hooks": weights.hooks, "output_hooks": weights.output_hooks,
        "n_layers": weights.n_layers, "d_sae": len(weights.b_enc[0]),
        "d_in": weights.b_dec.shape[1], "skip": weights.W_skip is not None,
    }  # fmt: skip
    return config | ({"signed": True} if weights.signed else {})


def write_config(folder: Path, config: dict[str, Any], model: str, certificate: dict) -> None:
    """cfg.json, and circuit-tracer's config.yaml, of a folder of transcoders."""
    tables.write_json(folder / "cfg.json", config, certificate)
    _write_yaml(folder / "config.yaml", config, model)


def _write_saelens(
    folder: Path, weights: LayerWeights, n: int, about: dict[str, Any], certificate: dict
) -> None:
    """A folder that `SAE.load_from_disk` reads."""
    from sae_lens.saes import JumpReLUSkipTranscoderConfig, JumpReLUTranscoderConfig
    from sae_lens.saes.sae import SAEMetadata

    config_class = JumpReLUSkipTranscoderConfig if weights.W_skip else JumpReLUTranscoderConfig
    d_sae, d = weights.W_enc[n].shape
    config = config_class(
        d_in=d, d_sae=d_sae, d_out=d, apply_b_dec_to_input=False, metadata=SAEMetadata(**about)
    )
    found = {"W_enc": weights.W_enc[n].T, "b_enc": weights.b_enc[n], "b_dec": weights.b_dec[n]}
    found |= {"W_dec": weights.W_dec[n][:, 0], "threshold": weights.threshold[n]}
    found |= {"W_skip": weights.W_skip[n]} if weights.W_skip else {}
    _tensors(folder / FOLDER_WEIGHTS, found, certificate)
    kept = json.loads(provenance.canonical(config.to_dict()))  # its order comes from a set
    tables.write_json(folder / "cfg.json", kept, certificate)


def _write_yaml(path: Path, config: dict[str, Any], model: str) -> None:
    """config.yaml of circuit-tracer."""
    import yaml

    kind = {"cross": "cross_layer_transcoder", "each": "transcoder_set"}[config["layers"]]
    about = {
        "model_name": model, "model_kind": kind, "scan": model,
        "feature_input_hook": config["hooks"][0].partition(".")[2].partition(".")[2],
        "feature_output_hook": config["output_hooks"][0].partition(".")[2].partition(".")[2],
        "activation": config["activation"],
    }  # fmt: skip
    about |= {"k": config["k"]} if config["k"] else {}

    def text(to: Path) -> None:
        to.write_text(yaml.safe_dump(about), encoding="utf-8")

    tables.atomically(path, text)


def _tensors(path: Path, found: dict[str, Tensor], certificate: dict) -> None:
    write_tensors(path, {name: t.float().contiguous() for name, t in found.items()})
    tables.stamp_safetensors(path, certificate)


# --- read back -----------------------------------------------------------------------------


def read_layers(folder: str | Path) -> LayerWeights:
    """Transcoders of all layers, cross-layer or one of each, by the files that are there.

    Raises:
        RetraceError: a layer is missing, or layers do not fit each other.
    """
    cross = any(Path(folder).glob("W_enc_*.safetensors"))
    return read_clt(folder) if cross else read_transcoders(folder)


def read_clt(folder: str | Path) -> LayerWeights:
    """A cross-layer transcoder in circuit-tracer's layout, ours or another's.

    Raises:
        RetraceError: as of `read_layers`.
    """
    folder = Path(folder)
    config = _config(folder)
    n_layers = config.get("n_layers") or len(list(folder.glob("W_enc_*.safetensors")))
    found: dict[str, list[Tensor]] = {}
    for n in range(n_layers):
        parts = [_read(folder / f"W_{part}_{n}.safetensors") for part in ("enc", "dec")]
        both = parts[0] | parts[1]
        for name in ("W_enc", "b_enc", "b_dec", "W_dec", "threshold", "W_skip"):
            if f"{name}_{n}" in both:
                found.setdefault(name, []).append(both[f"{name}_{n}"])
    return _layers(folder, config, "cross", found, n_layers)


def read_transcoders(folder: str | Path) -> LayerWeights:
    """A transcoder of each layer: SAELens's folders layer_<l>, or circuit-tracer's set.

    Raises:
        RetraceError: as of `read_layers`.
    """
    folder = Path(folder)
    config = _config(folder)
    n_layers = config.get("n_layers") or len(list(folder.glob("layer_*")))
    found: dict[str, list[Tensor]] = {}
    for n in _numbers(config, n_layers):
        saelens = (folder / f"layer_{n}").is_dir()
        path = f"layer_{n}/{FOLDER_WEIGHTS}" if saelens else f"layer_{n}.safetensors"
        state = _read(folder / path)
        if THRESHOLD in state:
            threshold = state.pop(THRESHOLD)
            state["threshold"] = threshold.expand(len(state["b_enc"])).contiguous()
        if saelens:
            state["W_enc"] = state["W_enc"].T.contiguous()
        state["W_dec"] = state["W_dec"][:, None]
        for name, tensor in state.items():
            found.setdefault(name, []).append(tensor)
    return _layers(folder, config, "each", found, n_layers)


def _numbers(config: dict[str, Any], n_layers: int) -> list[int]:
    """The layers of a set, by what they write; all from 0 on where no list of ours names them."""
    written = config.get("output_hooks")
    if not isinstance(written, list):
        return list(range(n_layers))
    return [int(hook.split(".")[1]) for hook in written]


def _config(folder: Path) -> dict[str, Any]:
    """Ours, or of circuit-tracer's config.yaml what it says of hooks and activation."""
    if (folder / "cfg.json").is_file():
        return tables.read_json(folder / "cfg.json")
    if not (folder / "config.yaml").is_file():
        raise RetraceError(
            f"{folder}: holds neither cfg.json nor config.yaml, which name the hooks; add "
            f"circuit-tracer's config.yaml"
        )
    import yaml

    said = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {}
    of = {"hooks": "feature_input_hook", "output_hooks": "feature_output_hook"}
    kept = {key: said[key] for key in ("activation", "k") if said.get(key)}
    return kept | {key: said[name] for key, name in of.items() if name in said}


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise RetraceError(
            f"{path}: is missing, and every layer is needed; delete the folder of its manifest, "
            f"then run snakemake again"
        )
    try:
        return {name: t.float() for name, t in load_file(path).items()}
    except SafetensorError as e:
        raise RetraceError(f"{path}: cannot be read ({e}); fetch or make it again") from e


def _layers(
    folder: Path, config: dict[str, Any], layers: str, found: dict[str, list], n_layers: int
) -> LayerWeights:
    """The weights, where those of all layers fit each other."""
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        if len(found.get(name, ())) != n_layers or not n_layers:
            raise RetraceError(
                f"{folder}: has {name} of {len(found.get(name, ()))} of {n_layers} layers; fetch "
                f"or make it again"
            )
    for name in ("threshold", "W_skip"):
        if name in found and len(found[name]) != n_layers:
            raise RetraceError(
                f"{folder}: has {name} of {len(found[name])} of {n_layers} layers; layers of two "
                f"sets may lie among these"
            )
    d = found["b_dec"][0].shape[0]
    for n in range(n_layers):
        d_sae, wide = len(found["b_enc"][n]), n_layers - n if layers == "cross" else 1
        shapes = [tuple(found[name][n].shape) for name in ("W_enc", "W_dec", "b_dec")]
        wanted = [(d_sae, d), (d_sae, wide, d), (d,)]
        if shapes != wanted:
            raise RetraceError(
                f"{folder}: layer {n} of {n_layers} has W_enc, W_dec and b_dec of {shapes} and "
                f"not {wanted}; another model's layer may lie among these"
            )
    hooks, outputs = (
        of if isinstance(of, list) else [f"blocks.{n}.{of}" for n in range(n_layers)]
        for of in (config.get("hooks", "mlp.hook_in"), config.get("output_hooks", "hook_mlp_out"))
    )
    activation = "jumprelu" if "threshold" in found else config.get("activation", "relu")
    return LayerWeights(
        layers, hooks, outputs, found["W_enc"], found["b_enc"], found["W_dec"],
        torch.stack(found["b_dec"]), activation, found.get("threshold"),
        int(config.get("k") or 0) if activation == "topk" else 0, found.get("W_skip"),
        bool(config.get("signed")),
    )  # fmt: skip
