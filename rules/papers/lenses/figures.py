"""Figures of the lenses: one function each, named as in paper.yaml; no torch.

Each takes the paper's tables and the figure's options, and returns a plotly figure and the numbers
that it plots. They are drawn in the figures_*.py beside this file.
"""

from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from pipeline.job.source import import_file

HERE = Path(__file__).parent
Drawn = tuple[go.Figure, pd.DataFrame]


def first(tables: dict[str, Any]) -> dict[str, Any]:
    """The rows of the first seed; metrics have the others."""
    return {name: t[t["seed"] == t["seed"].min()] for name, t in tables.items()}


def trajectories(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """The likeliest token at every layer and position of a text, tuned lens above logit lens."""
    return import_file(HERE / "figures_texts.py").trajectories(first(tables), options)


def attribution(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """What every attention and MLP adds to the likeliest token's logit."""
    return import_file(HERE / "figures_texts.py").attribution(first(tables), options)


def layers(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Both lenses by layer, a panel a model."""
    return import_file(HERE / "figures_layers.py").layers(first(tables), options)


def bias(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Bias of both lenses by layer."""
    return import_file(HERE / "figures_layers.py").bias(first(tables), options)


def transfer(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """The penalty of every translator on every layer's stream."""
    return import_file(HERE / "figures_layers.py").transfer(first(tables), options)


def basis(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Influence of each direction on the tuned lens and on the model."""
    return import_file(HERE / "figures_layers.py").basis(first(tables), options)
