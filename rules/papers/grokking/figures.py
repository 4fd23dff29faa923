"""Figures of Progress Measures for Grokking: one function each, named as in paper.yaml; no torch.

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


def grokking(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Accuracy and loss of every model, with weight decay and without."""
    return import_file(HERE / "figures_curves.py").grokking(tables, options)


def progress(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """The progress measures of one model at a time, its phases shaded."""
    return import_file(HERE / "figures_curves.py").progress(tables, options)


def spectrum(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Norm of each frequency in W_E, neurons and W_L, with a slider over training."""
    return import_file(HERE / "figures_waves.py").spectrum(tables, options)


def circle(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Numbers and sums on the circle of each key frequency, with a slider over training."""
    return import_file(HERE / "figures_waves.py").circle(tables, options)


def neurons(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """How much of each neuron one frequency explains, and which frequency."""
    return import_file(HERE / "figures_effects.py").neurons(tables, options)


def ablation(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Loss without each frequency, and under each ablation of Section 4.4."""
    return import_file(HERE / "figures_effects.py").ablation(tables, options)
