"""Figures of indirect object identification that are no core kinds; no torch.

The circuit as a graph is drawn in figures_graph.py.
"""

from typing import Any

import numpy as np
import pandas as pd

from pipeline.figures.kinds_effects import bar_of, by_head, maps, tall
from pipeline.figures.parts import (
    Drawn,
    Panels,
    bars,
    equal,
    first,
    nothing,
    points,
    whiskers,
)
from pipeline.figures.theme import GRID, INK, PALETTE, axis, rgba

from .figures_graph import ROLES, arms_of, graph, pairs

__all__ = ["graph", "judged", "minimality", "movers", "paths"]

NAMES = {"IO": PALETTE[0], "S": PALETTE[1]}
STEPS = {
    "direct": ("→ logits", ("name_mover", "suppressor", "writer", "negative")),
    "to_movers": ("→ queries of those", ("s_inhibition",)),
    "to_inhibition": ("→ values of<br>S-inhibition heads", ("induction", "duplicate")),
    "to_induction": ("→ keys of<br>induction heads", ("previous",)),
}
CIRCUITS = {"circuit": ("the circuit", PALETTE[0]), "naive": ("the naive circuit", PALETTE[4])}


def paths(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """The four steps; a list chooses the arm; heads that count have their class's ring."""
    table = first(next(iter(tables.values())))
    arms, n_layers = arms_of(table), table["layer"].nunique()
    panels = maps([title for title, _ in STEPS.values()], n_layers)
    for case, (arm, _) in enumerate(arms):
        rows = table[table["arm"] == arm]
        for i, (step, (_, roles)) in enumerate(STEPS.items()):
            values = rows.pivot(index="layer", columns="head", values=step).to_numpy(float)
            hover = "head %{y}.%{x}<br>logits: %{z:.3~g}"
            rings = rows[rows["role"].isin(roles)]
            ring = points(
                rings["head"], rings["layer"], colour=INK, size=11, symbol="square-open",
                marker={"line": {"width": 1.6}}, customdata=[ROLES[r][0] for r in rings["role"]],
                hover="head %{y}.%{x}: %{customdata}",
            )  # fmt: skip
            panels.add(i, by_head(values, hover, bar_of(i, len(STEPS))), ring, case=case)
    panels.choose(name for _, name in arms)
    return tall(panels, n_layers), table[["arm", "layer", "head", "role", *STEPS]]


def movers(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """A point a prompt and name; a panel a head of the first arm."""
    scatter, heads = (first(tables[f"circuit/{t}"]) for t in ("scatter", "heads"))
    if scatter.empty:
        return nothing("no head moves names here"), scatter
    arm = arms_of(scatter)[0][0]
    scatter = scatter[scatter["arm"] == arm]
    role = heads[heads["arm"] == arm].set_index(["layer", "head"])["role"]
    chosen = list(dict.fromkeys(pairs(scatter)))[:6]
    panels = Panels(
        [f"head {i}.{h},<br>{ROLES[role[i, h]][0]}" for i, h in chosen], min(3, len(chosen))
    )
    for k, (layer, head) in enumerate(chosen):
        own = scatter[(scatter["layer"] == layer) & (scatter["head"] == head)]
        for name, shade in NAMES.items():
            some, hover = (
                own[own["name"] == name],
                f"{name}: attention %{{x:.2f}}, logit %{{y:.2f}}",
            )
            panels.add(
                k, points(some["attention"], some["logit"], name, rgba(shade, 0.7), hover=hover)
            )
    panels.figure.update_xaxes(range=[-0.03, 1.03])
    panels.axes("attention from END to the name", "logit of the name")
    return panels.finish(130 + 250 * panels.rows, legend=40, top=88), scatter


def judged(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Left: F of the circuits. Right: F without K of circuit and model; a list chooses."""
    (table,) = tables.values()
    panels = Panels(
        ["faithfulness", "completeness: without a set K of heads"],
        gap=(0.12, 0), column_widths=[0.42, 0.58],
    )  # fmt: skip
    found = sources(table)
    for case, (_, rows) in enumerate(found):
        panels.add(0, by_circuit(rows), case=case)
        panels.add(1, *without(rows), case=case)
    panels.choose(name for name, _ in found)
    panels.axes(y="logit difference F")
    panels.axes("F of the model without K", "F of the circuit without K", col=2)
    figure = panels.finish(440, top=56).update_layout(margin={"b": 100})
    return figure.update_layout(legend={"x": 0.5, "y": -0.2, "yanchor": "top"}), table


def sources(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """(name, rows) of every circuit: its arm, and where it comes from."""
    names = dict(arms_of(table))
    groups = table.groupby(["arm", "source"], sort=False)
    return [(f"{names[arm]}, {source}", rows) for (arm, source), rows in groups]


def by_circuit(rows: pd.DataFrame) -> Any:
    """F of the model, the circuits, and the nulls: mean over seeds, from the least to the most."""
    groups = rows[rows["removed"] == "nothing"].groupby("circuit", sort=False)
    plain = groups[["f", "n_heads"]].mean()
    shades = {"model": GRID, **{c: shade for c, (_, shade) in CIRCUITS.items()}}
    return bars(
        plain.index, plain["f"], colour=[shades.get(c, PALETTE[6]) for c in plain.index],
        customdata=plain["n_heads"],
        error_y=whiskers(plain["f"], groups["f"].min(), groups["f"].max(), width=None),
        hover="%{x}: %{y:.2f}, %{customdata:.0f} heads",
    )  # fmt: skip


def without(rows: pd.DataFrame) -> list[Any]:
    """F without K, a point a set; on the line the circuit loses what the model loses."""
    sets = first(rows[rows["removed"] != "nothing"])
    wide = sets.pivot(index="removed", columns="circuit", values="f")
    wide = wide[[c for c in ("model", *CIRCUITS) if c in wide]]
    if wide.empty:
        return []
    symbol = np.where(wide.index.str.startswith("greedy"), "diamond", "circle")
    names = [str(k).replace("_", " ") for k in wide.index]
    return [equal(wide, name="equal")] + [
        points(
            wide["model"], wide[c], label, shade, size=9, symbol=symbol, customdata=names,
            hover="without %{customdata}<br>model %{x:.2f}, " + c + " %{y:.2f}",
        )
        for c, (label, shade) in CIRCUITS.items() if c in wide
    ]  # fmt: skip


def minimality(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """A bar a head of the circuit: what F loses with it, at the set K where that is most."""
    table = first(next(iter(tables.values())))
    table = table[table["set"] != "class"]
    size = (table["with"] - table["without"]).abs()
    most = size.groupby([table[k] for k in ("arm", "source", "layer", "head")]).idxmax()
    table = table.loc[sorted(most)]
    if table.empty:
        return nothing("no circuit was found here"), table
    panels, found = Panels(), sources(table)
    for case, (_, rows) in enumerate(found):
        for role, (label, shade) in ROLES.items():
            some = rows[rows["role"] == role]
            if len(some):
                hover = f"head %{{x}}, {label}<br>%{{y:.3~g}} logits, K: %{{customdata}}"
                trace = bars(
                    [f"{i}.{h}" for i, h in pairs(some)], some["with"] - some["without"], label,
                    shade, customdata=some["set"], hover=hover,
                )  # fmt: skip
                panels.add(0, trace, case=case)
    panels.choose(name for name, _ in found)
    x, y = axis("head", type="category"), axis("loss of logit difference")
    return panels.finish(400, top=70, xaxis=x, yaxis=y), table
