"""Figures of attribution patching that are no core kinds, a colour a method; no torch."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from pipeline.figures.kinds_effects import cases_of, nodes_in_words
from pipeline.figures.parts import Drawn, Panels, by_case, first, line, points, styled, whiskers
from pipeline.figures.theme import PALETTE, axis, rgba

METHODS = {
    "attribution_patching": ("attribution patching", PALETTE[1]),
    "attribution_ig": ("integrated gradients", PALETTE[0]),
    "qk_fix": ("with QK fix", PALETTE[3]),
    "atp_star": ("AtP*", PALETTE[2]),
    "activation_patching": ("exact", PALETTE[6]),
}
NODES = {method: look for method, look in METHODS.items() if method != "activation_patching"}
SIGNED = [method for method in NODES if method != "atp_star"]
OF_EDGES = {"eap": "attribution_patching", "eap_ig": "attribution_ig"}
GROUPS = {"head": "heads", "mlp": "MLPs", "q": "queries", "k": "keys", "v": "values",
          "saturated": "q, k: attention above 0.9", "even": "q, k: below", "resid": "stream",
          "edges": "edges"}  # fmt: skip
CASES = {
    "ioi": "indirect object", "greater_than": "greater than", "lookup": "lookup",
    "smollm2": "SmolLM2", "small": "model trained here",
    "random": "SmolLM2, as training begins", "small_random": "the same, before training",
}  # fmt: skip
LOW, HIGH = 1e-3, 10.0  # shares that are drawn; what lies beyond stands at the edge


def cases(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """(name, rows) of every task on every model, trained models first."""
    return cases_of(table, ["task", "arm"], CASES)


def search(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Share of the nodes that matter most against nodes patched exactly, best first."""
    table = first(next(iter(tables.values())))

    def curves(case: pd.DataFrame) -> Iterator[tuple]:
        n = int(case["n"].iloc[0])
        wanted = round(1 / case["found"].min())  # the first that is found is one of so many
        for label, last in {"if the order were right": wanted, "in any order": n}.items():
            x = [1 + (last - 1) * i / 60 for i in range(61)]  # a line, bent by the log axis
            dash = "dot" if last == n else "dash"
            yield 0, line(x, [v / last for v in x], label, width=1, dash=dash)
        for some, _, (label, shade) in styled(case, "method", NODES):
            hover = f"{label}<br>%{{x}} patched exactly: %{{y:.0%}} found"
            yield 0, line(some["checked"], some["found"], label, shade, shape="hv", hover=hover)

    return by_case(Panels(), cases(table[table["unit"] == "node"]), curves).finish(
        420, top=60,
        xaxis=axis("nodes patched exactly, in the order of the estimate", log=True),
        yaxis=axis("share found of those that matter most", tickformat=".0%"),
    ), table  # fmt: skip


