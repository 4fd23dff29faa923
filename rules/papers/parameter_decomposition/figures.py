"""Figures of this paper: parts in the plane, and what removing each of them does."""

from typing import Any

import numpy as np

from pipeline.figures.parts import Drawn, Panels, first, line, nothing, plane, points
from pipeline.figures.theme import INK, PALETTE, rgba
from pipeline.store.tables import where

KINDS = {"target": ("column of W", rgba(INK, 0.35), 7), "part": ("part", PALETTE[1], 2)}
ALIVE = {True: ("alive, rows with its feature", PALETTE[0], "own"),
         False: ("dead, all rows", PALETTE[1], "mean")}  # fmt: skip
FLOOR = 1e-8  # of a change that is drawn


def vectors(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """The parts' vectors over W's columns, a panel an arm; options: arms, targets, their names."""
    table = tables["decomposition/vectors"]
    if not len(table):
        return nothing("no target with two dimensions"), table
    table = first(table)
    arms, targets = (list(dict.fromkeys(table[c])) for c in ("arm", "target"))
    panels = Panels([options["arms"].get(arm, arm) for arm in arms])
    reach = 1.15 * float(table[["x", "y"]].abs().max().max())
    for case, target in enumerate(targets):
        for i, arm in enumerate(arms):
            for kind, (name, colour, width) in KINDS.items():
                own = where(table, target=target, arm=arm, kind=kind)
                x, y = (np.stack([0 * own[c], own[c], own[c] + np.nan], 1).ravel() for c in "xy")
                panels.add(i, line(x, y, name, colour, width=width, marker={"size": width + 2},
                                   hover="%{x:.2f}, %{y:.2f}"), case=case)  # fmt: skip
    for i in range(len(arms)):
        plane(panels.figure, **panels.place(i), reach=reach)
    panels.choose([options["targets"].get(t, t) for t in targets])
    return panels.finish(352, legend=38, top=76), table


def ablations(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Change of the output without each part of W, a dot a part; options as `vectors`."""
    table = tables["decomposition/ablations"]
    targets = list(dict.fromkeys(table["target"]))
    panels = Panels()
    for case, target in enumerate(targets):
        rows = where(table, target=target)
        for alive, (name, colour, column) in ALIVE.items():
            own = rows[rows["alive"] == alive].dropna(subset=[column])
            x, y = own["arm"].replace(options["arms"]), own[column].clip(lower=FLOOR)
            look = {"colour": rgba(colour, 0.6), "hover": f"{name}, %{{x}}: %{{y:.2g}}"}
            panels.add(0, points(x, y, name, **look), case=case)
    panels.choose(options["targets"].get(t, t) for t in targets)
    panels.figure.update_yaxes(type="log", exponentformat="power")
    panels.axes(y="squared change of the output")
    return panels.finish(360, legend=12, top=48), table
