"""Figures of the lenses by layer, of causal bases, and direct logit attribution; no torch."""

from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from pipeline.figures.kinds_maps import beginning
from pipeline.figures.parts import (
    Drawn,
    Panels,
    bars,
    chosen,
    equal,
    line,
    mean_of,
    points,
    styled,
    whiskers,
)
from pipeline.figures.parts import first as first_seed
from pipeline.figures.theme import INK, PALETTE, SEQUENTIAL, axis, literal, scale
from pipeline.store.tables import where

BITS = 1 / np.log(2)
LENSES = {"logit": ("logit lens", PALETTE[1], "dot"), "tuned": ("tuned lens", PALETTE[0], "solid")}
MEASURES = {
    "kl": ("KL to the prediction", "nats"),
    "unread": ("KL over that of the mean prediction", ""),
    "loss": ("cross entropy of the next token", "nats"),
    "agreement": ("share that agrees with the prediction", ""),
    "accuracy": ("share of next tokens that are right", ""),
    "echo": ("share whose likeliest token was just read", ""),
}
READERS = {**LENSES, "jacobian": ("Jacobian lens", PALETTE[2], "solid"),
           "self": ("itself alone", PALETTE[2], "dot"),
           "untrained": ("J of the untrained model", PALETTE[-1], "dash")}  # fmt: skip
LOGARITHMIC = ("kl", "unread", "loss", "bias_bits")
PARTS = {"embedding": PALETTE[2], "attention": PALETTE[0], "MLP": PALETTE[1], "bias": PALETTE[3]}


def named(options: dict[str, Any], table: pd.DataFrame) -> dict[str, str]:
    """Model -> what the reader's list calls it, of those that this scale has (option names)."""
    known = set(table["model"])
    return {model: name for model, name in options["names"] if model in known}


