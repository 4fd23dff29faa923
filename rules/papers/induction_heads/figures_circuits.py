"""Weights and ablations: eigenvalues, composition, and what is left without a head."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pipeline.source import import_file
from pipeline.theme import DIVERGING, PALETTE, axis, rgba, scale

common = import_file(Path(__file__).with_name("figures_common.py"))
ROLES = {
    "induction": PALETTE[0],
    "previous token": PALETTE[1],
    "other": PALETTE[6],
}
CIRCUITS = {"OV": ("OV: copying", PALETTE[2]), "QK": ("QK: matching", PALETTE[3])}
PLACES = ["all induction heads", "one induction head", "previous-token head",
          "another head, second layer", "another head, first layer"]  # fmt: skip


def circuits(tables: dict[str, Any], options: dict[str, Any]) -> tuple[go.Figure, pd.DataFrame]:
    """Above: eigenvalues of the induction head, and the signs of all heads. Below: composition."""
    of = lambda name: (t := tables[f"heads/{name}"])[t["run"] == "two_layer"]  # noqa: E731
    values, heads, pairs = of("eigenvalues"), of("heads"), of("composition")
    heads = heads[heads["step"] == heads["step"].max()]
    figure = make_subplots(
        rows=2,
        cols=6,
        specs=[[{"colspan": 3}, None, None] * 2, [{"colspan": 2}, None] * 3],
        horizontal_spacing=0.06,
        vertical_spacing=0.2,
        subplot_titles=["eigenvalues of the induction head, by the largest", "all heads, all seeds"]
        + [f"{kind}-composition" for kind in "KQV"],
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
        figure.update_xaxes(**bare, title={"text": "first-layer head"}, row=2, col=2 * i + 1)
        figure.update_yaxes(**bare, row=2, col=2 * i + 1)
    figure.update_yaxes(title={"text": "second-layer head"}, row=2, col=1)
    bar = {"title": {"text": "above<br>random"}, "thickness": 12, "outlinewidth": 0}
    bar |= {"len": 0.42, "y": 0, "yanchor": "bottom"}
    colours = {"colorscale": scale(DIVERGING), "cmin": -reach, "cmax": reach, "colorbar": bar}
    figure.update_layout(coloraxis=colours)
    return common.headed(figure, 720), shown


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
    figure.update_xaxes(**square, **axis("real part"), row=1, col=1)
    figure.update_yaxes(**square, **axis("imaginary part"), row=1, col=1)
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
    figure.update_xaxes(**square, **axis("QK: Σλ / Σ|λ|"), row=1, col=4)
    figure.update_yaxes(**square, **axis("OV: Σλ / Σ|λ|"), row=1, col=4)


def ablation(tables: dict[str, Any], options: dict[str, Any]) -> tuple[go.Figure, pd.DataFrame]:
    """Bars: mean share of the score that is left; points: heads and seeds."""
    table = tables["heads/ablation"]
    table = table[table["run"] == "two_layer"]
    by = ["member", "patterns"]
    whole = table[table["removed"] == "nothing"].set_index(by)["icl"].rename("whole")
    table = table.join(whole, on=by)
    table = table.assign(
        left=table["icl"] / table["whole"], place=[place(r) for r in rows_of(table)]
    )
    table = table[table["place"] != ""]
    looks = {"kept": ("attention patterns kept", PALETTE[5]), "free": ("patterns free", PALETTE[4])}
    figure = go.Figure()
    for patterns, (name, colour) in looks.items():
        rows = table[table["patterns"] == patterns]
        mean = rows.groupby("place")["left"].mean().reindex(PLACES)
        bar = {"x": PLACES, "y": mean, "marker": {"color": rgba(colour, 0.55)}, "name": name}
        told = "%{x}<br>%{y:.1%} left<extra></extra>"
        figure.add_trace(go.Bar(**bar, offsetgroup=patterns, hovertemplate=told))
        told = "head %{customdata[0]}.%{customdata[1]}, seed %{customdata[2]}<br>%{y:.1%} left"
        figure.add_trace(
            go.Box(
                x=rows["place"],
                y=rows["left"],
                customdata=rows[["layer", "head", "seed"]],
                offsetgroup=patterns,
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
        )
    figure.update_layout(barmode="group", boxmode="group")
    figure.update_xaxes(**axis("what writes zero", categoryorder="array", categoryarray=PLACES))
    figure.update_yaxes(**axis("in-context learning score left", tickformat=".0%"))
    shown = ["member", "seed", "patterns", "removed", "role", "place", "icl", "left", "second_copy"]
    return common.headed(figure, 480), table[shown]


def rows_of(table: pd.DataFrame) -> list[dict]:
    return table[["removed", "role", "layer"]].to_dict("records")


def place(row: dict) -> str:
    """The bar that a row of the table ablation belongs to; '' for none."""
    if row["removed"] == "induction heads":
        return PLACES[0]
    named = {"induction": PLACES[1], "previous token": PLACES[2]}
    return named.get(row["role"], PLACES[4 - row["layer"]] if row["role"] == "other" else "")
