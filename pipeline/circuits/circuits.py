"""Stage `circuits`: which heads, MLPs and paths tell two prompts apart, by several methods. [torch]

For pairs of prompts out of the paper's prompts.py, and for each method that paper.yaml names:

    direct_logit            what a part writes towards the answer          (direct_logit.py)
    activation_patching     effect of replacing a part, exact              (patching.py)
    attribution_patching    its estimate by one gradient                   (eap.py)
    atp_star                the same with two remedies, how much and not which way (atp_star.py)
    path_patching           effect of a head on the logits past all other heads, exact
    eap, eap_ig             estimated effect of an edge
    acdc                    edges cut one by one, at several thresholds    (acdc.py)
    latent_attribution, latent_ig    estimated effect of a dictionary's latent     (latents.py)

1. nodes      scores of heads, MLPs, and the stream at named positions.
2. edges      scores of edges, with the exact effect of those of largest score, and of some that
              are drawn at random: only these tell what a method misses.
3. methods    how right each method is, in one row: completeness over a cut of the graph, and
              agreement with exact patching.

All methods share the columns of one schema; scores are means over prompts, in float32 logits. A cut
is a set of parts through which all of the difference flows: the embeddings of the tokens that
differ, or what is written to the logits.

Every seed is a draw of prompts of its own, and has its own rows. ACDC cuts edges in its canonical
order at the first seed, and in another that is drawn at each of the others.
"""

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pipeline.circuits import acdc, atp_star, direct_logit, eap
from pipeline.circuits.edge_graph import EdgeGraph
from pipeline.circuits.head_inputs import many_edges
from pipeline.circuits.patching import Edge, activation_patching, path_patching
from pipeline.errors import RetraceError
from pipeline.job import cli
from pipeline.job.source import import_file
from pipeline.latents import sites as latents
from pipeline.latents.agreement import agreement
from pipeline.latents.units import Units
from pipeline.models import loader
from pipeline.models.pairs import Node, Pairs, Task
from pipeline.spec.circuits import LATENT_METHODS, CircuitsSpec
from pipeline.store import tables

ONLY_EDGES = ("eap", "eap_ig", "acdc")  # need no node patched
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


def node_rows(method: str, nodes: list[Node], scores: Tensor) -> pd.DataFrame:
    """Rows of the table nodes, of scores [nodes n]."""
    frame = pd.DataFrame([n._asdict() for n in nodes]).assign(method=method)
    sd = scores.std(-1) if scores.shape[-1] > 1 else torch.full_like(scores[:, 0], torch.nan)
    frame = frame.assign(score=scores.mean(-1).cpu().numpy(), sd=sd.cpu().numpy())
    return frame[NODES]


def edge_rows(
    method: str, edges: list[Edge], scores: Tensor, exact: Tensor, threshold: float = np.nan
) -> pd.DataFrame:
    """Rows of the table edges, of scores [edges] and exact effects [edges], NaN where not known.

    Args:
        threshold: ACDC's; its circuit is every edge whose score is at least the threshold.
    """
    name = {"resid": "embed"}
    rows = [
        ("", name.get(s.kind, s.kind), s.layer, s.head, t.kind, t.layer, t.head, slot)
        for s, t, slot in edges
    ]
    frame = pd.DataFrame(rows, columns=EDGES[:8]).assign(method=method)
    score, exact = (x.double().cpu().numpy() for x in (scores, exact))
    return frame.assign(score=score, exact=exact, threshold=threshold)


def named(part: Node | Edge) -> str:
    """How a node or an edge is called in a table: "mlp 0", "head 9.6 → logits"."""
    if isinstance(part, Edge):
        slot = f" {part.slot}" if part.slot else ""
        return f"{named(part.source)} → {named(part.target)}{slot}"
    if part.kind == "logits":
        return "logits"
    head = f".{part.head}" if part.head >= 0 else ""
    return f"{part.kind} {part.layer}{head}" + (f" at {part.position}" if part.position else "")


