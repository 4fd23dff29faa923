"""Figures of Towards Monosemanticity: widths, densities, universality, token entropy; no torch.

Feature splitting is drawn in figures_splitting.py.
"""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from pipeline.figures.kinds_common import title_of
from pipeline.figures.parts import Drawn, Panels, chosen, line, steps
from pipeline.figures.theme import PALETTE, axis, rgba

from .figures_splitting import shade, splitting, tree

__all__ = ["densities", "purity", "splitting", "tree", "universality", "widths"]

LATENTS, NEURONS, NULL, UNTRAINED = PALETTE[0], PALETTE[1], PALETTE[6], PALETTE[2]
ARMS = {"a": ("model a", LATENTS), "b": ("model b", PALETTE[3]), "c": ("model c", PALETTE[4]),
        "untrained": ("untrained model", UNTRAINED)}  # fmt: skip
UNIVERSAL = {
    "latents": ("latents", LATENTS, "solid"),
    "neurons": ("neurons", NEURONS, "solid"),
    "null_latents": ("latents, shifted rows", LATENTS, "dot"),
    "null_neurons": ("neurons, shifted rows", NEURONS, "dot"),
}
MEASURES = {
    "narrowing": "bits by which a unit narrows down the token",
    "said": "rank of the next token in what a unit says, above that of other rows",
    "top_entropy": "entropy of the tokens of the largest activations (bits)",
    "token_share": "share of the activation on the foremost token",
}
SHARE = axis("share of units", tickformat=".0%", rangemode="tozero")
ULTRALOW = 1e-5


