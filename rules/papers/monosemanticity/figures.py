"""Figures of Towards Monosemanticity: widths, densities, universality, token entropy; no torch.

Each takes the paper's tables and the figure's options, and returns a plotly figure and the numbers
that it plots. Feature splitting is drawn in figures_splitting.py.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pipeline.job.source import import_file
from pipeline.report.kinds_common import title_of
from pipeline.report.theme import PALETTE, axis, rgba, selector

SPLITTING = Path(__file__).with_name("figures_splitting.py")
Drawn = tuple[go.Figure, pd.DataFrame]
LATENTS, NEURONS, NULL, UNTRAINED = PALETTE[0], PALETTE[1], PALETTE[6], PALETTE[2]
ARMS = {"a": ("model a", LATENTS), "b": ("model b", PALETTE[3]), "c": ("model c", PALETTE[4]),
        "untrained": ("untrained model", UNTRAINED)}  # fmt: skip
ULTRALOW = 1e-5


def widths(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Loss recovered, and L0, against width; one line a model and L1 coefficient.

    Crosses: the dictionary with random directions; open markers: without resampling.
    """
    frames = [t.assign(arm=n.split("/")[1]) for n, t in tables.items()]
    frame = pd.concat(frames, ignore_index=True).sort_values("d_sae", kind="stable")
    frame["frozen_decoder"] = frame["frozen_decoder"].astype(bool)
    figure = make_subplots(cols=2, horizontal_spacing=0.13)
    shown = ("loss_recovered_zero", "l0")
    for (arm, l1), rows in frame.groupby(["arm", "l1_coefficient"], sort=False):
        name, ink = ARMS[arm]
        several = frame.loc[frame["arm"] == arm, "l1_coefficient"].nunique() > 1
        rows = rows.assign(kind=[kind(r) for r in rows.to_dict("records")])
        for how, part in rows.groupby("kind", sort=False):
            label = f"{name}, L1 {l1:g}" if several else name
            label = label if how == "learned" else f"{name}, {how}"
            symbol = {"learned": "circle", "random directions": "x"}.get(how, "circle-open")
            size = 13 if how == "no resampling" else 8
            weight = 2 if l1 == frame["l1_coefficient"].mode()[0] else 1
            for column, y in enumerate(shown, 1):
                figure.add_scatter(
                    x=part["d_sae"],
                    y=part[y],
                    mode="lines+markers" if how == "learned" else "markers",
                    line={"color": ink, "width": weight},
                    marker={"symbol": symbol, "size": size, "color": ink},
                    name=label,
                    legendgroup=label,
                    showlegend=column == 1,
                    customdata=part["sae"],
                    hovertemplate=f"%{{customdata}}, {label}<br>%{{x:,}} latents: %{{y:.3~g}}"
                    "<extra></extra>",
                    row=1,
                    col=column,
                )
    ticks = sorted(frame["d_sae"].unique().tolist())
    x = axis("width: latents", type="log", tickvals=ticks, ticktext=[f"{v:,}" for v in ticks])
    trained = frame.loc[frame["arm"] != "untrained", shown[0]]
    limits = [min(0.0, trained.min()) - 0.05, 1.05]  # the untrained model's may be anything
    figure.update_layout(
        xaxis=x,
        xaxis2=x,
        yaxis=axis("MLP's loss recovered", tickformat=".0%", range=limits),
        yaxis2=axis(title_of("l0"), rangemode="tozero"),
    )
    columns = ["arm", "sae", "d_sae", "l1_coefficient", *shown, "dead_share", "delta_loss"]
    return figure, frame[columns]


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
    units = units[units["arm"] == "a"]
    groups = {n: units[units["group"] == n] for n in [*options["dictionaries"], "neurons"]}
    n_rows, per = int(units["n_rows"].max()), options.get("bins", 4)
    low = np.floor(np.log10(1 / n_rows))
    edges = np.linspace(low, 0, int(-low * per) + 1)
    middle, figure, out = (edges[:-1] + edges[1:]) / 2, go.Figure(), []
    for i, (name, group) in enumerate(groups.items()):
        density = group["density"].to_numpy()
        count = np.histogram(np.log10(density[density > 0]), edges)[0]
        rare, dead = ((density > 0) & (density < ULTRALOW)).sum(), (density == 0).sum()
        what = "neurons" if name == "neurons" else "latents"
        label = f"{len(group):,} {what}: {dead:,} dead, {rare:,} ultralow"
        dash = "dot" if name == "neurons" else "solid"
        ink = NEURONS if name == "neurons" else shade(i, len(groups) - 1)
        figure.add_scatter(
            x=middle,
            y=count / len(group),
            mode="lines",
            line={"shape": "hvh", "color": ink, "dash": dash, "width": 2},
            name=label,
            customdata=count,
            hovertemplate="10<sup>%{x:.2f}</sup>: %{customdata:,} " + what + ", %{y:.1%}",
        )
        columns = {"group": name, "low": edges[:-1], "high": edges[1:], "units": count}
        out.append(pd.DataFrame({**columns, "dead": dead, "ultralow": rare}))
    border = np.log10(ULTRALOW)
    if low < border:
        figure.add_vrect(
            x0=low, x1=border, fillcolor=rgba(NULL, 0.15), line_width=0, layer="below",
            annotation={"text": "ultralow", "font": {"size": 11}},
            annotation_position="top left",
        )  # fmt: skip
    ticks = list(range(int(low), 1))
    figure.update_layout(
        xaxis=axis("share of tokens on which a unit fires (log scale)", tickvals=ticks,
                   ticktext=[f"10<sup>{t}</sup>" for t in ticks]),
        yaxis=axis("share of units", tickformat=".0%", rangemode="tozero"),
    )  # fmt: skip
    return figure, pd.concat(out, ignore_index=True)


