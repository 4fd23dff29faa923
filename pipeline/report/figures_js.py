"""figures.js: plotly.js and our drawing code, once a scale, for figures opened by themselves.

It is an ordinary input of the figures. Marked `ancient` it would hide changes: snakemake 9 does
not look at jobs downstream of one that has to run, not even behind an ancient file.
"""

from pipeline.errors import command
from pipeline.report.pages import write


def main() -> None:
    import argparse

    parser = argparse.ArgumentParser(prog="python -m pipeline figures_js", description=__doc__)
    parser.add_argument("--draw", required=True, nargs="+", help="walk.js, play.js, draw.js")
    parser.add_argument("--out", required=True, help="figures.js")
    args = parser.parse_args()
    with command("figures_js"):
        write(args.out, args.draw)
