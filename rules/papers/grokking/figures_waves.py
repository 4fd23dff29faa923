"""Fourier spectra and circles, each with a slider over training."""

from typing import Any

import numpy as np
import pandas as pd
from plotly.colors import cyclical

from pipeline.figures.parts import Drawn, Panels, bars, key, nothing, plane, points, rounded
from pipeline.figures.theme import GRID, PALETTE, axis, rgba, scale, slider
from pipeline.store.tables import where

FREQUENCIES = {"key frequency": PALETTE[1], "other frequency": PALETTE[0]}
PARTS = {"W_E": "embedding W_E", "neurons": "neurons", "W_L": "neurons to logits W_L"}
ROWS = {"number": "embedding of n", "sum": "MLP(a, b)"}
MOST = 4  # circles side by side


def seeds(table: pd.DataFrame, arm: str = "decay") -> list[int]:
    """The seeds of an arm, ascending."""
    return sorted(table.loc[table["arm"] == arm, "seed"].unique())


def of_frequency(is_key: pd.Series, alpha: float = 1) -> list[str]:
    """The colour of each frequency."""
    marked, other = FREQUENCIES.values()
    return np.where(is_key, marked, rgba(other, alpha) if alpha < 1 else other).tolist()


def spectrum(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Norm of each frequency in W_E, neurons and W_L of the first model."""
    table, frequencies = tables["fourier/spectrum"], tables["fourier/frequencies"]
    first = {"arm": "decay", "seed": seeds(table)[0]}
    table = where(table, **first).sort_values("frequency", kind="stable")  # on every CPU
    known = where(frequencies, **first, key=True)["frequency"]
    steps = sorted(table["step"].unique())
    panels = Panels(list(PARTS.values()), 1, gap=(0, 0.07), shared_xaxes=True)
    for i, part in enumerate(PARTS):
        rows = where(table, part=part)
        last = where(rows, step=steps[-1])
        colours = of_frequency(last["frequency"].isin(known), 0.75)
        look = {"colour": colours, "hover": "k = %{x}: %{y:.3g}"}
        panels.add(i, bars(last["frequency"], rounded(last["norm"]), **look))
        name = "root mean square" if part == "neurons" else "norm"
        top = 1.06 * float(rows["norm"].max())
        panels.figure.update_yaxes(**axis(name, range=[0, top]), **panels.place(i))
    panels.add(0, *(key(name, colour) for name, colour in FREQUENCIES.items()))
    shown = {}
    for step in steps:
        y = [rounded(where(table, step=step, part=part)["norm"]) for part in PARTS]
        shown[f"{step:,}"] = [{"y": [*y, [None], [None]]}, {}]
    panels.axes("frequency k (turns of the circle over all numbers)")
    sliders = [slider(shown, "step ", active=len(steps) - 1)]
    figure = panels.finish(560, legend=32, top=64, sliders=sliders, bargap=0.15)
    return figure, table[["seed", "step", "part", "frequency", "norm"]]


def circle(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Numbers (above) and sums (below) on the plane of each key frequency of the first model."""
    table = tables["fourier/circle"]
    steps, known = sorted(table["step"].unique()), strongest(tables["fourier/frequencies"], table)
    if not known:
        return nothing("no key frequency"), table
    p = int(table["value"].max()) + 1
    titles = [f"k = {k}" for k in known] + [""] * len(known)
    panels = Panels(titles, len(known), gap=(0.03, 0.05))
    table = table[table["frequency"].isin(known)]
    shown = [(part, k) for part in ROWS for k in known]
    at = {(step, part, k): where(table, step=step, part=part, frequency=k).sort_values("value")
          for step in steps for part, k in shown}  # fmt: skip
    for i, (part, k) in enumerate(shown):
        panels.add(i, dots(at[steps[-1], part, k], k, p))
        reach = 1.08 * float(where(table, part=part)[["x", "y"]].abs().max().max())
        plane(panels.figure, **panels.place(i), reach=reach)
    panels.figure.update_xaxes(zerolinecolor=GRID)
    for row, name in enumerate(ROWS.values(), start=1):
        panels.figure.update_yaxes(zerolinecolor=GRID, title={"text": name}, row=row, col=1)
    frames = {}
    for step in steps:
        moved = {c: [rounded(at[step, part, k][c]) for part, k in shown] for c in "xy"}
        frames[f"{step:,}"] = [moved, {}]
    bar = {
        "orientation": "h", "y": -0.02, "yanchor": "top", "len": 0.6, "thickness": 10,
        "tickvals": [0, p / 4, p / 2, 3 * p / 4, p],
        "ticktext": ["0°", "90°", "180°", "270°", "360°"],
        "title": {"text": "angle 2πkn/p that n should have", "side": "top"},
    }  # fmt: skip
    colours = {"colorscale": scale(cyclical.Phase), "cmin": 0, "cmax": p, "colorbar": bar}
    sliders = [slider(frames, "step ", active=len(steps) - 1)]
    figure = panels.finish(520, top=56, sliders=sliders, coloraxis=colours)
    return figure.update_layout(margin={"b": 64, "r": 8}), table


def strongest(frequencies: pd.DataFrame, table: pd.DataFrame) -> list[int]:
    """At most MOST key frequencies of the model in `table`, those of largest effect, ascending."""
    if not len(table):
        return []
    first = {name: table[name].iloc[0] for name in ("arm", "seed")}
    rows = where(frequencies, **first, key=True).sort_values("without_test", ascending=False)
    return sorted(rows["frequency"].head(MOST))


def dots(rows: pd.DataFrame, k: int, p: int) -> Any:
    """The points of one panel, coloured by the angle that they should have."""
    what = "n" if rows["part"].iloc[0] == "number" else "a + b"
    return points(
        rounded(rows["x"]), rounded(rows["y"]), colour=((k * rows["value"]) % p).tolist(),
        marker={"coloraxis": "coloraxis", "opacity": 0.9}, customdata=rows["value"].tolist(),
        hover=f"{what} = %{{customdata}}<br>along cos %{{x:.2g}}, sin %{{y:.2g}}",
    )  # fmt: skip
