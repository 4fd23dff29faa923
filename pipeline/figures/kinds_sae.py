"""Figures of the evaluation tables: fidelity against sparsity, scaling, dead latents.

A row of an evaluation table is a dictionary; what one line joins is a family, see `family`.
"""

import re
from typing import Any

import numpy as np

from pipeline.errors import RetraceError
from pipeline.figures import theme
from pipeline.figures.kinds_common import ARCHITECTURES, named, need, title_of

SHAPES = ["circle", "diamond", "square", "triangle-up"]  # one an arm
SYMBOL = {"": "", "no AuxK": "-open", "frozen decoder": "x"}  # variant -> what it does to a shape
SIZE = {"": 8, "no AuxK": 13, "frozen decoder": 9}
CONFIG = (
    "architecture k d_sae l1_coefficient l0_coefficient aux_loss_coefficient frozen_decoder hook"
).split()


def evaluations(tables: dict[str, Any], columns: list[str]) -> Any:
    """Evaluation tables one under the other, with arm, family and variant, averaged over seeds.

    A family is what one line joins: an architecture, a width and a variant. Columns `columns`
    become means; `sd_<column>` and n tell their spread over seeds.
    """
    import pandas as pd

    frames = []
    for name, frame in tables.items():
        if "l0_coefficient" not in frame:  # tables of before JumpReLU
            frame = frame.assign(l0_coefficient=0.0)
        need(frame, ["sae", *CONFIG, *columns], name)
        frames.append(frame.assign(arm=named(name)))
    frame = pd.concat(frames, ignore_index=True)
    frame["variant"] = variants(frame)
    frame["family"] = [family(row) for row in frame.to_dict("records")]
    rank = {"variant": list(SYMBOL), "architecture": list(ARCHITECTURES)}
    frame = frame.sort_values(
        ["variant", "architecture", "d_sae", "k", "l1_coefficient", "l0_coefficient"],
        key=lambda c: c.map(rank[c.name].index) if c.name in rank else c,
        kind="stable",
    )
    values = {c: (c, "mean") for c in dict.fromkeys(columns) if c not in CONFIG}
    values |= {f"sd_{c}": (c, "std") for c in values}
    groups = frame.groupby(["arm", "family", "variant", *CONFIG], sort=False, dropna=False)
    return groups.agg(sae=("sae", ", ".join), n=("sae", "size"), **values).reset_index()


def variants(frame: Any) -> np.ndarray:
    """'frozen decoder'; 'no AuxK' where other TopK dictionaries have it; else ''. [rows]"""
    topk = frame["architecture"] == "topk"
    silent = topk & frame["aux_loss_coefficient"].eq(0)
    mixed = silent.any() and (topk & ~silent).any()
    names = ["frozen decoder", "no AuxK"]
    return np.select([frame["frozen_decoder"].astype(bool), silent & mixed], names, "")


def family(row: dict[str, Any]) -> str:
    """E.g. 'TopK, 2,304, no AuxK'."""
    parts = [ARCHITECTURES[row["architecture"]], f"{row['d_sae']:,}", row["variant"]]
    return ", ".join(filter(None, parts))


def looks(frame: Any) -> dict[tuple, dict[str, Any]]:
    """(family, arm) -> colour by family, marker by variant and arm, dash by arm."""
    pairs = frame[["family", "arm", "variant"]].drop_duplicates().itertuples(index=False)
    families, arms = list(dict.fromkeys(frame["family"])), list(dict.fromkeys(frame["arm"]))
    out = {}
    for name, arm, variant in pairs:
        j = arms.index(arm)
        shape = SHAPES[j % len(SHAPES)] if SYMBOL[variant] != "x" else "x"
        out[name, arm] = {
            "line": {
                "color": theme.colour(families.index(name)),
                "dash": theme.DASHES[j % len(theme.DASHES)],
            },
            # an open marker is larger, so that it shows round a filled one
            "marker": {"symbol": shape + SYMBOL[variant].removeprefix("x"), "size": SIZE[variant]},
            "name": spelt(name) if len(arms) == 1 else f"{spelt(name)} · {arm}",
        }
    return out


