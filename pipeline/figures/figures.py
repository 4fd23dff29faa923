"""Tables -> plotly figures: a page and the numbers of each (drawing.py)."""

import os
from pathlib import Path

from pipeline.figures.drawing import filled, make, page, plain, read


def main() -> None:
    from pipeline.job import cli
    from pipeline.store import embed, tables

    parser = cli.parser(
        "figures",
        __doc__,
        tables="the tables that the figure names*",
        own="the paper's figures.py, if any*",
        metrics="metrics.json, where the caption has numbers*",
        script="figures.js, see the rule of that name",
        out="the figure, .html",
        csv="the plotted numbers",
    )

    def work(job: cli.Job) -> None:
        args, name, spec = job.args, job.spec["name"], job.spec["figure"]
        frames = {n: read(p) for n, p in zip(spec["tables"], args.tables, strict=True)}
        own = Path(args.own[0]) if args.own else None
        figure, frame = make(name, spec, frames, own)
        plot = plain(figure)
        made = job.certificate([*args.tables, *(f for f in args.metrics if f not in args.tables)])
        script = os.path.relpath(args.script, Path(args.out).parent)
        numbers = tables.read_json(args.metrics[0])["metrics"] if args.metrics else {}
        caption = filled(spec["caption"], numbers)
        whose = job.spec.get("paper", ""), job.spec.get("scale", "")
        text = page(name, spec["title"], caption, plot, script, *whose)
        tables.write_csv(args.csv, frame, made)
        embed.write_page(args.out, text, made)
        cli.log.info(
            "%s: %d traces, %d bytes", name, len(plot["data"]), Path(args.out).stat().st_size
        )

    cli.run("figures", parser.parse_args(), work)
