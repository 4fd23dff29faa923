"""Kinds that papers of every sort draw: lines over x, and bars with a spread over seeds.

They are told by their options (`spec_figures`) what stands in which column, so that a paper needs
no Python for them. Panels may follow two columns, one across and one down.
"""

from itertools import product
from typing import Any

import numpy as np

from pipeline.errors import RetraceError
from pipeline.figures import theme
from pipeline.figures.kinds_common import need, worded
from pipeline.spec.figures import Bars, Lines, Look, Names, Rows

SYMBOLS = ["circle", "diamond", "square", "triangle-up"]
WHOLE = 14  # whole numbers on the x axis of which each has its tick
LEGEND_ROW, IN_ROW = 22, 3  # pixels of a row of the legend, and entries in it


def rows_of(table: Any, name: str, what: Rows) -> Any:
    """The rows of a table that a figure draws."""
    need(table, [*what.where, *what.columns, *(["seed"] if what.seeds == "first" else [])], name)
    for column, wanted in what.where.items():
        wanted = wanted if isinstance(wanted, list) else [wanted]
        table = table[table[column].isin(wanted)]
    if what.seeds == "first" and len(table):
        table = table[table["seed"] == table["seed"].min()]
    if table.empty:
        raise RetraceError(f"table {name}: no row is as options.where says, so nothing to draw")
    return table


def looks(names: Names, values: Any) -> dict[Any, Look]:
    """value -> how it is drawn, of the values that there are; without names, all of them."""
    there = list(dict.fromkeys(values))
    given = names or {str(v): worded(v) for v in there}
    by_text = {str(v): v for v in there}
    out = {}
    for i, (text, look) in enumerate(given.items()):
        if text in by_text:
            look = Look(name=look) if isinstance(look, str) else look
            number = i if look.colour is None else look.colour
            dash = look.dash if names else theme.DASHES[i % len(theme.DASHES)]
            symbol = look.symbol or ("circle" if names else SYMBOLS[i % len(SYMBOLS)])
            change = {"colour": shade(number), "dash": dash, "symbol": symbol}
            out[by_text[text]] = look.model_copy(update=change)
    return out


def shade(number: int | str) -> str:
    """A colour of the palette, or that of text."""
    return theme.INK if number == "ink" else theme.colour(number)


def grid(table: Any, columns: list[str], titles: dict[str, str]) -> list[tuple[str, Any]]:
    """(title, rows) of every panel: the first column across, the second down."""
    if not columns:
        return [("", table)]
    order = list(titles)
    rank = lambda v: order.index(str(v)) if str(v) in order else -1  # noqa: E731
    every = [sorted(dict.fromkeys(table[c]), key=rank) for c in columns]
    out = []
    for values in product(*reversed(every)):
        values = tuple(reversed(values))
        here = table
        for column, value in zip(columns, values, strict=True):
            here = here[here[column] == value]
        out.append(("<br>".join(titles.get(str(v), worded(v)) for v in values), here))
    return out


def in_panels(table: Any, columns: list[str], titles: dict[str, str], across: int = 0) -> tuple:
    """The panels of a figure, and the rows of each."""
    from pipeline.figures.parts import Panels

    parts = grid(table, columns, titles)
    if len(columns) == 2:
        across = len(dict.fromkeys(table[columns[0]]))
    panels = Panels([t for t, _ in parts], across, gap=(0.05, 0.18), shared_yaxes=True)
    return panels, [rows for _, rows in parts]


def finished(panels: Any, entries: int, height: int = 0) -> Any:
    """Panels of one height each, the legend above them as deep as its entries need."""
    deep = LEGEND_ROW * -(-entries // IN_ROW) if entries > 1 else 0
    titled = 34 if any(a.text for a in panels.figure.layout.annotations) else 8
    height = height or (400 if panels.rows == 1 else 250 * panels.rows)
    return panels.finish(height + deep + titled, legend=titled, top=deep + titled + 10)


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
        update(type="log", dtick=ticks(table[what.x if axis == "x" else ys[0]]))
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
