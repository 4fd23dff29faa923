"""The circuit: its name movers, its graph, how good it is, and how right the estimates are."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pipeline.job.source import import_file
from pipeline.report.theme import GRID, INK, PAGE, PALETTE, axis, colour, rgba, selector

common = import_file(Path(__file__).with_name("figures_common.py"))
NAMES = {"IO": ("IO", PALETTE[0]), "S": ("S", PALETTE[1])}
# class -> (column of the heads' effects, the classes that read it)
FLOWS = {
    "previous": ("to_induction", ("induction",)),
    "duplicate": ("to_inhibition", ("s_inhibition",)),
    "induction": ("to_inhibition", ("s_inhibition",)),
    "s_inhibition": ("to_movers", ("name_mover", "suppressor", "backup", "negative")),
    "name_mover": ("direct", ("logits",)),
    "suppressor": ("direct", ("logits",)),
    "writer": ("direct", ("logits",)),
    "backup": ("direct", ("logits",)),
    "negative": ("direct", ("logits",)),
}


def movers(tables: dict[str, Any], options: dict[str, Any]) -> tuple[go.Figure, pd.DataFrame]:
    """A point a prompt and name; a panel a head; a list chooses the arm."""
    scatter, heads = (common.first(tables[f"circuit/{t}"]) for t in ("scatter", "heads"))
    if scatter.empty:
        return nothing("no head moves names here"), scatter
    arm = common.arms_of(scatter)[0][0]
    scatter = scatter[scatter["arm"] == arm]
    role = heads[heads["arm"] == arm].set_index(["layer", "head"])["role"]
    chosen = list(dict.fromkeys(zip(scatter["layer"], scatter["head"], strict=True)))[:6]
    cols = min(3, len(chosen))
    rows = -(-len(chosen) // cols)
    titles = [f"head {i}.{h}, {common.ROLES[role[i, h]][0]}" for i, h in chosen]
    figure = make_subplots(
        rows=rows, cols=cols, subplot_titles=titles, horizontal_spacing=0.08, vertical_spacing=0.16
    )
    for k, (layer, head) in enumerate(chosen):
        place = {"row": k // cols + 1, "col": k % cols + 1}
        own = scatter[(scatter["layer"] == layer) & (scatter["head"] == head)]
        for name, (label, shade) in NAMES.items():
            some = own[own["name"] == name]
            point = go.Scatter(
                x=some["attention"],
                y=some["logit"],
                mode="markers",
                marker={"color": rgba(shade, 0.7), "size": 6},
                name=label,
                legendgroup=name,
                showlegend=k == 0,
                hovertemplate=f"{label}: attention %{{x:.2f}}, logit %{{y:.2f}}<extra></extra>",
            )
            figure.add_trace(point, **place)
        figure.update_xaxes(range=[-0.03, 1.03], **place)
    figure.update_xaxes(title={"text": "attention from END to the name"}, row=rows)
    figure.update_yaxes(title={"text": "logit of the name"}, col=1)
    common.headed(figure, 90 + 250 * rows)
    figure.update_layout(legend={"y": 1 + 28 / (250 * rows)})
    return figure, scatter


def nothing(why: str) -> go.Figure:
    """A figure that says why it is empty."""
    figure = go.Figure()
    figure.add_annotation(text=why, showarrow=False, x=0.5, y=0.5, xref="paper", yref="paper")
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return figure


def graph(tables: dict[str, Any], options: dict[str, Any]) -> tuple[go.Figure, pd.DataFrame]:
    """Heads by class (across) and layer (upwards); lines are as wide as the sender's effect."""
    table = common.first(next(iter(tables.values())))
    arm, named = common.arms_of(table)[0]
    heads = table[(table["arm"] == arm) & (table["role"] != "")]
    if heads.empty:
        return nothing("no head counts here"), heads
    figure, x, spots, edges = go.Figure(), {}, {}, []
    for role in common.ROLES:
        rows = heads[heads["role"] == role].sort_values(["layer", "head"])
        x[role] = len(x)
        for k, row in enumerate(rows.itertuples()):
            spread = 0.5 * (k - (len(rows) - 1) / 2) / max(1, len(rows) - 1)
            spots[row.layer, row.head] = (x[role] + spread, row.layer)
    top = float(table[table["arm"] == arm]["layer"].max()) + 2
    for row in heads.itertuples():
        column, readers = FLOWS[row.role]
        effect = abs(getattr(row, column))
        ends = [
            (spots[r.layer, r.head], f"{r.layer}.{r.head}")
            for r in heads[heads["role"].isin(readers)].itertuples()
            if r.layer > row.layer
        ]
        ends += [((5.5, top), "logits")] if "logits" in readers else []
        for spot, target in ends:
            edges.append((f"{row.layer}.{row.head}", target, row.role, effect))
            figure.add_trace(flow(spots[row.layer, row.head], spot, row.role, effect))
    for role, (label, shade) in common.ROLES.items():
        rows = heads[heads["role"] == role]
        if len(rows):
            figure.add_trace(nodes(rows, [spots[k] for k in pairs(rows)], label, shade))
    figure.add_trace(
        go.Scatter(
            x=[5.5],
            y=[top],
            mode="text",
            text=["<b>logits</b>"],
            hoverinfo="skip",
            showlegend=False,
            textfont={"color": INK},
        )
    )
    figure.update_xaxes(
        tickvals=list(x.values()), ticktext=[common.ROLES[r][0].replace(" ", "<br>") for r in x],
        showgrid=False, zeroline=False, range=[-0.6, len(x) - 0.4],
    )  # fmt: skip
    figure.update_yaxes(title={"text": f"layer of {named}"}, zeroline=False, range=[-1, top + 1])
    figure.update_layout(height=560, showlegend=False)
    return figure, pd.DataFrame(edges, columns=["sender", "receiver", "role", "effect"])


