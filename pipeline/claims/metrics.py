"""Tables -> named scalars, each with its definition (scalars.py)."""

from pathlib import Path

from pipeline.claims.scalars import compute, known


def main() -> None:
    from pipeline.job import cli
    from pipeline.store import tables

    parser = cli.parser(
        "metrics",
        __doc__,
        tables="the paper's tables*",
        own="the paper's metrics.py, if any*",
        out="metrics.json",
    )

    def work(job: cli.Job) -> None:
        args = job.args
        frames = {
            n: tables.read_table(p) for n, p in zip(job.spec["tables"], args.tables, strict=True)
        }
        own = Path(args.own[0]) if args.own else None
        metrics = compute(frames, known(job.spec["parts"]), own)
        tables.write_json(args.out, {"metrics": metrics}, job.certificate(args.tables))

    cli.run("metrics", parser.parse_args(), work)
