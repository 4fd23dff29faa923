"""Exact interventions on heads, MLPs and the stream, many in one forward pass. [torch]

Of a task (models/pairs.py), an effect is m(patched) - m(base). What is patched enters the stream at
one layer, and only what lies behind is computed again (models/rerun.py).

1. `activation_patching`: one activation is replaced, all that follows from it is recomputed (Meng
   et al. 2022, Sec. 2; Vig et al. 2020). Interventions on one layer are rows of one batch.
2. `path_patching`: a head is replaced, the other heads are kept as in the base run, and what so
   reaches the receivers (the logits, or queries, keys or values of heads) through the stream and
   the MLPs is what the receivers alone see in a second run (Wang et al. 2022, Sec. 3.1).
3. `edge_patching`: as 2. with the MLPs kept, too: one edge of the graph of EAP (eap.py).

TransformerLens's `patching` has a loop for 1., which the tests hold this equal to. It runs the
whole model and its unembedding once per intervention, and takes 10 to 20 s to import; its direct
path patching is linearised and keeps no other head; hence this module.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.models.heads import Slot
from pipeline.models.pairs import Node, Stream, Task
from pipeline.models.rerun import (
    OnDone,
    ignore,
    in_passes,
    patched,
    pieces,
    rerun,
    rerun_by_length,
)

# Where what a node writes enters the stream. In a parallel layer the MLP does not read what
# attention writes, so that it enters behind the MLP.
ENTRY = {
    "resid": "resid_pre", "head": "resid_mid", "pattern": "resid_mid", "attn": "resid_mid",
    "mlp": "resid_post",
}  # fmt: skip
PARALLEL_ENTRY = ENTRY | dict.fromkeys(("head", "pattern", "attn"), "resid_post")


LOGITS = Node("logits", -1)  # as the target of an edge


class Receiver(NamedTuple):
    """The query, key or value of a head; k and v are counted by key head."""

    layer: int
    slot: Slot
    head: int


class Edge(NamedTuple):
    """From what a node writes to what another reads; slot is q, k, v, or blank for MLPs and logits.

    The source may be the embedding: resid of layer 0.
    """

    source: Node
    target: Node
    slot: str = ""


def changed_by(task: Task, node: Node) -> Stream:
    """How the stream changes at the node's entry when the node is patched."""
    base, source, layer = task.base, task.source, node.layer
    if node.kind in ("head", "pattern"):
        d_head = task.heads.d_head
        at = slice(node.head * d_head, (node.head + 1) * d_head)
        if node.kind == "pattern":
            change_of_z = task.turned[layer][..., at]
        else:
            change_of_z = source.z[layer][..., at] - base.z[layer][..., at]
        change = task.heads.change_by(layer, node.head, change_of_z, base.z[layer])
    elif node.kind == "resid":
        change = source.pre[layer] - base.pre[layer]
    else:
        change = getattr(source, node.kind)(layer) - getattr(base, node.kind)(layer)
    return change * task.pairs.mask(node.position)[..., None]


def activation_patching(
    task: Task, nodes: list[Node], on_done: OnDone = ignore
) -> Float[Tensor, "nodes batch"]:
    """m(patched) - m(base) of each node alone.

    Args:
        on_done: called with the number of nodes done so far.
    """
    entry = PARALLEL_ENTRY if task.heads.parallel else ENTRY

    def m_of(key: tuple[str, str], some: list[int]) -> Tensor:
        hook, position = key
        stream = task.base.at(hook)
        streams = [stream + changed_by(task, nodes[i]) for i in some]
        start = task.pairs.first_change(position)
        return patched(task, hook, streams, start, rerun_by_length)

    keys = [(f"blocks.{n.layer}.hook_{entry[n.kind]}", n.position) for n in nodes]
    return in_passes(task, keys, m_of, lambda key: task.pairs.first_change(key[1]), on_done)


# --- paths ---------------------------------------------------------------------------------


