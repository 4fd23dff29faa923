"""What the figures of this paper share: colours of what is measured, rows of a model, thinning."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from pipeline.report.theme import PALETTE

TRAIN, TEST, RESTRICTED, EXCLUDED = PALETTE[0], PALETTE[1], PALETTE[2], PALETTE[3]
KEY, OTHER = PALETTE[1], PALETTE[0]  # frequencies
PHASES = (("memorisation", PALETTE[6]), ("circuit formation", PALETTE[5]), ("cleanup", PALETTE[4]))
ARMS = {"decay": "with weight decay", "no_decay": "without weight decay"}


def seeds(table: pd.DataFrame, arm: str = "decay") -> list[int]:
    """The seeds of an arm, ascending."""
    return sorted(table.loc[table["arm"] == arm, "seed"].unique())


def model(table: pd.DataFrame, arm: str, seed: int) -> pd.DataFrame:
    """The rows of one model."""
    return table[(table["arm"] == arm) & (table["seed"] == seed)]


def thin(rows: pd.DataFrame, most: int = 240) -> pd.DataFrame:
    """At most about `most` rows, evenly spaced, the ends included."""
    at = np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int)
    return rows.iloc[np.unique(at)]


def key_of(frequencies: pd.DataFrame, arm: str, seed: int) -> list[int]:
    """Key frequencies of a model, ascending."""
    rows = model(frequencies, arm, seed)
    return rows.loc[rows["key"], "frequency"].tolist()


def legend_square(name: str, colour: str) -> go.Bar:
    """An entry of the legend without bars."""
    return go.Bar(x=[None], y=[None], name=name, marker_color=colour)


def decades(values: Any) -> dict[str, Any]:
    """A log axis about all values: ticks at 1, 2 and 5 where they span less than three decades,
    else at every decade, or every second."""
    values = np.log10(np.asarray(values, dtype=float))
    low, high = float(values.min()), float(values.max())
    span = high - low
    dtick = "D2" if span < 3 else 1 if span < 6 else 2
    margin = 0.06 * span + 0.02
    about = {"type": "log", "range": [low - margin, high + margin]}
    return about | {"dtick": dtick, "exponentformat": "power"}


def numbers(values: Any, digits: int = 3) -> list[float]:
    """Plain floats with so many significant digits: slider frames fill most of a page."""
    return [float(f"{v:.{digits}g}") for v in np.asarray(values, dtype=float)]
