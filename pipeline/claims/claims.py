"""Scalars against the paper's numbers -> verdicts, a row per claim (verdicts.py)."""

from pipeline.claims.judge import COLUMNS
from pipeline.claims.verdicts import judged


def main() -> None:
    from pipeline.job import cli
    from pipeline.store import tables

    parser = cli.parser("claims", __doc__, metrics="metrics.json", out="claims.csv")

    def work(job: cli.Job) -> None:
        import pandas as pd

        rows = judged(job.spec, tables.read_json(job.args.metrics)["metrics"])
        frame = pd.DataFrame(rows, columns=COLUMNS)
        tables.write_csv(job.args.out, frame, job.certificate([job.args.metrics]))

    cli.run("claims", parser.parse_args(), work)
