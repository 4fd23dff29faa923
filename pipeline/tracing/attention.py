"""QK attributions: which features of a query and of a key make a head attend. [torch]

    score(q, k) = B(x_q, x_k) + rest,   B bilinear:  x_q W_Q R W_K^T x_k / sqrt(d_head)

with x the stream before a head's layer behind its norm, whose scale is kept. The stream is a sum of
what sources write (features, errors, embeddings), as they arrive there with all patterns below
kept, so that the score is a sum over pairs of a source of the query and one of the key (Kamath et
al. 2025, "Tracing Attention Computation Through Feature Interactions").

1. `Bilinear.of` measures B at two positions on the model itself, on unit keys: rotary angles,
   scales and shared keys are its own. B must give the model's score, or the head is refused.
2. `strongest` ranks sources of either side by what they give with the other side whole, one
   backward pass each.
3. `pairs` is the table of the strongest of both sides. Taken out of the query, of the key, and of
   both, a pair changes the score by its own term: S - S_q - S_k + S_qk (a test).
"""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from pipeline.errors import RetraceError
from pipeline.models import hooks, inner, places, splice
from pipeline.models.heads import Heads
from pipeline.tracing import heads as carrying
from pipeline.tracing.graph import Tracer
from pipeline.tracing.linear import Norm
from pipeline.tracing.replacement import Replacement

SAME = 1e-3  # share of the terms of a score by which B may miss it


class Place(NamedTuple):
    """A head, and the positions of a query and a key."""

    layer: int
    head: int
    query: int
    key: int


@dataclass(frozen=True)
class Bilinear:
    """B of a head at two positions.

    Attributes:
        B: [d_head d_head], of q and k as the projections write them.
        W_Q, W_K: [d_head d_model]; b_Q, b_K: 0 where there is none.
        norm: what the projections read the stream through.
        q, k: of the prompt; score: the model's, less what it adds whatever q and k are.
    """

    at: Place
    B: Float[Tensor, "d_head d_head"]
    W_Q: Float[Tensor, "d_head d_model"]
    W_K: Float[Tensor, "d_head d_model"]
    norm: Norm
    q: Float[Tensor, " d_head"]
    k: Float[Tensor, " d_head"]
    score: float

    @classmethod
    @torch.no_grad()
    def of(cls, hf: nn.Module, replacement: Replacement, at: Place) -> "Bilinear":
        """B, measured by unit queries and keys in the layer's own attention.

        Raises:
            RetraceError: the score is not bilinear, as where queries and keys are normalised.
        """
        if at.key > at.query:
            raise RetraceError(f"graphs: a query at {at.query} does not see a key at {at.key}")
        found, n = Heads(hf), len(replacement.linear.tokens)
        name, d = f"blocks.{at.layer}.", found.d_head
        tokens = replacement.linear.tokens[None]
        wanted = [f"{name}{h}" for h in ("hook_resid_pre", "attn.hook_q", "attn.hook_k")]
        seen = hooks.run_to(hf, tokens, wanted)
        seen = {h: x[0] for h, x in seen.items()}
        key_head = at.head // (found.n_heads // found.n_key_heads)
        columns = slice(at.head * d, (at.head + 1) * d), slice(key_head * d, (key_head + 1) * d)
        q = seen[f"{name}attn.hook_q"][at.query, columns[0]]
        k = seen[f"{name}attn.hook_k"][at.key, columns[1]]
        unit = torch.eye(d, device=q.device, dtype=q.dtype)
        none = torch.zeros_like(q)[None]
        # rows: nothing, the prompt's own, then every unit key under the prompt's query and so on
        queries = torch.cat([none, q[None], unit.repeat_interleave(d, 0)])
        keys = torch.cat([none, k[None], unit.repeat(d, 1)])
        scores = torch.cat(
            [
                _scores(hf, at, seen, n, columns, found.n_heads, *some)
                for some in zip(queries.split(256), keys.split(256), strict=True)
            ]
        )
        scores = scores - scores[0]
        out = cls(
            at, scores[2:].view(d, d), places.full(found.W_in(at.layer, "q", at.head)),
            places.full(found.W_in(at.layer, "k", key_head)),
            replacement.linear.layers[at.layer].attention.before, places.full(q), places.full(k),
            float(scores[1]),
        )  # fmt: skip
        terms = (out.q.abs() @ out.B.abs() @ out.k.abs()).item()
        if abs(out.score - (out.q @ out.B @ out.k).item()) > SAME * terms:
            raise RetraceError(
                f"graphs: the score of head {at.layer}.{at.head} is not bilinear in its query and "
                f"key, as where these are normalised, so that pairs of features have no part in it"
            )
        return out

    def q_of(self, x: Float[Tensor, "sources pos d_model"]) -> Float[Tensor, "sources d_head"]:
        """What sources' streams before the layer make of the query."""
        return self.norm.linear(x)[:, self.at.query] @ self.W_Q.T

    def k_of(self, x: Float[Tensor, "sources pos d_model"]) -> Float[Tensor, "sources d_head"]:
        """What sources' streams before the layer make of the key."""
        return self.norm.linear(x)[:, self.at.key] @ self.W_K.T


