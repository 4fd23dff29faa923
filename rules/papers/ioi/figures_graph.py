"""The circuit as a graph: heads by class and layer, and the paths between them."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from pipeline.figures.kinds_effects import cases_of
from pipeline.figures.parts import Drawn, first, line, nothing, points, styled
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
WRITERS = ("name_mover", "suppressor", "writer", "backup", "negative")
# class -> (column of the heads' effects, the classes that read it)
FLOWS = {
    "previous": ("to_induction", ("induction",)),
    "duplicate": ("to_inhibition", ("s_inhibition",)),
    "induction": ("to_inhibition", ("s_inhibition",)),
    "s_inhibition": ("to_movers", ("name_mover", "suppressor", "backup", "negative")),
    **dict.fromkeys(WRITERS, ("direct", ("logits",))),
}


def by_arm(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """(name, rows) of the arms in a table."""
    return cases_of(table, ["arm"], ARMS)


def graph(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Heads by class (across) and layer (upwards); lines are as wide as the sender's effect."""
    named, table = by_arm(first(next(iter(tables.values()))))[0]
    heads = table[table["role"] != ""]
    if heads.empty:
        return nothing("no head counts here"), heads
    figure, spots, edges = go.Figure(), places(heads), []
    end = (5.5, float(table["layer"].max()) + 2)
    for row in heads.itertuples():
        column, readers = FLOWS[row.role]
        effect, at = abs(getattr(row, column)), (row.layer, row.head)
        later = pairs(heads[heads["role"].isin(readers) & (heads["layer"] > row.layer)])
        ends = [(spots[reader], "{}.{}".format(*reader)) for reader in later]
        for spot, target in [*ends, *([(end, "logits")] if "logits" in readers else [])]:
            edges.append(("{}.{}".format(*at), target, row.role, effect))
            look = {"colour": rgba(ROLES[row.role][1], 0.45)}
            look["width"] = float(np.clip(4 * effect, 0.6, 7))
            figure.add_trace(line(*zip(spots[at], spot, strict=True), **look))
    for rows, _, (label, shade) in styled(heads, "role", ROLES):
        figure.add_trace(nodes(rows, [spots[at] for at in pairs(rows)], label, shade))
    look = {"mode": "text", "text": ["<b>logits</b>"], "textfont": {"color": INK}}
    figure.add_scatter(x=[end[0]], y=[end[1]], hoverinfo="skip", showlegend=False, **look)
    figure.update_xaxes(
        tickvals=list(range(len(ROLES))), showgrid=False, zeroline=False,
        ticktext=[label.replace(" ", "<br>") for label, _ in ROLES.values()],
        range=[-0.6, len(ROLES) - 0.4],
    )  # fmt: skip
    figure.update_yaxes(title={"text": f"layer of {named}"}, zeroline=False, range=[-1, end[1] + 1])
    figure.update_layout(height=560, showlegend=False)
    return figure, pd.DataFrame(edges, columns=["sender", "receiver", "role", "effect"])


def pairs(rows: pd.DataFrame) -> list[tuple[int, int]]:
    """(layer, head) of every row."""
    return list(zip(rows["layer"], rows["head"], strict=True))


def places(heads: pd.DataFrame) -> dict[tuple[int, int], tuple[float, int]]:
    """(layer, head) -> (x, y): a column for each class, in which its heads are spread out."""
    out = {}
    for x, role in enumerate(ROLES):
        own = pairs(heads[heads["role"] == role].sort_values(["layer", "head"]))
        for k, at in enumerate(own):
            out[at] = (x + 0.5 * (k - (len(own) - 1) / 2) / max(1, len(own) - 1), at[0])
    return out


def nodes(rows: pd.DataFrame, spots: list[tuple], label: str, shade: str) -> go.Scatter:
    """The heads of a class; names of neighbours in a layer take turns above and below."""
    layers, x, y = list(rows["layer"]), *zip(*spots, strict=True)
    turns = [("top center", "bottom center")[layers[:k].count(v) % 2] for k, v in enumerate(layers)]
    return points(
        x, y, label, shade, size=13, marker={"line": {"color": PAGE, "width": 1.5}},
        mode="markers+text", text=[f"{i}.{h}" for i, h in pairs(rows)],
        textfont={"size": 10, "color": INK},
        textposition=[
            "middle right" if layers.count(layer) == 1 else turn
            for layer, turn in zip(layers, turns, strict=True)
        ],
        hover="head %{text}<br>" + label,
    )  # fmt: skip