def quality(
    method: str, unit: str, n: int, sums: tuple[float, float], parts: list, scores: Tensor,
    exact: Tensor,
) -> dict[str, Any]:  # fmt: skip
    """A row of the table methods.

    Args:
        n: nodes or edges scored.
        sums: what the cut should sum to, and what it sums to.
        parts: what is compared: nodes, edges or latents.
        scores, exact: their estimates and exact effects, [compared].
    """
    total, cut = sums
    a, b = scores.cpu().numpy().astype(float), exact.cpu().numpy().astype(float)
    same = float(np.mean(np.sign(a) == np.sign(b))) if len(a) else float("nan")
    gap = (cut - total) / abs(total) if total else float("nan")
    found = agreement(a, b)
    largest = named(parts[found.largest]) if found.largest >= 0 else ""
    values = (method, unit, n, total, cut, gap, *found[:3], largest, same, len(a))
    return dict(zip(METHODS, values, strict=True))


def node_methods(task: Task, spec: CircuitsSpec) -> tuple[list[pd.DataFrame], list[dict], Tensor]:
    """Rows of nodes and methods, and the exact effect [nodes] of every head and MLP."""
    nodes, cut = parts(task), [Node("resid", 0, -1, p) for p in task.pairs.differing()]
    shown = nodes + streams(task, spec.positions)
    total = float(task.total.mean())
    progress = cli.Progress("activation patching", len(shown), "nodes")
    effects = activation_patching(task, shown, progress.at)
    exact = effects[: len(nodes)].mean(-1)
    frames, rows = [], []
    for method in spec.methods:
        if method == "activation_patching":
            scores, sums = effects, activation_patching(task, cut)
        elif method == "attribution_patching":
            scores = eap.attribution_patching(task, shown + cut)
            scores, sums = scores[: len(shown)], scores[len(shown) :]
        else:
            continue
        frames.append(node_rows(method, shown, scores))
        made = scores[: len(nodes)].mean(-1)
        both = (total, float(sums.mean(-1).sum()))
        rows.append(quality(method, "node", len(shown), both, nodes, made, exact))
    if "atp_star" in spec.methods:
        scores = atp_star.atp_star(task, shown)
        frames.append(node_rows("atp_star", shown, scores))
        made, whole = scores[: len(nodes)].mean(-1), effects[: len(nodes)].abs().mean(-1)
        nan = float("nan")  # sizes have no sign, and sum to no change
        row = quality("atp_star", "node", len(shown), (nan, nan), nodes, made, whole)
        rows.append(row | {"sign_agreement": nan})
    if "direct_logit" in spec.methods:
        clean = task.base if spec.direction == "noising" else task.source
        found = direct_logit.direct_logit(task, clean)
        m = float(task.metric(task.at_end(clean.post[-1])).mean())
        whole = float(sum(found.values()).mean())
        frames.append(node_rows("direct_logit", nodes, torch.stack([found[n] for n in nodes])))
        a, b = (direct_logit.direct_logit(task, r, task.base) for r in (task.source, task.base))
        change = torch.stack([(a[n] - b[n]).mean() for n in nodes])
        both = (m, whole)
        rows.append(quality("direct_logit", "node", len(nodes), both, nodes, change, exact))
    return frames, rows, exact


def drawn(n: int, wanted: int, seed: int) -> list[int]:
    """Which of n edges are patched exactly, whatever their score; the same for every method."""
    return np.random.default_rng(seed).permutation(n)[:wanted].tolist()


