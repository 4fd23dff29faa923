"""Loss and gradients of one batch of transcoders of all layers, by hand and sparse. [torch]

With B rows, p^l = x^l W_enc^l' + b_enc^l, n^l the norms of the decoders over all layers that they
write to, and r^m = y_hat^m - y^m (crosscoders/layered.py):

1. The loss is sum over m of |r^m|^2 / B, and the pull on an active feature of layer l is sum over
   m of 2 r^m / B W_dec^(l,m)': one product, because r over the span of l lies side by side as the
   decoder does. Only active features are touched (sae/sparse.py).
2. TopK keeps the k largest of p n of each row and layer, BatchTopK the k B of a layer, of a
   cross-layer transcoder the k B L largest over all layers, so that layers share their features as
   they need. n only takes part in the choice. AuxK is that of sae/steps.py, a layer at a time: dead
   features of layer l reconstruct the residual of its span.
3. JumpReLU has the penalty of Ameisen et al. 2025

       l0_coefficient / B sum over l, rows, j of tanh(tanh_scale n_j^l f_j^l)

   which rises linearly over the first `l0_warmup_share` of the steps, and whose gradient reaches
   the decoder by n. Thresholds get pseudo-derivatives (sae/steps_gates.py). Dead features also pay
   pre_act_coefficient / B sum of relu(theta - p) n, which pulls them up. Both are SAELens's terms
   for one layer (JumpReLU, mode tanh).

Devices beyond the first get x and r, and give back sums [batch layers d]; launches are
asynchronous, so that all devices work at the same time.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pipeline.crosscoders.layered import Layered
from pipeline.sae.sparse import Dense, Pull, Scratch, Sparse, largest, product
from pipeline.sae.steps import Outcome
from pipeline.sae.steps_batch import largest_of_all
from pipeline.sae.steps_gates import support_of


@dataclass(frozen=True)
class LayeredOutcome(Outcome):
    """An Outcome, with the squared error of each layer; `l0` is summed over layers."""

    errors: Float[Tensor, " layers"] | None = None


@dataclass
class Part:
    """What a layer does on a batch.

    Attributes:
        support, acts: where features are active, and how much.
        dead: latents that AuxK or the pre-activation loss use, or None.
        p_dead: their pre-activations, of AuxK times norms.
        p: JumpReLU's pre-activations on the support.
        pull: of the decoder's product (sae/sparse.py).
    """

    layer: int
    x: Float[Tensor, "batch d"]
    norm: Float[Tensor, " d_sae"]
    scratch: Scratch
    support: Sparse | Dense = field(init=False)
    acts: Tensor = field(init=False)
    dead: Tensor | None = None
    p_dead: Tensor | None = None
    p: Tensor | None = None
    pull: Pull | None = None


class Memory:
    """A Scratch for each layer; layers of a TopK share one a device, whose scores are read once."""

    def __init__(self, model: Layered, half: bool) -> None:
        shared = model.spec.architecture == "topk"
        kept: dict[Any, Scratch] = {}
        keys = [home if shared else i for i, home in enumerate(model.homes)]
        self.of = [kept.setdefault(key, Scratch(half)) for key in keys]


@torch.no_grad()
def step(
    model: Layered,
    rows: Float[Tensor, "batch both"],
    *,
    dead: Bool[Tensor, " latents"] | None = None,
    share: float = 1.0,
    memory: Memory | None = None,
) -> LayeredOutcome:
    """One batch: sets `.grad` of the parameters, and changes thresholds of BatchTopK alone.

    Args:
        rows: inputs, then outputs of all layers, side by side and scaled.
        dead: which latents are dead, layer after layer; None: none.
        share: of the sparsity coefficient at this step.
    """
    x, y = model.split(rows)
    memory = memory or Memory(model, False)
    parts = _encode(model, x, dead, memory)
    r = _residual(model, parts, x, y)
    errors = r.pow(2).sum((0, 2)) / len(rows)
    d, loss = r * (2 / len(rows)), errors.sum()
    extra, l0, fired = [], [], []
    for part in parts:
        with _on(model.homes[part.layer]):
            added = _gradients(model, part, r, d, share)
            active, counted = part.support.fired(part.acts), part.support.l0_(part.acts)
            extra.append(added)
            fired.append(active)
            l0.append(counted)
    for m, b_dec in enumerate(model.b_dec):
        b_dec.grad = d[:, m].sum(0)
    home = model.home
    total = loss + sum(e.to(home) for e in extra)
    return LayeredOutcome(
        total, errors.sum(), sum(n.to(home) for n in l0), torch.cat([f.to(home) for f in fired]),
        errors,
    )  # fmt: skip


def _on(device: torch.device) -> Any:
    """Kernels of Triton are launched on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _encode(model: Layered, x: Tensor, dead: Tensor | None, memory: Memory) -> list[Part]:
    """Every layer's active features."""
    masks = [None] * model.n_layers if dead is None else dead.view(model.n_layers, -1)
    choose = {"topk": _topk, "batchtopk": _weighed, "jumprelu": _jump}[model.spec.architecture]
    parts, scores = [], []
    for i, home in enumerate(model.homes):
        with _on(home):
            part = Part(i, x[:, i].to(home), model.norms(i), memory.of[i])
            if masks[i] is not None:
                part.dead = masks[i].to(home).nonzero()[:, 0]
            scores.append(choose(model, part))
            parts.append(part)
    if model.spec.architecture == "batchtopk":
        _choose(model, parts, scores)
    return parts


