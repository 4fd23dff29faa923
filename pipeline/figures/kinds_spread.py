"""Kinds about how values are spread: `histogram`, `cumulative`, and `density` of latents."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline.errors import RetraceError
from pipeline.figures import theme
from pipeline.figures.kinds_common import finished, looks, named, need, rows_of
from pipeline.spec.figures import Cumulative, Histogram, Look, Names

FAINT, NULL = 0.55, "dot"  # opacity of bars that lie over each other; the dash of a null


def groups(table: Any, columns: list[str], names: Names) -> Iterator[tuple[Look, Any]]:
    """(look, rows) of every group that has rows; values of one name are one group.

    Of two columns a name without a slash is that of all values of the second.
    """
    key = table[columns].astype(str).agg("/".join, axis=1)
    key = key.where(key.isin(names), key.str.partition("/")[0])
    merged: dict[str, tuple[Look, list[str]]] = {}
    for value, look in looks(names, key).items():
        merged.setdefault(look.name, (look, []))[1].append(value)
    for look, values in merged.values():
        yield look, table[key.isin(values)]


def histogram(tables: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Any]:
    """The share of each group in each bin; see `spec_figures.Histogram`."""
    import pandas as pd

    from pipeline.figures import parts as parts

    what, ((name, table), *_) = Histogram.model_validate(options), tables.items()
    given = ["low", "high", what.count] if what.count else [what.x]
    need(table, [*given, *what.lines, *filter(None, [what.choose])], name)
    table = rows_of(table, name, what)
    binned = [(look, _binned(rows, what, _edges(table, what)))
              for look, rows in groups(table, what.lines, what.names)]  # fmt: skip
    cases = list(dict.fromkeys(table[what.choose])) if what.choose else [None]
    if what.choose:  # a case is of all groups that there are
        cases = [c for c in cases if all((own[what.choose] == c).any() for _, own in binned)]
    panels, frames, highest = parts.Panels(), [], 0.0
    for look, rows in binned:
        frames.append(rows.assign(group=look.name))
        for number, case in enumerate(cases):
            own = rows if case is None else rows[rows[what.choose] == case]
            panels.add(0, _outline(own, look, what), case=parts.ALWAYS if case is None else number)
        if look.dash != NULL:
            highest = max(highest, rows["share"].max())
            if what.median:
                dash = {"color": look.colour, "dash": "dash", "width": 1.2}
                panels.figure.add_vline(rows["median"].iloc[0], line=dash)
    panels.choose(map(theme.literal, cases))
    dash = {"color": theme.PALETTE[-1], "dash": "dash", "width": 1}
    for text, x in what.levels.items():
        note = {"annotation": {"text": text, "font": {"size": 11}}}
        panels.figure.add_vline(x, line=dash, **note, annotation_position="top right")
    ends = {"range": [0, 1.15 * highest]} if what.median else {"rangemode": "tozero"}
    x = {"range": what.range} if what.range else {}
    figure = finished(panels, len(binned)).update_layout(
        barmode="overlay", bargap=0.02,
        xaxis=theme.axis(what.x_title, **x),
        yaxis=theme.axis(what.y_title, tickformat=".0%", **ends),
    )  # fmt: skip
    frame = pd.concat(frames, ignore_index=True)
    columns = ["group", *filter(None, [what.choose]), "low", "high", "share"]
    return figure, frame[[*columns, *(["median"] if what.median else [])]]


def _edges(table: Any, what: Histogram) -> np.ndarray:
    """The borders of the bins of values; from a tenth below `low`, where there are such values."""
    low = what.low
    if not what.count:
        low = min(low, np.floor(table[what.x].min() * 10) / 10)
    return np.linspace(low, what.high, what.bins + 1)


def _binned(rows: Any, what: Histogram, edges: np.ndarray) -> Any:
    """low, high and share of every bin of a group, of each case."""
    import pandas as pd

    by = [what.choose] if what.choose else []
    if what.count:
        out = rows.groupby([*by, "low", "high"], as_index=False, sort=False)[what.count].sum()
        total = out.groupby(by)[what.count].transform("sum") if by else out[what.count].sum()
        out = out.assign(share=out[what.count] / np.maximum(total, 1), n=total)
        return out[out["high"] > what.range[0]] if what.range else out
    frames = []
    for case, own in rows.groupby(what.choose, sort=False) if by else [(None, rows)]:
        count = np.histogram(own[what.x], edges)[0]
        columns = {"low": edges[:-1], "high": edges[1:], "share": count / len(own), "n": len(own)}
        about = {"median": own[what.x].median(), **({what.choose: case} if by else {})}
        frames.append(pd.DataFrame(columns).assign(**about))
    return pd.concat(frames, ignore_index=True)


def _outline(rows: Any, look: Look, what: Histogram) -> Any:
    """One group: an outline, or bars behind which the others are seen."""
    from pipeline.figures import parts as parts

    middle, null = (rows["low"] + rows["high"]) / 2, look.dash == NULL
    label = look.name
    if what.median:
        label = f"{rows['n'].iloc[0]:,} {label}: median {rows['median'].iloc[0]:.2f}"
    hover = f"{label}<br>%{{x:.2f}}: %{{y:.1%}}"
    if what.filled:
        shade = theme.rgba(look.colour, FAINT)
        bare = {"marker": {"line": {"width": 0}}}
        return parts.bars(middle, rows["share"], label, shade, hover=hover, **bare)
    more = {"width": 1.2 if null else 2} if what.median else {}
    if what.median and not null:
        more |= {"fill": "tozeroy", "fillcolor": theme.rgba(look.colour, 0.15)}
    more |= {"dash": look.dash, "shape": "hvh", "hover": hover}
    return parts.line(middle, rows["share"], label, look.colour, **more)


def cumulative(tables: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Any]:
    """The share of each group that is not above a value; see `spec_figures.Cumulative`."""
    import pandas as pd

    from pipeline.figures import parts as parts

    what, ((name, table), *_) = Cumulative.model_validate(options), tables.items()
    need(table, [*what.lines, *what.x], name)
    table, panels, out = rows_of(table, name, what), parts.Panels(), []
    curves: dict[str, dict[str, list]] = {x: {"x": [], "y": []} for x in what.x}
    found = list(groups(table, what.lines, what.names))
    for look, rows in found:
        for column, curve in curves.items():
            values = np.sort(rows[column].dropna().to_numpy())
            n = min(len(values), what.points)
            at = np.unique(np.linspace(0, len(values) - 1, n).astype(int))
            share = (at + 1) / max(len(values), 1)
            curve["x"].append(values[at].tolist())
            curve["y"].append(share.tolist())
            about = {"group": look.name, "measure": column, "value": values[at], "share": share}
            out.append(pd.DataFrame(about))
        x, y = (curves[next(iter(what.x))][k][-1] for k in "xy")
        hover = f"{look.name}<br>%{{y:.0%}} have at most %{{x:.2f}}"
        how = {"dash": look.dash, "shape": "hv", "hover": hover}
        panels.add(0, parts.line(x, y, look.name, look.colour, **how))
    choices = {
        title: [curves[column], {"xaxis.title.text": title}] for column, title in what.x.items()
    }
    parts.chosen(panels.figure, choices)
    y = theme.axis(f"cumulative share of {what.units}", tickformat=".0%", range=[0, 1.02])
    axes = {"xaxis": theme.axis(next(iter(choices))), "yaxis": y}
    figure = finished(panels, len(found)).update_layout(axes)
    return figure, pd.concat(out, ignore_index=True)


def density(tables: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Any]:
    """Histogram of log10 feature density; latents that never fire are counted in the legend.

    Options: bins (default 40).
    """
    import pandas as pd
    import plotly.graph_objects as go

    for name, frame in tables.items():
        need(frame, ["density"], name)
    logs = {n: np.log10(f.loc[f["density"] > 0, "density"]) for n, f in tables.items()}
    every = np.concatenate([v.to_numpy() for v in logs.values()])
    if not len(every):
        raise RetraceError(f"{', '.join(tables)}: no latent has a density above zero")
    low, high = np.floor(every.min() * 2) / 2, np.ceil(every.max() * 2) / 2
    edges = np.linspace(low, max(high, low + 0.5), options.get("bins", 40) + 1)
    fig, out = go.Figure(), []
    for i, (name, values) in enumerate(logs.items()):
        count = np.histogram(values, edges)[0]
        label = f"{named(name)}: {len(values):,} active, {len(tables[name]) - len(values):,} never"
        middle = (edges[:-1] + edges[1:]) / 2
        fill = theme.rgba(theme.colour(i), 0.9 if len(logs) == 1 else 0.5)
        fig.add_bar(x=middle, y=count, name=label, marker={"color": fill, "line": {"width": 0}})
        rows = {"table": name, "low": edges[:-1], "high": edges[1:], "latents": count}
        out.append(pd.DataFrame(rows))
    fig.update_traces(hovertemplate="10<sup>%{x:.2f}</sup>: %{y} latents")
    fig.update_layout(barmode="overlay", bargap=0.04, showlegend=True)
    ticks = np.arange(np.ceil(low), np.floor(max(high, low + 0.5)) + 1)
    fig.update_layout(
        xaxis=theme.axis("share of tokens on which a latent fires (log scale)")
        | {"tickvals": ticks.tolist(), "ticktext": [f"10<sup>{int(t)}</sup>" for t in ticks]},
        yaxis=theme.axis("number of latents"),
    )
    return fig, pd.concat(out, ignore_index=True)
