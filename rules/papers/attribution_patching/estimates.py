"""Stage `estimates`: cheap attribution beside exact patching, of every node and of edges. [torch]

For every task, every model that it is put to, and every seed, which draws prompts and edges anew:

1. nodes    heads, MLPs, queries, keys and values at all positions at once, and the stream at named
            positions: the exact effect of each, and what it is by each estimate.
2. edges    the same of edges: all of a small model, else some that are drawn at random.
3. quality  how right each estimate is, by kind of node and depth (compared.py).
4. search   what is found by patching exactly in the order of an estimate.
5. costs    passes and seconds of each method.
6. totals   what the model makes of the prompts, and what the edges into the logits sum to.

Estimates of nodes (Nanda 2023; Kramár et al. 2024) and of edges (Syed et al. 2023; Hanna et al.
2024):

    attribution_patching    (a' - a) . dm/da
    attribution_ig          the same, the gradient averaged over points between the two prompts
    qk_fix                  the first, patterns of patched queries and keys computed
    atp_star                that with GradDrop; how much, not which way
    eap, eap_ig             the first two, of edges
"""

import time
from collections.abc import Callable
from itertools import product
from typing import Any

import pandas as pd
import torch
from pydantic import Field
from torch import Tensor

from pipeline.circuits import atp_star, eap
from pipeline.circuits.head_inputs import input_nodes, input_patching, many_edges
from pipeline.circuits.methods import drawn
from pipeline.circuits.patching import activation_patching
from pipeline.circuits.table import edge_rows, parts, streams
from pipeline.errors import need_among
from pipeline.job import cli, own
from pipeline.models import loader
from pipeline.models.pairs import Node, Pairs, Task
from pipeline.spec.base import Name, Section, Seeds

from . import compared, prompts

TABLES = "nodes edges quality search costs totals".split()


class TaskOptions(Section):
    """A task and the models that it is put to."""

    arms: list[Name] = Field(min_length=1, description="of the section arms")
    prompts: Name = Field(description="a function of prompts.py")
    options: dict[str, Any] = Field(default={}, description="handed to that function")
    n_prompts: int = Field(ge=1, description="pairs of prompts")
    positions: list[Name] = Field(default=[], description="where the stream is patched")
    n_edges: int = Field(default=0, ge=0, description="edges drawn at random; 0: all of them")


class Options(own.Options):
    """own.estimates of paper.yaml."""

    tasks: dict[Name, TaskOptions]
    ig_steps: int = Field(default=5, ge=1, description="points between the two prompts")
    seeds: Seeds = Field(default=[0], description="of prompts, and of which edges are drawn")


