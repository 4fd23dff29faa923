"""Small models drawn whole: arrows in the plane, and WᵀW with the norms."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pipeline.job.source import import_file
from pipeline.report.theme import DIVERGING, GRID, PALETTE, rgba, scale, selector

common = import_file(Path(__file__).with_name("figures_common.py"))
RANKS = ("fit of lowest loss", "fit of median loss", "fit of highest loss")


def intro(tables: dict[str, Any], options: dict[str, Any]) -> tuple[go.Figure, pd.DataFrame]:
    """Five features in two dimensions as arrows, from dense to sparse."""
    table = tables["superposition/intro"]
    densities = np.sort(table["density"].unique())[::-1]
    shown = densities[np.unique(np.linspace(0, len(densities) - 1, 6).round().astype(int))]
    columns = 3
    figure = make_subplots(
        rows=-(-len(shown) // columns),
        cols=columns,
        horizontal_spacing=0.02,
        vertical_spacing=0.09,
        subplot_titles=[f"1−S = {p:.2g}" for p in shown],
    )
    for i in range(len(shown)):
        common.plane(figure, i // columns + 1, i % columns + 1, 1.35)
    frame = pd.concat(
        [fits(table[table["density"] == p], rank) for rank in RANKS for p in shown],
        ignore_index=True,
    )
    drawn = {rank: arrows(frame[frame["fit"] == rank], shown) for rank in RANKS}
    for p, feature, data in drawn[RANKS[0]]:
        points = {k: v for k, v in data.items() if k != "marker.size"}
        panel = int(np.flatnonzero(shown == p)[0])
        colour = common.IMPORTANCE[feature % len(common.IMPORTANCE)]
        figure.add_trace(
            go.Scatter(
                **points,
                mode="lines+markers",
                line={"color": colour, "width": 3},
                marker={
                    "symbol": ["circle", "arrow"],
                    "size": data["marker.size"],
                    "opacity": 1,
                    "line": {"width": 0},
                    "angleref": "previous",
                },
                legendgroup=str(feature),
                showlegend=False,
                hovertemplate="feature %{meta[0]}, ‖W‖ %{meta[1]:.3f}, b %{meta[2]:.3f}"
                "<extra></extra>",
            ),
            row=panel // columns + 1,
            col=panel % columns + 1,
        )
    keys, which = ("x", "y", "meta", "marker.size"), list(range(len(drawn[RANKS[0]])))
    choices = {
        rank: [{k: [data[k] for _, _, data in traces] for k in keys}, {}, which]
        for rank, traces in drawn.items()
    }
    for feature in sorted(frame["feature"].unique().tolist()):  # an arrow's own marker may be tiny
        line = {"color": common.IMPORTANCE[feature % len(common.IMPORTANCE)], "width": 3}
        name = f"feature {feature}, I = {0.9**feature:.2g}"
        entry = {"x": [None], "y": [None], "mode": "lines", "line": line, "name": name}
        figure.add_trace(go.Scatter(**entry, legendgroup=str(feature)), row=1, col=1)
    figure.update_layout(updatemenus=[selector(choices)], margin={"t": 60, "l": 12, "b": 12})
    return common.headed(figure, 540), frame


def fits(rows: pd.DataFrame, rank: str) -> pd.DataFrame:
    """The rows of one seed's model, chosen by its loss, turned upright."""
    losses = rows.groupby("seed")["loss"].first().sort_values()
    place = {RANKS[0]: 0, RANKS[1]: (len(losses) - 1) // 2, RANKS[2]: len(losses) - 1}[rank]
    chosen = rows[rows["seed"] == losses.index[place]].sort_values("feature")
    x, y = common.upright(common.weights(chosen)).T
    return chosen.drop(columns="w").assign(x=x, y=y, fit=rank)


def arrows(frame: pd.DataFrame, shown: np.ndarray) -> list[tuple[float, int, dict[str, Any]]]:
    """(density, feature, trace data) of every arrow, in the order of the panels."""
    out = []
    for p in shown:
        for row in frame[frame["density"] == p].itertuples():
            tip = 12 if row.norm > 0.25 else 5  # a head longer than its arrow would hide it
            data = {"x": [0, row.x], "y": [0, row.y], "meta": [row.feature, row.norm, row.bias]}
            out.append((p, int(row.feature), data | {"marker.size": [0, tip]}))
    return out


def basic(tables: dict[str, Any], options: dict[str, Any]) -> tuple[go.Figure, pd.DataFrame]:
    """WᵀW and b of each model above the norms of its features."""
    table = tables["superposition/basic"]
    table = table[table["seed"] == table["seed"].min()]
    dense = table["density"].max()
    models = [("linear", dense)] + [("relu", p) for p in np.sort(table["density"].unique())[::-1]]
    columns = options.get("columns", 4)
    rows = 2 * -(-len(models) // columns)
    names = ["linear" if arm == "linear" else f"1−S={p:g}" for arm, p in models]
    blank = [""] * columns
    titles = [t for i in range(0, len(names), columns) for t in names[i : i + columns] + blank]
    figure = make_subplots(
        rows=rows,
        cols=columns,
        row_heights=[0.62, 0.38] * (rows // 2),
        horizontal_spacing=0.02,
        vertical_spacing=0.05,
        subplot_titles=titles,
    )
    frames = []
    for i, (arm, p) in enumerate(models):
        model = table[(table["arm"] == arm) & (table["density"] == p)].sort_values("feature")
        panel = {"row": 2 * (i // columns) + 1, "col": i % columns + 1}
        figure.add_trace(matrix(model), **panel)
        figure.add_trace(bars(model), row=panel["row"] + 1, col=panel["col"])
        frames.append(model)
    finish_basic(figure, rows, columns, len(model))
    frame = pd.concat(frames, ignore_index=True)
    w = pd.DataFrame(np.stack(frame["w"].to_list()), index=frame.index).add_prefix("w")
    return figure, pd.concat([frame.drop(columns="w"), w], axis=1)


def matrix(model: pd.DataFrame) -> go.Heatmap:
    """WᵀW, a gap, and the bias as a last column."""
    W = common.weights(model)
    gram = np.column_stack([W @ W.T, np.full(len(W), np.nan), model["bias"]])
    n = len(W)
    return go.Heatmap(
        z=gram.round(3),
        x=[*range(n), n, n + 1],
        coloraxis="coloraxis",
        hoverongaps=False,
        hovertemplate="row %{y}, column %{x} (" + str(n + 1) + ": bias)<br>%{z:.2f}<extra></extra>",
    )


def bars(model: pd.DataFrame) -> go.Bar:
    """‖W_i‖, coloured by how much other features share its direction."""
    return go.Bar(
        x=model["feature"],
        y=model["norm"],
        customdata=np.column_stack([model["interference"], model["importance"]]),
        marker={"color": model["interference"], "coloraxis": "coloraxis2"},
        showlegend=False,
        hovertemplate="feature %{x}, importance %{customdata[1]:.2g}<br>‖W‖ %{y:.2f}, "
        "interference %{customdata[0]:.2f}<extra></extra>",
    )


def finish_basic(figure: go.Figure, rows: int, columns: int, n: int) -> None:
    """Axes, legend and colour bar; bars stand close under their matrix."""
    bare = {"showticklabels": False, "ticks": "", "showgrid": False, "zeroline": False}
    figure.update_xaxes(**bare, showline=False, range=[-0.7, n + 1.7])
    figure.update_yaxes(**bare, showline=False)
    block = 1 / (rows // 2)
    for row in range(1, rows + 1, 2):
        top = 1 - (row // 2) * block
        frame = {"showline": True, "linecolor": GRID, "mirror": True}
        figure.update_yaxes(
            autorange="reversed", domain=[top - 0.55 * block, top], row=row, **frame
        )
        figure.update_xaxes(row=row, **frame)
        figure.update_yaxes(
            range=[0, 1.25], domain=[top - 0.86 * block, top - 0.58 * block], row=row + 1
        )
        figure.update_xaxes(showline=True, row=row + 1)
        figure.update_yaxes(title="‖W‖", showticklabels=True, tickvals=[0, 1], row=row + 1, col=1)
        for annotation in figure.layout.annotations[(row // 2) * columns :][:columns]:
            annotation.y = top
    for name, colour in zip(common.STATES[1:], (common.OWN, common.SHARED), strict=True):
        figure.add_trace(common.legend_square(name, colour), row=rows, col=columns)
    bar = {"orientation": "h", "thickness": 10, "len": 0.7, "outlinewidth": 0, "x": 0.5}
    ends = [rgba(DIVERGING[0], 1), rgba(DIVERGING[1], 0.55), rgba(PALETTE[6], 0)]
    ends += [rgba(DIVERGING[3], 0.55), rgba(DIVERGING[4], 1)]  # clear at 0, for any ground
    figure.update_layout(
        margin={"t": 60, "b": 60, "l": 40},
        bargap=0.15,
        coloraxis={
            "colorscale": scale(ends),
            "cmin": -1.25,
            "cmax": 1.25,
            "colorbar": {**bar, "y": 0, "yanchor": "top", "title": {"text": "WᵀW and b"}},
        },
        coloraxis2={
            "colorscale": [[0, common.OWN], [1, common.SHARED]],
            "cmin": 0,
            "cmax": 1,
            "showscale": False,
        },
    )
    common.headed(figure, 780)
