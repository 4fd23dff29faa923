"""Latents at several sites of a model as nodes, and what each does to m. [torch]

After Marks et al. 2024 (2403.19647, Sec. 3). A site is a hook; units there split its x into

    x = sum_i f_i d_i + b + e

with the latents f_i of a dictionary and its error term e, which is a node, too; or with the
coordinates of x themselves (neurons) and no error. Where the run on `base` gets what the run on
`source` has at a site (pairs.py), the effect of node i at position p is about

    latent_attribution   (f_i' - f_i) d_i . dm/dx on the base run               (their Eq. 3)
    latent_ig            the same, dm/dx averaged along the line from x to x'   (their Eq. 4)

1. `Sites` runs the model on both prompts and keeps x at every site.
2. `gradient` averages dm/dx over points between x and x'. It knows no dictionary: latents, random
   directions and neurons of one site share it.
3. `effects` multiplies. Summed over all nodes of a site, latent_ig is the effect of patching the
   whole site as steps grow.
4. `exact` patches nodes one by one.

The pairs of prompts, m, and runs from one layer on are pairs.py's.
"""

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.errors import RetraceError, nearest
from pipeline.models import hooks, splice
from pipeline.models.pairs import Task
from pipeline.models.rerun import pieces, rerun
from pipeline.store import tables

ERROR = -1  # in the place of a latent's number
ALL = -1  # in the place of a position
# Where in a layer what is written at a hook enters the stream: see Run of pairs.py.
ENTRY = {
    "hook_attn_out": "mid", "hook_resid_mid": "mid",
    "mlp.hook_post": "post", "hook_mlp_out": "post", "hook_resid_post": "post",
}  # fmt: skip


class Latent(NamedTuple):
    """A node: a latent (or ERROR) of the units at a hook, at one position of all prompts or ALL."""

    hook: str
    number: int
    position: int = ALL

    @property
    def layer(self) -> int:
        return int(self.hook.split(".")[1])

    @property
    def kind(self) -> str:
        """Such as resid_post or mlp_out; of an error term resid_post_error."""
        name = self.hook.split(".", 2)[2].replace("hook_", "").replace("mlp.post", "neuron")
        return f"{name}_error" if self.number == ERROR else name


class Latents:
    """The latents of a dictionary, and its error term.

    Args:
        sae: with W_dec [d_sae d], encode and decode, as SAELens's.
        skip_first, max_norm: tokens that it was not trained on, see `splice.known`; they have no
            active latent, and all of x is error.
    """

    def __init__(self, sae: Any, skip_first: int = 0, max_norm: float = 0) -> None:
        self.sae, self.skip_first, self.max_norm = sae, skip_first, max_norm
        self.n = sae.W_dec.shape[0]

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """f [n pos d_sae] and e [n pos d] of x [n pos d]."""
        f = self.sae.encode(x) * splice.known(x, self.skip_first, self.max_norm)[..., None]
        return f, x - self.sae.decode(f)

    def join(self, f: Tensor, e: Tensor) -> Tensor:
        return self.sae.decode(f) + e

    def along(self, gradient: Tensor) -> Tensor:
        """dm/df [... d_sae] of dm/dx [... d]."""
        return gradient @ self.sae.W_dec.T

    def direction(self, number: int) -> Tensor:
        return self.sae.W_dec[number]


class Neurons:
    """The coordinates of x: neurons behind an MLP's nonlinearity, or the basis of the stream.

    Args:
        d: how many.
    """

    def __init__(self, d: int) -> None:
        self.n = d

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.zeros_like(x)

    def join(self, f: Tensor, e: Tensor) -> Tensor:
        return f + e

    def along(self, gradient: Tensor) -> Tensor:
        return gradient

    def direction(self, number: int) -> Tensor:
        return nn.functional.one_hot(torch.tensor(number), self.n).float()


class RandomDirections:
    """A null: a TopK dictionary as drawn, unit directions that nobody trained.

    Args:
        like: the dictionary whose width, k and centre b_dec it takes.
    """

    def __init__(self, like: Any, seed: int) -> None:
        drawn = torch.randn(like.W_dec.shape, generator=torch.Generator().manual_seed(seed))
        self.W_dec = nn.functional.normalize(drawn, dim=-1).to(like.W_dec)
        self.b_dec, self.k = like.b_dec, like.cfg.k

    def encode(self, x: Tensor) -> Tensor:
        scores = torch.relu((x - self.b_dec) @ self.W_dec.T)
        top = scores.topk(self.k, dim=-1)
        return torch.zeros_like(scores).scatter(-1, top.indices, top.values)

    def decode(self, f: Tensor) -> Tensor:
        return f @ self.W_dec + self.b_dec


Units = Latents | Neurons


class Effects(NamedTuple):
    """What every node of a site does: latents [n pos units], error [n pos]."""

    latents: Tensor
    error: Tensor


