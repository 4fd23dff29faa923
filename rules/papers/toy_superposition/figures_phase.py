"""The phase diagram beside its closed-form solutions, and five features in the plane."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from pipeline.figures.parts import Drawn, Panels, first, heat, line, points
from pipeline.figures.theme import GRID, PALETTE, axis, rgba, scale

from .figures_models import IMPORTANCE, OWN, SHARED, STATES, plane, state, upright
from .measures import weights

STEPS = 11  # shades of each of norm and interference in the phase diagram
CELL = ["n_features", "n_hidden", "importance", "density"]
CELL_HOVER = "density %{customdata[0]}, importance %{customdata[1]}<br>"
TRAINED_HOVER = (
    CELL_HOVER + "‖W‖ %{customdata[2]}, interference %{customdata[3]}<br>kept models: "
    "%{customdata[4]} not represented, %{customdata[5]} dedicated, %{customdata[6]} in "
    "superposition"
)
THEORY_HOVER = CELL_HOVER + "%{customdata[2]}"
SHAPES = {5: "pentagon", 4: "two pairs"}  # by how many of the five features are represented
LOOKS = [
    ("pentagon", OWN, "pentagon"),
    ("two pairs", SHARED, "diamond"),
    ("other", PALETTE[6], "x"),
]


def phase(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """The extra feature's fate against importance and density, trained and in theory."""
    table, theory = tables["superposition/phase"], tables["superposition/theory"]
    cells = cell_means(table).merge(theory[[*CELL, "solution", "state"]], on=CELL)
    models = table["seed"].nunique()
    views = {f"mean of {models - 1}": "kept", f"best of {models}": "best", "theory": "theory"}
    cells["norm_theory"] = (cells["state"] > 0).astype(float)
    cells["shared_theory"] = (cells["state"] == 2).astype(float)
    cases = list(cells[["n_features", "n_hidden"]].drop_duplicates().itertuples(index=False))
    panels = Panels([*views] * len(cases), len(views), gap=(0.05, 0.12), shared_yaxes=True)
    for row, (n, m) in enumerate(cases):
        case = cells[(cells["n_features"] == n) & (cells["n_hidden"] == m)]
        for col, view in enumerate(views.values()):
            panels.add(row * len(views) + col, fate(case, view))
        title = f"importance of feature {n}<br>n = {n}, m = {m}"
        panels.figure.update_yaxes(title=title, row=row + 1, col=1)
    for name, colour in zip(STATES, (GRID, OWN, SHARED), strict=True):
        panels.add(0, state(name, colour))
    return finish_phase(panels, cells["density"].min()), cells


def cell_means(table: pd.DataFrame) -> pd.DataFrame:
    """One row per cell: norm and interference (at most 1) of the kept models and of the best."""
    table = table.assign(shared=table["interference"].clip(0, 1))
    kept = table[table["loss"] < table.groupby(CELL)["loss"].transform("max")]
    counts = {f"kept_{i}": ("state", lambda s, i=i: int((s == i).sum())) for i in range(3)}
    of = {"norm_kept": ("norm", "mean"), "shared_kept": ("shared", "mean"), **counts}
    means = kept.groupby(CELL).agg(**of)
    best = table.loc[table.groupby(CELL)["loss"].idxmin()].set_index(CELL)
    means[["norm_best", "shared_best", "loss_best"]] = best[["norm", "shared", "loss"]]
    return means.reset_index()


def fate(case: pd.DataFrame, view: str) -> go.Heatmap:
    """A map whose shade says two things: opacity the norm, hue the interference."""
    norm, shared, top, theory = f"norm_{view}", f"shared_{view}", STEPS - 1, view == "theory"
    steps = [(case[c].clip(0, 1) * top).round().astype(int) for c in (norm, shared)]
    rows = case.assign(shade=steps[0] * STEPS + steps[1]).sort_values(
        ["importance", "density"], ascending=[True, False]
    )
    shape = (rows["importance"].nunique(), rows["density"].nunique())
    columns = ["solution"] if theory else [norm, shared, "kept_0", "kept_1", "kept_2"]
    numbers = rows[["density", "importance", norm, shared]].map(lambda v: float(f"{v:.2g}"))
    hovered = rows.assign(**numbers)[["density", "importance", *columns]]
    return heat(
        rows["shade"].to_numpy().reshape(shape),
        x=-np.log10(rows["density"].to_numpy()[: shape[1]]),
        y=np.log10(rows["importance"].to_numpy()[:: shape[1]]),
        customdata=hovered.to_numpy().reshape(*shape, -1), coloraxis="coloraxis", xgap=None,
        ygap=None, hover=THEORY_HOVER if theory else TRAINED_HOVER,
    )  # fmt: skip


