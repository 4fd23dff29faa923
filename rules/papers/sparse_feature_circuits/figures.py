"""Figures of sparse feature circuits: one function each, named as in paper.yaml; no torch."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pipeline.report.kinds_graph import legend, ruled, walkable
from pipeline.report.theme import GRID, INK, PALETTE, colour, literal, rgba

STRUCTURES = {
    "simple": "simple",
    "within_rc": "within a relative clause",
    "across_rc": "across a relative clause",
    "across_pp": "across a prepositional phrase",
}
KINDS = {  # kind -> (name, colour, dash)
    "latents": ("latents and error terms", PALETTE[0], "solid"),
    "attribution": ("the same, by attribution patching", PALETTE[5], "solid"),
    "no_errors": ("latents alone", PALETTE[2], "solid"),
    "errors": ("error terms alone", PALETTE[4], "solid"),
    "neurons": ("neurons", PALETTE[1], "solid"),
    "random": ("random directions, with error terms", PALETTE[6], "dash"),
    "random_no_errors": ("random directions alone", PALETTE[6], "dot"),
    "random_nodes": ("latents and error terms, at random", PALETTE[3], "dot"),
}
SITES = {"attn_out": "attention", "mlp_out": "MLP", "resid_post": "stream"}
Drawn = tuple[go.Figure, pd.DataFrame]


def faithfulness(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Faithfulness of all kinds of nodes, a panel a structure."""
    return panels(next(iter(tables.values())), "faithfulness", list(KINDS))


