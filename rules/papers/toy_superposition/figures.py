"""Figures of Toy Models of Superposition: one function each, named as in paper.yaml; no torch.

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


def intro(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Five features in two dimensions as arrows, from dense to sparse."""
    return import_file(HERE / "figures_models.py").intro(tables, options)


def basic(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """WᵀW and b of each model above the norms of its features."""
    return import_file(HERE / "figures_models.py").basic(tables, options)


def phase(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """The extra feature's fate against importance and density, trained and in theory."""
    return import_file(HERE / "figures_phase.py").phase(tables, options)


def dimensions(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """D* against 1 / (1 − S): mean over seeds, and each seed."""
    return import_file(HERE / "figures_geometry.py").dimensions(tables, options)


def geometry(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Each feature's dimensionality against 1 / (1 − S), with the fractions of the polytopes."""
    return import_file(HERE / "figures_geometry.py").geometry(tables, options)


def pentagon(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """The best fit for each density of the first feature, and the loss of every fit."""
    return import_file(HERE / "figures_pentagon.py").pentagon(tables, options)
