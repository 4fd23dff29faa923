"""Latents at several sites of a model as nodes, and what each does to m. [torch]

After Marks et al. 2024 (2403.19647, Sec. 3). A site is a hook, and its nodes are the units there
(units.py): latents f_i along directions d_i, or neurons, and an error term. If the run on the base
prompt gets the value of node i at position p from the run on the source prompt (pairs.py), m
changes by about

    latent_attribution   (f_i' - f_i) d_i . dm/dx on the base run               (their Eq. 3)
    latent_ig            the same, dm/dx averaged along the line from x to x'   (their Eq. 4)

1. `Sites` runs the model on both prompts and keeps x at every site. A transcoder's site is where it
   writes; what it reads stands to the left of what is written there.
2. `gradient` averages dm/dx over points between x and x'. It does not depend on the units, so that
   latents, random directions and neurons of one site share it.
3. `effects` multiplies. Summed over all nodes of a site, latent_ig approaches the effect of
   patching the whole site as the number of points grows.
4. `exact` patches nodes one by one.

The pairs of prompts, the metric m, and runs that start at a layer come from pairs.py.
"""

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from pipeline.errors import RetraceError, nearest
from pipeline.latents.stored import load_saes
from pipeline.latents.units import ALL, ERROR, Latent, Latents, TranscoderLatents, Units
from pipeline.models import hooks, splice
from pipeline.models.pairs import Task
from pipeline.models.places import full
from pipeline.models.rerun import pieces, rerun
from pipeline.store import tables

# The stream that a hook writes into: see Run of pairs.py.
ENTRY = {
    "hook_attn_out": "mid", "hook_resid_mid": "mid",
    "mlp.hook_post": "post", "hook_mlp_out": "post", "hook_resid_post": "post",
}  # fmt: skip


class Effects(NamedTuple):
    """The effect on m of every node of a site, for each prompt and position."""

    latents: Float[Tensor, "n pos units"]
    error: Float[Tensor, "n pos"]


