"""Dictionaries of all layers in one form: transcoders, skip and cross-layer ones. [torch]

    f_l = act(x_l W_enc_l^T + b_enc_l)                                  features of layer l
    y_m = sum_{l <= m} f_l W_dec_l[:, m - l] + b_dec_m (+ x_m W_skip_m^T)     what layer m writes

Per-layer transcoders (Dunefsky et al. 2024, 2406.11944) write their own layer only, skip
transcoders (Paulo et al. 2025, 2501.18823) add a linear map of what they read, and a cross-layer
transcoder (Ameisen et al. 2025) writes every later layer, too.

1. `Dictionaries` holds the weights; `LayerWeights` of crosscoders/ has the same attributes.
2. `from_saes` takes SAELens's transcoders, one per layer; `from_layers` what crosscoders/ reads.
3. `check` holds them against the model: none missing, hooks that are there, the model's width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from pipeline.errors import RetraceError
from pipeline.models import hooks, modules

READS = ("hook_resid_mid", "ln2.hook_normalized", "mlp.hook_in", "hook_resid_pre",
         "ln1.hook_normalized")  # fmt: skip
WRITES = "hook_mlp_out"


@dataclass(frozen=True)
class Dictionaries:
    """Weights of the dictionaries of every layer.

    Attributes:
        hooks, output_hooks: what each layer's dictionary reads and writes.
        W_enc: of each layer [d_sae d_in]; b_enc [d_sae].
        W_dec: of each layer [d_sae n_out d_model], n_out layers from its own on.
        b_dec: [n_layers d_model].
        encoders: of each layer, rows x -> features.
        W_skip: of each layer [d_model d_in], or None.
        skip_first: positions at the start that they were not trained on.
    """

    hooks: list[str]
    output_hooks: list[str]
    W_enc: list[Tensor]
    b_enc: list[Tensor]
    W_dec: list[Tensor]
    b_dec: Float[Tensor, "n_layers d_model"]
    encoders: list[Callable[[Tensor], Tensor]]
    W_skip: list[Tensor] | None = None
    skip_first: int = 0

    @property
    def n_layers(self) -> int:
        return len(self.hooks)

    @property
    def cross(self) -> bool:
        """Whether features write into later layers as well."""
        return any(w.shape[1] > 1 for w in self.W_dec)

    def known(self, n_pos: int) -> Float[Tensor, "pos 1"]:
        """1 at positions that the dictionaries were trained on, 0 below skip_first."""
        known = torch.ones(n_pos, 1, device=self.b_dec.device, dtype=self.b_dec.dtype)
        known[: self.skip_first] = 0
        return known

    def encode(
        self, layer: int, x: Float[Tensor, "*batch pos d_in"]
    ) -> Float[Tensor, "*batch pos d_sae"]:
        """Features of what a layer's dictionary reads; none at positions below skip_first."""
        return self.encoders[layer](x) * self.known(x.shape[-2])

    def decode(
        self, layer: int, f: Float[Tensor, "*batch pos d_sae"]
    ) -> Float[Tensor, "n_out *batch pos d_model"]:
        """What features of a layer write into their own layer and those behind it."""
        used = f.flatten(0, -2).count_nonzero(0).nonzero()[:, 0]  # few are active
        return torch.einsum("...f,fod->o...d", f[..., used], self.W_dec[layer][used])

    def rest(
        self, layer: int, x: Float[Tensor, "*batch pos d_in"]
    ) -> Float[Tensor, "*batch pos d_model"]:
        """What a layer writes beside its features: b_dec, and x W_skip^T."""
        y = self.b_dec[layer].expand(*x.shape[:-1], -1)
        y = y if self.W_skip is None else y + x @ self.W_skip[layer].T
        return y * self.known(x.shape[-2])

    def rows(
        self, layer: int, numbers: Int64[Tensor, " n"], out: int
    ) -> Float[Tensor, "n d_model"]:
        """Decoder rows of features of a layer into the layer `out`."""
        return self.W_dec[layer][numbers, out - layer]


