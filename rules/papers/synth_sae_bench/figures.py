"""Figures of SynthSAEBench; no torch. Each takes the paper's tables and the figure's options, and
returns a plotly figure and the numbers that it plots."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pipeline.report.theme import INK, PALETTE, SEQUENTIAL, axis, rgba, scale, selector

Drawn = tuple[go.Figure, pd.DataFrame]
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
    """The last milestone of each dictionary, mean over seeds."""
    last = table.groupby("dictionary")["n_samples"].transform("max")
    numbers = ["l0", "true_l0_first", "n_samples", *PANELS]
    rows = table[table["n_samples"] == last].groupby("dictionary")[numbers].mean().reset_index()
    return rows.assign(relative_l0=rows["l0"] / rows["true_l0_first"])


def pareto(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Every measure over L0, one line an architecture; published points as open circles.

    L0 is relative to that of as many features, the most frequent, as there are latents, so that
    ground truths of different sizes can be compared.
    Options: published, architecture -> {l0: [...], measure: [...], measure_sd: [...]}, and
    published_true_l0, what their L0 is divided by.
    """
    ours = finished(tables["recovery/dictionaries"]).assign(source="ours")
    ours["architecture"] = ours["dictionary"].map(architecture)
    theirs = [
        pd.DataFrame(v).assign(architecture=k, source="published")
        for k, v in options.get("published", {}).items()
    ]
    for table in theirs:
        table["relative_l0"] = table["l0"] / options["published_true_l0"]
    figure = make_subplots(
        rows=2, cols=3, subplot_titles=list(PANELS.values()), shared_xaxes=True,
        horizontal_spacing=0.09, vertical_spacing=0.12,
    )  # fmt: skip
    for name in [a for a in LOOK if a in set(ours["architecture"])]:
        rows = ours[ours["architecture"] == name].sort_values("l0")
        known = [t for t in theirs if t["architecture"].iloc[0] == name]
        for i, measure in enumerate(PANELS):
            place = {"row": i // 3 + 1, "col": i % 3 + 1}
            figure.add_trace(_ours(rows, measure, name, first=i == 0), **place)
            for table in known:
                if measure in table:
                    figure.add_trace(_published(table, measure, name), **place)
    if theirs:
        ring = {"symbol": "circle-open", "size": 11, "color": INK}
        entry = go.Scatter(x=[None], y=[None], mode="markers", marker=ring, name="published ± sd")
        figure.add_trace(entry, row=1, col=1)
    figure.update_xaxes(**axis("L0 ÷ true L0"), row=2)
    figure.update_annotations(font_size=12)
    figure.update_layout(height=600, margin={"t": 104}, legend={"y": 1.09})
    return figure, pd.concat([ours, *theirs], ignore_index=True)


def _ours(rows: pd.DataFrame, measure: str, name: str, first: bool) -> go.Scatter:
    label, colour = LOOK[name]
    return go.Scatter(
        x=rows["relative_l0"].tolist(),
        y=rows[measure].tolist(),
        mode="lines+markers",
        name=label,
        legendgroup=name,
        showlegend=first,
        line={"color": rgba(colour, 0.6), "width": 1.5},
        marker={
            "color": colour,
            "size": 7,
            "symbol": "x" if name == "random_decoder" else "circle",
        },
        customdata=rows[["l0", "n_samples"]].to_numpy().tolist(),
        hovertemplate=f"{label}, L0 %{{customdata[0]:.1f}}: %{{y:.4f}}<br>"
        "%{customdata[1]:,.0f} samples<extra></extra>",
    )


def _published(table: pd.DataFrame, measure: str, name: str) -> go.Scatter:
    label, colour = LOOK[name]
    sd = {"type": "data", "array": table[f"{measure}_sd"].tolist(), "thickness": 1, "width": 3}
    return go.Scatter(
        x=table["relative_l0"].tolist(),
        y=table[measure].tolist(),
        error_y=sd,
        customdata=table["l0"].tolist(),
        mode="markers",
        legendgroup=name,
        showlegend=False,
        marker={"color": colour, "size": 12, "symbol": "circle-open", "line": {"width": 1.5}},
        hovertemplate=f"{label}, published at L0 %{{customdata}}: %{{y:.4f}}<extra></extra>",
    )


def matched(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """How near the latents are to their matched features: a row a dictionary, a column a cosine."""
    table = tables["recovery/latents"]
    names = ordered(table["dictionary"])[::-1]
    shares, means = [], []
    for name in names:
        cosines = table.loc[table["dictionary"] == name, "matched_cosine"].dropna()
        shares.append(np.histogram(cosines, BINS)[0] / len(cosines))
        means.append(float(cosines.mean()))
    middle, labels = (BINS[:-1] + BINS[1:]) / 2, [titled(n) for n in names]
    heat = go.Heatmap(
        x=middle,
        y=labels,
        z=np.sqrt(shares),
        customdata=np.array(shares),
        colorscale=scale(SEQUENTIAL),
        colorbar={"title": {"text": "share of<br>latents"}, **_shares(np.max(shares))},
        hovertemplate="%{y}<br>|cos| %{x:.2f}: %{customdata:.2%} of the latents<extra></extra>",
    )
    mean = go.Scatter(
        x=means,
        y=labels,
        mode="markers",
        marker={
            "symbol": "diamond",
            "size": 9,
            "color": "#ffffff",
            "line": {"color": INK, "width": 1},
        },
        name="mean: MCC",
        hovertemplate="%{y}: MCC %{x:.4f}<extra></extra>",
    )
    figure = go.Figure([heat, mean])
    figure.update_xaxes(**axis("|cos| of a latent and its matched feature", range=[0, 1]))
    figure.update_yaxes(**axis(""))
    figure.update_layout(height=140 + 34 * len(names), showlegend=True)
    frame = pd.DataFrame(np.array(shares).T, columns=names).assign(cosine=middle)
    return figure, frame[["cosine", *names[::-1]]]


def _shares(largest: float) -> dict[str, Any]:
    """Ticks of a colour bar whose values are square roots of shares."""
    ticks = [t for t in (0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.8) if t <= largest]
    return {"tickvals": [t**0.5 for t in ticks], "ticktext": [f"{t:.0%}" for t in ticks]}


def frequency(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Mean |cos| of a true feature and its nearest latent, by how often the feature fires.

    The reader chooses the L0. Options: bins (default 24).
    """
    table = tables["recovery/features"]
    table = table[table["probability"] > 0]
    low, high = np.log10(table["probability"].min()), np.log10(table["probability"].max())
    edges = np.linspace(low, high, options.get("bins", 24) + 1)
    place = np.clip(np.digitize(np.log10(table["probability"]), edges) - 1, 0, len(edges) - 2)
    table = table.assign(bin=place)
    keys = ["dictionary", "bin"]
    frame = table.groupby(keys, as_index=False).agg(
        probability=("probability", "mean"), cosine=("cosine", "mean"), features=("cosine", "size"),
        recovered=("cosine", lambda c: float((c > 0.8).mean())),
    )  # fmt: skip
    names = ordered(frame["dictionary"])
    levels = sorted({n.rpartition("_")[2] for n in names}, key=["true", "low"].index)
    figure = go.Figure([_by_frequency(frame, n, n.endswith(levels[0])) for n in names])
    labels = {"true": "L0 of the most frequent features", "low": "low L0"}
    choices = {labels[k]: [{"visible": [n.endswith(f"_{k}") for n in names]}, {}] for k in levels}
    if len(levels) > 1:
        figure.update_layout(updatemenus=[selector(choices)])
    figure.update_xaxes(
        **axis("samples in which the feature is active", log=True, tickformat=".2~%")
    )
    figure.update_yaxes(**axis("mean |cos| of feature and nearest latent", range=[0, 1.03]))
    figure.update_layout(height=460)
    return figure, frame.drop(columns="bin")


def _by_frequency(frame: pd.DataFrame, name: str, visible: bool) -> go.Scatter:
    rows, colour = frame[frame["dictionary"] == name], LOOK[architecture(name)][1]
    label = titled(name).removesuffix(", low L0")  # the list says it
    dash = "dot" if architecture(name) == "random_decoder" else "solid"
    return go.Scatter(
        x=rows["probability"].tolist(),
        y=rows["cosine"].tolist(),
        mode="lines+markers",
        visible=visible,
        name=label,
        line={"color": colour, "width": 1.8, "dash": dash},
        marker={"size": 5},
        customdata=rows[["features", "recovered"]].to_numpy().tolist(),
        hovertemplate=f"{label}: %{{y:.3f}}<br>%{{customdata[0]:,}} features active in %{{x:.2%}} "
        "of samples, %{customdata[1]:.0%} of them above 0.8<extra></extra>",
    )
