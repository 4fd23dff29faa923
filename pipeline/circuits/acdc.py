"""Circuits as sets of edges: ACDC, edge attribution patching, and exact single edges. [torch]

All of them say which edges of an `EdgeGraph` an output needs, by a loss L >= 0 that is 0 for the
whole graph: the KL divergence of the next token, or the squared distance of the outputs.

    acdc      edges are cut one by one, from the logits down; a cut that raises L by less than a
              threshold tau stays (Conmy et al. 2023, 2304.14997, Algorithm 1). What is cut depends
              on the order, of which Algorithm 1 admits many: `drawn_order` gives others
    exact     L when this edge alone is cut
    EAP       (a_u' - a_u) . dm/d(input of v) in the whole graph (Syed et al. 2023, 2310.10348)
    EAP-IG    the same with L for m and the gradient averaged over embeddings between clean and
              corrupt (Hanna et al. 2024, 2403.17806)

L has no gradient at the whole graph, its minimum. So m of EAP is linear: the change of the outputs
along the direction in which cutting everything moves them.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.circuits.edge_graph import EdgeGraph
from pipeline.models import places
from pipeline.models.rerun import OnDone, ignore

Logits = Float[Tensor, "graphs batch pos d_vocab"]
Loss = Callable[[Logits], Float[Tensor, " graphs"]]
Scores = Float[Tensor, " edges"]
SEQUENCES_PER_PASS = 4096


def squared_distance(
    clean: Float[Tensor, "batch pos d_vocab"], first: int = 0, n_outputs: int | None = None
) -> Loss:
    """Mean (y - clean)^2 over prompts, positions and outputs.

    Args:
        first: the first position that counts.
        n_outputs: how many of the logits count; None: all.
    """
    wanted = clean[:, first:, :n_outputs]
    return lambda y: ((y[..., first:, :n_outputs] - wanted) ** 2).mean((-3, -2, -1))


def kl_divergence(clean: Float[Tensor, "batch pos d_vocab"], end: Int[Tensor, " batch"]) -> Loss:
    """Mean KL(clean || y) of the next token, in nats, at the positions `end`."""
    rows = torch.arange(len(end), device=end.device)
    log_p = places.full(clean[rows, end]).log_softmax(-1)

    def loss(y: Logits) -> Float[Tensor, " graphs"]:
        log_q = places.full(y[:, rows, end]).log_softmax(-1)
        return (
            F.kl_div(log_q, log_p.expand_as(log_q), reduction="none", log_target=True)
            .sum(-1)
            .mean(-1)
        )

    return loss


def towards_cut(graph: EdgeGraph, first: int = 0, n_outputs: int | None = None) -> Loss:
    """m: the mean over prompts and positions of (y - clean) . d, d the unit change of each prompt.

    d is what the outputs [pos n_outputs] of a prompt become with every edge cut, minus the clean
    ones, over its norm; prompts that do not change have none.
    """

    def outputs(y: Float[Tensor, "*graphs batch pos d_vocab"]) -> Float[Tensor, "*graphs batch d"]:
        return y[..., first:, :n_outputs].flatten(-2)

    clean = outputs(graph.clean)
    change = outputs(graph.run(graph.everything() * 0)[0]) - clean
    d = F.normalize(change, dim=-1)
    return lambda y: ((outputs(y) - clean) * d).sum(-1).mean(-1)


def drawn_order(graph: EdgeGraph, rng: np.random.Generator) -> list[int]:
    """An order of the edges that Algorithm 1 admits, drawn at random.

    The readers (a query, key or value and its input, an MLP, the logits) come in a reverse
    topological order: at each turn one is drawn among those whose own readers are all done. The
    edges into one reader follow each other in any order. `graph.edges` is one such order, that of
    the authors' code.
    """
    group_of = [(e.target, e.slot, e.source.kind == "input") for e in graph.edges]
    groups: dict[tuple, list[int]] = {}
    for i, group in enumerate(group_of):
        groups.setdefault(group, []).append(i)
    waits = {g: {group_of[j] for j in graph.carriers(some[0])} - {g} for g, some in groups.items()}
    order: list[int] = []
    while waits:
        ready = [g for g, others in waits.items() if others.isdisjoint(waits)]
        group = ready[rng.integers(len(ready))]
        del waits[group]
        order += rng.permutation(groups[group]).tolist()
    return order


def acdc(
    graph: EdgeGraph,
    loss: Loss,
    thresholds: list[float],
    on_done: OnDone = ignore,
    order: Sequence[int] | None = None,
) -> tuple[Bool[Tensor, "thresholds edges"], Float[Tensor, "thresholds edges"]]:
    """Which edges stay at each threshold, and by how much L rose when each edge was tested.

    1. H <- G.  2. For v from the logits down, for each u -> v: cut it; if L rises by less than tau,
    it stays cut.  All thresholds run side by side, each as if alone. An edge into what nothing
    reads any more is cut without a run: its rise is 0.

    Args:
        on_done: called with the number of edges done so far.
        order: the edges in the order of their turns, as `drawn_order` gives it; None: graph.edges.
    """
    tau = torch.tensor(thresholds, dtype=torch.float64, device=graph.tokens.device)
    kept = graph.everything(len(thresholds))
    current, rises = loss(graph.run(kept)), torch.zeros_like(kept)
    for n_done, i in enumerate(range(len(graph.edges)) if order is None else order, 1):
        if not kept[:, graph.carriers(i)].any():
            kept[:, i] = 0
            continue
        trial = kept.clone()
        trial[:, i] = 0
        after = loss(graph.run(trial))
        rises[:, i] = after - current
        gone = rises[:, i] < tau
        kept[gone, i] = 0
        current = torch.where(gone, after, current)
        on_done(n_done)
    return kept.bool(), rises


def losses(
    graph: EdgeGraph, loss: Loss, present: Float[Tensor, "graphs edges"]
) -> Float[Tensor, " graphs"]:
    """L of cut graphs, as many in a pass as fit.

    Args:
        present: 1 for an edge that is kept, 0 for one that is cut.
    """
    some = max(1, SEQUENCES_PER_PASS // len(graph.tokens))
    return torch.cat([loss(graph.run(piece)) for piece in present.split(some)])


def exact(graph: EdgeGraph, loss: Loss) -> Scores:
    """L with each edge alone cut."""
    n = len(graph.edges)
    return losses(graph, loss, graph.everything(n) - torch.eye(n, device=graph.tokens.device))


def attribution(graph: EdgeGraph, measure: Loss, alphas: list[float]) -> Scores:
    """(a_u' - a_u) . dm/d(input of v) of every edge.

    Args:
        measure: m.
        alphas: where on the way from the clean embeddings (0) to the cut ones (1) the gradient is
            taken; [0.0] is EAP, several are EAP-IG.
    """
    n = graph.n_embeds
    along = torch.tensor(alphas, device=graph.tokens.device)[:, None, None, None]
    embeds = [
        (on + along * (off - on)).requires_grad_(True)
        for on, off in zip(graph.on[:n], graph.off[:n], strict=True)
    ]
    with torch.enable_grad():
        logits, run = graph.traced(graph.everything(len(alphas)), embeds)
        wanted = [*run.read.values(), *run.inputs.values()]
        found = torch.autograd.grad(measure(logits).sum(), wanted, allow_unused=True)
    means = [
        torch.zeros_like(w[0]) if g is None else g.mean(0)
        for w, g in zip(wanted, found, strict=True)
    ]
    scores = graph.everything()[0] * 0
    change = graph.off - graph.on
    for key, g in zip(run.read, means, strict=False):  # [targets batch pos d_model]
        each = torch.einsum("snpd,tnpd->ts", change[: len(graph.before(key))], g)
        scores[graph.columns[key]] = each
    for key, g in zip(run.inputs, means[len(run.read) :], strict=True):
        each = ((graph.off_inputs[key] - graph.on_inputs[key]) * g).sum((0, 1))
        scores[graph.gates[key]] = each.unflatten(0, (-1, graph.heads.d_head)).sum(-1)
    return scores
