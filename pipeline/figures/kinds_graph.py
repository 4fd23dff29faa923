"""A graph that a reader walks: nodes and signed links between them; no torch.

templates/walk.js shows, at a click, what a node reads and what reads it.
"""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from pipeline.figures.theme import GRID, INK, PAGE, PALETTE, literal, rgba

UP, DOWN = PALETTE[0], PALETTE[1]  # links of positive and of negative weight
WIDTHS = (0.7, 1.6, 3.2)  # of the weakest, middle and strongest third of the range of |weight|


def walkable(nodes: pd.DataFrame, links: pd.DataFrame, start: str, unit: str) -> go.Figure:
    """The graph, with `start` shown at first.

    Args:
        nodes: name, x, y, colour, symbol, size (pixels), and about: lines of text of each.
        links: source and target (names), weight.
        unit: of the weights.
    """
    place = {name: i for i, name in enumerate(nodes["name"])}
    joined = [
        [place[s], place[t], float(w)]
        for s, t, w in zip(links["source"], links["target"], links["weight"], strict=True)
    ]
    figure = go.Figure(drawn(nodes, joined))
    n_lines = len(figure.data)
    for shade in (UP, DOWN):  # those of the chosen node, filled by walk.js
        line = {"color": shade, "width": 2.4}
        figure.add_scatter(x=[], y=[], mode="lines", line=line, hoverinfo="skip", showlegend=False)
    figure.add_trace(markers(nodes))
    about = [[str(line) for line in lines] for lines in nodes["about"]]
    walk = {
        "nodes": n_lines + 2,
        "lines": list(range(n_lines)),
        "up": n_lines,
        "down": n_lines + 1,
        "labels": [str(name) for name in nodes["name"]],
        "about": about,
        "links": joined,
        "start": place[start],
        "unit": unit,
    }
    figure.update_layout(meta={"walk": walk, "min_width": 640}, showlegend=False)
    return figure


def drawn(nodes: pd.DataFrame, links: list[list]) -> list[go.Scatter]:
    """All links, a trace a sign and width."""
    if not links:
        return []
    x, y = nodes["x"].to_numpy(float), nodes["y"].to_numpy(float)
    weights = np.array([w for *_, w in links])
    most = np.abs(weights).max() or 1.0
    third = np.minimum((3 * np.abs(weights) / most).astype(int), 2)
    out = []
    for sign, shade in ((True, UP), (False, DOWN)):
        for size, width in enumerate(WIDTHS):
            some = np.flatnonzero(((weights > 0) == sign) & (third == size))
            ends = [links[i][:2] for i in some]
            if not ends:
                continue
            gap = lambda v, ends=ends: [p for s, t in ends for p in (v[s], v[t], None)]  # noqa: E731
            line = {"color": rgba(shade, 0.25 + 0.15 * size), "width": width}
            out.append(
                go.Scatter(
                    x=gap(x), y=gap(y), mode="lines", line=line, hoverinfo="skip", showlegend=False
                )
            )
    return out


def markers(nodes: pd.DataFrame) -> go.Scatter:
    """All nodes, with what is known of each in its hover box."""
    told: list[Any] = [
        "<br>".join([f"<b>{literal(name)}</b>", *(literal(line) for line in lines if line)])
        for name, lines in zip(nodes["name"], nodes["about"], strict=True)
    ]
    return go.Scatter(
        x=nodes["x"],
        y=nodes["y"],
        mode="markers",
        marker={
            "color": list(nodes["colour"]),
            "symbol": list(nodes["symbol"]),
            "size": nodes["size"],
            "line": {"color": PAGE, "width": 1},
        },
        customdata=told,
        hovertemplate="%{customdata}<extra></extra>",
        showlegend=False,
    )


def legend(figure: go.Figure, entries: list[tuple[str, str, str]]) -> None:
    """Entries that stand for colours and symbols of nodes: (text, colour, symbol)."""
    for text, shade, symbol in entries:
        marker = {"color": shade, "symbol": symbol, "size": 10}
        figure.add_scatter(x=[None], y=[None], mode="markers", marker=marker, name=text,
                           showlegend=True, hoverinfo="skip")  # fmt: skip
    figure.update_layout(showlegend=True)


def ruled(figure: go.Figure, rows: list[str], columns: list[str]) -> None:
    """Rows and columns of a graph laid out on a grid, with their names."""
    figure.update_yaxes(
        tickvals=list(range(len(rows))), ticktext=rows, showgrid=True, gridcolor=GRID,
        zeroline=False, range=[-0.6, len(rows) - 0.4],
    )  # fmt: skip
    figure.update_xaxes(
        tickvals=list(range(len(columns))), ticktext=columns, showgrid=False, zeroline=False,
        range=[-0.6, len(columns) - 0.4], tickfont={"color": INK},
    )  # fmt: skip
