"""Kinds that papers of every sort draw: lines over x, bars with a spread over seeds, and curves of
the models of `training`.

They are told by their options (`spec_figures`) what stands in which column, so that a paper needs
no Python for them. Panels may follow two columns, one across and one down.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline.errors import RetraceError
from pipeline.figures import theme
from pipeline.figures.kinds_common import finished, in_panels, looks, need, rows_of, worded
from pipeline.spec.figures import Bars, Learning, Lines, Look

WHOLE = 14  # whole numbers on the x axis of which each has its tick
MARKED = 60  # points of a curve of which each has its marker
FLOOR = 1e-9  # losses below this are drawn here, where the axis is logarithmic


def lines(tables: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Any]:
    """Lines over x; see `spec_figures.Lines`."""
    import pandas as pd

    from pipeline.figures import parts as parts

    what, ((name, table), *_) = Lines.model_validate(options), tables.items()
    need(table, [what.x, *what.y, what.lines, *what.panels], name)
    table, ys = rows_of(table, name, what), list(what.y)
    if "x" in what.log:
        table = table[table[what.x] > 0]
    by = [*what.panels, what.lines, what.x]
    if what.several == "mean":
        table = parts.mean_of(table, by, ys[0])
    elif what.several:
        table = table.groupby(by, as_index=False, sort=False)[ys].min()
    # Rows at one x stand in the published CSVs in the order of either sort.
    table = table.sort_values(what.x, kind="stable" if what.several else "quicksort")
    by_line = looks(what.names, sorted(table[what.lines].unique()))
    panels, shown = in_panels(table, what.panels, what.titles, what.across)
    values: dict[str, list] = {y: [] for y in ys}
    for i, here in enumerate(shown):
        for value, look in by_line.items():
            rows = here[here[what.lines] == value]
            for y in ys:
                values[y].append(rows[y].tolist())
            panels.add(i, _drawn(rows, what, look))
        for level in what.levels:  # after the lines: plotly leaves empty panels out
            thin = {"color": theme.GRID, "width": 1}
            panels.figure.add_hline(level, line=thin, layer="below", **panels.place(i))
    choices = {
        title: [{"y": values[y]}, {"yaxis.title.text": title}] for y, title in what.y.items()
    }
    parts.chosen(panels.figure, choices)
    panels.axes(what.x_title or what.x.replace("_", " "), what.y[ys[0]])
    for axis in what.log:
        update = panels.figure.update_xaxes if axis == "x" else panels.figure.update_yaxes
        step = ticks(table[what.x if axis == "x" else ys[0]])
        update(type="log", dtick=step, exponentformat="power" if step == 1 else "none")
    if np.ptp(table[what.x]) <= WHOLE and not (table[what.x] % 1).any() and "x" not in what.log:
        panels.figure.update_xaxes(dtick=1)
    for i, here in enumerate(shown):
        if here[what.x].nunique() == 1:  # a lone place, with no scale about it
            panels.figure.update_xaxes(tickvals=here[what.x].unique(), **panels.place(i))
    if what.range:
        panels.figure.update_yaxes(range=what.range)
    elif "y" not in what.log and float(table[ys].min().min()) > 0:  # a line at 0 needs room below
        panels.figure.update_yaxes(rangemode="tozero")
    if what.format:
        panels.figure.update_yaxes(tickformat=what.format)
    if what.several == "min":  # as drawn
        own = [here[here[what.lines] == v] for here in shown for v in by_line]
        table = pd.concat(own, ignore_index=True)
    return finished(panels, len(by_line)), table[what.columns or list(table.columns)]


def ticks(values: Any) -> Any:
    """Of a log axis: 1, 2 and 5, or only whole decades where values span many."""
    return 1 if float(values.max()) > 50 * float(values[values > 0].min()) else "D2"


def _drawn(rows: Any, what: Lines, look: Look) -> Any:
    """One line of a panel, with whiskers where it is a mean."""
    from pipeline.figures import parts as parts

    y, more = next(iter(what.y)), {}
    if what.several == "mean":
        faint = theme.rgba(look.colour, 0.5)
        reach = parts.whiskers(rows[y], rows["min"], rows["max"], width=0, color=faint)
        more = {"error_y": reach}
    hover = f"{look.name}<br>{what.x.replace('_', ' ')} %{{x}}: %{{y:.3~g}}"
    return parts.line(
        rows[what.x], rows[y], look.name, look.colour, width=look.width, dash=look.dash,
        marker={"size": what.marker, "symbol": look.symbol}, hover=hover, **more,
    )  # fmt: skip


def bars(tables: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Any]:
    """Bars with the least and the most over seeds; see `spec_figures.Bars`."""
    from pipeline.figures import parts as parts

    what, ((name, table), *_) = Bars.model_validate(options), tables.items()
    choose = [what.choose] if what.choose else []
    need(table, [*what.x, *what.bars, *what.panels, *choose], name)
    table = rows_of(table, name, what)
    key = table[what.bars].astype(str).agg("/".join, axis=1)
    by_bar = looks(what.names, key)
    panels, shown = in_panels(table[key.isin(by_bar)], what.panels, what.titles)
    labels = list(what.x.values())
    there = [c for c in what.cases if c in set(table[what.choose])] if what.choose else []
    for number, case in enumerate(there or [None]):
        for i, here in enumerate(shown):
            rows = here if case is None else here[here[what.choose] == case]
            for value, look in by_bar.items():
                own = rows.loc[key[rows.index] == value, list(what.x)]
                if own.empty:
                    continue
                mean = own.mean()
                trace = parts.bars(
                    labels, mean, look.name, theme.rgba(look.colour, 0.85),
                    error_y=parts.whiskers(mean, own.min(), own.max()),
                    hover=f"{look.name}, %{{x}}: %{{y:.3~g}}",
                )  # fmt: skip
                panels.add(i, trace, case=number if there else parts.ALWAYS)
            if len(rows):
                _stated(panels, i, what, rows.iloc[0], number if there else parts.ALWAYS)
    panels.choose([what.cases[c] for c in there])
    panels.axes(y=what.y_title)
    if what.range:
        panels.figure.update_yaxes(range=what.range)
    figure = finished(panels, len(by_bar)).update_layout(barmode="group")
    return figure, table[what.columns or list(table.columns)]


def _stated(panels: Any, i: int, what: Bars, row: Any, case: int) -> None:
    """Published values of a panel, as diamonds."""
    from pipeline.figures.parts import points

    for entry in what.published:
        keys = {k: v for k, v in entry.items() if k not in what.x}
        if all(row[k] == v for k, v in keys.items()):
            y = [entry.get(c) for c in what.x]
            hover = "published, %{x}: %{y:.3~g}"
            look = {"size": 9, "symbol": "diamond", "hover": hover}
            panels.add(i, points(list(what.x.values()), y, "published", **look), case=case)


# --- curves of training --------------------------------------------------------------------


def learning(tables: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Any]:
    """Curves of the models of `training`; see `spec_figures.Learning`."""
    import pandas as pd

    from pipeline.figures import parts as parts

    what = Learning.model_validate(options)
    runs = {n.split("/")[1]: t for n, t in tables.items() if n.startswith("training/")}
    for run, table in runs.items():
        need(table, ["member", "seed", "set", "step", *what.measures], f"training/{run}")
    apart = [r for r in what.runs if r in runs] or [""]
    titles = [what.runs.get(r, "") for r in apart] + [""] * (len(apart) * (len(what.measures) - 1))
    shared = {"shared_xaxes": True, "shared_yaxes": True}
    panels = parts.Panels(titles, len(apart), gap=(0.09, 0.06), **shared)
    thinned = {r: thin(t, what.points) for r, t in runs.items()}
    for number, (run, table) in enumerate(thinned.items()):
        column = apart.index(run) if what.runs else 0
        for j, (some, text) in enumerate(what.sets.items()):
            colour, dash = (j, 0) if what.runs else (number, 2 * j)
            label = text if what.runs else f"{theme.literal(run.replace('_', ' '))}, {text}"
            for member, rows in table[table["set"] == some].groupby("member"):
                for i, measure in enumerate(what.measures):
                    y = rows[measure].clip(lower=FLOOR) if what.log else rows[measure]
                    marks = {"marker": {"size": 5}} if len(rows) <= MARKED else {}
                    trace = parts.line(
                        rows["step"], y, label, theme.rgba(theme.colour(colour), 0.8), width=1.6,
                        dash=theme.DASHES[dash],
                        hover=f"{theme.literal(member)}, {label}<br>step %{{x:,}}: %{{y:.4g}}",
                        **marks,
                    )  # fmt: skip
                    panels.add(i * len(apart) + column, trace)
    frame = pd.concat([t.assign(**{what.run: r}) for r, t in thinned.items()], ignore_index=True)
    levels = dict(_levels(what, tables, list(runs)))
    for text, (value, shade, curve) in levels.items():
        _level(panels.figure, value, text, shade, curve)
    _scales(panels, what, frame, [v for v, *_ in levels.values()])
    entries = len(what.sets) * (1 if what.runs else len(runs))
    entries += sum(curve for *_, curve in levels.values())
    return finished(panels, entries), frame[what.columns or list(frame.columns)]


def thin(table: Any, points: int) -> Any:
    """The table, or at most so many points of each curve, seeds and sets in order."""
    import pandas as pd

    from pipeline.figures.parts import thinned

    if not points:
        return table
    curves = [t.sort_values("step") for _, t in table.groupby(["seed", "set"])]
    return pd.concat([thinned(t, points) for t in curves])


def _levels(what: Learning, tables: dict, runs: list[str]) -> Iterator[tuple[str, tuple]]:
    """Text -> loss and colour of the dotted lines that curves are compared with, and whether curves
    come near."""
    for run, value in what.published.items():
        if run in runs:
            colour = theme.colour(runs.index(run))
            yield f"published, {worded(run)}: {value:g}", (value, colour, True)
    if what.chance:
        table, _, column = what.chance.rpartition("/")
        if table not in tables:
            raise RetraceError(f"options.chance: the figure names no table '{table}'")
        need(tables[table], [column], table)
        value = float(tables[table][column].iloc[0])
        yield f"uniform guess: {value:.3f}", (value, theme.PALETTE[-1], False)


def _level(figure: Any, value: float, text: str, shade: str, curve: bool) -> None:
    """A dotted line, named in the legend where curves would run through its name."""
    from pipeline.figures.parts import line

    look = {"color": shade, "dash": "dot", "width": 1.2}
    if curve:
        figure.add_hline(value, line=look)
        figure.add_trace(line([None], [None], text, shade, width=1.2, dash="dot"))
        return
    note = {"text": text, "font": {"size": 11}, "bgcolor": "rgba(0,0,0,0)"}
    figure.add_hline(value, line=look, annotation=note, annotation_position="top right")


def _scales(panels: Any, what: Learning, frame: Any, levels: list[float]) -> None:
    """Axes of the curves, with room for the names of the dotted lines."""
    figure, n = panels.figure, len(what.measures)
    for row, measure in enumerate(what.measures, 1):
        axis = theme.axis(measure, what.unit if measure == "loss" else "")
        figure.update_yaxes(**axis, row=row, col=1)
        if measure == "accuracy":
            figure.update_yaxes(range=[-0.03, 1.05], row=row)
        elif what.log:
            figure.update_yaxes(**decades(frame["loss"].clip(lower=FLOOR)), row=row)
        elif levels:
            ends = [*frame["loss"], *levels]
            figure.update_yaxes(range=[min(ends) - 0.2, max(ends) + 0.2], row=row)
    figure.update_xaxes(**theme.axis("step", tickformat="~s", nticks=5), row=n)
    figure.update_xaxes(range=[0, None], rangemode="tozero")


def decades(values: Any) -> dict[str, Any]:
    """A log axis about all values: ticks at 1, 2 and 5 where they span less than three decades,
    else at every decade, or every second."""
    values = np.log10(np.asarray(values, dtype=float))
    low, high = float(values.min()), float(values.max())
    span = high - low
    dtick = "D2" if span < 3 else 1 if span < 6 else 2
    about = {"type": "log", "range": [low - 0.06 * span - 0.02, high + 0.06 * span + 0.02]}
    return about | {"dtick": dtick, "exponentformat": "power"}
