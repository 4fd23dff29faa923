"""Figures of Towards Monosemanticity: widths, densities, and feature splitting; no torch."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from pipeline.figures.kinds_common import title_of
from pipeline.figures.parts import Drawn, Panels, line, points, steps
from pipeline.figures.theme import GRID, INK, PALETTE, axis, literal, rgba

ARMS = {"a": ("model a", PALETTE[0]), "b": ("model b", PALETTE[3]), "c": ("model c", PALETTE[4]),
        "untrained": ("untrained model", PALETTE[2])}  # fmt: skip
ULTRALOW = 1e-5


def widths(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Loss recovered, and L0, against width; one line a model and L1 coefficient.

    Crosses: the dictionary with random directions; open markers: without resampling.
    """
    frames = [t.assign(arm=n.split("/")[1]) for n, t in tables.items()]
    frame = pd.concat(frames).sort_values("d_sae", kind="stable", ignore_index=True)
    controls = [frame["frozen_decoder"].astype(bool), frame["sae"] == "unresampled"]
    kinds = np.select(controls, ["random directions", "no resampling"], "learned")
    panels, shown = Panels(["", ""], gap=(0.13, 0)), ("loss_recovered_zero", "l0")
    main = frame["l1_coefficient"].mode()[0]
    for (arm, l1), rows in frame.groupby(["arm", "l1_coefficient"], sort=False):
        name, ink = ARMS[arm]
        several = frame.loc[frame["arm"] == arm, "l1_coefficient"].nunique() > 1
        for how, part in rows.groupby(kinds[rows.index], sort=False):
            label = f"{name}, L1 {l1:g}" if several else name
            label = label if how == "learned" else f"{name}, {how}"
            symbol = {"learned": "circle", "random directions": "x"}.get(how, "circle-open")
            size = 13 if how == "no resampling" else 8
            look = {"width": 2 if l1 == main else 1, "customdata": part["sae"]}
            look["marker"] = {"symbol": symbol, "size": size, "color": ink}
            look["mode"] = "lines+markers" if how == "learned" else "markers"
            hover = f"%{{customdata}}, {label}<br>%{{x:,}} latents: %{{y:.3~g}}"
            for i, y in enumerate(shown):
                panels.add(i, line(part["d_sae"], part[y], label, ink, hover=hover, **look))
    ticks = sorted(frame["d_sae"].unique().tolist())
    x = axis("width: latents", type="log", tickvals=ticks, ticktext=[f"{v:,}" for v in ticks])
    trained = frame.loc[frame["arm"] != "untrained", shown[0]]
    limits = [min(0.0, trained.min()) - 0.05, 1.05]  # the untrained model's may be anything
    recovered = axis("MLP's loss recovered", tickformat=".0%", range=limits)
    l0 = axis(title_of("l0"), rangemode="tozero")
    columns = ["arm", "sae", "d_sae", "l1_coefficient", *shown, "dead_share", "delta_loss"]
    look = {"xaxis": x, "xaxis2": x, "yaxis": recovered, "yaxis2": l0}
    return panels.finish(480, top=96, **look), frame[columns]


def densities(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Share of units against log10 of how often they fire: every width of model a, and its neurons.

    Options: dictionaries, names, narrow first; bins a decade (default 4).
    """
    units = tables["latents/units"]
    units, names = units[units["arm"] == "a"], [*options["dictionaries"], "neurons"]
    low = np.floor(np.log10(1 / int(units["n_rows"].max())))
    edges = np.linspace(low, 0, int(-low * options.get("bins", 4)) + 1)
    figure, out = go.Figure(), []
    for i, name in enumerate(names):
        density = units.loc[units["group"] == name, "density"].to_numpy()
        count = np.histogram(np.log10(density[density > 0]), edges)[0]
        rare, dead = ((density > 0) & (density < ULTRALOW)).sum(), (density == 0).sum()
        neurons = name == "neurons"
        what, dash = ("neurons", "dot") if neurons else ("latents", "solid")
        label = f"{len(density):,} {what}: {dead:,} dead, {rare:,} ultralow"
        hover = f"{label}<br>10<sup>%{{x:.2f}}</sup>: %{{customdata:,}} {what}, %{{y:.1%}}"
        ink = PALETTE[1] if neurons else shade(i, len(names) - 1)
        look = {"dash": dash, "customdata": count, "hover": hover}
        figure.add_trace(steps(edges, count / len(density), label, ink, **look))
        columns = {"group": name, "low": edges[:-1], "high": edges[1:], "units": count}
        out.append(pd.DataFrame({**columns, "dead": dead, "ultralow": rare}))
    if low < (border := np.log10(ULTRALOW)):
        band = {"fillcolor": rgba(PALETTE[6], 0.15), "line_width": 0, "layer": "below"}
        note = {"annotation": {"text": "ultralow", "font": {"size": 11}}}
        figure.add_vrect(low, border, **band, **note, annotation_position="top left")
    ticks = list(range(int(low), 1))
    powers = {"tickvals": ticks, "ticktext": [f"10<sup>{t}</sup>" for t in ticks]}
    x = axis("share of tokens on which a unit fires (log scale)", **powers)
    y = axis("share of units", tickformat=".0%", rangemode="tozero")
    return figure.update_layout(xaxis=x, yaxis=y), pd.concat(out, ignore_index=True)


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
    units = tables["latents/units"].rename(columns={"group": "dictionary", "unit": "latent"})
    columns, frame = ["arm", "dictionary", "latent"], tables["latents/tree"]
    about = units[[*columns, "tokens", "density"]]
    frame = frame[frame["arm"] == "a"].merge(about, "left", on=columns)
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
        at = [placed.get((level - 1, parent), 0) for parent in rows["parent"]]
        order = rows.assign(at=at).sort_values(["at", "cosine"], ascending=[True, False])
        step = widest / len(order)
        placed |= {(level, n): (i + 0.5) * step - 0.5 for i, n in enumerate(order["latent"])}
    return [placed[level, i] for level, i in zip(frame["level"], frame["latent"], strict=True)]


def shown(tokens: str) -> str:
    """Tokens with their spaces seen; never markup."""
    return literal(tokens).replace(" · ", "\u2002").replace(" ", "␣")
