"""Features taken out of the true model, beside what the attribution graph says of it. [torch]

    said       direct effects carried on along the graph, patterns and scales kept
    measured   the change when a_s W_dec_s is taken from what the MLPs write, everything behind it
               computed anew by the model itself, its MLPs included
    null       the same with the decoder row of another feature in the place of this one's, at the
               same layers and position, with the same activation and length

1. The features of largest influence are taken out one by one; targets are the logits and all kept
   features behind. Changes of features are shares of their activations, those of logits are nats.
2. The graph is faithful as far as what it says correlates with what is measured, over all pairs
   (Ameisen et al. 2025, "Evaluating mechanistic faithfulness"). What it says of one feature must
   not fit what another does: that is the null.
"""

from contextlib import ExitStack
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from pipeline.models import hooks, places, splice
from pipeline.tracing.graph import Graph
from pipeline.tracing.replacement import Replacement

ROWS = 16  # prompts a forward pass


class Changes(NamedTuple):
    """Changes of every node's value, logits last; a feature's as a share of its activation.

    NaN where a node does not lie behind the feature that is taken out.
    """

    said: Float[Tensor, "sources nodes"]
    measured: Float[Tensor, "sources nodes"]
    null: Float[Tensor, "sources nodes"]


@torch.no_grad()
def said(graph: Graph, sources: Int64[Tensor, " sources"]) -> Float[Tensor, "sources nodes"]:
    """What a graph says happens to each node when features are taken out.

    A change of a source by a share r of its activation changes a target by r times the edge.

    Args:
        sources: places among the graph's chosen features.
    """
    n, levels = graph.n_chosen, graph.levels
    activation = graph.features.activation[graph.chosen]
    share = graph.edges.new_zeros(len(sources), n)
    change = graph.edges.new_zeros(len(sources), len(levels))
    own = torch.arange(len(sources), device=share.device), sources
    for level in levels.unique().tolist():
        rows = (levels == level).nonzero()[:, 0]
        change[:, rows] = share @ graph.edges[rows, :n].T
        features = rows[rows < n]
        share[:, features] = change[:, features] / activation[features]
        share[own] = -1.0
    return torch.cat([share, change[:, n:]], 1)


@torch.no_grad()
def compare(
    hf: nn.Module, replacement: Replacement, graph: Graph, sources: Int64[Tensor, " sources"],
    draw: torch.Generator,
) -> Changes:  # fmt: skip
    """What the graph says of features that are taken out, what happens, and the null.

    Args:
        sources: places among the graph's chosen features.
        draw: of the features of the null.
    """
    features = graph.features
    chosen = graph.chosen[sources]
    edits = [_edit(replacement, int(i), int(features.number[i])) for i in chosen]
    others = [_other(replacement, int(i), draw) for i in chosen]
    values = [
        _values(hf, replacement, graph, some)
        for some in _pieces([None, *edits, *others])
    ]  # fmt: skip
    whole = torch.cat(values)
    change = whole[1:] - whole[0]
    change[:, : graph.n_chosen] /= features.activation[graph.chosen]
    reached = graph.levels > features.layer[chosen][:, None]
    at = torch.cat(
        [features.position[graph.chosen], torch.full_like(graph.logits.tokens, graph.n_pos)]
    )
    reached &= at >= features.position[chosen][:, None]
    hidden = torch.where(reached, 0.0, torch.nan)
    measured, null = change.split(len(sources))
    return Changes(said(graph, sources) + hidden, measured + hidden, null + hidden)


Edit = tuple[int, int, Tensor]  # layer, position, what is added to each layer's output from there


def _edit(replacement: Replacement, i: int, number: int) -> Edit:
    """Feature i taken out, along the decoder rows of a feature of its layer."""
    features, d = replacement.features, replacement.dictionaries
    layer = int(features.layer[i])
    return layer, int(features.position[i]), -features.activation[i] * d.W_dec[layer][number]


def _other(replacement: Replacement, i: int, draw: torch.Generator) -> Edit:
    """The same along another feature's rows, as long as its own."""
    features, d = replacement.features, replacement.dictionaries
    layer, own = int(features.layer[i]), int(features.number[i])
    n = len(d.W_dec[layer])
    number = (own + 1 + int(torch.randint(n - 1, (), generator=draw))) % n if n > 1 else own
    layer, position, change = _edit(replacement, i, number)
    length = d.W_dec[layer][own].norm() / d.W_dec[layer][number].norm().clamp(min=1e-10)
    return layer, position, change * length


def _pieces(edits: list) -> list[list]:
    return [edits[i : i + ROWS] for i in range(0, len(edits), ROWS)]


def _values(
    hf: nn.Module, replacement: Replacement, graph: Graph, edits: list[Edit | None]
) -> Float[Tensor, "edits nodes"]:
    """The value of every node in the true model: pre-activations, then logits less their mean."""
    linear, d = replacement.linear, replacement.dictionaries
    n_layers, read = d.n_layers, {}
    added: dict[int, list[tuple[int, int, Tensor]]] = {}
    for row, edit in enumerate(edits):
        if edit is not None:
            for out, change in enumerate(edit[2]):
                added.setdefault(edit[0] + out, []).append((row, edit[1], change))

    def reader(layer: int):
        def see(x: Tensor) -> None:
            read[layer] = places.full(x)

        return see

    def writer(layer: int):
        def see(y: Tensor) -> Tensor:
            y = y.clone()
            for row, at, change in added[layer]:
                y[row, at] += change.to(y.dtype)
            return y

        return see

    tokens = linear.tokens.expand(len(edits), -1)
    with ExitStack() as stack:
        for layer in range(n_layers):
            stack.callback(hooks.site(hf, d.hooks[layer]).register(reader(layer)).remove)
        for layer in added:
            stack.callback(hooks.site(hf, d.output_hooks[layer]).register(writer(layer)).remove)
        last = f"blocks.{n_layers - 1}.hook_resid_post"
        stream = hooks.run_to(hf, tokens, [last])[last]
    logits = splice.unembed(hf, stream[:, -1])
    logits = logits[:, graph.logits.tokens] - logits.mean(1, keepdim=True)
    features, out = graph.features, logits.new_empty(len(edits), graph.n_chosen)
    layers, at, numbers = (x[graph.chosen] for x in features[:3])
    for layer in layers.unique().tolist():
        mine = layers == layer
        rows = d.W_enc[layer][numbers[mine]]
        out[:, mine] = (read[layer][:, at[mine]] * rows).sum(-1) + d.b_enc[layer][numbers[mine]]
    return torch.cat([out, logits], 1)