def _weighed(model: Layered, part: Part) -> Float[Tensor, "batch d_sae"]:
    """Pre-activations times norms; those of dead latents are kept for AuxK."""
    W, b = model.W_enc[part.layer].detach(), model.b_enc[part.layer].detach()
    scores = part.scratch.encode(part.x, W.T, b, part.norm)
    if part.dead is not None:
        part.p_dead = scores[:, part.dead].to(part.norm.dtype)
    return scores


def _topk(model: Layered, part: Part) -> None:
    k = model.spec.k
    values, latents = largest(_weighed(model, part), k)
    at = latents.flatten()
    part.acts = values.flatten().to(part.norm.dtype).relu() / part.norm[at]
    rows = torch.arange(len(at), device=at.device) // k
    shape = (len(part.x), model.d_sae)
    part.support = Sparse(at, rows, shape, part.scratch.half, most=k)


def _choose(model: Layered, parts: list[Part], scores: list[Tensor]) -> None:
    """Keep BatchTopK's largest scores: of a layer, or over all layers of a cross-layer one."""
    n = int(model.spec.k * len(parts[0].x))
    if not model.cross or model.n_layers == 1:
        kept = [largest_of_all(s, n) for s in scores]
        least = [s.view(-1)[at] for s, at in zip(scores, kept, strict=True)]
    else:
        kept, least = _largest_over(scores, n * model.n_layers, model.home)
    for part, score, at in zip(parts, scores, kept, strict=True):
        rows = torch.div(at, model.d_sae, rounding_mode="floor")
        values = score.view(-1)[at].to(part.norm.dtype).relu()
        shape = (len(part.x), model.d_sae)
        part.support = Sparse(at - rows * model.d_sae, rows, shape, part.scratch.half)
        part.acts = values / part.norm[part.support.latents]
    _move_thresholds(model, least)


def _largest_over(scores: list[Tensor], n: int, home: torch.device) -> tuple[list, list]:
    """Flat indices in each layer's scores of the n largest of all, and the values of all."""
    found = [largest_of_all(s, min(n, s.numel())) for s in scores]
    values = [s.view(-1)[at] for s, at in zip(scores, found, strict=True)]
    every = torch.cat([v.to(home) for v in values])
    chosen = torch.zeros(len(every), dtype=torch.bool, device=home)
    chosen[every.topk(min(n, len(every)), sorted=False).indices] = True
    masks = chosen.split([len(at) for at in found])
    kept = [at[mask.to(at.device)] for at, mask in zip(found, masks, strict=True)]
    return kept, [every[chosen]] * len(scores)