def pairs(rows: pd.DataFrame) -> list[tuple[int, int]]:
    return list(zip(rows["layer"], rows["head"], strict=True))


def flow(a: tuple, b: tuple, role: str, effect: float) -> go.Scatter:
    """A line between two heads."""
    line = {"color": rgba(common.ROLES[role][1], 0.45), "width": float(np.clip(4 * effect, 0.6, 7))}
    return go.Scatter(
        x=[a[0], b[0]], y=[a[1], b[1]], mode="lines", line=line, hoverinfo="skip", showlegend=False
    )


def nodes(rows: pd.DataFrame, spots: list[tuple], label: str, shade: str) -> go.Scatter:
    """The heads of a class; names of neighbours in a layer take turns above and below."""
    layers = [layer for layer, _ in pairs(rows)]
    turns = [layers[:k].count(layer) % 2 for k, layer in enumerate(layers)]
    beside = ["middle right" if layers.count(layer) == 1 else "" for layer in layers]
    return go.Scatter(
        x=[s[0] for s in spots],
        y=[s[1] for s in spots],
        mode="markers+text",
        text=[f"{i}.{h}" for i, h in pairs(rows)],
        textfont={"size": 10, "color": INK},
        textposition=[
            b or ("top center", "bottom center")[t] for b, t in zip(beside, turns, strict=True)
        ],
        marker={"color": shade, "size": 13, "line": {"color": PAGE, "width": 1.5}},
        name=label,
        hovertemplate="head %{text}<br>" + label + "<extra></extra>",
    )