def by_layer(
    options: dict[str, Any], table: pd.DataFrame, measures: dict[str, tuple[str, str]]
) -> tuple[Panels, list[list[str]]]:
    """Lines of each lens over layers, a case a measure: of a model in colour, of its null arm grey.

    Args:
        measures: column -> what it is, and its unit.

    Returns:
        The panels, and the models of each: a model, and its null arm.
    """
    known, columns = set(table["model"]), list(measures)
    given = {panel: [m for m in models if m in known] for panel, *models in options["panels"]}
    given = {panel: models for panel, models in given.items() if models}
    panels = Panels([literal(p) for p in given], gap=(0.1, 0))
    for i, models in enumerate(given.values()):
        for y, (null, model), lens in product(columns, enumerate(models), LENSES):
            rows = where(table, model=model, lens=lens).sort_values("layer")
            name, colour, dash = LENSES[lens]
            name, colour = (f"{name}, null arm", PALETTE[-1]) if null else (name, colour)
            hover = f"{literal(name)}, layer %{{x}}: %{{y:.3~g}} {measures[y][1]}"
            look = {"dash": dash, "marker": {"size": 4 if null else 5}, "hover": hover}
            trace = line(rows["layer"], shown(rows, y), name, colour, **look)
            panels.add(i, trace, case=columns.index(y))
        deepest = where(table, model=models)["layer"].max()  # about six ticks
        ticks = axis("layers before the lens", dtick=int(max(1, deepest // 6)))
        panels.figure.update_xaxes(**ticks, **panels.place(i))
    return panels, list(given.values())


def layers(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Both lenses by layer, a panel per model; the reader chooses the measure.

    Options: panels, a list of [title, model, null arm].
    """
    table = first_seed(tables["lenses/layers"])
    table = table.assign(unread=table["kl"] / table["kl_marginal"])
    panels, models = by_layer(options, table, MEASURES)
    for i, (model, *_) in enumerate(models):
        rows = where(table, model=model)
        ends = [rows["layer"].min(), rows["layer"].max()]
        marginal = rows["kl_marginal"].iloc[0]
        for case, (level, unit) in enumerate([(marginal, " nats"), (1, "")]):  # of kl, of unread
            hover = f"the model's mean prediction, whatever was read: {level:.3g}{unit}"
            look = {"width": 1, "dash": "dash", "hover": hover}
            panels.add(i, line(ends, [level] * 2, "mean prediction", **look), case=case)
    changes = []
    for y, (what, unit) in MEASURES.items():  # ticks of a log axis at 1, 2 and 5, as in theme.axis
        log = y in LOGARITHMIC
        look = {"type": "log" if log else "linear", "dtick": "D2" if log else None}
        places = ("yaxis", "yaxis2")[: len(models)]
        change = {f"{place}.{k}": v for place in places for k, v in look.items()}
        changes.append(change | {"yaxis.title.text": axis(what, unit)["title"]["text"]})
    panels.choose((what for what, _ in MEASURES.values()), changes)
    panels.figure.update_yaxes(rangemode="tozero")
    figure = panels.finish(450, yaxis=axis(*MEASURES["kl"]))
    return figure, table[["model", "lens", "layer", *MEASURES, "kl_marginal", "n_tokens"]]


def upside_down(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Lenses by layer as predictions, and as readers of results in between; means over seeds.

    Options: model.
    """
    panels = Panels(["next token", "result in between"], gap=(0.12, 0))
    measures = {"layers": ("kl", "KL to the prediction", "nats"),
                "recovery": ("auc", "area below pass@k over log k", "")}  # fmt: skip
    frames = []
    for i, (name, (y, title, unit)) in enumerate(measures.items()):
        rows = where(tables[f"jacobian/{name}"], model=options["model"], whole=True)
        rows = rows[(rows["layer"] >= 0) & (rows[y] != 0)]  # 0 nats: the prediction itself
        for own, lens, (said, colour, dash) in styled(rows, "lens", READERS):
            frame = mean_of(own, ["layer"], y).sort_values("layer")
            hover = f"{said}, layer %{{x}}: %{{y:.3~g}} {unit}"
            bars_ = whiskers(frame[y], frame["min"], frame["max"], color=colour)
            look = {"dash": dash, "marker": {"size": 5}, "hover": hover, "error_y": bars_}
            panels.add(i, line(frame["layer"], shown(frame, y), said, colour, **look))
            frames.append(frame.rename(columns={y: "mean"}).assign(lens=lens, measure=y))
        log = {"type": "log", "dtick": "D2"} if y in LOGARITHMIC else {"rangemode": "tozero"}
        panels.figure.update_yaxes(**axis(title, unit), **log, **panels.place(i))
    panels.figure.update_xaxes(**axis("layers before the lens", dtick=1))
    return panels.finish(430), pd.concat(frames, ignore_index=True)


def shown(rows: pd.DataFrame, measure: str) -> list[float | None]:
    """The values of a line; a log axis has no place for the prediction's 0."""
    values = rows[measure].tolist()
    return [v if v > 0 else None for v in values] if measure in LOGARITHMIC else values


def bias(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Bias in bits by layer, on a log axis, a panel per model. Options: as `layers`."""
    table = first_seed(tables["lenses/layers"])
    table = table[table["layer"] < table.groupby("model")["layer"].transform("max")]
    table = table.assign(bias_bits=table["bias"] * BITS)
    panels, models = by_layer(options, table, {"bias_bits": ("bias", "bits")})
    for i, some in enumerate(models):
        values = where(table, model=some)["bias"]
        wide = values.max() > 100 * values.min()  # every decade has a tick, or 1, 2 and 5
        look = {"type": "log", "exponentformat": "power", "minexponent": 2}
        panels.figure.update_yaxes(**look, dtick=1 if wide else "D2", **panels.place(i))
    figure = panels.finish(450, yaxis=axis("bias", "bits"))
    return figure, table[["model", "lens", "layer", "bias_bits"]]


def basis(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Influence of each direction on the tuned lens and on the model; the reader chooses the model.

    Options: names, a list of [model, what the list calls it].
    """
    table = where(first_seed(tables["lenses/basis"]), lens="tuned")
    table = table.assign(**{f"{of}_bits": table[f"influence_{of}"].clip(lower=1e-9) * BITS
                            for of in ("lens", "model")})  # fmt: skip
    panels, names = Panels(), named(options, table)
    for case, model in enumerate(names):
        for kind, name in (("random", "random directions"), ("causal", "causal basis")):
            rows, null = where(table, model=model, kind=kind), kind == "random"
            edge = {"width": 1.2 if null else 0.5, "color": PALETTE[-1] if null else INK}
            trace = points(
                rows["lens_bits"], rows["model_bits"], name, rows["layer"], size=8,
                symbol="x-thin" if null else "circle",
                marker={"coloraxis": "coloraxis", "line": edge},
                customdata=rows[["layer", "rank", "alignment"]].to_numpy(),
                hover="layer %{customdata[0]}, direction %{customdata[1]}<br>lens %{x:.3~g} bits, "
                "model %{y:.3~g} bits<br>alignment %{customdata[2]:.2f}",
            )  # fmt: skip
            panels.add(0, trace, case=case)
    panels.add(0, equal(table[["lens_bits", "model_bits"]], name="equal"))
    panels.choose(names.values())
    decades = {"dtick": 1, "exponentformat": "power", "minexponent": 2}
    bar = {"title": {"text": "layer"}, "dtick": int(max(1, table["layer"].max() // 6))}
    figure = panels.finish(
        520, top=48,
        xaxis=axis("influence on the tuned lens", "bits", log=True) | decades,
        yaxis=axis("influence on the model", "bits", log=True) | decades,
        coloraxis={"colorscale": scale(SEQUENTIAL), "colorbar": bar},
    )  # fmt: skip
    columns = ["model", "layer", "kind", "rank", "lens_bits", "model_bits", "alignment"]
    return figure, table[columns]


def attribution(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """What every attention and MLP adds to the likeliest token's logit, and the sum so far.

    The reader chooses the place. Options: names, a list of [model, what the list calls it]; places,
    of each text: that many with the largest logits, and its last (default 2).
    """
    table, wanted = first_seed(tables["lenses/attribution"]), []
    for model, name in options["names"]:
        for _, rows in where(table, model=model).groupby("text", sort=False):
            logits = rows.groupby("position")["logit"].first()
            largest = logits.drop(logits.index.max()).nlargest(options.get("places", 2)).index
            wanted += [(name, where(rows, position=at)) for at in [logits.index.max(), *largest]]
    figure, choices, hover = go.Figure(), {}, "%{x}: %{y:.3~g}"
    short = {"attention": "attn ", "MLP": "MLP "}
    for name, parts in wanted:  # in the order of computation
        words = beginning("…" + parts["words"].iloc[0][-20:])
        what = f"{name}: “{words}” → “{parts['top'].iloc[0]}”"
        pairs = zip(parts["part"], parts["layer"], strict=True)
        x = [f"{short[p]}{layer}" if p in short else p for p, layer in pairs]
        ys = [parts["contribution"].where(parts["part"] == p).tolist() for p in PARTS]
        total = parts["contribution"].cumsum().tolist()
        if not choices:
            for (part, colour), y in zip(PARTS.items(), ys, strict=True):
                figure.add_trace(bars(x, y, part, colour, hover=hover.replace(":.3", ":+.3")))
            look = {"width": 1.2, "shape": "hvh", "hover": f"up to {hover}"}
            figure.add_trace(line(x, total, "sum so far", INK, **look))
        choices[what] = [{"x": [x] * (len(ys) + 1), "y": [*ys, total]}, {}]
    axes = {"xaxis": axis("part of the model, in the order of computation", type="category")}
    axes["yaxis"] = axis("logit over the vocabulary's mean")
    chosen(figure, choices).update_layout(barmode="relative", bargap=0.15, height=460, **axes)
    return figure, pd.concat([parts for _, parts in wanted], ignore_index=True)