def _move_thresholds(model: Layered, kept: list[Tensor]) -> None:
    """Move the running means of the smallest positive kept scores, as sae/steps_batch.py."""
    means = model.topk_threshold
    for i, values in enumerate(kept):
        smallest = values.masked_fill(values <= 0, torch.inf).min().to(means)
        moved = torch.lerp(means[i], smallest, model.spec.topk_threshold_lr)
        means[i] = torch.where(smallest.isfinite(), moved, means[i])


def _jump(model: Layered, part: Part) -> None:
    i = part.layer
    theta = model.threshold[i].data.clamp_(min=0)
    p = part.scratch.encode(part.x, model.W_enc[i].detach().T, model.b_enc[i].detach())
    if part.dead is not None:
        part.p_dead = p[:, part.dead].to(theta.dtype)
    width = model.spec.jumprelu_bandwidth
    part.support, pick = support_of(p > theta - width / 2, part.scratch, part.x.dtype)
    part.p = pick(p)
    part.acts = part.p * (part.p > part.support.spread(theta))


def _residual(model: Layered, parts: list[Part], x: Tensor, y: Tensor) -> Tensor:
    """y_hat - y, [batch layers d], on the first device."""
    sums: dict[torch.device, Any] = dict.fromkeys(model.homes)
    batch = len(y)
    for part in parts:
        home, span = model.homes[part.layer], model.spans[part.layer]
        with _on(home):
            W_dec = model.W_dec[part.layer].detach().flatten(1)
            decoded, part.pull = part.support.decode(part.acts, W_dec)
            if sums[home] is None:
                sums[home] = decoded.new_zeros(batch, model.n_layers, model.d)
            sums[home][:, span.start : span.stop] += decoded.view(batch, len(span), model.d)
            if len(model.W_skip):
                sums[home][:, part.layer] += part.x @ model.W_skip[part.layer].detach().T
    b_dec = torch.stack([b.detach() for b in model.b_dec])
    return sum(s.to(model.home) for s in sums.values()) + b_dec - y


def _gradients(model: Layered, part: Part, r: Tensor, d: Tensor, share: float) -> Tensor:
    """Set the gradients of a layer; what its penalties add to the loss."""
    i, span, home = part.layer, model.spans[part.layer], model.homes[part.layer]
    own = slice(span.start, span.stop)
    d_span = d[:, own].flatten(1).to(home)
    grads = Grads(model, part, d_span)
    if part.p is not None:
        added = _jump_gradients(model, part, grads, share)
        if part.dead is not None:
            added = added + _pre_act(model, part, grads)
    else:
        grads.finish(part.pull(d_span, None), part.acts)
        added = d_span.new_zeros(())
        if part.dead is not None and model.spec.aux_loss_coefficient and len(part.dead):
            added = _auxk(model, part, grads, r[:, own].flatten(1).to(home))
    model.W_enc[i].grad, model.b_enc[i].grad = grads.W_enc, grads.b_enc
    if grads.W_dec is not None:
        model.W_dec[i].grad = grads.W_dec.view_as(model.W_dec[i])
    if len(model.W_skip):
        model.W_skip[i].grad = d[:, i].to(home).T @ part.x
    return added