def judged(tables: dict[str, Any], options: dict[str, Any]) -> tuple[go.Figure, pd.DataFrame]:
    """Left: F of the circuits. Right: F without K of circuit and model; a list chooses."""
    (table,) = tables.values()
    keys = list(dict.fromkeys(zip(table["arm"], table["source"], strict=True)))
    figure = make_subplots(
        rows=1, cols=2, column_widths=[0.42, 0.58], horizontal_spacing=0.12,
        subplot_titles=["faithfulness", "completeness: without a set K of heads"],
    )  # fmt: skip
    shown: list[int] = []
    for number, (arm, source) in enumerate(keys):
        rows = table[(table["arm"] == arm) & (table["source"] == source)]
        for col, trace in [(1, t) for t in bars(rows)] + [(2, t) for t in points(rows)]:
            trace.visible = number == 0
            figure.add_trace(trace, row=1, col=col)
            shown.append(number)
    names = [f"{common.ARMS.get(a, a)}, {s}" for a, s in keys]
    if len(keys) > 1:
        choices = {n: [{"visible": [s == i for s in shown]}, {}] for i, n in enumerate(names)}
        figure.update_layout(updatemenus=[selector(choices)])
    figure.update_yaxes(title={"text": "logit difference F"}, row=1, col=1)
    figure.update_xaxes(title={"text": "F of the model without K"}, row=1, col=2)
    figure.update_yaxes(title={"text": "F of the circuit without K"}, row=1, col=2)
    common.headed(figure, 440)
    figure.update_layout(legend={"x": 0.5, "y": -0.2, "yanchor": "top"}, margin={"b": 100})
    return figure, table


def bars(rows: pd.DataFrame) -> list[go.Bar]:
    """F of the model, the circuits, and the nulls: mean over seeds, from the least to the most."""
    by_circuit = rows[rows["removed"] == "nothing"].groupby("circuit", sort=False)
    plain = by_circuit[["f", "n_heads"]].mean().reset_index()
    least, most = (getattr(by_circuit["f"], end)().to_numpy() for end in ("min", "max"))
    spread = {"array": most - plain["f"], "arrayminus": plain["f"] - least, "thickness": 1}
    shades = {"model": GRID, "circuit": PALETTE[0], "naive": PALETTE[4]}
    return [
        go.Bar(
            x=plain["circuit"],
            y=plain["f"],
            marker={"color": [shades.get(c, PALETTE[6]) for c in plain["circuit"]]},
            customdata=plain["n_heads"],
            error_y=spread,
            hovertemplate="%{x}: %{y:.2f}, %{customdata:.0f} heads<extra></extra>",
            showlegend=False,
        )
    ]


def points(rows: pd.DataFrame) -> list[go.Scatter]:
    """F without K, a point a set; on the line the circuit loses what the model loses."""
    sets = common.first(rows[rows["removed"] != "nothing"])
    wide = sets.pivot(index="removed", columns="circuit", values="f")
    wide = wide[[c for c in ("model", "circuit", "naive") if c in wide]]
    if wide.empty:
        return []
    ends = [float(np.nanmin(wide)), float(np.nanmax(wide))]
    line = {"color": INK, "dash": "dot", "width": 1}
    out = [go.Scatter(x=ends, y=ends, mode="lines", line=line, name="equal", hoverinfo="skip")]
    for name, shade in (("circuit", PALETTE[0]), ("naive", PALETTE[4])):
        if name not in wide:
            continue
        greedy = wide.index.str.startswith("greedy")
        out.append(
            go.Scatter(
                x=wide["model"],
                y=wide[name],
                mode="markers",
                name={"circuit": "the circuit", "naive": "the naive circuit"}[name],
                marker={"color": shade, "size": 9, "symbol": np.where(greedy, "diamond", "circle")},
                customdata=[str(k).replace("_", " ") for k in wide.index],
                hovertemplate="without %{customdata}<br>model %{x:.2f}, " + name + " %{y:.2f}"
                "<extra></extra>",
            )
        )
    return out


