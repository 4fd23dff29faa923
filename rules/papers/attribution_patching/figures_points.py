"""Scatter plots: an estimate against the exact effect, a point a node or edge."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pipeline.job.source import import_file
from pipeline.report.theme import INK, axis, rgba

common = import_file(Path(__file__).with_name("figures_common.py"))
NODES = ("attribution_patching", "attribution_ig", "qk_fix", "atp_star")
LOW, HIGH = 1e-3, 10.0  # shares that are drawn; what lies beyond stands at the edge


def panels(methods: list[str], columns: int) -> go.Figure:
    return make_subplots(
        rows=-(-len(methods) // columns),
        cols=columns,
        horizontal_spacing=0.1,
        vertical_spacing=0.16,
        subplot_titles=[common.METHODS[m][0] for m in methods],
    )


def named(rows: pd.DataFrame) -> list[str]:
    """'query 3.1', 'MLP 4', 'stream 5 at END'."""
    one = {"head": "head", "mlp": "MLP", "q": "query", "k": "key", "v": "value"}
    return [
        f"stream {r.layer} at {r.position}"
        if r.kind == "resid"
        else f"{one[r.kind]} {r.layer}" + (f".{r.head}" if r.head >= 0 else "")
        for r in rows.itertuples()
    ]


def estimates(tables: dict[str, Any], options: dict[str, Any]) -> tuple[go.Figure, pd.DataFrame]:
    """Four panels, a method each; AtP*, which has no sign, against the size of the effect."""
    table = common.first(next(iter(tables.values())))
    found, shown = common.cases(table), []
    figure = panels(list(NODES), 2)
    for number, (_, case) in enumerate(found):
        for i, method in enumerate(NODES):
            row, col = divmod(i, 2)
            at = {"row": row + 1, "col": col + 1}
            column = "size" if method == "atp_star" else "score"
            some = case[case["method"] == method]
            figure.add_trace(common.equal(some, f"exact_{column}", column), **at)
            shown.append(number)
            for kind, (label, shade) in common.KINDS.items():
                of = some[some["kind"] == kind]
                if of.empty:
                    continue
                point = go.Scatter(
                    x=of[f"exact_{column}"],
                    y=of[column],
                    mode="markers",
                    name=label,
                    legendgroup=kind,
                    showlegend=i == 0,
                    marker={"color": rgba(shade, 0.7), "size": 6},
                    customdata=named(of),
                    hovertemplate="%{customdata}<br>exact %{x:.3~g}, estimated %{y:.3~g}",
                )
                figure.add_trace(point, **at)
                shown.append(number)
    figure.update_xaxes(title={"text": "exact effect (logits)"}, row=2)
    figure.update_yaxes(title={"text": "estimate (logits)"}, col=1)
    common.chosen(figure, shown, [name for name, _ in found])
    kept = "arm task method kind layer head position score size exact_score exact_size".split()
    return common.titled(figure, 640), table[kept]


def edges(tables: dict[str, Any], options: dict[str, Any]) -> tuple[go.Figure, pd.DataFrame]:
    """Two panels; colours are what an edge ends in."""
    table = common.first(next(iter(tables.values())))
    found, shown = common.cases(table), []
    methods = ["eap", "eap_ig"]
    figure = panels(methods, 2)
    ends = {"q": "into queries", "k": "into keys", "v": "into values", "mlp": "into MLPs",
            "logits": "into the logits"}  # fmt: skip
    shades = {k: common.KINDS[k][1] for k in ("q", "k", "v", "mlp")}
    shades["logits"] = common.KINDS["head"][1]
    for number, (_, case) in enumerate(found):
        for i, method in enumerate(methods, 1):
            some = case[case["method"] == method]
            some = some.assign(end=some["target_input"].where(some["target_input"] != "", None))
            some["end"] = some["end"].fillna(some["target_kind"])
            figure.add_trace(common.equal(some, "exact", "score"), row=1, col=i)
            shown.append(number)
            for end, label in ends.items():
                of = some[some["end"] == end]
                if of.empty:
                    continue
                names = [
                    f"{r.source_kind} {r.source_layer}.{r.source_head} → "
                    f"{end} {r.target_layer}.{r.target_head}"
                    for r in of.itertuples()
                ]
                point = go.Scatter(
                    x=of["exact"],
                    y=of["score"],
                    mode="markers",
                    name=label,
                    legendgroup=end,
                    showlegend=i == 1,
                    marker={"color": rgba(shades[end], 0.7), "size": 6},
                    customdata=[n.replace(".-1", "") for n in names],
                    hovertemplate="%{customdata}<br>exact %{x:.3~g}, estimated %{y:.3~g}",
                )
                figure.add_trace(point, row=1, col=i)
                shown.append(number)
    figure.update_xaxes(title={"text": "exact effect (logits)"})
    figure.update_yaxes(title={"text": "estimate (logits)"}, col=1)
    common.chosen(figure, shown, [name for name, _ in found])
    return common.titled(figure, 400), table


def saturation(tables: dict[str, Any], options: dict[str, Any]) -> tuple[go.Figure, pd.DataFrame]:
    """Queries and keys that matter: share of the effect that an estimate sees, by attention."""
    nodes, totals = (common.first(tables[f"estimates/{t}"]) for t in ("nodes", "totals"))
    total = totals.set_index(["arm", "task"])["total"].abs()
    inputs = nodes[nodes["kind"].isin(["q", "k"])]
    whole = np.array([total[key] for key in zip(inputs["arm"], inputs["task"], strict=True)])
    inputs = inputs[inputs["exact_size"] >= 0.01 * whole]
    inputs = inputs.assign(share=inputs["size"] / inputs["exact_size"])
    methods = ["attribution_patching", "qk_fix"]
    found, shown, figure = common.cases(inputs), [], go.Figure()
    for number, (_, case) in enumerate(found):
        for method in methods:
            some, (label, shade) = case[case["method"] == method], common.METHODS[method]
            figure.add_scatter(
                x=some["peak"],
                y=some["share"].clip(LOW, HIGH),
                mode="markers",
                name=label,
                marker={"color": rgba(shade, 0.75), "size": 7},
                customdata=named(some),
                hovertemplate="%{customdata}<br>attention %{x:.3~g}, share %{y:.3~g}",
            )
            shown.append(number)
    figure.add_scatter(
        x=[0, 1], y=[1, 1], mode="lines", hoverinfo="skip", showlegend=False,
        line={"color": INK, "dash": "dot", "width": 1},
    )  # fmt: skip
    shown.append(-1)
    spans = np.log10([LOW * 0.8, HIGH * 1.2]).tolist()
    figure.update_layout(
        xaxis=axis("largest attention weight of the head") | {"range": [0, 1.02]},
        yaxis=axis("estimated size over exact size", type="log", range=spans, dtick=1),
        height=420,
    )
    common.chosen(figure, shown, [name for name, _ in found])
    kept = "arm task method kind layer head peak size exact_size share".split()
    return figure, inputs[inputs["method"].isin(methods)][kept]
