"""What the figures share: colours, the plane, and the unit of a panel.

Blue is a dimension of one's own, vermillion superposition, grey not represented.
"""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from pipeline.report.theme import GRID, INK, PALETTE

OWN, SHARED = PALETTE[0], PALETTE[1]
# From the most to the least important feature; readable on light and on dark ground.
IMPORTANCE = ["#E0A000", "#DD6A3A", "#C2528B", "#8A63C7", "#3B82C4"]
STATES = ["not represented", "a dimension of its own", "in superposition"]


def weights(rows: pd.DataFrame) -> np.ndarray:
    """W [n, m] of one model's rows."""
    return np.stack(rows.sort_values("feature")["w"].to_list()).astype(float)


def upright(W: np.ndarray) -> np.ndarray:
    """W [n, 2] turned so that the first long feature points up, the next one to the right."""
    norm = np.linalg.norm(W, axis=1)
    first = int(np.flatnonzero(norm > 0.5)[0]) if (norm > 0.5).any() else int(norm.argmax())
    c, s = W[first] / max(norm[first], 1e-12)
    W = W @ np.array([[s, c], [-c, s]])
    aside = np.flatnonzero((norm > 0.5) & (np.abs(W[:, 0]) > 0.1))
    if len(aside) and W[aside[0], 0] < 0:
        W = W * [-1, 1]
    return W


def plane(figure: go.Figure, row: int, col: int, reach: float) -> None:
    """A square panel without ticks: axes through the origin and the unit circle."""
    bare = {"showline": False, "showticklabels": False, "ticks": "", "showgrid": False}
    bare |= {"zeroline": True, "zerolinewidth": 1, "range": [-reach, reach], "constrain": "domain"}
    figure.update_xaxes(**bare, row=row, col=col)
    figure.update_yaxes(**bare, row=row, col=col)
    x = figure.get_subplot(row, col).xaxis.plotly_name.removeprefix("xaxis")
    figure.update_yaxes(scaleanchor=f"x{x}", constraintoward="top", row=row, col=col)
    circle = {"type": "circle", "x0": -1, "x1": 1, "y0": -1, "y1": 1}
    figure.add_shape(**circle, line={"color": GRID, "width": 1}, layer="below", row=row, col=col)


def headed(figure: go.Figure, height: int) -> go.Figure:
    """The height, small panel titles, and a legend above them."""
    figure.update_annotations(font_size=11)
    figure.update_layout(height=height, legend={"y": 1 + 26 / (height - 120), "x": 0})
    return figure


def legend_square(name: str, colour: str) -> go.Scatter:
    """An entry of the legend without points."""
    marker = {"symbol": "square", "size": 11, "color": colour, "line": {"color": INK, "width": 0.5}}
    return go.Scatter(x=[None], y=[None], mode="markers", name=name, marker=marker)


def between(colours: list[str], share: float) -> str:
    """The colour at `share` (0 to 1) of a ramp of hex colours."""
    place = share * (len(colours) - 1)
    low = min(int(place), len(colours) - 2)
    pair = [np.array([int(c[i : i + 2], 16) for i in (1, 3, 5)]) for c in colours[low : low + 2]]
    mixed = pair[0] + (place - low) * (pair[1] - pair[0])
    return "#" + "".join(f"{round(v):02x}" for v in mixed)