def minimality(tables: dict[str, Any], options: dict[str, Any]) -> tuple[go.Figure, pd.DataFrame]:
    """A bar a head of the circuit: what F loses with it, at the set K where that is most."""
    table = common.first(next(iter(tables.values())))
    table = table[table["set"] != "class"]
    size = (table["with"] - table["without"]).abs()
    most = size.groupby([table[k] for k in ("arm", "source", "layer", "head")]).idxmax()
    table = table.loc[sorted(most)]
    if table.empty:
        return nothing("no circuit was found here"), table
    keys = list(dict.fromkeys(zip(table["arm"], table["source"], strict=True)))
    figure, shown = go.Figure(), []
    for number, (arm, source) in enumerate(keys):
        rows = table[(table["arm"] == arm) & (table["source"] == source)]
        for role, (label, shade) in common.ROLES.items():
            some = rows[rows["role"] == role]
            if some.empty:
                continue
            figure.add_bar(
                x=[f"{i}.{h}" for i, h in pairs(some)],
                y=some["with"] - some["without"],
                name=label,
                marker={"color": shade},
                visible=number == 0,
                customdata=some["set"],
                hovertemplate=f"head %{{x}}, {label}<br>%{{y:.3~g}} logits, K: %{{customdata}}"
                "<extra></extra>",
            )
            shown.append(number)
    if len(keys) > 1:
        names = [f"{common.ARMS.get(a, a)}, {s}" for a, s in keys]
        choices = {n: [{"visible": [s == i for s in shown]}, {}] for i, n in enumerate(names)}
        figure.update_layout(updatemenus=[selector(choices)])
    figure.update_xaxes(type="category")
    figure.update_layout(xaxis=axis("head"), yaxis=axis("loss of logit difference"), height=400)
    return figure, table


def estimates(tables: dict[str, Any], options: dict[str, Any]) -> tuple[go.Figure, pd.DataFrame]:
    """Scores against exact effects: of nodes by attribution patching, of edges by EAP."""
    nodes = next(f for name, f in tables.items() if name.endswith("_nodes"))
    edges = next(f for name, f in tables.items() if name.endswith("_edges"))
    keys = ["kind", "layer", "head", "position", "seed"]
    whole = nodes[nodes["kind"].isin(["head", "mlp"])]
    by = {m: f.set_index(keys)["score"] for m, f in whole.groupby("method")}
    frames = []
    if {"attribution_patching", "activation_patching"} <= by.keys():
        joined = pd.concat([by["attribution_patching"], by["activation_patching"]], axis=1)
        joined.columns = ["score", "exact"]
        frames.append(joined.reset_index(drop=True).assign(method="attribution patching, nodes"))
    for method, name in (("eap", "EAP, edges"), ("eap_ig", "EAP-IG, edges")):
        some = edges[(edges["method"] == method) & edges["exact"].notna()]
        frames.append(some[["score", "exact"]].assign(method=name))
    frame = pd.concat(frames, ignore_index=True)
    figure = make_subplots(
        rows=1, cols=3, horizontal_spacing=0.08, subplot_titles=list(dict.fromkeys(frame["method"]))
    )
    for col, (_, some) in enumerate(frame.groupby("method", sort=False), 1):
        ends = [
            float(some[["score", "exact"]].min().min()),
            float(some[["score", "exact"]].max().max()),
        ]
        line = {"color": INK, "dash": "dot", "width": 1}
        figure.add_trace(
            go.Scatter(x=ends, y=ends, mode="lines", line=line, hoverinfo="skip"), 1, col
        )
        marker = {"color": rgba(colour(col - 1), 0.7), "size": 6}
        told = "exact %{x:.3~g}, estimated %{y:.3~g}<extra></extra>"
        point = {"x": some["exact"], "y": some["score"], "mode": "markers", "marker": marker}
        figure.add_trace(go.Scatter(**point, hovertemplate=told), 1, col)
    figure.update_xaxes(title={"text": "exact effect (logits)"})
    figure.update_yaxes(title={"text": "estimate (logits)"}, row=1, col=1)
    figure.update_layout(showlegend=False)
    return common.headed(figure, 360), frame
