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
2. `Tracer.rows` (rows.py) gives the effects on a batch of targets.
3. Where fewer features are wanted than are active, those of largest influence on the logits are
   taken, ranked anew as rows come in (`trace`).
4. Edges into a node, and its bias, sum to its pre-activation: `Graph.balance` is by how much not.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from pipeline.errors import RetraceError
from pipeline.models import splice
from pipeline.tracing.influence import row_sums
from pipeline.tracing.replacement import Features, Replacement
from pipeline.tracing.rows import Packed, Tracer

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
        terms = row_sums(self.edges) + self.bias.abs() + self.value.abs()
        return float((left / terms.clamp(min=1e-10)).max())


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
    features, n_logits = replacement.features, len(logits.tokens)
    wanted = min(max_features or len(features), len(features))
    check_memory(replacement, n_logits, wanted, batch_size)
    tracer = Tracer(replacement)
    top = torch.full_like(logits.tokens, tracer.n_layers)
    last = torch.full_like(logits.tokens, tracer.n_pos - 1)
    of_logits = tracer.rows(top, last, logits.directions)
    found = _all if wanted == len(features) else _strongest
    chosen, whole, left_out = found(tracer, of_logits, logits, wanted, batch_size, on_progress)
    bias, value = _biases(replacement, chosen, logits)
    return Graph(
        features, chosen, logits, tracer.n_layers, tracer.n_pos, whole, bias, value, left_out
    )


Found = tuple[Int64[Tensor, " n"], Float[Tensor, "rows columns"], Float[Tensor, " rows"]]


def _all(
    tracer: Tracer, of_logits: Tensor, logits: Logits, wanted: int, batch_size: int,
    on_progress: Callable[[int, int], None],
) -> Found:  # fmt: skip
    """(every feature, its rows and those of logits, nothing that is left out)."""
    chosen = torch.arange(wanted, device=of_logits.device)
    whole = of_logits.new_empty(wanted + len(of_logits), tracer.n_columns)
    whole[wanted:], done = of_logits, 0
    for batch in _batches(tracer, chosen, batch_size):
        whole[batch] = tracer.feature_rows(batch)
        on_progress(done := done + len(batch), wanted)
    return chosen, whole, whole.new_zeros(len(whole))


def _strongest(
    tracer: Tracer, of_logits: Tensor, logits: Logits, wanted: int, batch_size: int,
    on_progress: Callable[[int, int], None],
) -> Found:  # fmt: skip
    """(the features of largest influence, effects among them and on logits, those of others)."""
    levels, packed = tracer.replacement.features.layer, Packed(tracer)
    top = torch.full_like(logits.tokens, tracer.n_layers)
    packed.reserve(top, of_logits)
    packed.add(top, torch.arange(len(top), device=top.device), of_logits)
    done = levels.new_empty(0)
    while len(done) < wanted:
        ranks = packed.influence(logits.probabilities)[: tracer.n_features]
        ranks[done] = -1.0
        count = min(UPDATE * batch_size, wanted - len(done))
        some = ranks.argsort(descending=True)[:count].sort().values
        packed.reserve(levels[some], of_logits)
        for batch in _batches(tracer, some, batch_size):
            packed.add(levels[batch], batch, tracer.feature_rows(batch))
            done = torch.cat([done, batch])
            on_progress(len(done), wanted)
    chosen = done.sort().values
    return chosen, *packed.between(chosen, len(top))


def _batches(
    tracer: Tracer, some: Int64[Tensor, " n"], size: int
) -> Iterator[Int64[Tensor, " batch"]]:
    """Features that are traced at once, of falling layers; those of early positions together, since
    what lies behind the last one is left out.
    """
    features = tracer.replacement.features
    for batch in some[features.position[some].argsort(stable=True)].split(size):
        yield batch[features.layer[batch].argsort(descending=True, stable=True)]


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
    linear, features = replacement.linear, replacement.features
    n, n_pos, width = len(features), linear.n_pos, linear.embed.shape[1]
    n_layers = len(linear.layers)
    columns = n + (n_layers + 1) * n_pos
    edges = (n_chosen + n_logits) * (n_chosen + (n_layers + 1) * n_pos)
    per_layer = torch.bincount(features.layer, minlength=n_layers)
    below = (per_layer.cumsum(0) - per_layer)[features.layer[n - n_chosen :]]
    highest = below + (features.layer[n - n_chosen :] + 1) * n_pos  # at most as wide as these
    packed = int(highest.sum()) + n_logits * columns if n_chosen < n else 0
    batch = batch_size * (columns * 2 + n_pos * width * 6) + 4 * int(per_layer.max()) * width
    return FLOAT * (edges + packed + batch)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return min(psutil.virtual_memory().available, *limits())


def limits(
    own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> Iterator[float]:
    """What the limits of a container or of a cluster's job leave: of the process's control group
    (version 2) and of each above it; inf where nothing limits it.
    """
    yield math.inf
    lines = _lines(own) if own.is_file() else []
    path = next((line[3:] for line in lines if line.startswith("0::")), None)
    group = root / path.lstrip("/") if path else root
    for at in (group, *group.parents):
        files = [at / f"memory.{name}" for name in ("max", "current", "stat")]
        if not all(f.is_file() for f in files):
            continue
        (most, *_), (current, *_), stat = map(_lines, files)
        if most != "max":
            spare = dict(line.split() for line in stat).get("inactive_file", 0)
            yield max(int(most) - int(current) + int(spare), 0)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


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
