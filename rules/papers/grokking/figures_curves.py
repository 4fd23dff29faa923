"""Curves over training: all models of both arms, and the progress measures of one."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pipeline.job.source import import_file
from pipeline.report.theme import INK, axis, rgba, selector

common = import_file(Path(__file__).with_name("figures_common.py"))
LOSSES = (  # column of progress, name, colour, dash
    ("train_loss", "training loss", common.TRAIN, "solid"),
    ("test_loss", "test loss", common.TEST, "solid"),
    ("restricted_test", "restricted loss (test)", common.RESTRICTED, "dash"),
    ("excluded_train", "excluded loss (training)", common.EXCLUDED, "dash"),
)
GINIS = (("gini_W_E", "Gini of W_E", common.TRAIN), ("gini_W_L", "Gini of W_L", common.TEST))
FLOOR = 1e-9  # losses below this are drawn here


def grokking(tables: dict[str, Any], options: dict[str, Any]) -> tuple[go.Figure, pd.DataFrame]:
    """Accuracy and loss of every model, with weight decay and without."""
    figure = make_subplots(
        rows=2,
        cols=2,
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.09,
        vertical_spacing=0.06,
        subplot_titles=["weight decay", "none", "", ""],  # short: a phone has room for no more
    )
    frames = []
    for col, arm in enumerate(common.ARMS, start=1):
        history = tables[f"training/{arm}"].assign(arm=arm)
        for (seed, name), rows in history.groupby(["seed", "set"]):
            rows = common.thin(rows.sort_values("step"), 160)
            colour = common.TRAIN if name == "train" else common.TEST
            for row, what in enumerate(("accuracy", "loss"), start=1):
                label = "training pairs" if name == "train" else "other pairs (test)"
                first = col == row == 1 and seed == history["seed"].min()
                figure.add_trace(
                    go.Scatter(
                        x=rows["step"],
                        y=rows[what].clip(lower=FLOOR),
                        mode="lines",
                        line={"color": rgba(colour, 0.8), "width": 1.5},
                        name=label,
                        legendgroup=name,
                        showlegend=bool(first),
                        hovertemplate=f"seed {seed}, {label}<br>step %{{x:,}}: %{{y:.3g}}"
                        "<extra></extra>",
                    ),
                    row=row,
                    col=col,
                )
            frames.append(rows)
    figure.update_yaxes(**axis("accuracy", range=[-0.03, 1.05]), row=1, col=1)
    losses = pd.concat(frames)["loss"].clip(lower=FLOOR)
    figure.update_yaxes(**common.decades(losses), row=2)
    figure.update_yaxes(**axis("loss", "nats"), row=2, col=1)
    figure.update_xaxes(**axis("step", tickformat="~s", nticks=4), row=2)
    figure.update_xaxes(range=[0, None], rangemode="tozero")
    figure.update_layout(height=520, margin={"t": 70}, legend={"y": 1.09})
    return figure, pd.concat(frames, ignore_index=True)


def progress(tables: dict[str, Any], options: dict[str, Any]) -> tuple[go.Figure, pd.DataFrame]:
    """Losses, Gini coefficients and squared weights of one model at a time, phases shaded."""
    table, phases = tables["fourier/progress"], tables["fourier/phases"]
    models = [("decay", s) for s in common.seeds(table)]
    models += [("no_decay", s) for s in common.seeds(table, "no_decay")]
    columns = [c for c, *_ in LOSSES] + [c for c, *_ in GINIS] + ["sum_squares"]
    figure = make_subplots(
        rows=3, cols=1, shared_xaxes=True, row_heights=[0.56, 0.22, 0.22], vertical_spacing=0.05
    )
    data = {m: common.thin(common.model(table, *m).sort_values("step")) for m in models}
    shown = data[models[0]]
    for column, name, colour, dash in LOSSES:
        figure.add_trace(curve(shown, column, name, colour, dash), row=1, col=1)
    for column, name, colour in GINIS:
        figure.add_trace(curve(shown, column, name, colour, "dot"), row=2, col=1)
    figure.add_trace(curve(shown, "sum_squares", "Σ w² of all weights", INK, "solid"), row=3, col=1)
    choices = {}
    for arm, seed in models:
        rows = data[arm, seed]
        changes = {"x": [rows["step"].tolist()] * len(columns)}
        changes["y"] = [values(rows, c) for c in columns]
        shapes = shades(common.model(phases, arm, seed).iloc[0])
        which = list(range(len(columns)))
        choices[f"seed {seed}, {common.ARMS[arm]}"] = [changes, {"shapes": shapes}, which]
    phased = any(layout["shapes"] for _, layout, _ in choices.values())
    for name, colour in common.PHASES if phased else ():
        figure.add_trace(common.legend_square(name, rgba(colour, 0.4)), row=1, col=1)
    figure.update_layout(
        shapes=next(iter(choices.values()))[1]["shapes"],
        updatemenus=[selector(choices)],
        height=720,
        margin={"t": 96},
        legend={"y": 1.02},
    )
    plotted = [v for m in models for c, *_ in LOSSES for v in values(data[m], c)]
    figure.update_yaxes(**axis("loss", "nats") | common.decades(plotted), row=1, col=1)
    figure.update_yaxes(**axis("Gini coefficient", rangemode="tozero"), row=2, col=1)
    figure.update_yaxes(**axis("Σ w²", rangemode="tozero"), row=3, col=1)
    figure.update_xaxes(**axis("step (updates on all training pairs)", tickformat="~s"), row=3)
    frame = pd.concat(data.values(), ignore_index=True)
    return figure, frame[["arm", "seed", "step", *columns]]


def values(rows: pd.DataFrame, column: str) -> list[float]:
    """A column as plotted: losses not below FLOOR."""
    floor = FLOOR if column.endswith(("loss", "_test", "_train")) else -np.inf
    return common.numbers(rows[column].clip(lower=floor), 4)


def curve(rows: pd.DataFrame, column: str, name: str, colour: str, dash: str) -> go.Scatter:
    """One measure over training."""
    return go.Scatter(
        x=rows["step"].tolist(),
        y=values(rows, column),
        mode="lines",
        name=name,
        line={"color": colour, "width": 2, "dash": dash},
        hovertemplate=f"{name}<br>step %{{x:,}}: %{{y:.3g}}<extra></extra>",
    )


def shades(ends: pd.Series) -> list[dict]:
    """The shaded phases of one model; none where it has no phases."""
    borders = [0, ends["memorised"], ends["cleanup"], ends["cleaned"]]
    if np.isnan(borders).any():
        return []
    look = {"type": "rect", "line": {"width": 0}, "layer": "below", "xref": "x", "yref": "paper"}
    return [
        {**look, "fillcolor": rgba(colour, 0.16), "x0": x0, "x1": x1, "y0": 0, "y1": 1}
        for (_, colour), x0, x1 in zip(common.PHASES, borders, borders[1:], strict=False)
    ]
