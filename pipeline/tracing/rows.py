"""Rows of an attribution graph: the direct effects of all nodes on a batch of targets. [torch]

    A[t, s] = a_s sum_m W_dec_s[m] . J_m^T W_enc_t

1. `Tracer.rows` pulls a batch of targets back at once (linear.py) and multiplies the gradient at
   each layer with what features, errors and embeddings write there, position by position.
2. What features write is gathered out of the decoders anew for every batch: kept, it would be all
   active features times all layers that they write to.
3. `Packed` holds the rows of the features that a graph has so far, without the columns that are
   zero by construction: a node of layer l is reached by features and errors of lower layers alone.
   It ranks the other features by their influence on the logits (influence.py), for which effects
   of all columns are needed, and gives the columns of the chosen ones at the end.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from pipeline.tracing.influence import LEAST
from pipeline.tracing.replacement import Replacement


class Tracer:
    """Rows of direct effects, of any targets of a prompt.

    Args:
        replacement: of the prompt.
    """

    def __init__(self, replacement: Replacement) -> None:
        self.replacement, self.linear = replacement, replacement.linear
        self.n_layers, self.n_pos = len(self.linear.layers), self.linear.n_pos
        self.n_features = len(replacement.features)
        self.n_columns = self.n_features + (self.n_layers + 1) * self.n_pos
        self.writers: list[list[Writer]] = [[] for _ in range(self.n_layers)]
        self.starts = [0]  # features below each layer, and all
        for layer in range(self.n_layers):
            columns = replacement.features.of_layer(layer)
            self.starts.append(columns.stop)
            if columns.start == columns.stop:
                continue
            writer = Writer(replacement, layer, columns)
            n_out = replacement.dictionaries.W_dec[layer].shape[1]
            for out in range(layer, min(layer + n_out, self.n_layers)):
                self.writers[out].append(writer)

    @torch.no_grad()
    def rows(
        self, layers: Int64[Tensor, " batch"], positions: Int64[Tensor, " batch"],
        directions: Float[Tensor, "batch d_model"],
    ) -> Float[Tensor, "batch columns"]:  # fmt: skip
        """Direct effects of all nodes on targets.

        Args:
            layers: not increasing; n_layers for logits.
            directions: rows of W_enc, or of the unembedding.
        """
        out = directions.new_zeros(len(layers), self.n_columns)
        errors, embeds = self.n_features, self.n_columns - self.n_pos
        for at, g in self.linear.pulled_back(layers.tolist(), positions, directions):
            n = g.shape[1]
            if at < 0:
                out[:, embeds : embeds + n] = _products(g, self.linear.embed[:n])
                break
            some = out[: len(g)]
            for writer in self.writers[at]:
                writer.add(at, g, some)
            start = errors + at * self.n_pos
            some[:, start : start + n] = _products(g, self.replacement.errors[at][:n])
        return out

    def feature_rows(self, some: Int64[Tensor, " batch"]) -> Float[Tensor, "batch columns"]:
        """Direct effects on features, by their places among all active ones, of falling layers."""
        features, d = self.replacement.features, self.replacement.dictionaries
        layers, numbers = features.layer[some], features.number[some]
        directions = torch.empty(len(some), d.W_enc[0].shape[1]).to(self.linear.embed)
        for layer in layers.unique().tolist():
            mine = layers == layer
            directions[mine] = d.W_enc[layer][numbers[mine]]
        return self.rows(layers, features.position[some], directions)


def _products(
    g: Float[Tensor, "batch pos d_model"], x: Float[Tensor, "pos d_model"]
) -> Float[Tensor, "batch pos"]:
    return torch.einsum("bpd,pd->bp", g, x)


class Writer:
    """What the features of one layer write, position by position.

    A position has its features side by side, filled up to the largest number that one has, so that
    one batched product serves all positions.

    Args:
        columns: of these features, of which there is at least one.
    """

    def __init__(self, replacement: Replacement, layer: int, columns: slice) -> None:
        features, n_pos = replacement.features, replacement.linear.n_pos
        self.dictionaries, self.layer, self.start = replacement.dictionaries, layer, columns.start
        self.numbers = features.number[columns]
        self.activation = features.activation[columns, None]
        positions = features.position[columns]
        counts = torch.bincount(positions, minlength=n_pos)
        ends = counts.cumsum(0)
        self.ends, self.width = ends.tolist(), int(counts.max())
        within = torch.arange(len(positions), device=counts.device) - (ends - counts)[positions]
        self.place = positions * self.width + within

    def written(self, out: int, n_pos: int) -> Float[Tensor, "pos width d_model"]:
        """What is written into the layer `out` at the first n_pos positions."""
        count = self.ends[n_pos - 1]
        rows = self.dictionaries.rows(self.layer, self.numbers[:count], out)
        padded = rows.new_zeros(n_pos * self.width, rows.shape[1])
        padded[self.place[:count]] = rows * self.activation[:count]
        return padded.view(n_pos, self.width, -1)

    def add(
        self, at: int, g: Float[Tensor, "batch pos d_model"], out: Float[Tensor, "batch columns"]
    ) -> None:
        """Add the effects of these features, by the gradient at what layer `at` writes."""
        n = g.shape[1]
        count = self.ends[n - 1]
        found = torch.bmm(g.transpose(0, 1), self.written(at, n).transpose(1, 2))
        flat = found.transpose(0, 1).flatten(1)  # [batch pos*width]
        out[:, self.start : self.start + count] += flat[:, self.place[:count]]


# --- rows that are kept ----------------------------------------------------------------------


@dataclass
class Block:
    """Rows of nodes of one level, chosen together.

    Attributes:
        nodes: the columns of these features; of logits their places.
        values: features, errors and embeddings below the level, side by side.
        sums: of |values|.
        filled: rows that are there.
    """

    level: int
    nodes: Int64[Tensor, " n"]
    values: Float[Tensor, "n width"]
    sums: Float[Tensor, " n"]
    filled: int = 0


class Packed:
    """Rows of the nodes so far, level by level."""

    def __init__(self, tracer: Tracer) -> None:
        self.starts, self.n_pos, self.n_columns = tracer.starts, tracer.n_pos, tracer.n_columns
        self.n_features, self.top = tracer.n_features, tracer.n_layers
        self.blocks: list[Block] = []
        self.open: dict[int, Block] = {}

    def parts(self, level: int) -> tuple[slice, slice, slice]:
        """The columns that may act on a node of a level: features, errors, embeddings."""
        n = self.n_features
        errors, embeds = slice(n, n + level * self.n_pos), self.n_columns - self.n_pos
        return slice(0, self.starts[level]), errors, slice(embeds, self.n_columns)

    def width(self, level: int) -> int:
        return self.starts[level] + (level + 1) * self.n_pos

    def reserve(self, levels: Int64[Tensor, " n"], like: Tensor) -> None:
        """Room for the rows that `add` is given next, in whatever order."""
        found, counts = levels.unique(return_counts=True)
        self.open = {}
        for level, count in zip(found.tolist(), counts.tolist(), strict=True):
            values = like.new_empty(count, self.width(level))
            block = Block(level, levels.new_empty(count), values, like.new_empty(count))
            self.open[level] = block
            self.blocks.append(block)

    def add(
        self, levels: Int64[Tensor, " n"], nodes: Int64[Tensor, " n"],
        rows: Float[Tensor, "n columns"],
    ) -> None:  # fmt: skip
        """Take in rows.

        Args:
            levels: not increasing.
        """
        found, counts = levels.unique_consecutive(return_counts=True)
        first = 0
        for level, count in zip(found.tolist(), counts.tolist(), strict=True):
            block = self.open[level]
            here, there = slice(first, first + count), slice(block.filled, block.filled + count)
            values = block.values[there]
            torch.cat([rows[here, part] for part in self.parts(level)], 1, out=values)
            block.sums[there] = values.abs().sum(1).clamp(min=LEAST)
            block.nodes[there] = nodes[here]
            block.filled += count
            first += count

    def influence(self, p: Float[Tensor, " logits"]) -> Float[Tensor, " columns"]:
        """Influence of every column on the logits, as `influence.influence`."""
        out = p.new_zeros(self.n_columns)
        for block in sorted(self.blocks, key=lambda b: -b.level):
            weights = p if block.level == self.top else out[block.nodes]
            found = (weights / block.sums) @ block.values.abs()
            parts = self.parts(block.level)
            sizes = [part.stop - part.start for part in parts]
            for part, some in zip(parts, found.split(sizes), strict=True):
                out[part] += some
        return out

    def between(
        self, chosen: Int64[Tensor, " n"], n_logits: int
    ) -> tuple[Float[Tensor, "rows columns"], Float[Tensor, " rows"]]:
        """(rows of chosen features and logits with the columns of chosen features, errors and
        embeddings; what is left of each row's sum); the blocks are given up.

        Args:
            chosen: all that were added, increasing.
        """
        n, n_pos = len(chosen), self.n_pos
        width = n + self.n_columns - self.n_features
        like = self.blocks[0].values
        whole, left = like.new_zeros(n + n_logits, width), like.new_zeros(n + n_logits)
        below = torch.searchsorted(chosen, chosen.new_tensor(self.starts)).tolist()
        while self.blocks:
            block = self.blocks.pop()
            nodes = block.nodes
            at = nodes + n if block.level == self.top else torch.searchsorted(chosen, nodes)
            count, start = below[block.level], self.starts[block.level]
            kept = like.new_zeros(len(at), width)
            kept[:, :count] = block.values[:, chosen[:count]]
            errors = block.level * n_pos
            kept[:, n : n + errors] = block.values[:, start : start + errors]
            kept[:, width - n_pos :] = block.values[:, -n_pos:]
            whole[at], left[at] = kept, block.values.sum(1) - kept.sum(1)
        return whole, left
