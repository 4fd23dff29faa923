"""Exact interventions on heads, MLPs and the stream, many in one forward pass. [torch]

The runs, the metric m and the pairs of prompts are those of pairs.py; an effect is
m(patched) - m(base).

1. `activation_patching`: one activation is replaced, all that follows from it is recomputed (Meng
   et al. 2022, Sec. 2; Vig et al. 2020). Interventions of a layer are rows of one batch.
2. `path_patching`: a head is replaced, the other heads are kept as in the base run, and what so
   reaches the receivers (the logits, or queries, keys or values of heads) through the stream and
   the MLPs is what the receivers alone see in a second run (Wang et al. 2022, Sec. 3.1).
3. `edge_patching`: as 2. with the MLPs kept, too: one edge of the graph of EAP (eap.py).

TransformerLens's `patching` has a loop for 1., which the tests hold this equal to. It runs the
whole model and its unembedding once an intervention, and takes 10 to 20 s to import; its direct
path patching is linearised and keeps no other head; hence this module.
"""

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.models.heads import Heads, Slot
from pipeline.models.pairs import Node, Task


class Receiver(NamedTuple):
    """The query, key or value of a head; k and v are counted by key head."""

    layer: int
    slot: Slot
    head: int


# Where a node's change enters: the stream of the Run, and its hook. The MLP of a parallel layer
# does not read what its attention writes, so that the change enters behind it.
ENTRY = {"resid": "pre", "head": "mid", "attn": "mid", "mlp": "post"}
PARALLEL_ENTRY = ENTRY | {"head": "post", "attn": "post"}


def activation_patching(
    task: Task, nodes: list[Node], told: Callable[[int], None] = lambda _: None
) -> Tensor:
    """m(patched) - m(base) of each node alone, [nodes n].

    Args:
        told: called with the number of nodes done so far.
    """
    out = torch.zeros(len(nodes), len(task.before), device=task.before.device)
    streams = PARALLEL_ENTRY if task.heads.parallel else ENTRY
    entry = lambda i: (streams[nodes[i].kind], nodes[i].layer, nodes[i].position)  # noqa: E731
    done = 0
    for (stream, layer, position), group in groupby(
        sorted(range(len(nodes)), key=entry), key=entry
    ):
        start = getattr(task.base, stream)[layer]
        places = task.suffix(task.first_change(position))
        for some in task.pieces(list(group), places.shape[1]):
            x = [task.gathered(start + task.changed_by(nodes[i]), places) for i in some]
            hook = f"blocks.{layer}.hook_resid_{stream}"
            out[some] = task.resumed(hook, torch.stack(x), places) - task.before
            done += len(some)
            told(done)
    return out


def through_mlps(
    task: Task, layer: int, x: Tensor, place: Tensor, frozen: bool = False
) -> Iterator[tuple[int, Tensor]]:
    """(l, stream before layer l) for l above `layer`, at one position, with attention as in base.

    Norms and MLPs see one position at a time, so only that position is computed. The last l is
    n_layers: the stream that the final norm reads.

    Args:
        x: [k n d_model], the stream behind the attention of `layer`.
        place: [n], the position.
        frozen: keep the MLPs as in the base run, too.
    """
    at = lambda stream: stream[task.rows, place]  # noqa: E731
    heads, before = task.heads, None
    for i in range(layer, heads.n_layers):
        read = before if heads.parallel else x  # None: the MLP beside the first change
        x = x + (at(task.base.mlp(i)) if frozen or read is None else heads.mlp_writes(i, read))
        yield i + 1, x
        if i + 1 < heads.n_layers:
            before, x = x, x + at(task.base.attn(i + 1))


