"""Figures of induction heads: one function each, named as in paper.yaml; no torch.

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


def icl(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """In-context learning score and loss of the three models through training."""
    return import_file(HERE / "figures_training.py").icl(tables, options)


def text(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """The same for the models of text, and their best prefix matching."""
    return import_file(HERE / "figures_training.py").text(tables, options)


def loss_by_index(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Loss by training tokens and token index."""
    return import_file(HERE / "figures_training.py").loss_by_index(tables, options)


def heads(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Prefix matching and previous-token attention of every head through training."""
    return import_file(HERE / "figures_heads.py").heads(tables, options)


def patterns(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Attention of the heads that matter on one repeated sequence."""
    return import_file(HERE / "figures_heads.py").patterns(tables, options)


def circuits(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Eigenvalues, their signs over all heads, and composition."""
    return import_file(HERE / "figures_circuits.py").circuits(tables, options)


def ablation(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """In-context learning that is left without heads."""
    return import_file(HERE / "figures_circuits.py").ablation(tables, options)
