"""The circuit as a graph: heads by class and layer, and the paths between them."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from pipeline.figures.parts import Drawn, first, line, nothing
from pipeline.figures.theme import INK, PAGE, PALETTE, rgba

# In the order in which the model computes them.
ROLES = {
    "previous": ("previous token", PALETTE[6]),
    "duplicate": ("duplicate token", PALETTE[5]),
    "induction": ("induction", PALETTE[2]),
    "s_inhibition": ("S-inhibition", PALETTE[4]),
    "name_mover": ("name mover", PALETTE[0]),
    "suppressor": ("S-suppressor", "#004a7f"),
    "writer": ("writer", "#7d7c78"),
    "backup": ("backup name mover", PALETTE[3]),
    "negative": ("negative name mover", PALETTE[1]),
}
ARMS = {"smollm2": "SmolLM2-135M", "gpt2": "GPT-2 small"}
# class -> (column of the heads' effects, the classes that read it)
FLOWS = {
    "previous": ("to_induction", ("induction",)),
    "duplicate": ("to_inhibition", ("s_inhibition",)),
    "induction": ("to_inhibition", ("s_inhibition",)),
    "s_inhibition": ("to_movers", ("name_mover", "suppressor", "backup", "negative")),
    "name_mover": ("direct", ("logits",)),
    "suppressor": ("direct", ("logits",)),
    "writer": ("direct", ("logits",)),
    "backup": ("direct", ("logits",)),
    "negative": ("direct", ("logits",)),
}


def arms_of(frame: pd.DataFrame) -> list[tuple[str, str]]:
    """(arm, its name) of the arms in a table."""
    there = list(dict.fromkeys(frame["arm"]))
    return [(a, ARMS.get(a, a)) for a in sorted(there, key=lambda a: a != "smollm2")]


def graph(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Heads by class (across) and layer (upwards); lines are as wide as the sender's effect."""
    table = first(next(iter(tables.values())))
    arm, named = arms_of(table)[0]
    heads = table[(table["arm"] == arm) & (table["role"] != "")]
    if heads.empty:
        return nothing("no head counts here"), heads
    figure, x, spots, edges = go.Figure(), {}, {}, []
    for role in ROLES:
        rows = heads[heads["role"] == role].sort_values(["layer", "head"])
        x[role] = len(x)
        for k, row in enumerate(rows.itertuples()):
            spread = 0.5 * (k - (len(rows) - 1) / 2) / max(1, len(rows) - 1)
            spots[row.layer, row.head] = (x[role] + spread, row.layer)
    top = float(table[table["arm"] == arm]["layer"].max()) + 2
    for row in heads.itertuples():
        column, readers = FLOWS[row.role]
        effect = abs(getattr(row, column))
        ends = [
            (spots[r.layer, r.head], f"{r.layer}.{r.head}")
            for r in heads[heads["role"].isin(readers)].itertuples()
            if r.layer > row.layer
        ]
        ends += [((5.5, top), "logits")] if "logits" in readers else []
        for spot, target in ends:
            edges.append((f"{row.layer}.{row.head}", target, row.role, effect))
            figure.add_trace(flow(spots[row.layer, row.head], spot, row.role, effect))
    for role, (label, shade) in ROLES.items():
        rows = heads[heads["role"] == role]
        if len(rows):
            figure.add_trace(nodes(rows, [spots[k] for k in pairs(rows)], label, shade))
    look = {"mode": "text", "text": ["<b>logits</b>"], "textfont": {"color": INK}}
    figure.add_scatter(x=[5.5], y=[top], hoverinfo="skip", showlegend=False, **look)
    figure.update_xaxes(
        tickvals=list(x.values()), ticktext=[ROLES[r][0].replace(" ", "<br>") for r in x],
        showgrid=False, zeroline=False, range=[-0.6, len(x) - 0.4],
    )  # fmt: skip
    figure.update_yaxes(title={"text": f"layer of {named}"}, zeroline=False, range=[-1, top + 1])
    figure.update_layout(height=560, showlegend=False)
    return figure, pd.DataFrame(edges, columns=["sender", "receiver", "role", "effect"])


def pairs(rows: pd.DataFrame) -> list[tuple[int, int]]:
    return list(zip(rows["layer"], rows["head"], strict=True))


def flow(a: tuple, b: tuple, role: str, effect: float) -> go.Scatter:
    """A line between two heads."""
    width = float(np.clip(4 * effect, 0.6, 7))
    return line([a[0], b[0]], [a[1], b[1]], colour=rgba(ROLES[role][1], 0.45), width=width)


def nodes(rows: pd.DataFrame, spots: list[tuple], label: str, shade: str) -> go.Scatter:
    """The heads of a class; names of neighbours in a layer take turns above and below."""
    layers = [layer for layer, _ in pairs(rows)]
    turns = [layers[:k].count(layer) % 2 for k, layer in enumerate(layers)]
    beside = ["middle right" if layers.count(layer) == 1 else "" for layer in layers]
    return go.Scatter(
        x=[s[0] for s in spots],
        y=[s[1] for s in spots],
        mode="markers+text",
        text=[f"{i}.{h}" for i, h in pairs(rows)],
        textfont={"size": 10, "color": INK},
        textposition=[
            b or ("top center", "bottom center")[t] for b, t in zip(beside, turns, strict=True)
        ],
        marker={"color": shade, "size": 13, "line": {"color": PAGE, "width": 1.5}},
        name=label,
        hovertemplate="head %{text}<br>" + label + "<extra></extra>",
    )
