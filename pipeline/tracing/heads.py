"""Which attention heads carry an edge of an attribution graph, through their OV circuits. [torch]

An edge between two positions runs along paths through heads, whose patterns are kept. What a head
h of layer l carries of it is the sum over the paths through it:

    sum_q  (J W_enc_t) at z_h(q) . sum_k A_h[q, k] W_V x_s(k)

x_s is what the source alone makes of the stream before layer l, J the gradient from the target.
Both pass through all other heads, so that this is what the edge loses when the head is cut, exactly
(Ameisen et al. 2025 leave attention's part open; Kamath et al. 2025, "Tracing Attention
Computation Through Feature Interactions"). Where paths run through several heads they count for
each, and the heads of an edge sum to more than the edge.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.tracing.graph import Graph
from pipeline.tracing.replacement import Replacement


class Edge(NamedTuple):
    """A row and a column of a graph's edges."""

    row: int
    column: int


def source_of(
    replacement: Replacement, graph: Graph, column: int
) -> tuple[int, int, Float[Tensor, "n_out d_model"]]:
    """(layer, position, what it writes from there on); layer -1 of an embedding."""
    if column < graph.n_chosen:
        return written(replacement, int(graph.chosen[column]))
    n_errors = graph.n_layers * graph.n_pos
    return written(replacement, column - graph.n_chosen + len(graph.features), n_errors)


def written(
    replacement: Replacement, place: int, n_errors: int = 0
) -> tuple[int, int, Float[Tensor, "n_out d_model"]]:
    """(layer, position, what is written from there on) of a source; layer -1 of an embedding.

    Args:
        place: among all active features, errors and embeddings.
    """
    features, d = replacement.features, replacement.dictionaries
    if place < len(features):
        layer = int(features.layer[place])
        rows = d.W_dec[layer][features.number[place]] * features.activation[place]
        return layer, int(features.position[place]), rows
    place -= len(features)
    layer, at = divmod(place, replacement.linear.n_pos)
    if place < n_errors:
        return layer, at, replacement.errors[layer][at][None]
    return -1, at, replacement.linear.embed[at][None]


def alone(
    replacement: Replacement, sources: list[tuple[int, int, Tensor]]
) -> tuple[Float[Tensor, "sources pos d_model"], dict[int, Tensor]]:
    """(what is embedded, layer -> what is added to what its MLP writes) by each source alone."""
    n_layers, like = len(replacement.linear.layers), replacement.linear.embed
    embed = like.new_zeros(len(sources), *like.shape)
    added: dict[int, Tensor] = {}
    for row, (layer, at, rows) in enumerate(sources):
        if layer < 0:
            embed[row, at] = rows[0]
            continue
        for out, what in enumerate(rows[: n_layers - layer], layer):
            added.setdefault(out, torch.zeros_like(embed))[row, at] = what
    return embed, added


def target_of(replacement: Replacement, graph: Graph, row: int) -> tuple[int, int, Tensor]:
    """(layer, position, direction that is read) of a row of the graph."""
    if row >= graph.n_chosen:
        return graph.n_layers, graph.n_pos - 1, graph.logits.directions[row - graph.n_chosen]
    features, i = graph.features, int(graph.chosen[row])
    layer = int(features.layer[i])
    W_enc = replacement.dictionaries.W_enc[layer]
    return layer, int(features.position[i]), W_enc[features.number[i]]


def between_positions(graph: Graph, kept: Tensor, n: int) -> list[Edge]:
    """The strongest kept edges from one position to another, the strongest first.

    Args:
        kept: which edges, as `Pruned.edges`.
    """
    of_rows = torch.cat(
        [
            graph.features.position[graph.chosen],
            torch.full_like(graph.logits.tokens, graph.n_pos - 1),
        ]
    )
    every = torch.arange(graph.n_pos, device=kept.device)
    of_columns = torch.cat([of_rows[: graph.n_chosen], every.repeat(graph.n_layers + 1)])
    strength = graph.edges.abs() * (kept & (of_rows[:, None] != of_columns))
    top = strength.flatten().topk(min(n, int(strength.count_nonzero()))).indices.tolist()
    return [Edge(*divmod(i, strength.shape[1])) for i in top]


@torch.no_grad()
def carried(
    replacement: Replacement, graph: Graph, edges: list[Edge]
) -> Float[Tensor, "edges layers heads"]:
    """What each head carries of each edge."""
    linear, n_layers = replacement.linear, graph.n_layers
    n_heads = linear.layers[0].attention.n_heads
    out = linear.embed.new_zeros(len(edges), n_layers, n_heads)
    targets = [target_of(replacement, graph, e.row) for e in edges]
    order = sorted(range(len(edges)), key=lambda i: -targets[i][0])
    sources = [source_of(replacement, graph, edges[i].column) for i in order]
    streams = dict(linear.pushed(*alone(replacement, sources)))
    place = torch.tensor(order, device=out.device)

    def at_attention(layer: int, g: Tensor) -> None:
        attention = linear.layers[layer].attention
        z = attention.z(streams[layer])[: len(g), : g.shape[1]]
        out[place[: len(g)], layer] = (attention.at_z(g) * z).sum((1, 3))

    layers = [targets[i][0] for i in order]
    positions = torch.tensor([targets[i][1] for i in order], device=out.device)
    directions = torch.stack([targets[i][2] for i in order])
    for _ in linear.pulled_back(layers, positions, directions, at_attention):
        pass
    return out
