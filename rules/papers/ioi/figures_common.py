"""What the figures share: the classes of heads, their colours, and heat maps of layer × head."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from pipeline.report.theme import DIVERGING, PALETTE, scale

# In the order in which the model computes them.
ROLES = {
    "previous": ("previous token", PALETTE[6]),
    "duplicate": ("duplicate token", PALETTE[5]),
    "induction": ("induction", PALETTE[2]),
    "s_inhibition": ("S-inhibition", PALETTE[4]),
    "name_mover": ("name mover", PALETTE[0]),
    "suppressor": ("S-suppressor", "#004a7f"),
    "writer": ("writer", "#7d7c78"),
    "backup": ("backup name mover", PALETTE[3]),
    "negative": ("negative name mover", PALETTE[1]),
}
ARMS = {"smollm2": "SmolLM2-135M", "gpt2": "GPT-2 small"}


def arms_of(frame: pd.DataFrame) -> list[tuple[str, str]]:
    """(arm, its name) of the arms in a table."""
    there = list(dict.fromkeys(frame["arm"]))
    return [(a, ARMS.get(a, a)) for a in sorted(there, key=lambda a: a != "smollm2")]


def first(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of the first seed."""
    return frame[frame["seed"] == frame["seed"].min()]


def over_seeds(frame: pd.DataFrame, keys: list[str], columns: list[str]) -> pd.DataFrame:
    """Means of some columns over seeds, in the order of the rows."""
    return frame.groupby(keys, sort=False, as_index=False, dropna=False)[columns].mean()


def grid(rows: pd.DataFrame, column: str) -> np.ndarray:
    """[n_layers n_heads] of a column."""
    return rows.pivot(index="layer", columns="head", values=column).to_numpy(float)


def heat(values: np.ndarray, what: str, bar: dict | None = None) -> go.Heatmap:
    """Heads of a model, layers downwards, 0 in the middle of the colours."""
    most = float(np.nanmax(np.abs(values))) or 1.0
    ends = float(f"{0.8 * most:.1g}")
    if bar is not None:
        bar = bar | {"tickvals": [-ends, 0, ends]}
    return go.Heatmap(
        z=values,
        zmin=-most,
        zmax=most,
        colorscale=scale(DIVERGING),
        showscale=bar is not None,
        colorbar=bar or {},
        xgap=1,
        ygap=1,
        hovertemplate=f"head %{{y}}.%{{x}}<br>{what} %{{z:.3~g}}<extra></extra>",
    )


def headed(figure: go.Figure, height: int) -> go.Figure:
    """The height, and small panel titles."""
    figure.update_annotations(font_size=12)
    figure.update_layout(height=height, margin={"t": 56})
    return figure


def plain_axes(figure: go.Figure, **more: Any) -> None:
    """Heat maps have no grid."""
    figure.update_xaxes(showgrid=False, zeroline=False, **more)
    figure.update_yaxes(showgrid=False, zeroline=False)
