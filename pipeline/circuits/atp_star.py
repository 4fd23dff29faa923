"""AtP*: attribution patching with two remedies for effects that it misses. [torch]

Attribution patching says that a node does nothing where its gradient is zero, and that is wrong in
two cases (Kramár, Lieberum, Shah & Nanda 2024, 2403.00745, Sec. 3):

    saturation     softmax is flat where a head gives all its weight to one token, so that the
                   gradient of its queries and keys vanishes, however far a patch turns the head
    cancellation   a node's direct and indirect effects are of opposite sign, so that a small error
                   of one of them is large beside their sum

1. QK fix (`qk_fix`): the pattern A' with the patched queries, or keys, is computed, and only what
   follows is linear: the effect is sum (A' - A) dm/dA, with dm/dA = dm/dz . v.
2. GradDrop (`atp_star`): one backward pass per layer, in which what that layer writes passes no
   gradient on. The score is the mean of the absolute estimates over these passes, times
   n_layers / (n_layers - 1), since the pass that drops a node's own layer gives exactly 0. A stream
   belongs to no layer: none of its estimates is 0 by construction, and its score is the plain mean.

Patched queries and keys are those of all positions at once; the paper has one node per position.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.circuits import eap
from pipeline.models import hooks, proof
from pipeline.models.heads import Slot
from pipeline.models.pairs import Node, Task
from pipeline.models.taps import OF_NODES, Taps, tapped

# Of every layer, how attention changes when the queries, or keys, of all its heads are patched.
Turns = dict[Slot, list[Float[Tensor, "batch n_heads pos pos"]]]
OF_INPUTS = (*OF_NODES, "inputs")  # gradients of nodes, queries, keys and values


@contextmanager
def inputs_of_source(task: Task, slot: Slot) -> Iterator[None]:
    """Inside: every layer reads its base stream, but for the queries, or keys, of all its heads."""
    heads = task.heads
    with ExitStack() as stack:

        def keep(hook: str, x: Tensor) -> None:
            """Inside: whatever comes to a hook, x goes on from there."""
            stack.enter_context(hooks.edited(task.hf, hook, lambda _: x))

        for i in range(heads.n_layers):
            keep(f"blocks.{i}.attn.hook_{slot}", heads.read(i, slot, task.source.pre[i]))
            keep(f"blocks.{i}.hook_resid_pre", task.base.pre[i])
        yield


def turned(task: Task, nodes: list[Node]) -> Turns:
    """A' - A of every head with its queries, or keys, patched; {} where no node is one of these.

    Raises:
        RetraceError: attention is more than its pattern times v, so that this says nothing.
    """
    if not any(node.kind in ("q", "k") for node in nodes):
        return {}
    names = [f"blocks.{i}.attn.hook_pattern" for i in range(task.heads.n_layers)]
    proof.prove_patterns(task.hf, names)
    base, out = task.heads.patterns(task.pairs.base), {}
    for slot in ("q", "k"):
        with inputs_of_source(task, slot):
            patched = task.heads.patterns(task.pairs.base)
        out[slot] = [new - old for new, old in zip(patched, base, strict=True)]
    return out


def fixed(
    task: Task, grads: Taps, turns: Turns
) -> dict[tuple[str, int], Float[Tensor, "batch heads"]]:
    """sum over positions of (A' - A) dm/dA, under (q or k, layer).

    Keys that query heads share count for all of them.
    """
    heads, out = task.heads, {}
    share = heads.n_heads // heads.n_key_heads
    for i in range(heads.n_layers):
        v = heads.read(i, "v", task.base.pre[i])
        v = v.unflatten(-1, (heads.n_key_heads, -1)).repeat_interleave(share, -2)
        g = grads.z[i].unflatten(-1, (heads.n_heads, -1))
        by_pattern = torch.einsum("nqhd,nkhd->nhqk", g, v)
        effect = {s: (turn[i] * by_pattern).sum((-1, -2)) for s, turn in turns.items()}
        out["q", i] = effect["q"]
        out["k", i] = effect["k"].unflatten(-1, (-1, share)).sum(-1)
    return out


def with_fix(
    task: Task, nodes: list[Node], grads: Taps, turns: Turns
) -> Float[Tensor, "nodes batch"]:
    """Estimates of nodes out of these gradients; queries and keys with the QK fix."""
    scores = eap.scored(task, nodes, eap.by_part(task, grads, eap.has_patterns(nodes)))
    better = fixed(task, grads, turns) if turns else {}
    for j, node in enumerate(nodes):
        if (node.kind, node.layer) in better:
            scores[j] = better[node.kind, node.layer][:, node.head]
    return scores


def qk_fix(task: Task, nodes: list[Node]) -> Float[Tensor, "nodes batch"]:
    """Attribution patching with the QK fix alone, signed.

    Args:
        nodes: queries and keys are those of all positions.
    """
    _, grads = eap.gradients(task, [0.0])
    return with_fix(task, nodes, grads, turned(task, nodes))


def dropped(task: Task) -> Iterator[Taps]:
    """Gradients of m on the base run, once for each layer whose attention and MLP pass none on.

    What a layer writes is tapped before the gate that drops it. A hook on the tapped tensor itself
    would come too late: autograd.grad captures the gradient of an inner tensor before its hooks.
    """
    n_layers, layer = task.heads.n_layers, -1
    embed = hooks.run_to(task.hf, task.pairs.base, ["hook_embed"])["hook_embed"]
    x = embed.requires_grad_(True)

    def gate(i: int, out: Tensor) -> Tensor:
        out = out.clone()
        out.register_hook(lambda g: torch.zeros_like(g) if i == layer else None)
        return out

    with torch.enable_grad(), tapped(task.heads) as taps, ExitStack() as stack:
        stack.enter_context(hooks.edited(task.hf, "hook_embed", lambda _: x))
        for i in range(n_layers):
            for part in ("attn", "mlp"):
                name = f"blocks.{i}.hook_{part}_out"
                stack.enter_context(hooks.edited(task.hf, name, partial(gate, i)))
        task.hf.base_model(input_ids=task.pairs.base, use_cache=False)
        m = task.metric(task.pairs.at_end(taps.end[0])).sum()
    for layer in range(n_layers):  # the gates read it
        yield taps.gradients(m, OF_INPUTS, retain_graph=layer < n_layers - 1)


def atp_star(task: Task, nodes: list[Node]) -> Float[Tensor, "nodes batch"]:
    """How much each node matters, never below 0: both remedies."""
    turns = turned(task, nodes)
    total = sum(with_fix(task, nodes, grads, turns).abs() for grads in dropped(task))
    n_layers = task.heads.n_layers
    passes = [n_layers if n.kind == "resid" else max(n_layers - 1, 1) for n in nodes]
    return total / torch.tensor(passes, dtype=total.dtype, device=total.device)[:, None]
