"""Figures of the nanoGPT paper that are no core kinds: what models write, and one excerpt."""

import textwrap
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from pipeline.figures.parts import Drawn, chosen, heat, points
from pipeline.figures.theme import GRID, PALETTE, axis, literal

MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


def samples(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """What each arm writes, and held-out text, side by side; the reader chooses the sample.

    Options: characters of each text (default 500), width of a column in characters (default 40).
    """
    frame = tables["language/samples"].copy()
    by_model = frame["writer"] == "model"
    order = sorted(frame["arm"].unique(), reverse=True)  # untrained, trained
    frame["writer"] = frame["arm"].where(by_model, frame["writer"])
    frame = frame[by_model | (frame["arm"] == order[0])]
    rank = lambda c: c.map([*order, "held out"].index)  # noqa: E731
    frame = frame.sort_values("writer", key=rank, kind="stable")
    n, width = options.get("characters", 500), options.get("width", 40)
    shown = {
        int(i): [[as_lines(t[:n], width)] for t in rows["text"]]
        for i, rows in frame.groupby("sample")
    }
    longest = max(t.count("<br>") + 1 for texts in shown.values() for (t,) in texts)
    writers = list(dict.fromkeys(frame["writer"]))
    cell = {"align": "left", "fill": {"color": "rgba(0,0,0,0)"}, "line": {"color": GRID}}
    look = {"font": {"family": MONO, "size": 11}, "height": 20, **cell}
    header = {"values": [f"<b>{literal(w)}</b>" for w in writers], **cell}
    figure = go.Figure(
        go.Table(header=header, cells={"values": next(iter(shown.values())), **look})
    )
    chosen(figure, {f"sample {i + 1}": [{"cells.values": [v]}, {}] for i, v in shown.items()})
    figure.update_layout(
        margin={"l": 4, "r": 4, "t": 8, "b": 4},
        height=round(60 + 14.5 * longest),
        meta={"min_width": round(len(writers) * (6.7 * width + 18))},  # a phone scrolls sideways
    )
    return figure, frame


def as_lines(text: str, width: int) -> str:
    """Text with its own line breaks, long lines broken, and nothing of it read as markup."""
    lines = [
        part
        for line in text.strip("\n").split("\n")
        for part in textwrap.wrap(line, width, drop_whitespace=False) or [""]
    ]
    return "<br>".join(literal(line) for line in lines)


def excerpt(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """The likeliest next character after every layer, along an excerpt; right ones are framed."""
    table = tables["language/excerpt"]
    arms = dict(iter(table.groupby("arm")))
    data = {arm: (field(t), right(t)) for arm, t in arms.items()}
    cells, marks = next(iter(data.values()))
    hover = "after %{y} layers, behind “%{customdata[0]}”: “%{text}” with %{z:.2f}<br>it is "
    field_of = heat(
        **cells, zmin=0, zmax=1, xgap=None, ygap=None, texttemplate="%{text}",
        textfont={"family": MONO, "size": 12},
        colorbar={"title": {"text": "probability", "side": "right"}},
        hover=hover + "“%{customdata[1]}”, given %{customdata[2]:.2f}",
    )  # fmt: skip
    frame = {"size": 15, "symbol": "square-open", "marker": {"line": {"width": 2}}}
    figure = go.Figure([field_of, points(**marks, name="right", colour=PALETTE[1], **frame)])
    keys = ("x", "y", "z", "text", "customdata")
    chosen(figure, {a: [{k: [f.get(k), m.get(k)] for k in keys}, {}] for a, (f, m) in data.items()})
    one = next(iter(arms.values()))
    top = one[one["layer"] == one["layer"].max()].sort_values("position")
    ticks = {"tickvals": top["position"].tolist(), "ticktext": shown(top["token"])}
    ticks |= {"range": [top["position"].min() - 0.5, top["position"].max() + 0.5]}
    depth = [-0.5, one["layer"].max() + 0.5]
    figure.update_layout(
        xaxis=axis("character read", tickangle=0, tickfont={"family": MONO}, **ticks),
        yaxis=axis("layers before the lens", dtick=1, range=depth),
        height=140 + 38 * one["layer"].nunique(),
        margin={"t": 32},
        meta={"min_width": 130 + 18 * len(top)},  # a phone scrolls sideways
    )
    return figure, table


def field(table: pd.DataFrame) -> dict[str, Any]:
    """x, y, z, text and customdata of the heat map."""
    top, text, token, target, given = (
        table.pivot(index="layer", columns="position", values=c)
        for c in ("p_top", "top", "token", "target", "p_target")
    )
    rows = zip(*(t.to_numpy() for t in (token, target, given)), strict=True)
    return {
        "x": top.columns.tolist(),
        "y": top.index.tolist(),
        "z": top.to_numpy().tolist(),
        "text": [shown(row) for row in text.to_numpy()],
        "customdata": [
            list(map(list, zip(shown(a), shown(b), p, strict=True))) for a, b, p in rows
        ],
    }


def right(table: pd.DataFrame) -> dict[str, Any]:
    """x and y of the cells whose likeliest character is the next one."""
    hits = table[table["top"] == table["target"]]
    return {"x": hits["position"].tolist(), "y": hits["layer"].tolist()}


def shown(characters: Any) -> list[str]:
    """Characters that can be seen: a space as ␣, a line break as ↵; never markup."""
    return ["␣" if c == " " else literal(c) for c in characters]
