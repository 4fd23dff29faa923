"""The known circuit and the found one, as a graph from the embeddings to the logits."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from pipeline.claims import roc
from pipeline.job.source import import_file
from pipeline.report.theme import INK, PAGE, PALETTE, selector

common = import_file(Path(__file__).with_name("figures_common.py"))
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
        if name.startswith("head"):
            layer, head = (int(i) for i in name.split()[1].split("."))
            layers = max(layers, layer + 1)
            y = 1.0 + 1.6 * head
            out[name] = (2 * layer + 1.35, y)
            for slot, up in (("q", 0.42), ("k", 0.0), ("v", -0.42)):
                out[f"{layer}.{head}.{slot}"] = (2 * layer + 0.9, y + up)
        elif name.startswith("mlp"):
            layer = int(name.split()[1])
            layers = max(layers, layer + 1)
            out[name] = (2 * layer + 1.9, -1.0)
    return out | {"logits": (2 * layers + 0.9, 0.0)}


def bent(a: SPOT, b: SPOT) -> tuple[list[float], list[float]]:
    """A curve from a to b that leaves and arrives flat, and a gap behind it."""
    t = np.linspace(0, 1, 16)
    lift = min(1.3, 0.25 * max(0.0, abs(b[0] - a[0]) - 1.2)) * np.sign(b[1] + a[1] or 1.0)
    x = a[0] + (b[0] - a[0]) * t
    y = a[1] + (b[1] - a[1]) * t**2 * (3 - 2 * t) + lift * 4 * t * (1 - t)
    return [*x.tolist(), None], [*y.tolist(), None]


def drawn(edges: pd.DataFrame, place: dict[str, SPOT]) -> list[go.Scatter]:
    """The edges of each class, a trace each."""
    out = []
    for (known, found), (label, shade, dash) in CLASSES.items():
        some = edges[(edges["known"] == known) & (edges["found"] == found)]
        x, y = [], []
        for source, target in zip(some["source"], some["target"], strict=True):
            for part, values in zip((x, y), bent(place[source], place[target]), strict=True):
                part += values
        line = {"color": shade, "dash": dash, "width": 2.5 if known and found else 2}
        name = f"{label} ({len(some)})"
        out.append(
            go.Scatter(x=x or [None], y=y or [None], mode="lines", line=line, name=name,
                       hoverinfo="skip")
        )  # fmt: skip
    return out


def node_trace(place: dict[str, SPOT], touched: set[str]) -> go.Scatter:
    """All nodes: filled where an edge of the circuit touches them."""
    names = list(place)
    inputs = {n for n in names if n[-2:] in (".q", ".k", ".v")}
    small = [n in inputs for n in names]
    text = [n[-1] if s else n.replace("head ", "") for n, s in zip(names, small, strict=True)]
    return go.Scatter(
        x=[place[n][0] for n in names],
        y=[place[n][1] for n in names],
        mode="markers+text",
        text=text,
        textposition=["middle center" if s else "top center" for s in small],
        textfont={"size": [9 if s else 11 for s in small], "color": INK},
        marker={
            "opacity": 1,
            "size": [15 if s else 12 for s in small],
            "color": [INK if n in touched and n not in inputs else PAGE for n in names],
            "line": {"color": INK, "width": [2 if n in touched else 0.8 for n in names]},
        },
        hovertext=names,
        hoverinfo="text",
        showlegend=False,
    )  # fmt: skip


def edge_table(rows: pd.DataFrame, known: np.ndarray) -> pd.DataFrame:
    """source, target, known, found of every edge; found at the threshold that is shown."""
    nearest = (np.log(rows["threshold"]) - np.log(SHOWN)).abs()
    last = rows[nearest == nearest.min()]
    ends = [roc.ends(e) for e in last[roc.COLUMNS].itertuples(index=False, name=None)]
    out = pd.DataFrame(ends, columns=["source", "target"])
    is_input = out["source"].str.endswith("input")
    head = ["head " + t.rsplit(".", 1)[0] for t in out["target"]]
    out["source"] = out["source"].str.removesuffix(" input")
    out["target"] = out["target"].str.removesuffix(" input").where(~is_input, head)
    found = (last["score"] >= last["threshold"]).to_numpy()
    return out.assign(known=known, found=found)


def graph(tables: dict[str, Any], options: dict[str, Any]) -> tuple[go.Figure, pd.DataFrame]:
    """A list chooses the task, the ablation and the known circuit."""
    edges, truth = common.first(tables["discovery/edges"]), tables["discovery/truth"]
    figure, choices, numbers, frames, heights = go.Figure(), {}, [], [], []
    for task, ablation, name in cases(edges, truth):
        rows = edges[(edges["task"] == task) & (edges["ablation"] == ablation)]
        own = truth[truth["task"] == task][name].to_numpy(bool)
        table = edge_table(rows[rows["method"] == "acdc_canonical"], own)
        place = spots(sorted({*table["source"], *table["target"]}))
        circuit = table[table["known"]]
        for trace in [
            *drawn(table, place),
            node_trace(place, {*circuit["source"], *circuit["target"]}),
        ]:
            trace.visible = not choices
            figure.add_trace(trace)
            numbers.append(len(choices))
        label = f"{common.TASKS[task]}, {common.ABLATIONS[ablation]}: {common.TRUTHS[name]}"
        choices[label] = place["logits"][0] + 0.4
        heights += [y for _, y in place.values()]
        frames.append(table.assign(task=task, ablation=ablation, truth=name))
    updates = {
        label: [{"visible": [n == i for n in numbers]}, {"xaxis.range": [-0.4, end]}]
        for i, (label, end) in enumerate(choices.items())
    }
    bare = {"visible": False, "showgrid": False}
    first_end = next(iter(choices.values()))
    figure.update_xaxes(**bare, range=[-0.4, first_end])
    figure.update_yaxes(**bare, range=[-2.1, 0.9 + max(heights)])
    figure.update_layout(height=460, updatemenus=[selector(updates)], margin={"l": 12})
    return figure, pd.concat(frames, ignore_index=True)


def cases(edges: pd.DataFrame, truth: pd.DataFrame) -> list[tuple[str, str, str]]:
    """(task, ablation, known circuit) of each picture."""
    return [
        (task, ablation, name)
        for task in common.TASKS
        for ablation in common.ABLATIONS
        for name in common.TRUTHS
        if ((edges["task"] == task) & (edges["ablation"] == ablation)).any()
        and truth[truth["task"] == task][name].any()
    ]
