"""Transcoders of all layers at once: one of each layer, or a cross-layer transcoder. [torch]

Layer l reads x^l, the input of its MLP, and the outputs y^m of the MLPs are reconstructed:

    f^l     = act(x^l W_enc^l' + b_enc^l)
    y_hat^m = sum over l of f^l W_dec^(l,m) + b_dec^m (+ x^m W_skip^m')

1. `each`: a transcoder a layer, m = l alone (Dunefsky et al. 2024, 2406.11944), with a skip
   connection where asked for (Paulo et al. 2025, 2501.18823). `cross`: a feature of layer l writes
   to layer l and all later ones, m >= l (Ameisen et al. 2025, "Circuit Tracing", cross-layer
   transcoder).
2. Decoder rows of a layer lie side by side over the layers that they write to, [d_sae, n, d], as
   in circuit-tracer's files, so that one sparse product decodes a feature into all of them.
3. The layers are divided among devices. Each device sums what its own layers write to every output,
   and only those sums, [batch, layers, d], travel; the residual travels back. Adam's states never
   leave the device of their layer.
"""

import itertools
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.sae.optimiser import CLIP_NORM, Optimiser
from pipeline.spec.sae import SaeSpec, TranscodersSpec

INIT_NORM = 0.1  # of rows of W_enc, and of a feature's decoder over all layers: SAELens's default


class Layered(nn.Module):
    """Transcoders of `n_layers` layers, to be trained on scaled rows.

    Args:
        spec: architecture, latents a layer, `layers` and `skip`.
        n_layers, d: of the model.
        devices: where layers may lie; the first holds rows, residuals and b_dec.

    Attributes:
        spans: for each layer, the layers that it writes to.
        homes: for each layer, its device.
        W_enc: [d_sae d] of each layer. b_enc: [d_sae] of each.
        W_dec: [d_sae n d] of each layer, n the length of its span.
        b_dec: [d] of each output layer. W_skip: [d d] of each, out first; empty without skip.
        threshold: [d_sae] of each layer (jumprelu).
        topk_threshold: [n_layers], the running mean of the smallest kept score (batchtopk).
    """

    def __init__(
        self,
        spec: TranscodersSpec | SaeSpec,
        n_layers: int,
        d: int,
        devices: Sequence[torch.device | str] = ("cpu",),
    ) -> None:
        super().__init__()
        self.spec, self.n_layers, self.d, self.d_sae = spec, n_layers, d, spec.d_sae
        self.cross = getattr(spec, "layers", "each") == "cross"
        self.spans = [range(i, n_layers if self.cross else i + 1) for i in range(n_layers)]
        self.homes = divided(self.spans, [torch.device(x) for x in devices])
        self.home = torch.device(devices[0])
        rng = torch.Generator().manual_seed(spec.seed)
        enc, dec = [], []
        for span in self.spans:
            enc.append(_directions(rng, spec.d_sae, d))
            dec.append(_directions(rng, spec.d_sae, len(span) * d).view(spec.d_sae, len(span), d))
        if spec.frozen_decoder:
            dec = [W / INIT_NORM for W in dec]
        zeros, first = torch.zeros(spec.d_sae), spec.jumprelu_init_threshold
        self.W_enc = self._placed(enc)
        self.b_enc = self._placed([zeros] * n_layers)
        self.W_dec = self._placed(dec, trained=not spec.frozen_decoder)
        self.b_dec = nn.ParameterList(torch.zeros(d, device=self.home) for _ in self.spans)
        skip, jumps = getattr(spec, "skip", False), spec.architecture == "jumprelu"
        self.W_skip = self._placed([torch.zeros(d, d)] * n_layers if skip else [])
        self.threshold = self._placed([zeros + first] * n_layers if jumps else [])
        started = torch.zeros(n_layers, dtype=torch.float64, device=self.home)
        self.register_buffer("topk_threshold", started)

    def _placed(self, tensors: list[Tensor], trained: bool = True) -> nn.ParameterList:
        """A parameter of each layer, on the layer's device."""
        pairs = zip(tensors, self.homes, strict=False)
        return nn.ParameterList(nn.Parameter(t.to(at, copy=True), trained) for t, at in pairs)

    def norms(self, layer: int) -> Float[Tensor, " d_sae"]:
        """Norm of each feature's decoder, over all layers that it writes to."""
        return self.W_dec[layer].detach().flatten(1).norm(dim=1)

    def split(self, rows: Float[Tensor, "batch both"]) -> tuple[Tensor, Tensor]:
        """Stored rows as inputs and outputs of the layers, each [batch layers d]."""
        x, y = rows.view(len(rows), 2, self.n_layers, self.d).unbind(1)
        return x, y

    def groups(self) -> list[list[nn.Parameter]]:
        """Parameters whose gradients are clipped together: all, or those of one transcoder."""
        lists = (self.W_enc, self.b_enc, self.W_dec, self.b_dec, self.W_skip, self.threshold)
        found = [[p[i] for p in lists if len(p)] for i in range(self.n_layers)]
        return [list(itertools.chain(*found))] if self.cross else found


class LayeredOptimiser(Optimiser):
    """Adam over all layers; each transcoder of a layer is clipped by itself, as if alone."""

    def __init__(self, model: Layered, training) -> None:
        super().__init__(model, training)
        self.groups = model.groups()

    def clip(self) -> None:
        if self.on_gpu and len(self.groups) == 1:
            return super().clip()  # in Adam's own pass
        for group in self.groups:
            given = [p for p in group if p.grad is not None]
            torch.nn.utils.clip_grad_norm_(given, CLIP_NORM)


def divided(spans: Iterable[range], devices: Sequence[torch.device]) -> list[torch.device]:
    """A device for each layer: the widest decoders first, each where least lies so far."""
    load, homes = [0] * len(devices), {}
    for layer, span in sorted(enumerate(spans), key=lambda pair: -len(pair[1])):
        at = load.index(min(load))
        load[at] += 1 + len(span)  # its encoder, and a decoder for each layer it writes to
        homes[layer] = devices[at]
    return [homes[layer] for layer in sorted(homes)]


def _directions(rng: torch.Generator, rows: int, d: int) -> Float[Tensor, "rows d"]:
    """Random rows of norm INIT_NORM."""
    W = torch.randn(rows, d, generator=rng)
    return W.mul_(INIT_NORM / W.norm(dim=1, keepdim=True))
