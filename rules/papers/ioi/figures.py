"""Figures of indirect object identification: one function each, named as in paper.yaml; no torch.

They are drawn in the figures_*.py beside this file.
"""

from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from pipeline.job.source import import_file

HERE = Path(__file__).parent
Drawn = tuple[go.Figure, pd.DataFrame]


def attribution(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Heat maps of every head by three methods."""
    return import_file(HERE / "figures_heads.py").attribution(tables, options)


def paths(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Heat maps of the steps of path patching."""
    return import_file(HERE / "figures_heads.py").paths(tables, options)


def streams(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Patching of the stream by layer and position."""
    return import_file(HERE / "figures_heads.py").streams(tables, options)


def movers(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Attention of the name movers against what they write."""
    return import_file(HERE / "figures_circuit.py").movers(tables, options)


def graph(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """The circuit as a graph."""
    return import_file(HERE / "figures_circuit.py").graph(tables, options)


def judged(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Faithfulness and completeness."""
    return import_file(HERE / "figures_circuit.py").judged(tables, options)


def minimality(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """What each head of the circuit is worth."""
    return import_file(HERE / "figures_circuit.py").minimality(tables, options)


def estimates(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Cheap estimates against exact patching."""
    return import_file(HERE / "figures_circuit.py").estimates(tables, options)
