"""Figures of Progress Measures for Grokking that are no core kinds; no torch.

Spectra and circles, which have a slider over training, are drawn in figures_waves.py.
"""

from typing import Any

import numpy as np
import pandas as pd

from pipeline.figures.kinds_learning import FLOOR, decades
from pipeline.figures.parts import Drawn, Panels, bars, key, line, points, rounded, thinned
from pipeline.figures.theme import INK, PALETTE, axis, rgba, selector
from pipeline.store.tables import where

from .figures_waves import FREQUENCIES, circle, of_frequency, seeds, spectrum

__all__ = ["ablation", "circle", "neurons", "progress", "spectrum"]

PHASES = (("memorisation", PALETTE[6]), ("circuit formation", PALETTE[5]), ("cleanup", PALETTE[4]))
ARMS = {"decay": "with weight decay", "no_decay": "without weight decay"}
MEASURES = (  # panel, column of progress, name, colour, dash
    (0, "train_loss", "training loss", PALETTE[0], "solid"),
    (0, "test_loss", "test loss", PALETTE[1], "solid"),
    (0, "restricted_test", "restricted loss (test)", PALETTE[2], "dash"),
    (0, "excluded_train", "excluded loss (training)", PALETTE[3], "dash"),
    (1, "gini_W_E", "Gini of W_E", PALETTE[0], "dot"),
    (1, "gini_W_L", "Gini of W_L", PALETTE[1], "dot"),
    (2, "sum_squares", "Σ w² of all weights", INK, "solid"),
)
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


