"""Figures of SynthSAEBench; no torch."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from pipeline.figures.parts import Drawn, Panels, heat, key, line, over_seeds, points, styled
from pipeline.figures.theme import INK, PALETTE, SEQUENTIAL, axis, rgba, scale

LOOK = {  # architecture of a dictionary's name -> what the legend says, colour
    "matryoshka": ("Matryoshka", PALETTE[0]),
    "batchtopk": ("BatchTopK", PALETTE[2]),
    "jumprelu": ("JumpReLU", PALETTE[5]),
    "matching_pursuit": ("Matching pursuit", PALETTE[1]),
    "standard": ("Standard (L1)", PALETTE[3]),
    "topk": ("TopK", PALETTE[4]),
    "gated": ("Gated", PALETTE[6]),
    "random_decoder": ("random decoder (null)", INK),
}
PANELS = {
    "f1": "F1", "mcc": "MCC", "explained_variance": "explained variance",
    "precision": "precision", "recall": "recall", "uniqueness": "uniqueness",
}  # fmt: skip
SWEPT = ("explained_variance", "f1", "mcc", "uniqueness")
LEVELS = {"true": "L0 of the most frequent features", "low": "low L0"}
BINS = np.linspace(0, 1, 41)  # of cosines


def architecture(dictionary: str) -> str:
    """'batchtopk' of 'batchtopk_true', 'standard' of 'standard_full_true'."""
    return max((a for a in LOOK if dictionary.startswith(f"{a}_")), key=len)


def ordered(names: Any) -> list[str]:
    """Dictionaries in the order of LOOK, the lower L0 first."""
    rank = list(LOOK)
    return sorted(set(names), key=lambda n: (rank.index(architecture(n)), n))


def titled(dictionary: str) -> str:
    """'BatchTopK, low L0'; 'Standard (L1), full' of the one that sees all samples."""
    full = ", full" if "_full_" in dictionary else ""
    low = ", low L0" if dictionary.endswith("_low") else ""
    return LOOK[architecture(dictionary)][0] + full + low


def finished(table: pd.DataFrame) -> pd.DataFrame:
    """Each dictionary, mean over seeds."""
    numbers = ["l0", "true_l0_first", "n_samples", *PANELS]
    rows = table.groupby("dictionary")[numbers].mean().reset_index()
    return rows.assign(relative_l0=rows["l0"] / rows["true_l0_first"])


def pareto(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Every measure over L0, a line for each architecture; published points as open circles.

    L0 is relative to that of as many features, the most frequent, as there are latents, so that
    ground truths of different sizes can be compared.
    Options: published, rows of sae, l0 and measures, each [mean, sd, ...]; and published_true_l0,
    what their L0 is divided by.
    """
    ours = finished(tables["recovery/dictionaries"]).assign(source="ours")
    ours["architecture"], theirs = ours["dictionary"].map(architecture), []
    for given in options["published"]:
        about = {"l0": given["l0"], "relative_l0": given["l0"] / options["published_true_l0"]}
        both = {m: given[m][:2] for m in PANELS if m in given}
        about |= {m: mean for m, (mean, _) in both.items()}
        about |= {f"{m}_sd": sd for m, (_, sd) in both.items()}
        theirs.append(about | {"architecture": given["sae"], "source": "published"})
    theirs = pd.DataFrame(theirs)
    panels = Panels(list(PANELS.values()), 3, gap=(0.09, 0.12), shared_xaxes=True)
    for rows, name, look in styled(ours.sort_values("l0"), "architecture", LOOK):
        given = theirs[theirs["architecture"] == name].dropna(axis="columns", how="all")
        for i, measure in enumerate(PANELS):
            panels.add(i, _ours(rows, measure, name, *look))
            if measure in given and len(given):
                panels.add(i, _published(given, measure, name, *look))
    panels.add(0, key("published ± sd", INK, "circle-open", size=11))
    panels.axes("L0 ÷ true L0")
    frame = pd.concat([ours, theirs], ignore_index=True)
    return panels.finish(600, legend=40, top=104), frame


def _ours(rows: pd.DataFrame, measure: str, name: str, label: str, colour: str) -> go.Scatter:
    symbol = "x" if name == "random_decoder" else "circle"
    hover = f"{label}, L0 %{{customdata[0]:.1f}}: %{{y:.4f}}<br>%{{customdata[1]:,.0f}} samples"
    return line(
        rows["relative_l0"], rows[measure], label, rgba(colour, 0.6), width=1.5,
        marker={"color": colour, "size": 7, "symbol": symbol}, legendgroup=name,
        customdata=rows[["l0", "n_samples"]].to_numpy().tolist(), hover=hover,
    )  # fmt: skip


def _published(table: pd.DataFrame, measure: str, name: str, label: str, colour: str) -> go.Scatter:
    sd = {"type": "data", "array": table[f"{measure}_sd"].tolist(), "thickness": 1, "width": 3}
    return points(
        table["relative_l0"], table[measure], "", colour, size=12, symbol="circle-open",
        marker={"line": {"width": 1.5}}, error_y=sd, legendgroup=name, customdata=table["l0"],
        hover=f"{label}, published at L0 %{{customdata}}: %{{y:.4f}}",
    )  # fmt: skip


