"""Overlap of dictionaries, and what tells the trained model from the null arms; no torch."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from pipeline.figures.kinds_sae import ARCHITECTURES
from pipeline.figures.parts import Drawn, bars, chosen, heat, line
from pipeline.figures.theme import (
    INK,
    PAGE,
    PALETTE,
    SEQUENTIAL,
    axis,
    colour,
    literal,
    rgba,
    scale,
)

ARMS = {
    "trained": "trained model",
    "reinit": "random weights",
    "shuffled": "trained model, shuffled tokens",
}
NAMES = ARCHITECTURES | {"random": "random directions"}
OVERLAP = {"shared": "share of matched latents above 0.7", "cosine": "mean matched cosine"}
MEASURES = {
    "explained_variance": ("explained variance", ".2f"),
    "mean": ("mean token-distribution entropy (bits)", ".2f"),
    "single": ("share of latents below 1 bit", ".0%"),
    "auroc": ("P(a latent of the trained model has the larger entropy)", ".2f"),
}


def overlap(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Matrix of architectures: between seeds on the diagonal, across architectures off it.

    The last row is the null. The reader chooses between the share of shared latents and the mean
    cosine.
    """
    frame = tables["overlap/pairs"]
    frame = frame[frame["kind"].isin(["seeds", "architectures", "random"])]
    frame = frame.groupby(["architecture_a", "architecture_b"])[list(OVERLAP)].mean().reset_index()
    columns = [a for a in ARCHITECTURES if a in set(frame["architecture_b"])]
    rows, cells = ["random", *columns[::-1]], {}
    for row in frame.to_dict("records"):
        a, b = row["architecture_a"], row["architecture_b"]
        cells[a, b] = cells[b, a] = row
    grid = {m: [[cells.get((a, b), {}).get(m) for b in columns] for a in rows] for m in OVERLAP}
    field = heat(
        grid["shared"], x=[NAMES[a] for a in columns], y=[NAMES[a] for a in rows], zmin=0, zmax=1,
        colorscale=scale(SEQUENTIAL), texttemplate="%{z:.2f}", xgap=2, ygap=2, showscale=False,
        hover="%{y} with %{x}: %{z:.3f}",
    )  # fmt: skip
    figure = chosen(go.Figure(field), {n: [{"z": [grid[m]]}, {}] for m, n in OVERLAP.items()})
    x, y = axis("", showgrid=False, tickangle=-30), axis("", showgrid=False)
    return figure.update_layout(margin={"t": 36}, xaxis=x, yaxis=y), frame


def cosines(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Distribution of matched cosines between two seeds, one line an architecture, and the null."""
    frame = tables["overlap/cosines"]
    frame = frame[frame["kind"].isin(["seeds", "random"])].copy()
    frame["group"] = np.where(frame["kind"] == "random", "random", frame["architecture_b"])
    frame = frame.groupby(["group", "low", "high"], as_index=False)["pairs"].sum()
    frame["share"] = frame["pairs"] / frame.groupby("group")["pairs"].transform("sum")
    frame = frame[frame["high"] > 0]
    figure = go.Figure()
    for i, group in enumerate(a for a in NAMES if a in set(frame["group"])):
        rows, null, name = frame[frame["group"] == group], group == "random", NAMES[group]
        look = {"colour": INK if null else colour(i), "dash": "dot" if null else "solid"}
        look |= {"shape": "hvh", "hover": f"{name}, cosine %{{x:.2f}}: %{{y:.1%}}"}
        figure.add_trace(line((rows["low"] + rows["high"]) / 2, rows["share"], name, **look))
    figure.add_vline(
        0.7, line={"color": PALETTE[-1], "dash": "dash", "width": 1},
        annotation={"text": "shared", "font": {"size": 11}}, annotation_position="top right",
    )  # fmt: skip
    x = axis("cosine of matched decoder rows", range=[0, 1])
    y = axis("share of matched latents", tickformat=".0%", rangemode="tozero")
    return figure.update_layout(xaxis=x, yaxis=y), frame.drop(columns="pairs")


def entropy(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Histograms of latents' entropies, one colour an arm; the reader chooses the dictionary."""
    frame = tables["entropy/histogram"].copy()
    total = frame.groupby(["arm", "sae"])["latents"].transform("sum")
    frame["share"] = frame["latents"] / total.clip(lower=1)
    arms = [a for a in ARMS if a in set(frame["arm"])]
    covered = frame.groupby("sae")["arm"].nunique()  # some dictionaries are of one arm only
    saes = [s for s in dict.fromkeys(frame["sae"]) if covered[s] == len(arms)]
    of = dict(iter(frame.groupby(["sae", "arm"])))
    figure = go.Figure()
    for i, arm in enumerate(arms):
        rows, hover = of[saes[0], arm], f"{ARMS[arm]}, %{{x:.2f}} bits: %{{y:.1%}}"
        middle, look = (
            ((rows["low"] + rows["high"]) / 2).tolist(),
            {"marker": {"line": {"width": 0}}},
        )
        shade = rgba(colour(i), 0.55)
        figure.add_trace(
            bars(middle, rows["share"].tolist(), ARMS[arm], shade, hover=hover, **look)
        )
    chosen(figure, {s: [{"y": [of[s, a]["share"].tolist() for a in arms]}, {}] for s in saes})
    x = axis("token-distribution entropy of a latent", "bits", rangemode="tozero")
    y = axis("share of latents", tickformat=".0%", rangemode="tozero")
    figure.update_layout(barmode="overlay", bargap=0.02, xaxis=x, yaxis=y)
    return figure, frame.drop(columns="latents")


def arms(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Bars: what each measure says of each arm, dictionaries side by side.

    The reader chooses between explained variance, which Heap et al. find to be similar, and the
    measures of entropy, which they find to differ.
    """
    fits = [
        table[["sae", "explained_variance"]].assign(arm=name.removeprefix("evaluation/"))
        for name, table in tables.items()
        if name.startswith("evaluation/")
    ]
    frame = tables["entropy/summary"].merge(pd.concat(fits), on=["arm", "sae"], how="left")
    frame = frame[frame.groupby("sae")["arm"].transform("nunique") > 1]
    mean = frame.groupby(["arm", "sae"])[list(MEASURES)].mean()
    shown, saes = [a for a in ARMS if a in set(frame["arm"])], list(dict.fromkeys(frame["sae"]))
    heights = {m: [mean.loc[a, m].reindex(saes).tolist() for a in shown] for m in MEASURES}
    figure = go.Figure()
    for i, (arm, y) in enumerate(zip(shown, heights["explained_variance"], strict=True)):
        look = {"marker": {"line": {"color": PAGE, "width": 1}}}
        hover = f"{ARMS[arm]}, %{{x}}: %{{y:.3f}}"
        x = [literal(s) for s in saes]
        figure.add_trace(bars(x, y, ARMS[arm], colour(i), hover=hover, **look))
    choices = {
        title: [{"y": heights[m]}, {"yaxis.title.text": title, "yaxis.tickformat": form}]
        for m, (title, form) in MEASURES.items()
    }
    y = axis("explained variance", rangemode="tozero", tickformat=".2f")
    chosen(figure, choices).update_layout(barmode="group", xaxis=axis("dictionary"), yaxis=y)
    return figure, frame
