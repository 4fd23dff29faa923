"""Figures of circuit discovery that are no core kinds; no torch. See also figures_graph.py."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from pipeline.claims import roc as curves
from pipeline.figures.parts import Drawn, Panels, line, points
from pipeline.figures.theme import PALETTE, rgba

from .figures_graph import ABLATIONS, TASKS, TRUTHS, first, graph, known_of, of

__all__ = ["graph", "roc", "scores"]

METHODS = {  # name, colour, width, dash; thinner lines lie on wider ones, as curves often coincide
    "acdc": ("ACDC", PALETTE[0], 6, "solid"),  # in a drawn order of the edges
    "acdc_canonical": ("ACDC, authors' order", PALETTE[3], 5, "dash"),
    "eap": ("EAP", PALETTE[1], 4, "solid"),
    "eap_ig": ("EAP-IG", PALETTE[2], 2.5, "solid"),
    "exact": ("exact single cuts", PALETTE[4], 1.5, "dot"),
}
KNOWN = {True: ("in the circuit", PALETTE[2]), False: ("not in it", PALETTE[1])}
NOUGHT = 1e-20  # where 0 stands on a log scale


def small(edges: pd.DataFrame) -> tuple[Panels, list[tuple[str, str]]]:
    """A panel a task (across) and ablation (down), and what each shows."""
    tasks = [t for t in TASKS if t in set(edges["task"])]
    pairs = [(t, a) for a in ABLATIONS if a in set(edges["ablation"]) for t in tasks]
    titles = [f"{TASKS[t]}<br>{ABLATIONS[a]}" for t, a in pairs]
    return Panels(titles, len(tasks), gap=(0.04, 0.2), shared_yaxes=True), pairs


def views(
    edges: pd.DataFrame, truth: pd.DataFrame, pairs: list
) -> Iterator[tuple[dict[str, Any], int, int, pd.DataFrame, np.ndarray]]:
    """(what it is, case, panel, edges, which are known) of each known circuit and panel."""
    for case, name in enumerate(TRUTHS):
        for panel, (task, ablation) in enumerate(pairs):
            key = {"truth": name, "task": task, "ablation": ablation}
            yield key, case, panel, of(edges, task, ablation), known_of(truth, task, name)


def roc(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """A panel a task and ablation, a line a method; a list chooses the known circuit."""
    edges, truth = first(tables["discovery/edges"]), tables["discovery/truth"]
    (panels, pairs), rows = small(edges), []
    for key, case, panel, here, own in views(edges, truth, pairs):
        for method, (label, shade, width, dash) in METHODS.items() if own.any() else ():
            found = curves.found_sets(here[here["method"] == method])
            fpr, tpr = curves.curve(found, own)
            trace = line(
                fpr, tpr, label, shade, width=width, dash=dash, shape="hv", marker={"size": 4},
                hover=f"{label}: %{{y:.2f}} of the circuit, %{{x:.2f}} of the rest",
            )  # fmt: skip
            panels.add(panel, trace, case=case)
            rows.append(pd.DataFrame({"fpr": fpr, "tpr": tpr}).assign(**key, method=method))
    for panel in range(len(pairs)):
        panels.add(panel, line([0, 1], [0, 1], width=1, dash="dot"))
    panels.choose(TRUTHS.values())
    panels.axes("share of the other edges", "share of the circuit")
    panels.figure.update_xaxes(range=[-0.03, 1.03])
    panels.figure.update_yaxes(range=[-0.03, 1.06])
    return panels.finish(560, legend=38), pd.concat(rows, ignore_index=True)


def scores(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """A panel a task and ablation, a point an edge: |score| over the largest, log scale."""
    edges, truth = first(tables["discovery/edges"]), tables["discovery/truth"]
    (panels, pairs), frames = small(edges), []
    for key, case, panel, here, own in views(edges, truth, pairs):
        table = relative(here, own)
        frames.append(table.assign(task=key["task"], ablation=key["ablation"], truth=key["truth"]))
        for known, (label, shade) in KNOWN.items() if own.any() else ():
            some, hover = table[table["known"] == known], "%{hovertext}: %{y:.1e}"
            look = {"hovertext": some["edge"], "hover": hover}
            trace = points(some["x"], some["size"], label, rgba(shade, 0.6), **look)
            panels.add(panel, trace, case=case)
    panels.choose(TRUTHS.values())
    panels.axes(y="|score| / largest")
    panels.figure.update_xaxes(
        tickvals=[0, 1, 2, 3], ticktext=["ACDC", "EAP", "IG", "exact"], range=[-0.5, 3.5],
        tickangle=0,
    )  # fmt: skip
    panels.figure.update_yaxes(
        type="log", tickvals=[1, 1e-5, 1e-10, 1e-15, NOUGHT], range=[-21, 0.8],
        ticktext=["1", "10⁻⁵", "10⁻¹⁰", "10⁻¹⁵", "0"],
    )  # fmt: skip
    return panels.finish(560, legend=38), pd.concat(frames, ignore_index=True)


def relative(edges: pd.DataFrame, known: np.ndarray) -> pd.DataFrame:
    """|score| of every edge over its method's largest, at least NOUGHT; x spreads them out.

    Of ACDC the rises at its smallest threshold count, so far as they are rises.
    """
    out = []
    for place, method in enumerate(m for m in METHODS if m != "acdc_canonical"):
        rows = edges[edges["method"] == method]
        if method == "acdc":
            rows = rows[rows["threshold"] == rows["threshold"].min()]
        size = rows["score"].clip(lower=0) if method == "acdc" else rows["score"].abs()
        ends = [curves.ends(e) for e in rows[curves.COLUMNS].itertuples(index=False, name=None)]
        columns = {
            "method": method,
            "edge": [" → ".join(pair) for pair in ends],
            "x": place + np.linspace(-0.32, 0.32, len(rows)),
            "size": (size / (size.max() or 1)).clip(lower=NOUGHT).to_numpy(),
            "known": known,
        }
        out.append(pd.DataFrame(columns))
    return pd.concat(out, ignore_index=True)
