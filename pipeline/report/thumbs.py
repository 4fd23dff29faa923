"""A plotly figure as a picture of a thumb's size: inline SVG, without plotly.js or a browser.

Claims, the index and the catalogue show which figure is meant. A thumb has the figure's panels,
axes, lines, points, bars and maps; text is left out, since nobody could read it.

1. Each axis takes its place and its range from the layout, else from what stands on it.
2. Traces are thinned to what can be told apart at this size; a map becomes a PNG inside the SVG.
3. Colours are checked against a pattern, and numbers are written by us: nothing of a figure's text
   enters the markup. Roles of colour (theme.py) follow the page.

What a thumb cannot draw, such as a table, it leaves out; a figure of nothing else has no thumb.
"""

import base64
import json
import math
import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeline.figures.theme import PALETTE, SEQUENTIAL, scale
from pipeline.report.thumb_ink import (
    colour,
    is_number,
    level,
    line_path,
    num,
    number_or,
    opacity,
    png,
    rect,
    rgb,
    shade,
)  # fmt: skip

PLOT = re.compile(r'<script type="application/json" class="retrace-plot">(.*?)</script>', re.S)
WIDTH, HEIGHT = 144, 90  # of the drawing; the page scales it
LINE_POINTS, MARKERS, CELLS = 1500, 500, 32  # at most: of lines, markers, a side of a map
PAD = 0.06  # of a range, where the layout names none


def picture(plot: dict[str, Any], width: int = WIDTH, height: int = HEIGHT) -> str:
    """The thumb of a figure's data and layout; an empty string where there is nothing to draw."""
    layout = plot.get("layout", {})
    traces = [t for t in plot.get("data", []) if t.get("visible", True) is True]
    traces = [with_colour_axis(t, layout) for t in traces if _drawable(t)]
    axes = {a: Axis(a, layout, traces, (width, height)) for a in _axes(layout, traces)}
    shared = Shared(layout, traces)
    drawn = [mark for i, t in enumerate(traces) for mark in _trace(t, i, axes, shared)]
    if not drawn:
        return ""
    frames = [_frame(axes, x, y) for x, y in _panels(traces)]
    shapes = [s for shape in layout.get("shapes", []) for s in _shape(shape, axes)]
    inside = "".join([*shapes, *frames, *drawn])
    return (
        f'<svg viewBox="0 0 {width} {height}" aria-hidden="true" focusable="false">{inside}</svg>'
    )


def of_page(file: Path) -> str:
    """The thumb of a figure's page; blank where there is no such page."""
    found = PLOT.search(file.read_text("utf-8")) if file.is_file() else None
    return picture(json.loads(found[1])) if found else ""


def with_colour_axis(trace: dict, layout: dict) -> dict:
    """A map that takes its colours from an axis of the layout, with these colours."""
    name = trace.get("coloraxis")
    found = layout.get(name, {}) if isinstance(name, str) else {}
    here = {"colorscale": "colorscale", "zmin": "cmin", "zmax": "cmax"}
    return trace | {k: found[v] for k, v in here.items() if v in found}


# --- axes ----------------------------------------------------------------------------------


