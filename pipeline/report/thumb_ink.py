"""What a thumb is drawn with: colours that are checked, numbers that we write, pictures of maps."""

import math
import re
import struct
import zlib
from typing import Any

from pipeline.figures.theme import GRID, INK, SEQUENTIAL, scale

COLOUR = re.compile(r"#[0-9a-fA-F]{3,8}|rgba?\([\d., %]+\)|[a-z]{3,20}")
ROLES = {INK: "currentColor", GRID: "var(--line)", "#fefefe": "var(--page)"}


def is_number(value: Any) -> bool:
    if isinstance(value, bool) or value is None:
        return False
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def num(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")


def number_or(value: Any, otherwise: float) -> float:
    return float(value) if is_number(value) else otherwise


def line_path(places: list[tuple[float, float]], most: int) -> str:
    """A line through the places, broken where one is missing."""
    step = max(1, (len(places) - 1) / max(most - 1, 1))
    kept = [places[int(k * step)] for k in range(int((len(places) - 1) / step))] + places[-1:]
    if any(math.isnan(a + b) for a, b in places):  # num pieces: thinned they would be lost
        kept = places[: 4 * most]
    out, pen = [], "M"
    for a, b in kept:
        if math.isnan(a) or math.isnan(b):
            pen = "M"
            continue
        out.append(f"{pen}{num(a)} {num(b)}")
        pen = "L"
    return "".join(out) if len(out) > 1 else ""


def rect(a: float, b: float, c: float, d: float, look: str) -> str:
    """A rectangle with two opposite corners at (a, b) and (c, d)."""
    x, w = min(a, c), abs(c - a)
    y, h = min(b, d), abs(d - b)
    size = f'width="{num(max(w, 0.4))}" height="{num(max(h, 0.3))}"'
    return f'<rect x="{num(x)}" y="{num(y)}" {size} {look}/>'


def opacity(trace: dict) -> str:
    value = trace.get("opacity")
    return f' opacity="{num(float(value))}"' if is_number(value) and float(value) < 1 else ""


def colour(value: Any, otherwise: str) -> str:
    """A colour that is one, in the page's terms."""
    if isinstance(value, str) and COLOUR.fullmatch(value):
        return ROLES.get(value, value)
    return otherwise


def shade(value: Any, among: Any, marker: dict) -> str:
    """The colour of a number on a marker's colour scale."""
    known = [float(v) for v in among if is_number(v)] if isinstance(among, list) else [0.0, 1.0]
    low, high = number_or(marker.get("cmin"), min(known)), number_or(marker.get("cmax"), max(known))
    stops = marker.get("colorscale")
    stops = stops if isinstance(stops, list) else scale(SEQUENTIAL)
    return "#" + "".join(f"{c:02x}" for c in rgb(stops, (float(value) - low) / ((high - low) or 1)))


def level(value: Any, low: float, high: float) -> int | None:
    if not is_number(value):
        return None
    return round(255 * min(max((float(value) - low) / ((high - low) or 1), 0), 1))


def rgb(stops: list, at: float) -> tuple[int, int, int]:
    """The colour of a plotly scale at a place from 0 to 1; grey where a stop is no hex colour."""
    at = min(max(at, 0.0), 1.0)
    below = max((s for s in stops if s[0] <= at), key=lambda s: s[0], default=stops[0])
    above = min((s for s in stops if s[0] >= at), key=lambda s: s[0], default=stops[-1])
    share = (at - below[0]) / ((above[0] - below[0]) or 1)
    a, b = _hex(below[1]), _hex(above[1])
    return tuple(round(p + share * (q - p)) for p, q in zip(a, b, strict=True))


def _hex(text: Any) -> tuple[int, int, int]:
    if isinstance(text, str) and re.fullmatch(r"#[0-9a-fA-F]{6}", text):
        return tuple(int(text[k : k + 2], 16) for k in (1, 3, 5))
    found = re.match(r"rgba?\((\d+), ?(\d+), ?(\d+)", str(text))
    return tuple(min(int(g), 255) for g in found.groups()) if found else (128, 128, 128)


def png(cells: list[list[int | None]], table: list[tuple[int, int, int]]) -> bytes:
    """An RGBA picture of levels 0 to 255; where a level is None it is clear."""
    wide = max(map(len, cells))
    raw = b""
    for row in cells:
        full = [*row, *[None] * (wide - len(row))]
        raw += b"\0" + b"".join(
            bytes((*table[v], 255)) if v is not None else b"\0\0\0\0" for v in full
        )
    head = struct.pack(">IIBBBBB", wide, len(cells), 8, 6, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(raw, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts
    )
