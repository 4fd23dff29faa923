"""Figures of attribution patching: one function each, named as in paper.yaml; no torch.

They are drawn in the figures_*.py beside this file.
"""

from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from pipeline.job.source import import_file

HERE = Path(__file__).parent
Drawn = tuple[go.Figure, pd.DataFrame]


def estimates(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Every node by each estimate, against its exact effect."""
    return import_file(HERE / "figures_points.py").estimates(tables, options)


def edges(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Edges by EAP and EAP-IG, against their exact effect."""
    return import_file(HERE / "figures_points.py").edges(tables, options)


def saturation(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """What is left of a query's or key's effect in its estimate, by how even attention is."""
    return import_file(HERE / "figures_points.py").saturation(tables, options)


def search(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """What is found by patching exactly in the order of an estimate."""
    return import_file(HERE / "figures_lines.py").search(tables, options)


def kinds(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Correlation and false negatives by kind of node."""
    return import_file(HERE / "figures_lines.py").kinds(tables, options)


def layers(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Error of the estimates by layer."""
    return import_file(HERE / "figures_lines.py").layers(tables, options)


def cost(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Correlation against seconds."""
    return import_file(HERE / "figures_lines.py").cost(tables, options)
