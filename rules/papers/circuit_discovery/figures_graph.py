"""The known circuit and the found one, as a graph from the embeddings to the logits."""

from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from pipeline.claims import roc
from pipeline.figures.parts import Drawn, Panels, first, line, points
from pipeline.figures.theme import INK, PAGE, PALETTE, selector
from pipeline.store.tables import where

TASKS = {
    "reverse": "reverse",
    "xproportion": "xproportion",
    "letters": "xproportion, letters",
    "siit": "xproportion, trained",
}
ABLATIONS = {"zero": "zero ablation", "corrupt": "corrupt ablation"}
TRUTHS = {
    "wired": "what is built in",
    "authors": "the authors' circuit",
    "swapped": "what swapped tokens need",
}
CLASSES = {  # (in the circuit, found) -> name, colour, dash
    (True, True): ("in the circuit, found", PALETTE[2], "solid"),
    (False, True): ("found, not in the circuit", PALETTE[1], "dash"),
    (True, False): ("in the circuit, missed", PALETTE[0], "dot"),
}
SHOWN = 1e-3  # the threshold, or the one nearest to it
SPOT = tuple[float, float]


def spots(names: list[str]) -> dict[str, SPOT]:
    """Where nodes stand: layers to the right, heads above MLPs, q, k and v before their head."""
    out: dict[str, SPOT] = {"embed": (0.0, 0.5), "pos": (0.0, -0.5)}
    layers = 0
    for name in names:
        kind, _, at = name.partition(" ")
        if kind not in ("head", "mlp"):
            continue
        layer, head = (int(i) for i in f"{at}.0".split(".")[:2])
        layers = max(layers, layer + 1)
        if kind == "mlp":
            out[name] = (2 * layer + 1.9, -1.0)
            continue
        y = 1.0 + 1.6 * head
        out[name] = (2 * layer + 1.35, y)
        for slot, up in (("q", 0.42), ("k", 0.0), ("v", -0.42)):
            out[f"{layer}.{head}.{slot}"] = (2 * layer + 0.9, y + up)
    return out | {"logits": (2 * layers + 0.9, 0.0)}


def bent(a: SPOT, b: SPOT) -> tuple[list[float], list[float]]:
    """A curve from a to b that leaves and arrives flat, and a gap behind it."""
    t = np.linspace(0, 1, 16)
    lift = min(1.3, 0.25 * max(0.0, abs(b[0] - a[0]) - 1.2)) * np.sign(b[1] + a[1] or 1.0)
    x = a[0] + (b[0] - a[0]) * t
    y = a[1] + (b[1] - a[1]) * t**2 * (3 - 2 * t) + lift * 4 * t * (1 - t)
    return [*x.tolist(), None], [*y.tolist(), None]


def known_of(truth: pd.DataFrame, task: str, name: str) -> np.ndarray:
    """Which edges of a task are in a known circuit. [edges]"""
    return where(truth, task=task)[name].to_numpy(bool)


def ends_of(edges: pd.DataFrame) -> list[tuple[str, str]]:
    """The two nodes of every edge."""
    return [roc.ends(e) for e in edges[roc.COLUMNS].itertuples(index=False, name=None)]


def drawn(edges: pd.DataFrame, place: dict[str, SPOT]) -> list[go.Scatter]:
    """The edges of each class, a trace each."""
    out = []
    for (known, found), (label, shade, dash) in CLASSES.items():
        some = where(edges, known=known, found=found)
        ends = zip(some["source"], some["target"], strict=True)
        curves = [bent(place[s], place[t]) for s, t in ends]
        x, y = ([v for curve in curves for v in curve[k]] or [None] for k in (0, 1))
        width = 2.5 if known and found else 2
        out.append(line(x, y, f"{label} ({len(some)})", shade, dash=dash, width=width))
    return out


def node_trace(place: dict[str, SPOT], touched: set[str]) -> go.Scatter:
    """All nodes: filled where an edge of the circuit touches them; q, k and v are open."""
    names, (x, y) = list(place), zip(*place.values(), strict=True)
    nodes = pd.DataFrame({"name": names, "touched": [n in touched for n in names]})
    small = nodes["name"].str.contains(r"\.[qkv]$")
    short = nodes["name"].str[-1].where(small, nodes["name"].str.removeprefix("head "))
    choose = lambda where, yes, no: np.where(where, yes, no).tolist()  # noqa: E731
    return points(
        x, y, mode="markers+text", hovertext=names, hoverinfo="text", text=short.tolist(),
        textposition=choose(small, "middle center", "top center"),
        textfont={"size": choose(small, 9, 11), "color": INK},
        marker={
            "opacity": 1, "size": choose(small, 15, 12),
            "color": choose(nodes["touched"] & ~small, INK, PAGE),
            "line": {"color": INK, "width": choose(nodes["touched"], 2, 0.8)},
        },
    )  # fmt: skip


def edge_table(rows: pd.DataFrame, known: np.ndarray) -> pd.DataFrame:
    """source, target, known, found of every edge; found at the threshold that is shown."""
    nearest = (np.log(rows["threshold"]) - np.log(SHOWN)).abs()
    last = rows[nearest == nearest.min()]
    out = pd.DataFrame(ends_of(last), columns=["source", "target"])
    is_input = out["source"].str.endswith("input")
    head = ["head " + t.rsplit(".", 1)[0] for t in out["target"]]
    out["source"] = out["source"].str.removesuffix(" input")
    out["target"] = out["target"].str.removesuffix(" input").where(~is_input, head)
    found = (last["score"] >= last["threshold"]).to_numpy()
    return out.assign(known=known, found=found)


def graph(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """A list chooses the task, the ablation and the known circuit; ACDC is in the authors' order,
    where it ran in that."""
    edges = first(where(tables["discovery/edges"], weights="trained"))
    truth = tables["discovery/truth"]
    panels, ends, frames, heights = Panels(), {}, [], []
    for task, ablation, name in product(TASKS, ABLATIONS, TRUTHS):
        rows, known = where(edges, task=task, ablation=ablation), known_of(truth, task, name)
        if rows.empty or not known.any():
            continue
        by_method = dict(iter(rows.groupby("method")))
        table = edge_table(by_method.get("acdc_canonical", by_method["acdc"]), known)
        place = spots(sorted({*table["source"], *table["target"]}))
        circuit = table[table["known"]]
        nodes = node_trace(place, {*circuit["source"], *circuit["target"]})
        panels.add(0, *drawn(table, place), nodes, case=len(ends))
        ends[f"{TASKS[task]}, {ABLATIONS[ablation]}: {TRUTHS[name]}"] = place["logits"][0] + 0.4
        heights += [y for _, y in place.values()]
        frames.append(table.assign(task=task, ablation=ablation, truth=name))
    choices = {
        label: [{"visible": [c == i for c in panels.cases]}, {"xaxis.range": [-0.4, end]}]
        for i, (label, end) in enumerate(ends.items())
    }
    bare = {"visible": False, "showgrid": False}
    panels.figure.update_xaxes(**bare, range=[-0.4, next(iter(ends.values()))])
    panels.figure.update_yaxes(**bare, range=[-2.1, 0.9 + max(heights)])
    figure = panels.finish(460, top=48, updatemenus=[selector(choices)])
    return figure.update_layout(margin={"l": 12}), pd.concat(frames, ignore_index=True)
