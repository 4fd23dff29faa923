"""Fourier spectra and circles, each with a slider over training."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import cyclical
from plotly.subplots import make_subplots

from pipeline.job.source import import_file
from pipeline.report.theme import GRID, axis, rgba, scale, slider

common = import_file(Path(__file__).with_name("figures_common.py"))
PARTS = {"W_E": "embedding W_E", "neurons": "neurons", "W_L": "neurons to logits W_L"}
ROWS = {"number": "embedding of n", "sum": "MLP(a, b)"}
MOST = 4  # circles side by side


def spectrum(tables: dict[str, Any], options: dict[str, Any]) -> tuple[go.Figure, pd.DataFrame]:
    """Norm of each frequency in W_E, neurons and W_L of the first model."""
    table = tables["fourier/spectrum"]
    seed = common.seeds(table)[0]
    table = common.model(table, "decay", seed).sort_values("frequency")
    key = common.key_of(tables["fourier/frequencies"], "decay", seed)
    steps = sorted(table["step"].unique())
    figure = make_subplots(
        rows=len(PARTS),
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.07,
        subplot_titles=list(PARTS.values()),
    )
    for row, part in enumerate(PARTS, start=1):
        rows = table[table["part"] == part]
        last = rows[rows["step"] == steps[-1]]
        is_key = last["frequency"].isin(key)
        figure.add_trace(
            go.Bar(
                x=last["frequency"],
                y=common.numbers(last["norm"]),
                marker={"color": np.where(is_key, common.KEY, rgba(common.OTHER, 0.75)).tolist()},
                showlegend=False,
                hovertemplate="k = %{x}: %{y:.3g}<extra></extra>",
            ),
            row=row,
            col=1,
        )
        top = 1.06 * float(rows["norm"].max())
        name = "root mean square" if part == "neurons" else "norm"
        figure.update_yaxes(**axis(name, range=[0, top]), row=row, col=1)
    for name, colour in (("key frequency", common.KEY), ("other frequency", common.OTHER)):
        figure.add_trace(common.legend_square(name, colour), row=1, col=1)
    shown = {}
    for step in steps:
        at = table[table["step"] == step]
        y = [common.numbers(at.loc[at["part"] == part, "norm"]) for part in PARTS]
        shown[f"{step:,}"] = [{"y": [*y, [None], [None]]}, {}]
    figure.update_xaxes(**axis("frequency k (turns of the circle over all numbers)"), row=3, col=1)
    figure.update_layout(
        sliders=[slider(shown, "step ", active=len(steps) - 1)],
        height=560,
        bargap=0.15,
        margin={"t": 64},
        legend={"y": 1.07},
    )
    figure.update_annotations(font_size=12)
    return figure, table[["seed", "step", "part", "frequency", "norm"]]


def circle(tables: dict[str, Any], options: dict[str, Any]) -> tuple[go.Figure, pd.DataFrame]:
    """Numbers (above) and sums (below) on the plane of each key frequency of the first model."""
    table = tables["fourier/circle"]
    steps = sorted(table["step"].unique())
    key = strongest(tables["fourier/frequencies"], table)
    if not key:
        note = {"text": "no key frequency", "showarrow": False, "font": {"size": 14}}
        bare = {"annotations": [note], "height": 160}
        return go.Figure(layout=bare | {"xaxis_visible": False, "yaxis_visible": False}), table
    p = int(table["value"].max()) + 1
    figure = make_subplots(
        rows=2,
        cols=len(key),
        horizontal_spacing=0.03,
        vertical_spacing=0.05,
        subplot_titles=[f"k = {k}" for k in key] + [""] * len(key),
    )
    table = table[table["frequency"].isin(key)]
    panels = [(part, k) for part in ROWS for k in key]
    for i, (part, k) in enumerate(panels):
        row, col = i // len(key) + 1, i % len(key) + 1
        figure.add_trace(dots(at(table, steps[-1], part, k), k, p), row=row, col=col)
        reach = 1.08 * float(table.loc[table["part"] == part, ["x", "y"]].abs().max().max())
        plane(figure, row, col, reach)
    for row, name in enumerate(ROWS.values(), start=1):
        figure.update_yaxes(title={"text": name}, row=row, col=1)
    shown = {}
    for step in steps:
        frames = [at(table, step, part, k) for part, k in panels]
        xy = {c: [common.numbers(f[c]) for f in frames] for c in "xy"}
        shown[f"{step:,}"] = [xy, {}]
    figure.update_layout(
        sliders=[slider(shown, "step ", active=len(steps) - 1)],
        height=520,
        margin={"t": 56, "b": 64, "r": 8},
        coloraxis={
            "colorscale": scale(cyclical.Phase),
            "cmin": 0,
            "cmax": p,
            "colorbar": {
                "orientation": "h",
                "y": -0.02,
                "yanchor": "top",
                "len": 0.6,
                "thickness": 10,
                "tickvals": [0, p / 4, p / 2, 3 * p / 4, p],
                "ticktext": ["0°", "90°", "180°", "270°", "360°"],
                "title": {"text": "angle 2πkn/p that n should have", "side": "top"},
            },
        },
    )
    return figure, table


def strongest(frequencies: pd.DataFrame, table: pd.DataFrame) -> list[int]:
    """At most MOST key frequencies of the model in `table`, those of largest effect, ascending."""
    if not len(table):
        return []
    rows = common.model(frequencies, table["arm"].iloc[0], table["seed"].iloc[0])
    rows = rows[rows["key"]].sort_values("without_test", ascending=False)
    return sorted(rows["frequency"].head(MOST))


def at(table: pd.DataFrame, step: int, part: str, k: int) -> pd.DataFrame:
    """The points of one panel."""
    chosen = (table["step"] == step) & (table["part"] == part) & (table["frequency"] == k)
    return table[chosen].sort_values("value")


def dots(points: pd.DataFrame, k: int, p: int) -> go.Scatter:
    """The points of one panel, coloured by the angle that they should have."""
    what = "n" if points["part"].iloc[0] == "number" else "a + b"
    return go.Scatter(
        x=common.numbers(points["x"]),
        y=common.numbers(points["y"]),
        mode="markers",
        marker={
            "size": 6,
            "color": ((k * points["value"]) % p).tolist(),
            "coloraxis": "coloraxis",
            "opacity": 0.9,
        },
        customdata=points["value"].tolist(),
        showlegend=False,
        hovertemplate=f"{what} = %{{customdata}}<br>along cos %{{x:.2g}}, sin %{{y:.2g}}"
        "<extra></extra>",
    )


def plane(figure: go.Figure, row: int, col: int, reach: float) -> None:
    """A square panel without ticks, with axes through the origin."""
    bare = {"showline": False, "showticklabels": False, "ticks": "", "showgrid": False}
    bare |= {"zeroline": True, "zerolinewidth": 1, "zerolinecolor": GRID}
    bare |= {"range": [-reach, reach], "constrain": "domain"}
    figure.update_xaxes(**bare, row=row, col=col)
    figure.update_yaxes(**bare, row=row, col=col)
    x = figure.get_subplot(row, col).xaxis.plotly_name.removeprefix("xaxis")
    figure.update_yaxes(scaleanchor=f"x{x}", row=row, col=col)