class Sites:
    """Hooks of a model, in the order of computation, on pairs of prompts.

    Args:
        names: the hooks.
        reads: of a transcoder's, the hook that it reads (units.reads_of).

    Attributes:
        base, source: hook -> x in either run, [n pos d]; of a transcoder [n pos d_in + d].
    """

    def __init__(self, task: Task, names: list[str], reads: dict[str, str] | None = None) -> None:
        self.task, self.reads = task, reads or {}
        for name in names:
            hooks.check(task.hf, name)
            if name.split(".", 2)[-1] not in ENTRY:
                raise RetraceError(
                    f"'{name}' cannot be a site of latents; take {', '.join(ENTRY)} of a layer"
                )
            if name.endswith("mlp.hook_post") and self._is_normed(name):
                raise RetraceError(
                    f"'{name}' cannot be a site of latents, since a norm behind the MLP scales "
                    f"what its neurons write by all of them; take hook_mlp_out"
                )
        for name, read in self.reads.items():
            if not read.startswith("blocks."):
                raise RetraceError(
                    f"'{name}' cannot be a site of a transcoder that reads {read}; take one that "
                    f"reads a hook of a layer"
                )
        self.hooks = sorted(set(names), key=hooks.hook_names(task.hf).index)
        needed = list(dict.fromkeys([*self.hooks, *self.reads.values()]))
        base, source = (
            {h: full(x) for h, x in hooks.run_to(task.hf, tokens, needed).items()}
            for tokens in (task.pairs.base, task.pairs.source)
        )
        self._d_in = {name: base[read].shape[-1] for name, read in self.reads.items()}
        self.base = {name: self.read(base, name) for name in self.hooks}
        self.source = {name: self.read(source, name) for name in self.hooks}
        self._gradients: dict[tuple, Tensor] = {}

    @property
    def first_layer(self) -> int:
        """The first layer with a site, or with what one reads."""
        return min(int(h.split(".")[1]) for h in (*self.hooks, *self.reads.values()))

    def read(self, seen: dict[str, Tensor], hook: str) -> Float[Tensor, "n pos d"]:
        """What the units of a site split, out of x at the hooks of a run."""
        parts = [seen[self.reads[hook]]] if hook in self.reads else []
        return torch.cat([*parts, seen[hook]], -1)

    def change(self, hook: str) -> Float[Tensor, "n pos d"]:
        """The source run's x at a site less the base run's, without what a transcoder reads."""
        change = self.source[hook] - self.base[hook]
        return change[..., self._d_in.get(hook, 0) :]

    def entry(self, hook: str) -> tuple[str, int]:
        """The stream that the hook writes into, see Run of pairs.py, and the layer."""
        _, layer, name = hook.split(".", 2)
        if self.task.heads.parallel and name == "hook_attn_out":
            return "post", int(layer)  # the MLP beside it does not read its output
        return ENTRY[name], int(layer)

    def _is_normed(self, hook: str) -> bool:
        return self.task.heads.post(int(hook.split(".")[1]), "mlp")[1] is not None

    def written(
        self, hook: str, change: Float[Tensor, "*batch d"]
    ) -> Float[Tensor, "*batch d_model"]:
        """A change of x at a hook as a change of the stream."""
        return splice.written(self.task.hf, hook, change)

    def gradient(self, hook: str, alphas: list[float]) -> Float[Tensor, "n pos d"]:
        """dm/dx of each prompt, averaged over the points base + alpha (source - base)."""
        stream, layer = self.entry(hook)
        key = (stream, layer, hook.replace("mlp.hook_post", "hook_mlp_out"), *alphas)
        if key not in self._gradients:
            change = self.written(hook, self.change(hook))
            self._gradients[key] = self._mean_gradient(stream, layer, change, alphas)
        return self._pulled_back(hook, self._gradients[key])

    def _mean_gradient(self, stream: str, layer: int, change: Tensor, alphas: list[float]):
        task = self.task
        places = task.pairs.suffix(task.pairs.first_change(""))
        start = full(getattr(task.base, stream)[layer])
        x0, move = task.pairs.gathered(start, places), task.pairs.gathered(change, places)
        total = torch.zeros_like(x0)
        for some in pieces(task.pairs, alphas, places.shape[1]):
            along = torch.tensor(some, device=x0.device)[:, None, None, None]
            points = (x0 + along * move).requires_grad_(True)
            with torch.enable_grad():
                m = rerun(task, f"blocks.{layer}.hook_resid_{stream}", points, places).sum()
                total += torch.autograd.grad(m, points)[0].sum(0)
        at = (task.pairs.rows[:, None].expand_as(places), places.clamp(max=start.shape[1] - 1))
        return torch.zeros_like(start).index_put(at, total / len(alphas), accumulate=True)

    def _pulled_back(self, hook: str, gradient: Tensor) -> Tensor:
        if not hook.endswith("mlp.hook_post"):
            return gradient
        with torch.enable_grad():
            x = torch.zeros_like(self.base[hook]).requires_grad_(True)
            return torch.autograd.grad(self.written(hook, x), x, gradient)[0]

    def patched(
        self, hook: str, changes: list[Tensor], start: Int64[Tensor, " n"]
    ) -> Float[Tensor, "changes n"]:
        """m - m(base) with the stream at a hook changed.

        Args:
            changes: changes of the stream, [n pos d_model] each.
            start: the first position of each prompt that is changed.
        """
        stream, layer = self.entry(hook)
        task, out = self.task, []
        places, x = task.pairs.suffix(start), getattr(task.base, stream)[layer]
        for some in pieces(task.pairs, changes, places.shape[1]):
            rows = torch.stack([task.pairs.gathered(x + c, places) for c in some])
            name = f"blocks.{layer}.hook_resid_{stream}"
            out.append(rerun(task, name, rows, places) - task.before)
        return torch.cat(out)

    def whole(self, hook: str) -> Float[Tensor, " n"]:
        """The exact effect of patching a whole site."""
        change = self.written(hook, self.change(hook))
        return self.patched(hook, [change], self.task.pairs.first_change(""))[0]


def effects(sites: Sites, hook: str, units: Units, alphas: list[float]) -> Effects:
    """Estimated effects of all nodes of a site.

    Args:
        alphas: [0.0] for latent_attribution, `eap.midpoints` for latent_ig.
    """
    gradient = sites.gradient(hook, alphas)
    (f, e), (f_source, e_source) = (units.split(x[hook]) for x in (sites.base, sites.source))
    return Effects((f_source - f) * units.along(gradient), ((e_source - e) * gradient).sum(-1))