def path_patching(
    task: Task,
    senders: list[tuple[int, int]],
    receivers: list[Receiver] | None = None,
    at: str = "",
    told: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """m(receivers see the sender patched) - m(base), [senders n].

    Args:
        senders: (layer, head).
        receivers: None: the logits.
        at: the position at which the receivers read; default: the last of each prompt.
    """
    out = torch.zeros(len(senders), len(task.before), device=task.before.device)
    place = task.pairs.place(at) if at else task.pairs.end
    above = max((r.layer for r in receivers or []), default=task.heads.n_layers)
    layer_of = lambda i: senders[i][0]  # noqa: E731
    found: list[tuple[int, dict[Receiver, Tensor]]] = []
    for layer, group in groupby(sorted(range(len(senders)), key=layer_of), key=layer_of):
        some = list(group)
        if layer >= above:
            continue
        changes = [task.changed_by(Node("head", *senders[i])) for i in some]
        x = torch.stack([(task.base.mid[layer] + c)[task.rows, place] for c in changes])
        seen: dict[Receiver, Tensor] = {}
        for i, stream in through_mlps(task, layer, x, place):
            if i == task.heads.n_layers:
                if receivers is None:
                    out[some] = task.metric(stream) - task.before
            elif receivers is not None:
                seen |= {r: project(task.heads, r, stream) for r in receivers if r.layer == i}
                if i == above:
                    break
        found += [(k, {r: v[j] for r, v in seen.items()}) for j, k in enumerate(some)]
    if receivers is None:
        return out
    done = 0
    for piece in task.pieces(found, task.suffix(place).shape[1]):
        out[[k for k, _ in piece]] = received(task, [v for _, v in piece], place) - task.before
        done += len(piece)
        told(done)
    return out


def project(heads: Heads, receiver: Receiver, stream: Tensor) -> Tensor:
    """Its query, key or value, [... d_head], of the stream [... d_model] before its layer."""
    place = heads.place(receiver.layer, receiver.slot, receiver.head)
    return place.module(heads.attn_reads(receiver.layer, stream))[..., place.columns]


def received(task: Task, values: list[dict[Receiver, Tensor]], place: Tensor) -> Tensor:
    """m [k n] of base runs whose receivers get other values at one position.

    Args:
        values: a run each: receiver -> [n d_head]; receivers below the sender are left out.
    """
    k, n = len(values), len(place)
    start = min(r.layer for v in values for r in v)
    rows, places = torch.arange(k * n, device=place.device), task.suffix(place)
    offset = torch.zeros_like(rows) if task.base.past else place.repeat(k)
    given = {}
    for receiver in {r for v in values for r in v}:
        has = [j for j, v in enumerate(values) if receiver in v]
        which = torch.cat([rows[j * n : (j + 1) * n] for j in has])
        new = torch.cat([values[j][receiver] for j in has])
        given[receiver] = which, offset[which], new
    x = task.gathered(task.base.pre[start], places).expand(k, -1, -1, -1)
    with task.heads.set_inputs(given):
        return task.resumed(f"blocks.{start}.hook_resid_pre", x, places)


class Edge(NamedTuple):
    """From what a node writes to what another reads; slot is q, k, v, or blank for MLPs and logits.

    The source may be the embedding: resid of layer 0.
    """

    source: Node
    target: Node
    slot: str = ""


def edge_patching(task: Task, edge: Edge) -> Tensor:
    """m(target reads the source patched, all else kept) - m(base), [n]; all positions at once."""
    change, target = task.changed_by(edge.source), edge.target
    if target.kind == "logits":
        return task.metric(task.at_end(task.base.post[-1] + change)) - task.before
    layer = target.layer
    whole = task.suffix(torch.zeros_like(task.pairs.end))[:, : change.shape[1]]
    if target.kind == "mlp":
        mlp = task.heads.mlp_writes(layer, task.base.mlp_input(layer) + change)
        x = (task.base.mid[layer] + mlp)[None]
        return task.resumed(f"blocks.{layer}.hook_resid_post", x, whole)[0] - task.before
    receiver = Receiver(layer, edge.slot, target.head)
    x = task.base.pre[layer]
    new = project(task.heads, receiver, x + change)
    n, length = new.shape[:2]
    rows = torch.arange(n, device=new.device).repeat_interleave(length)
    at = torch.arange(length, device=new.device).repeat(n)
    with task.heads.set_inputs({receiver: (rows, at, new.flatten(0, 1))}):
        return task.resumed(f"blocks.{layer}.hook_resid_pre", x[None], whole)[0] - task.before
