"""Fail where a claim is not reproduced: what `--config strict=true` adds to a run.

Its output exists only if every claim that was judged is reproduced, so a run that is otherwise
finished fails again and again until that is so.
"""

from pathlib import Path

from pipeline.claims import summary
from pipeline.errors import RetraceError
from pipeline.job import cli
from pipeline.store import tables


def failed(files: list[str]) -> list[str]:
    """'<paper>.<claim>' of every claim that is judged and not reproduced.

    Args:
        files: claims.csv of the papers, `…/<paper>/claims.csv`.
    """
    return [
        f"{Path(file).parent.name}.{row['id']}"
        for file in files
        for row in summary.read_claims(file)
        if row["verdict"] == "not reproduced"
    ]


def main() -> None:
    parser = cli.parser("strict", __doc__, claims="claims.csv of every paper*", out="strict.json")

    def work(job: cli.Job) -> None:
        if names := failed(job.args.claims):
            raise RetraceError(
                f"not reproduced: {', '.join(names)}; strict is true in config.yaml, so the run "
                f"fails; all results are kept"
            )
        tables.write_json(job.args.out, {"failed": []}, job.certificate(job.args.claims))

    cli.run("strict", parser.parse_args(), work)
