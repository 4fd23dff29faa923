"""Figures of indirect object identification that are no core kinds; no torch.

The circuit as a graph is drawn in figures_graph.py.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from pipeline.figures import parts
from pipeline.figures.kinds_effects import bar_of, by_head, maps, tall
from pipeline.figures.parts import Drawn, Panels, bars, first, nothing, points, styled, whiskers
from pipeline.figures.theme import GRID, INK, PALETTE, axis, rgba

from .figures_graph import ARMS, ROLES, by_arm, pairs

NAMES = {"IO": (PALETTE[0],), "S": (PALETTE[1],)}
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
    n_layers = table["layer"].nunique()

    def steps(rows: pd.DataFrame) -> Iterator[tuple[int, Any]]:
        for i, (step, (_, roles)) in enumerate(STEPS.items()):
            values = rows.pivot(index="layer", columns="head", values=step).to_numpy(float)
            hover = "head %{y}.%{x}<br>logits: %{z:.3~g}"
            yield i, by_head(values, hover, bar_of(i, len(STEPS)))
            rings = rows[rows["role"].isin(roles)]
            yield i, points(
                rings["head"], rings["layer"], colour=INK, size=11, symbol="square-open",
                marker={"line": {"width": 1.6}}, customdata=[ROLES[r][0] for r in rings["role"]],
                hover="head %{y}.%{x}: %{customdata}",
            )  # fmt: skip

    panels = parts.by_case(maps([t for t, _ in STEPS.values()], n_layers), by_arm(table), steps)
    return tall(panels, n_layers), table[["arm", "layer", "head", "role", *STEPS]]


def movers(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """A point for each prompt and name; a panel for each head of the first arm."""
    scatter, heads = (first(tables[f"circuit/{t}"]) for t in ("scatter", "heads"))
    if scatter.empty:
        return nothing("no head moves names here"), scatter
    _, scatter = by_arm(scatter)[0]
    role = heads[heads["arm"] == scatter["arm"].iloc[0]].set_index(["layer", "head"])["role"]
    chosen = list(dict.fromkeys(pairs(scatter)))[:6]
    titles = [f"head {i}.{h},<br>{ROLES[role[i, h]][0]}" for i, h in chosen]
    panels = Panels(titles, 2 if len(chosen) == 4 else min(3, len(chosen)))
    for k, (layer, head) in enumerate(chosen):
        own = scatter[(scatter["layer"] == layer) & (scatter["head"] == head)]
        for some, name, (shade,) in styled(own, "name", NAMES):
            hover = f"{name}: attention %{{x:.2f}}, logit %{{y:.2f}}"
            dots = points(some["attention"], some["logit"], name, rgba(shade, 0.7), hover=hover)
            panels.add(k, dots)
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
    sides = lambda rows: [(0, by_circuit(rows)), *((1, trace) for trace in without(rows))]  # noqa: E731
    parts.by_case(panels, sources(table), sides)
    panels.axes(y="logit difference F")
    panels.axes("F of the model without K", "F of the circuit without K", col=2)
    figure = panels.finish(440, top=56).update_layout(margin={"b": 100})
    return figure.update_layout(legend={"x": 0.5, "y": -0.2, "yanchor": "top"}), table


def sources(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """(name, rows) of every circuit: its arm, and where it comes from."""
    groups = table.groupby(["arm", "source"], sort=False)
    return [(f"{ARMS.get(arm, arm)}, {source}", rows) for (arm, source), rows in groups]


def by_circuit(rows: pd.DataFrame) -> Any:
    """F of the model, the circuits, and the nulls: mean over seeds, from the least to the most; the
    random circuits are one bar."""
    rows = rows[rows["removed"] == "nothing"]
    circuits = rows["circuit"].str.replace(r"^random \d+$", "random", regex=True)
    groups = rows.groupby(circuits, sort=False)
    plain = groups[["f", "n_heads"]].mean()
    shades = {"model": GRID, **{c: shade for c, (_, shade) in CIRCUITS.items()}}
    return bars(
        plain.index, plain["f"], colour=[shades.get(c, PALETTE[6]) for c in plain.index],
        customdata=plain["n_heads"],
        error_y=whiskers(plain["f"], groups["f"].min(), groups["f"].max(), width=None),
        hover="%{x}: %{y:.2f}, %{customdata:.0f} heads",
    )  # fmt: skip


def without(rows: pd.DataFrame) -> list[Any]:
    """F without K, a point for each set; on the line the circuit loses what the model loses."""
    sets = first(rows[rows["removed"] != "nothing"])
    wide = sets.pivot(index="removed", columns="circuit", values="f")
    wide = wide[[c for c in ("model", *CIRCUITS) if c in wide]]
    if wide.empty:
        return []
    symbol = np.where(wide.index.str.startswith("greedy"), "diamond", "circle")
    names = [str(k).replace("_", " ") for k in wide.index]
    return [parts.equal(wide, name="equal")] + [
        points(
            wide["model"], wide[c], label, shade, size=9, symbol=symbol, customdata=names,
            hover="without %{customdata}<br>model %{x:.2f}, " + c + " %{y:.2f}",
        )
        for c, (label, shade) in CIRCUITS.items() if c in wide
    ]  # fmt: skip


def minimality(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """A bar for each head of the circuit: what F loses with it, at the set K where most is lost."""
    table = first(next(iter(tables.values())))
    table = table[table["set"] != "class"]
    size = (table["with"] - table["without"]).abs()
    most = size.groupby([table[k] for k in ("arm", "source", "layer", "head")]).idxmax()
    table = table.loc[sorted(most)]
    if table.empty:
        return nothing("no circuit was found here"), table

    def lost(rows: pd.DataFrame) -> Iterator[tuple[int, Any]]:
        for some, _, (label, shade) in styled(rows, "role", ROLES):
            yield 0, bars(
                [f"{i}.{h}" for i, h in pairs(some)], some["with"] - some["without"], label, shade,
                hover=f"head %{{x}}, {label}<br>%{{y:.3~g}} logits, K: %{{customdata}}",
                customdata=some["set"],
            )  # fmt: skip

    panels = parts.by_case(Panels(), sources(table), lost)
    x, y = axis("head", type="category"), axis("loss of logit difference")
    return panels.finish(400, top=70, xaxis=x, yaxis=y), table
