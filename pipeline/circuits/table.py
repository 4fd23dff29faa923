"""The tables of the stage `circuits`: which columns they have, and how rows are made of scores.

    nodes      one row per method and node: heads, MLPs, and the stream at named positions
    edges      one row per method and edge, and per threshold of ACDC
    methods    one row per method: how right it is

All methods share these columns. Scores are means over prompts, in float32 logits.
"""

from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.circuits.patching import Edge
from pipeline.latents.agreement import agreement
from pipeline.models import places
from pipeline.models.pairs import Node, Task

NODES = "method kind layer head position score sd".split()
EDGES = (
    "method source_kind source_layer source_head target_kind target_layer target_head target_input "
    "score exact threshold"
).split()
METHODS = (
    "method unit n total cut completeness_gap correlation spearman correlation_without_largest "
    "largest sign_agreement n_compared"
).split()


def parts(task: Task) -> list[Node]:
    """Heads and MLPs of all layers, at all positions at once."""
    heads = task.heads
    return [
        node
        for i in range(heads.n_layers)
        for node in (*(Node("head", i, h) for h in range(heads.n_heads)), Node("mlp", i))
    ]


def streams(task: Task, positions: list[str]) -> list[Node]:
    """The stream before every layer, at each position."""
    return [Node("resid", i, -1, p) for p in positions for i in range(task.heads.n_layers)]


def patterns(task: Task) -> list[Node]:
    """What each head attends to, at all positions at once."""
    heads = task.heads
    return [Node("pattern", i, h) for i in range(heads.n_layers) for h in range(heads.n_heads)]


def named(part: Node | Edge) -> str:
    """How a node or an edge is called in a table: "mlp 0", "head 9.6 → logits"."""
    if isinstance(part, Edge):
        slot = f" {part.slot}" if part.slot else ""
        return f"{named(part.source)} → {named(part.target)}{slot}"
    if part.kind == "logits":
        return "logits"
    head = f".{part.head}" if part.head >= 0 else ""
    return f"{part.kind} {part.layer}{head}" + (f" at {part.position}" if part.position else "")


def node_rows(method: str, nodes: list[Node], scores: Float[Tensor, "nodes batch"]) -> pd.DataFrame:
    """Rows of the table nodes; sd is over prompts."""
    frame, scores = pd.DataFrame([n._asdict() for n in nodes]), places.full(scores)
    frame = frame.assign(method=method)
    sd = scores.std(-1) if scores.shape[-1] > 1 else torch.full_like(scores[:, 0], torch.nan)
    frame = frame.assign(score=scores.mean(-1).cpu().numpy(), sd=sd.cpu().numpy())
    return frame[NODES]


def edge_rows(
    method: str,
    edges: list[Edge],
    scores: Float[Tensor, " edges"],
    exact: Float[Tensor, " edges"],
    threshold: float = np.nan,
) -> pd.DataFrame:
    """Rows of the table edges.

    Args:
        exact: exact effects; NaN where an edge was not patched.
        threshold: ACDC's τ; the circuit is every edge whose score is at least τ.
    """
    name = {"resid": "embed"}
    rows = [
        ("", name.get(s.kind, s.kind), s.layer, s.head, t.kind, t.layer, t.head, slot)
        for s, t, slot in edges
    ]
    frame = pd.DataFrame(rows, columns=EDGES[:8]).assign(method=method)
    score, exact = (x.double().cpu().numpy() for x in (scores, exact))
    return frame.assign(score=score, exact=exact, threshold=threshold)


def quality(
    method: str,
    unit: str,
    n: int,
    sums: tuple[float, float],
    parts: list,
    scores: Float[Tensor, " compared"],
    exact: Float[Tensor, " compared"],
) -> dict[str, Any]:
    """A row of the table methods.

    Args:
        unit: node, edge or latent, of which `n` were scored.
        sums: what the scores of the cut should sum to, and what they sum to.
        parts: what is compared: nodes, edges or latents.
        scores, exact: their estimates and exact effects.
    """
    total, cut = sums
    a, b = (x.double().cpu().numpy() for x in (scores, exact))
    same = float(np.mean(np.sign(a) == np.sign(b))) if len(a) else float("nan")
    gap = (cut - total) / abs(total) if total else float("nan")
    found = agreement(a, b)
    largest = named(parts[found.largest]) if found.largest >= 0 else ""
    values = (method, unit, n, total, cut, gap, *found[:3], largest, same, len(a))
    return dict(zip(METHODS, values, strict=True))
