"""Figures of this paper: training, and the weights that it finds."""

from typing import Any

import numpy as np

from pipeline.figures.parts import Drawn, Panels, heat, line, over_seeds
from pipeline.figures.theme import PALETTE
from pipeline.store.tables import where

TITLES = {"one": "one layer", "two": "two recurrent layers", "five": "five layers"}
REFERENCES = {"gd": ("gradient descent", PALETTE[0]), "gdpp": ("GD++", PALETTE[2])}
MEASURES = {"sensitivity_cosine": ("cosine of sensitivities", PALETTE[1]),
            "sensitivity_distance": ("distance of sensitivities", PALETTE[0]),
            "prediction_distance": ("distance of predictions", PALETTE[2])}  # fmt: skip
MATRICES = ("A = W<sub>Q</sub>W<sub>K</sub>ᵀ", "O = W<sub>V</sub>W<sub>P</sub>")


def shown(arm: str) -> str:
    return TITLES.get(arm, arm.replace("_", " "))


def training(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Loss and alignment through training; the reader chooses the arm."""
    table = tables["regression/curves"]
    arms = list(dict.fromkeys(table["arm"]))
    panels = Panels(["loss", "beside gradient descent", "beside GD++"], gap=(0.08, 0.1))
    for case, arm in enumerate(arms):
        rows = where(table, arm=arm)
        steps = sorted(rows["step"].unique())
        for reference, (name, colour) in REFERENCES.items():
            level = [float(rows[f"{reference}_loss"].iloc[0])] * 2
            panels.add(0, line([steps[0], steps[-1]], level, name, colour, dash="dash",
                               hover=f"{name}: %{{y:.4f}}"), case=case)  # fmt: skip
        for panel, front in ((0, ""), (1, "gd_"), (2, "gdpp_")):
            measures = MEASURES if front else {"loss": ("trained attention", PALETTE[1])}
            for measure, (name, colour) in measures.items():
                values = rows.pivot(index="seed", columns="step", values=f"{front}{measure}")
                drawn = over_seeds(steps, values.to_numpy(), name, colour,
                                   f"{name}, step %{{x}}: %{{y:.4f}}")  # fmt: skip
                panels.add(panel, *drawn, case=case)
    panels.choose([shown(arm) for arm in arms])
    panels.axes(x="step")
    return panels.finish(400, legend=44, top=100), table


def weights(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """A and O of the first model of each arm beside the construction's, in one gauge."""
    table = tables["regression/weights"]
    arms = list(dict.fromkeys(table["arm"]))
    seeds = {"trained": table.loc[table["seed"] >= 0, "seed"].min(), "construction": -1}
    titles = [f"{m}, {who}" for m in MATRICES for who in seeds]
    panels = Panels(titles, 4, gap=(0.04, 0.1), shared_yaxes=True)
    for case, arm in enumerate(arms):
        for i, (matrix, who) in enumerate((m, w) for m in "AO" for w in seeds):
            rows = where(table, arm=arm, matrix=matrix, seed=seeds[who])
            z = rows.pivot(index="row", columns="column", values="value").to_numpy()
            panels.add(i, heat(np.round(z, 4), reach=1.2, hover="row %{y}, column %{x}: %{z:.3f}",
                               showscale=i == 3), case=case)  # fmt: skip
    panels.choose([shown(arm) for arm in arms])
    panels.figure.update_yaxes(autorange="reversed")
    panels.axes(x="entry of the token; the last is y")
    return panels.finish(360, top=90), table
