"""Every method of the section circuits as a function: a task in, rows of tables out. [torch]

`METHODS` lists them. Each gets the same `Case`: the task, the spec, and what several methods share,
computed when it is first asked for. Each gives `Rows`: of the tables nodes or edges, and one of the
table methods.

How right a method is has two measures. Its scores of a cut of the graph, a set of parts through
which all of the difference flows, have to sum to the whole effect: the embeddings of the tokens
that differ, or what is written to the logits. And scores are compared with exact patching: those of
nodes all; those of edges and latents for the largest scores, and for some edges drawn at random,
since only these tell what a method misses.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.circuits import acdc, atp_star, direct_logit, eap, table
from pipeline.circuits.edge_graph import EdgeGraph
from pipeline.circuits.head_inputs import many_edges
from pipeline.circuits.patching import LOGITS, Edge, activation_patching, path_patching
from pipeline.job import cli
from pipeline.latents import sites as latents
from pipeline.latents.units import reads_of
from pipeline.models import proof
from pipeline.models.pairs import Node, Task
from pipeline.spec.measured import LATENT_METHODS, CircuitsSpec

NAN = float("nan")


class Rows(NamedTuple):
    """What a method adds to the tables: frames of nodes and edges, and its row of methods."""

    nodes: list[pd.DataFrame]
    edges: list[pd.DataFrame]
    quality: dict


@dataclass(frozen=True)
class Case:
    """A task, what is asked of it, and the exact effects that several methods are compared with.

    Attributes:
        seed: of the edges that are drawn, and of ACDC's order.
        units: hook -> what latent_attribution and latent_ig score.
    """

    task: Task
    spec: CircuitsSpec
    seed: int
    units: dict[str, latents.Units] = field(default_factory=dict)

    @cached_property
    def total(self) -> float:
        """The effect of patching everything."""
        return float(self.task.total.mean())

    @cached_property
    def parts(self) -> list[Node]:
        """Heads and MLPs: the nodes on which methods are compared."""
        return table.parts(self.task)

    @cached_property
    def nodes(self) -> list[Node]:
        """All that the table nodes has rows for: the parts first, then stream and patterns."""
        out = self.parts + table.streams(self.task, self.spec.positions)
        if not self.spec.patterns:
            return out
        known = [f"blocks.{i}.attn.hook_pattern" for i in range(self.task.heads.n_layers)]
        proof.prove_patterns(self.task.hf, known)
        return out + table.patterns(self.task)

    @cached_property
    def cut(self) -> list[Node]:
        """The embeddings of the tokens that differ, through which all of the difference flows."""
        return [Node("resid", 0, -1, p) for p in self.task.pairs.differing()]

    @cached_property
    def effects(self) -> Float[Tensor, "nodes batch"]:
        """The exact effect of patching each node."""
        progress = cli.Progress("activation patching", len(self.nodes), "nodes")
        return activation_patching(self.task, self.nodes, progress.at)

    @cached_property
    def exact(self) -> Float[Tensor, " parts"]:
        """The exact effects of the parts, means over prompts."""
        return self.of_parts(self.effects)

    def of_parts(self, scores: Float[Tensor, "nodes batch"]) -> Float[Tensor, " parts"]:
        """Means over prompts, without the rows of the stream."""
        return scores[: len(self.parts)].mean(-1)

    @cached_property
    def latent_scores(self) -> "LatentScores":
        """Estimates and exact effects of latents, by all methods that are asked for."""
        return LatentScores.of(self)


# --- nodes ---------------------------------------------------------------------------------


def _of_nodes(
    case: Case, method: str, scores: Float[Tensor, "nodes batch"], sums: Float[Tensor, "cut batch"]
) -> Rows:
    """Rows of a method whose scores of the cut sum to the whole effect."""
    both = (case.total, float(sums.mean(-1).sum()))
    made, n = case.of_parts(scores), len(case.nodes)
    row = table.quality(method, "node", n, both, case.parts, made, case.exact)
    return Rows([table.node_rows(method, case.nodes, scores)], [], row)


def activation(case: Case) -> Rows:
    """activation_patching: the exact effects, whose sum over the cut need not be the whole."""
    sums = activation_patching(case.task, case.cut)
    return _of_nodes(case, "activation_patching", case.effects, sums)


def attribution(case: Case) -> Rows:
    """attribution_patching: their estimates out of one gradient."""
    scores = eap.attribution_patching(case.task, case.nodes + case.cut)
    n = len(case.nodes)
    return _of_nodes(case, "attribution_patching", scores[:n], scores[n:])


def sizes(case: Case) -> Rows:
    """atp_star: how much each node matters. Sizes have no sign, and sum to no change."""
    scores = atp_star.atp_star(case.task, case.nodes)
    made, size = case.of_parts(scores), case.of_parts(case.effects.abs())
    row = table.quality("atp_star", "node", len(case.nodes), (NAN, NAN), case.parts, made, size)
    frame = table.node_rows("atp_star", case.nodes, scores)
    return Rows([frame], [], row | {"sign_agreement": NAN})


def direct(case: Case) -> Rows:
    """direct_logit: what each part writes to m in the clean run; its change is what is compared."""
    task, parts = case.task, case.parts
    clean = task.base if case.spec.direction == "noising" else task.source
    found = direct_logit.direct_logit(task, clean)
    m = float(task.metric(task.pairs.at_end(clean.post[-1])).mean())
    both = (m, float(sum(found.values()).mean()))
    after, before = (
        direct_logit.direct_logit(task, r, task.base) for r in (task.source, task.base)
    )
    change = torch.stack([(after[n] - before[n]).mean() for n in parts])
    row = table.quality("direct_logit", "node", len(parts), both, parts, change, case.exact)
    scores = torch.stack([found[n] for n in parts])
    return Rows([table.node_rows("direct_logit", parts, scores)], [], row)


# --- edges ---------------------------------------------------------------------------------


def paths(case: Case) -> Rows:
    """path_patching: every head on the logits, past all other heads; beside the whole head."""
    heads = [(i, n) for i, n in enumerate(case.parts) if n.kind == "head"]
    effects = path_patching(case.task, [(n.layer, n.head) for _, n in heads]).mean(-1)
    edges = [Edge(n, LOGITS) for _, n in heads]
    whole = torch.stack([case.exact[i] for i, _ in heads])
    both = (case.total, float(effects.sum()))
    row = table.quality("path_patching", "edge", len(edges), both, edges, effects, whole)
    return Rows([], [table.edge_rows("path_patching", edges, effects, effects)], row)


def drawn(n: int, wanted: int, seed: int) -> list[int]:
    """Which of n edges are patched exactly, whatever their score; the same for every method."""
    return np.random.default_rng(seed).permutation(n)[:wanted].tolist()


def _eap(case: Case, method: str, alphas: list[float]) -> Rows:
    """Rows of all edges; those of largest score, and some that are drawn, have exact effects."""
    spec = case.spec
    edges, scores = eap.edges(case.task, alphas)
    top = scores.abs().argsort(descending=True, stable=True)[: spec.n_exact].tolist()
    known = sorted({*top, *drawn(len(edges), spec.n_drawn, case.seed)})
    exact = torch.full_like(scores, torch.nan)
    exact[known] = many_edges(case.task, [edges[i] for i in known]).mean(-1)
    to_logits = [i for i, e in enumerate(edges) if e.target.kind == "logits"]
    both, largest = (case.total, float(scores[to_logits].sum())), [edges[i] for i in top]
    row = table.quality(method, "edge", len(edges), both, largest, scores[top], exact[top])
    return Rows([], [table.edge_rows(method, edges, scores, exact)], row)


def eap_scores(case: Case) -> Rows:
    """eap: every edge, by the gradient of the base run."""
    return _eap(case, "eap", [0.0])


def eap_ig_scores(case: Case) -> Rows:
    """eap_ig: every edge, by a gradient averaged between the prompts."""
    return _eap(case, "eap_ig", eap.midpoints(case.spec.ig_steps))


def acdc_rises(case: Case) -> Rows:
    """acdc: one row per edge and threshold, how much the loss rose when ACDC tested that edge.

    The loss is KL(whole model || circuit) of the token behind each prompt, as in the paper. The row
    of methods is that of the lowest threshold: the rises of what was cut sum to the loss of what is
    left.
    """
    own, pairs = case.spec.acdc, case.task.pairs
    graph = EdgeGraph(case.task.hf, pairs.base, None if own.ablation == "zero" else pairs.source)
    loss = acdc.kl_divergence(graph.clean, pairs.end)
    progress = cli.Progress("ACDC", len(graph.edges), "edges")
    first = case.seed == case.spec.seeds[0]
    order = None if first else acdc.drawn_order(graph, np.random.default_rng(case.seed))
    kept, rises = acdc.acdc(graph, loss, own.thresholds, progress.at, order)
    alone = acdc.exact(graph, loss)
    frames = [
        table.edge_rows("acdc", graph.edges, rise, alone, tau)
        for tau, rise in zip(own.thresholds, rises, strict=True)
    ]
    low = own.thresholds.index(min(own.thresholds))
    left = float(acdc.losses(graph, loss, kept[low : low + 1].to(rises.dtype)))
    both = (left, float(rises[low][~kept[low]].sum()))
    n = len(graph.edges)
    return Rows([], frames, table.quality("acdc", "edge", n, both, graph.edges, rises[low], alone))


# --- latents -------------------------------------------------------------------------------


@dataclass(frozen=True)
class LatentScores:
    """Effects of latents and error terms, at all positions at once.

    Attributes:
        found: method -> hook -> estimates of all.
        top: those of largest estimate by any method, which are patched exactly.
        exact: their exact effects.
        total: the exact effect of patching every site, summed.
    """

    found: dict[str, dict[str, latents.Effects]]
    top: list[latents.Latent]
    exact: Float[Tensor, " top"]
    total: float

    @classmethod
    def of(cls, case: Case) -> "LatentScores":
        sites = latents.Sites(case.task, list(case.units), reads_of(case.units))
        alphas = {"latent_attribution": [0.0], "latent_ig": eap.midpoints(case.spec.ig_steps)}
        found = {
            method: {h: latents.effects(sites, h, u, alphas[method]) for h, u in case.units.items()}
            for method in case.spec.methods
            if method in LATENT_METHODS
        }
        tops = [latents.strongest(f, case.spec.n_exact, by_position=False) for f in found.values()]
        top = list(dict.fromkeys(node for nodes in tops for node in nodes))
        progress = cli.Progress("patching of latents", len(top), "nodes")
        exact = latents.exact(sites, case.units, top, progress.at).mean(-1)
        return cls(found, top, exact, float(sum(sites.whole(h).mean() for h in case.units)))

    @property
    def nodes(self) -> list[Node]:
        """The largest as rows of the table nodes: kind is the site, such as resid_post or
        resid_post_error, and head the number of the latent."""
        return [Node(n.kind, n.layer, n.number) for n in self.top]


def _of_latents(case: Case, method: str) -> Rows:
    known = case.latent_scores
    effects, nodes = known.found[method], known.nodes
    scores = latents.scores(effects, known.top)
    cut = float(sum(e.latents.sum() + e.error.sum() for e in effects.values()))
    both = (known.total, cut / len(case.task.before))
    n = sum(u.n + 1 for u in case.units.values())
    row = table.quality(method, "latent", n, both, nodes, scores.mean(-1), known.exact)
    return Rows([table.node_rows(method, nodes, scores)], [], row)


def latent_attribution(case: Case) -> Rows:
    """latent_attribution: a dictionary's latents, by the gradient of the base run."""
    return _of_latents(case, "latent_attribution")


