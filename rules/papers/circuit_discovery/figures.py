"""Figures of circuit discovery that are no core kinds; no torch. See also figures_graph.py."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from pipeline.claims import roc as curves
from pipeline.figures.parts import Drawn, Panels, first, line, points, styled
from pipeline.figures.theme import PALETTE, rgba
from pipeline.store.tables import where

from .figures_graph import ABLATIONS, TASKS, TRUTHS, ends_of, known_of

METHODS = {  # name, colour, width, dash; thinner lines lie on wider ones, as curves often coincide
    "acdc": ("ACDC", PALETTE[0], 6, "solid"),  # in a drawn order of the edges
    "acdc_canonical": ("ACDC, authors' order", PALETTE[3], 5, "dash"),
    "eap": ("EAP", PALETTE[1], 4, "solid"),
    "eap_ig": ("EAP-IG", PALETTE[2], 2.5, "solid"),
    "exact": ("exact single cuts", PALETTE[4], 1.5, "dot"),
}
KNOWN = {True: ("in the circuit", PALETTE[2]), False: ("not in it", PALETTE[1])}
NOUGHT = 1e-20  # where 0 stands on a log scale


def multiples(
    tables: dict[str, Any], drawn: Callable[[pd.DataFrame, np.ndarray], Iterable[tuple]]
) -> tuple[Panels, pd.DataFrame]:
    """A panel for each task (across) and ablation (down); a list chooses the known circuit. drawn:
    edges, and which are known -> traces, each with its numbers."""
    edges = first(where(tables["discovery/edges"], weights="trained"))
    truth = tables["discovery/truth"]
    tasks = [t for t in TASKS if t in set(edges["task"])]
    pairs = [(t, a) for a in ABLATIONS if a in set(edges["ablation"]) for t in tasks]
    titles = [f"{TASKS[t]}<br>{ABLATIONS[a]}" for t, a in pairs]
    panels, frames = Panels(titles, len(tasks), gap=(0.04, 0.2), shared_yaxes=True), []
    for case, name in enumerate(TRUTHS):
        for panel, (task, ablation) in enumerate(pairs):
            own = where(edges, task=task, ablation=ablation)
            for trace, frame in drawn(own, known_of(truth, task, name)):
                panels.add(panel, *([trace] if trace else []), case=case)
                frames.append(frame.assign(truth=name, task=task, ablation=ablation))
    return panels, pd.concat(frames, ignore_index=True)


def roc(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """A line for each method in each panel of `multiples`."""

    def lines(edges: pd.DataFrame, known: np.ndarray) -> Iterator[tuple]:
        for rows, method, (label, shade, width, dash) in styled(edges, "method", METHODS):
            if known.any():
                fpr, tpr = curves.curve(curves.found_sets(rows), known)
                hover = f"{label}: %{{y:.2f}} of the circuit, %{{x:.2f}} of the rest"
                look = {"width": width, "dash": dash, "shape": "hv", "marker": {"size": 4}}
                numbers = pd.DataFrame({"fpr": fpr, "tpr": tpr, "method": method})
                yield line(fpr, tpr, label, shade, hover=hover, **look), numbers

    panels, frame = multiples(tables, lines)
    for panel in range(panels.rows * panels.columns):
        panels.add(panel, line([0, 1], [0, 1], width=1, dash="dot"))
    panels.choose(TRUTHS.values())
    panels.axes("share of the other edges", "share of the circuit")
    panels.figure.update_xaxes(range=[-0.03, 1.03])
    panels.figure.update_yaxes(range=[-0.03, 1.06])
    return panels.finish(560, legend=38), frame["fpr tpr truth task ablation method".split()]


def scores(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """A point for each edge in each panel of `multiples`: |score| over the largest, log scale."""

    def dots(edges: pd.DataFrame, known: np.ndarray) -> Iterator[tuple]:
        table = relative(edges, known)
        yield None, table
        for some, _, (label, shade) in styled(table, "known", KNOWN) if known.any() else ():
            look = {"hovertext": some["edge"], "hover": "%{hovertext}: %{y:.1e}"}
            yield points(some["x"], some["size"], label, rgba(shade, 0.6), **look), table[:0]

    panels, frame = multiples(tables, dots)
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
    order = "method edge x size known task ablation truth".split()
    return panels.finish(560, legend=38), frame[order]


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
        columns = {
            "method": method,
            "edge": [" → ".join(ends) for ends in ends_of(rows)],
            "x": place + np.linspace(-0.32, 0.32, len(rows)),
            "size": (size / (size.max() or 1)).clip(lower=NOUGHT).to_numpy(),
            "known": known,
        }
        out.append(pd.DataFrame(columns))
    return pd.concat(out, ignore_index=True)