def kinds(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Two panels of points, a row a kind: correlation, and false negatives.

    Points are means over seeds, and lines run from the least to the most.
    """
    (table,) = tables.values()
    columns = {"correlation": "correlation with the exact effect", "missed": "share missed"}
    drawn, keys = table[table["group"].isin(GROUPS)], ["arm", "task", "method", "group"]
    groups = drawn.groupby(keys, sort=False)
    rows = groups.mean(numeric_only=True)
    for c in columns:
        rows[f"{c}_least"], rows[f"{c}_most"] = groups[c].min(), groups[c].max()
    rows = rows.reset_index().drop(columns="seed")

    def spread(case: pd.DataFrame) -> Iterator[tuple]:
        drawn = product(enumerate(columns), styled(case, "shown", NODES))
        for (i, c), (some, _, (label, shade)) in drawn:
            ends = (some[c], some[f"{c}_least"], some[f"{c}_most"])
            yield i, points(
                some[c], [GROUPS[g] for g in some["group"]], label, shade, size=10,
                marker={"opacity": 0.85}, customdata=some["matter" if i else "n"],
                error_x=whiskers(*ends, width=2, color=shade),
                hover=f"{label}<br>%{{y}}: %{{x:.3~g}}, of %{{customdata:.0f}}",
            )  # fmt: skip

    panels = Panels(list(columns.values()), gap=(0.06, 0), shared_yaxes=True)
    by_case(panels, cases(rows.assign(shown=rows["method"].replace(OF_EDGES))), spread)
    order = {"categoryorder": "array", "categoryarray": list(GROUPS.values())[::-1]}
    panels.figure.update_yaxes(type="category", **order)
    panels.axis(1, {"tickformat": ".0%", "rangemode": "tozero"})
    return panels.finish(440), rows


def saturation(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Queries and keys that matter: share of the effect that an estimate sees, by attention."""
    nodes, totals = (first(tables[f"estimates/{t}"]) for t in ("nodes", "totals"))
    total = totals.set_index(["arm", "task"])["total"].abs()
    inputs = nodes[nodes["kind"].isin(["q", "k"])]
    whole = np.array([total[key] for key in zip(inputs["arm"], inputs["task"], strict=True)])
    inputs = inputs[inputs["exact_size"] >= 0.01 * whole]
    inputs = inputs.assign(share=inputs["size"] / inputs["exact_size"])
    inputs = inputs[inputs["method"].isin(["attribution_patching", "qk_fix"])]

    def shares(case: pd.DataFrame) -> Iterator[tuple]:
        for some, _, (label, shade) in styled(case, "method", METHODS):
            yield 0, points(
                some["peak"], some["share"].clip(LOW, HIGH), label, rgba(shade, 0.75), size=7,
                customdata=nodes_in_words(some),
                hover="%{customdata}<br>attention %{x:.3~g}, share %{y:.3~g}",
            )  # fmt: skip
        yield 0, line([0, 1], [1, 1], width=1, dash="dot")

    panels = by_case(Panels(), cases(inputs), shares)
    spans = np.log10([LOW * 0.8, HIGH * 1.2]).tolist()
    kept = "arm task method kind layer head peak size exact_size share".split()
    return panels.finish(
        420, top=48,
        xaxis=axis("largest attention weight of the head", range=[0, 1.02]),
        yaxis=axis("estimated size over exact size", type="log", range=spans, dtick=1),
    ), inputs[kept]  # fmt: skip


def layers(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Sum of |estimate - exact| over the sum of |exact|, of all nodes of a layer."""
    (table,) = tables.values()
    whole = table[(table["kind"] != "resid") & table["method"].isin(SIGNED)]
    off, effect = (whole["score"] - whole["exact_score"]).abs(), whole["exact_score"].abs()
    whole, keys = whole.assign(off=off, effect=effect), ["arm", "task", "method", "layer"]
    sums = whole.groupby(keys, sort=False)[["off", "effect"]].sum()
    frame = sums.assign(error=sums["off"] / sums["effect"]).reset_index()

    def errors(case: pd.DataFrame) -> Iterator[tuple]:
        for some, _, (label, shade) in styled(case, "method", NODES):
            dots = {"marker": {"size": 5}, "hover": f"{label}<br>layer %{{x}}: %{{y:.3~g}}"}
            yield 0, line(some["layer"], some["error"], label, shade, **dots)

    panels = by_case(Panels(), cases(frame), errors)
    y = axis("error, relative", rangemode="tozero")
    return panels.finish(400, top=48, xaxis=axis("layer"), yaxis=y), frame


def cost(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """A point a method: seconds, and correlation over all nodes; exact patching is right."""
    costs, quality = tables["estimates/costs"], tables["estimates/quality"]
    keys = ["arm", "task", "method"]
    right = quality[quality["group"] == "all"].groupby(keys, sort=False)["correlation"].mean()
    of_nodes = costs[costs["unit"] == "node"].groupby(keys, sort=False)
    seen = of_nodes[["seconds", "forwards", "backwards"]].mean().reset_index()
    frame = seen.merge(right.reset_index(), on=keys, how="left")
    frame.loc[frame["method"] == "activation_patching", "correlation"] = 1.0  # with itself

    def dots(case: pd.DataFrame) -> Iterator[tuple]:
        for row in case.itertuples():
            label, shade = METHODS[row.method]
            passes = f"{label}: {row.forwards:.0f} forward, {row.backwards:.0f} backward"
            hover = f"{passes} passes<br>%{{x:.3~g}} s, %{{y:.3~g}}"
            yield 0, points([row.seconds], [row.correlation], passes, shade, size=13, hover=hover)

    panels = by_case(Panels(), cases(frame), dots)
    x, y = axis("time for all nodes", "s", log=True), axis("correlation with the exact effect")
    return panels.finish(420, top=60, xaxis=x, yaxis=y), frame