def spelt(family: str) -> str:
    """A family for the legend: 'TopK, 2,304, no AuxK' -> 'TopK, 2,304 latents, no AuxK'."""
    return re.sub(r"(, [\d,]*\d)(?=, \D|$)", r"\1 latents", family)


def spread(group: Any, column: str) -> dict[str, Any] | None:
    """Error bars of one sd where there are several seeds."""
    sd = group.get(f"sd_{column}")
    if sd is None or not sd.notna().any():
        return None
    return {"type": "data", "array": sd.fillna(0).tolist(), "thickness": 1, "width": 3}


def wide(values: Any) -> bool:
    """Whether positive values span more than a factor of 8, so that a log axis reads better."""
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    return len(values) > 1 and values.min() > 0 and values.max() / values.min() > 8


def lines(frame: Any, x: str, y: str, by: dict[tuple, dict]) -> list[Any]:
    """One line a family and arm, points in the order of x, dictionary names in the hover box."""
    import plotly.graph_objects as go

    out = []
    for key, group in frame.groupby(["family", "arm"], sort=False):
        group = group.sort_values(x, kind="stable")
        out.append(
            go.Scatter(
                x=group[x].tolist(),
                y=group[y].tolist(),
                error_y=spread(group, y),
                customdata=[[theme.literal(s)] for s in group["sae"]],
                hovertemplate=f"%{{customdata[0]}}<br>{x} %{{x:.4~g}}<br>{y} %{{y:.4~g}}",
                mode="lines+markers",
                **by[key],
            )
        )
    return out


def pareto(tables: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Any]:
    """Fidelity against sparsity, one line a family, one marker an arm.

    Options: x (default l0); y, a metric or a list of metrics between which the reader chooses
    (default: explained_variance, loss_recovered_zero, delta_loss, those that are finite).
    """
    import plotly.graph_objects as go

    x = options.get("x", "l0")
    default = ["explained_variance", "loss_recovered_zero", "delta_loss"]
    ys = options.get("y") or [y for y in default if all(y in f for f in tables.values())]
    ys = [ys] if isinstance(ys, str) else list(ys or default)
    frame = evaluations(tables, [x, *ys])
    ys = [y for y in ys if np.isfinite(frame[y].astype(float)).any()] or ys[:1]
    by = looks(frame)
    drawn = {y: lines(frame, x, y, by) for y in ys}
    fig = go.Figure(drawn[ys[0]])
    x_axis = theme.axis(title_of(x), log=wide(frame[x]))
    fig.update_layout(xaxis=x_axis, yaxis=theme.axis(title_of(ys[0])))
    if len(ys) > 1:
        choices = {title_of(y): _shown(drawn[y], y) for y in ys}
        fig.update_layout(updatemenus=[theme.selector(choices)])
    return fig, frame


def _shown(traces: list[Any], y: str) -> list:
    """Plotly.update's arguments that put these traces' values in the place of those shown."""
    made = [trace.to_plotly_json() for trace in traces]
    change = {k: [t.get(k) for t in made] for k in ("y", "error_y", "hovertemplate")}
    return [change, {"yaxis.title.text": title_of(y)}]


