"""Circuits of latents: mean ablation of all nodes outside them, and edges between nodes. [torch]

After Marks et al. 2024 (2403.19647, Sec. 3 and App. A.1), on the sites of sites.py and the units of
units.py.

1. `Ablation` runs the model with every node outside a circuit set to its mean over prompts. At each
   site in turn, x is split into latents and error, nodes of the circuit keep their values, and the
   others get their means. With m averaged over prompts,

       faithfulness(C) = (m(C) - m(none)) / (m(all) - m(none)) completeness(C) = faithfulness(all
       but C)          (as in the paper; small if C misses little)

2. `edges` gives the effect of node u on m through node v alone,

       (u' - u) . dv/du . dm/dv,

   with dm/dv as for the effects of v, and dv/du on the base run along paths that pass through no
   other site, whose values are constants. The effect on the logits uses dm/du in the same way.

Prompts have one template and length, so that a position means the same in all of them.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.errors import RetraceError
from pipeline.latents.sites import Sites
from pipeline.latents.units import ERROR, Latent, Units
from pipeline.models import hooks, splice
from pipeline.models.rerun import pieces

Circuit = frozenset[Latent]


class Ablation:
    """Runs circuits on the base prompts of some sites.

    Attributes:
        mean: hook -> (mean f [pos units], mean e [pos d]) over both prompts of all pairs.
    """

    def __init__(self, sites: Sites, units: dict[str, Units]) -> None:
        self.sites, self.units = sites, units
        end = sites.task.pairs.end
        if (end != end[0]).any():
            raise RetraceError(
                f"prompts: {int(end.min()) + 1} to {int(end.max()) + 1} tokens long; means by "
                f"position need prompts of one length"
            )
        self.mean = {}
        for hook, unit in units.items():
            parts = unit.split(torch.cat([sites.base[hook], sites.source[hook]]))
            self.mean[hook] = tuple(part.mean(0) for part in parts)

    def kept(self, circuit: Circuit, complement: bool) -> dict[str, Tensor]:
        """hook -> which nodes keep their values, bool [pos units+1]; the last is the error term.

        Args:
            complement: keep all nodes but the circuit's.
        """
        out = {}
        for hook, (f, e) in self.mean.items():
            mask = torch.zeros(f.shape[0], f.shape[1] + 1, dtype=torch.bool)
            own = [n for n in circuit if n.hook == hook]
            numbers = [f.shape[1] if n.number == ERROR else n.number for n in own]
            mask[[n.position for n in own], numbers] = True
            out[hook] = (mask ^ complement).to(e.device)
        return out

    def metric(
        self,
        circuits: list[Circuit],
        complement: bool = False,
        on_progress: Callable[[int], None] = lambda _: None,
    ) -> Float[Tensor, "circuits n"]:
        """m of each circuit on each prompt.

        Args:
            complement: of all nodes but each circuit's.
            on_progress: called with the number of circuits done so far.
        """
        task, out, done = self.sites.task, [], 0
        for some in pieces(task.pairs, circuits, task.pairs.base.shape[1]):
            kept = [self.kept(c, complement) for c in some]
            out.append(self._run({h: torch.stack([k[h] for k in kept]) for h in self.units}))
            done += len(some)
            on_progress(done)
        return torch.cat(out)

    def _run(self, kept: dict[str, Tensor]) -> Tensor:
        """m [k n] of k circuits.

        Args:
            kept: hook -> which nodes keep their values, bool [k pos units+1].
        """
        task, layer = self.sites.task, self.sites.first_layer
        seen: dict[str, Tensor] = {}
        (k, *_), n = next(iter(kept.values())).shape, len(task.pairs.rows)
        with ExitStack() as stack:
            for hook, unit in self.units.items():

                def ablate(
                    x: Tensor, hook=hook, unit=unit, keep=kept[hook], mean=self.mean[hook]
                ) -> Tensor:
                    f, e = unit.split(self.sites.read(seen | {hook: x}, hook))
                    f, e = f.unflatten(0, (k, n)), e.unflatten(0, (k, n))
                    f = torch.where(keep[:, None, :, :-1], f, mean[0]).flatten(0, 1)
                    e = torch.where(keep[:, None, :, -1:], e, mean[1]).flatten(0, 1)
                    return unit.join(f, e)

                stack.enter_context(hooks.edited(task.hf, hook, ablate))
            _watch(stack, self.sites, seen)
            x = task.base.pre[layer].repeat(k, 1, 1)
            end = splice.resume_stream(task.hf, f"blocks.{layer}.hook_resid_pre", x)
        return task.metric(task.pairs.at_end(end.unflatten(0, (k, n))))


def _watch(stack: ExitStack, sites: Sites, seen: dict[str, Tensor]) -> None:
    """Keep in `seen` what transcoders read, in every forward pass while the stack is open."""

    def keep(x: Tensor, hook: str) -> Tensor:
        seen[hook] = x
        return x

    for hook in dict.fromkeys(sites.reads.values()):
        stack.enter_context(hooks.edited(sites.task.hf, hook, partial(keep, hook=hook)))


class LatentEdge(NamedTuple):
    """An edge from a node to another one, or to the logits (None)."""

    source: Latent
    target: Latent | None


def edges(
    sites: Sites, units: dict[str, Units], nodes: list[Latent], alphas: list[float],
    on_progress: Callable[[int], None] = lambda _: None,
) -> tuple[list[LatentEdge], Float[Tensor, " edges"]]:  # fmt: skip
    """Edges among nodes and to the logits, and their effects averaged over prompts.

    Args:
        units: the units at the hooks that count as sites.
        nodes: each at one position.
        alphas: points of dm/dv, as for `sites.effects`.
        on_progress: called with the number of targets done so far.
    """
    names = [h for h in sites.hooks if h in units]
    before, after, end = _cut_at(sites, names)
    changes = {h: _changes(sites, units[h], h) for h in {n.hook for n in nodes}}
    found: list[LatentEdge] = []
    weights: list[Tensor] = []

    def join(target: Latent | None, output: Tensor, cotangent: Tensor | None) -> None:
        last = len(names) if target is None else names.index(target.hook)
        above = [h for h in names[:last] if h in changes]
        if not above:
            return
        inputs = [after[h] for h in above]
        grads = torch.autograd.grad(output, inputs, cotangent, retain_graph=True, allow_unused=True)
        by_hook = dict(zip(above, grads, strict=True))
        for node in nodes:
            if (gradient := by_hook.get(node.hook)) is not None:
                found.append(LatentEdge(node, target))
                weights.append(_dot(node, units[node.hook], changes[node.hook], gradient))

    with torch.enable_grad():
        task = sites.task
        join(None, task.metric(task.pairs.at_end(end)).sum(), None)
        for done, node in enumerate(nodes, 1):
            x = before[node.hook]
            join(node, x, _cotangent(sites, units[node.hook], node, alphas))
            on_progress(done)
    n = len(sites.task.pairs.rows)
    total = torch.stack(weights) / n if weights else sites.task.before[:0]
    return found, total


def _cut_at(sites: Sites, names: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """What each site's units split, as it arrives; the leaf that takes its place; the last stream.

    A gradient of one hook's x in another hook's leaf then passes through no third hook.
    """
    task, layer = sites.task, sites.first_layer
    seen: dict[str, Tensor] = {}
    before: dict[str, Tensor] = {}
    after: dict[str, Tensor] = {}
    with torch.enable_grad(), ExitStack() as stack:
        for hook in names:

            def cut(x: Tensor, hook=hook) -> Tensor:
                before[hook] = sites.read(seen | {hook: x}, hook)
                after[hook] = x.detach().requires_grad_(True)
                return after[hook]

            stack.enter_context(hooks.edited(task.hf, hook, cut))
        _watch(stack, sites, seen)
        x = task.base.pre[layer].detach().requires_grad_(True)
        end = splice.resume_stream(task.hf, f"blocks.{layer}.hook_resid_pre", x)
    return before, after, end


def _changes(sites: Sites, units: Units, hook: str) -> tuple[Tensor, Tensor]:
    """f' - f [n pos units] and e' - e [n pos d]."""
    (f, e), (f_source, e_source) = (units.split(x[hook]) for x in (sites.base, sites.source))
    return f_source - f, e_source - e


def _dot(node: Latent, units: Units, change: tuple[Tensor, Tensor], gradient: Tensor) -> Tensor:
    """Change of a node times a gradient dy/dx [n pos d], summed over prompts: []."""
    at = gradient[:, node.position]
    if node.number == ERROR:
        return (change[1][:, node.position] * at).sum()
    slope = at @ units.direction(node.number).to(at)
    return (change[0][:, node.position, node.number] * slope).sum()


def _cotangent(sites: Sites, units: Units, node: Latent, alphas: list[float]) -> Tensor:
    """dm/dv . dv/dx of a node v at its own site, [n pos d]; the choice of a TopK is constant."""
    gradient = sites.gradient(node.hook, alphas)[:, node.position]
    x = sites.base[node.hook].detach().requires_grad_(True)
    f, e = units.split(x)
    if node.number == ERROR:
        v = (e[:, node.position] * gradient).sum()
    else:
        slope = gradient @ units.direction(node.number).to(gradient)
        v = (f[:, node.position, node.number] * slope).sum()
    return torch.autograd.grad(v, x)[0]
