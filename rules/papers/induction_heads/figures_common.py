"""What the figures share: names and colours of the runs, lines over seeds, the shaded window."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from pipeline.report.theme import PALETTE, rgba

# Blue is two layers, green one layer with smeared keys, grey one layer; orange the phase change.
RUNS = {
    "two_layer": ("two layers", PALETTE[0]),
    "smeared": ("one layer, smeared keys", PALETTE[2]),
    "one_layer": ("one layer", PALETTE[6]),
}
WINDOW = rgba(PALETTE[4], 0.18)
MILLION = 1e6


def runs_of(frame: pd.DataFrame, prefix: str = "") -> list[tuple[str, str, str]]:
    """(run, its name in words, its colour) of the runs in a table, in a fixed order."""
    there = set(frame["run"])
    return [(prefix + r, *look) for r, look in RUNS.items() if prefix + r in there]


def over_seeds(
    figure: go.Figure, frame: pd.DataFrame, column: str, look: tuple[str, str], **place: Any
) -> None:
    """A faint line a seed, and their mean; in the legend once, in the first row."""
    name, colour = look
    members = frame.pivot(index="tokens", columns="member", values=column)
    x = members.index.to_numpy() / MILLION
    told = name + "<br>%{x:.2f} M tokens, %{y:.3f}<extra></extra>"
    for values in members.to_numpy().T if members.shape[1] > 1 else []:
        line = {"color": rgba(colour, 0.55), "width": 1}
        seed = {"x": x, "y": values, "mode": "lines", "line": line, "hoverinfo": "skip"}
        figure.add_trace(go.Scatter(**seed, showlegend=False, legendgroup=name), **place)
    figure.add_trace(
        go.Scatter(
            x=x,
            y=members.mean(axis=1),
            mode="lines",
            line={"color": colour, "width": 2.5},
            name=name,
            legendgroup=name,
            showlegend=place.get("row", 1) == 1,
            hovertemplate=told,
        ),
        **place,
    )


def shade(figure: go.Figure, phase: pd.DataFrame, run: str, **place: Any) -> None:
    """The phase change of a run, mean over seeds, as a band behind the lines."""
    rows = phase[(phase["run"] == run) & (phase["end"] > 0)]
    if len(rows):
        start, end = rows["start"].mean() / MILLION, rows["end"].mean() / MILLION
        figure.add_vrect(x0=start, x1=end, fillcolor=WINDOW, line_width=0, layer="below", **place)


def blocks(values: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Means over at most `most` runs of neighbours of the last axis, and their middle places."""
    parts = np.array_split(np.arange(values.shape[-1]), min(most, values.shape[-1]))
    means = np.stack([values[..., p].mean(-1) for p in parts], -1)
    return means, np.array([p.mean() for p in parts])


def headed(figure: go.Figure, height: int, legend: float = 26) -> go.Figure:
    """The height, small panel titles, and the legend above them."""
    figure.update_annotations(font_size=12)
    up = 1 + legend / (height - 120)
    figure.update_layout(height=height, margin={"t": 70}, legend={"y": up, "x": 0})
    return figure