def matched(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """How near latents are to their matched features: a row per dictionary, a column per cosine."""
    table = tables["recovery/latents"].dropna(subset="matched_cosine")
    names = ordered(table["dictionary"])[::-1]
    by_name = table.groupby("dictionary")["matched_cosine"]
    cosines = [by_name.get_group(name) for name in names]
    shares = np.array([np.histogram(c, BINS)[0] / len(c) for c in cosines])
    middle, labels = (BINS[:-1] + BINS[1:]) / 2, [titled(n) for n in names]
    ticks = [t for t in (0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.8) if t <= shares.max()]
    bar = {"tickvals": [t**0.5 for t in ticks], "ticktext": [f"{t:.0%}" for t in ticks]}
    field = heat(
        np.sqrt(shares), x=middle, y=labels, customdata=shares, colorscale=scale(SEQUENTIAL),
        colorbar={"title": {"text": "share of<br>latents"}, **bar}, xgap=None, ygap=None,
        hover="%{y}<br>|cos| %{x:.2f}: %{customdata:.2%} of the latents",
    )  # fmt: skip
    mean = points(
        [float(c.mean()) for c in cosines], labels, "mean: MCC", "#ffffff", size=9,
        symbol="diamond", marker={"line": {"color": INK, "width": 1}}, hover="%{y}: MCC %{x:.4f}",
    )  # fmt: skip
    figure = go.Figure([field, mean])
    figure.update_layout(
        xaxis=axis("|cos| of a latent and its matched feature", range=[0, 1]),
        yaxis=axis(""), height=140 + 34 * len(names), showlegend=True,
    )  # fmt: skip
    frame = pd.DataFrame(shares.T, columns=names).assign(cosine=middle)
    return figure, frame[["cosine", *names[::-1]]]


def frequency(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Mean |cos| of a true feature and its nearest latent, by how often the feature fires.

    The reader chooses the L0. Options: bins (default 24).
    """
    table = tables["recovery/features"]
    table = table[table["probability"] > 0]
    log = np.log10(table["probability"])
    edges = np.linspace(log.min(), log.max(), options.get("bins", 24) + 1)
    table = table.assign(bin=np.clip(np.digitize(log, edges) - 1, 0, len(edges) - 2))
    frame = table.groupby(["dictionary", "bin"], as_index=False).agg(
        probability=("probability", "mean"), cosine=("cosine", "mean"), features=("cosine", "size"),
        recovered=("cosine", lambda c: float((c > 0.8).mean())),
    )  # fmt: skip
    names, panels = ordered(frame["dictionary"]), Panels()
    levels = [level for level in LEVELS if any(n.endswith(f"_{level}") for n in names)]
    for name in names:
        rows = frame[frame["dictionary"] == name]
        label = titled(name).removesuffix(", low L0")  # the list says it
        hover = f"{label}: %{{y:.3f}}<br>%{{customdata[0]:,}} features active in %{{x:.2%}} of "
        trace = line(
            rows["probability"], rows["cosine"], label, LOOK[architecture(name)][1], width=1.8,
            dash="dot" if architecture(name) == "random_decoder" else "solid",
            marker={"size": 5}, customdata=rows[["features", "recovered"]].to_numpy().tolist(),
            hover=hover + "samples, %{customdata[1]:.0%} of them above 0.8",
        )  # fmt: skip
        panels.add(0, trace, case=levels.index(name.rpartition("_")[2]))
    panels.choose(LEVELS[level] for level in levels)
    x = axis("samples in which the feature is active", log=True, tickformat=".2~%")
    y = axis("mean |cos| of feature and nearest latent", range=[0, 1.03])
    return panels.finish(460, top=72, xaxis=x, yaxis=y), frame.drop(columns="bin")


def sweep(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """What the worlds of stage sweep do to each measure, a line for each dictionary.

    Options: worlds, in their order; x, a column of the table to place them by, or names, of each
    world; label, of the axis; columns of panels (4).
    """
    table, worlds = tables["sweep/worlds"], options["worlds"]
    names, columns = options.get("names"), options.get("columns", len(SWEPT))
    table = table[table["world"].isin(worlds)]
    table = table.assign(place=table["world"].map(worlds.index)).sort_values("place")
    panels = Panels([PANELS[m] for m in SWEPT], columns, gap=(0.24 / columns, 0.2))
    for rows, name, look in styled(table, "dictionary", LOOK):
        label, colour = look
        one = rows[rows["seed"] == rows["seed"].min()]
        x = one["world"].map(names) if names else one[options["x"]]
        for i, measure in enumerate(SWEPT):
            values = np.stack([s[measure].to_numpy() for _, s in rows.groupby("seed")])
            hover = f"{label}, %{{x}}: %{{y:.4f}}"
            marker = {"size": 6, "symbol": "x" if name == "random_decoder" else "circle"}
            panels.add(i, *over_seeds(x.tolist(), values, label, colour, hover, marker=marker))
    panels.axes(options["label"])
    about = ["world", "dictionary", "seed", "d_model", "roots", "correlation_scale", "overlap"]
    height = 130 + 270 * panels.rows
    return panels.finish(height, legend=40, top=96), table[[*about, *SWEPT]]
