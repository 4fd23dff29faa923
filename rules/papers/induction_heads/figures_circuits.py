"""Weights and ablations: eigenvalues, composition, and what is left without a head."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pipeline.job.source import import_file
from pipeline.report.theme import DIVERGING, PALETTE, axis, rgba, scale, selector

common = import_file(Path(__file__).with_name("figures_common.py"))
ROLES = {
    "induction": PALETTE[0],
    "previous token": PALETTE[1],
    "other": PALETTE[6],
}
CIRCUITS = {"OV": ("OV: copying", PALETTE[2]), "QK": ("QK: matching", PALETTE[3])}
PLACES = ["all induction<br>heads", "one induction<br>head", "previous-token<br>head",
          "another head,<br>second layer", "another head,<br>first layer"]  # fmt: skip

PATTERNS = {"kept": ("attention patterns kept", PALETTE[5]), "free": ("patterns free", PALETTE[4])}
SHOWN = {  # column -> what the list calls it, title and format of the axis
    "left": ("in-context learning score", "in-context learning score left", ".0%"),
    "second_copy": ("loss on the second copy", "loss on the second copy (nats)", ""),
}


def circuits(tables: dict[str, Any], options: dict[str, Any]) -> tuple[go.Figure, pd.DataFrame]:
    """Above: eigenvalues of the induction head, and the signs of all heads. Below: composition."""
    of = lambda name: (t := tables[f"heads/{name}"])[t["run"] == "two_layer"]  # noqa: E731
    values, heads, pairs = of("eigenvalues"), of("heads"), of("composition")
    heads = heads[heads["step"] == heads["step"].max()]
    figure = make_subplots(
        rows=2,
        cols=6,
        specs=[[{"colspan": 3}, None, None] * 2, [{"colspan": 2}, None] * 3],
        horizontal_spacing=0.1,
        vertical_spacing=0.2,
        subplot_titles=["induction head", "all heads", *(f"{k}-comp." for k in "KQV")],
    )
    shown = eigenvalues(figure, values, heads)
    signs(figure, heads)
    pairs = pairs[pairs["seed"] == pairs["seed"].min()]
    pairs = pairs.assign(above=pairs["score"] - pairs["baseline"])
    reach = float(pairs["above"].abs().max())
    for i, kind in enumerate("KQV"):
        grid = pairs[pairs["kind"] == kind].pivot(index="later", columns="earlier", values="above")
        told = f"head 0.%{{x}} to head 1.%{{y}}<br>{kind} %{{z:.3f}} above random<extra></extra>"
        square = {"z": grid.to_numpy().round(4), "coloraxis": "coloraxis", "hovertemplate": told}
        figure.add_trace(go.Heatmap(**square, xgap=1, ygap=1), row=2, col=2 * i + 1)
        bare = {"showgrid": False, "zeroline": False, "dtick": 1}
        figure.update_xaxes(**bare, row=2, col=2 * i + 1)
        figure.update_yaxes(**bare, row=2, col=2 * i + 1)
    figure.update_xaxes(title={"text": "first-layer head"}, row=2, col=3)
    figure.update_yaxes(title={"text": "second-layer head"}, row=2, col=1)
    bar = {"title": {"text": "above<br>random"}, "thickness": 12, "outlinewidth": 0}
    bar |= {"len": 0.42, "y": 0, "yanchor": "bottom"}
    colours = {"colorscale": scale(DIVERGING), "cmin": -reach, "cmax": reach, "colorbar": bar}
    figure.update_layout(coloraxis=colours)
    return common.headed(figure, 720, legend=38), shown


def eigenvalues(figure: go.Figure, values: pd.DataFrame, heads: pd.DataFrame) -> pd.DataFrame:
    """The complex plane: every seed's head of best prefix matching."""
    best = heads.loc[heads.groupby("member")["prefix_matching"].idxmax()]
    shown = values.merge(best[["member", "layer", "head"]], on=["member", "layer", "head"])
    size = np.hypot(shown["real"], shown["imag"])
    largest = size.groupby([shown["member"], shown["circuit"]]).transform("max")
    shown = shown.assign(x=shown["real"] / largest, y=shown["imag"] / largest)
    for circuit, (name, colour) in CIRCUITS.items():
        rows = shown[shown["circuit"] == circuit]
        told = name + "<br>λ = %{customdata[0]:.3g} + %{customdata[1]:.3g} i<extra></extra>"
        marker = {"color": rgba(colour, 0.65), "size": 8}
        marker["symbol"] = "circle" if circuit == "OV" else "diamond"
        points = {"x": rows["x"], "y": rows["y"], "mode": "markers", "hovertemplate": told}
        figure.add_trace(
            go.Scatter(**points, customdata=rows[["real", "imag"]], name=name, marker=marker),
            row=1,
            col=1,
        )
    square = {"range": [-1.1, 1.1], "zeroline": True}
    figure.update_xaxes(**square, **axis("real λ / max |λ|"), row=1, col=1)
    figure.update_yaxes(**square, **axis("imaginary"), row=1, col=1)
    return shown