# --- out of what is stored -----------------------------------------------------------------


def from_saes(
    saes: list[Any], manifests: list[dict[str, Any]], skip_first: int = 0
) -> Dictionaries:
    """SAELens's transcoders, one per layer, in the order of layers.

    Args:
        saes: read by `SAE.load_from_disk`.
        manifests: of the job of each, with its hook and output_hook.
    """
    skip = [getattr(sae, "W_skip", None) for sae in saes]
    return Dictionaries(
        hooks=[m["hook"] for m in manifests],
        output_hooks=[m.get("output_hook") or m["hook"] for m in manifests],
        W_enc=[sae.W_enc.T for sae in saes],
        b_enc=[sae.b_enc for sae in saes],
        W_dec=[sae.W_dec[:, None] for sae in saes],
        b_dec=torch.stack([sae.b_dec for sae in saes]),
        encoders=[sae.encode for sae in saes],
        W_skip=None if skip[0] is None else skip,
        skip_first=skip_first,
    )


def from_layers(weights: Any, skip_first: int = 0) -> Dictionaries:
    """A set that crosscoders/ has read.

    Args:
        weights: LayerWeights: activation relu, jumprelu or topk, threshold and k beside them.
    """

    def encoder(layer: int) -> Callable[[Tensor], Tensor]:
        return lambda x: weights.encode(layer, x)

    return Dictionaries(
        hooks=list(weights.hooks),
        output_hooks=list(weights.output_hooks),
        W_enc=list(weights.W_enc),
        b_enc=list(weights.b_enc),
        W_dec=list(weights.W_dec),
        b_dec=weights.b_dec,
        encoders=[encoder(layer) for layer in range(len(weights.hooks))],
        W_skip=weights.W_skip,
        skip_first=skip_first,
    )


# --- against the model ---------------------------------------------------------------------


def check(hf: nn.Module, found: Dictionaries, name: str) -> None:
    """Hold dictionaries against a model.

    Raises:
        RetraceError: a layer is missing or stands twice, a hook is none that can be traced, or
            they are another model's.
    """
    n_layers, d_model = len(modules.layers_of(hf)), hf.config.hidden_size
    layers = [int(h.split(".")[1]) for h in found.output_hooks]
    if missing := sorted(set(range(n_layers)) - set(layers)):
        raise RetraceError(
            f"graphs.dictionaries: '{name}' has no dictionary of layer "
            f"{', '.join(map(str, missing))} of the model's {n_layers}; train one for every layer"
        )
    if layers != list(range(n_layers)):
        raise RetraceError(
            f"graphs.dictionaries: '{name}' has layers {', '.join(map(str, layers))}, the model "
            f"{n_layers}: they are another model's; name those that were trained on this one"
        )
    for layer, (read, written) in enumerate(zip(found.hooks, found.output_hooks, strict=True)):
        at = f"blocks.{layer}."
        if not read.startswith(at) or read.removeprefix(at) not in READS:
            raise RetraceError(
                f"graphs.dictionaries: '{name}' reads {read} for layer {layer}, which cannot be "
                f"traced; train on one of {', '.join(READS)} of that layer"
            )
        if written != at + WRITES:
            raise RetraceError(
                f"graphs.dictionaries: '{name}' writes {written}; what is replaced is {at}{WRITES}"
            )
        hooks.check(hf, read)
        hooks.check(hf, written)
        widths = {found.W_enc[layer].shape[1], found.W_dec[layer].shape[2]}
        if widths != {d_model}:
            raise RetraceError(
                f"graphs.dictionaries: '{name}' has rows of {', '.join(map(str, sorted(widths)))} "
                f"numbers at layer {layer}, the model of {d_model}: they are another model's; name "
                f"those that were trained on this one"
            )
