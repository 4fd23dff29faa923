"""Small models drawn whole: arrows in the plane, and WᵀW with the norms.

Blue is a dimension of one's own, vermillion superposition, grey not represented.
"""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from pipeline.figures import parts
from pipeline.figures.parts import Drawn, Panels, bars, evenly, first, key, line
from pipeline.figures.theme import DIVERGING, GRID, INK, PALETTE, rgba, scale

from .measures import weights

OWN, SHARED = PALETTE[0], PALETTE[1]
# From the most to the least important feature; readable on light and on dark ground.
IMPORTANCE = ["#E0A000", "#DD6A3A", "#C2528B", "#8A63C7", "#3B82C4"]
STATES = ["not represented", "a dimension of its own", "in superposition"]
RANKS = ("fit of lowest loss", "fit of median loss", "fit of highest loss")


def upright(W: np.ndarray) -> np.ndarray:
    """W [n, 2] turned so that the first long feature points up, the next one to the right."""
    norm = np.linalg.norm(W, axis=1)
    up = int(np.flatnonzero(norm > 0.5)[0]) if (norm > 0.5).any() else int(norm.argmax())
    c, s = W[up] / max(norm[up], 1e-12)
    W = W @ np.array([[s, c], [-c, s]])
    aside = np.flatnonzero((norm > 0.5) & (np.abs(W[:, 0]) > 0.1))
    if len(aside) and W[aside[0], 0] < 0:
        W = W * [-1, 1]
    return W


def plane(panels: Panels, panel: int, reach: float) -> None:
    """A square panel without ticks: axes through the origin and the unit circle."""
    place = panels.place(panel)
    parts.plane(panels.figure, **place, reach=reach, constraintoward="top")
    circle = {"type": "circle", "x0": -1, "x1": 1, "y0": -1, "y1": 1, "layer": "below"}
    panels.figure.add_shape(**circle, line={"color": GRID, "width": 1}, **place)


def state(name: str, colour: str) -> go.Scatter:
    """An entry of the legend for the state of a feature."""
    return key(name, colour, size=11, line={"color": INK, "width": 0.5})


