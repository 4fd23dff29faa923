"""Lines and bars: searches, kinds of nodes, layers and costs, a colour a method."""

from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pipeline.job.source import import_file
from pipeline.report.theme import INK, axis

common = import_file(Path(__file__).with_name("figures_common.py"))
NODES = ("attribution_patching", "attribution_ig", "qk_fix", "atp_star")
GROUPS = {"head": "heads", "mlp": "MLPs", "q": "queries", "k": "keys", "v": "values",
          "saturated": "q, k: attention above 0.9", "even": "q, k: below", "resid": "stream",
          "edges": "edges"}  # fmt: skip
OF_EDGES = {"eap": "attribution_patching", "eap_ig": "attribution_ig"}


def spread(rows: pd.DataFrame, keys: list[str], columns: list[str]) -> pd.DataFrame:
    """Means over seeds of all numbers, with the least and the most of some columns."""
    groups = rows.groupby(keys, sort=False)
    out = groups.mean(numeric_only=True)
    for column in columns:
        out[f"{column}_least"], out[f"{column}_most"] = groups[column].min(), groups[column].max()
    return out.reset_index().drop(columns="seed")


def search(tables: dict[str, Any], options: dict[str, Any]) -> tuple[go.Figure, pd.DataFrame]:
    """Share of the nodes that matter most against nodes patched exactly, best first."""
    table = common.first(next(iter(tables.values())))
    nodes = table[table["unit"] == "node"]
    found, shown, figure = common.cases(nodes), [], go.Figure()
    for number, (_, case) in enumerate(found):
        n = int(case["n"].iloc[0])
        wanted = round(1 / case["found"].min())  # the first that is found is one of so many
        for label, last in {"if the order were right": wanted, "in any order": n}.items():
            x = [1 + (last - 1) * i / 60 for i in range(61)]
            figure.add_scatter(
                x=x,
                y=[v / last for v in x],  # a line, which the logarithmic axis bends
                mode="lines",
                name=label,
                line={"color": INK, "dash": "dot" if last == n else "dash", "width": 1},
                hoverinfo="skip",
            )
            shown.append(number)
        for method in NODES:
            some, (label, shade) = case[case["method"] == method], common.METHODS[method]
            figure.add_scatter(
                x=some["checked"],
                y=some["found"],
                mode="lines",
                name=label,
                line={"color": shade, "shape": "hv", "width": 2},
                hovertemplate="%{x} patched exactly: %{y:.0%} found",
            )
            shown.append(number)
    figure.update_layout(
        xaxis=axis("nodes patched exactly, in the order of the estimate", log=True),
        yaxis=axis("share found of those that matter most") | {"tickformat": ".0%"},
        height=420,
    )
    return common.chosen(figure, shown, [name for name, _ in found]), table


def kinds(tables: dict[str, Any], options: dict[str, Any]) -> tuple[go.Figure, pd.DataFrame]:
    """Two panels of points, a row a kind: correlation, and false negatives.

    Points are means over seeds, and lines run from the least to the most.
    """
    (table,) = tables.values()
    rows = table[table["group"].isin(GROUPS)]
    rows = spread(rows, ["arm", "task", "method", "group"], ["correlation", "missed"])
    rows = rows.assign(shown=rows["method"].replace(OF_EDGES))
    found, shown = common.cases(rows), []
    columns = {"correlation": "correlation with the exact effect", "missed": "share missed"}
    figure = make_subplots(
        rows=1, cols=2, shared_yaxes=True, horizontal_spacing=0.06,
        subplot_titles=list(columns.values()),
    )  # fmt: skip
    for number, (_, case) in enumerate(found):
        for i, column in enumerate(columns, 1):
            for method in NODES:
                some, (label, shade) = case[case["shown"] == method], common.METHODS[method]
                figure.add_trace(
                    go.Scatter(
                        x=some[column],
                        y=[GROUPS[g] for g in some["group"]],
                        mode="markers",
                        name=label,
                        legendgroup=method,
                        showlegend=i == 1,
                        marker={"color": shade, "size": 10, "opacity": 0.85},
                        error_x={
                            "array": some[f"{column}_most"] - some[column],
                            "arrayminus": some[column] - some[f"{column}_least"],
                            "thickness": 1,
                            "width": 2,
                            "color": shade,
                        },
                        customdata=some["matter" if column == "missed" else "n"],
                        hovertemplate="%{y}: %{x:.3~g}, of %{customdata:.0f}",
                    ),
                    row=1,
                    col=i,
                )
                shown.append(number)
    order = {"categoryorder": "array", "categoryarray": list(GROUPS.values())[::-1]}
    figure.update_yaxes(type="category", **order)
    figure.update_xaxes(tickformat=".0%", rangemode="tozero", row=1, col=2)
    common.chosen(figure, shown, [name for name, _ in found])
    return common.titled(figure, 440), rows.drop(columns="shown")


