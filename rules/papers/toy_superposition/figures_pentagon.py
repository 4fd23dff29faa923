"""Five features in the plane, the first made denser or sparser."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pipeline.job.source import import_file
from pipeline.report.theme import PALETTE, axis, rgba, scale

common = import_file(Path(__file__).with_name("figures_common.py"))
SHAPES = {5: "pentagon", 4: "two pairs"}  # by how many of the five features are represented
LOOKS = [
    ("pentagon", common.OWN, "pentagon"),
    ("two pairs", common.SHARED, "diamond"),
    ("other", PALETTE[6], "x"),
]


def pentagon(tables: dict[str, Any], options: dict[str, Any]) -> tuple[go.Figure, pd.DataFrame]:
    """The best fit for each density of the first feature, and the loss of every fit."""
    table = tables["superposition/pentagon"]
    table = table[table["seed"] == table["seed"].min()]
    figure = make_subplots(
        rows=2,
        cols=1,
        row_heights=[0.58, 0.42],
        vertical_spacing=0.2,
        subplot_titles=["fit of lowest loss for each density", "every fit"],
    )
    common.plane(figure, 1, 1, 1.4)
    frames = []
    for _, rows in table.groupby("first"):
        best = rows[rows["loss"] == rows["loss"].min()].sort_values("feature")
        x, y = common.upright(common.weights(best)).T
        frames.append(best.drop(columns="w").assign(x=x, y=y))
    frame = pd.concat(frames, ignore_index=True)
    reach = np.log10([table["first"].min(), table["first"].max()])
    for best in frames:
        share = (np.log10(best["first"].iloc[0]) - reach[0]) / max(reach[1] - reach[0], 1e-9)
        figure.add_trace(
            outline(best, common.between(common.IMPORTANCE[::-1], share)), row=1, col=1
        )
    models = table.groupby(["first", "fit"], as_index=False).agg(
        loss=("loss", "first"), kind=("norm", lambda s: SHAPES.get(int((s > 0.5).sum()), "other"))
    )
    for name, colour, symbol in LOOKS:
        rows = models[models["kind"] == name]
        marker = {"color": rgba(colour, 0.7), "size": 9, "symbol": symbol}
        told = name + "<br>density %{x}, loss %{y:.3g}<extra></extra>"
        points = {"x": rows["first"], "y": rows["loss"], "mode": "markers", "hovertemplate": told}
        figure.add_trace(go.Scatter(**points, name=name, marker=marker), row=2, col=1)
    finish_pentagon(figure, reach)
    return figure, frame


def finish_pentagon(figure: go.Figure, reach: np.ndarray) -> None:
    """Log axes, and a colour bar for the densities of the first panel."""
    ticks = [
        p
        for p in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
        if reach[0] - 0.1 <= np.log10(p) <= reach[1] + 0.1
    ]
    shown = [10 ** reach[0], 0.01, 0.05, 10 ** reach[1]]
    figure.update_xaxes(**axis("density of the first feature", log=True), row=2, col=1)
    figure.update_xaxes(
        dtick=None, tickvals=ticks, ticktext=[f"{p:g}" for p in ticks], row=2, col=1
    )
    figure.update_yaxes(**axis("loss", log=True, tickformat="~g"), row=2, col=1)
    figure.update_layout(
        margin={"t": 60},
        coloraxis={
            "colorscale": scale(common.IMPORTANCE[::-1]),
            "cmin": reach[0],
            "cmax": reach[1],
            "colorbar": {
                "orientation": "h",
                "thickness": 10,
                "outlinewidth": 0,
                "len": 0.9,
                "x": 0.5,
                "y": 0.405,
                "yanchor": "bottom",
                "tickvals": np.log10(shown),
                "ticktext": [f"{p:.2g}" for p in shown],
                "tickangle": 0,
                "title": {"text": "density of the first feature (large dot)", "side": "top"},
            },
        },
    )
    common.headed(figure, 860)


def outline(best: pd.DataFrame, colour: str) -> go.Scatter:
    """The five features of one model; those that are represented are joined around the circle."""
    long = best[best["norm"] > 0.5]
    around = long.iloc[np.argsort(np.arctan2(long["y"], long["x"]))]
    around = pd.concat([around, around.iloc[:1]])
    gap = around.iloc[:1].assign(x=np.nan)
    points = pd.concat([around, gap, best[best["norm"] <= 0.5]])
    return go.Scatter(
        x=points["x"],
        y=points["y"],
        mode="lines+markers",
        showlegend=False,
        line={"color": rgba(colour, 0.45), "width": 1},
        marker={
            "color": np.log10(points["first"]),
            "coloraxis": "coloraxis",
            "size": np.where(points["feature"] == 0, 11, 7),
            "opacity": 1,
        },
        customdata=points[["first", "feature", "norm", "dimensionality"]],
        hovertemplate="density of the first feature %{customdata[0]:g}<br>feature "
        "%{customdata[1]}, ‖W‖ %{customdata[2]:.2f}, D %{customdata[3]:.3f}<extra></extra>",
    )
