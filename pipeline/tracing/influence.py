"""How much nodes and edges of an attribution graph count, which are kept, and two scores. [torch]

Definitions of circuit-tracer (safety-research/circuit-tracer, graph.py) and Ameisen et al. 2025:

    A-hat   |A|, rows divided by their sums: of each node, the shares of what it reads
    I       p A-hat + p A-hat^2 + ...,  p the probabilities of the logits

The series ends, since edges only lead upwards. `influence` adds all its powers in one pass from the
logits down: when a layer's turn comes, whatever flows to it from above is known.

1. `prune` keeps the nodes that hold 0.8 of all influence, then the edges that hold 0.98 of what
   flows between these, then takes away nodes without edges into or out of them.
2. `scores`: the replacement score is the share of influence that ends in embeddings, not in errors;
   the completeness score the share of what nodes read that does not come from errors, nodes
   weighted by their influence.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

LEAST = 1e-10  # of a row's sum
PIECE = 2**24  # effects that are copied at once


class Pruned(NamedTuple):
    """What is left of a graph.

    Attributes:
        nodes: features, errors, embeddings, logits.
        edges: as the graph's edges.
        influence: of features, errors and embeddings.
        cumulative: of each of these, the share of all influence that nodes as strong have.
    """

    nodes: Bool[Tensor, " nodes"]
    edges: Bool[Tensor, "rows columns"]
    influence: Float[Tensor, " columns"]
    cumulative: Float[Tensor, " columns"]


class Scores(NamedTuple):
    replacement: float
    completeness: float


@torch.no_grad()
def influence(
    edges: Float[Tensor, "rows columns"],
    levels: Int64[Tensor, " rows"],
    p: Float[Tensor, " logits"],
    nodes: Int64[Tensor, " features"],
) -> Float[Tensor, " columns"]:
    """Influence of every column on the logits.

    Args:
        levels: of each row its layer; the highest are the logits.
        p: of the rows of logits, in their order.
        nodes: the columns of the other rows, in their order.
    """
    out = edges.new_zeros(edges.shape[1])
    top = levels == levels.max()
    column = torch.full_like(levels, -1)
    column[~top] = nodes
    sums = row_sums(edges)
    for level in levels.unique().flip(0).tolist():
        rows = (levels == level).nonzero()[:, 0]
        weights = p if level == int(levels.max()) else out[column[rows]]
        n = _rows(edges)
        for some, w in zip(rows.split(n), (weights / sums[rows]).split(n), strict=True):
            out += w @ edges[some].abs()
    return out


def row_sums(edges: Float[Tensor, "rows columns"]) -> Float[Tensor, " rows"]:
    """Sum of |edges| into each node."""
    pieces = edges.split(_rows(edges))
    return torch.cat([some.abs().sum(1) for some in pieces]).clamp(min=LEAST)


def _rows(edges: Float[Tensor, "rows columns"]) -> int:
    """How many rows are a piece."""
    return max(PIECE // max(edges.shape[1], 1), 1)


def threshold(scores: Float[Tensor, " n"], share: float) -> Float[Tensor, ""]:
    """The score down to which scores hold a share of their sum."""
    ordered = scores.sort(descending=True).values
    held = ordered.cumsum(0) / ordered.sum()
    return ordered[min(int(torch.searchsorted(held, share)), len(held) - 1)]


def _own_influence(
    edges: Tensor, levels: Tensor, p: Tensor
) -> tuple[Float[Tensor, " columns"], Float[Tensor, " rows"]]:
    """(influence of columns, of rows with p as that of logits); the first columns are the rows."""
    n = len(levels) - len(p)
    found = influence(edges, levels, p, torch.arange(n, device=edges.device))
    return found, torch.cat([found[:n], p])


@torch.no_grad()
def prune(
    edges: Float[Tensor, "rows columns"], levels: Int64[Tensor, " rows"],
    p: Float[Tensor, " logits"], n_pos: int, node: float = 0.8, edge: float = 0.98,
) -> Pruned:  # fmt: skip
    """The nodes and edges that hold most of the influence.

    Args:
        edges: rows of features and logits; columns of the same features, errors, embeddings.
        n_pos: number of embeddings, which are always kept, as logits are.
        node, edge: shares of influence that are kept.
    """
    n, n_logits = len(levels) - len(p), len(p)
    found, _ = _own_influence(edges, levels, p)
    every = torch.cat([found, torch.zeros_like(p)])
    kept = every >= threshold(every, node)
    kept[-n_logits - n_pos :] = True
    rows = torch.cat([kept[:n], kept[-n_logits:]]).nonzero()[:, 0]
    at = kept[:-n_logits].nonzero()[:, 0]
    inside = edges[rows[:, None], at]
    _, own = _own_influence(inside, levels[rows], p)
    shares = inside.abs() / row_sums(inside)[:, None] * own[:, None]
    mask = shares >= threshold(shares.flatten(), edge)
    m = int(kept[:n].sum())  # features among what is kept
    left = torch.ones(len(at), dtype=torch.bool, device=edges.device)
    while True:
        before = left.clone()
        left[:-n_pos] &= mask[:, :-n_pos].any(0)
        left[:m] &= mask[:m].any(1)
        if bool((left == before).all()):
            break
        mask[:m][~left[:m]] = False
        mask[:, ~left] = False
    nodes = torch.zeros_like(kept)
    nodes[at[left]] = True
    nodes[-n_logits:] = True
    whole = torch.zeros(edges.shape, dtype=torch.bool, device=edges.device)
    whole[rows[:, None], at] = mask
    order = found.sort(descending=True)
    cumulative = torch.zeros_like(found)
    cumulative[order.indices] = order.values.cumsum(0) / order.values.sum()
    return Pruned(nodes, whole, found, cumulative)


@torch.no_grad()
def scores(
    edges: Float[Tensor, "rows columns"], levels: Int64[Tensor, " rows"],
    p: Float[Tensor, " logits"], n_pos: int,
) -> Scores:  # fmt: skip
    """Graph replacement and completeness scores, of a graph before pruning or of a part of it."""
    n = len(levels) - len(p)
    found, own = _own_influence(edges, levels, p)
    errors, embeds = found[n:-n_pos].sum(), found[-n_pos:].sum()
    from_errors = edges[:, n:-n_pos].abs().sum(1) / row_sums(edges)
    complete = ((1 - from_errors) * own).sum() / own.sum()
    return Scores(float(embeds / (embeds + errors).clamp(min=LEAST)), float(complete))
