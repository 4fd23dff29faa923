"""Tables -> plotly figures.

1. Read the tables that the figure names in paper.yaml.
2. Call its function: one of the paper's own figures.py, else the core kind (`kinds.KINDS`). It
   takes (tables, options) and returns the figure and the frame of the numbers that it plots.
3. Lay the template `retrace` under it, shorten its numbers, and write it as a small page without
   plotly.js; the plotted numbers go beside it as CSV.

A figure opened by itself draws with `figures.js`, written once a scale, two folders up; without
that file it says where the report is. report.py takes the same figure into its page.
"""

import datetime
import decimal
import html
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.claims.scalars import definition, known, parts, whole
from pipeline.errors import RetraceError, nearest
from pipeline.figures.kinds import KINDS
from pipeline.figures.theme import template
from pipeline.job.source import functions, import_file
from pipeline.spec.figures import faults as option_faults

DIGITS = 5  # of plotted floats: a pixel in 10,000; the CSV has them whole
PLACE = re.compile(r"\{([A-Za-z]\w*(?:\.\w+)*)\}")  # of a number in a caption
IN_CAPTION = 3  # significant digits of it
UNKNOWN = "–"  # a metric that this run did not measure
ALONE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'self' file:; \
style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'">
<title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>:root {{ color-scheme: light dark; background: light-dark(#fff, #14171b); \
color: light-dark(#1b1f24, #e6e8eb) }} body {{ font: 16px/1.5 system-ui, sans-serif; \
max-width: 56rem; margin: 2rem auto; padding: 0 1rem; background: inherit }} \
a {{ color: light-dark(#00589b, #7cc0f4) }} \
button, select {{ font: inherit; min-width: 2.4rem; max-width: 100%; padding: .3rem .5rem }} \
</style></head>
<body><main><h1>{title}</h1>
<div class="retrace-figure" id="figure-{name}" role="figure" aria-label="{title}">
<p class="retrace-wait">Drawn by {script}; where that file is missing, open report.html.</p>
<script type="application/json" class="retrace-plot">{plot}</script>
</div>
<p>{caption}</p>
{about}</main><script src="{script}"></script>
</body></html>
"""
ABOUT = """\
<p>A figure of <a href="../report.html#figure-{name}">{paper}</a>, replicated at {scale} scale.</p>
"""


def own_functions(file: Path) -> dict[str, Path]:
    """Name of a function -> its file: figures.py, or one that it is split into, figures_*.py."""
    files = sorted(file.parent.glob(f"{file.stem}*.py"))
    return {name: path for path in files for name in functions(path)}


def faults(paper: Any) -> Iterator[str]:
    """A sentence for every figure without a function or table: the value and the nearest one."""
    own = own_functions(paper.folder / "figures.py")
    tables = [*paper.tables(), "metrics", "claims"]
    metrics = known(parts(paper))
    for name, figure in paper.spec.figures.items():
        where = f"{paper.folder / 'paper.yaml'}: figures.{name}"
        wanted = figure.kind or name
        if wanted not in own and not (figure.kind and figure.kind in KINDS):
            there = [*KINDS, *own] if figure.kind else own
            what = f"kind '{figure.kind}'" if figure.kind else f"function '{name}' in figures.py"
            yield (
                f"{where}: no {what}{nearest(wanted, there)}; name a kind ({', '.join(KINDS)}) or "
                f"write the function"
            )
        elif wanted not in own:
            yield from (f"{where}: {said}" for said in option_faults(figure.kind, figure.options))
        for metric in metrics_in(figure.caption):
            if definition(metric, metrics) is None:
                yield f"{where}: caption: no setting or metric '{metric}'{nearest(metric, metrics)}"
        for table in figure.tables:
            if table not in tables:
                yield (
                    f"{where}: no table '{table}'{nearest(table, tables)}; this paper has "
                    f"{', '.join(tables)}"
                )


def check(paper: Any) -> None:
    """Raise a RetraceError for the first of `faults`; cheap, before anything runs."""
    for fault in faults(paper):
        raise RetraceError(fault)


def short(value: Any) -> Any:
    """A figure as plain data: arrays as lists, floats rounded to DIGITS significant digits."""
    import numpy as np

    if isinstance(value, dict):
        if "bdata" in value:
            shape = [int(n) for n in str(value.get("shape", -1)).split(",")]
            value = np.frombuffer(_bytes(value["bdata"]), value["dtype"]).reshape(shape)
            return short(value)
        return {k: short(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return short(list(value) if value.dtype.kind in "Mm" else value.tolist())
    if isinstance(value, (list, tuple)):
        return [short(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if abs(value) < 1e15 else value
    return value if value is None or isinstance(value, str | int) else _scalar(value)


def _scalar(value: Any) -> Any:
    """A number, date or duration of another library as plotly's JSON has it; missing: None."""
    import numpy as np
    import pandas as pd

    if pd.api.types.is_scalar(value) and pd.isna(value):
        return None
    if isinstance(value, np.datetime64):
        return str(value)  # ISO 8601
    if isinstance(value, np.timedelta64):
        return short(float(value / np.timedelta64(1, "ms")))
    if isinstance(value, datetime.timedelta):
        return short(value / datetime.timedelta(milliseconds=1))
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return short(float(value))
    return short(value.item()) if isinstance(value, np.generic) else value


def _bytes(text: str) -> bytes:
    import base64

    return base64.b64decode(text)


def plain(figure: Any) -> dict[str, Any]:
    """The figure as JSON-ready data, with the template `retrace`; the page has its title."""
    made = figure.to_plotly_json()
    layout = {k: v for k, v in made.get("layout", {}).items() if k not in ("template", "title")}
    layout = percents(above_titles(layout))
    return short({"data": made.get("data", []), "layout": layout | {"template": template()}})


def percents(value: Any) -> Any:
    """A layout whose ticks of whole percents have a digit where they need it: 0.5 % is not 1 %."""
    if isinstance(value, dict):
        whole = {k for k, v in value.items() if k.endswith("tickformat") and v == ".0%"}
        return {k: ".2~%" if k in whole else percents(v) for k, v in value.items()}
    return [percents(v) for v in value] if isinstance(value, list | tuple) else value


def above_titles(layout: dict[str, Any]) -> dict[str, Any]:
    """The layout with its legend above titles of panels, where nobody said where it stands.

    `make_subplots(subplot_titles=…)` writes them where the template has the legend.
    """
    titles = [a for a in layout.get("annotations", []) if a.get("yref") == "paper"]
    top = any(a.get("yanchor") == "bottom" and a.get("y", 0) > 0.95 for a in titles)
    if not top or "y" in layout.get("legend", {}):
        return layout
    margin = layout.get("margin", {}) | {"t": max(layout.get("margin", {}).get("t", 0), 70)}
    room = max(layout.get("height", 440) - margin["t"] - 50, 1)
    return layout | {"legend": {**layout.get("legend", {}), "y": 1 + 26 / room}, "margin": margin}


def page(
    name: str, title: str, caption: str, plot: dict, script: str, paper: str = "", scale: str = ""
) -> str:
    """A figure as a small page without plotly.js; the report takes its `retrace-figure`.

    Args:
        script: where figures.js lies, from this page.
        paper, scale: whose figure it is; with a paper the page leads to its report.
    """
    from pipeline.store.embed import script_json

    text = {"name": name, "title": title, "caption": caption, "script": script}
    text = {k: html.escape(v) for k, v in text.items()}
    text["caption"] = alone(text["caption"], text["name"])
    about = ""
    if paper:
        about = ABOUT.format(name=text["name"], paper=html.escape(paper), scale=html.escape(scale))
    return ALONE.format(plot=script_json(plot), about=about, **text)


# --- captions ------------------------------------------------------------------------------


def alone(caption: str, name: str) -> str:
    """An escaped caption without the numbers of a run, which the report has: '…' leads there."""
    there = f'<a href="../report.html#figure-{name}" title="the number is in the report">…</a>'
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", PLACE.sub(there, caption))


def metrics_in(caption: str) -> list[str]:
    """The metrics that a caption names, in the order of their first places."""
    return list(dict.fromkeys(PLACE.findall(caption)))


def filled(caption: str, metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """The caption with a number in each place.

    Args:
        metrics: name -> mean, …, as metrics.json has them.
    """
    return PLACE.sub(lambda found: in_caption(metrics.get(found[1], {}).get("mean")), caption)


def in_caption(mean: float | None) -> str:
    """A number for a sentence: 12,345, 0.0312, −2; '–' where it is unknown."""
    if mean is None or not math.isfinite(mean):
        return UNKNOWN
    whole = float(mean).is_integer() or abs(mean) >= 1000
    return (f"{mean:,.0f}" if whole else f"{mean:.{IN_CAPTION}g}").replace("-", "−")


# --- from tables to a figure ---------------------------------------------------------------


def read(path: str | Path) -> Any:
    """A table for a figure; columns that hold records (a latent's contexts) are left out."""
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipeline.store import tables

    if Path(path).suffix == ".csv":
        try:
            return pd.read_csv(path)
        except ValueError as e:  # pandas's own errors and those of UTF-8 are such
            raise RetraceError(f"{path}: is no table ({e}); make it again") from e
    if Path(path).suffix == ".json":
        metrics = whole(tables.read_json(path).get("metrics"), path)
        rows = [{"name": n, **{k: m[k] for k in ("mean", "sd", "n")}} for n, m in metrics.items()]
        return pd.DataFrame(rows, columns=["name", "mean", "sd", "n"])
    nested = lambda t: pa.types.is_list(t) and pa.types.is_struct(t.value_type)  # noqa: E731
    columns = [f.name for f in pq.read_schema(path) if not nested(f.type)]
    return tables.read_table(path, columns)


def make(name: str, spec: dict, frames: dict[str, Any], own: Path | None) -> tuple[Any, Any]:
    """Call the figure's function.

    Raises:
        RetraceError: it is missing, or returns something else than a figure and a frame.
    """
    import pandas as pd
    import plotly.graph_objects as go

    wanted = spec["kind"] or name
    there = own_functions(own) if own else {}
    function = KINDS.get(wanted)
    if wanted in there:
        function = getattr(import_file(there[wanted]), wanted)
    if function is None:
        raise RetraceError(f"figure {name}: no function '{wanted}' in {own or 'the core kinds'}")
    try:
        made = function(frames, spec["options"])
    except RetraceError as e:
        raise RetraceError(f"figure {name}: {e}") from e
    match made:
        case (go.Figure() as figure, pd.DataFrame() as frame):
            return figure, frame
    raise RetraceError(
        f"figure {name}: {wanted} returned {type(made).__name__}; return a plotly Figure and the "
        f"DataFrame of the numbers it plots"
    )
