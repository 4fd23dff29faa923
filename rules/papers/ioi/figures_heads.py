"""Heat maps: heads by method and by step, and the stream by layer and position."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pipeline.job.source import import_file
from pipeline.report.theme import INK, selector

common = import_file(Path(__file__).with_name("figures_common.py"))
METHODS = {
    "direct_logit": "direct logit attribution",
    "activation_patching": "activation patching",
    "attribution_patching": "attribution patching",
}
STEPS = {
    "direct": ("→ logits", ("name_mover", "suppressor", "writer", "negative")),
    "to_movers": ("→ queries of those", ("s_inhibition",)),
    "to_inhibition": ("→ values of S-inhibition heads", ("induction", "duplicate")),
    "to_induction": ("→ keys of induction heads", ("previous",)),
}


def panels(titles: list[str], n_layers: int) -> go.Figure:
    """Heat maps side by side that share the layer axis, the first layer on top."""
    figure = make_subplots(
        rows=1, cols=len(titles), shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=titles
    )
    common.plain_axes(figure, title={"text": "head"}, dtick=1)
    figure.update_yaxes(range=[n_layers - 0.5, -0.5])
    figure.update_yaxes(title={"text": "layer"}, row=1, col=1)
    return figure


def bar_of(col: int, n: int) -> dict[str, Any]:
    """A horizontal colour bar under panel `col` of n."""
    width = (1 - 0.03 * (n - 1)) / n
    middle = (col - 1) * (width + 0.03) + width / 2
    place = {"orientation": "h", "x": middle, "len": 0.9 * width, "y": -0.2, "yanchor": "top"}
    return place | {"thickness": 8, "outlinewidth": 0, "tickformat": "~g"}


def attribution(tables: dict[str, Any], options: dict[str, Any]) -> tuple[go.Figure, pd.DataFrame]:
    """Every head by direct logit attribution, exact patching and its estimate."""
    (nodes,) = tables.values()
    heads = nodes[nodes["kind"] == "head"]
    heads = common.over_seeds(heads, ["method", "layer", "head"], ["score", "sd"])
    methods = [m for m in METHODS if m in set(heads["method"])]
    figure = panels([METHODS[m] for m in methods], heads["layer"].nunique())
    for col, method in enumerate(methods, 1):
        values = common.grid(heads[heads["method"] == method], "score")
        figure.add_trace(common.heat(values, "logits:", bar_of(col, len(methods))), row=1, col=col)
    common.headed(figure, 240 + 12 * int(heads["layer"].nunique()))
    figure.update_layout(margin={"b": 110})
    return figure, heads[["method", "layer", "head", "score", "sd"]]


def paths(tables: dict[str, Any], options: dict[str, Any]) -> tuple[go.Figure, pd.DataFrame]:
    """The four steps; a list chooses the arm; heads that count have their class's ring."""
    table = common.first(next(iter(tables.values())))
    arms, n = common.arms_of(table), len(STEPS)
    figure = panels([title for title, _ in STEPS.values()], table["layer"].nunique())
    shown: list[int] = []
    for number, (arm, _) in enumerate(arms):
        rows = table[table["arm"] == arm]
        for col, (step, (_, roles)) in enumerate(STEPS.items(), 1):
            heat = common.heat(common.grid(rows, step), "logits:", bar_of(col, n))
            rings = rows[rows["role"].isin(roles)]
            ring = go.Scatter(
                x=rings["head"],
                y=rings["layer"],
                mode="markers",
                marker={"symbol": "square-open", "size": 11, "color": INK, "line": {"width": 1.6}},
                customdata=[common.ROLES[r][0] for r in rings["role"]],
                hovertemplate="head %{y}.%{x}: %{customdata}<extra></extra>",
                showlegend=False,
            )
            for trace in (heat, ring):
                trace.visible = number == 0
                figure.add_trace(trace, row=1, col=col)
                shown.append(number)
    if len(arms) > 1:
        choices = {
            name: [{"visible": [s == i for s in shown]}, {}] for i, (_, name) in enumerate(arms)
        }
        figure.update_layout(updatemenus=[selector(choices)])
    common.headed(figure, 240 + 12 * int(table["layer"].nunique()))
    figure.update_layout(margin={"b": 110})
    return figure, table[["arm", "layer", "head", "role", *STEPS]]


def streams(tables: dict[str, Any], options: dict[str, Any]) -> tuple[go.Figure, pd.DataFrame]:
    """The stream before each layer, replaced at one position: exact, and by one gradient."""
    (nodes,) = tables.values()
    rows = nodes[(nodes["kind"] == "resid") & (nodes["position"] != "")]
    rows = common.over_seeds(rows, ["method", "layer", "position"], ["score", "sd"])
    order = list(dict.fromkeys(rows["position"]))
    methods = [m for m in METHODS if m in set(rows["method"])]
    figure = panels([METHODS[m] for m in methods], rows["layer"].nunique())
    for col, method in enumerate(methods, 1):
        some = rows[rows["method"] == method]
        values = some.pivot(index="layer", columns="position", values="score")[order]
        trace = common.heat(values.to_numpy(float), "logits:", bar_of(col, len(methods)))
        trace.x = [p.replace("_next", "+1") for p in order]
        trace.hovertemplate = "layer %{y}, at %{x}<br>%{z:.3~g} logits<extra></extra>"
        figure.add_trace(trace, row=1, col=col)
    figure.update_xaxes(title={"text": "position"})
    common.headed(figure, 240 + 11 * int(np.unique(rows["layer"]).size))
    figure.update_layout(margin={"b": 120})
    return figure, rows[["method", "layer", "position", "score", "sd"]]