class Sites:
    """Hooks of a model, in the order of computation, on pairs of prompts.

    Attributes:
        base, source: hook -> x in either run, [n pos d].
    """

    def __init__(self, task: Task, names: list[str]) -> None:
        self.task = task
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
        self.hooks = sorted(set(names), key=hooks.hook_names(task.hf).index)
        self.base = hooks.run_to(task.hf, task.pairs.base, self.hooks)
        self.source = hooks.run_to(task.hf, task.pairs.source, self.hooks)
        self._gradients: dict[tuple, Tensor] = {}

    def entry(self, hook: str) -> tuple[str, int]:
        """Name of the stream that the hook writes into, see Run of pairs.py, and the layer."""
        _, layer, name = hook.split(".", 2)
        if self.task.heads.parallel and name == "hook_attn_out":
            return "post", int(layer)  # the MLP beside it reads nothing of it
        return ENTRY[name], int(layer)

    def _is_normed(self, hook: str) -> bool:
        return self.task.heads.post(int(hook.split(".")[1]), "mlp")[1] is not None

    def written(self, hook: str, change: Tensor) -> Tensor:
        """A change of x [... d] as a change of the stream [... d_model]."""
        return splice.written(self.task.hf, hook, change)

    def gradient(self, hook: str, alphas: list[float]) -> Tensor:
        """dm/dx of each prompt, averaged over points base + alpha (source - base), [n pos d]."""
        stream, layer = self.entry(hook)
        key = (stream, layer, hook.replace("mlp.hook_post", "hook_mlp_out"), *alphas)
        if key not in self._gradients:
            change = self.written(hook, self.source[hook] - self.base[hook])
            self._gradients[key] = self._mean_gradient(stream, layer, change, alphas)
        return self._pulled_back(hook, self._gradients[key])

    def _mean_gradient(self, stream: str, layer: int, change: Tensor, alphas: list[float]):
        task = self.task
        places = task.pairs.suffix(task.pairs.first_change(""))
        start = getattr(task.base, stream)[layer]
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

    def patched(self, hook: str, changes: list[Tensor], start: Tensor) -> Tensor:
        """m - m(base), [changes n], with the stream at `hook` changed by each [n pos d_model].

        Args:
            start: [n], the first position that is changed.
        """
        stream, layer = self.entry(hook)
        task, out = self.task, []
        places, x = task.pairs.suffix(start), getattr(task.base, stream)[layer]
        for some in pieces(task.pairs, changes, places.shape[1]):
            rows = torch.stack([task.pairs.gathered(x + c, places) for c in some])
            name = f"blocks.{layer}.hook_resid_{stream}"
            out.append(rerun(task, name, rows, places) - task.before)
        return torch.cat(out)

    def whole(self, hook: str) -> Tensor:
        """The exact effect of patching all of a site, [n]."""
        change = self.written(hook, self.source[hook] - self.base[hook])
        return self.patched(hook, [change], self.task.pairs.first_change(""))[0]


def effects(sites: Sites, hook: str, units: Units, alphas: list[float]) -> Effects:
    """Estimated effects of all nodes of a site.

    Args:
        alphas: [0.0] is latent_attribution, `eap.midpoints` latent_ig.
    """
    gradient = sites.gradient(hook, alphas)
    (f, e), (f_source, e_source) = (units.split(x[hook]) for x in (sites.base, sites.source))
    return Effects((f_source - f) * units.along(gradient), ((e_source - e) * gradient).sum(-1))


def exact(
    sites: Sites, units: dict[str, Units], nodes: list[Latent],
    told: Callable[[int], None] = lambda _: None,
) -> Tensor:  # fmt: skip
    """m(one node patched) - m(base) of each node, [nodes n].

    Args:
        units: of every hook that a node names.
        told: called with the number of nodes done so far.
    """
    task = sites.task
    out = torch.zeros(len(nodes), len(task.before), device=task.before.device)
    where = lambda i: (nodes[i].hook, nodes[i].position)  # noqa: E731
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
            told(done)
    return out


def strongest(found: dict[str, Effects], n: int, by_position: bool) -> list[Latent]:
    """The n nodes of largest mean effect over prompts, the largest first; none without effect.

    Args:
        found: hook -> effects.
        by_position: a node a position (prompts of one template), or a node for all of them.
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


def scores(found: dict[str, Effects], nodes: list[Latent]) -> Tensor:
    """Effects of nodes by prompt, [nodes n]; a node at ALL positions has their sum."""

    def score(node: Latent) -> Tensor:
        latents, error = found[node.hook]
        both = error if node.number == ERROR else latents[..., node.number]  # [n pos]
        return both.sum(-1) if node.position == ALL else both[:, node.position]

    return torch.stack([score(node) for node in nodes])


def load(
    manifests: list[str], names: list[str], activations: str | Path, device: torch.device
) -> dict[str, Latents]:
    """hook -> latents of the dictionaries `names`, out of the SAE jobs' folders.

    Args:
        activations: manifest.json of the activations that they were trained on.

    Raises:
        RetraceError: a dictionary is missing, is a transcoder, or shares its hook with another.
    """
    from pipeline.latents.stored import load_saes

    stored, out = tables.read_json(activations), {}
    listed = {n: (m, tables.read_json(m)) for m in manifests for n in tables.read_json(m)["saes"]}
    for name in names:
        if name not in listed:
            raise RetraceError(f"circuits.saes: no dictionary '{name}'{nearest(name, listed)}")
        manifest, about = listed[name]
        hook = about["hook"]
        if about.get("output_hook"):
            raise RetraceError(f"circuits.saes: '{name}' is a transcoder; name one that is none")
        if hook in out:
            raise RetraceError(f"circuits.saes: two dictionaries at {hook}; name one a hook")
        sae = load_saes(manifest, device, [name])[name]
        out[hook] = Latents(sae, stored["skip_first"], stored["hooks"][hook]["max_norm"])
    return out
