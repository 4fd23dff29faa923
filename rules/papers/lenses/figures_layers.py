"""Figures of the lenses by layer, between layers, and of causal bases; no torch."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pipeline.report.theme import INK, PALETTE, SEQUENTIAL, axis, literal, scale, selector

Drawn = tuple[go.Figure, pd.DataFrame]

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


def present(options: dict[str, Any], table: pd.DataFrame) -> dict[str, list[str]]:
    """Panel -> model and null arm, of those that this scale has (option panels)."""
    known = set(table["model"])
    panels = {panel: [m for m in models if m in known] for panel, *models in options["panels"]}
    return {panel: models for panel, models in panels.items() if models}


def named(options: dict[str, Any], table: pd.DataFrame) -> dict[str, str]:
    """Model -> what the reader's list calls it, of those that this scale has (option names)."""
    known = set(table["model"])
    return {model: name for model, name in options["names"] if model in known}


def curves(panels: dict[str, list[str]], table: pd.DataFrame) -> list[tuple[int, dict, Any]]:
    """(column, look, rows) of every line: a lens of a model in colour, of its null arm in grey."""
    out = []
    for column, models in enumerate(panels.values(), 1):
        for i, model in enumerate(models):
            for lens, (name, colour, dash) in LENSES.items():
                rows = table[(table["model"] == model) & (table["lens"] == lens)]
                look = {
                    "name": name if i == 0 else f"{name}, null arm",
                    "line": {"color": colour if i == 0 else PALETTE[-1], "dash": dash, "width": 2},
                    "marker": {"size": 5 if i == 0 else 4},
                }
                out.append((column, look, rows.sort_values("layer")))
    return out


def in_panels(panels: dict[str, Any]) -> go.Figure:
    """Panels side by side, their titles below the legend."""
    figure = make_subplots(1, len(panels), subplot_titles=[literal(p) for p in panels],
                           horizontal_spacing=0.1)  # fmt: skip
    figure.update_annotations(font={"size": 13})
    figure.update_layout(legend={"y": 1.12}, margin={"t": 60})
    return figure


