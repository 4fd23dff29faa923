"""Curves through training: in-context learning, loss, and loss by token index."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pipeline.job.source import import_file
from pipeline.report.theme import axis

common = import_file(Path(__file__).with_name("figures_common.py"))
COLUMNS = ["run", "member", "seed", "step", "tokens", "icl", "loss", "first_copy", "second_copy"]
ROWS = 64  # token indices of a heat map, at most


def icl(tables: dict[str, Any], options: dict[str, Any]) -> tuple[go.Figure, pd.DataFrame]:
    """In-context learning score and loss of the three models through training."""
    table, phase = tables["heads/training"], tables["heads/phase"]
    figure = curves(table, "", ["icl", "loss"], phase)
    figure.update_yaxes(**axis("in-context learning", "nats"), row=1, col=1)
    figure.update_yaxes(**axis("held-out loss", "nats"), row=2, col=1)
    shown = table[table["run"].isin(common.RUNS)]
    return figure, shown[COLUMNS]


def text(tables: dict[str, Any], options: dict[str, Any]) -> tuple[go.Figure, pd.DataFrame]:
    """The same for the models of text, and their best prefix matching."""
    table, phase = tables["heads/training"], tables["heads/phase"]
    by = ["run", "member", "step"]
    best = tables["heads/scores"].groupby(by, as_index=False)["prefix_matching"].max()
    table = table.merge(best, on=by)
    figure = curves(table, "text_", ["icl", "loss", "prefix_matching"], phase)
    figure.update_yaxes(**axis("in-context learning", "nats"), row=1, col=1)
    figure.update_yaxes(**axis("held-out loss", "nats"), row=2, col=1)
    figure.update_yaxes(**axis("best prefix matching", range=[0, 1]), row=3, col=1)
    shown = table[table["run"].str.startswith("text_")]
    return figure, shown[[*COLUMNS[:7], "prefix_matching"]]


def curves(table: pd.DataFrame, prefix: str, columns: list[str], phase: pd.DataFrame) -> go.Figure:
    """A row of panels below each other, one a column of the table; the phase change shaded."""
    n = len(columns)
    figure = make_subplots(rows=n, cols=1, shared_xaxes=True, vertical_spacing=0.06)
    for row, column in enumerate(columns, 1):
        for run, name, colour in common.runs_of(table, prefix):
            rows = table[table["run"] == run]
            common.over_seeds(figure, rows, column, (name, colour), row=row, col=1)
        common.shade(figure, phase, f"{prefix}two_layer", row=row, col=1)
    figure.update_xaxes(**axis("training tokens", "millions"), row=n, col=1)
    return common.headed(figure, 140 + 240 * n)


def loss_by_index(
    tables: dict[str, Any], options: dict[str, Any]
) -> tuple[go.Figure, pd.DataFrame]:
    """Heat maps of the loss by training tokens and token index, and the curves at the end."""
    table = tables["heads/training"]
    runs = common.runs_of(table)
    figure = make_subplots(
        rows=2,
        cols=2,
        horizontal_spacing=0.12,
        vertical_spacing=0.2,
        subplot_titles=[name for _, name, _ in runs] + ["at the end of training"],
    )
    frames = []
    for i, (run, name, colour) in enumerate(runs):
        rows = table[table["run"] == run]
        loss = mean_by_index(rows)
        z, index = common.blocks(loss.to_numpy(), ROWS)
        place = {"row": i // 2 + 1, "col": i % 2 + 1}
        figure.add_trace(heat(z, index + 1, loss.index.to_numpy()), **place)
        last = {"x": index + 1, "y": z[-1], "mode": "lines", "line": {"color": colour}}
        told = name + "<br>token %{x:.0f}, %{y:.2f} nats<extra></extra>"
        figure.add_trace(go.Scatter(**last, name=name, hovertemplate=told), row=2, col=2)
        long = loss.rename_axis(index="tokens", columns="index").stack().rename("loss")
        frames.append(long.reset_index().assign(run=run))
    for row, col in ((1, 1), (1, 2), (2, 1)):
        title = axis("training tokens", "millions") if (row, col) != (1, 1) else {}
        figure.update_xaxes(showgrid=False, **title, row=row, col=col)
        named = axis("token index") if col == 1 else {}  # once a row: a phone has room for no more
        figure.update_yaxes(showgrid=False, **named, row=row, col=col)
    figure.update_xaxes(**axis("token index"), row=2, col=2)
    right = {"side": "right", "rangemode": "tozero"}
    figure.update_yaxes(**axis("loss", "nats"), **right, row=2, col=2)
    bar = {"title": {"text": "loss<br>(nats)"}, "len": 0.46, "y": 1, "yanchor": "top"}
    figure.update_layout(coloraxis={"colorbar": {**bar, "thickness": 12, "outlinewidth": 0}})
    return common.headed(figure, 680), pd.concat(frames, ignore_index=True)


def mean_by_index(rows: pd.DataFrame) -> pd.DataFrame:
    """Loss, mean over seeds: [training tokens, token index from 1]."""
    mean = rows.groupby("tokens")["by_index"].apply(lambda v: np.mean(np.stack(list(v)), 0))
    out = pd.DataFrame(np.stack(list(mean)), index=mean.index)
    out.columns += 1
    return out


def heat(z: np.ndarray, index: np.ndarray, tokens: np.ndarray) -> go.Heatmap:
    """Loss [steps, indices] as a map with training tokens to the right."""
    return go.Heatmap(
        z=z.T.round(3),
        x=tokens / common.MILLION,
        y=index,
        coloraxis="coloraxis",
        hovertemplate="%{x:.2f} M tokens, token %{y:.0f}<br>%{z:.2f} nats<extra></extra>",
    )
