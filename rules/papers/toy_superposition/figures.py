"""Figures of Toy Models of Superposition: the geometry sweep; no torch.

Small models drawn whole stand in figures_models.py, the phase diagram and the pentagon in
figures_phase.py.
"""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from pipeline.figures.parts import Drawn, Panels, line, points
from pipeline.figures.theme import GRID, INK, PALETTE, axis, rgba

GROUPS = {  # polytope, as in measures.py -> the article's name, colour
    "antipodal": ("antipodal pair, 1/2", PALETTE[1]),
    "triangle": ("triangle, 2/3", PALETTE[5]),
    "tetrahedron": ("tetrahedron, 3/4", PALETTE[2]),
    "pentagon": ("pentagon, 2/5", PALETTE[3]),
    "antiprism": ("square antiprism, 3/8", PALETTE[4]),
    "other": ("other group", PALETTE[6]),
    "none": ("not represented", PALETTE[6]),
}
ABSENT = "not represented"
LINES = {"1": 1, "3/4": 3 / 4, "2/3": 2 / 3, "1/2": 1 / 2, "2/5": 2 / 5, "3/8": 3 / 8, "0": 0}
VIEW = ["sweep", "arm", "seed"]


def dimensions(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """D* against 1 / (1 − S): mean over seeds, and each seed."""
    table = tables["superposition/geometry"]
    groups = table[table["arm"] == "trained"].groupby(["sweep", "seed", "density"], as_index=False)
    frame = groups.agg(
        n=("feature", "size"), m=("n_hidden", "first"),
        dims_per_feature=("dims_per_feature", "first"),
    )  # fmt: skip
    frame["inverse_density"] = 1 / frame["density"]
    panels, x, y = Panels(), "inverse_density", "dims_per_feature"
    for i, (_, sweep) in enumerate(frame.groupby("sweep")):
        mean, seeds = sweep.groupby(x)[y].mean(), sweep["seed"].nunique()
        name = f"n = {sweep['n'].iloc[0]}, m = {sweep['m'].iloc[0]}"
        of = f", mean of {seeds} seeds" if seeds > 1 else ""
        panels.add(0, line(mean.index, mean, name + of, PALETTE[i]))
        hover = "1/(1 − S) = %{x:.3g}<br>D* = %{y:.3f}, seed %{customdata}"
        look = {"size": 7, "symbol": ["circle", "diamond-open"][i % 2], "hover": hover}
        each = points(sweep[x], sweep[y], f"{name}, each model", PALETTE[i], **look)
        panels.add(0, each.update(customdata=sweep["seed"]))
    for level, name in ((1, "1"), (0.5, "1/2")):
        note = {"annotation_text": name, "annotation_position": "top right"}
        look = {"color": INK, "width": 1, "dash": "dot"}
        panels.figure.add_hline(level, line=look, **note)
    axes = {"xaxis": axis("1 / (1 − S)", log=True)}
    axes["yaxis"] = axis("D* = m / ‖W‖²", range=[0, 1.12])
    return panels.finish(440, top=48, **axes), frame


def geometry(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Each feature's dimensionality against 1 / (1 − S), with the fractions of the polytopes."""
    table = tables["superposition/geometry"]
    frame = bubbles(table)
    views = list(frame[VIEW].drop_duplicates().itertuples(index=False))
    views.sort(key=lambda v: (v.arm == "random", v.sweep, v.seed))
    views = [v for v in views if v.arm == "trained" or v.seed == min(v.seed for v in views)]
    panels = Panels(["", ""], gap=(0.02, 0), shared_yaxes=True, column_widths=[0.8, 0.2])
    for case, view in enumerate(views):
        part, rows = (t[(t[VIEW] == list(view)).all(axis=1)] for t in (frame, table))
        curve = rows.groupby("density")["dims_per_feature"].first()
        mean = line(1 / curve.index, curve, "D*", width=1.5, hover="D* = %{y:.3f}")
        panels.add(0, *marks(part), mean, case=case)
        panels.add(1, margin(part), case=case)
    panels.choose(view_name(table, view) for view in views)
    return finish_geometry(panels), frame


def view_name(table: pd.DataFrame, view: Any) -> str:
    """'n = 200, m = 20, seed 0', or the null arm."""
    rows = table[table["sweep"] == view.sweep]
    shape = f"n = {rows['feature'].max() + 1}, m = {rows['n_hidden'].iloc[0]}"
    null = view.arm == "random"
    return f"null: {shape}, directions redrawn" if null else f"{shape}, seed {view.seed}"


def bubbles(table: pd.DataFrame) -> pd.DataFrame:
    """Features of one model, kind of group and D_i (to 1/200) counted together."""
    named = table["polytope"].map({k: name for k, (name, _) in GROUPS.items()})
    D = table["represented_dimensionality"].astype(float)
    binned = table.assign(
        kind=named.fillna("other group").where(table["group_size"] > 0, ABSENT),
        inverse_density=1 / table["density"],
        D=(D * 200).round() / 200,
    )
    groups = binned.groupby([*VIEW, "inverse_density", "kind", "D"], as_index=False)
    return groups.agg(features=("feature", "size"), group_size=("group_size", "median"))


def marks(part: pd.DataFrame) -> list[go.Scatter]:
    """One trace per kind of group; a marker's area is the number of features."""
    out = []
    for name, shade in GROUPS.values():
        rows = part[part["kind"] == name]
        hover = f"{name}<br>D = %{{y:.3f}}, 1/(1 − S) = %{{x:.3g}}<br>"
        trace = points(
            rows["inverse_density"], rows["D"], name, rgba(shade, 0.75),
            size=3.5 + 2 * np.sqrt(rows["features"].clip(upper=60)),
            symbol="circle-open" if name == ABSENT else "circle",
            marker={"line": {"width": int(name == ABSENT)}},
            customdata=rows[["features", "group_size"]],
            hover=hover + "%{customdata[0]} features, groups of %{customdata[1]:.0f}",
        )  # fmt: skip
        out.append(trace)
    return out


def margin(part: pd.DataFrame) -> go.Bar:
    """How many represented features lie at each D_i."""
    counts = part[part["kind"] != ABSENT].groupby("D")["features"].sum()
    return go.Bar(
        x=counts, y=counts.index, orientation="h", width=0.005, showlegend=False,
        marker={"color": INK, "line": {"width": 0}},
        hovertemplate="D = %{y:.3f}: %{x} features<extra></extra>",
    )  # fmt: skip


def finish_geometry(panels: Panels) -> go.Figure:
    """The lines at the fractions, and axes."""
    figure = panels.figure
    for name, y in LINES.items():
        figure.add_hline(y, line={"color": GRID, "width": 1}, layer="below", row=1, col="all")
        at = {"x": 1, "xref": "x2 domain", "y": y, "yref": "y", "xanchor": "right"}
        below = "top" if name == "3/8" else "bottom"
        figure.add_annotation(**at, text=name, showarrow=False, yanchor=below)
    figure.update_xaxes(**axis("1 / (1 − S)", log=True, showgrid=False), row=1, col=1)
    figure.update_xaxes(title="features", nticks=3, showgrid=False, row=1, col=2)
    figure.update_yaxes(showgrid=False, zeroline=False, range=[-0.04, 1.06])
    figure.update_yaxes(title="dimensionality D of a feature", row=1, col=1)
    figure.update_yaxes(showline=False, ticks="", row=1, col=2)
    panels.finish(620, top=84, bargap=0)
    return figure.update_layout(legend={"itemsizing": "constant"})