class Axis:
    """Where values of an axis lie in the drawing."""

    def __init__(self, name: str, layout: dict, traces: list[dict], size: tuple[int, int]) -> None:
        """
        Args:
            name: x, x2, y, …
        """
        side = name[0]
        found = layout.get(f"{side}axis{name[1:]}", {})
        self.values = [v for t in traces if on(t, side) == name for v in _along(t, side)]
        texts = [v for v in self.values if isinstance(v, str) and not is_number(v)]
        kind = found.get("type", "")
        named = [str(v) for v in found.get("categoryarray", [])]
        self.places = {}
        if texts or kind == "category":
            every = dict.fromkeys([*named, *map(str, self.values)])
            self.places = {v: i for i, v in enumerate(every)}
        self.log = kind == "log"
        self.low, self.high = self._range(found, any(t.get("type") == "bar" for t in traces))
        self.flip = found.get("autorange") == "reversed" or self.low > self.high
        self.low, self.high = sorted((self.low, self.high))
        start, end = found.get("domain", [0, 1])
        extent = size[side == "y"]
        self.start, self.end = 4 + start * (extent - 8), 4 + end * (extent - 8)
        if side == "y":
            self.start, self.end = extent - self.start, extent - self.end

    def _range(self, found: dict, from_zero: bool) -> tuple[float, float]:
        given = found.get("range")
        if given and all(is_number(v) for v in given):
            return float(given[0]), float(given[1])
        known = [v for v in map(self.number, self.values) if math.isfinite(v)]
        low, high = min(known, default=0), max(known, default=1)
        if from_zero and not self.log and not self.places:
            low, high = min(low, 0), max(high, 0)
        pad = PAD * (high - low) or 0.5
        return low - pad, high + pad

    def number(self, value: Any) -> float:
        """A value on the axis's own scale: the logarithm, the place of a category, NaN."""
        if self.places:
            return float(self.places.get(str(value), math.nan))
        if not is_number(value):
            return math.nan
        x = float(value)
        return (math.log10(x) if x > 0 else math.nan) if self.log else x

    def at(self, value: Any) -> float:
        """Where a value lies, in units of the drawing; NaN where nowhere."""
        share = (self.number(value) - self.low) / ((self.high - self.low) or 1)
        share = 1 - share if self.flip else share
        inside = -0.02 <= share <= 1.02
        return self.start + share * (self.end - self.start) if inside else math.nan

    def clipped(self, value: float) -> float:
        """As `at`, of a number on the axis's own scale, held inside."""
        share = min(max((value - self.low) / ((self.high - self.low) or 1), 0), 1)
        share = 1 - share if self.flip else share
        return self.start + share * (self.end - self.start)


def on(trace: dict, side: str) -> str:
    """The name of the axis that a trace stands on."""
    return trace.get(f"{side}axis") or side


def _panels(traces: list[dict]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((on(t, "x"), on(t, "y")) for t in traces if _drawable(t)))


def _drawable(trace: dict) -> bool:
    return trace.get("type", "scatter") in DRAW


def _axes(layout: dict, traces: list[dict]) -> set[str]:
    return {name for panel in _panels(traces) for name in panel}


def _along(trace: dict, side: str) -> list:
    """What a trace has along an axis; maps count from 0, boxes stand at their number."""
    if not _drawable(trace):
        return []
    values = _list(trace.get(side))
    if trace.get("type") == "heatmap" and not values:
        rows = _list(trace.get("z"))
        n = len(rows) if side == "y" else max((len(_list(r)) for r in rows), default=0)
        values = list(range(n))
    if trace.get("type") == "heatmap" and values and all(map(is_number, values)):
        values = [float(values[0]) - 0.5, *values, float(values[-1]) + 0.5]
    if trace.get("type") == "bar" and not values:
        values = list(range(len(_list(trace.get("y" if side == "x" else "x")))))
    return values


def _list(value: Any) -> list:
    """A list; of two levels of categories the joined ones."""
    if not isinstance(value, list):
        return []
    levels = len(value) == 2 and all(isinstance(v, list) for v in value)
    if levels and value[0] and isinstance(value[0][0], str):
        return [" ".join(map(str, pair)) for pair in zip(*value, strict=False)]
    return value


def _frame(axes: dict[str, Axis], x: str, y: str) -> str:
    across, up = axes[x], axes[y]
    path = f"M{num(across.start)} {num(up.end)}V{num(up.start)}H{num(across.end)}"
    return f'<path d="{path}" fill="none" stroke="currentColor" stroke-width=".7" opacity=".45"/>'


# --- traces --------------------------------------------------------------------------------


def _trace(trace: dict, i: int, axes: dict[str, Axis], shared: "Shared") -> Iterable[str]:
    x, y = axes[on(trace, "x")], axes[on(trace, "y")]
    return DRAW[trace.get("type", "scatter")](trace, i, x, y, shared)


def _scatter(trace: dict, i: int, x: Axis, y: Axis, shared: "Shared") -> Iterable[str]:
    places = [
        (x.at(a), y.at(b)) for a, b in zip(_along(trace, "x"), _along(trace, "y"), strict=False)
    ]
    mode = trace.get("mode") or "lines"
    tone = PALETTE[i % len(PALETTE)]
    if "lines" in mode:
        line = trace.get("line", {})
        stroke = colour(line.get("color"), colour(trace.get("marker", {}).get("color"), tone))
        wide = min(max(number_or(line.get("width"), 2) * 0.6, 0.5), 2)
        dash = ' stroke-dasharray="2 2"' if line.get("dash", "solid") != "solid" else ""
        if path := line_path(places, shared.line_points):
            yield (
                f'<path d="{path}" fill="none" stroke="{stroke}" stroke-width="{num(wide)}"{dash}'
                f' stroke-linejoin="round"{opacity(trace)}/>'
            )
    if "markers" in mode:
        yield from _markers(trace, places, tone, shared.markers)


