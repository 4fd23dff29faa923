"""What figures are put together from; the core kinds and the papers' figures.py draw with it.

1. A trace is one call: `line`, `points`, `bars`, `heat`, `steps`, and for what they are compared
   with: `equal` (where an estimate is right), `key` (an entry of the legend), `whiskers` (from
   the least to the most over seeds).
2. `Panels` are small multiples. A name enters the legend once, whatever panel it stands in, and a
   list above the figure chooses between cases, of which one is seen at a time.
3. Tables are read by `first` (the first seed, where points are single nodes), `mean_of` (mean,
   least and most over seeds), `thinned` (evenly spaced rows of a long curve).
4. What writers say stands in a table of texts: `as_lines`, `side_by_side`.
5. What cannot be drawn is said in the figure: `nothing`.

Colours are those of theme.py. What a hover box says ends in no name of its own, so its text says
all. No torch.
"""

import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pipeline.figures.theme import DIVERGING, GRID, INK, MONO, literal, rgba, scale, selector

Drawn = tuple[go.Figure, pd.DataFrame]  # a figure, and the numbers that it plots
ALWAYS = -1  # the case of a trace that is always seen
TITLE = 12  # pixels: panel titles
WIDE = 3  # panels side by side that have room for an axis title each
LINE, ROOM = 14.5, 66  # pixels of a line of text, and of what stands around the lines
LETTER = 6.7  # pixels
BLANK = 3  # empty lines in a row that a text may show
PLAIN = {"showgrid": False, "zeroline": False}  # an axis of a heat map


# --- traces --------------------------------------------------------------------------------


def line(
    x: Any, y: Any, name: str = "", colour: str = INK, *, hover: str = "", width: float = 2,
    dash: str = "solid", shape: str = "linear", **more: Any,
) -> go.Scatter:  # fmt: skip
    """A line; with `marker`, its points too; without `hover`, silent."""
    look = {"color": colour, "dash": dash, "width": width}
    look |= {"shape": shape} if shape != "linear" else {}
    mode = "lines+markers" if "marker" in more else "lines"
    return go.Scatter(**{"x": x, "y": y, "mode": mode, "line": look} | _said(name, hover) | more)


def points(
    x: Any, y: Any, name: str = "", colour: Any = INK, *, hover: str = "", size: Any = 6,
    symbol: Any = "circle", **more: Any,
) -> go.Scatter:  # fmt: skip
    """Markers, one a row."""
    marker = {"color": colour, "size": size} | more.pop("marker", {})
    if not (isinstance(symbol, str) and symbol == "circle"):
        marker["symbol"] = symbol
    out = {"x": x, "y": y, "mode": "markers", "marker": marker}
    return go.Scatter(**out | _said(name, hover) | more)


def bars(
    x: Any, y: Any, name: str = "", colour: Any = INK, *, hover: str = "", **more: Any
) -> go.Bar:
    """Bars of one colour, or of one each."""
    marker = {"color": colour} | more.pop("marker", {})
    return go.Bar(**{"x": x, "y": y, "marker": marker} | _said(name, hover) | more)


def heat(z: Any, *, hover: str, reach: float | None = None, **more: Any) -> go.Heatmap:
    """A map of a matrix; with `reach`, colours diverge from 0 to ± reach."""
    look: dict[str, Any] = {"xgap": 1, "ygap": 1, **_said("", hover)}
    if reach is not None:
        look |= {"zmin": -reach, "zmax": reach, "colorscale": scale(DIVERGING)}
    return go.Heatmap(**{"z": z} | look | more)


def steps(edges: np.ndarray, y: Any, name: str, colour: str, **more: Any) -> go.Scatter:
    """The outline of a histogram: the share of each bin between neighbouring edges."""
    return line((edges[:-1] + edges[1:]) / 2, y, name, colour, shape="hvh", **more)


def _said(name: str, hover: str) -> dict[str, Any]:
    """The name, and what the hover box says; a trace without a name is in no legend."""
    told = {"hovertemplate": f"{hover}<extra></extra>"} if hover else {"hoverinfo": "skip"}
    return {**({"name": name} if name else {"showlegend": False}), **told}


def equal(*values: Any, name: str = "") -> go.Scatter:
    """The dotted line on which two quantities are equal, as long as their values need."""
    every = np.concatenate([np.asarray(v, float).ravel() for v in values])
    ends = [float(np.nanmin(every)), float(np.nanmax(every))]
    return line(ends, ends, name, width=1, dash="dot")


def key(name: str, colour: str, symbol: str = "square", **more: Any) -> go.Scatter:
    """An entry of the legend without points."""
    marker = {"symbol": symbol, "size": 10, "color": colour, **more}
    return go.Scatter(x=[None], y=[None], mode="markers", name=name, marker=marker)


def whiskers(middle: Any, least: Any, most: Any, **more: Any) -> dict[str, Any]:
    """Error bars from the least to the most."""
    reach = {"array": most - middle, "arrayminus": middle - least}
    return {**reach, "thickness": 1, "width": 3, **more}


