"""Attribution patching: effects of all nodes and edges out of one gradient. [torch]

With g = dm/da on the base run and a' the activation on the source run

    attribution patching   effect of a node       ~ (a' - a) . g                (Nanda 2023)
    EAP                    effect of an edge u->v ~ (a_u' - a_u) . dm/d(input of v)
    EAP-IG                 the same, the gradient averaged over inputs between base and source

after Syed, Rager & Conmy 2023 (2310.10348, Sec. 3) and Hanna, Pezzelle & Belinkov 2024 (2403.17806,
Sec. 3). The input of v is the stream before its norm; a head reads it as query, key and value.

1. `gradients` runs the model once for all points of the path and takes dm/da at every z, MLP
   output, stream, q, k, v and MLP input with one backward pass; weights need no gradient. Of the
   base run a task has them where it was made with them (models/pairs.py).
2. `attribution_patching` multiplies; over several points it is integrated gradients of nodes.
3. `edges` pulls the gradients of q, k, v and of the MLP's input back through the norm of their
   layer, and multiplies with what every earlier part writes.

TransformerLens's `tools.analysis.attribution_patching` has the nodes only ("granularity='edge'"
and ig_steps above 1 are not implemented there); the tests hold ours equal to it.
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.circuits.patching import LOGITS, Edge, changed_by
from pipeline.models import hooks, places
from pipeline.models.heads import SLOTS
from pipeline.models.pairs import Node, Task
from pipeline.models.taps import OF_EDGES, OF_NODES, Taps, tapped

Dots = dict[tuple[str, int], Float[Tensor, "batch pos *heads"]]  # (kind, layer) -> (a' - a) . dm/da


def gradients(task: Task, alphas: list[float], edges: bool = True) -> tuple[Taps, Taps]:
    """(values, gradients of m summed over prompts) at points base + alpha (source - base).

    The path is between the embeddings of the prompts; points are rows of one batch.

    Args:
        alphas: [0.0] is the base run, of which a task may have them already.
        edges: take the gradients that `edges` needs, too.
    """
    names = OF_NODES + OF_EDGES if edges else OF_NODES
    if alphas == [0.0] and task.slopes and all(getattr(task.slopes[1], n) for n in names):
        return task.slopes
    pairs, points = task.pairs, len(alphas)
    embed = hooks.run_to(task.hf, torch.cat([pairs.base, pairs.source]), ["hook_embed"])
    base, source = embed["hook_embed"].chunk(2)
    along = torch.tensor(alphas, device=base.device)[:, None, None, None]
    x = (base + along * (source - base)).flatten(0, 1).requires_grad_(True)
    tokens = pairs.base.repeat(points, 1)
    with (
        torch.enable_grad(),
        tapped(task.heads) as taps,
        hooks.edited(task.hf, "hook_embed", lambda _: x),
    ):
        task.hf.base_model(input_ids=tokens, use_cache=False)
        end = taps.end[0].unflatten(0, (points, -1))
        m = task.metric(pairs.at_end(end)).sum() / points
        return taps, taps.gradients(m, names)


def by_part(task: Task, grads: Taps, patterns: bool = False) -> Dots:
    """(a' - a) . dm/da of every part at every position, with gradients averaged over points.

    Args:
        patterns: attention patterns, too; dm/dA is dm/dz . v.

    Returns:
        (kind, layer) -> [batch pos], of heads, queries, keys and values [batch pos heads].
    """
    base, source, d_head = task.base, task.source, task.heads.d_head

    def dot(change: Tensor, gradient: Tensor) -> Float[Tensor, "batch pos d"]:
        """The products; gradients are summed over points."""
        summed = places.full(gradient).unflatten(0, (-1, len(task.before))).sum(0)
        return places.full(change) * summed

    def by_head(x: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos heads"]:
        return x.unflatten(-1, (-1, d_head)).sum(-1)

    dots = {}
    for i in range(task.heads.n_layers):
        dots["resid", i] = dot(source.pre[i] - base.pre[i], grads.pre[i]).sum(-1)
        dots["mlp", i] = dot(source.mlp(i) - base.mlp(i), grads.mlp[i]).sum(-1)
        dots["attn", i] = dot(source.attn(i) - base.attn(i), grads.attn[i]).sum(-1)
        dots["head", i] = by_head(dot(source.z[i] - base.z[i], grads.z[i]))
        if patterns:
            dots["pattern", i] = by_head(dot(task.turned[i], grads.z[i]))
    for (i, slot), gradient in grads.inputs.items():
        change = task.heads.read(i, slot, source.pre[i]) - task.heads.read(i, slot, base.pre[i])
        dots[slot, i] = by_head(dot(change, gradient))
    return dots


def scored(task: Task, nodes: list[Node], dots: Dots) -> Float[Tensor, "nodes batch"]:
    """Sums of `by_part` over the positions of each node."""
    positions = {p: i for i, p in enumerate(dict.fromkeys(n.position for n in nodes))}
    masks = torch.stack([task.pairs.mask(p) for p in positions])
    parts: dict[tuple[str, int], list[int]] = {}
    for i, node in enumerate(nodes):
        parts.setdefault((node.kind, node.layer), []).append(i)
    dtype = next(iter(dots.values())).dtype
    out = torch.empty(len(nodes), len(task.before), dtype=dtype, device=masks.device)
    for part, some in parts.items():
        dot = dots[part] if dots[part].dim() == 3 else dots[part][..., None]
        sums = torch.einsum("pbs,bsh->pbh", masks.to(dot.dtype), dot)
        at = [positions[nodes[i].position] for i in some]
        out[some] = sums[at, :, [max(nodes[i].head, 0) for i in some]]
    return out


def attribution_patching(
    task: Task, nodes: list[Node], alphas: tuple[float, ...] = (0.0,)
) -> Float[Tensor, "nodes batch"]:
    """(a' - a) . dm/da of each node; one forward and one backward pass.

    Args:
        alphas: points over which the gradient is averaged, see `gradients`.
    """
    inputs = any(node.kind in SLOTS for node in nodes)
    _, grads = gradients(task, list(alphas), edges=inputs)
    return scored(task, nodes, by_part(task, grads, has_patterns(nodes)))


def has_patterns(nodes: list[Node]) -> bool:
    """Whether attention patterns are among them, which take two passes of eager attention."""
    return any(node.kind == "pattern" for node in nodes)


def midpoints(steps: int) -> list[float]:
    """The middles of `steps` equal parts of the path from base to source."""
    return [(j + 0.5) / steps for j in range(steps)]


def pulled_back(
    norm: Callable[[Tensor], Tensor],
    x: Float[Tensor, "*batch d"],
    cotangents: Float[Tensor, "targets *batch d_out"],
) -> Float[Tensor, "targets *batch d"]:
    """Gradients of x from cotangents of norm(x)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        y = norm(x)
        return torch.autograd.grad(y, x, cotangents, is_grads_batched=True)[0]


def edges(task: Task, alphas: list[float]) -> tuple[list[Edge], Float[Tensor, " edges"]]:
    """All edges, and their scores (a_u' - a_u) . dm/d(input of v) averaged over prompts.

    Sources are the embedding, heads and MLPs; targets queries, keys and values of heads, MLPs, and
    the logits. With alphas [0.0] this is EAP, with `midpoints` EAP-IG (Hanna et al. take the right
    ends of the parts; the middles are nearer to the integral).
    """
    hooks.require(task.hf, "edges")
    heads, (taps, grads) = task.heads, gradients(task, alphas)
    sources: list[Node] = []
    written: list[Tensor] = []
    found: list[Edge] = []
    scores: list[Tensor] = []

    def write(nodes: list[Node]) -> None:
        """From here on, these nodes are sources, too."""
        sources.extend(nodes)
        written.extend(changed_by(task, node) for node in nodes)

    def join(
        targets: list[tuple[Node, str]], gradient: Float[Tensor, "targets rows pos d"]
    ) -> None:
        """Edges from all sources so far to some targets."""
        total = places.full(gradient).unflatten(-3, (len(alphas), -1)).sum(-4)
        dot = torch.einsum("snpd,tnpd->st", places.full(torch.stack(written)), total)
        scores.append(dot.flatten() / len(task.before))
        found.extend(Edge(s, *t) for s in sources for t in targets)

    write([Node("resid", 0)])
    for i in range(heads.n_layers):
        join(*_attention_inputs(task, taps, grads, i))
        of_heads, mlp = [Node("head", i, h) for h in range(heads.n_heads)], Node("mlp", i)
        if not heads.parallel:  # else the MLP reads nothing of this layer's heads
            write(of_heads)
        read = taps.pre[i] if heads.parallel else taps.pre[i] + taps.attn[i]
        join([(mlp, "")], pulled_back(partial(heads.mlp_reads, i), read, grads.normed[i][None]))
        if heads.parallel:
            write(of_heads)
        write([mlp])
    join([(LOGITS, "")], grads.end[0][None])
    return found, torch.cat(scores)


def _attention_inputs(
    task: Task, taps: Taps, grads: Taps, layer: int
) -> tuple[list[tuple[Node, str]], Float[Tensor, "targets rows pos d_model"]]:
    """The queries, keys and values of a layer, and dm/d(their input)."""
    heads = task.heads
    targets, cotangents = [], []
    for slot in SLOTS:
        gradient = grads.inputs[layer, slot].unflatten(-1, (-1, heads.d_head))
        for h in range(heads.count(slot)):
            cotangents.append(gradient[..., h, :] @ heads.W_in(layer, slot, h))
            targets.append((Node("head", layer, h), slot))
    reads = partial(heads.attn_reads, layer)
    return targets, pulled_back(reads, taps.pre[layer], torch.stack(cotangents))
