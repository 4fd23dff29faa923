"""Graphs that a reader walks; no torch.

1. `walkable` is a graph of nodes and signed links: templates/walk.js shows, at a click, what a node
   reads and what reads it. A paper's figures.py may call it.
2. `attribution_graph` lays out the tables of the stage graphs: tokens across, layers upwards,
   supernodes as one node each.
"""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from pipeline.figures.theme import GRID, INK, PAGE, PALETTE, literal, rgba

UP, DOWN = PALETTE[0], PALETTE[1]  # links of positive and of negative weight
WIDTHS = (0.7, 1.6, 3.2)  # of the weakest, middle and strongest third of the range of |weight|


def walkable(nodes: pd.DataFrame, links: pd.DataFrame, start: str, unit: str) -> go.Figure:
    """The graph, with `start` shown at first.

    Args:
        nodes: name, x, y, colour, symbol, size (pixels), and about: lines of text of each.
        links: source and target (names), weight.
        unit: of the weights.
    """
    place = {name: i for i, name in enumerate(nodes["name"])}
    joined = [
        [place[s], place[t], float(w)]
        for s, t, w in zip(links["source"], links["target"], links["weight"], strict=True)
    ]
    figure = go.Figure(drawn(nodes, joined))
    n_lines = len(figure.data)
    for shade in (UP, DOWN):  # those of the chosen node, filled by walk.js
        line = {"color": shade, "width": 2.4}
        figure.add_scatter(x=[], y=[], mode="lines", line=line, hoverinfo="skip", showlegend=False)
    figure.add_trace(markers(nodes))
    about = [[str(line) for line in lines] for lines in nodes["about"]]
    walk = {
        "nodes": n_lines + 2,
        "lines": list(range(n_lines)),
        "up": n_lines,
        "down": n_lines + 1,
        "labels": [str(name) for name in nodes["name"]],
        "about": about,
        "links": joined,
        "start": place[start],
        "unit": unit,
    }
    figure.update_layout(meta={"walk": walk, "min_width": 640}, showlegend=False)
    return figure


def drawn(nodes: pd.DataFrame, links: list[list]) -> list[go.Scatter]:
    """All links, a trace a sign and width."""
    if not links:
        return []
    x, y = nodes["x"].to_numpy(float), nodes["y"].to_numpy(float)
    weights = np.array([w for *_, w in links])
    most = np.abs(weights).max() or 1.0
    third = np.minimum((3 * np.abs(weights) / most).astype(int), 2)
    out = []
    for sign, shade in ((True, UP), (False, DOWN)):
        for size, width in enumerate(WIDTHS):
            some = np.flatnonzero(((weights > 0) == sign) & (third == size))
            ends = [links[i][:2] for i in some]
            if not ends:
                continue
            gap = lambda v, ends=ends: [p for s, t in ends for p in (v[s], v[t], None)]  # noqa: E731
            line = {"color": rgba(shade, 0.25 + 0.15 * size), "width": width}
            out.append(
                go.Scatter(
                    x=gap(x), y=gap(y), mode="lines", line=line, hoverinfo="skip", showlegend=False
                )
            )
    return out


def markers(nodes: pd.DataFrame) -> go.Scatter:
    """All nodes, with what is known of each in its hover box."""
    told: list[Any] = [
        "<br>".join([f"<b>{literal(name)}</b>", *(literal(line) for line in lines if line)])
        for name, lines in zip(nodes["name"], nodes["about"], strict=True)
    ]
    return go.Scatter(
        x=nodes["x"],
        y=nodes["y"],
        mode="markers",
        marker={
            "color": list(nodes["colour"]),
            "symbol": list(nodes["symbol"]),
            "size": nodes["size"],
            "line": {"color": PAGE, "width": 1},
        },
        customdata=told,
        hovertemplate="%{customdata}<extra></extra>",
        showlegend=False,
    )


def legend(figure: go.Figure, entries: list[tuple[str, str, str]]) -> None:
    """Entries that stand for colours and symbols of nodes: (text, colour, symbol)."""
    for text, shade, symbol in entries:
        marker = {"color": shade, "symbol": symbol, "size": 10}
        figure.add_scatter(x=[None], y=[None], mode="markers", marker=marker, name=text,
                           showlegend=True, hoverinfo="skip")  # fmt: skip
    figure.update_layout(showlegend=True)


def ruled(figure: go.Figure, rows: list[str], columns: list[str]) -> None:
    """Rows and columns of a graph laid out on a grid, with their names."""
    figure.update_yaxes(
        tickvals=list(range(len(rows))), ticktext=rows, showgrid=True, gridcolor=GRID,
        zeroline=False, range=[-0.6, len(rows) - 0.4],
    )  # fmt: skip
    figure.update_xaxes(
        tickvals=list(range(len(columns))), ticktext=columns, showgrid=False, zeroline=False,
        range=[-0.6, len(columns) - 0.4], tickfont={"color": INK},
    )  # fmt: skip


# --- attribution graphs --------------------------------------------------------------------

KINDS = {  # of a node -> in the legend, colour, symbol
    "feature": ("feature", PALETTE[0], "circle"),
    "supernode": ("nodes put together by hand", PALETTE[4], "hexagon"),
    "error": ("error of a dictionary", PALETTE[6], "diamond"),
    "embed": ("token", PALETTE[2], "square"),
    "logit": ("next token", PALETTE[3], "star"),
}
SPREAD = 0.8  # of the width of a token's column, that nodes of one layer share
CROWD = 0.3  # of a column, that each further node of its fullest layer widens it by


