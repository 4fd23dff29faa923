"""Overlap of dictionaries, and what tells the trained model from the null arms; no torch."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from pipeline.report.kinds_sae import ARCHITECTURES
from pipeline.report.theme import (
    INK,
    PAGE,
    PALETTE,
    SEQUENTIAL,
    axis,
    colour,
    literal,
    rgba,
    selector,
)

Drawn = tuple[go.Figure, pd.DataFrame]
ARMS = {
    "trained": "trained model",
    "reinit": "random weights",
    "shuffled": "trained model, shuffled tokens",
}
NAMES = ARCHITECTURES | {"random": "random directions"}
MEASURES = {
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
    frame = frame.groupby(["architecture_a", "architecture_b"])[["shared", "cosine"]].mean()
    frame = frame.reset_index()
    columns = [a for a in ARCHITECTURES if a in set(frame["architecture_b"])]
    rows = [*columns, "random"]
    cells = {}
    for row in frame.to_dict("records"):
        a, b = row["architecture_a"], row["architecture_b"]
        cells[a, b] = cells[b, a] = row
    grid = {
        m: [[cells.get((a, b), {}).get(m) for b in columns] for a in rows[::-1]]
        for m in ("shared", "cosine")
    }
    labels = [NAMES[a] for a in columns], [NAMES[a] for a in rows[::-1]]
    figure = go.Figure(
        go.Heatmap(
            x=labels[0],
            y=labels[1],
            z=grid["shared"],
            zmin=0,
            zmax=1,
            colorscale=[[i / (len(SEQUENTIAL) - 1), c] for i, c in enumerate(SEQUENTIAL)],
            texttemplate="%{z:.2f}",
            xgap=2,
            ygap=2,
            hovertemplate="%{y} with %{x}: %{z:.3f}<extra></extra>",
            showscale=False,
        )
    )
    names = {"shared": "share of matched latents above 0.7", "cosine": "mean matched cosine"}
    choices = {names[m]: [{"z": [grid[m]]}, {}] for m in names}
    figure.update_layout(
        updatemenus=[selector(choices)],
        margin={"t": 36},
        xaxis=axis("", showgrid=False, tickangle=-30),
        yaxis=axis("", showgrid=False),
    )
    return figure, frame


def cosines(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Distribution of matched cosines between two seeds, one line an architecture, and the null."""
    frame = tables["overlap/cosines"]
    frame = frame[frame["kind"].isin(["seeds", "random"])].copy()
    frame["group"] = np.where(frame["kind"] == "random", "random", frame["architecture_b"])
    frame = frame.groupby(["group", "low", "high"], as_index=False)["pairs"].sum()
    total = frame.groupby("group")["pairs"].transform("sum")
    frame["share"] = frame["pairs"] / total
    frame = frame[frame["high"] > 0]
    figure = go.Figure()
    for i, group in enumerate(a for a in NAMES if a in set(frame["group"])):
        rows = frame[frame["group"] == group]
        null = group == "random"
        figure.add_scatter(
            x=(rows["low"] + rows["high"]) / 2,
            y=rows["share"],
            mode="lines",
            line={
                "color": INK if null else colour(i),
                "dash": "dot" if null else "solid",
                "shape": "hvh",
                "width": 2,
            },
            name=NAMES[group],
            hovertemplate=f"{NAMES[group]}, cosine %{{x:.2f}}: %{{y:.1%}}<extra></extra>",
        )
    figure.add_vline(
        x=0.7,
        line={"color": PALETTE[-1], "dash": "dash", "width": 1},
        annotation={"text": "shared", "font": {"size": 11}},
        annotation_position="top right",
    )
    figure.update_layout(
        xaxis=axis("cosine of matched decoder rows", range=[0, 1]),
        yaxis=axis("share of matched latents", tickformat=".0%", rangemode="tozero"),
    )
    return figure, frame.drop(columns="pairs")


def entropy(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Histograms of latents' entropies, one colour an arm; the reader chooses the dictionary."""
    frame = tables["entropy/histogram"].copy()
    total = frame.groupby(["arm", "sae"])["latents"].transform("sum")
    frame["share"] = frame["latents"] / total.clip(lower=1)
    arms = [a for a in ARMS if a in set(frame["arm"])]
    covered = frame.groupby("sae")["arm"].nunique()  # some dictionaries are of one arm only
    saes = [s for s in dict.fromkeys(frame["sae"]) if covered[s] == len(arms)]

    def bars(sae: str, arm: str) -> pd.DataFrame:
        return frame[(frame["sae"] == sae) & (frame["arm"] == arm)]

    figure = go.Figure()
    for i, arm in enumerate(arms):
        rows = bars(saes[0], arm)
        middle = (rows["low"] + rows["high"]) / 2
        figure.add_bar(
            x=middle.tolist(),
            y=rows["share"].tolist(),
            name=ARMS[arm],
            marker={"color": rgba(colour(i), 0.55), "line": {"width": 0}},
            hovertemplate=f"{ARMS[arm]}, %{{x:.2f}} bits: %{{y:.1%}}<extra></extra>",
        )
    choices = {s: [{"y": [bars(s, a)["share"].tolist() for a in arms]}, {}] for s in saes}
    if len(choices) > 1:
        figure.update_layout(updatemenus=[selector(choices)])
    figure.update_layout(
        barmode="overlay",
        bargap=0.02,
        xaxis=axis("token-distribution entropy of a latent", "bits", rangemode="tozero"),
        yaxis=axis("share of latents", tickformat=".0%", rangemode="tozero"),
    )
    return figure, frame.drop(columns="latents")


def arms(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Bars: what each measure says of each arm, dictionaries side by side.

    The reader chooses between explained variance, which Heap et al. find to be similar, and the
    measures of entropy, which they find to differ.
    """
    found = tables["entropy/summary"]
    fits = pd.concat(
        [
            t[["sae", "explained_variance"]].assign(arm=n.removeprefix("evaluation/"))
            for n, t in tables.items()
            if n.startswith("evaluation/")
        ]
    )
    frame = found.merge(fits, on=["arm", "sae"], how="left")
    counted = frame.groupby("sae")["arm"].transform("nunique")
    frame = frame[counted > 1]
    measures = {"explained_variance": ("explained variance", ".2f")} | MEASURES
    shown = [a for a in ARMS if a in set(frame["arm"])]
    saes = list(dict.fromkeys(frame["sae"]))
    value = lambda m: [  # noqa: E731
        [float(frame.loc[(frame["sae"] == s) & (frame["arm"] == a), m].mean()) for s in saes]
        for a in shown
    ]
    figure = go.Figure()
    for i, (arm, heights) in enumerate(zip(shown, value("explained_variance"), strict=True)):
        figure.add_bar(
            x=[literal(s) for s in saes],
            y=heights,
            name=ARMS[arm],
            marker={"color": colour(i), "line": {"color": PAGE, "width": 1}},
            hovertemplate=f"{ARMS[arm]}, %{{x}}: %{{y:.3f}}<extra></extra>",
        )
    choices = {
        title: [{"y": value(m)}, {"yaxis.title.text": title, "yaxis.tickformat": form}]
        for m, (title, form) in measures.items()
    }
    figure.update_layout(
        barmode="group",
        updatemenus=[selector(choices)],
        xaxis=axis("dictionary"),
        yaxis=axis("explained variance", rangemode="tozero", tickformat=".2f"),
    )
    return figure, frame
