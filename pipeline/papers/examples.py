"""An example of every kind of figure, for catalogues of runs that have none of their own.

    python -m pipeline redraw results/reference/topk_saes/laptop --out redrawn
    python -m pipeline examples redrawn/laptop/topk_saes/*.html

1. The kind of a page is that of its certificate; of several pages of a kind the first is taken.
2. Its thumb (thumbs.py) is written to templates/examples.html with the paper and the scale that
   it is of. Examples of other kinds stay as they are.
"""

import argparse
import html
from pathlib import Path

from pipeline.errors import RetraceError, command
from pipeline.figures.kinds import KINDS
from pipeline.report import thumbs
from pipeline.report.catalogue import EXAMPLES, Example, examples
from pipeline.store import provenance


def example(page: Path) -> tuple[str, Example]:
    """(kind, example) of a figure's page; the kind is blank where it is no core kind.

    Raises:
        RetraceError: the page is no figure's, or nothing of it can be drawn small.
    """
    made, drawing = provenance.read(page), thumbs.of_page(page)
    if not made or made["stage"] != "figures" or not drawing:
        raise RetraceError(f"{page}: is no figure's page with a thumb; name one that redraw made")
    kind = made["spec"]["figure"]["kind"]
    title = made["spec"]["paper"].partition(":")[0]  # without what follows a colon
    of = f"{title}, {made['spec']['scale']} scale"
    return (kind if kind in KINDS else ""), Example(of, drawing)


def text(found: dict[str, Example]) -> str:
    """templates/examples.html, a line a kind."""
    lines = (
        f'<symbol id="example-{kind}" viewBox="0 0 144 90" data-of="{html.escape(e.of)}">'
        f"{e.drawing}</symbol>\n"
        for kind, e in sorted(found.items())
    )
    return "".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline examples", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("pages", nargs="+", type=Path, help="pages of figures")
    args = parser.parse_args()
    with command("examples"):
        found = dict(example(page) for page in reversed(args.pages))
        found.pop("", None)
        EXAMPLES.write_text(text(examples() | found), "utf-8")
        print(f"{EXAMPLES}: {', '.join(sorted(found)) or 'nothing new'}")