def edge_methods(
    task: Task, spec: CircuitsSpec, exact: Tensor | None, seed: int
) -> tuple[list, list[dict]]:
    """Rows of edges and methods.

    Args:
        exact: effects from `node_methods`, used only to compare path patching with patching the
            whole head.
        seed: of the edges that are drawn, and of ACDC's order.
    """
    frames, rows, total = [], [], float(task.total.mean())
    if "path_patching" in spec.methods:
        nodes = [n for n in parts(task) if n.kind == "head"]
        effects = path_patching(task, [(n.layer, n.head) for n in nodes]).mean(-1)
        edges = [Edge(n, eap.LOGITS) for n in nodes]
        frames.append(edge_rows("path_patching", edges, effects, effects))
        whole = torch.stack(
            [e for n, e in zip(parts(task), exact, strict=True) if n.kind == "head"]
        )
        both = (total, float(effects.sum()))
        rows.append(quality("path_patching", "edge", len(edges), both, edges, effects, whole))
    for method, alphas in (("eap", [0.0]), ("eap_ig", eap.midpoints(spec.ig_steps))):
        if method not in spec.methods:
            continue
        edges, scores = eap.edges(task, alphas)
        top = scores.abs().argsort(descending=True, stable=True)[: spec.n_exact].tolist()
        known = sorted({*top, *drawn(len(edges), spec.n_drawn, seed)})
        true = torch.full_like(scores, torch.nan)
        true[known] = many_edges(task, [edges[i] for i in known]).mean(-1)
        frames.append(edge_rows(method, edges, scores, true))
        last = [i for i, e in enumerate(edges) if e.target.kind == "logits"]
        both, largest = (total, float(scores[last].sum())), [edges[i] for i in top]
        rows.append(quality(method, "edge", len(edges), both, largest, scores[top], true[top]))
    if "acdc" in spec.methods:
        found, row = acdc_rows(task, spec, seed)
        frames, rows = frames + found, [*rows, row]
    return frames, rows


def acdc_rows(
    task: Task, spec: CircuitsSpec, seed: int
) -> tuple[list[pd.DataFrame], dict[str, Any]]:
    """One row per edge and threshold: how much the loss rose when ACDC tested that edge; and one
    row for the table methods.

    The loss is KL(whole model || circuit) of the token behind each prompt, as in the paper. The row
    is of the lowest threshold: the rises of what was cut sum to the loss of what is left.
    """
    own, pairs = spec.acdc, task.pairs
    graph = EdgeGraph(task.hf, pairs.base, None if own.ablation == "zero" else pairs.source)
    loss = acdc.kl_divergence(graph.clean, pairs.end)
    progress = cli.Progress("ACDC", len(graph.edges), "edges")
    first = seed == spec.seeds[0]
    order = None if first else acdc.drawn_order(graph, np.random.default_rng(seed))
    kept, rises = acdc.acdc(graph, loss, own.thresholds, progress.at, order)
    alone = acdc.exact(graph, loss)
    frames = [
        edge_rows("acdc", graph.edges, rise, alone, tau)
        for tau, rise in zip(own.thresholds, rises, strict=True)
    ]
    low = own.thresholds.index(min(own.thresholds))
    left = float(acdc.losses(graph, loss, kept[low : low + 1].to(rises.dtype)))
    both = (left, float(rises[low][~kept[low]].sum()))
    n = len(graph.edges)
    return frames, quality("acdc", "edge", n, both, graph.edges, rises[low], alone)