def shade(i: int, n: int) -> str:
    """The i-th of n shades, light to dark blue: narrow to wide."""
    return rgba(LATENTS, 0.35 + 0.65 * i / max(n - 1, 1))


UNIVERSAL = {
    "latents": ("latents", LATENTS, "solid"),
    "neurons": ("neurons", NEURONS, "solid"),
    "null_latents": ("latents, shifted rows", LATENTS, "dot"),
    "null_neurons": ("neurons, shifted rows", NEURONS, "dot"),
}


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
        share = np.histogram(values, edges)[0] / len(values)
        null = dash == "dot"
        figure.add_scatter(
            x=(edges[:-1] + edges[1:]) / 2,
            y=share,
            mode="lines",
            line={"shape": "hvh", "color": ink, "dash": dash, "width": 1.2 if null else 2},
            fill=None if null else "tozeroy",
            fillcolor=rgba(ink, 0.15),
            name=f"{len(values):,} {name}: median {values.median():.2f}",
            hovertemplate="correlation %{x:.2f}: %{y:.1%}",
        )
        if not null:
            figure.add_vline(x=values.median(), line={"color": ink, "dash": "dash", "width": 1.2})
        columns = {"kind": kind, "low": edges[:-1], "high": edges[1:], "share": share}
        out.append(pd.DataFrame({**columns, "median": values.median()}))
    frame = pd.concat(out, ignore_index=True)
    highest = frame.loc[~frame["kind"].str.startswith("null"), "share"].max()
    figure.update_layout(
        xaxis=axis("correlation with the best match in the model of another seed"),
        yaxis=axis("share of units", tickformat=".0%", range=[0, 1.15 * highest]),
    )
    return figure, frame


MEASURES = {
    "narrowing": "bits by which a unit narrows down the token",
    "said": "rank of the next token in what a unit says, above that of other rows",
    "top_entropy": "entropy of the tokens of the largest activations (bits)",
    "token_share": "share of the activation on the foremost token",
}


def purity(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Cumulative share of units against how many different tokens they stand for.

    Options: dictionary, the main one's name.
    """
    units, main = tables["latents/units"], options["dictionary"]
    trained = units[units["arm"] == "a"]
    groups = {
        "latents": (trained[trained["group"] == main], LATENTS, "solid"),
        "neurons": (trained[trained["group"] == "neurons"], NEURONS, "solid"),
        "random directions": (trained[trained["group"] == "random"], NULL, "dot"),
        "latents of the untrained model": (
            units[(units["arm"] == "untrained") & (units["group"] == main)],
            UNTRAINED,
            "dash",
        ),
    }
    figure, out, curves = go.Figure(), [], {m: [] for m in MEASURES}
    groups = {n: g for n, g in groups.items() if len(g[0])}
    for name, (group, ink, dash) in groups.items():
        for measure in MEASURES:
            values = np.sort(group[measure].dropna().to_numpy())
            at = np.unique(np.linspace(0, len(values) - 1, min(len(values), 300)).astype(int))
            x, y = values[at] if len(values) else values, (at + 1) / max(len(values), 1)
            curves[measure].append((x.tolist(), y.tolist() if len(values) else []))
            columns = {"group": name, "measure": measure, "value": x, "share": y[: len(x)]}
            out.append(pd.DataFrame(columns))
        x, y = curves["narrowing"][-1]
        figure.add_scatter(
            x=x, y=y, mode="lines", line={"color": ink, "dash": dash, "width": 2, "shape": "hv"},
            name=name, hovertemplate=f"{name}<br>%{{y:.0%}} have at most %{{x:.2f}}<extra></extra>",
        )  # fmt: skip
    choices = {
        text: [{"x": [c[0] for c in curves[m]], "y": [c[1] for c in curves[m]]},
               {"xaxis.title.text": text}]
        for m, text in MEASURES.items()
    }  # fmt: skip
    figure.update_layout(
        updatemenus=[selector(choices)],
        xaxis=axis(MEASURES["narrowing"]),
        yaxis=axis("cumulative share of units", tickformat=".0%", range=[0, 1.02]),
    )
    return figure, pd.concat(out, ignore_index=True)


def splitting(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """How many latents of each wider dictionary lie near one of the narrowest."""
    return import_file(SPLITTING).splitting(tables, options)


def tree(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """One latent of the narrowest dictionary, and those near it in wider ones."""
    return import_file(SPLITTING).tree(tables, options)
