"""Figures of this paper: shares with their intervals, and reliability diagrams."""

from typing import Any

from pipeline.figures.parts import Drawn, Panels, bars, equal, points, whiskers
from pipeline.figures.theme import PALETTE, rgba
from pipeline.store.tables import where


def shares(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Bars of shares by arm: the mean over seeds, from the least to the most that Wilson allows.

    Args:
        options: bars: column; names, arms, cases: pairs of value and title; choose: column.
    """
    (table,) = tables.values()
    choose, cases = options.get("choose", ""), dict(options.get("cases", [["", ""]]))
    arms = {a: t for a, t in dict(options["arms"]).items() if a in set(table["arm"])}
    panels = Panels()
    for case, value in enumerate(cases):
        rows = where(table, **{choose: value}) if choose else table
        for (bar, name), colour in zip(dict(options["names"]).items(), PALETTE, strict=False):
            own = rows[rows[options["bars"]] == bar].groupby("arm")
            found = own["share"].mean(), own["low"].min(), own["high"].max()
            mean, low, high = (x.reindex(list(arms)) for x in found)
            look = {"error_y": whiskers(mean, low, high), "hover": f"{name}, %{{x}}: %{{y:.1%}}"}
            drawn = bars(list(arms.values()), mean, name, rgba(colour, 0.85), **look)
            panels.add(0, drawn, case=case)
    panels.choose(cases.values())
    panels.figure.update_yaxes(range=[0, 1], tickformat=".0%")
    return panels.finish(440, legend=30, top=100, barmode="group"), table


def reliability(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Accuracy against confidence of each bin, with Wilson's intervals; one arm at a time."""
    (table,) = tables.values()
    table = table[table["kind"] == options["kind"]]
    arms = {a: t for a, t in dict(options["arms"]).items() if a in set(table["arm"])}
    panels = Panels(["bins of equal width", "bins of equally many answers"], shared_yaxes=True)
    for panel in (0, 1):
        panels.add(panel, equal([0, 1], name="calibrated"))
    for case, arm in enumerate(arms):
        for seed, colour in zip(sorted(table["seed"].unique()), PALETTE, strict=False):
            for panel, adaptive in enumerate((False, True)):
                rows = where(table, arm=arm, seed=seed, adaptive=adaptive)
                reach = whiskers(rows["share"], rows["low"], rows["high"], color=rgba(colour, 0.6))
                drawn = points(rows["confidence"], rows["share"], f"seed {seed}", colour, size=8,
                               error_y=reach, hover="said %{x:.2f}, right %{y:.2f}")  # fmt: skip
                panels.add(panel, drawn, case=case)
    panels.choose(arms.values())
    panels.axes(x="probability of the letter", y="share that is right")
    panels.figure.update_xaxes(range=[0, 1])
    panels.figure.update_yaxes(range=[0, 1])
    return panels.finish(440, legend=44, top=110), table