def latent_ig(case: Case) -> Rows:
    """latent_ig: the same by a gradient averaged between the prompts."""
    return _of_latents(case, "latent_ig")


# --- all -----------------------------------------------------------------------------------

METHODS: dict[str, Callable[[Case], Rows]] = {  # rows stand in the tables in this order
    "activation_patching": activation,
    "attribution_patching": attribution,
    "atp_star": sizes,
    "direct_logit": direct,
    "path_patching": paths,
    "eap": eap_scores,
    "eap_ig": eap_ig_scores,
    "acdc": acdc_rises,
    "latent_attribution": latent_attribution,
    "latent_ig": latent_ig,
}


def measure(
    task: Task, spec: CircuitsSpec, seed: int, units: dict[str, latents.Units] | None = None
) -> dict[str, pd.DataFrame]:
    """All tables of one model on the prompts of one seed.

    Args:
        units: hook -> what is scored by latent_attribution and latent_ig.
    """
    case = Case(task, spec, seed, units or {})
    made = {name: method(case) for name, method in METHODS.items() if name in spec.methods}
    nodes = [frame for rows in made.values() for frame in rows.nodes]
    edges = [frame for rows in made.values() for frame in rows.edges]
    if units:
        known = case.latent_scores
        nodes.append(table.node_rows("latent_patching", known.nodes, known.exact[:, None]))
    out = {"nodes": _joined(nodes, table.NODES), "edges": _joined(edges, table.EDGES)}
    out["methods"] = pd.DataFrame([made[name].quality for name in spec.methods])
    return {name: frame.assign(seed=seed) for name, frame in out.items()}


def _joined(frames: list[pd.DataFrame], columns: list[str]) -> pd.DataFrame:
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)
