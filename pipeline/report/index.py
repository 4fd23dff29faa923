"""All papers of a run on one page: badges, every claim, and links to the reports."""

from pathlib import Path

from pipeline.claims.summary import read_claims, tally
from pipeline.report import pages
from pipeline.report.pages import SECOND_HAND


def entries(cards: dict[str, dict], claims: list[str]) -> list[dict]:
    """One entry a paper, in the order of its claims.csv: the card, the claims, their tally."""
    out = []
    for path in claims:
        name, rows = Path(path).parent.name, read_claims(path)
        out.append({"name": name, **cards[name], "claims": rows, "count": tally(rows)})
    return out


def main() -> None:
    from pipeline import __version__
    from pipeline.job import cli
    from pipeline.store import embed

    parser = cli.parser("index", __doc__, claims="claims.csv of every paper*", out="index.html")

    def work(job: cli.Job) -> None:
        args, scale = job.args, job.spec["scale"]
        papers = entries(job.spec["papers"], args.claims)
        page = pages.render(
            "index.html",
            title=f"Retrace: replications at {scale} scale",
            scale=scale,
            papers=papers,
            count=tally([row for p in papers for row in p["claims"]]),
            second_hand=SECOND_HAND,
            version=__version__,
        )
        embed.write_page(args.out, page, job.certificate(args.claims))

    cli.run("index", parser.parse_args(), work)