def completeness(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """What the model can do without the strongest nodes."""
    return panels(next(iter(tables.values())), "completeness", ["latents", "neurons"])


def first(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of the first seed, which has the graphs."""
    return frame[frame["seed"] == frame["seed"].min()]


def panels(table: pd.DataFrame, column: str, kinds: list[str]) -> Drawn:
    own = table[(table["n_nodes"] > 0) & table["kind"].isin(kinds)]
    groups = own.groupby(["structure", "kind", "n_nodes"], sort=False)[column]
    frame = groups.agg(["mean", "min", "max"]).reset_index().rename(columns={"mean": column})
    frame = frame.sort_values("n_nodes", kind="stable")
    structures = list(dict.fromkeys(frame["structure"]))
    cols = min(2, len(structures))
    rows = -(-len(structures) // cols)
    figure = make_subplots(
        rows=rows, cols=cols, shared_yaxes=True, horizontal_spacing=0.05,
        vertical_spacing=0.16, subplot_titles=[STRUCTURES[s] for s in structures],
    )  # fmt: skip
    for k, structure in enumerate(structures):
        place = {"row": k // cols + 1, "col": k % cols + 1}
        for level in (0, 1):
            figure.add_hline(level, line={"color": GRID, "width": 1}, **place)
        for kind in kinds:
            own = frame[(frame["structure"] == structure) & (frame["kind"] == kind)]
            name, shade, dash = KINDS[kind]
            line = go.Scatter(
                x=own["n_nodes"], y=own[column], mode="lines+markers", name=name, legendgroup=kind,
                line={"color": shade, "dash": dash, "width": 2}, marker={"size": 4},
                error_y={"array": own["max"] - own[column], "arrayminus": own[column] - own["min"],
                         "thickness": 1, "width": 0, "color": rgba(shade, 0.5)},
                showlegend=k == 0,
                hovertemplate=f"{name}<br>%{{x}} nodes: %{{y:.2f}}<extra></extra>",
            )  # fmt: skip
            figure.add_trace(line, **place)
        last = k // cols == (len(structures) - 1) // cols
        title = {"text": "nodes in the circuit" if column == "faithfulness" else "nodes taken out"}
        figure.update_xaxes(type="log", dtick=1, title=title if last else None, **place)
    figure.update_yaxes(range=[-0.25, 1.75])
    figure.update_yaxes(title={"text": column}, col=1)
    figure.update_annotations(font_size=12)
    below = {"y": -60 / (220 * rows), "yanchor": "top"}
    figure.update_layout(height=150 + 220 * rows, margin={"t": 30, "b": 120}, legend=below)
    return figure, frame


def estimates(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Sizes of estimated and exact effects, a panel a method, a colour a site; first seed."""
    table = first(next(iter(tables.values())))
    methods = {"attribution": "attribution patching", "ig": "integrated gradients"}
    figure = make_subplots(
        rows=1, cols=2, shared_yaxes=True, horizontal_spacing=0.06,
        subplot_titles=list(methods.values()),
    )  # fmt: skip
    sizes = table[["exact", *methods]].abs()
    ends = [float(sizes["exact"].quantile(0.01)) or 1e-6, float(sizes.max().max())]
    line = {"color": INK, "dash": "dot", "width": 1}
    for col, method in enumerate(methods, 1):
        figure.add_trace(
            go.Scatter(x=ends, y=ends, mode="lines", line=line, hoverinfo="skip", showlegend=False),
            row=1, col=col,
        )  # fmt: skip
        for i, hook in enumerate(sorted(set(table["hook"]), key=place_of)):
            own = table[table["hook"] == hook]
            same = np.sign(own[method]) == np.sign(own["exact"])
            shape = np.where(own["number"] < 0, "triangle-up", "circle")
            point = go.Scatter(
                x=own["exact"].abs(), y=own[method].abs(), mode="markers", name=site(hook),
                legendgroup=hook, showlegend=col == 1,
                marker={"color": rgba(colour(i), 0.7), "symbol": np.where(same, shape, "x"),
                        "size": 6},
                customdata=list(zip(map(described, own.itertuples()), own["exact"], own[method],
                                    strict=True)),
                hovertemplate="%{customdata[0]}<br>exact %{customdata[1]:.3~g}, estimate "
                "%{customdata[2]:.3~g}<extra></extra>",
            )  # fmt: skip
            figure.add_trace(point, row=1, col=col)
    figure.update_xaxes(type="log", dtick=1, title={"text": "|exact effect| (logits)"})
    figure.update_yaxes(type="log", dtick=1, exponentformat="power")
    figure.update_yaxes(title={"text": "|estimate| (logits)"}, col=1)
    figure.update_annotations(font_size=12)
    figure.update_layout(height=440, margin={"t": 60}, legend={"y": 1.1})
    return figure, table


def described(row: Any) -> str:
    """A node in words."""
    number = "" if row.number < 0 else f"/{row.number}"
    kind = row.kind.replace("_", " ")
    return f"{STRUCTURES[row.structure]}: {kind} {row.layer}{number} at {row.position}"


def place_of(hook: str) -> tuple[int, int]:
    """The order of computation: by layer, and in it attention, MLP, stream."""
    _, layer, name = hook.split(".", 2)
    return int(layer), list(SITES).index(name.removeprefix("hook_"))


def site(hook: str) -> str:
    """A hook in words."""
    layer, number = place_of(hook)
    return f"{list(SITES.values())[number]} {layer}"


def sums(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Sums of estimates beside the exact effect of each whole site, mean over structures."""
    (table,) = tables.values()
    columns = {
        "whole": ("exact, the whole site", INK),
        "ig": ("integrated gradients, summed", PALETTE[0]),
        "attribution": ("attribution patching, summed", PALETTE[5]),
        "errors": ("of it error terms (integrated gradients)", PALETTE[4]),
    }
    frame = table.groupby("hook")[list(columns)].mean()
    frame = frame.loc[sorted(frame.index, key=place_of)].reset_index()
    figure = go.Figure()
    for column, (name, shade) in columns.items():
        figure.add_bar(
            x=[site(h) for h in frame["hook"]], y=frame[column], name=name, marker={"color": shade},
            hovertemplate=f"%{{x}}, {name}: %{{y:.3~g}}<extra></extra>",
        )  # fmt: skip
    figure.update_yaxes(title={"text": "change of logit difference"})
    figure.update_xaxes(title={"text": "site"})
    figure.update_layout(height=400)
    return figure, frame


def graph(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """The circuit of one structure: positions across, sites upwards; it can be walked."""
    rows, edges, prompts = (
        t[t["structure"] == options["structure"]]
        for t in (tables[f"agreement/{n}"] for n in ("graph_nodes", "graph_edges", "behaviour"))
    )
    (prompt,) = first(prompts).to_dict("records")
    places = sorted(set(rows["hook"]), key=place_of)
    nodes = spread(rows, places)
    symbol = np.where(nodes["number"] < 0, "triangle-up", "circle")
    shade = np.where(nodes["effect"] < 0, PALETTE[0], PALETTE[1])
    size = 8 + 16 * np.sqrt(nodes["effect"].abs() / nodes["effect"].abs().max())
    said = [about(row) for row in nodes.itertuples()]
    nodes = nodes.assign(symbol=symbol, colour=shade, size=size, about=said)
    last = len(prompt["tokens"]) - 1
    end = {
        "name": "logits", "x": last, "y": len(places), "symbol": "star", "colour": INK, "size": 16,
        "about": [f"logit of the right verb minus that of the wrong one, such as "
                  f"{prompt['answer'].strip()} − {prompt['foil'].strip()}"],
    }  # fmt: skip
    nodes = pd.concat([nodes, pd.DataFrame([end])], ignore_index=True)
    links = edges.assign(weight=-edges["effect"])
    figure = walkable(nodes, links, "logits", "logits")
    legend(
        figure,
        [
            ("helps the right verb", PALETTE[0], "circle"),
            ("hinders it", PALETTE[1], "circle"),
            ("error term", PALETTE[6], "triangle-up"),
        ],
    )
    ruled(figure, [*(site(h) for h in places), "logits"], list(map(literal, prompt["tokens"])))
    figure.update_xaxes(range=[0.4, last + 0.6])  # BOS is the same in all prompts
    figure.update_layout(height=120 + 70 * len(places))
    return figure, edges


def about(row: Any) -> list[str]:
    """What the reader is told of a node."""
    said = []
    if row.number >= 0:
        said.append(f"largest on: {row.tokens}" if row.tokens else "silent on held-out tokens")
        said.append(f"raises: {row.logits}")
    said.append(f"helps by {-row.effect:.3f} logits; mean size {row.activation:.2f}")
    return said


def spread(rows: pd.DataFrame, places: list[str]) -> pd.DataFrame:
    """Nodes of one site and position beside each other, in two rows where they are many."""
    out = []
    for (hook, position), own in rows.groupby(["hook", "position"], sort=False):
        n = len(own)
        k = np.arange(n)
        per_row = -(-n // (1 + (n > 5)))
        in_row = np.minimum(per_row, n)
        x = position + (k % per_row - (in_row - 1) / 2) * min(0.17, 0.8 / max(in_row, 1))
        y = places.index(hook) + 0.26 * (k // per_row) - 0.13 * (n > per_row)
        out.append(own.assign(x=x, y=y))
    return pd.concat(out)
