"""Figures of circuit tracing: how much runs through features, what is left out, what is right."""

from typing import Any

import pandas as pd

from pipeline.figures.parts import Drawn, Panels, bars, chosen, line, mean_of, whiskers
from pipeline.figures.theme import PALETTE

from .metrics import by_dictionary, named

NAMES = {
    "clt": ("cross-layer", PALETTE[0]),
    "plt": ("of each layer", PALETTE[1]),
    "skip": ("of each layer, with skip", PALETTE[2]),
    "clt_random": ("cross-layer, random directions", PALETTE[6]),
    "plt_random": ("of each layer, random directions", PALETTE[4]),
}
MEASURES = {
    "replacement_score": "replacement score", "completeness_score": "completeness score",
    "agreement": "same next token, all MLPs replaced", "kl": "KL of next tokens (nats)",
    "kl_frozen": "KL on the prompt, attention fixed (nats)",
}  # fmt: skip


def curves(frame: pd.DataFrame, x: str, ys: dict[str, str], title: str) -> Drawn:
    """A line per family through its ks, means over seeds; a menu of measures."""
    columns = [x, *ys]
    frame = frame[frame["family"].isin(NAMES)]
    frame = frame.groupby(["family", "k"], as_index=False)[columns].mean()
    panels, values, first = Panels(), {y: [] for y in ys}, next(iter(ys))
    for family, (name, colour) in NAMES.items():
        rows = frame[frame["family"] == family].sort_values(x)
        if rows.empty:
            continue
        for y in ys:
            values[y].append(rows[y].tolist())
        said = [f"{name}, k {k}" for k in rows["k"]]
        look = {"marker": {"size": 7}, "customdata": said}
        hover = "%{customdata}: %{y:.3~g} at %{x:.3~g}"
        panels.add(0, line(rows[x], rows[first], name, colour, hover=hover, **look))
    menu = {text: [{"y": values[y]}, {"yaxis.title.text": text}] for y, text in ys.items()}
    chosen(panels.figure, menu)
    panels.axes(title, ys[first])
    return panels.finish(420, top=48), frame


def replaced(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Measures of the replacement model and its graphs against kept features."""
    return curves(by_dictionary(tables), "pruned_l0", MEASURES, "features kept per token")


def error(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Explained variance against active features."""
    ys = {"explained_variance": "explained variance"}
    return curves(by_dictionary(tables), "l0", ys, "active features per token, all layers")


def faithful(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Rank correlations of said and measured changes, beside their null."""
    frame = named(*tables.values(), "dictionary")
    panels, drawn = Panels(), []
    looks = {"faithfulness": ("as the graph says", PALETTE[0]),
             "faithfulness_null": ("a random direction taken out", PALETTE[6])}  # fmt: skip
    for column, (name, colour) in looks.items():
        by_seed = frame.groupby(["family", "seed"], as_index=False)[column].mean()
        rows = mean_of(by_seed, ["family"], column).assign(kind=name)
        families = [NAMES[f][0] for f in rows["family"]]
        panels.add(0, bars(families, rows[column], name, colour,
                           hover=f"%{{x}}, {name}: %{{y:.2f}}",
                           error_y=whiskers(rows[column], rows["min"], rows["max"])))  # fmt: skip
        drawn.append(rows.rename(columns={column: "correlation"}))
    panels.axes("", "rank correlation of said and measured")
    return panels.finish(400, top=48), pd.concat(drawn, ignore_index=True)


OBJECTIVES = {
    "none": ("before", PALETTE[1]), "mse": ("on the error alone", PALETTE[2]),
    "kl": ("on KL and error", PALETTE[0]),
    "shuffled": ("on KL of other positions, and error", PALETTE[6]),
}  # fmt: skip
TUNED = {
    "kl": "KL of next tokens (nats)", "unexplained": "unexplained variance",
    "replacement_score": "replacement score", "agreement": "same next token",
}  # fmt: skip


def tuned(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Measures before and after fine-tuning, a bar per objective; a menu of measures."""
    frame = named(*tables.values(), "dictionary")
    frame = frame.groupby(["family", "objective"], as_index=False, sort=False)[list(TUNED)].mean()
    panels, values = Panels(), {measure: [] for measure in TUNED}
    for objective, (name, colour) in OBJECTIVES.items():
        rows = frame[frame["objective"] == objective]
        values = {m: [*found, rows[m].tolist()] for m, found in values.items()}
        families = [NAMES[f][0] for f in rows["family"]]
        hover = f"%{{x}}, {name}: %{{y:.3~g}}"
        panels.add(0, bars(families, rows["kl"], name, colour, hover=hover))
    menu = {text: [{"y": values[m]}, {"yaxis.title.text": text}] for m, text in TUNED.items()}
    chosen(panels.figure, menu)
    panels.axes("", TUNED["kl"])
    return panels.finish(420, top=48), frame
