"""The phase diagram: trained models beside the closed-form solutions."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pipeline.job.source import import_file
from pipeline.report.theme import GRID, rgba

common = import_file(Path(__file__).with_name("figures_common.py"))
STEPS = 11  # shades of each of norm and interference in the phase diagram
CELL = ["n_features", "n_hidden", "importance", "density"]
CELL_HOVER = "density %{customdata[0]}, importance %{customdata[1]}<br>"
TRAINED_HOVER = (
    CELL_HOVER + "‖W‖ %{customdata[2]}, interference %{customdata[3]}<br>kept models: "
    "%{customdata[4]} not represented, %{customdata[5]} dedicated, %{customdata[6]} in "
    "superposition<extra></extra>"
)
THEORY_HOVER = CELL_HOVER + "%{customdata[2]}<extra></extra>"


def phase(tables: dict[str, Any], options: dict[str, Any]) -> tuple[go.Figure, pd.DataFrame]:
    """The extra feature's fate against importance and density, trained and in theory."""
    table, theory = tables["superposition/phase"], tables["superposition/theory"]
    cells = cell_means(table).merge(theory[[*CELL, "solution", "state"]], on=CELL)
    models = table["seed"].nunique()
    views = {
        f"mean of {models - 1}": ("norm_kept", "shared_kept"),
        f"best of {models}": ("norm_best", "shared_best"),
        "theory": ("norm_theory", "shared_theory"),
    }
    cells["norm_theory"] = (cells["state"] > 0).astype(float)
    cells["shared_theory"] = (cells["state"] == 2).astype(float)
    cases = list(cells[["n_features", "n_hidden"]].drop_duplicates().itertuples(index=False))
    figure = make_subplots(
        rows=len(cases),
        cols=len(views),
        subplot_titles=[*views] * len(cases),
        horizontal_spacing=0.05,
        vertical_spacing=0.12,
        shared_yaxes=True,
    )
    for row, (n, m) in enumerate(cases, start=1):
        case = cells[(cells["n_features"] == n) & (cells["n_hidden"] == m)]
        for col, (norm, shared) in enumerate(views.values(), start=1):
            figure.add_trace(fate(case, norm, shared), row=row, col=col)
        figure.update_yaxes(title=f"importance of feature {n}<br>n = {n}, m = {m}", row=row, col=1)
    for name, colour in zip(common.STATES, (GRID, common.OWN, common.SHARED), strict=True):
        figure.add_trace(common.legend_square(name, colour))
    finish_phase(figure, len(cases), len(views), cells["density"].min())
    return figure, cells


def cell_means(table: pd.DataFrame) -> pd.DataFrame:
    """One row a cell: norm and interference (at most 1) of the kept models and of the best."""
    table = table.assign(shared=table["interference"].clip(0, 1))
    kept = table[table["loss"] < table.groupby(CELL)["loss"].transform("max")]
    counts = {f"kept_{i}": ("state", lambda s, i=i: int((s == i).sum())) for i in range(3)}
    means = kept.groupby(CELL).agg(
        norm_kept=("norm", "mean"), shared_kept=("shared", "mean"), **counts
    )
    best = table.loc[table.groupby(CELL)["loss"].idxmin()].set_index(CELL)
    means[["norm_best", "shared_best", "loss_best"]] = best[["norm", "shared", "loss"]]
    return means.reset_index()


def fate(case: pd.DataFrame, norm: str, shared: str) -> go.Heatmap:
    """A map whose shade says two things: opacity the norm, hue the interference."""
    top = STEPS - 1
    steps = [(case[c].clip(0, 1) * top).round().astype(int) for c in (norm, shared)]
    rows = case.assign(shade=steps[0] * STEPS + steps[1]).sort_values(
        ["importance", "density"], ascending=[True, False]
    )
    shape = (rows["importance"].nunique(), rows["density"].nunique())
    theory = norm == "norm_theory"
    told = ["solution"] if theory else [norm, shared, "kept_0", "kept_1", "kept_2"]
    numbers = rows[["density", "importance", norm, shared]].map(lambda v: float(f"{v:.2g}"))
    told = rows.assign(**numbers)[["density", "importance", *told]]
    return go.Heatmap(
        z=rows["shade"].to_numpy().reshape(shape),
        x=-np.log10(rows["density"].to_numpy()[: shape[1]]),
        y=np.log10(rows["importance"].to_numpy()[:: shape[1]]),
        customdata=told.to_numpy().reshape(*shape, -1),
        coloraxis="coloraxis",
        hovertemplate=THEORY_HOVER if theory else TRAINED_HOVER,
    )


def shades() -> list[list]:
    """A colour scale of STEPS² flat steps: from clear to opaque, and from OWN to SHARED."""
    stops = []
    for k in range(STEPS**2):
        norm, shared = (k // STEPS) / (STEPS - 1), (k % STEPS) / (STEPS - 1)
        colour = rgba(common.between([common.OWN, common.SHARED], shared), round(norm, 2))
        stops += [[k / STEPS**2, colour], [(k + 1) / STEPS**2, colour]]
    return stops


def finish_phase(figure: go.Figure, rows: int, columns: int, lowest: float) -> None:
    """Log ticks, and a grey ground where the extra feature is not represented."""
    whole = np.arange(0, -np.log10(lowest) + 0.01)
    bare = {"showgrid": False, "zeroline": False}
    figure.update_xaxes(
        tickvals=whole,
        ticktext=[f"{10**-v:g}" for v in whole],
        tickangle=0,
        tickfont_size=11,
        **bare,
    )
    figure.update_yaxes(tickvals=[-1, 0, 1], ticktext=["0.1", "1", "10"], **bare)
    figure.update_xaxes(title="density 1 − S", row=rows, col=(columns + 1) // 2)
    for panel in range(rows * columns):
        n = panel + 1 if panel else ""
        figure.add_shape(
            type="rect",
            layer="below",
            line_width=0,
            fillcolor=GRID,
            x0=0,
            x1=1,
            y0=0,
            y1=1,
            xref=f"x{n} domain",
            yref=f"y{n} domain",
        )
    figure.update_layout(
        margin={"t": 60},
        coloraxis={
            "colorscale": shades(),
            "cmin": -0.5,
            "cmax": STEPS**2 - 0.5,
            "showscale": False,
        },
    )
    common.headed(figure, 640)