def exact(
    sites: Sites, units: dict[str, Units], nodes: list[Latent],
    on_progress: Callable[[int], None] = lambda _: None,
) -> Float[Tensor, "nodes n"]:  # fmt: skip
    """m(one node patched) - m(base) of each node.

    Args:
        units: the units at every hook that a node names.
        on_progress: called with the number of nodes done so far.
    """
    task = sites.task
    out = torch.zeros(len(nodes), len(task.before), device=task.before.device)

    def where(i: int) -> tuple[str, int]:
        return nodes[i].hook, nodes[i].position

    done = 0
    for (hook, position), group in groupby(sorted(range(len(nodes)), key=where), key=where):
        some = list(group)
        (f, e), (f_source, e_source) = (
            units[hook].split(x[hook]) for x in (sites.base, sites.source)
        )
        at = "" if position == ALL else f"@{position}"
        mask = task.pairs.mask(at)[..., None]

        def change(number: int, f=f_source - f, e=e_source - e, hook=hook, mask=mask) -> Tensor:
            if number == ERROR:
                return sites.written(hook, e * mask)
            direction = units[hook].direction(number).to(f)
            return sites.written(hook, f[..., number, None] * direction * mask)

        start = task.pairs.first_change(at)
        for piece in pieces(task.pairs, some, task.pairs.suffix(start).shape[1]):
            changes = [change(nodes[i].number) for i in piece]
            out[piece] = sites.patched(hook, changes, start)
            done += len(piece)
            on_progress(done)
    return out


def strongest(found: dict[str, Effects], n: int, by_position: bool) -> list[Latent]:
    """The n nodes with the largest mean effect over prompts, the largest first.

    Nodes without an effect are left out.

    Args:
        found: hook -> effects.
        by_position: True: one node per unit and position (prompts of one template); False: one
            node per unit, for all positions.
    """
    nodes, sizes = [], []
    for hook, (latents, error) in found.items():
        both = torch.cat([latents, error[..., None]], -1).mean(0)  # [pos units+1]
        both = both if by_position else both.sum(0, keepdim=True)
        top = both.abs().flatten().topk(min(n, int(both.count_nonzero())))
        width = both.shape[-1]
        for size, i in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            number = i % width if i % width < width - 1 else ERROR
            nodes.append(Latent(hook, number, i // width if by_position else ALL))
            sizes.append(size)
    order = sorted(range(len(nodes)), key=lambda i: -sizes[i])[:n]
    return [nodes[i] for i in order]


def scores(found: dict[str, Effects], nodes: list[Latent]) -> Float[Tensor, "nodes n"]:
    """Effects of nodes on each prompt; a node at ALL positions has the sum over positions."""

    def score(node: Latent) -> Tensor:
        latents, error = found[node.hook]
        both = error if node.number == ERROR else latents[..., node.number]  # [n pos]
        return both.sum(-1) if node.position == ALL else both[:, node.position]

    return torch.stack([score(node) for node in nodes])


def load(
    manifests: list[str], names: list[str], activations: str | Path, device: torch.device | str
) -> dict[str, Latents]:
    """hook -> latents of the dictionaries `names`; of a transcoder the hook where it writes.

    Args:
        manifests: manifest.json of the SAE jobs.
        activations: manifest.json of the activations that the dictionaries were trained on.

    Raises:
        RetraceError: a dictionary is missing, or shares its hook with another.
    """
    stored, out = tables.read_json(activations), {}
    listed = {n: (m, tables.read_json(m)) for m in manifests for n in tables.read_json(m)["saes"]}
    for name in names:
        if name not in listed:
            raise RetraceError(f"circuits.saes: no dictionary '{name}'{nearest(name, listed)}")
        manifest, trained = listed[name]
        reads, written = trained["hook"], trained.get("output_hook")
        hook = written or reads
        if hook in out:
            raise RetraceError(f"circuits.saes: two dictionaries at {hook}; name one a hook")
        sae = load_saes(manifest, device, [name])[name]
        unknown = (stored["skip_first"], stored["hooks"][reads]["max_norm"])
        out[hook] = TranscoderLatents(sae, reads, *unknown) if written else Latents(sae, *unknown)
    return out