def intro(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Five features in two dimensions as arrows, from dense to sparse."""
    table = tables["superposition/intro"]
    densities = np.sort(table["density"].unique())[::-1]
    shown = densities[evenly(len(densities), 6)]
    panels = Panels([f"1−S = {p:.2g}" for p in shown], 3, gap=(0.02, 0.09))
    for i in range(len(shown)):
        plane(panels, i, 1.35)
    found = [fits(table[table["density"] == p], rank) for rank in RANKS for p in shown]
    frame = pd.concat(found, ignore_index=True)
    for row in frame.itertuples():
        panel, case = list(shown).index(row.density), RANKS.index(row.fit)
        panels.add(panel, arrow(row), case=case)
    for feature in sorted(frame["feature"].unique().tolist()):  # an arrow's own marker may be tiny
        name = f"feature {feature}, I = {0.9**feature:.2g}"
        entry = line([None], [None], name, shade(feature), width=3, legendgroup=str(feature))
        panels.add(0, entry)
    panels.choose(RANKS)
    return panels.finish(540, top=60).update_layout(margin={"l": 12, "b": 12}), frame


def shade(feature: int) -> str:
    return IMPORTANCE[feature % len(IMPORTANCE)]


def fits(rows: pd.DataFrame, rank: str) -> pd.DataFrame:
    """The rows of one seed's model, chosen by its loss, turned upright."""
    losses = rows.groupby("seed")["loss"].first().sort_values()
    place = {RANKS[0]: 0, RANKS[1]: (len(losses) - 1) // 2, RANKS[2]: len(losses) - 1}[rank]
    model = rows[rows["seed"] == losses.index[place]].sort_values("feature")
    x, y = upright(weights(model)).T
    return model.drop(columns="w").assign(x=x, y=y, fit=rank)


def arrow(row: Any) -> go.Scatter:
    """The direction of one feature of a fit, from the origin."""
    tip = 12 if row.norm > 0.25 else 5  # a head longer than its arrow would hide it
    head = {"symbol": ["circle", "arrow"], "size": [0, tip], "opacity": 1, "line": {"width": 0}}
    return line(
        [0, row.x], [0, row.y], colour=shade(row.feature), width=3,
        meta=[row.feature, row.norm, row.bias], marker=head | {"angleref": "previous"},
        legendgroup=str(row.feature),
        hover="feature %{meta[0]}, ‖W‖ %{meta[1]:.3f}, b %{meta[2]:.3f}",
    )  # fmt: skip


def basic(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """WᵀW and b of each model above the norms of its features."""
    table = first(tables["superposition/basic"])
    dense, columns = table["density"].max(), options.get("columns", 4)
    models = [("linear", dense)] + [("relu", p) for p in np.sort(table["density"].unique())[::-1]]
    names = ["linear" if arm == "linear" else f"1−S={p:g}" for arm, p in models]
    blocks = -(-len(models) // columns)
    names += [""] * (blocks * columns - len(names))
    titles = [t for i in range(blocks) for t in names[i * columns :][:columns] + [""] * columns]
    panels = Panels(titles, columns, gap=(0.02, 0.05), row_heights=[0.62, 0.38] * blocks)
    frames = []
    for i, (arm, p) in enumerate(models):
        model = table[(table["arm"] == arm) & (table["density"] == p)].sort_values("feature")
        panel = i + i // columns * columns
        panels.add(panel, matrix(model))
        panels.add(panel + columns, norms(model))
        frames.append(model)
    finish_basic(panels, len(model))
    frame = pd.concat(frames, ignore_index=True)
    w = pd.DataFrame(np.stack(frame["w"].to_list()), index=frame.index).add_prefix("w")
    return panels.figure, pd.concat([frame.drop(columns="w"), w], axis=1)


def matrix(model: pd.DataFrame) -> go.Heatmap:
    """WᵀW, a gap, and the bias as a last column."""
    W = weights(model)
    gram = np.column_stack([W @ W.T, np.full(len(W), np.nan), model["bias"]])
    n = len(W)
    hover = "row %{y}, column %{x} (" + str(n + 1) + ": bias)<br>%{z:.2f}"
    look = {"coloraxis": "coloraxis", "hoverongaps": False, "xgap": None, "ygap": None}
    return parts.heat(gram.round(3), x=[*range(n), n, n + 1], hover=hover, **look)


def norms(model: pd.DataFrame) -> go.Bar:
    """‖W_i‖, coloured by how much other features share its direction."""
    hover = "feature %{x}, importance %{customdata[1]:.2g}<br>‖W‖ %{y:.2f}, "
    return bars(
        model["feature"], model["norm"], colour=model["interference"],
        customdata=np.column_stack([model["interference"], model["importance"]]),
        marker={"coloraxis": "coloraxis2"}, hover=hover + "interference %{customdata[0]:.2f}",
    )  # fmt: skip


def finish_basic(panels: Panels, n: int) -> None:
    """Axes, legend and colour bar; bars stand close under their matrix."""
    figure, rows, columns = panels.figure, panels.rows, panels.columns
    bare = {"showticklabels": False, "ticks": "", "showgrid": False, "zeroline": False}
    figure.update_xaxes(**bare, showline=False, range=[-0.7, n + 1.7])
    figure.update_yaxes(**bare, showline=False)
    block = 1 / (rows // 2)
    for row in range(1, rows + 1, 2):
        top = 1 - (row // 2) * block
        frame = {"showline": True, "linecolor": GRID, "mirror": True, "row": row}
        figure.update_yaxes(autorange="reversed", domain=[top - 0.55 * block, top], **frame)
        figure.update_xaxes(**frame)
        below = [top - 0.86 * block, top - 0.58 * block]
        figure.update_yaxes(range=[0, 1.25], domain=below, row=row + 1)
        figure.update_xaxes(showline=True, row=row + 1)
        figure.update_yaxes(title="‖W‖", showticklabels=True, tickvals=[0, 1], row=row + 1, col=1)
        for annotation in figure.layout.annotations[(row // 2) * columns :][:columns]:
            annotation.y = top
    for name, colour in zip(STATES[1:], (OWN, SHARED), strict=True):
        panels.add(rows * columns - 1, state(name, colour))
    bar = {"orientation": "h", "thickness": 10, "len": 0.7, "outlinewidth": 0, "x": 0.5}
    bar |= {"y": 0, "yanchor": "top", "title": {"text": "WᵀW and b"}}
    ends = [rgba(DIVERGING[0], 1), rgba(DIVERGING[1], 0.55), rgba(PALETTE[6], 0)]
    ends += [rgba(DIVERGING[3], 0.55), rgba(DIVERGING[4], 1)]  # clear at 0, for any ground
    gram = {"colorscale": scale(ends), "cmin": -1.25, "cmax": 1.25, "colorbar": bar}
    shared = {"colorscale": [[0, OWN], [1, SHARED]], "cmin": 0, "cmax": 1, "showscale": False}
    panels.finish(780, top=60, bargap=0.15, coloraxis=gram, coloraxis2=shared)
    figure.update_layout(margin={"b": 60, "l": 40})
