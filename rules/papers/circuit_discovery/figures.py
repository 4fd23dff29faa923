"""Figures of circuit discovery: one function each, named as in paper.yaml; no torch.

They are drawn in the figures_*.py beside this file.
"""

from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from pipeline.job.source import import_file

HERE = Path(__file__).parent
Drawn = tuple[go.Figure, pd.DataFrame]


def graph(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """The circuit that ACDC finds, over the known one."""
    return import_file(HERE / "figures_graph.py").graph(tables, options)


def roc(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """ROC curves of edges."""
    return import_file(HERE / "figures_scores.py").roc(tables, options)


def areas(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Areas under them."""
    return import_file(HERE / "figures_scores.py").areas(tables, options)


def scores(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """The score of every edge."""
    return import_file(HERE / "figures_scores.py").scores(tables, options)


def distance(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """What circuits of each size still do."""
    return import_file(HERE / "figures_scores.py").distance(tables, options)