def latent_methods(
    task: Task, spec: CircuitsSpec, units: dict[str, Units]
) -> tuple[list[pd.DataFrame], list[dict]]:
    """Rows of nodes and methods: of latents and error terms, at all positions at once.

    In the table nodes kind is the site, such as resid_post or resid_post_error, and head the number
    of the latent. Those of largest score, by any of the methods, are patched exactly.
    """
    alphas = {"latent_attribution": [0.0], "latent_ig": eap.midpoints(spec.ig_steps)}
    sites = latents.Sites(task, list(units))
    found = {
        m: {h: latents.effects(sites, h, u, alphas[m]) for h, u in units.items()}
        for m in spec.methods
        if m in LATENT_METHODS
    }
    tops = [latents.strongest(f, spec.n_exact, by_position=False) for f in found.values()]
    top = list(dict.fromkeys(node for nodes in tops for node in nodes))
    progress = cli.Progress("patching of latents", len(top), "nodes")
    exact = latents.exact(sites, units, top, progress.at).mean(-1)
    total = float(sum(sites.whole(hook).mean() for hook in units))
    shown = [Node(n.kind, n.layer, n.number) for n in top]
    frames, rows = [], []
    for method, effects in found.items():
        made = latents.scores(effects, top)
        frames.append(node_rows(method, shown, made))
        cut = float(sum(e.latents.sum() + e.error.sum() for e in effects.values()))
        n = sum(u.n + 1 for u in units.values())
        cut /= len(task.before)
        rows.append(quality(method, "latent", n, (total, cut), shown, made.mean(-1), exact))
    frames.append(node_rows("latent_patching", shown, exact[:, None]))
    return frames, rows


def measure(
    task: Task, spec: CircuitsSpec, seed: int, units: dict[str, Units] | None = None
) -> dict[str, pd.DataFrame]:
    """All tables of one model on the prompts of one seed.

    Args:
        units: hook -> what is scored by latent_attribution and latent_ig.
    """
    nodes, rows, edges, more = [], [], [], []
    exact = None
    if set(spec.methods) - {*LATENT_METHODS, *ONLY_EDGES}:
        nodes, rows, exact = node_methods(task, spec)
    if set(spec.methods) - set(LATENT_METHODS):
        edges, more = edge_methods(task, spec, exact, seed)
    if units:
        frames, found = latent_methods(task, spec, units)
        nodes, rows = nodes + frames, rows + found
    frames = {"nodes": (nodes, NODES), "edges": (edges, EDGES)}
    out = {
        k: pd.concat(v, ignore_index=True) if v else pd.DataFrame(columns=c)
        for k, (v, c) in frames.items()
    }
    order = {m: i for i, m in enumerate(spec.methods)}
    out["methods"] = pd.DataFrame(sorted(rows + more, key=lambda r: order[r["method"]]))
    return {name: frame.assign(seed=seed) for name, frame in out.items()}


def pairs_of(file: str, spec: CircuitsSpec, loaded: loader.Loaded, seed: int, device: Any) -> Pairs:
    """The pairs that the paper's prompts.py makes for this model's tokenizer and a seed."""
    function = getattr(import_file(file), spec.prompts, None)
    if function is None:
        raise RetraceError(
            f"circuits.prompts: {file} has no function '{spec.prompts}'; write it, or name another"
        )
    prompts = function(spec.options, loaded.tokenizer, spec.n_prompts, seed)
    return Pairs.of(prompts, loaded.bos_id, device, spec.direction == "denoising")


def work(job: cli.Job) -> None:
    args, device = job.args, job.device()
    spec = job.section("circuits", CircuitsSpec)
    loaded = loader.load(args.model, device)
    with torch.no_grad():
        units = latents.load(args.saes, spec.saes, args.activations[0], device) if spec.saes else {}
        found = []
        for seed in spec.seeds:
            task = Task(loaded.hf, pairs_of(args.prompts, spec, loaded, seed, device))
            found.append(measure(task, spec, seed, units))
    inputs = [args.model, *args.activations, *args.saes]
    certificate = job.certificate(inputs, seed=spec.seeds)
    for name in found[0]:
        frame = pd.concat([frames[name] for frames in found], ignore_index=True)
        tables.write_table(getattr(args, name), frame, certificate)


def main() -> None:
    parser = cli.parser(
        "circuits",
        __doc__,
        model="model.json",
        prompts="the paper's prompts.py",
        activations="manifest.json of the activations that dictionaries were trained on, if any*",
        saes="manifests of the SAE jobs, if any*",
        nodes="scores of nodes",
        edges="scores of edges",
        methods="how right each method is",
    )
    cli.run("circuits", parser.parse_args(), work)
