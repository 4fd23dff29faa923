"""A figure as a picture for a slide, and a page as a PDF, by a headless Chromium.

    python -m pipeline slide results/laptop/topk_saes/figures/frontier.html --out frontier.svg
    python -m pipeline slide results/laptop/topk_saes/figures/frontier.html --out frontier.png
    python -m pipeline slide results/laptop/topk_saes/report.html --out report.pdf

A figure is laid out at 16:9 with its title and letters for a back row, on white; a PNG has
1920 x 1080 pixels. Its menus and sliders are left out: it shows what the page shows at first.
Chromium draws with the plotly.js of the lock file, offline. Plotly's own way, kaleido 1.5, drives
the same Chromium to the same bytes of a PNG in the same time (an SVG differs by random ids), but it
has to be installed with five packages more, and a page as PDF needs the code below all the same.
"""

import argparse
import base64
import binascii
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from pipeline import errors
from pipeline.errors import RetraceError
from pipeline.report.pages import PLOT
from pipeline.store import embed, tables

NAMES = "chromium chromium-browser google-chrome google-chrome-stable chrome".split()
MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
FLAGS = (
    "--headless --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --log-level=3"
).split()
WIDTH, HEIGHT, SCALE = 960, 540, 2  # pixels of the layout, and of a PNG for each of them
LETTERS, HEADING, HEADROOM = 16, 24, 112
PATIENCE = 120  # seconds; a page takes two
DRAW = """<!doctype html><meta charset="utf-8"><div id="plot"></div><pre id="out"></pre>
<script>{plotly}</script>
<script type="application/json" id="data">{plot}</script>
<script>
const plot = JSON.parse(document.getElementById("data").textContent);
const size = {{ format: "{format}", width: {width}, height: {height}, scale: {scale} }};
Plotly.newPlot("plot", plot.data, plot.layout, {{ staticPlot: true }})
  .then((drawn) => Plotly.toImage(drawn, size))
  .then((url) => {{ document.body.innerHTML = "<pre id=out>" + btoa(url) + "</pre>"; }});
</script>"""


def browser(named: str | None) -> str:
    """The Chromium to use: the one that is named, else one on the path.

    Raises:
        RetraceError: there is none.
    """
    found = shutil.which(named) if named else next(filter(None, map(shutil.which, NAMES)), None)
    if found is None and not named and Path(MAC).exists():
        found = MAC
    if found is None:
        tried = named or ", ".join(NAMES)
        raise RetraceError(
            f"no Chromium found ({tried}); install it (Debian: apt install chromium), or name it "
            f"with --browser"
        )
    return found


def run(command: str, *args: str) -> str:
    """What a headless Chromium prints."""
    root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory() as profile:
        try:
            done = subprocess.run(
                [command, *FLAGS, *root, f"--user-data-dir={profile}", *args],
                capture_output=True,
                timeout=PATIENCE,
            )
        except subprocess.TimeoutExpired:
            raise RetraceError(f"{command}: no answer within {PATIENCE} s; try again") from None
        except OSError as e:
            raise RetraceError(f"{command}: cannot be run ({e.strerror}); see --browser") from e
    return done.stdout.decode("utf-8", "replace")


def laid_out(page: str) -> dict[str, Any] | None:
    """The plot of a figure's page, laid out for a slide; None where the page is no figure."""
    found, title = PLOT.search(page), re.search(r"<h1>(.*?)</h1>", page, re.S)
    if found is None or len(PLOT.findall(page)) > 1:
        return None
    plot = json.loads(found[1])
    layout = {k: v for k, v in plot["layout"].items() if k not in ("updatemenus", "sliders")}
    font = layout["template"]["layout"]["font"] | {"size": LETTERS}
    layout |= {"width": WIDTH, "height": HEIGHT, "font": font, "paper_bgcolor": "#ffffff"}
    if title:  # the page's <h1> is escaped text, as plotly wants it
        heading = {"text": title[1], "x": 0.02, "xanchor": "left", "font": {"size": HEADING}}
        layout["title"] = heading | {"y": 0.98, "yanchor": "top"}
        layout["margin"] = layout.get("margin", {}) | {"t": HEADROOM}
    return {"data": plot["data"], "layout": layout}


def figure(source: Path) -> dict[str, Any]:
    """The plot of a figure's page, laid out for a slide.

    Raises:
        RetraceError: the page is none, or its plot is not as stage figures writes it.
    """
    try:
        found = laid_out(source.read_text("utf-8"))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        raise RetraceError(
            f"{source}: its plot is damaged ({' '.join(str(e).split())}); make the page again"
        ) from e
    if found is None:
        raise RetraceError(f"{source}: is not one figure; name results/…/figures/<figure>.html")
    return found


def picture(plot: dict[str, Any], kind: str, command: str) -> bytes:
    """A laid-out plot as the bytes of an SVG or a PNG."""
    text = DRAW.format(
        plotly=embed.plotly_js(),
        plot=embed.script_json(plot),
        format=kind,
        width=WIDTH,
        height=HEIGHT,
        scale=SCALE if kind == "png" else 1,
    )
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "slide.html"
        page.write_text(text, "utf-8")
        said = run(command, f"--virtual-time-budget={1000 * PATIENCE}", "--dump-dom", page.as_uri())
    found = re.search(r'<pre id="?out"?>([A-Za-z0-9+/=]+)</pre>', said)
    try:
        url = base64.b64decode(found[1]).decode()
        head, body = url.split(",", 1)
        return base64.b64decode(body) if head.endswith("base64") else unquote_to_bytes(body)
    except (TypeError, ValueError, binascii.Error):
        raise RetraceError(f"{command}: drew nothing; see that it is a recent Chromium") from None


def printed(page: Path, command: str) -> bytes:
    """A page as the bytes of a PDF."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "page.pdf"
        how = [f"--virtual-time-budget={1000 * PATIENCE}", "--no-pdf-header-footer"]
        run(command, *how, f"--print-to-pdf={out}", page.resolve().as_uri())
        if not out.exists():
            raise RetraceError(f"{command}: printed nothing; see that it is a recent Chromium")
        return out.read_bytes()


def make(source: Path, out: Path, named: str | None) -> None:
    """Write `out` from a figure or a page.

    Raises:
        RetraceError: the source is not what `out` needs, or there is no Chromium.
    """
    kind = out.suffix[1:].lower()
    if kind not in ("svg", "png", "pdf"):
        raise RetraceError(f"--out {out}: name a .svg or .png of a figure, or a .pdf of a page")
    if not source.is_file():
        raise RetraceError(f"{source}: does not exist; run snakemake to make it")
    plot = None if kind == "pdf" else figure(source)
    command = browser(named)
    content = printed(source, command) if plot is None else picture(plot, kind, command)
    tables.atomically(out, lambda to: to.write_bytes(content) and None)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline slide",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("page", type=Path, help="a figure's .html, or any page for a .pdf")
    parser.add_argument("--out", type=Path, required=True, help=".svg, .png or .pdf")
    parser.add_argument("--browser", help="Chromium or Chrome; default: one on the path")
    args = parser.parse_args()
    with errors.command("slide"):
        make(args.page, args.out, args.browser)
        print(args.out.resolve())