def shades() -> list[list]:
    """A colour scale of STEPS² flat steps: from clear to opaque, and from OWN to SHARED."""
    stops = []
    for k in range(STEPS**2):
        norm, shared = (k // STEPS) / (STEPS - 1), (k % STEPS) / (STEPS - 1)
        colour = rgba(between([OWN, SHARED], shared), round(norm, 2))
        stops += [[k / STEPS**2, colour], [(k + 1) / STEPS**2, colour]]
    return stops


def between(colours: list[str], share: float) -> str:
    """The colour at `share` (0 to 1) of a ramp of hex colours."""
    channels = [[int(c[i : i + 2], 16) for c in colours] for i in (1, 3, 5)]
    places = np.linspace(0, 1, len(colours))
    return "#" + "".join(f"{round(np.interp(share, places, c)):02x}" for c in channels)


def finish_phase(panels: Panels, lowest: float) -> go.Figure:
    """Log ticks, and a grey ground where the extra feature is not represented."""
    figure, bare = panels.figure, {"showgrid": False, "zeroline": False}
    whole = np.arange(0, -np.log10(lowest) + 0.01)
    ticks = {"tickvals": whole, "ticktext": [f"{10**-v:g}" for v in whole], "tickfont_size": 11}
    figure.update_xaxes(**ticks, tickangle=0, **bare)
    figure.update_yaxes(tickvals=[-1, 0, 1], ticktext=["0.1", "1", "10"], **bare)
    middle = {"row": panels.rows, "col": (panels.columns + 1) // 2}
    figure.update_xaxes(title="density 1 − S", **middle)
    ground = {"type": "rect", "layer": "below", "line_width": 0, "fillcolor": GRID}
    for n in ["", *range(2, panels.rows * panels.columns + 1)]:
        place = {"xref": f"x{n} domain", "yref": f"y{n} domain"}
        figure.add_shape(**ground, x0=0, x1=1, y0=0, y1=1, **place)
    colours = {"colorscale": shades(), "cmin": -0.5, "cmax": STEPS**2 - 0.5, "showscale": False}
    return panels.finish(640, top=60, coloraxis=colours)


def pentagon(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """The best fit for each density of the first feature, and the loss of every fit."""
    table = first(tables["superposition/pentagon"])
    titles = ["fit of lowest loss for each density", "every fit"]
    panels = Panels(titles, 1, gap=(0, 0.2), row_heights=[0.58, 0.42])
    plane(panels, 0, 1.4)
    frames = []
    for _, rows in table.groupby("first"):
        best = rows[rows["loss"] == rows["loss"].min()].sort_values("feature")
        x, y = upright(weights(best)).T
        frames.append(best.drop(columns="w").assign(x=x, y=y))
    frame = pd.concat(frames, ignore_index=True)
    reach = np.log10([table["first"].min(), table["first"].max()])
    for best in frames:
        share = (np.log10(best["first"].iloc[0]) - reach[0]) / max(reach[1] - reach[0], 1e-9)
        panels.add(0, outline(best, between(IMPORTANCE[::-1], share)))
    models = table.groupby(["first", "fit"], as_index=False).agg(
        loss=("loss", "first"), kind=("norm", lambda s: SHAPES.get(int((s > 0.5).sum()), "other"))
    )
    for name, colour, symbol in LOOKS:
        rows = models[models["kind"] == name]
        look = {"size": 9, "hover": name + "<br>density %{x}, loss %{y:.3g}"}
        marks = points(rows["first"], rows["loss"], name, rgba(colour, 0.7), **look)
        panels.add(1, marks.update(marker_symbol=symbol))
    return finish_pentagon(panels, reach), frame


def finish_pentagon(panels: Panels, reach: np.ndarray) -> go.Figure:
    """Log axes, and a colour bar for the densities of the first panel."""
    round_ones = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
    ticks = [p for p in round_ones if reach[0] - 0.1 <= np.log10(p) <= reach[1] + 0.1]
    shown = [10 ** reach[0], 0.01, 0.05, 10 ** reach[1]]
    x = axis("density of the first feature", log=True, tickvals=ticks)
    x |= {"dtick": None, "ticktext": [f"{p:g}" for p in ticks]}
    panels.figure.update_xaxes(**x, row=2, col=1)
    panels.figure.update_yaxes(**axis("loss", log=True, tickformat="~g"), row=2, col=1)
    bar = {
        "orientation": "h", "thickness": 10, "outlinewidth": 0, "len": 0.9, "x": 0.5, "y": 0.405,
        "yanchor": "bottom", "tickvals": np.log10(shown), "tickangle": 0,
        "ticktext": [f"{p:.2g}" for p in shown],
        "title": {"text": "density of the first feature (large dot)", "side": "top"},
    }  # fmt: skip
    ends = {"cmin": reach[0], "cmax": reach[1], "colorbar": bar}
    return panels.finish(860, top=60, coloraxis={"colorscale": scale(IMPORTANCE[::-1]), **ends})


def outline(best: pd.DataFrame, colour: str) -> go.Scatter:
    """The five features of one model; those that are represented are joined around the circle."""
    long = best[best["norm"] > 0.5]
    around = long.iloc[np.argsort(np.arctan2(long["y"], long["x"]))]
    around = pd.concat([around, around.iloc[:1]])
    gap = around.iloc[:1].assign(x=np.nan)
    dots = pd.concat([around, gap, best[best["norm"] <= 0.5]])
    size = np.where(dots["feature"] == 0, 11, 7)
    look = {"color": np.log10(dots["first"]), "coloraxis": "coloraxis", "size": size, "opacity": 1}
    hover = "density of the first feature %{customdata[0]:g}<br>feature %{customdata[1]}, "
    return line(
        dots["x"], dots["y"], colour=rgba(colour, 0.45), width=1, marker=look,
        customdata=dots[["first", "feature", "norm", "dimensionality"]],
        hover=hover + "‖W‖ %{customdata[2]:.2f}, D %{customdata[3]:.3f}",
    )  # fmt: skip