def _markers(trace: dict, places: list[tuple], tone: str, most: int) -> Iterable[str]:
    marker = trace.get("marker", {})
    tones, sizes = marker.get("color"), marker.get("size")
    step = max(1, -(-len(places) // most))
    dots: dict[str, list[str]] = {}
    for j, (a, b) in list(enumerate(places))[::step]:
        if math.isnan(a) or math.isnan(b):
            continue
        size = sizes[j] if isinstance(sizes, list) and j < len(sizes) else sizes
        r = min(max(number_or(size, 6) * 0.22, 0.9), 3)
        one = tones[j] if isinstance(tones, list) and j < len(tones) else tones
        fill = colour(shade(one, tones, marker) if is_number(one) else one, tone)
        arc = f"a{num(r)} {num(r)} 0 1 0 "
        dot = f"M{num(a - r)} {num(b)}{arc}{num(2 * r)} 0{arc}{num(-2 * r)} 0"
        dots.setdefault(fill, []).append(dot)
    for fill, marks in dots.items():
        yield f'<path d="{"".join(marks)}" fill="{fill}"{opacity(trace)}/>'


class Shared:
    """What traces have together: how many marks each may spend, and where its bars stand."""

    def __init__(self, layout: dict, traces: list[dict]) -> None:
        modes = [t.get("mode") or "lines" for t in traces if "scatter" in t.get("type", "scatter")]
        self.line_points = max(8, LINE_POINTS // max(sum("lines" in m for m in modes), 1))
        self.markers = max(4, MARKERS // max(sum("markers" in m for m in modes), 1))
        self.stacked = layout.get("barmode") in ("stack", "relative")
        self.over = layout.get("barmode") == "overlay"
        self.groups: dict[tuple, list[int]] = {}
        self.heights: dict[tuple, float] = {}
        for i, trace in enumerate(traces):
            if trace.get("type") == "bar":
                panel = (on(trace, "x"), on(trace, "y"))
                self.groups.setdefault(panel, []).append(i)

    def slot(self, trace: dict, i: int) -> tuple[float, float]:
        """Offset and width of a trace's bars, in shares of the distance between places."""
        group = self.groups[on(trace, "x"), on(trace, "y")]
        if self.stacked or self.over:
            return -0.4, 0.8
        return -0.4 + 0.8 * group.index(i) / len(group), 0.8 / len(group)

    def base(self, key: tuple, height: float) -> float:
        """Where a bar begins: on those below it where they are stacked."""
        before = self.heights.get(key, 0.0) if self.stacked else 0.0
        self.heights[key] = before + height
        return before


def _bars(trace: dict, i: int, x: Axis, y: Axis, shared: Shared) -> Iterable[str]:
    lying = trace.get("orientation") == "h"
    along, up = (y, x) if lying else (x, y)
    places = _along(trace, "y" if lying else "x")
    sizes = _list(trace.get("x" if lying else "y"))
    numbers = sorted({n for p in places if math.isfinite(n := along.number(p))})
    gap = min((b - a for a, b in pairwise(numbers)), default=1.0)
    off, wide = shared.slot(trace, i)
    tones = trace.get("marker", {}).get("color")
    for j, (place, size) in enumerate(zip(places, sizes, strict=False)):
        at = along.number(place)
        if not math.isfinite(at) or not is_number(size):
            continue
        one = tones[j] if isinstance(tones, list) and j < len(tones) else tones
        fill = colour(shade(one, tones, trace["marker"]) if is_number(one) else one,
                      PALETTE[i % len(PALETTE)])  # fmt: skip
        below = shared.base(
            (on(trace, "x"), on(trace, "y"), str(place), float(size) < 0), float(size)
        )
        top = up.number(below + float(size))
        base = up.low if up.log else up.number(below)
        if not math.isfinite(top):
            continue
        a, b = along.clipped(at + off * gap), along.clipped(at + (off + wide) * gap)
        c, d = up.clipped(base), up.clipped(top)
        box = (c, a, d, b) if lying else (a, c, b, d)
        yield rect(*box, f'fill="{fill}"{opacity(trace)}')


def _heatmap(trace: dict, i: int, x: Axis, y: Axis, _: Shared) -> Iterable[str]:
    rows = [_list(r) for r in _list(trace.get("z"))]
    if not rows or not any(rows):
        return
    across, up = _along(trace, "x"), _along(trace, "y")
    left, right = (x.clipped(x.number(v)) for v in (across[0], across[-1]))
    bottom, top = (y.clipped(y.number(v)) for v in (up[0], up[-1]))
    if x.places:
        half = (x.end - x.start) / max(len(x.places), 1) / 2
        left, right = left - half, right + half
    if y.places:
        half = (y.start - y.end) / max(len(y.places), 1) / 2
        bottom, top = bottom + half, top - half
    if bottom > top:  # a picture's first row is its upper one
        rows = rows[::-1]
    known = [float(v) for r in rows for v in r if is_number(v)]
    low = number_or(trace.get("zmin"), min(known, default=0))
    high = number_or(trace.get("zmax"), max(known, default=1))
    stops = trace.get("colorscale")
    stops = stops if isinstance(stops, list) else scale(SEQUENTIAL)
    table = [rgb(stops, k / 255) for k in range(256)]
    rows = rows[:: max(1, -(-len(rows) // CELLS))]
    step = max(1, -(-max(map(len, rows)) // CELLS))
    cells = [[level(v, low, high) for v in r[::step]] for r in rows]
    data = base64.b64encode(png(cells, table)).decode()
    a, b = sorted((left, right))
    c, d = sorted((bottom, top))
    yield (
        f'<image x="{num(a)}" y="{num(c)}" width="{num(b - a)}" height="{num(d - c)}" '
        f'preserveAspectRatio="none" style="image-rendering:pixelated" '
        f'href="data:image/png;base64,{data}"/>'
    )


def _boxes(trace: dict, i: int, x: Axis, y: Axis, _: Shared) -> Iterable[str]:
    """A box from quartile to quartile at each place."""
    groups: dict[str, list[float]] = {}
    ys = _list(trace.get("y"))
    for place, value in zip(_list(trace.get("x")) or [0] * len(ys), ys, strict=False):
        if is_number(value):
            groups.setdefault(place, []).append(float(value))
    for place, values in groups.items():
        values.sort()
        low, high = values[len(values) // 4], values[3 * len(values) // 4]
        at = x.at(place)
        if math.isfinite(at):
            fill = colour(trace.get("marker", {}).get("color"), PALETTE[i % len(PALETTE)])
            yield rect(at - 3, y.clipped(low), at + 3, y.clipped(high), f'fill="{fill}"')


DRAW = {
    "scatter": _scatter,
    "scattergl": _scatter,
    "bar": _bars,
    "heatmap": _heatmap,
    "box": _boxes,
}


def _shape(shape: dict, axes: dict[str, Axis]) -> Iterable[str]:
    """Lines, rectangles and circles that stand on axes."""
    x, y = axes.get(str(shape.get("xref", "x"))), axes.get(str(shape.get("yref", "y")))
    ends = [shape.get(k) for k in ("x0", "y0", "x1", "y1")]
    if x is None or y is None or not all(map(is_number, ends)):
        return
    a, c = x.clipped(float(ends[0])), x.clipped(float(ends[2]))
    b, d = y.clipped(float(ends[1])), y.clipped(float(ends[3]))
    stroke = colour(shape.get("line", {}).get("color"), "currentColor")
    if shape.get("type") == "line":
        ends = f"M{num(a)} {num(b)}L{num(c)} {num(d)}"
        yield f'<path d="{ends}" stroke="{stroke}" stroke-width=".7"/>'
    elif shape.get("type") == "circle":
        middle = f'cx="{num((a + c) / 2)}" cy="{num((b + d) / 2)}"'
        size = f'rx="{num(abs(c - a) / 2)}" ry="{num(abs(d - b) / 2)}"'
        yield f'<ellipse {middle} {size} fill="none" stroke="{stroke}" stroke-width=".7"/>'
    elif shape.get("type") == "rect" and shape.get("fillcolor"):
        yield rect(a, b, c, d, f'fill="{colour(shape["fillcolor"], "none")}" opacity=".6"')