def through_mlps(
    task: Task,
    layer: int,
    x: Float[Tensor, "runs batch d_model"],
    place: Int[Tensor, " batch"],
    frozen: bool = False,
) -> Iterator[tuple[int, Tensor]]:
    """(l, stream [runs batch d_model] before layer l) for l above `layer`, attention as in base.

    Norms and MLPs see one position at a time, so only that position is computed. The last l is
    n_layers: the stream that the final norm reads.

    Args:
        x: the stream behind the attention of `layer`.
        place: the position.
        frozen: keep the MLPs as in the base run, too.
    """

    def at(stream: Stream) -> Float[Tensor, "batch d_model"]:
        return stream[task.pairs.rows, place]

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
    on_done: OnDone = ignore,
) -> Float[Tensor, "senders batch"]:
    """m(receivers see the sender patched) - m(base).

    Args:
        senders: (layer, head).
        receivers: None: the logits.
        at: the position at which the receivers read; default: the last of each prompt.
        on_done: called with the number of senders done so far.
    """
    place = task.pairs.place(at) if at else task.pairs.end
    out = torch.zeros(len(senders), len(task.before), device=task.before.device)
    reached: list[tuple[int, dict[Receiver, Tensor]]] = []
    for layer in sorted({layer for layer, _ in senders}):
        some = [i for i, sender in enumerate(senders) if sender[0] == layer]
        changes = [changed_by(task, Node("head", *senders[i])) for i in some]
        x = torch.stack([(task.base.mid[layer] + c)[task.pairs.rows, place] for c in changes])
        if receivers is None:
            *_, (_, stream) = through_mlps(task, layer, x, place)
            out[some] = task.metric(stream) - task.before
        else:
            if inputs := _inputs_above(task, layer, x, place, receivers):
                reached += [(i, {r: v[j] for r, v in inputs.items()}) for j, i in enumerate(some)]
    n_done = 0
    for piece in pieces(task.pairs, reached, task.pairs.suffix(place).shape[1]):
        numbers, values = zip(*piece, strict=True)
        out[list(numbers)] = received(task, list(values), place) - task.before
        n_done += len(piece)
        on_done(n_done)
    return out


def _inputs_above(
    task: Task, layer: int, x: Tensor, place: Tensor, receivers: list[Receiver]
) -> dict[Receiver, Float[Tensor, "runs batch d_head"]]:
    """What the receivers above a layer read, of the stream x behind its attention."""
    last, out = max(r.layer for r in receivers), {}
    for i, stream in through_mlps(task, layer, x, place) if layer < last else ():
        out |= {r: task.heads.read_by(*r, stream) for r in receivers if r.layer == i}
        if i == last:
            break
    return out


def received(
    task: Task,
    values: list[dict[Receiver, Float[Tensor, "batch d_head"]]],
    place: Int[Tensor, " batch"],
) -> Float[Tensor, "runs batch"]:
    """m of base runs whose receivers get other values at one position.

    Args:
        values: one dictionary per run; receivers below the sender are left out.
    """
    k, n = len(values), len(place)
    start = min(r.layer for v in values for r in v)
    rows, places = torch.arange(k * n, device=place.device), task.pairs.suffix(place)
    offset = torch.zeros_like(rows) if task.base.past else place.repeat(k)
    given = {}
    for receiver in {r for v in values for r in v}:
        has = [j for j, v in enumerate(values) if receiver in v]
        which = torch.cat([rows[j * n : (j + 1) * n] for j in has])
        new = torch.cat([values[j][receiver] for j in has])
        given[receiver] = which, offset[which], new
    x = task.pairs.gathered(task.base.pre[start], places).expand(k, -1, -1, -1)
    with task.heads.set_inputs(given):
        return rerun(task, f"blocks.{start}.hook_resid_pre", x, places)


# --- edges ---------------------------------------------------------------------------------


def edge_patching(task: Task, edge: Edge) -> Float[Tensor, " batch"]:
    """m(target reads the source patched, all else kept) - m(base); all positions at once."""
    change, target = changed_by(task, edge.source), edge.target
    if target.kind == "logits":
        return task.metric(task.pairs.at_end(task.base.post[-1] + change)) - task.before
    layer, start = target.layer, torch.zeros_like(task.pairs.end)
    if target.kind == "mlp":
        mlp = task.heads.mlp_writes(layer, task.base.mlp_input(layer) + change)
        streams = [task.base.mid[layer] + mlp]
        return patched(task, f"blocks.{layer}.hook_resid_post", streams, start)[0] - task.before
    receiver = Receiver(layer, edge.slot, target.head)
    x = task.base.pre[layer]
    new = task.heads.read_by(*receiver, x + change)
    n, length = new.shape[:2]
    rows = torch.arange(n, device=new.device).repeat_interleave(length)
    at = torch.arange(length, device=new.device).repeat(n)
    with task.heads.set_inputs({receiver: (rows, at, new.flatten(0, 1))}):
        return patched(task, f"blocks.{layer}.hook_resid_pre", [x], start)[0] - task.before