def widths(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Loss recovered, and L0, against width; one line a model and L1 coefficient.

    Crosses: the dictionary with random directions; open markers: without resampling.
    """
    frames = [t.assign(arm=n.split("/")[1]) for n, t in tables.items()]
    frame = pd.concat(frames, ignore_index=True).sort_values("d_sae", kind="stable")
    frame["frozen_decoder"] = frame["frozen_decoder"].astype(bool)
    panels, shown = Panels(["", ""], gap=(0.13, 0)), ("loss_recovered_zero", "l0")
    main = frame["l1_coefficient"].mode()[0]
    for (arm, l1), rows in frame.groupby(["arm", "l1_coefficient"], sort=False):
        name, ink = ARMS[arm]
        several = frame.loc[frame["arm"] == arm, "l1_coefficient"].nunique() > 1
        rows = rows.assign(kind=[kind(r) for r in rows.to_dict("records")])
        for how, part in rows.groupby("kind", sort=False):
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


def kind(row: dict[str, Any]) -> str:
    """What a dictionary of an evaluation table is: learned, or one of the two controls."""
    if row["frozen_decoder"]:
        return "random directions"
    return "no resampling" if row["sae"] == "unresampled" else "learned"


def densities(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Share of units against log10 of how often they fire: every width of model a, and its neurons.

    Options: dictionaries, names, narrow first; bins a decade (default 4).
    """
    units = tables["latents/units"]
    units, names = units[units["arm"] == "a"], [*options["dictionaries"], "neurons"]
    low = np.floor(np.log10(1 / int(units["n_rows"].max())))
    edges, figure, out = (
        np.linspace(low, 0, int(-low * options.get("bins", 4)) + 1),
        go.Figure(),
        [],
    )
    for i, name in enumerate(names):
        density = units.loc[units["group"] == name, "density"].to_numpy()
        count = np.histogram(np.log10(density[density > 0]), edges)[0]
        rare, dead = ((density > 0) & (density < ULTRALOW)).sum(), (density == 0).sum()
        neurons = name == "neurons"
        what, dash = ("neurons", "dot") if neurons else ("latents", "solid")
        label = f"{len(density):,} {what}: {dead:,} dead, {rare:,} ultralow"
        hover = f"{label}<br>10<sup>%{{x:.2f}}</sup>: %{{customdata:,}} {what}, %{{y:.1%}}"
        ink = NEURONS if neurons else shade(i, len(names) - 1)
        look = {"dash": dash, "customdata": count, "hover": hover}
        figure.add_trace(steps(edges, count / len(density), label, ink, **look))
        columns = {"group": name, "low": edges[:-1], "high": edges[1:], "units": count}
        out.append(pd.DataFrame({**columns, "dead": dead, "ultralow": rare}))
    if low < (border := np.log10(ULTRALOW)):
        band = {"fillcolor": rgba(NULL, 0.15), "line_width": 0, "layer": "below"}
        note = {"annotation": {"text": "ultralow", "font": {"size": 11}}}
        figure.add_vrect(low, border, **band, **note, annotation_position="top left")
    ticks = list(range(int(low), 1))
    powers = {"tickvals": ticks, "ticktext": [f"10<sup>{t}</sup>" for t in ticks]}
    x = axis("share of tokens on which a unit fires (log scale)", **powers)
    return figure.update_layout(xaxis=x, yaxis=SHARE), pd.concat(out, ignore_index=True)


def universality(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Histogram of best-match correlations, latents and neurons, each with its null.

    Options: bins (default 40).
    """
    found = tables["latents/matches"]
    found = found[found["arm"] == "a"]
    lowest = min(0.0, np.floor(found["correlation"].min() * 10) / 10)
    edges = np.linspace(lowest, 1, options.get("bins", 40) + 1)
    figure, out = go.Figure(), []
    for kind, (name, ink, dash) in UNIVERSAL.items():
        values = found.loc[found["kind"] == kind, "correlation"]
        if values.empty:
            continue
        share, null = np.histogram(values, edges)[0] / len(values), dash == "dot"
        label = f"{len(values):,} {name}: median {values.median():.2f}"
        look = {"dash": dash, "width": 1.2 if null else 2, "fillcolor": rgba(ink, 0.15)}
        look |= {"fill": None if null else "tozeroy"}
        hover = f"{label}<br>correlation %{{x:.2f}}: %{{y:.1%}}"
        figure.add_trace(steps(edges, share, label, ink, hover=hover, **look))
        if not null:
            figure.add_vline(values.median(), line={"color": ink, "dash": "dash", "width": 1.2})
        columns = {"kind": kind, "low": edges[:-1], "high": edges[1:], "share": share}
        out.append(pd.DataFrame({**columns, "median": values.median()}))
    frame = pd.concat(out, ignore_index=True)
    highest = frame.loc[~frame["kind"].str.startswith("null"), "share"].max()
    x = axis("correlation with the best match in the model of another seed")
    y = axis("share of units", tickformat=".0%", range=[0, 1.15 * highest])
    return figure.update_layout(xaxis=x, yaxis=y), frame


def purity(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Cumulative share of units against how many different tokens they stand for.

    Options: dictionary, the main one's name.
    """
    units, main = tables["latents/units"], options["dictionary"]
    looks = {
        "latents": ("a", main, LATENTS, "solid"),
        "neurons": ("a", "neurons", NEURONS, "solid"),
        "random directions": ("a", "random", NULL, "dot"),
        "latents of the untrained model": ("untrained", main, UNTRAINED, "dash"),
    }
    figure, out, curves = go.Figure(), [], {m: [] for m in MEASURES}
    for name, (arm, group, ink, dash) in looks.items():
        rows = units[(units["arm"] == arm) & (units["group"] == group)]
        if rows.empty:
            continue
        for measure in MEASURES:
            x, y = cumulative(rows[measure])
            curves[measure].append((x.tolist(), y.tolist()))
            columns = {"group": name, "measure": measure, "value": x, "share": y}
            out.append(pd.DataFrame(columns))
        hover = f"{name}<br>%{{y:.0%}} have at most %{{x:.2f}}"
        look = {"dash": dash, "shape": "hv", "hover": hover}
        figure.add_trace(line(*curves["narrowing"][-1], name, ink, **look))
    choices = {
        text: [dict(zip("xy", map(list, zip(*curves[m], strict=True)), strict=True)),
               {"xaxis.title.text": text}]
        for m, text in MEASURES.items()
    }  # fmt: skip
    y = axis("cumulative share of units", tickformat=".0%", range=[0, 1.02])
    chosen(figure, choices).update_layout(xaxis=axis(MEASURES["narrowing"]), yaxis=y)
    return figure, pd.concat(out, ignore_index=True)


def cumulative(values: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """At most 300 values, ascending, and the share of all that is not larger than each."""
    values = np.sort(values.dropna().to_numpy())
    at = np.unique(np.linspace(0, len(values) - 1, min(len(values), 300)).astype(int))
    return values[at], (at + 1) / max(len(values), 1)
