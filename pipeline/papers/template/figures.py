"""Figures of this paper: one function each, named as in paper.yaml."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from scipy.special import gammaln


def expected(d_model: np.ndarray) -> np.ndarray:
    """E|cos| of two random directions of R^d: Γ(d/2) / (√π Γ((d+1)/2))."""
    d = np.asarray(d_model, float)
    return np.exp(gammaln(d / 2) - gammaln((d + 1) / 2)) / np.sqrt(np.pi)


def cosines(tables: dict[str, Any], options: dict[str, Any]) -> tuple[go.Figure, pd.DataFrame]:
    """The figure, and the numbers that it shows."""
    frame = tables["measure/cosines"].assign(expected=lambda t: expected(t["d_model"]))
    curve = frame.drop_duplicates("d_model").sort_values("d_model")
    figure = go.Figure(
        [
            go.Scatter(x=curve["d_model"], y=curve["expected"], mode="lines", name="exact"),
            go.Scatter(x=frame["d_model"], y=frame["cosine"], mode="markers", name="ours"),
        ]
    )
    figure.update_xaxes(title="dimensions", type="log")
    figure.update_yaxes(title="mean |cosine|", type="log")
    return figure, frame