# --- small multiples -----------------------------------------------------------------------


class Panels:
    """Panels that share one legend and one list of choices.

    Args:
        titles: of the panels, left to right and then down; "" where a panel needs none.
        columns: panels side by side; default: all.
        gap: between columns and between rows, in shares of the figure; of rows, of one with two.
        more: for plotly's make_subplots.

    Attributes:
        figure: the plotly figure.
        cases: of each trace, the number of its case.
    """

    def __init__(
        self, titles: Sequence[str] = ("",), columns: int = 0, *, gap: tuple = (0.08, 0.16),
        **more: Any,
    ) -> None:  # fmt: skip
        self.columns = columns or len(titles)
        self.rows = -(-len(titles) // self.columns)
        down = gap[1] * min(1, 2 / self.rows)  # as many pixels in a taller figure
        self.figure = make_subplots(
            self.rows, self.columns, subplot_titles=list(titles),
            horizontal_spacing=gap[0], vertical_spacing=down, **more,
        )  # fmt: skip
        self.figure.update_annotations(font_size=TITLE)
        self.cases: list[int] = []
        self._named: set[tuple[str, int]] = set()

    def place(self, panel: int) -> dict[str, int]:
        """Row and column of a panel, from 1, as plotly takes them."""
        return {"row": panel // self.columns + 1, "col": panel % self.columns + 1}

    def add(self, panel: int, *traces: Any, case: int = ALWAYS) -> None:
        """Draw traces in a panel; a name is in the legend once, and once in each case."""
        for trace in traces:
            if trace.name and trace.showlegend is None:
                trace.legendgroup = trace.legendgroup or trace.name
                trace.showlegend = not {(trace.name, case), (trace.name, ALWAYS)} & self._named
                self._named.add((trace.name, case))
            if case != ALWAYS:
                trace.visible = case == 0
            self.figure.add_trace(trace, **self.place(panel))
            self.cases.append(case)

    def choose(self, names: Iterable[str], layouts: Iterable[dict[str, Any]] = ()) -> None:
        """A list of the cases above the figure, of which the first is seen at the start.

        Args:
            names: of the cases, in order.
            layouts: what each case changes of the layout; default: nothing.
        """
        names = list(names)
        changes = list(layouts) or [{}] * len(names)
        choices = {
            name: [{"visible": [c in (i, ALWAYS) for c in self.cases]}, change]
            for i, (name, change) in enumerate(zip(names, changes, strict=True))
        }
        self.figure.update_layout(changes[0] if changes else {})
        chosen(self.figure, choices)

    def axes(self, x: str = "", y: str = "", **places: Any) -> None:
        """Titles of the axes at the outer edges only; below narrow panels, one for all of them."""
        if y:
            self.figure.update_yaxes(title={"text": y}, **({"col": 1} | places))
        if x and self.columns <= WIDE:
            self.figure.update_xaxes(title={"text": x}, **({"row": self.rows} | places))
        elif x:
            look = {"showarrow": False, "yanchor": "top", "yshift": -26, "font": {"size": 14}}
            self.figure.add_annotation(x=0.5, y=0, xref="paper", yref="paper", text=x, **look)

    def axis(self, panel: int, x: Mapping[str, Any] = {}, y: Mapping[str, Any] = {}) -> None:
        """Both axes of one panel, as plotly takes them."""
        self.figure.update_xaxes(**x, **self.place(panel))
        self.figure.update_yaxes(**y, **self.place(panel))

    def finish(self, height: int, *, legend: float = 26, top: int = 70, **layout: Any) -> go.Figure:
        """The figure: its height, and the legend so many pixels above the panels."""
        up = 1 + legend / max(height - top - 50, 1)
        shape = {"height": height, "margin": {"t": top}, "legend": {"y": up, "x": 0}}
        return self.figure.update_layout(shape).update_layout(layout)


def chosen(figure: go.Figure, choices: dict[str, list]) -> go.Figure:
    """A list above a figure, where there is more than one choice; see `theme.selector`."""
    if len(choices) > 1:
        figure.update_layout(updatemenus=[selector(choices)])
    return figure


def square(figure: go.Figure, row: int, col: int, **axes: Any) -> None:
    """A panel whose two axes have one unit."""
    x = figure.get_subplot(row, col).xaxis.plotly_name.removeprefix("xaxis")
    figure.update_xaxes(constrain="domain", row=row, col=col)
    one = {"scaleanchor": f"x{x}", "constrain": "domain", **axes}
    figure.update_yaxes(**one, row=row, col=col)


def plane(figure: go.Figure, row: int, col: int, reach: float, **y: Any) -> None:
    """A square panel from -reach to reach, without ticks, with axes through the origin."""
    bare = {"showline": False, "showticklabels": False, "ticks": "", "showgrid": False}
    bare |= {"zeroline": True, "zerolinewidth": 1, "range": [-reach, reach]}
    figure.update_xaxes(**bare, row=row, col=col)
    square(figure, row, col, **bare, **y)


def over_seeds(
    x: Any, values: np.ndarray, name: str, colour: str, hover: str, **more: Any
) -> Iterator[go.Scatter]:
    """A faint line a seed where there are several, and their mean. values: [seeds points]."""
    for one in values if len(values) > 1 else []:
        faint = rgba(colour, 0.55)
        yield line(x, one, colour=faint, width=1, legendgroup=name, **more)
    yield line(x, values.mean(axis=0), name, colour, width=2.5, hover=hover, **more)


def nothing(why: str) -> go.Figure:
    """A figure that says why it is empty."""
    text = {"text": why, "showarrow": False, "x": 0.5, "y": 0.5, "xref": "paper", "yref": "paper"}
    bare = {"visible": False}
    return go.Figure(layout={"annotations": [text], "xaxis": bare, "yaxis": bare, "height": 160})


# --- texts ---------------------------------------------------------------------------------


def as_lines(text: str, width: int, bold: int = 0) -> str:
    """Text with its own line breaks, long lines broken, and nothing of it read as markup.

    Where more than BLANK lines in a row are empty, their number stands in their place.

    Args:
        width: of a line, characters.
        bold: so many characters at the beginning are bold.
    """
    out, at, blank = [], 0, 0
    for line in [*text.split("\n"), None]:
        if line == "":
            blank, at = blank + 1, at + 1
            continue
        out += [""] * blank if blank <= BLANK else [f"↵ × {blank}"]
        if line is None:
            break
        blank = 0
        for part in textwrap.wrap(line, width, drop_whitespace=False) or [""]:
            cut = max(0, min(bold - at, len(part)))
            head = f"<b>{literal(part[:cut])}</b>" if cut else ""
            out.append(head + literal(part[cut:]))
            at += len(part)
        at += 1  # the line break
    return "<br>".join(out)


def side_by_side(writers: Sequence[str], cases: Mapping[str, list[str]], width: int) -> go.Figure:
    """A table of one row, whose texts a list above it chooses.

    Args:
        cases: what the list calls it -> a text of `as_lines` for each writer.
        width: of a column, characters.
    """
    shown = {name: [[text] for text in texts] for name, texts in cases.items()}
    longest = max(text.count("<br>") + 1 for texts in cases.values() for text in texts)
    plain = {"align": "left", "fill": {"color": "rgba(0,0,0,0)"}, "line": {"color": GRID}}
    look = {"font": {"family": MONO, "size": 11}, "height": 20, **plain}
    header = {"values": [f"<b>{literal(writer)}</b>" for writer in writers], **plain}
    first = next(iter(shown.values()))
    figure = go.Figure(go.Table(header=header, cells={"values": first, **look}))
    chosen(figure, {name: [{"cells.values": [v]}, {}] for name, v in shown.items()})
    return figure.update_layout(
        margin={"l": 4, "r": 4, "t": 8, "b": 4},
        height=round(ROOM + LINE * longest),
        meta={"min_width": round(len(writers) * (LETTER * width + 18))},  # a phone scrolls sideways
    )


# --- tables --------------------------------------------------------------------------------


def first(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the first seed; metrics have the others."""
    return table[table["seed"] == table["seed"].min()]


def mean_of(table: pd.DataFrame, by: list[str], column: str) -> pd.DataFrame:
    """Mean of a column over seeds, under its own name, with the least and the most: min, max."""
    groups = table.groupby(by, sort=False)[column]
    return groups.agg(["mean", "min", "max"]).reset_index().rename(columns={"mean": column})


def evenly(n: int, most: int) -> list[int]:
    """At most so many of n places, evenly spaced, the first and the last among them."""
    return np.unique(np.linspace(0, n - 1, min(most, n)).round().astype(int)).tolist()


def thinned(rows: pd.DataFrame, most: int) -> pd.DataFrame:
    """At most so many rows of a curve; see `evenly`."""
    return rows.iloc[evenly(len(rows), most)]


def rounded(values: Any, digits: int = 3) -> list[float]:
    """Plain floats with so many significant digits: what a list changes fills most of a page."""
    return [float(f"{v:.{digits}g}") for v in np.asarray(values, dtype=float)]


# --- cases and looks -----------------------------------------------------------------------


def by_case(
    panels: Panels,
    found: Iterable[tuple[str, pd.DataFrame]],
    draw: Callable[[pd.DataFrame], Iterable[tuple[int, Any]]],
) -> Panels:
    """Draw every case, of which a list above the figure chooses one.

    Args:
        found: (name, rows) of each case.
        draw: rows -> (panel, trace) of everything that is drawn of them.
    """
    found = list(found)
    for number, (_, rows) in enumerate(found):
        for panel, trace in draw(rows):
            panels.add(panel, trace, case=number)
    panels.choose(name for name, _ in found)
    return panels


def styled(
    rows: pd.DataFrame, column: str, looks: Mapping[Any, tuple]
) -> Iterator[tuple[pd.DataFrame, Any, tuple]]:
    """(rows, value, look) of each value of a column that has rows, in the order of `looks`."""
    for value, look in looks.items():
        own = rows[rows[column] == value]
        if len(own):
            yield own, value, look
