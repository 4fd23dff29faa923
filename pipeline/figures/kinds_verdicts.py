"""The kind `verdicts`: how far each claim is from what decides it, and how sure that is."""

from typing import Any

import numpy as np

from pipeline.figures import theme
from pipeline.figures.kinds_common import need

COLOURS = {
    "reproduced": theme.PALETTE[2],
    "not reproduced": theme.PALETTE[1],
    "undecided": theme.PALETTE[4],
    "says nothing": theme.PALETTE[3],
    "plumbing": theme.PALETTE[6],
}
ROW = 26  # pixels a claim


def distances(claims: Any) -> Any:
    """One row per judged claim: where it stands and its interval, in the unit of its own border.

    An order: the median margin over seeds and its interval, divided by the largest of them; it
    holds above 0. A value: (ours - paper) / tolerance and the interval of the mean; it holds from
    -1 to 1. A value with a tolerance of zero, which has no such unit, is left out.
    """
    import pandas as pd

    rows = claims[claims["verdict"].isin(list(COLOURS))].copy()
    rows["held_of"] = [
        f"{k:.0f} of {n:.0f} seeds" if n > 1 else "one seed"
        for k, n in rows[["held", "n"]].fillna(1).to_numpy()
    ]
    orders = rows[(rows["kind"] == "order") & rows["margin"].notna()]
    size = orders[["margin", "low", "high"]].abs().max(axis=1).replace(0, 1)
    orders = orders.assign(at=orders["margin"] / size)
    orders = orders.assign(low=orders["low"] / size, high=orders["high"] / size)
    values = rows[(rows["kind"] == "value") & (rows["tolerance"] > 0)]
    ours, paper = (pd.to_numeric(values[c]) for c in ("ours", "paper_value"))
    unit = values["tolerance"]
    values = values.assign(at=(ours - paper) / unit)
    values = values.assign(low=(values["low"] - paper) / unit, high=(values["high"] - paper) / unit)
    columns = ["id", "text", "of", "kind", "verdict", "at", "low", "high", "held_of"]
    return pd.concat([orders, values])[columns].reset_index(drop=True)


def verdicts(tables: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Any]:
    """A row a claim, orders over values: where it stands, its interval, and the border."""
    from plotly.subplots import make_subplots

    from pipeline.figures.parts import nothing

    (claims,) = tables.values()
    need(claims, ["id", "verdict", "kind", "margin", "low", "high", "held", "n"], "claims")
    frame = distances(claims)
    if frame.empty:
        return nothing("no claim is judged in this run"), frame
    kinds = [k for k in ("order", "value") if (frame["kind"] == k).any()]
    sizes = [int((frame["kind"] == k).sum()) for k in kinds]
    fig = make_subplots(
        rows=len(kinds),
        row_heights=[s + 1.5 for s in sizes],
        vertical_spacing=90 / (ROW * (sum(sizes) + 1.5 * len(sizes)) + 110),
    )
    for row, kind in enumerate(kinds, 1):
        draw(fig, frame[frame["kind"] == kind].iloc[::-1], row, shown=row == 1)
    seen = {t.name: t for t in reversed(fig.data)}
    fig.for_each_trace(lambda t: t.update(showlegend=seen[t.name] is t))
    fig.update_layout(height=ROW * (sum(sizes) + 2 * len(sizes)) + 130)
    return fig, frame


def label(id: str) -> str:
    """A claim's id as words."""
    return theme.literal(id.replace("_", " "))


def draw(fig: Any, rows: Any, row: int, *, shown: bool) -> None:
    """One panel: rows of orders, or of values."""
    value = rows["kind"].iloc[0] == "value"
    names = [label(n) for n in rows["id"]]
    for verdict, colour in COLOURS.items():
        some = rows[rows["verdict"] == verdict]
        if some.empty:
            continue
        bounded = some["low"].notna() & np.isfinite(some["low"]) & np.isfinite(some["high"])
        fig.add_scatter(
            x=some["at"],
            y=[label(n) for n in some["id"]],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": (some["high"] - some["at"]).where(bounded, 0).tolist(),
                "arrayminus": (some["at"] - some["low"]).where(bounded, 0).tolist(),
                "width": 4,
                "thickness": 1.6,
            },
            mode="markers",
            marker={"color": colour, "size": 8},
            name=verdict,
            legendgroup=verdict,
            hovertext=[theme.literal(f"{r.text} ({r.held_of})") for r in some.itertuples()],
            hoverinfo="text",
            row=row,
            col=1,
        )
    if value:
        fig.add_vrect(-1, 1, fillcolor=theme.rgba(theme.PALETTE[-1], 0.18), line_width=0,
                      layer="below", row=row, col=1)  # fmt: skip
    title = "(ours − paper) / tolerance" if value else "margin (of its own largest)"
    border = {"zeroline": True, "zerolinecolor": theme.INK, "zerolinewidth": 1.5}
    fig.update_xaxes(theme.axis(title, **border), row=row, col=1)
    fig.update_yaxes(categoryorder="array", categoryarray=names, showgrid=True, row=row, col=1)
