"""figures.js: plotly.js and our drawing code, once a scale, for figures opened by themselves.

It is an ordinary input of the figures. Marked `ancient` it would hide changes: snakemake 9 does
not look at jobs downstream of one that has to run, not even behind an ancient file.
"""

import hashlib
from pathlib import Path


def main() -> None:
    import argparse

    from pipeline import embed, intact, provenance, source, tables

    parser = argparse.ArgumentParser(prog="python -m pipeline.figures_js", description=__doc__)
    parser.add_argument("--draw", required=True, nargs="+", help="walk.js and draw.js of templates")
    parser.add_argument("--out", required=True, help="figures.js")
    args = parser.parse_args()
    text = "\n".join([embed.plotly_js(), *(Path(f).read_text("utf-8") for f in args.draw), ""])
    made = provenance.certificate("figures_js", {}, source.job_code("figures_js"), [])
    made = intact.to_seal(made | {"content": hashlib.sha256(text.encode()).hexdigest()})
    mark = embed.script_json(made).replace("*/", "*\\/")
    tables.write_sealed(args.out, f"{text}/*retrace-provenance {mark}*/\n")


if __name__ == "__main__":
    main()