class Clock:
    """Passes and seconds of methods, as rows of the table costs."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.rows = device, []

    def __call__(
        self, method: str, unit: str, passes: tuple[int, int], made: Callable[[], Any]
    ) -> Any:
        """What `made` returns: scores, or (edges, scores). passes are the forward and backward ones
        that a plain program needs: one a prompt of the pair, and one a patch, or a point, or a
        layer."""
        started = time.monotonic()
        out = made()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.monotonic() - started
        n = len(out[0]) if isinstance(out, tuple) else len(out)
        row = {"method": method, "unit": unit, "n": n}
        row |= {"forwards": 2 + passes[0], "backwards": passes[1], "seconds": seconds}
        self.rows.append(row)
        return out


def peaks(task: Task) -> list[Tensor]:
    """The largest attention weight of each head, a layer each [n_heads].

    Mean over prompts, and over the positions from the first change to the last.
    """
    places = task.pairs.suffix(task.pairs.first_change(""))
    at = places.clamp(max=task.pairs.base.shape[1] - 1)
    inside = (places <= task.pairs.end[:, None])[..., None]
    out = []
    for pattern in task.heads.patterns(task.pairs.base):
        most = pattern.amax(-1).transpose(1, 2)[task.pairs.rows[:, None], at]  # [n s n_heads]
        out.append((most * inside).sum((0, 1)) / inside.sum())
    return out


def peak_of(task: Task, node: Node, peak: list[Tensor]) -> float:
    """Of a query, key or value, NaN of others; of a shared key the mean over its heads."""
    if node.kind not in ("q", "k", "v"):
        return float("nan")
    share = task.heads.n_heads // task.heads.count(node.kind)
    return float(peak[node.layer][node.head * share : (node.head + 1) * share].mean())


def nodes_of(task: Task, positions: list[str], ig_steps: int, clock: Clock) -> pd.DataFrame:
    """Rows of nodes: an estimate each, with the exact effect beside it."""
    plain, inputs = parts(task) + streams(task, positions), input_nodes(task)
    every, bar = plain + inputs, cli.Progress("exact patching", len(plain) + len(inputs), "nodes")

    def patched() -> Tensor:
        first = activation_patching(task, plain, bar.at)
        return torch.cat([first, input_patching(task, inputs, lambda d: bar.at(len(plain) + d))])

    n_layers = task.heads.n_layers
    exact = clock("activation_patching", "node", (len(every), 0), patched)
    one, points = eap.attribution_patching, tuple(eap.midpoints(ig_steps))
    methods = {
        "attribution_patching": ((0, 1), lambda: one(task, every)),
        "attribution_ig": ((ig_steps, ig_steps), lambda: one(task, every, points)),
        "qk_fix": ((2, 1), lambda: atp_star.qk_fix(task, every)),
        "atp_star": ((2, n_layers), lambda: atp_star.atp_star(task, every)),
    }
    peak, frames = peaks(task), []
    card = pd.DataFrame([node._asdict() for node in every])
    card["peak"] = [peak_of(task, node, peak) for node in every]
    for method, (passes, made) in methods.items():
        scores = clock(method, "node", passes, made)
        frame = card.assign(method=method, n_layers=n_layers)
        for name, values in (("", scores), ("exact_", exact)):
            frame[f"{name}score"] = values.mean(-1).cpu().numpy()
            frame[f"{name}size"] = values.abs().mean(-1).cpu().numpy()
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def edges_of(task: Task, wanted: int, options: Options, seed: int, clock: Clock) -> pd.DataFrame:
    """Rows of the edges that are drawn, by each estimate, with the exact effect beside it."""
    steps = options.ig_steps
    methods = {"eap": ((0, 1), [0.0]), "eap_ig": ((steps, steps), eap.midpoints(steps))}
    found = {
        method: clock(method, "edge", passes, lambda a=alphas: eap.edges(task, a))
        for method, (passes, alphas) in methods.items()
    }
    every = found["eap"][0]
    chosen = drawn(len(every), wanted or len(every), seed)
    some, bar = [every[i] for i in chosen], cli.Progress("exact patching", len(chosen), "edges")
    patched = lambda: many_edges(task, some, bar.at)  # noqa: E731
    exact = clock("activation_patching", "edge", (len(some), 0), patched).mean(-1)
    last = [i for i, edge in enumerate(every) if edge.target == eap.LOGITS]
    frames = [
        edge_rows(method, some, scores[chosen], exact).assign(
            n_edges=len(every), into_logits=float(scores[last].sum())
        )
        for method, (_, scores) in found.items()
    ]
    return pd.concat(frames, ignore_index=True)


def measure(
    task: Task, what: TaskOptions, options: Options, seed: int, clock: Clock
) -> dict[str, pd.DataFrame]:
    """Rows of every table, of one model on one task at one seed."""
    nodes = nodes_of(task, what.positions, options.ig_steps, clock)
    edges = edges_of(task, what.n_edges, options, seed, clock)
    sums = edges.groupby("method")["into_logits"].first()
    totals = {
        "n_prompts": len(task.before),
        "clean": float(task.before.mean()),
        "corrupt": float((task.before + task.total).mean()),
        "right": float((task.before > 0).float().mean()),
        "total": float(task.total.mean()),
    }
    totals |= {f"into_logits_{method}": float(value) for method, value in sums.items()}
    return {
        "nodes": nodes,
        "edges": edges.drop(columns="into_logits"),
        "quality": compared.quality(nodes, edges, totals["total"]),
        "search": compared.searches(nodes, edges),
        "costs": pd.DataFrame(clock.rows),
        "totals": pd.DataFrame([totals]),
    }


def given(name: str, what: TaskOptions, loaded: Any, seed: int, device: Any) -> Pairs:
    """The task's pairs on one of its models; RetraceError for a function that there is not."""
    where = f"own.estimates.tasks.{name}: prompts.py has no function"
    need_among([what.prompts], prompts.__all__, where, "it has")
    make = getattr(prompts, what.prompts)
    made = make(what.options, loaded.tokenizer, what.n_prompts, seed)
    return Pairs.of(made, loaded.bos_id, device)


@torch.no_grad()
def work(job: cli.Job, options: Options) -> own.Tables:
    """Rows of all tables, each model, task and seed in turn."""
    device, out, files = job.device(), own.Tables(TABLES), own.by_arm(job, job.args.models)
    for name, what in options.tasks.items():
        need_among(what.arms, files, f"own.estimates.tasks.{name}.arms: no arm", "arms are")
    for arm, file in files.items():
        loaded = loader.load(file, device)
        tasks = {name: what for name, what in options.tasks.items() if arm in what.arms}
        for (name, what), seed in product(tasks.items(), options.seeds):
            cli.log.info("%s on %s, seed %d", name, arm, seed)
            task = Task.of(loaded.hf, given(name, what, loaded, seed, device))
            made = measure(task, what, options, seed, Clock(device))
            out.add(made, {"arm": arm, "task": name, "seed": seed})
    return out
