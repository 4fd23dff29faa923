"""The board, square by square, as the probe of each layer reads it."""

import math
from typing import Any

import plotly.graph_objects as go

from pipeline.figures.parts import Drawn, chosen


def board(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Accuracy at each square, mean over seeds and plies; the reader chooses the layer."""
    frame = tables["world/squares"]
    frame = frame[frame["arm"] == "trained"]
    size = math.isqrt(int(frame["square"].max()) + 1)
    mean = frame.groupby(["layer", "square"], as_index=False)["accuracy"].mean()
    grids = {
        f"layer {layer}": rows.sort_values("square")["accuracy"].to_numpy().reshape(size, size)
        for layer, rows in mean.groupby("layer")
    }
    names, last = [*"ABCDEFGH"[:size]], list(grids)[-1]
    figure = go.Figure(go.Heatmap(
        z=grids[last], x=names, y=[str(i + 1) for i in range(size)], colorscale="Greens",
        zmin=min(g.min() for g in grids.values()), zmax=1, xgap=2, ygap=2, texttemplate="%{z:.2f}",
        hovertemplate="%{x}%{y}: %{z:.3f}<extra></extra>", colorbar={"title": "accuracy"},
    ))  # fmt: skip
    order = [last, *list(grids)[:-1]]
    chosen(figure, {name: [{"z": [grids[name]]}, {}] for name in order})
    figure.update_yaxes(autorange="reversed", scaleanchor="x", title="row")
    figure.update_xaxes(title="column", constrain="domain")
    figure.update_layout(height=430)
    return figure, mean
