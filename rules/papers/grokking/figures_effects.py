"""What frequencies do: the neurons that they explain, and the loss without them."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pipeline.job.source import import_file
from pipeline.report.theme import INK, PALETTE, axis, rgba, selector

common = import_file(Path(__file__).with_name("figures_common.py"))
SINGLE = 0.85
EDITS = {  # edit of fourier/edits, set -> what was done
    ("full", "test"): "nothing",
    ("restricted", "test"): "keep key waves of a + b (restricted)",
    ("blocks", "test"): "keep key frequencies (8 terms each)",
    ("formula", "test"): "logits := Σ α cos w(a + b − c)",
    ("polynomials", "test"): "neurons := one-frequency polynomials",
    ("neuron_waves", "test"): "neurons := key waves of a + b",
    ("directions", "test"): "neurons := part along u, v",
    ("nullspace", "test"): "neurons := part off u, v",
    ("excluded", "train"): "drop key waves (excluded; training)",
    ("without_blocks", "test"): "drop key frequencies (8 terms each)",
}


def neurons(tables: dict[str, Any], options: dict[str, Any]) -> tuple[go.Figure, pd.DataFrame]:
    """Share of each neuron that its best frequency explains, and neurons of each frequency."""
    table = tables["fourier/neurons"]
    first, last = table["step"].min(), table["step"].max()
    looks = {
        "trained": ("decay", last, common.EXCLUDED),  # no colour of a frequency
        "trained without weight decay": ("no_decay", last, common.RESTRICTED),
        "before training": ("decay", first, PALETTE[6]),
    }
    figure = make_subplots(
        rows=2,
        cols=1,
        vertical_spacing=0.24,
        row_heights=[0.55, 0.45],
        subplot_titles=["all neurons of all seeds", "neurons of one frequency (> 85 %)"],
    )
    edges = np.linspace(0, 1, 41)
    frames = []
    for name, (arm, step, colour) in looks.items():
        shares = table.loc[(table["arm"] == arm) & (table["step"] == step), "share"]
        count = np.histogram(shares, edges)[0] / max(len(shares), 1)
        figure.add_trace(
            go.Bar(
                x=100 * (edges[:-1] + edges[1:]) / 2,
                y=100 * count,
                name=name,
                marker_color=rgba(colour, 0.75),
                hovertemplate=f"{name}<br>%{{x:.0f}} % explained: %{{y:.1f}} % of the neurons"
                "<extra></extra>",
            ),
            row=1,
            col=1,
        )
        frames.append(pd.DataFrame({"what": name, "share_from": edges[:-1], "neurons": count}))
    line = {"color": INK, "width": 1, "dash": "dot"}
    figure.add_vline(x=100 * SINGLE, line=line, row=1, col=1)
    choices, shown = {}, None
    for seed in common.seeds(table):
        rows = common.model(tables["fourier/frequencies"], "decay", seed)
        colours = np.where(rows["key"], common.KEY, common.OTHER).tolist()
        data = {"x": rows["frequency"].tolist(), "y": rows["neurons"].tolist()}
        shown = shown or (data, colours)
        changes = {key: [value] for key, value in data.items()} | {"marker.color": [colours]}
        choices[f"seed {seed}"] = [changes, {}, [len(looks)]]
        frames.append(rows[["seed", "frequency", "key", "neurons"]].assign(what="frequency"))
    bar = go.Bar(**shown[0], marker_color=shown[1], showlegend=False)
    bar.hovertemplate = "k = %{x}: %{y} neurons<extra></extra>"
    figure.add_trace(bar, row=2, col=1)
    for name, colour in (("key frequency", common.KEY), ("other frequency", common.OTHER)):
        figure.add_trace(common.legend_square(name, colour), row=2, col=1)
    best = axis("variance that the best frequency explains", "%", range=[0, 101])
    figure.update_xaxes(**best, row=1, col=1)
    figure.update_yaxes(**axis("share of neurons", "%"), row=1, col=1)
    figure.update_xaxes(**axis("frequency k"), row=2, col=1)
    figure.update_yaxes(**axis("neurons", rangemode="tozero"), row=2, col=1)
    figure.update_layout(
        updatemenus=[selector(choices)],
        height=620,
        barmode="overlay",
        bargap=0.05,
        margin={"t": 84},
        legend={"y": 1.08},
    )
    figure.update_annotations(font_size=12)
    return figure, pd.concat(frames, ignore_index=True)


def ablation(tables: dict[str, Any], options: dict[str, Any]) -> tuple[go.Figure, pd.DataFrame]:
    """Test loss without each frequency of one model, and the loss under each edit, all seeds."""
    table, edits = tables["fourier/frequencies"], tables["fourier/edits"]
    figure = make_subplots(
        rows=2,
        cols=1,
        vertical_spacing=0.17,
        row_heights=[0.4, 0.6],
        subplot_titles=["waves of one frequency removed", "other edits, each seed"],
    )
    choices = {}
    for seed in common.seeds(table):
        rows = common.model(table, "decay", seed)
        colours = np.where(rows["key"], common.KEY, common.OTHER).tolist()
        k = rows["frequency"].tolist()
        full = common.numbers([rows["full_test"].iloc[0]] * 2)
        y = common.numbers(rows["without_test"])
        changes = {"x": [k, [0.5, len(k) + 0.5]], "y": [y, full]}
        choices[f"seed {seed}"] = [changes | {"marker.color": [colours, INK]}, {}, [0, 1]]
    first = next(iter(choices.values()))[0]
    dots = go.Scatter(x=first["x"][0], y=first["y"][0], mode="markers", showlegend=False)
    dots.marker = {"size": 8, "color": first["marker.color"][0]}
    dots.hovertemplate = "without k = %{x}: %{y:.3g} nats<extra></extra>"
    figure.add_trace(dots, row=1, col=1)
    line = {"color": INK, "width": 1, "dash": "dot"}
    whole = go.Scatter(x=first["x"][1], y=first["y"][1], mode="lines", line=line)
    whole.name = "full model"
    figure.add_trace(whole, row=1, col=1)
    for name, colour in (("key frequency", common.KEY), ("other frequency", common.OTHER)):
        entry = go.Scatter(x=[None], y=[None], mode="markers", name=name)
        entry.marker = {"color": colour, "size": 8}
        figure.add_trace(entry, row=1, col=1)
    frame = of_edits(edits)
    figure.add_trace(
        go.Scatter(
            x=common.numbers(frame["loss"]),
            y=frame["what"].map(list(EDITS.values()).index).tolist(),
            mode="markers",
            marker={"size": 8, "color": rgba(PALETTE[2], 0.75)},
            customdata=frame[["what", "seed"]].to_numpy().tolist(),
            showlegend=False,
            hovertemplate="%{customdata[0]}<br>seed %{customdata[1]}: %{x:.3g} nats<extra></extra>",
        ),
        row=2,
        col=1,
    )
    p = 2 * int(table["frequency"].max()) + 1
    figure.add_vline(x=np.log(p), line=line, row=2, col=1)
    note = {"text": "ln p", "showarrow": False, "yanchor": "top", "xanchor": "left", "xshift": 2}
    figure.add_annotation(x=np.log10(np.log(p)), y=1, yref="y2 domain", xref="x2", **note)
    for i, what in enumerate(EDITS.values()):  # above their points: beside them they would take
        label = {"text": what, "x": 0, "xref": "x2 domain", "y": i, "yref": "y2"}  # half a phone
        look = {"showarrow": False, "xanchor": "left", "yanchor": "bottom", "yshift": 1}
        figure.add_annotation(**label, **look)
    per_frequency = table[table["arm"] == "decay"].assign(what="without k")
    figure.update_xaxes(**axis("frequency k removed"), row=1, col=1)
    log = common.decades(per_frequency[["full_test", "without_test"]])
    figure.update_yaxes(**axis("test loss", "nats") | log, row=1, col=1)
    log = common.decades([*frame["loss"], np.log(p)])
    figure.update_xaxes(**axis("loss", "nats", tickangle=0) | log, row=2, col=1)
    bare = {"showticklabels": False, "ticks": "", "range": [len(EDITS) - 0.5, -0.9]}
    figure.update_yaxes(**bare, tickvals=list(range(len(EDITS))), row=2, col=1)
    figure.update_layout(
        updatemenus=[selector(choices)], height=820, margin={"t": 72}, legend={"y": 1.06}
    )
    figure.update_annotations(font_size=12)
    return figure, pd.concat([per_frequency, frame], ignore_index=True)


def of_edits(edits: pd.DataFrame) -> pd.DataFrame:
    """One row an edit of EDITS and a seed: what was done, and the loss."""
    edits = edits[edits["arm"] == "decay"]
    rows = [
        edits[(edits["edit"] == edit) & (edits["set"] == where)].assign(what=what)
        for (edit, where), what in EDITS.items()
    ]
    return pd.concat(rows, ignore_index=True)[["what", "edit", "set", "seed", "loss"]]