def attribution_graph(nodes: pd.DataFrame, edges: pd.DataFrame, most: int) -> go.Figure:
    """One prompt's graph, as the stage graphs writes it, to be walked from its first logit.

    Args:
        nodes: of one prompt: node, kind, layer, position, token, activation, probability,
            influence, supernode.
        edges: source, target, effect.
        most: features and errors that are drawn, those of largest influence; supernodes always.
    """
    inner = nodes[nodes["kind"].isin(["feature", "error"]) & (nodes["supernode"] == "")]
    left = set(inner.nsmallest(max(len(inner) - most, 0), "influence")["node"])
    nodes = nodes[~nodes["node"].isin(left)]
    edges = edges[~(edges["source"].isin(left) | edges["target"].isin(left))]
    grouped, of = together(nodes)
    links = pd.DataFrame(
        {"source": edges["source"].map(of), "target": edges["target"].map(of),
         "weight": edges["effect"]}
    )  # fmt: skip
    links = links[links["source"] != links["target"]]
    links = links.groupby(["source", "target"], sort=False, as_index=False)["weight"].sum()
    laid = placed(grouped)
    first = laid[laid["kind"] == "logit"].nlargest(1, "probability")["name"].iloc[0]
    figure = walkable(laid, links, first, "")
    there = [KINDS[kind] for kind in KINDS if kind in set(laid["kind"])]
    legend(figure, there)
    tokens = nodes[nodes["kind"] == "embed"].sort_values("position")
    n_layers = int(nodes.loc[nodes["kind"] == "logit", "layer"].iloc[0])
    rows = ["token", *(f"layer {layer}" for layer in range(n_layers)), "next token"]
    middle, wide = columns(grouped)
    ruled(figure, rows, [literal(visible(t)) for t in tokens["token"]])
    places = tokens["position"].map(middle).tolist()
    ends = [places[0] - wide[tokens["position"].iloc[0]] / 2, max(middle + wide / 2)]
    figure.update_xaxes(tickvals=places, range=[ends[0] - 0.1, ends[1] + 0.1])
    figure.update_layout(height=max(420, 46 * len(rows) + 160))
    return figure


def together(nodes: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, str]]:
    """(nodes with the members of a supernode as one, node -> what stands for it)."""
    of = {n: s or n for n, s in zip(nodes["node"], nodes["supernode"], strict=True)}
    out = []
    for name, rows in nodes.groupby(nodes["node"].map(of), sort=False):
        row = rows.iloc[0].to_dict() | {"node": name, "members": list(rows["node"])}
        if rows["supernode"].iloc[0]:
            row |= {"kind": "supernode", "influence": rows["influence"].sum()}
            row |= {"layer": int(rows["layer"].median()), "position": int(rows["position"].max())}
        out.append(row)
    return pd.DataFrame(out), of


def columns(nodes: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """(middle, width) of each column, the first at 0; wide where many nodes stand in a layer."""
    most = nodes.groupby(["position", "layer"]).size().groupby("position").max()
    every = most.reindex(range(int(nodes["position"].max()) + 1), fill_value=1)
    wide = 1 + CROWD * (every - 1)
    middle = wide.cumsum() - wide / 2
    return middle - middle.iloc[0], wide


def placed(nodes: pd.DataFrame) -> pd.DataFrame:
    """Nodes with places on the grid of tokens and layers, sizes and lines of text."""
    nodes = nodes.assign(y=nodes["layer"] + 1).sort_values(["y", "position"], kind="stable")
    cell = nodes.groupby(["y", "position"], sort=False)["node"]
    shift = (cell.cumcount() + 0.5) / cell.transform("size") - 0.5
    middle, wide = columns(nodes)
    largest = np.nanmax(nodes["influence"].to_numpy(float)) or 1.0
    share = nodes["influence"].fillna(largest) / largest
    about = [about_of(row) for row in nodes.to_dict("records")]
    return pd.DataFrame(
        {
            "name": nodes["node"], "kind": nodes["kind"], "probability": nodes["probability"],
            "x": nodes["position"].map(middle) + SPREAD * shift * nodes["position"].map(wide),
            "y": nodes["y"], "about": about,
            "colour": [KINDS[k][1] for k in nodes["kind"]],
            "symbol": [KINDS[k][2] for k in nodes["kind"]], "size": 7 + 11 * np.sqrt(share),
        }
    )  # fmt: skip


def about_of(row: dict[str, Any]) -> list[str]:
    """Lines of text of a node: whose token, how active, what it holds."""
    token = f"“{visible(row['token'])}”"
    lines = [f"next token {token}" if row["kind"] == "logit" else f"at {token}"]
    if row["kind"] == "logit":
        lines.append(f"probability {row['probability']:.3f}")
    if row["kind"] == "feature":
        lines.append(f"activation {row['activation']:.3g}")
    if row["kind"] == "supernode":
        lines = [", ".join(row["members"])]
    if row["influence"] == row["influence"]:
        lines.append(f"influence {row['influence']:.3f}")
    return lines


def visible(token: str) -> str:
    """A token whose white space is seen."""
    return token.replace(" ", "·").replace("\n", "↵").replace("\t", "→") or "∅"
