"""ROC curves, the areas under them, and what circuits of each size still do."""

from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from pipeline.claims import roc as curves
from pipeline.job.source import import_file
from pipeline.report.theme import INK, PALETTE, rgba, selector

common = import_file(Path(__file__).with_name("figures_common.py"))
KNOWN = {True: ("in the circuit", PALETTE[2]), False: ("not in it", PALETTE[1])}
EVERY = common.ORDERS | common.METHODS
Drawn = tuple[go.Figure, pd.DataFrame]
# experiments/results/auc_tables.tex of the authors' repository: task, ablation -> edges, nodes.
PUBLISHED = {
    ("reverse", "zero"): (1.0, 1.0),
    ("xproportion", "zero"): (1.0, 1.0),
    ("reverse", "corrupt"): (0.200, 0.312),
    ("xproportion", "corrupt"): (0.600, 0.727),
}


def roc(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """A panel a task and ablation, a line a method; a list chooses the known circuit."""
    edges, truth = common.first(tables["discovery/edges"]), tables["discovery/truth"]
    figure, place = common.panels(edges)
    rows, shown = [], []
    for number, name in enumerate(common.TRUTHS):
        for (task, ablation), at in place.items():
            own = truth[truth["task"] == task][name].to_numpy(bool)
            here = edges[(edges["task"] == task) & (edges["ablation"] == ablation)]
            for method, (label, line) in EVERY.items() if own.any() else ():
                found = curves.found_sets(here[here["method"] == method])
                fpr, tpr = curves.curve(found, own)
                steps = go.Scatter(
                    x=fpr, y=tpr, mode="lines+markers", name=label, legendgroup=method,
                    line=line | {"shape": "hv"}, marker={"size": 4},
                    showlegend=at == {"row": 1, "col": 1}, visible=number == 0,
                    hovertemplate=f"{label}: %{{y:.2f}} of the circuit, %{{x:.2f}} of the rest"
                    "<extra></extra>",
                )  # fmt: skip
                figure.add_trace(steps, **at)
                shown.append(number)
                key = {"truth": name, "task": task, "ablation": ablation, "method": method}
                rows.append(pd.DataFrame({"fpr": fpr, "tpr": tpr}).assign(**key))
    chance = {"color": INK, "dash": "dot", "width": 1}
    for at in place.values():
        diagonal = {"x": [0, 1], "y": [0, 1], "mode": "lines", "line": chance}
        figure.add_trace(go.Scatter(**diagonal, hoverinfo="skip", showlegend=False), **at)
    always = len(place)
    figure.update_layout(updatemenus=[chosen(shown, always)], height=560, margin={"t": 70})
    figure.update_xaxes(range=[-0.03, 1.03])
    figure.update_yaxes(range=[-0.03, 1.06])
    figure.update_xaxes(title={"text": "share of the other edges"}, row=2)
    figure.update_yaxes(title={"text": "share of the circuit"}, col=1)
    figure.update_layout(legend={"y": 1.09})
    return figure, pd.concat(rows, ignore_index=True)


def chosen(shown: list[int], always: int) -> dict:
    """A list of the known circuits.

    Args:
        shown: of each trace, the number of its circuit; `always` traces behind them stay.
    """
    choices = {
        label: [{"visible": [s == i for s in shown] + [True] * always}, {}]
        for i, label in enumerate(common.TRUTHS.values())
    }
    return selector(choices)


def areas(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """A panel a task and ablation: bars of the methods, edges and nodes; a list chooses.

    Lines run from the least to the most over seeds, and so over orders of ACDC's edges.
    """
    found = tables["discovery/areas"]
    trained = found[found["weights"] == "trained"]
    figure, place = common.panels(trained)
    shown, labels = [], ["edges", "nodes"]
    for number, name in enumerate(common.TRUTHS):
        for (task, ablation), at in place.items():
            is_here = (found["task"] == task) & (found["ablation"] == ablation)
            here = found[is_here & (found["truth"] == name)]
            bars = [(m, label, line["color"], "trained") for m, (label, line) in EVERY.items()]
            bars.append(("acdc", "ACDC on a reset network", PALETTE[5], "reset"))
            bars.append(("random", "random order", PALETTE[6], "trained"))
            for method, label, shade, weights in bars:
                own = here[(here["method"] == method) & (here["weights"] == weights)]
                if own.empty:
                    continue
                mean = own[labels].mean()
                least, most = mean - own[labels].min(), own[labels].max() - mean
                bar = go.Bar(
                    x=labels, y=mean, name=label, legendgroup=label,
                    error_y={"array": most, "arrayminus": least, "thickness": 1, "width": 3},
                    marker={"color": rgba(shade, 0.85)}, visible=number == 0,
                    showlegend=at == {"row": 1, "col": 1},
                    hovertemplate=f"{label}, %{{x}}: %{{y:.3f}}<extra></extra>",
                )  # fmt: skip
                figure.add_trace(bar, **at)
                shown.append(number)
            if name == "authors" and (task, ablation) in PUBLISHED:
                point = go.Scatter(
                    x=labels, y=PUBLISHED[task, ablation], mode="markers", name="ACDC, published",
                    marker={"symbol": "diamond", "size": 9, "color": INK}, visible=number == 0,
                    showlegend=at == {"row": 1, "col": 1}, legendgroup="published",
                    hovertemplate="published %{x}: %{y:.3f}<extra></extra>",
                )  # fmt: skip
                figure.add_trace(point, **at)
                shown.append(number)
    figure.update_layout(
        updatemenus=[chosen(shown, 0)], height=520, margin={"t": 84}, barmode="group",
        legend={"y": 1.11},
    )  # fmt: skip
    figure.update_yaxes(range=[0, 1.05])
    figure.update_yaxes(title={"text": "area under the curve"}, col=1)
    return figure, found


def distance(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """A panel a task and ablation: squared distance over that of the smallest set, by size."""
    sets = common.first(tables["discovery/sets"])
    figure, place = common.panels(sets)
    rows = []
    for (task, ablation), at in place.items():
        here = sets[(sets["task"] == task) & (sets["ablation"] == ablation)]
        for method, (label, line) in EVERY.items():
            own = here[here["method"] == method].groupby("n_edges", as_index=False)["loss"].min()
            steps = go.Scatter(
                x=own["n_edges"], y=own["loss"], mode="lines+markers", name=label,
                line=line, marker={"size": 4}, legendgroup=method,
                showlegend=at == {"row": 1, "col": 1},
                hovertemplate=f"{label}: %{{x}} edges, squared distance %{{y:.3~g}}<extra></extra>",
            )  # fmt: skip
            figure.add_trace(steps, **at)
            rows.append(own.assign(task=task, ablation=ablation, method=method))
    figure.update_xaxes(title={"text": "edges kept"}, row=2)
    figure.update_yaxes(title={"text": "squared distance"}, col=1)
    figure.update_layout(height=520, margin={"t": 70}, legend={"y": 1.09})
    return figure, pd.concat(rows, ignore_index=True)


def scores(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """A panel a task and ablation, a point an edge: |score| over the largest, log scale."""
    edges, truth = common.first(tables["discovery/edges"]), tables["discovery/truth"]
    figure, place = common.panels(edges)
    frames, shown = [], []
    for number, name in enumerate(common.TRUTHS):
        for (task, ablation), at in place.items():
            own = truth[truth["task"] == task][name].to_numpy(bool)
            here = edges[(edges["task"] == task) & (edges["ablation"] == ablation)]
            table = common.relative(here, own)
            frames.append(table.assign(task=task, ablation=ablation, truth=name))
            for known, (label, shade) in KNOWN.items() if own.any() else ():
                some = table[table["known"] == known]
                point = go.Scatter(
                    x=some["x"], y=some["size"], mode="markers", name=label, legendgroup=label,
                    marker={"color": rgba(shade, 0.6), "size": 6}, visible=number == 0,
                    showlegend=at == {"row": 1, "col": 1}, hovertext=some["edge"],
                    hovertemplate="%{hovertext}: %{y:.1e}<extra></extra>",
                )  # fmt: skip
                figure.add_trace(point, **at)
                shown.append(number)
    figure.update_xaxes(
        tickvals=[0, 1, 2, 3], ticktext=["ACDC", "EAP", "IG", "exact"], range=[-0.5, 3.5],
        tickangle=0,
    )  # fmt: skip
    decades = [1, 1e-5, 1e-10, 1e-15, common.NOUGHT]
    figure.update_yaxes(
        type="log", tickvals=decades, ticktext=["1", "10⁻⁵", "10⁻¹⁰", "10⁻¹⁵", "0"],
        range=[-21, 0.8],
    )  # fmt: skip
    figure.update_yaxes(title={"text": "|score| / largest"}, col=1)
    figure.update_layout(
        updatemenus=[chosen(shown, 0)], height=560, margin={"t": 70}, legend={"y": 1.09}
    )
    return figure, pd.concat(frames, ignore_index=True)
