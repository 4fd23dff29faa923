"""Figures of sparse feature circuits that are no core kinds: sums at a site, and the circuit."""

from typing import Any

import numpy as np
import pandas as pd

from pipeline.figures.kinds_effects import place_of, site
from pipeline.figures.kinds_graph import legend, ruled, walkable
from pipeline.figures.parts import Drawn, Panels, bars, first
from pipeline.figures.theme import INK, PALETTE, literal

SUMS = {
    "whole": ("exact, the whole site", INK),
    "ig": ("integrated gradients, summed", PALETTE[0]),
    "attribution": ("attribution patching, summed", PALETTE[5]),
    "errors": ("of it error terms (integrated gradients)", PALETTE[4]),
}


def sums(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Sums of estimates beside the exact effect of each whole site, mean over structures."""
    (table,) = tables.values()
    frame = table.groupby("hook")[list(SUMS)].mean()
    frame = frame.loc[sorted(frame.index, key=place_of)].reset_index()
    panels, sites = Panels(), [site(h) for h in frame["hook"]]
    for column, (name, shade) in SUMS.items():
        panels.add(0, bars(sites, frame[column], name, shade, hover=f"%{{x}}, {name}: %{{y:.3~g}}"))
    panels.axes("site", "change of logit difference")
    return panels.finish(400, top=48), frame


def graph(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """The circuit of one structure: positions across, sites upwards; it can be walked."""
    rows, edges, prompts = (
        t[t["structure"] == options["structure"]]
        for t in (tables[f"agreement/{n}"] for n in ("graph_nodes", "graph_edges", "behaviour"))
    )
    (prompt,) = first(prompts).to_dict("records")
    places = sorted(set(rows["hook"]), key=place_of)
    nodes = spread(rows, places)
    nodes = nodes.assign(
        symbol=np.where(nodes["number"] < 0, "triangle-up", "circle"),
        colour=np.where(nodes["effect"] < 0, PALETTE[0], PALETTE[1]),
        size=8 + 16 * np.sqrt(nodes["effect"].abs() / nodes["effect"].abs().max()),
        about=[about(row) for row in nodes.itertuples()],
    )
    last = len(prompt["tokens"]) - 1
    end = {
        "name": "logits", "x": last, "y": len(places), "symbol": "star", "colour": INK, "size": 16,
        "about": [f"logit of the right verb minus that of the wrong one, such as "
                  f"{prompt['answer'].strip()} − {prompt['foil'].strip()}"],
    }  # fmt: skip
    nodes = pd.concat([nodes, pd.DataFrame([end])], ignore_index=True)
    figure = walkable(nodes, edges.assign(weight=-edges["effect"]), "logits", "logits")
    marks = [("helps the right verb", PALETTE[0], "circle"), ("hinders it", PALETTE[1], "circle"),
             ("error term", PALETTE[6], "triangle-up")]  # fmt: skip
    legend(figure, marks)
    ruled(figure, [*(site(h) for h in places), "logits"], list(map(literal, prompt["tokens"])))
    figure.update_xaxes(range=[0.4, last + 0.6])  # BOS is the same in all prompts
    figure.update_layout(height=120 + 70 * len(places))
    return figure, edges


def about(row: Any) -> list[str]:
    """What the reader is told of a node."""
    said = []
    if row.number >= 0:
        said.append(f"largest on: {row.tokens}" if row.tokens else "silent on held-out tokens")
        said.append(f"raises: {row.logits}")
    said.append(f"helps by {-row.effect:.3f} logits; mean size {row.activation:.2f}")
    return said


def spread(rows: pd.DataFrame, places: list[str]) -> pd.DataFrame:
    """Nodes of one site and position beside each other, in two rows where they are many."""
    out = []
    for (hook, position), own in rows.groupby(["hook", "position"], sort=False):
        n = len(own)
        k = np.arange(n)
        per_row = -(-n // (1 + (n > 5)))
        in_row = np.minimum(per_row, n)
        x = position + (k % per_row - (in_row - 1) / 2) * min(0.17, 0.8 / max(in_row, 1))
        y = places.index(hook) + 0.26 * (k // per_row) - 0.13 * (n > per_row)
        out.append(own.assign(x=x, y=y))
    return pd.concat(out)