def _scores(
    hf: nn.Module, at: Place, seen: dict[str, Tensor], n_pos: int, columns: tuple[slice, slice],
    n_heads: int, queries: Tensor, keys: Tensor,
) -> Float[Tensor, " rows"]:  # fmt: skip
    """Scores of a head at two positions with its q and k replaced, a row each."""
    name, rows = f"blocks.{at.layer}.", len(queries)
    wanted = f"{name}attn.hook_attn_scores"

    def put(position: int, where: slice, values: Tensor):
        def edit(x: Tensor) -> Tensor:
            x = x.clone()
            x[:, position, where] = values
            return x

        return edit

    stream = seen[f"{name}hook_resid_pre"].expand(rows, -1, -1)
    with ExitStack() as stack:
        stack.enter_context(splice.skipped_below(hf, f"{name}hook_resid_pre"))
        for hook, edit in (
            (f"{name}hook_resid_pre", lambda _: stream),
            (f"{name}attn.hook_q", put(at.query, columns[0], queries)),
            (f"{name}attn.hook_k", put(at.key, columns[1], keys)),
        ):
            stack.enter_context(hooks.edited(hf, hook, edit))
        tokens = torch.zeros(rows, n_pos, dtype=torch.long, device=stream.device)
        found = hooks.run_to(hf, tokens, [wanted])[wanted]
    return places.full(inner.by_head(found, n_heads)[:, at.head, at.query, at.key])


@torch.no_grad()
def strongest(
    replacement: Replacement, found: Bilinear, n: int
) -> tuple[Int64[Tensor, " queries"], Int64[Tensor, " keys"]]:
    """The n sources of the query, and of the key, that give most with the other side whole.

    Places are among all active features, errors of the layers below, and embeddings.
    """
    linear, layer = replacement.linear, found.at.layer
    below = replace(linear, layers=linear.layers[:layer], final=found.norm)
    tracer = Tracer(replace(replacement, linear=below))
    directions = torch.stack([(found.B @ found.k) @ found.W_Q, (found.q @ found.B) @ found.W_K])
    positions = torch.tensor([found.at.query, found.at.key], device=directions.device)
    gives = tracer.rows(torch.full_like(positions, layer), positions, directions)
    count = min(n, gives.shape[1])
    query, key = gives.abs().topk(count).indices
    return query, key


@torch.no_grad()
def pairs(
    replacement: Replacement, found: Bilinear, queries: Int64[Tensor, " queries"],
    keys: Int64[Tensor, " keys"],
) -> Float[Tensor, "queries keys"]:  # fmt: skip
    """What each source of the query and each of the key give to the score together."""
    q = found.q_of(_arrived(replacement, found.at.layer, queries))
    return q @ found.B @ found.k_of(_arrived(replacement, found.at.layer, keys)).T


def _arrived(
    replacement: Replacement, layer: int, sources: Int64[Tensor, " sources"]
) -> Float[Tensor, "sources pos d_model"]:
    """The stream before a layer, of each source alone."""
    n_errors = layer * replacement.linear.n_pos
    made = [carrying.written(replacement, int(i), n_errors) for i in sources]
    streams = replacement.linear.pushed(*carrying.alone(replacement, made))
    return next(x for at, x in streams if at == layer)


def names(replacement: Replacement, layer: int, sources: Int64[Tensor, " sources"]) -> list[str]:
    """The names of sources, as in the tables of nodes."""
    features, n_pos, out = replacement.features, replacement.linear.n_pos, []
    for i in sources.tolist():
        if i < len(features):
            at, place, number = (int(x[i]) for x in features[:3])
            out.append(f"L{at}.{number}@{place}")
            continue
        at, place = divmod(i - len(features), n_pos)
        out.append(f"L{at}.error@{place}" if at < layer else f"embed@{place}")
    return out
