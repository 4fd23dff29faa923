"""figures.js: plotly.js and our drawing code, once a scale, for figures opened by themselves.

It is an ordinary input of the figures. Marked `ancient` it would hide changes: snakemake 9 does
not look at jobs downstream of one that has to run, not even behind an ancient file.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from pipeline.errors import command

DRAW = [Path(__file__).parent / f"templates/{name}.js" for name in ("walk", "draw")]


def write(out: str | Path, draw: Iterable[str | Path] = DRAW) -> None:
    """Write figures.js, its certificate in a comment at the end.

    Args:
        draw: our drawing code, in this order.
    """
    from pipeline import embed, intact, provenance, source, tables

    text = "\n".join([embed.plotly_js(), *(Path(f).read_text("utf-8") for f in draw), ""])
    made = provenance.certificate("figures_js", {}, source.job_code("figures_js"), [])
    made = intact.to_seal(made | {"content": hashlib.sha256(text.encode()).hexdigest()})
    mark = embed.script_json(made).replace("*/", "*\\/")
    tables.write_sealed(out, f"{text}/*retrace-provenance {mark}*/\n")


def main() -> None:
    import argparse

    parser = argparse.ArgumentParser(prog="python -m pipeline.figures_js", description=__doc__)
    parser.add_argument("--draw", required=True, nargs="+", help="walk.js and draw.js of templates")
    parser.add_argument("--out", required=True, help="figures.js")
    args = parser.parse_args()
    with command("figures_js"):
        write(args.out, args.draw)


if __name__ == "__main__":
    main()