def progress(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Losses, Gini coefficients and squared weights of one model at a time, phases shaded."""
    table, phases = tables["fourier/progress"], tables["fourier/phases"]
    columns = [c for _, c, *_ in MEASURES]
    panels = Panels([""] * 3, 1, gap=(0, 0.05), shared_xaxes=True, row_heights=[0.56, 0.22, 0.22])
    data, choices = {}, {}
    for arm, seed in [(a, s) for a in ARMS for s in seeds(table, a)]:
        rows = thinned(where(table, arm=arm, seed=seed).sort_values("step"), 240)
        changes = {"x": [rows["step"].tolist()] * len(columns)}
        changes["y"] = [values(rows, c) for c in columns]
        shapes = {"shapes": shades(where(phases, arm=arm, seed=seed).iloc[0])}
        name = f"seed {seed}, {ARMS[arm]}"
        data[name], choices[name] = rows, [changes, shapes, list(range(len(columns)))]
    shown, layout, _ = next(iter(choices.values()))
    for i, (panel, _, name, colour, dash) in enumerate(MEASURES):
        hover = f"{name}<br>step %{{x:,}}: %{{y:.3g}}"
        panels.add(panel, line(shown["x"][i], shown["y"][i], name, colour, dash=dash, hover=hover))
    for name, colour in PHASES if any(c[1]["shapes"] for c in choices.values()) else ():
        panels.add(0, bars([None], [None], name, rgba(colour, 0.4), hover=name))
    plotted = [v for changes, *_ in choices.values() for y in changes["y"][:4] for v in y]
    figure = panels.finish(720, top=96, updatemenus=[selector(choices)], **layout)
    figure.update_yaxes(**axis("loss", "nats") | decades(plotted), row=1)
    figure.update_yaxes(**axis("Gini coefficient", rangemode="tozero"), row=2)
    figure.update_yaxes(**axis("Σ w²", rangemode="tozero"), row=3)
    figure.update_xaxes(**axis("step (updates on all training pairs)", tickformat="~s"), row=3)
    return figure, pd.concat(data.values(), ignore_index=True)[["arm", "seed", "step", *columns]]


def values(rows: pd.DataFrame, column: str) -> list[float]:
    """A column as plotted: losses not below FLOOR."""
    floor = FLOOR if column.endswith(("loss", "_test", "_train")) else -np.inf
    return rounded(rows[column].clip(lower=floor), 4)


def shades(ends: pd.Series) -> list[dict]:
    """The shaded phases of one model; none where it has no phases."""
    borders = [0, ends["memorised"], ends["cleanup"], ends["cleaned"]]
    if np.isnan(borders).any():
        return []
    look = {"type": "rect", "line": {"width": 0}, "layer": "below", "xref": "x", "yref": "paper"}
    return [
        {**look, "fillcolor": rgba(colour, 0.16), "x0": x0, "x1": x1, "y0": 0, "y1": 1}
        for (_, colour), x0, x1 in zip(PHASES, borders, borders[1:], strict=False)
    ]


def neurons(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Share of each neuron that its best frequency explains, and neurons of each frequency."""
    table, frequencies = tables["fourier/neurons"], tables["fourier/frequencies"]
    looks = {  # arm, step, a colour that no frequency has
        "trained": ("decay", table["step"].max(), PALETTE[3]),
        "trained without weight decay": ("no_decay", table["step"].max(), PALETTE[2]),
        "before training": ("decay", table["step"].min(), PALETTE[6]),
    }
    titles = ["all neurons of all seeds", "neurons of one frequency (> 85 %)"]
    panels = Panels(titles, 1, gap=(0, 0.24), row_heights=[0.55, 0.45])
    edges, frames = np.linspace(0, 1, 41), []
    for name, (arm, step, colour) in looks.items():
        shares = where(table, arm=arm, step=step)["share"]
        count = np.histogram(shares, edges)[0] / max(len(shares), 1)
        hover = f"{name}<br>%{{x:.0f}} % explained: %{{y:.1f}} % of the neurons"
        middle = 100 * (edges[:-1] + edges[1:]) / 2
        panels.add(0, bars(middle, 100 * count, name, rgba(colour, 0.75), hover=hover))
        frames.append(pd.DataFrame({"what": name, "share_from": edges[:-1], "neurons": count}))
    figure = panels.figure
    figure.add_vline(100 * SINGLE, line={"color": INK, "width": 1, "dash": "dot"}, row=1, col=1)
    choices = {}
    for seed in seeds(table):
        rows = where(frequencies, arm="decay", seed=seed)
        changes = {"x": [rows["frequency"].tolist()], "y": [rows["neurons"].tolist()]}
        changes["marker.color"] = [of_frequency(rows["key"])]
        choices[f"seed {seed}"] = [changes, {}, [len(looks)]]
        frames.append(rows[["seed", "frequency", "key", "neurons"]].assign(what="frequency"))
    (shown, *_), hover = next(iter(choices.values())), "k = %{x}: %{y} neurons"
    panels.add(1, bars(shown["x"][0], shown["y"][0], "", shown["marker.color"][0], hover=hover))
    panels.add(1, *(key(name, colour) for name, colour in FREQUENCIES.items()))
    best = axis("variance that the best frequency explains", "%", range=[0, 101])
    figure.update_xaxes(**best, row=1, col=1)
    figure.update_yaxes(**axis("share of neurons", "%"), row=1, col=1)
    figure.update_xaxes(**axis("frequency k"), row=2, col=1)
    figure.update_yaxes(**axis("neurons", rangemode="tozero"), row=2, col=1)
    look = {"barmode": "overlay", "bargap": 0.05, "updatemenus": [selector(choices)]}
    return panels.finish(620, legend=38, top=84, **look), pd.concat(frames, ignore_index=True)


def ablation(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Test loss without each frequency of one model, and the loss under each edit, all seeds."""
    table, frame = tables["fourier/frequencies"], of_edits(tables["fourier/edits"])
    titles = ["waves of one frequency removed", "other edits, each seed"]
    panels = Panels(titles, 1, gap=(0, 0.17), row_heights=[0.4, 0.6])
    choices = {}
    for seed in seeds(table):
        rows = where(table, arm="decay", seed=seed)
        k, full = rows["frequency"].tolist(), rounded([rows["full_test"].iloc[0]] * 2)
        changes = {"x": [k, [0.5, len(k) + 0.5]], "y": [rounded(rows["without_test"]), full]}
        changes["marker.color"] = [of_frequency(rows["key"]), INK]
        choices[f"seed {seed}"] = [changes, {}, [0, 1]]
    x, y, colours = next(iter(choices.values()))[0].values()
    hover = "without k = %{x}: %{y:.3g} nats"
    panels.add(0, points(x[0], y[0], "", colours[0], size=8, hover=hover))
    panels.add(0, line(x[1], y[1], "full model", width=1, dash="dot"))
    panels.add(0, *(key(name, c, "circle", size=8) for name, c in FREQUENCIES.items()))
    hover = "%{customdata[0]}<br>seed %{customdata[1]}: %{x:.3g} nats"
    at = frame["what"].map(list(EDITS.values()).index).tolist()
    look = {"size": 8, "customdata": frame[["what", "seed"]].to_numpy().tolist(), "hover": hover}
    panels.add(1, points(rounded(frame["loss"]), at, "", rgba(PALETTE[2], 0.75), **look))
    per_frequency = table[table["arm"] == "decay"].assign(what="without k")
    chance = np.log(2 * int(table["frequency"].max()) + 1)
    with_names(panels.figure, chance)
    figure = panels.finish(820, legend=38, top=72, updatemenus=[selector(choices)])
    figure.update_xaxes(**axis("frequency k removed"), row=1, col=1)
    log = decades(per_frequency[["full_test", "without_test"]])
    figure.update_yaxes(**axis("test loss", "nats") | log, row=1, col=1)
    log = decades([*frame["loss"], chance])
    figure.update_xaxes(**axis("loss", "nats", tickangle=0) | log, row=2, col=1)
    bare = {"showticklabels": False, "ticks": "", "range": [len(EDITS) - 0.5, -0.9]}
    figure.update_yaxes(**bare, tickvals=list(range(len(EDITS))), row=2, col=1)
    return figure, pd.concat([per_frequency, frame], ignore_index=True)


def with_names(figure: Any, chance: float) -> None:
    """The line of a uniform guess, and edits named above their points.

    Beside the points their names would take half a phone.
    """
    figure.add_vline(chance, line={"color": INK, "width": 1, "dash": "dot"}, row=2, col=1)
    note = {"text": "ln p", "showarrow": False, "yanchor": "top", "xanchor": "left", "xshift": 2}
    figure.add_annotation(x=np.log10(chance), y=1, yref="y2 domain", xref="x2", **note)
    for i, what in enumerate(EDITS.values()):
        label = {"text": what, "x": 0, "xref": "x2 domain", "y": i, "yref": "y2"}
        look = {"showarrow": False, "xanchor": "left", "yanchor": "bottom", "yshift": 1}
        figure.add_annotation(**label, **look)
    figure.update_annotations(font_size=12)


def of_edits(edits: pd.DataFrame) -> pd.DataFrame:
    """One row per edit of EDITS and seed: what was done, and the loss."""
    rows = [where(edits, arm="decay", edit=edit, set=on).assign(what=what)
            for (edit, on), what in EDITS.items()]  # fmt: skip
    return pd.concat(rows, ignore_index=True)[["what", "edit", "set", "seed", "loss"]]
