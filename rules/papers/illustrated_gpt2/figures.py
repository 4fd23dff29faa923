"""Figures to look at a model with: what it says beside others, and where each head looks."""

from typing import Any

import plotly.graph_objects as go

from pipeline.figures import parts, theme
from pipeline.figures.kinds_maps import beginning
from pipeline.figures.parts import Drawn, as_lines, side_by_side

CELL = 26  # pixels
DIGITS = 2  # of an attention weight


def says(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """What some writers say to a prompt, side by side; the reader chooses prompt and temperature.

    Options: writers ([name, title], in order), width of a column in characters.
    """
    frame, writers = tables["shown/continuations"], dict(options["writers"])
    frame = frame[frame["writer"].isin(writers)]
    width = options.get("width", 40)
    shown = {}
    for (prompt, temperature), rows in frame.groupby(["prompt", "temperature"], sort=False):
        texts = rows.set_index("writer")["text"]
        name = f"{beginning(prompt)} (temperature {temperature:g})"
        shown[name] = [as_lines(prompt + texts[w], width, len(prompt)) for w in writers]
    return side_by_side(list(writers.values()), shown, width), frame


def attention(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """One head's attention on one text; the reader chooses text, layer and head.

    Options: model.
    """
    frame = tables["shown/attention"]
    frame = frame[frame["model"] == options["model"]]
    choices, several = {}, frame["text"].nunique() > 1
    for (_, layer, head), rows in frame.groupby(["text", "layer", "head"]):
        read = rows[rows["key"] == 0].sort_values("query")["query_token"].map(visible).tolist()
        tokens = [theme.literal(token) for token in read]
        weights = rows.pivot(index="query", columns="key", values="weight")
        z = [[None if v != v else round(v, DIGITS) for v in row] for row in weights.to_numpy()]
        ticks = {"tickvals": list(range(len(tokens))), "ticktext": tokens}
        change = {f"{axis}.{k}": v for axis in ("xaxis", "yaxis") for k, v in ticks.items()}
        name = f"{beginning(''.join(read))}: " if several else ""
        choices[f"{name}layer {layer}, head {head}"] = [{"z": [z]}, change, len(tokens), ticks]
    (first, _, _, ticks), *_ = choices.values()
    bar = {"title": {"text": "attention", "side": "right"}, "thickness": 10}
    scale = theme.scale(theme.SEQUENTIAL)
    hover = "from %{y} to %{x}: %{z:.2f}"
    field = parts.heat(first["z"][0], hover=hover, zmin=0, zmax=1, colorscale=scale, colorbar=bar)
    figure = parts.chosen(go.Figure(field), {n: c[:2] for n, c in choices.items()})
    most = max(n for _, _, n, _ in choices.values())
    bare = {"showgrid": False, "showline": False, "ticks": "", "tickfont": {"family": theme.MONO}}
    figure.update_xaxes(title="token that is looked at", tickangle=-60, **bare, **ticks)
    figure.update_yaxes(title="token that looks", autorange="reversed", **bare, **ticks)
    figure.update_layout(
        height=190 + CELL * most, margin={"t": 30}, meta={"min_width": 170 + CELL * most}
    )
    return figure, frame.drop(columns="model")


def visible(token: str) -> str:
    """A token whose spaces and line breaks can be seen."""
    return token.replace("\n", "↵").replace(" ", "·")
