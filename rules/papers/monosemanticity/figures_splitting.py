"""Feature splitting, drawn: one latent's tree over widths, and how many latents split."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from pipeline.figures.parts import Drawn, line, points
from pipeline.figures.theme import GRID, INK, PALETTE, axis, literal, rgba


def shade(i: int, n: int) -> str:
    """The i-th of n shades, light to dark blue: narrow to wide."""
    return rgba(PALETTE[0], 0.35 + 0.65 * i / max(n - 1, 1))


def splitting(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Share of the narrowest dictionary's latents with at least n near ones, one line a width."""
    frame, figure, out = tables["latents/splitting"], go.Figure(), []
    frame = frame[frame["arm"] == "a"]
    groups = list(frame.groupby("wide", sort=False))
    for i, (wide, rows) in enumerate(groups):
        counts = np.arange(1, max(int(rows["n_near"].max()), 1) + 1)
        share = [(rows["n_near"] >= n).mean() for n in counts]
        name = f"{wide}: mean {rows['n_near'].mean():.2f} (null {rows['n_null'].mean():.2f})"
        look = {"marker": {"size": 5}, "hover": f"{wide}: %{{y:.1%}} have %{{x}} or more"}
        figure.add_trace(line(counts, share, name, shade(i, len(groups)), **look))
        null = [(rows["n_null"] >= n).mean() for n in counts]
        out.append(pd.DataFrame({"wide": wide, "n_near": counts, "share": share, "null": null}))
    figure.update_layout(
        xaxis=axis("near latents in the wider dictionary", log=True),
        yaxis=axis("share of the narrowest's latents", tickformat=".0%", rangemode="tozero"),
        showlegend=True,
    )
    return figure, pd.concat(out, ignore_index=True)


def tree(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """A latent of the narrowest dictionary and those near it in wider ones, with their tokens."""
    units = tables["latents/units"]
    units = units[units["arm"] == "a"].set_index(["group", "unit"])
    frame = tables["latents/tree"]
    frame = frame[frame["arm"] == "a"].copy()
    keys = list(zip(frame["dictionary"], frame["latent"], strict=True))
    frame["tokens"] = [units.loc[k, "tokens"] for k in keys]
    frame["density"] = [units.loc[k, "density"] for k in keys]
    frame["y"] = heights(frame)
    figure, at = go.Figure(), frame.set_index(["level", "latent"])
    for row in frame[frame["parent"] >= 0].itertuples():
        y = at.loc[(row.level - 1, row.parent), "y"]
        width = 1 + 3 * max(row.cosine_parent, 0)
        figure.add_trace(line([row.level - 1, row.level], [y, row.y], colour=GRID, width=width))
    leaf = frame["level"] == frame["level"].max()
    where = np.where(leaf, "middle right", "top center").tolist()
    rarest = np.log10(frame["density"].clip(lower=1e-7))
    hover = "%{customdata[0]}, latent %{customdata[1]}: fires on %{customdata[2]:.2%} of tokens"
    nodes = points(
        frame["level"], frame["y"], colour=PALETTE[0], size=10 + 5 * (rarest - rarest.min()),
        mode="markers+text", marker={"line": {"color": INK, "width": 0.5}},
        text=[f" {shown(t)}" for t in frame["tokens"]], textposition=where,
        textfont={"size": 11}, cliponaxis=False,
        customdata=frame[["dictionary", "latent", "density", "cosine"]],
        hover=hover + "<br>cosine with the first %{customdata[3]:.2f}",
    )  # fmt: skip
    figure.add_trace(nodes)
    levels = frame.drop_duplicates("level")
    widest = frame.groupby("level").size().max()
    figure.update_layout(
        xaxis=axis("dictionary, narrow to wide", tickvals=levels["level"].tolist(),
                   ticktext=levels["dictionary"].tolist(), showgrid=False,
                   range=[-0.2, levels["level"].max() + 0.9]),
        yaxis={"visible": False, "range": [-0.7, widest - 0.3]},
        height=140 + 42 * int(widest),
    )  # fmt: skip
    return figure, frame


def heights(frame: pd.DataFrame) -> list[float]:
    """Where each node stands: a level's nodes evenly spaced, in the order of their parents."""
    widest, placed = frame.groupby("level").size().max(), {}
    for level, rows in frame.groupby("level"):
        order = sorted(
            rows.itertuples(), key=lambda r: (placed.get((level - 1, r.parent), 0), -r.cosine)
        )
        step = widest / len(order)
        for i, row in enumerate(order):
            placed[level, row.latent] = (i + 0.5) * step - 0.5
    return [placed[level, i] for level, i in zip(frame["level"], frame["latent"], strict=True)]


def shown(tokens: str) -> str:
    """Tokens with their spaces seen; never markup."""
    return literal(tokens).replace(" · ", "\u2002").replace(" ", "␣")