def layers(tables: dict[str, Any], options: dict[str, Any]) -> tuple[go.Figure, pd.DataFrame]:
    """Sum of |estimate - exact| over the sum of |exact|, of all nodes of a layer."""
    (table,) = tables.values()
    whole = table[(table["kind"] != "resid") & table["method"].isin(NODES[:-1])]
    whole = whole.assign(
        off=(whole["score"] - whole["exact_score"]).abs(), size_=whole["exact_score"].abs()
    )
    sums = whole.groupby(["arm", "task", "method", "layer"], sort=False)[["off", "size_"]].sum()
    frame = sums.assign(error=sums["off"] / sums["size_"]).reset_index()
    found, shown, figure = common.cases(frame), [], go.Figure()
    for number, (_, case) in enumerate(found):
        for method in NODES[:-1]:
            some, (label, shade) = case[case["method"] == method], common.METHODS[method]
            figure.add_scatter(
                x=some["layer"],
                y=some["error"],
                mode="lines+markers",
                name=label,
                line={"color": shade, "width": 2},
                marker={"size": 5},
                hovertemplate="layer %{x}: %{y:.3~g}",
            )
            shown.append(number)
    figure.update_layout(
        xaxis=axis("layer"), yaxis=axis("error, relative") | {"rangemode": "tozero"}, height=400
    )
    frame = frame.rename(columns={"size_": "effect"})
    return common.chosen(figure, shown, [name for name, _ in found]), frame


def cost(tables: dict[str, Any], options: dict[str, Any]) -> tuple[go.Figure, pd.DataFrame]:
    """A point a method: seconds, and correlation over all nodes; exact patching is right."""
    costs, quality = tables["estimates/costs"], tables["estimates/quality"]
    keys = ["arm", "task", "method"]
    by_case = quality[quality["group"] == "all"].groupby(keys, sort=False)
    of_nodes = costs[costs["unit"] == "node"].groupby(keys, sort=False)
    seen = of_nodes[["seconds", "forwards", "backwards"]].mean().reset_index()
    frame = seen.merge(by_case["correlation"].mean().reset_index(), on=keys, how="left")
    frame.loc[frame["method"] == "activation_patching", "correlation"] = 1.0  # with itself
    found, shown, figure = common.cases(frame), [], go.Figure()
    for number, (_, case) in enumerate(found):
        for row in case.itertuples():
            label, shade = common.METHODS[row.method]
            told = f"{row.forwards:.0f} forward, {row.backwards:.0f} backward"
            slowest = row.seconds == case["seconds"].max()
            figure.add_scatter(
                x=[row.seconds],
                y=[row.correlation],
                mode="markers+text",
                name=label,
                text=[told],
                textposition="bottom left" if slowest else "bottom right",
                marker={"color": shade, "size": 13},
                hovertemplate=f"{label}: {told} passes<br>%{{x:.3~g}} s, %{{y:.3~g}}",
            )
            shown.append(number)
    figure.update_layout(
        xaxis=axis("time for all nodes", "s", log=True),
        yaxis=axis("correlation with the exact effect"),
        height=420,
    )
    return common.chosen(figure, shown, [name for name, _ in found]), frame