def scaling(tables: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Any]:
    """A metric against k, one line a width, or against width, one line a k (the reader chooses).

    Options: y (default explained_variance); x (default k: what is shown at the start). Only
    dictionaries that have a k are plotted.
    """
    import plotly.graph_objects as go

    y = options.get("y", "explained_variance")
    frame = evaluations(tables, [y])
    frame = frame[(frame["k"] > 0) & ~frame["frozen_decoder"].astype(bool)]
    if frame.empty:
        raise RetraceError(f"{', '.join(tables)}: no TopK dictionary, so nothing scales with k")
    xs = list(dict.fromkeys([options.get("x", "k"), "k", "d_sae"]))
    fig = go.Figure([trace for x in xs for trace in _scaling_lines(frame, x, y)])
    visible = {x: [trace.meta == x for trace in fig.data] for x in xs}
    for trace, shown in zip(fig.data, visible[xs[0]], strict=True):
        trace.visible = shown
    labels = {"k": "against k", "d_sae": "against width"}
    choices = {labels[x]: [{"visible": visible[x]}, _x_axis(frame, x)] for x in xs}
    fig.update_layout(updatemenus=[theme.selector(choices)], yaxis=theme.axis(title_of(y)))
    fig.update_layout(xaxis=theme.axis(title_of(xs[0])) | _ticks(frame, xs[0]))
    return fig, frame


def _scaling_lines(frame: Any, x: str, y: str) -> list[Any]:
    other = "d_sae" if x == "k" else "k"
    label = (lambda v: f"{v:,} latents") if other == "d_sae" else (lambda v: f"k = {v}")
    suffix = frame["variant"].map(lambda v: f", {v}" if v else "")
    grouped = frame.assign(family=frame[other].map(label) + suffix).sort_values(
        other, kind="stable"
    )
    by = looks(grouped)
    traces = lines(grouped, x, y, by)
    for trace in traces:
        trace.meta = x
    return traces


def _ticks(frame: Any, x: str) -> dict[str, Any]:
    """A log axis whose ticks are the values that were run."""
    values = sorted(frame[x].unique().tolist())
    return {"type": "log", "tickvals": values, "ticktext": [f"{v:,}" for v in values]}


def _x_axis(frame: Any, x: str) -> dict[str, Any]:
    changes = {f"xaxis.{k}": v for k, v in _ticks(frame, x).items()}
    return {"xaxis.title.text": title_of(x), "xaxis.autorange": True} | changes


def dead(tables: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Any]:
    """Share of dead latents of each TopK dictionary, with AuxK and without.

    Options: y (default dead_share).
    """
    import plotly.graph_objects as go

    y = options.get("y", "dead_share")
    frame = evaluations(tables, [y])
    frame = frame[(frame["architecture"] == "topk") & ~frame["frozen_decoder"].astype(bool)]
    if frame.empty:
        raise RetraceError(f"{', '.join(tables)}: no TopK dictionary, so AuxK cannot be compared")
    several = frame["arm"].nunique() > 1
    frame = frame.sort_values(["arm", "d_sae", "k"], kind="stable")
    labels = [
        f"k {r['k']}<br>{r['d_sae']:,}" + (f"<br>{r['arm']}" if several else "")
        for r in frame.to_dict("records")
    ]
    fig = go.Figure()
    frame = frame.assign(label=labels)
    for i, (has, text) in enumerate([(True, "with AuxK"), (False, "without AuxK")]):
        g = frame[frame["aux_loss_coefficient"].gt(0) == has]
        fig.add_bar(
            x=g["label"].tolist(),
            y=g[y].tolist(),
            error_y=spread(g, y),
            name=text,
            marker={"color": theme.colour(i)},
            customdata=[[theme.literal(s)] for s in g["sae"]],
            texttemplate="%{y:.1~%}",  # no bar is a share of 0 or a dictionary that was not trained
            textposition="outside",
            textfont={"size": 11},
            constraintext="none",
            cliponaxis=False,
            hovertemplate="%{customdata[0]}<br>%{y:.2%}",
        )
    order = {"categoryorder": "array", "categoryarray": list(dict.fromkeys(labels))}
    fig.update_layout(
        barmode="group",
        xaxis=theme.axis("active latents k, width", **order),
        yaxis=theme.axis(title_of(y), tickformat=".0%", range=[0, 1.2 * (frame[y].max() or 1)]),
    )
    return fig, frame.drop(columns="label")
