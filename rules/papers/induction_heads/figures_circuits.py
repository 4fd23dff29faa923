"""Weights and ablations: eigenvalues, composition, and what is left without a head."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pipeline.figures.parts import PLAIN, TITLE, Drawn, Panels, bars, first, heat
from pipeline.figures.parts import points as marks
from pipeline.figures.theme import DIVERGING, PALETTE, axis, rgba, scale
from pipeline.store.tables import where

ROLES = {"induction": PALETTE[0], "previous token": PALETTE[1], "other": PALETTE[6]}
CIRCUITS = {"OV": ("OV: copying", PALETTE[2]), "QK": ("QK: matching", PALETTE[3])}
PLACES = ["all induction<br>heads", "one induction<br>head", "previous-token<br>head",
          "another head,<br>second layer", "another head,<br>first layer"]  # fmt: skip

PATTERNS = {"kept": ("attention patterns kept", PALETTE[5]), "free": ("patterns free", PALETTE[4])}
SHOWN = {  # column -> what the list calls it, title and format of the axis
    "left": ("in-context learning score", "in-context learning score left", ".0%"),
    "second_copy": ("loss on the second copy", "loss on the second copy (nats)", ""),
}


def circuits(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Above: eigenvalues of the induction head, and the signs of all heads. Below: composition."""
    values, heads, pairs = (where(tables[f"heads/{name}"], run="two_layer")
                            for name in ("eigenvalues", "heads", "composition"))  # fmt: skip
    heads = where(heads, step=heads["step"].max())
    figure = make_subplots(
        2, 6, specs=[[{"colspan": 3}, None, None] * 2, [{"colspan": 2}, None] * 3],
        horizontal_spacing=0.1, vertical_spacing=0.2,
        subplot_titles=["induction head", "all heads", *(f"{k}-comp." for k in "KQV")],
    )  # fmt: skip
    shown = eigenvalues(figure, values, heads)
    signs(figure, heads)
    pairs = first(pairs).assign(above=pairs["score"] - pairs["baseline"])
    reach = float(pairs["above"].abs().max())
    for i, kind in enumerate("KQV"):
        rows, place = where(pairs, kind=kind), {"row": 2, "col": 2 * i + 1}
        grid = rows.pivot(index="later", columns="earlier", values="above").to_numpy().round(4)
        hover = f"head 0.%{{x}} to head 1.%{{y}}<br>{kind} %{{z:.3f}} above random"
        figure.add_trace(heat(grid, coloraxis="coloraxis", hover=hover), **place)
        figure.update_xaxes(**PLAIN, dtick=1, **place)
        figure.update_yaxes(**PLAIN, dtick=1, **place)
    figure.update_xaxes(title={"text": "first-layer head"}, row=2, col=3)
    figure.update_yaxes(title={"text": "second-layer head"}, row=2, col=1)
    bar = {"title": {"text": "above<br>random"}, "thickness": 12, "outlinewidth": 0}
    bar |= {"len": 0.42, "y": 0, "yanchor": "bottom"}
    colours = {"colorscale": scale(DIVERGING), "cmin": -reach, "cmax": reach, "colorbar": bar}
    figure.update_annotations(font_size=TITLE)
    legend = {"y": 1 + 38 / 600, "x": 0}  # above the titles
    look = {"height": 720, "margin": {"t": 70}, "legend": legend, "coloraxis": colours}
    return figure.update_layout(look), shown


def eigenvalues(figure: go.Figure, values: pd.DataFrame, heads: pd.DataFrame) -> pd.DataFrame:
    """The complex plane: every seed's head of best prefix matching."""
    best = heads.loc[heads.groupby("member")["prefix_matching"].idxmax()]
    shown = values.merge(best[["member", "layer", "head"]], on=["member", "layer", "head"])
    size = np.hypot(shown["real"], shown["imag"])
    largest = size.groupby([shown["member"], shown["circuit"]]).transform("max")
    shown = shown.assign(x=shown["real"] / largest, y=shown["imag"] / largest)
    for circuit, (name, colour) in CIRCUITS.items():
        rows, symbol = where(shown, circuit=circuit), "circle" if circuit == "OV" else "diamond"
        hover = name + "<br>λ = %{customdata[0]:.3g} + %{customdata[1]:.3g} i"
        look = {"size": 8, "symbol": symbol, "customdata": rows[["real", "imag"]], "hover": hover}
        dots = marks(rows["x"], rows["y"], name, rgba(colour, 0.65), **look)
        figure.add_trace(dots, row=1, col=1)
    square = {"range": [-1.1, 1.1], "zeroline": True}
    figure.update_xaxes(**square, **axis("real λ / max |λ|"), row=1, col=1)
    figure.update_yaxes(**square, **axis("imaginary"), row=1, col=1)
    return shown


