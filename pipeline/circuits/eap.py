"""Attribution patching: effects of all nodes and edges out of one gradient. [torch]

With g = dm/da on the base run and a' the activation on the source run

    attribution patching   effect of a node       ~ (a' - a) . g                (Nanda 2023)
    EAP                    effect of an edge u->v ~ (a_u' - a_u) . dm/d(input of v)
    EAP-IG                 the same, the gradient averaged over inputs between base and source

after Syed, Rager & Conmy 2023 (2310.10348, Sec. 3) and Hanna, Pezzelle & Belinkov 2024 (2403.17806,
Sec. 3). The input of v is the stream before its norm; a head reads it as query, key and value.

1. `gradients` runs the model once for all points of the path and takes dm/da at every z, MLP
   output, stream, q, k, v and MLP input with one backward pass; weights need no gradient.
2. `attribution_patching` multiplies; over several points it is integrated gradients of nodes.
3. `edges` pulls the gradients of q, k, v and of the MLP's input back through the norm of their
   layer, and multiplies with what every earlier part writes.

TransformerLens's `tools.analysis.attribution_patching` has the nodes only ("granularity='edge'"
and ig_steps above 1 are not implemented there); the tests hold ours equal to it.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.circuits.patching import Edge
from pipeline.models import hooks
from pipeline.models.heads import SLOTS, Slot
from pipeline.models.pairs import Node, Task

LOGITS = Node("logits", -1)


@dataclass
class Taps:
    """Tensors that a forward pass consumes, by layer; after `gradients`, dm/d of each.

    Attributes:
        pre: the stream before each layer, [points*n pos d_model].
        z, mlp: what the output projection reads, and what the MLP writes.
        q, k, v, normed: what the input projections write, and what the MLP reads.
        end: the stream that the final norm reads.
    """

    pre: list[Tensor] = field(default_factory=list)
    z: list[Tensor] = field(default_factory=list)
    mlp: list[Tensor] = field(default_factory=list)
    attn: list[Tensor] = field(default_factory=list)
    normed: list[Tensor] = field(default_factory=list)
    end: list[Tensor] = field(default_factory=list)
    inputs: dict[tuple[int, Slot], Tensor] = field(default_factory=dict)


@contextmanager
def tapped(task: Task) -> Iterator[Taps]:
    """Inside: a forward pass fills the taps with the tensors that it goes on with."""
    heads, taps = task.heads, Taps()
    with ExitStack() as stack:

        def tap(hook: str, keep: Callable[[Tensor], None], copied: bool = False) -> None:
            """Keep what the forward pass goes on with; a copy is read by nothing else."""

            def see(x: Tensor) -> Tensor:
                x = x.clone() if copied else x
                keep(x)
                return x

            stack.enter_context(hooks.edited(task.hf, hook, see))

        for i in range(heads.n_layers):
            at = f"blocks.{i}."
            tap(f"{at}hook_resid_pre", taps.pre.append)
            tap(f"{at}attn.hook_z", taps.z.append)
            tap(f"{at}mlp.hook_in", taps.normed.append, copied=True)
            tap(f"{at}hook_mlp_out", taps.mlp.append)
            tap(f"{at}hook_attn_out", taps.attn.append)
            for slot in SLOTS:
                tap(f"{at}attn.hook_{slot}", partial(taps.inputs.__setitem__, (i, slot)))
        tap(f"blocks.{heads.n_layers - 1}.hook_resid_post", taps.end.append)
        yield taps


def gradients(task: Task, alphas: list[float], edges: bool = True) -> tuple[Taps, Taps]:
    """(values, gradients of m summed over prompts) at points base + alpha (source - base).

    The path is between the embeddings of the prompts; points are rows of one batch.

    Args:
        alphas: [0.0] is the base run.
        edges: take those that `edges` needs, too.
    """
    pairs, points = task.pairs, len(alphas)
    embed = hooks.run_to(task.hf, torch.cat([pairs.base, pairs.source]), ["hook_embed"])
    base, source = embed["hook_embed"].chunk(2)
    along = torch.tensor(alphas, device=base.device)[:, None, None, None]
    x = (base + along * (source - base)).flatten(0, 1).requires_grad_(True)
    tokens = pairs.base.repeat(points, 1)
    with (
        torch.enable_grad(),
        tapped(task) as taps,
        hooks.edited(task.hf, "hook_embed", lambda _: x),
    ):
        task.hf.base_model(input_ids=tokens, use_cache=False)
        end = taps.end[0].unflatten(0, (points, -1))
        m = task.metric(task.at_end(end)).sum() / points
        wanted = [*taps.pre, *taps.z, *taps.mlp, *taps.attn]
        if edges:
            wanted += [*taps.normed, *taps.end, *taps.inputs.values()]
        found = iter(torch.autograd.grad(m, wanted))
    take = lambda old: [next(found) for _ in old]  # noqa: E731
    grads = Taps(pre=take(taps.pre), z=take(taps.z), mlp=take(taps.mlp), attn=take(taps.attn))
    if edges:
        grads.normed, grads.end = take(taps.normed), take(taps.end)
        grads.inputs = dict(zip(taps.inputs, take(taps.inputs), strict=True))
    return taps, grads


def by_part(task: Task, grads: Taps) -> dict[tuple[str, int], Tensor]:
    """(a' - a) . dm/da of every part at every position, with gradients averaged over points.

    Returns:
        (kind, layer) -> [n pos], of heads, queries, keys and values [n pos heads].
    """
    base, source, d = task.base, task.source, task.heads.d_head
    total = lambda g: g.unflatten(0, (-1, len(task.before))).sum(0)  # noqa: E731
    heads = lambda x: x.unflatten(-1, (-1, d)).sum(-1)  # noqa: E731
    dots = {}
    for i in range(task.heads.n_layers):
        dots["resid", i] = ((source.pre[i] - base.pre[i]) * total(grads.pre[i])).sum(-1)
        dots["mlp", i] = ((source.mlp(i) - base.mlp(i)) * total(grads.mlp[i])).sum(-1)
        dots["attn", i] = ((source.attn(i) - base.attn(i)) * total(grads.attn[i])).sum(-1)
        dots["head", i] = heads((source.z[i] - base.z[i]) * total(grads.z[i]))
    for (i, slot), gradient in grads.inputs.items():
        change = task.heads.read(i, slot, source.pre[i]) - task.heads.read(i, slot, base.pre[i])
        dots[slot, i] = heads(change * total(gradient))
    return dots


def scored(task: Task, nodes: list[Node], dots: dict[tuple[str, int], Tensor]) -> Tensor:
    """Sums of `by_part` over the positions of each node, [nodes n]."""
    masks = {p: task.pairs.mask(p) for p in {n.position for n in nodes}}

    def score(node: Node) -> Tensor:
        dot = dots[node.kind, node.layer]
        dot = dot[..., node.head] if node.head >= 0 else dot
        return (dot * masks[node.position]).sum(-1)

    return torch.stack([score(node) for node in nodes])


def attribution_patching(
    task: Task, nodes: list[Node], alphas: tuple[float, ...] = (0.0,)
) -> Tensor:
    """(a' - a) . dm/da of each node, [nodes n]; one forward and one backward pass.

    Args:
        alphas: points over which the gradient is averaged, see `gradients`.
    """
    inputs = any(node.kind in SLOTS for node in nodes)
    _, grads = gradients(task, list(alphas), edges=inputs)
    return scored(task, nodes, by_part(task, grads))


def midpoints(steps: int) -> list[float]:
    """The middles of `steps` equal parts of the path from base to source."""
    return [(j + 0.5) / steps for j in range(steps)]


def pulled_back(norm: Callable[[Tensor], Tensor], x: Tensor, cotangents: Tensor) -> Tensor:
    """cotangents [t ... d] of norm(x) as gradients of x [... d]."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        y = norm(x)
        return torch.autograd.grad(y, x, cotangents, is_grads_batched=True)[0]


def edges(task: Task, alphas: list[float]) -> tuple[list[Edge], Tensor]:
    """All edges, and their scores (a_u' - a_u) . dm/d(input of v) averaged over prompts, [edges].

    Sources are the embedding, heads and MLPs; targets queries, keys and values of heads, MLPs, and
    the logits. With alphas [0.0] this is EAP, with `midpoints` EAP-IG (Hanna et al. take the right
    ends of the parts; the middles are nearer to the integral).
    """
    heads, (taps, grads), points = task.heads, gradients(task, alphas), len(alphas)
    sources = [Node("resid", 0)]
    written = [task.changed_by(sources[0])]
    found: list[Edge] = []
    scores: list[Tensor] = []
    total = lambda g: g.unflatten(-3, (points, -1)).sum(-4)  # noqa: E731

    def join(targets: list[tuple[Node, str]], gradient: Tensor) -> None:
        """Edges from all sources so far to targets with gradients [targets n pos d_model]."""
        dot = torch.einsum("snpd,tnpd->st", torch.stack(written), gradient)
        scores.append(dot.flatten() / len(task.before))
        found.extend(Edge(s, *t) for s in sources for t in targets)

    for i in range(heads.n_layers):
        targets, back = _attention_inputs(task, taps, grads, i)
        join(targets, total(back))
        new = [Node("head", i, h) for h in range(heads.n_heads)]
        read = taps.pre[i] if heads.parallel else taps.pre[i] + taps.attn[i]
        middle = total(pulled_back(partial(heads.mlp_reads, i), read, grads.normed[i][None]))
        into_mlp = [(Node("mlp", i), "")]
        if heads.parallel:  # the MLP reads nothing of this layer's heads
            join(into_mlp, middle)
        sources += new
        written += [task.changed_by(n) for n in new]
        if not heads.parallel:
            join(into_mlp, middle)
        sources.append(Node("mlp", i))
        written.append(task.changed_by(sources[-1]))
    join([(LOGITS, "")], total(grads.end[0][None]))
    return found, torch.cat(scores)


def _attention_inputs(
    task: Task, taps: Taps, grads: Taps, layer: int
) -> tuple[list[tuple[Node, str]], Tensor]:
    """The queries, keys and values of a layer, and dm/d(their input), [targets points*n pos d]."""
    heads = task.heads
    targets, cotangents = [], []
    for slot in SLOTS:
        gradient = grads.inputs[layer, slot].unflatten(-1, (-1, heads.d_head))
        for h in range(heads.count(slot)):
            place = heads.place(layer, slot, h)
            weight = place.module.weight
            if not isinstance(place.module, nn.Linear):  # GPT-2: transposed
                weight = weight.T
            cotangents.append(gradient[..., h, :] @ weight[place.columns])
            targets.append((Node("head", layer, h), slot))
    reads = partial(heads.attn_reads, layer)
    return targets, pulled_back(reads, taps.pre[layer], torch.stack(cotangents))
