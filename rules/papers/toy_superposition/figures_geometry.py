"""The geometry sweep: dimensions per feature, and the dimensionality of each feature."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pipeline.job.source import import_file
from pipeline.report.theme import GRID, INK, PALETTE, axis, rgba, selector

common = import_file(Path(__file__).with_name("figures_common.py"))
POLYTOPES = {  # the article's, as in measures.py
    "antipodal": "antipodal pair, 1/2",
    "triangle": "triangle, 2/3",
    "tetrahedron": "tetrahedron, 3/4",
    "pentagon": "pentagon, 2/5",
    "antiprism": "square antiprism, 3/8",
}
LINES = {"1": 1, "3/4": 3 / 4, "2/3": 2 / 3, "1/2": 1 / 2, "2/5": 2 / 5, "3/8": 3 / 8, "0": 0}


def dimensions(tables: dict[str, Any], options: dict[str, Any]) -> tuple[go.Figure, pd.DataFrame]:
    """D* against 1 / (1 − S): mean over seeds, and each seed."""
    table = tables["superposition/geometry"]
    keys = ["sweep", "seed", "density"]
    frame = (
        table[table["arm"] == "trained"]
        .groupby(keys, as_index=False)
        .agg(
            n=("feature", "size"),
            m=("n_hidden", "first"),
            dims_per_feature=("dims_per_feature", "first"),
        )
    )
    frame["inverse_density"] = 1 / frame["density"]
    figure = go.Figure()
    for y, name in ((1, "1"), (0.5, "1/2")):
        figure.add_hline(
            y,
            line={"color": INK, "width": 1, "dash": "dot"},
            annotation_text=name,
            annotation_position="top right",
        )
    for i, (_, sweep) in enumerate(frame.groupby("sweep")):
        colour, first = PALETTE[i], sweep.iloc[0]
        mean = sweep.groupby("inverse_density")["dims_per_feature"].mean()
        name, seeds = f"n = {first.n}, m = {first.m}", sweep["seed"].nunique()
        figure.add_trace(
            go.Scatter(
                x=mean.index,
                y=mean,
                mode="lines",
                line={"color": colour, "width": 2},
                name=name + (f", mean of {seeds} seeds" if seeds > 1 else ""),
                hoverinfo="skip",
            )
        )
        figure.add_trace(
            go.Scatter(
                x=sweep["inverse_density"],
                y=sweep["dims_per_feature"],
                mode="markers",
                marker={"color": colour, "size": 7, "symbol": ["circle", "diamond-open"][i % 2]},
                name=f"{name}, each model",
                customdata=sweep["seed"],
                hovertemplate="1/(1 − S) = %{x:.3g}<br>D* = %{y:.3f}, seed %{customdata}"
                "<extra></extra>",
            )
        )
    figure.update_xaxes(**axis("1 / (1 − S)", log=True))
    figure.update_yaxes(**axis("D* = m / ‖W‖²", range=[0, 1.12]))
    figure.update_layout(height=440)
    return figure, frame


def geometry(tables: dict[str, Any], options: dict[str, Any]) -> tuple[go.Figure, pd.DataFrame]:
    """Each feature's dimensionality against 1 / (1 − S), with the fractions of the polytopes."""
    table = tables["superposition/geometry"]
    frame = bubbles(table)
    views = list(frame[["sweep", "arm", "seed"]].drop_duplicates().itertuples(index=False))
    views.sort(key=lambda v: (v.arm == "random", v.sweep, v.seed))
    views = [v for v in views if v.arm == "trained" or v.seed == min(v.seed for v in views)]
    figure = make_subplots(
        rows=1, cols=2, shared_yaxes=True, column_widths=[0.8, 0.2], horizontal_spacing=0.02
    )
    names = [*POLYTOPES.values(), "other group", "not represented"]
    owner = []
    for view in views:
        part = frame[
            (frame["sweep"] == view.sweep)
            & (frame["arm"] == view.arm)
            & (frame["seed"] == view.seed)
        ]
        traces = [*marks(part, names), *curve(table, view)]
        for trace in traces:
            figure.add_trace(trace.update(visible=view is views[0]), row=1, col=1)
        figure.add_trace(margin(part).update(visible=view is views[0]), row=1, col=2)
        owner += [view] * (len(traces) + 1)
    choices = {
        view_name(table, view): [{"visible": [o is view for o in owner]}, {}] for view in views
    }
    finish_geometry(figure, choices)
    return figure, frame