def signs(figure: go.Figure, heads: pd.DataFrame) -> None:
    """Copying against matching of all heads, coloured by what they attend to."""
    for role, colour in ROLES.items():
        rows = where(heads, role=role)
        hover = role + " head %{customdata[0]}.%{customdata[1]}, seed %{customdata[2]}<br>"
        name = f"{role} head" if role != "other" else "other heads"
        who = {"customdata": rows[["layer", "head", "seed"]], "size": 9}
        dots = marks(rows["matching"], rows["copying"], name, rgba(colour, 0.8), **who,
                     hover=hover + "QK %{x:.2f}, OV %{y:.2f}")  # fmt: skip
        figure.add_trace(dots, row=1, col=4)
    square = {"range": [-1.1, 1.1], "zeroline": True}
    figure.update_xaxes(**square, **axis("QK Σλ / Σ|λ|"), row=1, col=4)
    right = {"side": "right"}  # on the left a phone has no room for it
    figure.update_yaxes(**square, **axis("OV Σλ / Σ|λ|"), **right, row=1, col=4)


def ablation(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Bars: means; points: heads and seeds. A list chooses the score or the second copy's loss."""
    table, by = where(tables["heads/ablation"], run="two_layer"), ["member", "patterns"]
    whole = where(table, removed="nothing").set_index(by)[["icl", "second_copy"]]
    table = table.join(whole.add_prefix("intact_"), on=by)
    table = table.assign(left=table["icl"] / table["intact_icl"])
    table = table.assign(place=[place(r) for r in table.to_dict("records")])
    table = table[table["place"] != ""]
    places = [p for p in PLACES if p in set(table["place"])]
    panels, axes = Panels(), []
    for case, (column, (_, title, form)) in enumerate(SHOWN.items()):
        for patterns, (name, colour) in PATTERNS.items():
            rows = where(table, patterns=patterns)
            mean = rows.groupby("place")[column].mean().reindex(places)
            look = {"offsetgroup": patterns, "hover": "%{x}<br>mean %{y:.3g}"}
            means = bars(places, mean, name, rgba(colour, 0.55), **look)
            panels.add(0, means, points(rows, column, colour, patterns), case=case)
        axes.append({"yaxis.title.text": title, "yaxis.tickformat": form})
    panels.choose((what for what, *_ in SHOWN.values()), axes)
    order = {"categoryorder": "array", "categoryarray": places}
    panels.figure.update_xaxes(**order, autotickangles=[0, -90])  # on a phone
    kept = ["member", "seed", "patterns", "removed", "layer", "head", "role", "place", "icl"]
    kept += ["left", "second_copy", "intact_second_copy"]
    return panels.finish(480, barmode="group", boxmode="group"), table[kept]


def points(rows: pd.DataFrame, column: str, colour: str, group: str) -> go.Box:
    """A point per row beside its bar: a box of which only the points are drawn."""
    hover = "head %{customdata[0]}.%{customdata[1]}, seed %{customdata[2]}<br>%{y:.3g}"
    clear, look = "rgba(0,0,0,0)", {"color": colour, "size": 6}
    return go.Box(
        x=rows["place"], y=rows[column], customdata=rows[["layer", "head", "seed"]],
        offsetgroup=group, boxpoints="all", pointpos=0, jitter=0.4, fillcolor=clear,
        line={"color": clear}, marker=look, hoveron="points", showlegend=False,
        hovertemplate=hover + "<extra></extra>",
    )  # fmt: skip


def place(row: dict) -> str:
    """The bar that a row of the table ablation belongs to; '' for none."""
    if row["removed"] == "induction heads":
        return PLACES[0]
    named = {"induction": PLACES[1], "previous token": PLACES[2]}
    return named.get(row["role"], PLACES[4 - row["layer"]] if row["role"] == "other" else "")