def signs(figure: go.Figure, heads: pd.DataFrame) -> None:
    """Copying against matching of all heads, coloured by what they attend to."""
    for role, colour in ROLES.items():
        rows = heads[heads["role"] == role]
        told = (
            role + " head %{customdata[0]}.%{customdata[1]}, seed %{customdata[2]}<br>"
            "QK %{x:.2f}, OV %{y:.2f}<extra></extra>"
        )
        points = {"x": rows["matching"], "y": rows["copying"], "mode": "markers"}
        figure.add_trace(
            go.Scatter(
                **points,
                customdata=rows[["layer", "head", "seed"]],
                name=f"{role} head" if role != "other" else "other heads",
                marker={"color": rgba(colour, 0.8), "size": 9},
                hovertemplate=told,
            ),
            row=1,
            col=4,
        )
    square = {"range": [-1.1, 1.1], "zeroline": True}
    figure.update_xaxes(**square, **axis("QK Σλ / Σ|λ|"), row=1, col=4)
    right = {"side": "right"}  # on the left a phone has no room for it
    figure.update_yaxes(**square, **axis("OV Σλ / Σ|λ|"), **right, row=1, col=4)


def ablation(tables: dict[str, Any], options: dict[str, Any]) -> tuple[go.Figure, pd.DataFrame]:
    """Bars: means; points: heads and seeds. A list chooses the score or the second copy's loss."""
    table = tables["heads/ablation"]
    table = table[table["run"] == "two_layer"]
    by = ["member", "patterns"]
    whole = table[table["removed"] == "nothing"].set_index(by)[["icl", "second_copy"]]
    table = table.join(whole.add_prefix("intact_"), on=by)
    table = table.assign(left=table["icl"] / table["intact_icl"])
    table = table.assign(place=[place(r) for r in table.to_dict("records")])
    table = table[table["place"] != ""]
    places = [p for p in PLACES if p in set(table["place"])]
    figure, values = go.Figure(), {column: [] for column in SHOWN}
    for patterns, (name, colour) in PATTERNS.items():
        rows = table[table["patterns"] == patterns]
        mean = rows.groupby("place")[list(SHOWN)].mean().reindex(places)
        for column in SHOWN:
            values[column] += [mean[column].to_numpy(), rows[column].to_numpy()]
        bar = {"x": places, "y": mean["left"], "marker": {"color": rgba(colour, 0.55)}}
        told = "%{x}<br>mean %{y:.3g}<extra></extra>"
        figure.add_trace(go.Bar(**bar, name=name, offsetgroup=patterns, hovertemplate=told))
        figure.add_trace(points(rows, colour, patterns))
    choices = {
        what: [{"y": values[column]}, {"yaxis.title.text": title, "yaxis.tickformat": form}]
        for column, (what, title, form) in SHOWN.items()
    }
    figure.update_layout(barmode="group", boxmode="group", updatemenus=[selector(choices)])
    figure.update_xaxes(categoryorder="array", categoryarray=places)
    figure.update_xaxes(autotickangles=[0, -90])  # on a phone
    _, title, form = SHOWN["left"]
    figure.update_yaxes(title={"text": title}, tickformat=form)
    kept = ["member", "seed", "patterns", "removed", "layer", "head", "role", "place", "icl"]
    kept += ["left", "second_copy", "intact_second_copy"]
    return common.headed(figure, 480), table[kept]


def points(rows: pd.DataFrame, colour: str, group: str) -> go.Box:
    """A point a row beside its bar: a box of which only the points are drawn."""
    told = "head %{customdata[0]}.%{customdata[1]}, seed %{customdata[2]}<br>%{y:.3g}"
    return go.Box(
        x=rows["place"],
        y=rows["left"],
        customdata=rows[["layer", "head", "seed"]],
        offsetgroup=group,
        boxpoints="all",
        pointpos=0,
        jitter=0.4,
        fillcolor="rgba(0,0,0,0)",
        line={"color": "rgba(0,0,0,0)"},
        marker={"color": colour, "size": 6},
        hoveron="points",
        hovertemplate=told + "<extra></extra>",
        showlegend=False,
    )


def place(row: dict) -> str:
    """The bar that a row of the table ablation belongs to; '' for none."""
    if row["removed"] == "induction heads":
        return PLACES[0]
    named = {"induction": PLACES[1], "previous token": PLACES[2]}
    return named.get(row["role"], PLACES[4 - row["layer"]] if row["role"] == "other" else "")
