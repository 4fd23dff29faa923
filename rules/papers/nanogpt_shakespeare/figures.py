"""The figure of the nanoGPT paper that is no core kind: what its models write."""

import textwrap
from typing import Any

import plotly.graph_objects as go

from pipeline.figures.kinds_maps import MONO
from pipeline.figures.parts import Drawn, chosen
from pipeline.figures.theme import GRID, literal


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
    cells = {"values": next(iter(shown.values())), **look}
    figure = go.Figure(go.Table(header=header, cells=cells))
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