def whole_layers(figure: go.Figure, panels: dict[str, list[str]], table: Any) -> None:
    """Ticks at whole layers, about six a panel."""
    for column, models in enumerate(panels.values(), 1):
        deepest = table.loc[table["model"].isin(models), "layer"].max()
        figure.update_xaxes(
            **axis("layers before the lens", dtick=int(max(1, deepest // 6))), row=1, col=column
        )


def add(figure: go.Figure, column: int, look: dict, rows: Any, y: Any, seen: set, unit: str):
    """A line, in the legend once for all panels."""
    figure.add_scatter(
        x=rows["layer"], y=y, mode="lines+markers", legendgroup=look["name"],
        showlegend=look["name"] not in seen,
        hovertemplate=f"{literal(look['name'])}, layer %{{x}}: %{{y:.3~g}}{unit}<extra></extra>",
        row=1, col=column, **look,
    )  # fmt: skip
    seen.add(look["name"])


def layers(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Both lenses by layer, a panel a model; the reader chooses the measure.

    Options: panels, a list of [title, model, null arm].
    """
    table = tables["lenses/layers"].assign(unread=lambda t: t["kl"] / t["kl_marginal"])
    panels = present(options, table)
    figure, seen, lines = in_panels(panels), set(), curves(panels, table)
    first = next(iter(MEASURES))
    for column, look, rows in lines:
        add(figure, column, look, rows, shown(rows, first), seen, "")
    for column, models in enumerate(panels.values(), 1):
        rows = table[table["model"] == models[0]]
        ends = [rows["layer"].min(), rows["layer"].max()]
        figure.add_scatter(
            x=ends, y=[rows["kl_marginal"].iloc[0]] * 2, mode="lines", name="mean prediction",
            legendgroup="mean", showlegend=column == 1, row=1, col=column,
            line={"color": INK, "dash": "dash", "width": 1},
            hovertemplate="the model's mean prediction, whatever was read: %{y:.3~g} nats"
            "<extra></extra>",
        )  # fmt: skip
    levels = [figure.data[-len(panels) + i].y for i in range(len(panels))]
    choices = {}
    for m, (what, unit) in MEASURES.items():
        ys = [shown(rows, m) for _, _, rows in lines]
        ys += [{"kl": list(y), "unread": [1, 1]}.get(m, [None, None]) for y in levels]
        change = {"yaxis.title.text": axis(what, unit)["title"]["text"]}
        for place in ("yaxis", "yaxis2")[: len(panels)]:
            change |= {f"{place}.{k}": v for k, v in scale_of(m).items()}
        choices[what] = [{"y": ys}, change]
    whole_layers(figure, panels, table)
    figure.update_yaxes(rangemode="tozero", **scale_of(first))
    figure.update_layout(updatemenus=[selector(choices)], yaxis=axis(*MEASURES[first]))
    columns = ["model", "lens", "layer", *MEASURES, "kl_marginal", "n_tokens"]
    return figure, table[columns]


LOGARITHMIC = ("kl", "unread", "loss")


def scale_of(measure: str) -> dict[str, Any]:
    """Distances are on a log axis; ticks at 1, 2 and 5, as in theme.axis."""
    log = measure in LOGARITHMIC
    return {"type": "log" if log else "linear", "dtick": "D2" if log else None}


def shown(rows: pd.DataFrame, measure: str) -> list[float | None]:
    """The values of a line; a log axis has no place for the prediction's 0."""
    values = rows[measure].tolist()
    return [v if v > 0 else None for v in values] if measure in LOGARITHMIC else values


def bias(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Bias in bits by layer, on a log axis, a panel a model. Options: as `layers`."""
    table = tables["lenses/layers"]
    table = table[table["layer"] < table.groupby("model")["layer"].transform("max")]
    panels = present(options, table)
    figure, seen = in_panels(panels), set()
    for column, look, rows in curves(panels, table):
        add(figure, column, look, rows, (rows["bias"] * BITS).tolist(), seen, " bits")
    whole_layers(figure, panels, table)
    figure.update_layout(yaxis=axis("bias", "bits"))
    figure.update_yaxes(type="log", exponentformat="power", minexponent=2)
    for column, models in enumerate(panels.values(), 1):
        values = table.loc[table["model"].isin(models), "bias"]
        wide = values.max() > 100 * values.min()  # every decade has a tick, or 1, 2 and 5
        figure.update_yaxes(dtick=1 if wide else "D2", row=1, col=column)
    bits = table.assign(bias_bits=table["bias"] * BITS)
    return figure, bits[["model", "lens", "layer", "bias_bits"]]


def transfer(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Transfer penalty of every translator on every layer's stream; the reader chooses the model.

    Options: names, a list of [model, what the list calls it]; ceiling, the penalty in nats at which
    colour ends at most (default 5).
    """
    table = tables["lenses/transfer"]
    names = named(options, table)
    grids = {
        model: table[table["model"] == model].pivot(
            index="translator", columns="layer", values="penalty"
        )
        for model in names
    }
    ceiling = options.get("ceiling", 5)
    place = {
        model: {"x": [list(map(str, g.columns))], "y": [list(map(str, g.index))],
                "z": [g.to_numpy().tolist()], "zmax": [min(float(g.to_numpy().max()), ceiling)]}
        for model, g in grids.items()
    }  # fmt: skip
    first = {k: v[0] for k, v in next(iter(place.values())).items()}
    figure = go.Figure(
        go.Heatmap(
            **first,
            zmin=0,
            colorbar={"title": {"text": "transfer penalty (nats)", "side": "right"}},
            hovertemplate="translator of layer %{y} on layer %{x}: %{z:.3~g} nats<extra></extra>",
        )
    )
    choices = {names[m]: [change, {}] for m, change in place.items()}
    if len(choices) > 1:
        figure.update_layout(updatemenus=[selector(choices)])
    figure.update_layout(
        xaxis=axis("layer that is read", type="category"),
        yaxis=axis("layer that the translator is of", type="category"),
        height=520,
    )
    columns = ["model", "translator", "layer", "penalty", "kl", "similarity"]
    return figure, table[columns]


def basis(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Influence of each direction on the tuned lens and on the model; the reader chooses the model.

    Options: names, a list of [model, what the list calls it].
    """
    table = tables["lenses/basis"]
    table = table[table["lens"] == "tuned"].assign(
        lens_bits=lambda t: t["influence_lens"].clip(lower=1e-9) * BITS,
        model_bits=lambda t: t["influence_model"].clip(lower=1e-9) * BITS,
    )
    names = named(options, table)
    figure = go.Figure()
    for model in names:
        for kind, symbol in (("random", "x-thin"), ("causal", "circle")):
            rows = table[(table["model"] == model) & (table["kind"] == kind)]
            figure.add_scatter(
                x=rows["lens_bits"], y=rows["model_bits"], mode="markers",
                name={"random": "random directions", "causal": "causal basis"}[kind],
                visible=model == next(iter(names)),
                marker={
                    "symbol": symbol, "size": 8, "color": rows["layer"],
                    "coloraxis": "coloraxis", "line": {
                        "width": 1.2 if kind == "random" else 0.5,
                        "color": PALETTE[-1] if kind == "random" else INK,
                    },
                },
                customdata=rows[["layer", "rank", "alignment"]].to_numpy(),
                hovertemplate="layer %{customdata[0]}, direction %{customdata[1]}<br>lens "
                "%{x:.3~g} bits, model %{y:.3~g} bits<br>alignment %{customdata[2]:.2f}"
                "<extra></extra>",
            )  # fmt: skip
    ends = [float(table[["lens_bits", "model_bits"]].min().min()),
            float(table[["lens_bits", "model_bits"]].max().max())]  # fmt: skip
    figure.add_scatter(x=ends, y=ends, mode="lines", name="equal", hoverinfo="skip",
                       line={"color": INK, "dash": "dot", "width": 1})  # fmt: skip
    visible = lambda model: [m == model for m in names for _ in range(2)] + [True]  # noqa: E731
    choices = {n: [{"visible": visible(m)}, {}] for m, n in names.items()}
    if len(choices) > 1:
        figure.update_layout(updatemenus=[selector(choices)])
    logarithmic = {"dtick": 1, "exponentformat": "power", "minexponent": 2}
    figure.update_layout(
        xaxis=axis("influence on the tuned lens", "bits", log=True) | logarithmic,
        yaxis=axis("influence on the model", "bits", log=True) | logarithmic,
        coloraxis={
            "colorscale": scale(SEQUENTIAL),
            "colorbar": {
                "title": {"text": "layer"},
                "dtick": int(max(1, table["layer"].max() // 6)),
            },
        },
        height=520,
    )
    columns = ["model", "layer", "kind", "rank", "lens_bits", "model_bits", "alignment"]
    return figure, table[columns]
