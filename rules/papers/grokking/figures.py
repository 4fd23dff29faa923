"""Figures of Progress Measures for Grokking that are no core kinds; no torch.

Spectra and circles, which have a slider over training, are drawn in figures_waves.py.
"""

from typing import Any

import numpy as np
import pandas as pd

from pipeline.figures.kinds_lines import FLOOR, decades
from pipeline.figures.parts import Drawn, Panels, bars, key, line, points, rounded, thinned
from pipeline.figures.theme import INK, PALETTE, axis, rgba
from pipeline.store.tables import where

from .figures_waves import FREQUENCIES, of_frequency, seeds

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
    panels = Panels([""] * 3, 1, gap=(0, 0.05), shared_xaxes=True, row_heights=[0.56, 0.22, 0.22])
    models = [(arm, seed) for arm in ARMS for seed in seeds(table, arm)]
    drawn, shaded, losses = [], [], []
    for case, (arm, seed) in enumerate(models):
        rows = thinned(where(table, arm=arm, seed=seed).sort_values("step"), 240)
        for panel, column, name, colour, dash in MEASURES:
            y, hover = values(rows, column), f"{name}<br>step %{{x:,}}: %{{y:.3g}}"
            losses += y if panel == 0 else []
            panels.add(
                panel, line(rows["step"], y, name, colour, dash=dash, hover=hover), case=case
            )
        drawn.append(rows)
        shaded.append({"shapes": shades(where(phases, arm=arm, seed=seed).iloc[0])})
    for name, colour in PHASES if any(s["shapes"] for s in shaded) else ():
        panels.add(0, bars([None], [None], name, rgba(colour, 0.4), hover=name))
    panels.choose((f"seed {seed}, {ARMS[arm]}" for arm, seed in models), shaded)
    panels.axis(0, y=axis("loss", "nats") | decades(losses))
    panels.axis(1, y=axis("Gini coefficient", rangemode="tozero"))
    x = axis("step (updates on all training pairs)", tickformat="~s")
    panels.axis(2, x, axis("Σ w²", rangemode="tozero"))
    columns = ["arm", "seed", "step", *(c for _, c, *_ in MEASURES)]
    return panels.finish(720, top=96), pd.concat(drawn, ignore_index=True)[columns]


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
    border = {"color": INK, "width": 1, "dash": "dot"}
    panels.figure.add_vline(100 * SINGLE, line=border, **panels.place(0))
    for case, seed in enumerate(seeds(table)):
        rows = where(frequencies, arm="decay", seed=seed)
        look = {"colour": of_frequency(rows["key"]), "hover": "k = %{x}: %{y} neurons"}
        panels.add(1, bars(rows["frequency"], rows["neurons"], **look), case=case)
        frames.append(rows[["seed", "frequency", "key", "neurons"]].assign(what="frequency"))
    panels.choose(f"seed {seed}" for seed in seeds(table))
    panels.add(1, *(key(name, colour) for name, colour in FREQUENCIES.items()))
    best = axis("variance that the best frequency explains", "%", range=[0, 101])
    panels.axis(0, best, axis("share of neurons", "%"))
    panels.axis(1, axis("frequency k"), axis("neurons", rangemode="tozero"))
    figure = panels.finish(620, legend=38, top=84, barmode="overlay", bargap=0.05)
    return figure, pd.concat(frames, ignore_index=True)


def ablation(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Test loss without each frequency of one model, and the loss under each edit, all seeds."""
    table, frame = tables["fourier/frequencies"], of_edits(tables["fourier/edits"])
    titles = ["waves of one frequency removed", "other edits, each seed"]
    panels = Panels(titles, 1, gap=(0, 0.17), row_heights=[0.4, 0.6])
    for case, seed in enumerate(seeds(table)):
        rows = where(table, arm="decay", seed=seed)
        k, look = rows["frequency"], {"size": 8, "hover": "without k = %{x}: %{y:.3g} nats"}
        dots = points(k, rounded(rows["without_test"]), "", of_frequency(rows["key"]), **look)
        full = rounded([rows["full_test"].iloc[0]] * 2)
        level = line([0.5, len(k) + 0.5], full, "full model", width=1, dash="dot")
        panels.add(0, dots, level, case=case)
    panels.add(0, *(key(name, c, "circle", size=8) for name, c in FREQUENCIES.items()))
    hover = "%{customdata[0]}<br>seed %{customdata[1]}: %{x:.3g} nats"
    at = frame["what"].map(list(EDITS.values()).index).tolist()
    look = {"size": 8, "customdata": frame[["what", "seed"]].to_numpy().tolist(), "hover": hover}
    panels.add(1, points(rounded(frame["loss"]), at, "", rgba(PALETTE[2], 0.75), **look))
    panels.choose(f"seed {seed}" for seed in seeds(table))
    per_frequency = table[table["arm"] == "decay"].assign(what="without k")
    chance = np.log(2 * int(table["frequency"].max()) + 1)
    with_names(panels.figure, chance)
    log = decades(per_frequency[["full_test", "without_test"]])
    panels.axis(0, axis("frequency k removed"), axis("test loss", "nats") | log)
    bare = {"showticklabels": False, "ticks": "", "range": [len(EDITS) - 0.5, -0.9]}
    log = axis("loss", "nats", tickangle=0) | decades([*frame["loss"], chance])
    panels.axis(1, log, bare | {"tickvals": list(range(len(EDITS)))})
    figure = panels.finish(820, legend=38, top=72)
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
        look = {"showarrow": False, "xanchor": "left", "yanchor": "bottom", "yshift": 5}
        figure.add_annotation(**label, **look)
    figure.update_annotations(font_size=12)


def of_edits(edits: pd.DataFrame) -> pd.DataFrame:
    """One row per edit of EDITS and seed: what was done, and the loss."""
    rows = [where(edits, arm="decay", edit=edit, set=on).assign(what=what)
            for (edit, on), what in EDITS.items()]  # fmt: skip
    return pd.concat(rows, ignore_index=True)[["what", "edit", "set", "seed", "loss"]]