def view_name(table: pd.DataFrame, view: Any) -> str:
    """'n = 200, m = 20, seed 0', or the null arm."""
    rows = table[table["sweep"] == view.sweep]
    shape = f"n = {rows['feature'].max() + 1}, m = {rows['n_hidden'].iloc[0]}"
    if view.arm == "random":
        return f"null: {shape}, directions redrawn"
    return f"{shape}, seed {view.seed}"


def bubbles(table: pd.DataFrame) -> pd.DataFrame:
    """Features of one model, kind of group and D_i (to 1/200) counted together."""
    named = table["polytope"].map(POLYTOPES).fillna("other group")
    D = table["represented_dimensionality"].astype(float)
    binned = table.assign(
        kind=named.where(table["group_size"] > 0, "not represented"),
        inverse_density=1 / table["density"],
        D=(D * 200).round() / 200,
    )
    keys = ["sweep", "arm", "seed", "inverse_density", "kind", "D"]
    return binned.groupby(keys, as_index=False).agg(
        features=("feature", "size"), group_size=("group_size", "median")
    )


def marks(part: pd.DataFrame, names: list[str]) -> list[go.Scatter]:
    """One trace a kind of group; a marker's area is the number of features."""
    out = []
    for i, name in enumerate(names):
        rows = part[part["kind"] == name]
        colour = [PALETTE[k] for k in (1, 5, 2, 3, 4, 6, 6)][i]
        out.append(
            go.Scatter(
                x=rows["inverse_density"],
                y=rows["D"],
                mode="markers",
                name=name,
                customdata=rows[["features", "group_size"]],
                marker={
                    "color": rgba(colour, 0.75),
                    "size": 3.5 + 2 * np.sqrt(rows["features"].clip(upper=60)),
                    "symbol": "circle-open" if name == "not represented" else "circle",
                    "line": {"width": 1 if name == "not represented" else 0},
                },
                hovertemplate=f"{name}<br>D = %{{y:.3f}}, 1/(1 − S) = %{{x:.3g}}<br>"
                "%{customdata[0]} features, groups of %{customdata[1]:.0f}<extra></extra>",
            )
        )
    return out


def curve(table: pd.DataFrame, view: Any) -> list[go.Scatter]:
    """D* of the same models."""
    rows = table[
        (table["sweep"] == view.sweep) & (table["arm"] == view.arm) & (table["seed"] == view.seed)
    ]
    rows = rows.groupby("density")["dims_per_feature"].first()
    line = {"color": INK, "width": 1.5}
    return [
        go.Scatter(
            x=1 / rows.index,
            y=rows,
            mode="lines",
            line=line,
            name="D*",
            hovertemplate="D* = %{y:.3f}<extra></extra>",
        )
    ]


def margin(part: pd.DataFrame) -> go.Bar:
    """How many represented features lie at each D_i."""
    counts = part[part["kind"] != "not represented"].groupby("D")["features"].sum()
    return go.Bar(
        x=counts,
        y=counts.index,
        orientation="h",
        width=0.005,
        showlegend=False,
        marker={"color": INK, "line": {"width": 0}},
        hovertemplate="D = %{y:.3f}: %{x} features<extra></extra>",
    )


def finish_geometry(figure: go.Figure, choices: dict[str, list]) -> None:
    """The lines at the fractions, and axes."""
    for name, y in LINES.items():
        figure.add_hline(y, line={"color": GRID, "width": 1}, layer="below", row=1, col="all")
        figure.add_annotation(
            x=1,
            xref="x2 domain",
            y=y,
            yref="y",
            text=name,
            showarrow=False,
            xanchor="right",
            yanchor="top" if name == "3/8" else "bottom",
        )
    figure.update_xaxes(**axis("1 / (1 − S)", log=True, showgrid=False), row=1, col=1)
    figure.update_xaxes(title="features", nticks=3, showgrid=False, row=1, col=2)
    figure.update_yaxes(showgrid=False, zeroline=False, range=[-0.04, 1.06])
    figure.update_yaxes(title="dimensionality D of a feature", row=1, col=1)
    figure.update_yaxes(showline=False, ticks="", row=1, col=2)
    figure.update_layout(
        height=620, bargap=0, updatemenus=[selector(choices)], legend={"itemsizing": "constant"}
    )
