"""One look for every figure: palette, roles of colour, axes, and the plotly template.

A figure is drawn by `templates/draw.js`, which puts the page's own colours in the place of INK,
GRID and PAGE: so the same figure is legible on light and on dark ground. Use them for lines and
text that should follow the page, and PALETTE for data.
"""

import html
from typing import Any

# Okabe & Ito (2008), distinguishable with every kind of colour blindness; without its black, which
# vanishes on dark ground, and its yellow, which vanishes on light.
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C"]
DASHES = ["solid", "dot", "dash", "dashdot", "longdash"]
# Sequential: cividis (Nuñez, Anderton & Renslow 2018). Diverging: blue to vermillion through grey.
SEQUENTIAL = ["#00224e", "#2a3f6d", "#575d6d", "#7d7c78", "#a59c74", "#d2c060", "#fee838"]
DIVERGING = ["#004a7f", "#5b9bcb", "#d9d9d9", "#e08a52", "#8f3d00"]
INK, GRID, PAGE = "#1b1f24", "#d9dde3", "#fefefe"  # roles: draw.js replaces exactly these
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


def template() -> dict[str, Any]:
    """The plotly template `retrace`, as plain data."""
    axis = {
        "gridcolor": GRID,
        "zerolinecolor": GRID,
        "linecolor": INK,
        "showline": True,
        "ticks": "outside",
        "tickcolor": INK,
        "automargin": True,
        "minorloglabels": "complete",
        "title": {"standoff": 10},
    }
    bar = {"outlinewidth": 0, "thickness": 12}
    field = [{"colorscale": scale(SEQUENTIAL), "colorbar": bar}]
    return {
        "data": {"heatmap": field, "contour": field},
        "layout": {
            "font": {"family": FONT, "size": 13, "color": INK},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "colorway": PALETTE,
            "colorscale": {"sequential": scale(SEQUENTIAL), "diverging": scale(DIVERGING)},
            "margin": {"l": 56, "r": 12, "t": 12, "b": 48},
            "xaxis": axis,
            "yaxis": axis,
            "legend": {
                "orientation": "h",
                "tracegroupgap": 0,
                "x": 0,
                "y": 1.02,
                "yanchor": "bottom",
                "bgcolor": "rgba(0,0,0,0)",
            },
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": PALETTE[-1], "activecolor": INK},
            "hovermode": "closest",
            "hoverlabel": {
                "align": "left",
                "namelength": -1,
                "bgcolor": PAGE,
                "bordercolor": GRID,
                "font": {"color": INK},
            },
            "coloraxis": {"colorbar": bar},
        },
    }


def scale(colours: list[str]) -> list[list]:
    """A plotly colour scale of evenly spaced colours."""
    return [[round(i / (len(colours) - 1), 4), c] for i, c in enumerate(colours)]


def axis(title: str, unit: str = "", *, log: bool = False, **more: Any) -> dict[str, Any]:
    """An axis with its unit: axis('loss', 'nats'). On log axes only 1, 2 and 5 carry numbers."""
    out = {"title": {"text": f"{title} ({unit})" if unit else title}, **more}
    return out | ({"type": "log", "dtick": "D2"} if log else {})


def colour(i: int) -> str:
    """The i-th colour of the palette; it starts again after the last."""
    return PALETTE[i % len(PALETTE)]


def rgba(colour: str, alpha: float) -> str:
    """A hex colour with transparency."""
    r, g, b = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({r},{g},{b},{alpha:g})"


def literal(text: Any) -> str:
    """Text of a model or a corpus for a label or a hover box: shown as it is, never as markup."""
    shown = str(text).replace("\n", "↵").replace("\t", "→")
    return html.escape(shown, quote=False)


def selector(choices: dict[str, list]) -> dict[str, Any]:
    """A plotly menu that draw.js shows as a list above the figure.

    Args:
        choices: label -> [changes of the traces, changes of the layout], as Plotly.update takes
            them; the first is what the figure shows at the start.
    """
    buttons = [{"label": k, "method": "update", "args": v} for k, v in choices.items()]
    return {"type": "dropdown", "buttons": buttons, "x": 1, "xanchor": "right", "y": 1.15}


def slider(choices: dict[str, list], what: str, active: int = 0) -> dict[str, Any]:
    """A plotly slider that draw.js shows as a range above the figure.

    Args:
        choices: as for `selector`, in the order of the slider's places.
        what: stands before the label of the place, such as 'step '.
        active: the place that the figure shows at the start.
    """
    steps = [{"label": k, "method": "update", "args": v} for k, v in choices.items()]
    return {"steps": steps, "active": active, "currentvalue": {"prefix": what}}
