"""Attribution graphs: the direct effect of every node on every other, on one prompt. [torch]

After Ameisen et al. 2025 (Circuit Tracing, transformer-circuits.pub/2025/attribution-graphs) and
the public code of circuit-tracer (safety-research/circuit-tracer, attribution.py), whose nodes,
order, choice of logits and of features are taken over:

    A[t, s] = a_s sum_m W_dec_s[m] . J_m^T W_enc_t

a_s is the activation of the source, J_m the derivative of what the target reads with respect to
what layer m writes, in the replacement model with patterns and norms' scales kept (linear.py).

1. Nodes: active features, an error for each layer and position, an embedding for each position, and
   logits: the smallest set of tokens with a probability of 0.95 together, at most 10. A logit is
   taken less the mean over the vocabulary.
2. `Tracer.rows` pulls a batch of targets back at once and multiplies the gradient at each layer
   with what features, errors and embeddings write there, position by position.
3. Where fewer features are wanted than are active, those of largest influence on the logits are
   taken, ranked anew as rows come in (`trace`).
4. Edges into a node, and its bias, sum to its pre-activation: `Graph.balance` is by how much not.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from pipeline.errors import RetraceError
from pipeline.models import splice
from pipeline.tracing.influence import influence
from pipeline.tracing.replacement import Features, Replacement

UPDATE = 4  # batches between two rankings, as in circuit-tracer
FLOAT = 4  # bytes
SPARE = 0.8  # share of free memory that a graph may take


@dataclass(frozen=True)
class Logits:
    """The tokens that a graph explains."""

    tokens: Int64[Tensor, " n"]
    probabilities: Float[Tensor, " n"]
    directions: Float[Tensor, "n d_model"]


@torch.no_grad()
def top_logits(replacement: Replacement, cap: float, n: int, share: float) -> Logits:
    """The most probable next tokens, until their probabilities sum to `share`.

    Args:
        cap: the model's soft cap on logits, 0 for none.
        n: at most so many.
    """
    linear = replacement.linear
    last = linear.logits[-1].float()
    p = (cap * torch.tanh(last / cap) if cap else last).softmax(-1)
    top = p.topk(min(n, len(p)))
    count = int(torch.searchsorted(top.values.cumsum(0), share)) + 1
    tokens = top.indices[:count]
    directions = linear.W_U[tokens] - linear.W_U.mean(0)
    return Logits(tokens, top.values[:count], directions)


@dataclass(frozen=True)
class Graph:
    """Direct effects on one prompt.

    Attributes:
        features: all that are active; chosen: which of them are nodes, increasing.
        edges: [chosen + logits, chosen + errors + embeddings]; errors lie layer by layer.
        bias: of each row, what no feature, error or embedding writes; value: its pre-activation,
            or its logit less the mean logit.
        left_out: of each row, the sum of the effects of features that are no nodes.
    """

    features: Features
    chosen: Int64[Tensor, " n_chosen"]
    logits: Logits
    n_layers: int
    n_pos: int
    edges: Float[Tensor, "rows columns"]
    bias: Float[Tensor, " rows"]
    value: Float[Tensor, " rows"]
    left_out: Float[Tensor, " rows"]

    @property
    def n_chosen(self) -> int:
        return len(self.chosen)

    @property
    def n_errors(self) -> int:
        return self.n_layers * self.n_pos

    @property
    def levels(self) -> Int64[Tensor, " rows"]:
        """The layer of each row; n_layers of logits."""
        of_features = self.features.layer[self.chosen]
        return torch.cat([of_features, torch.full_like(self.logits.tokens, self.n_layers)])

    def balance(self) -> float:
        """Largest difference of a node's value and its edges plus bias, as a share of its terms.

        0 but for rounding.
        """
        left = (self.edges.sum(1) + self.left_out + self.bias - self.value).abs()
        terms = self.edges.abs().sum(1) + self.bias.abs() + self.value.abs()
        return float((left / terms.clamp(min=1e-10)).max())


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
        d, features = replacement.dictionaries, replacement.features
        for layer in range(self.n_layers):
            columns = features.of_layer(layer)
            if columns.start == columns.stop:
                continue
            numbers, a = features.number[columns], features.activation[columns, None]
            last = min(layer + d.W_dec[layer].shape[1], self.n_layers)
            for out in range(layer, last):
                rows = d.rows(layer, numbers, out) * a
                writer = Writer(columns.start, features.position[columns], rows, self.n_pos)
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
                writer.add(g, some)
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
    """What the features of one layer write into one layer, position by position.

    A position has its features side by side, filled up to the largest number that one has, so that
    one batched product serves all positions.

    Args:
        start: the column of the first feature.
        positions: of the features, increasing.
        rows: what they write.
    """

    def __init__(
        self, start: int, positions: Int64[Tensor, " n"], rows: Float[Tensor, "n d_model"],
        n_pos: int,
    ) -> None:  # fmt: skip
        counts = torch.bincount(positions, minlength=n_pos)
        ends = counts.cumsum(0)
        self.start, self.ends, self.width = start, ends.tolist(), int(counts.max())
        within = torch.arange(len(positions), device=rows.device) - (ends - counts)[positions]
        self.place = positions * self.width + within
        self.padded = rows.new_zeros(n_pos, self.width, rows.shape[1])
        self.padded[positions, within] = rows

    def add(
        self, g: Float[Tensor, "batch pos d_model"], out: Float[Tensor, "batch columns"]
    ) -> None:
        """Add the effects of these features to their columns of `out`."""
        n = g.shape[1]
        count = self.ends[n - 1]
        found = torch.bmm(g.transpose(0, 1), self.padded[:n].transpose(1, 2))  # [pos batch width]
        flat = found.transpose(0, 1).flatten(1)
        out[:, self.start : self.start + count] += flat[:, self.place[:count]]


# --- the graph -----------------------------------------------------------------------------


@torch.no_grad()
def trace(
    replacement: Replacement, logits: Logits, *, max_features: int = 0, batch_size: int = 256,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> Graph:  # fmt: skip
    """The attribution graph of a prompt.

    Args:
        max_features: take so many features at most, those of largest influence; 0: all.
        batch_size: targets that are pulled back at once.
        on_progress: called with the number of features done so far, and of all.

    Raises:
        RetraceError: the graph does not fit into memory.
    """
    features = replacement.features
    wanted = min(max_features or len(features), len(features))
    check_memory(replacement, len(logits.tokens), wanted, batch_size)
    tracer, n_logits = Tracer(replacement), len(logits.tokens)
    edges = replacement.linear.embed.new_empty(n_logits + wanted, tracer.n_columns)
    top = torch.full_like(logits.tokens, tracer.n_layers)
    last = torch.full_like(logits.tokens, tracer.n_pos - 1)
    edges[:n_logits] = tracer.rows(top, last, logits.directions)
    done = features.layer.new_empty(0)
    while len(done) < wanted:
        some = _next(tracer, edges[: n_logits + len(done)], logits, done, wanted, batch_size)
        # Those of early positions together, since what lies behind the last one is left out.
        for batch in some[features.position[some].argsort(stable=True)].split(batch_size):
            batch = batch[features.layer[batch].argsort(descending=True, stable=True)]
            start = n_logits + len(done)
            edges[start : start + len(batch)] = tracer.feature_rows(batch)
            done = torch.cat([done, batch])
            on_progress(len(done), wanted)
    order = done.argsort()
    rows = torch.cat([order + n_logits, torch.arange(n_logits, device=order.device)])
    chosen = done[order]
    columns = torch.cat(
        [chosen, torch.arange(len(features), tracer.n_columns, device=chosen.device)]
    )
    whole = edges[rows] if wanted == len(features) else edges[rows[:, None], columns]
    bias, value = _biases(replacement, chosen, logits)
    left_out = (
        edges.sum(1)[rows] - whole.sum(1) if wanted < len(features) else torch.zeros_like(bias)
    )
    return Graph(
        features, chosen, logits, tracer.n_layers, tracer.n_pos, whole, bias, value, left_out
    )


def _next(
    tracer: Tracer, edges: Tensor, logits: Logits, done: Tensor, wanted: int, batch_size: int
) -> Int64[Tensor, " n"]:
    """The features that are traced next, increasing."""
    n, features = tracer.n_features, tracer.replacement.features
    if wanted == n:
        return torch.arange(n, device=edges.device)
    levels = torch.cat([torch.full_like(logits.tokens, tracer.n_layers), features.layer[done]])
    ranks = influence(edges, levels, logits.probabilities, done)[:n]
    ranks[done] = -1.0
    count = min(UPDATE * batch_size, wanted - len(done))
    return ranks.argsort(descending=True)[:count].sort().values


def _biases(
    replacement: Replacement, chosen: Int64[Tensor, " n"], logits: Logits
) -> tuple[Tensor, Tensor]:
    """(what no node writes of each row's value, its value), features before logits."""
    linear, d, features = replacement.linear, replacement.dictionaries, replacement.features
    constants, last = linear.constant(replacement.fixed)
    bias = linear.embed.new_empty(len(chosen))
    layers, at, numbers = (x[chosen] for x in features[:3])
    for layer in layers.unique().tolist():
        mine = layers == layer
        rows = d.W_enc[layer][numbers[mine]]
        bias[mine] = (constants[layer][at[mine]] * rows).sum(-1) + d.b_enc[layer][numbers[mine]]
    mean = linear.b_U if isinstance(linear.b_U, float) else linear.b_U.mean()
    added = 0.0 if isinstance(linear.b_U, float) else linear.b_U[logits.tokens] - mean
    of_logits = last[-1] @ logits.directions.T + added
    values = linear.logits[-1, logits.tokens] - linear.logits[-1].mean()
    return torch.cat([bias, of_logits]), torch.cat([features.activation[chosen], values])


# --- memory --------------------------------------------------------------------------------


def bytes_of(replacement: Replacement, n_logits: int, n_chosen: int, batch_size: int) -> int:
    """Bytes that a graph of so many features takes while it is made."""
    linear, d = replacement.linear, replacement.dictionaries
    n, n_pos, width = len(replacement.features), linear.n_pos, linear.embed.shape[1]
    n_layers = len(linear.layers)
    columns = n + (n_layers + 1) * n_pos
    rows = n_chosen + n_logits
    edges = rows * (columns + n_chosen + (n_layers + 1) * n_pos)
    per_layer = torch.bincount(replacement.features.layer, minlength=n_layers).tolist()
    written = sum(c * w.shape[1] for c, w in zip(per_layer, d.W_dec, strict=True)) * width
    batch = batch_size * (columns * 2 + n_pos * width * 6)
    return FLOAT * (edges + 2 * written + batch)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def check_memory(
    replacement: Replacement, n_logits: int, n_chosen: int, batch_size: int, free: int | None = None
) -> None:
    """RetraceError where a graph does not fit, with the largest one that does.

    Args:
        free: bytes; default: those of the model's device.
    """
    free = free_bytes(replacement.linear.embed.device) if free is None else free
    room = int(SPARE * free)
    if bytes_of(replacement, n_logits, n_chosen, batch_size) <= room:
        return
    low, high = 0, n_chosen
    while high - low > 1:
        middle = (low + high) // 2
        fits = bytes_of(replacement, n_logits, middle, batch_size) <= room
        low, high = (middle, high) if fits else (low, middle)
    needs = bytes_of(replacement, n_logits, n_chosen, batch_size)
    remedy = (
        f"the largest graph that fits has {low} features: set graphs.max_features: {low}"
        if low
        else "not one feature fits: shorten the prompt or lower graphs.batch_size"
    )
    raise RetraceError(
        f"graphs: {n_chosen} features of {len(replacement.features)} active ones on "
        f"{replacement.linear.n_pos} tokens need {needs / 1e9:.2f} GB and {room / 1e9:.2f} GB are "
        f"free; {remedy}"
    )


def cap_of(hf: torch.nn.Module) -> float:
    """The soft cap on a model's logits."""
    return splice.tail(hf)[1]
