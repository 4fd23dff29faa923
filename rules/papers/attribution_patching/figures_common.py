"""What the figures share: names and colours of methods and kinds, and the list of tasks."""

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from pipeline.theme import INK, PALETTE, selector

METHODS = {
    "attribution_patching": ("attribution patching", PALETTE[1]),
    "attribution_ig": ("integrated gradients", PALETTE[0]),
    "qk_fix": ("with QK fix", PALETTE[3]),
    "atp_star": ("AtP*", PALETTE[2]),
    "eap": ("EAP, edges", PALETTE[1]),
    "eap_ig": ("EAP-IG, edges", PALETTE[0]),
    "activation_patching": ("exact", PALETTE[6]),
}
KINDS = {
    "head": ("heads", PALETTE[0]),
    "mlp": ("MLPs", PALETTE[2]),
    "q": ("queries", PALETTE[1]),
    "k": ("keys", PALETTE[4]),
    "v": ("values", PALETTE[5]),
    "resid": ("stream", PALETTE[6]),
}
TASKS = {"ioi": "indirect object", "greater_than": "greater than", "lookup": "lookup"}
ARMS = {
    "smollm2": "SmolLM2",
    "random": "SmolLM2, as training begins",
    "small": "model trained here",
    "small_random": "the same, before training",
}


def cases(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """(name, rows) of every task on every model, trained models first."""
    groups = frame.groupby(["task", "arm"], sort=False)
    key = lambda g: (g[0][1].endswith("random"), list(TASKS).index(g[0][0]))  # noqa: E731
    named = lambda task, arm: f"{TASKS[task]}, {ARMS.get(arm, arm)}"  # noqa: E731
    return [(named(*k), rows) for k, rows in sorted(groups, key=key)]


def first(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of the first seed."""
    return frame[frame["seed"] == frame["seed"].min()]


def chosen(figure: go.Figure, shown: list[int], names: list[str]) -> go.Figure:
    """A list of the cases above the figure, of which the first is shown.

    Args:
        shown: a case a trace; -1 is always there.
    """
    for trace, number in zip(figure.data, shown, strict=True):
        trace.visible = number in (0, -1)
    if len(names) > 1:
        choices = {
            name: [{"visible": [n in (i, -1) for n in shown]}, {}] for i, name in enumerate(names)
        }
        figure.update_layout(updatemenus=[selector(choices)])
    return figure


def equal(rows: pd.DataFrame, x: str, y: str) -> go.Scatter:
    """The dotted line on which an estimate is right."""
    ends = [float(rows[[x, y]].min().min()), float(rows[[x, y]].max().max())]
    line: dict[str, Any] = {"color": INK, "dash": "dot", "width": 1}
    return go.Scatter(x=ends, y=ends, mode="lines", line=line, hoverinfo="skip", showlegend=False)


def titled(figure: go.Figure, height: int) -> go.Figure:
    """The height, and small panel titles."""
    figure.update_annotations(font_size=12)
    figure.update_layout(height=height, margin={"t": 72}, legend={"y": 1 + 36 / height})
    return figure