class Grads:
    """Gradients of one layer, to which penalties are added.

    Attributes:
        W_enc: [d_sae d]. b_enc: [d_sae].
        W_dec: [d_sae n*d]; None where the decoder is frozen.
    """

    def __init__(self, model: Layered, part: Part, d_span: Tensor) -> None:
        self.part, self.d_span = part, d_span
        trained = model.W_dec[part.layer].requires_grad
        self.W_dec = part.support.gather(part.acts, d_span) if trained else None

    def finish(self, g: Tensor, acts: Tensor) -> None:
        """Pass g, the gradient in activations on the support, through relu to the encoder."""
        self.encoder(torch.ops.aten.threshold_backward(g, acts, 0))

    def encoder(self, g: Tensor) -> None:
        self.W_enc = self.part.support.gather(g, self.part.x)
        self.b_enc = self.part.support.total(g)

    def add_dead(self, acts: Tensor | None, g: Tensor, d: Tensor | None) -> None:
        """Add a dense term over the dead latents: their activations, and g in these."""
        at, cast = self.part.dead, self.part.scratch.cast
        if self.W_dec is not None and acts is not None:
            self.W_dec[at] += product(cast(acts).T, cast(d))
        self.W_enc[at] += product(cast(g).T, cast(self.part.x))
        self.b_enc[at] += g.sum(0)


def _jump_gradients(model: Layered, part: Part, grads: Grads, share: float) -> Tensor:
    """JumpReLU and its tanh penalty."""
    spec, support, i = model.spec, part.support, part.layer
    width, batch = spec.jumprelu_bandwidth, len(part.x)
    lam = spec.l0_coefficient * share / batch
    theta = model.threshold[i].detach()
    above = part.p - support.spread(theta)
    near = (above > -width / 2) & (above < width / 2)
    c_n = support.spread(part.norm * spec.tanh_scale)
    t = torch.tanh(c_n * part.acts)
    slope = lam * (1 - t * t)
    g = part.pull(grads.d_span, None) + slope * c_n
    pseudo = g * support.spread(theta) * near / width
    model.threshold[i].grad = -support.total(pseudo).to(theta.dtype)
    g = g * (above > 0)
    grads.encoder(g + pseudo if spec.jumprelu_ste_to_input else g)
    if grads.W_dec is not None:
        along = support.total(slope * part.acts) * spec.tanh_scale / part.norm
        grads.W_dec.addcmul_(model.W_dec[i].detach().flatten(1), along[:, None])
    return t.sum() * lam


def _pre_act(model: Layered, part: Part, grads: Grads) -> Tensor:
    """The pre-activation loss of dead latents."""
    at, weight = part.dead, model.spec.pre_act_coefficient / len(part.x)
    if not weight or not len(at):
        return part.norm.new_zeros(())
    n = part.norm[at] * weight
    below = (model.threshold[part.layer].detach()[at] - part.p_dead).relu()
    g = (below > 0) * -n
    grads.add_dead(None, g, None)
    model.threshold[part.layer].grad[at] -= g.sum(0)
    if grads.W_dec is not None:  # n is a norm of the decoder
        along = below.sum(0) * weight / part.norm[at]
        grads.W_dec[at] += model.W_dec[part.layer].detach().flatten(1)[at] * along[:, None]
    return (below * n).sum()


def _auxk(model: Layered, part: Part, grads: Grads, r: Tensor) -> Tensor:
    """AuxK of a layer's dead latents (sae/steps.py)."""
    at, k_aux, cast = part.dead, model.d // 2, part.scratch.cast
    weight = model.spec.aux_loss_coefficient * min(1.0, len(at) / k_aux) / len(r)
    acts, kept = part.p_dead, None
    if len(at) > k_aux:
        kept = torch.zeros_like(acts).scatter_(1, largest(acts, k_aux)[1], 1.0)
        acts = acts * kept
    acts = acts / part.norm[at]
    W_dec = cast(model.W_dec[part.layer].detach().flatten(1)[at])
    error = r + product(cast(acts), W_dec)
    d = error * (2 * weight)
    g = product(cast(d), W_dec.T)
    grads.add_dead(acts, g if kept is None else g * kept, d)
    return error.pow(2).sum() * weight


def penalty_share(spec: Any, step: int, n_steps: int) -> float:
    """The share of l0_coefficient at a step, counted from 0."""
    rising = math.ceil(getattr(spec, "l0_warmup_share", 0.0) * n_steps)
    return min(1.0, (step + 1) / rising) if rising else 1.0
