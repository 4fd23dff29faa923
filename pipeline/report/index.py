"""All papers of a run on one page, a row each; and beside it the catalogue of what there is.

1. Read claims.csv of each paper, those of earlier runs among them.
2. Draw the headline figure of each as a thumb (thumbs.py), where its page lies beside the claims.
3. Write the index, on which claims and summary unfold, and the catalogue (catalogue.py).
"""

from pathlib import Path

from pipeline.claims.summary import read_claims, tally
from pipeline.report import catalogue, pages, thumbs


def entries(cards: dict[str, dict], claims: list[str]) -> list[dict]:
    """One entry a paper, in the order of its claims.csv: the card, the claims, their tally."""
    out = []
    for path in claims:
        home = Path(path).parent
        rows, card = read_claims(path), cards[home.name]
        entry = {"name": home.name, **card, "claims": rows, "count": tally(rows)}
        figure = home / f"figures/{card.get('headline', '')}.html"
        out.append(entry | {"picture": pages.safe(thumbs.of_page(figure))})
    return out


def main() -> None:
    from pipeline import __version__
    from pipeline.job import cli
    from pipeline.store import embed

    parser = cli.parser(
        "index",
        __doc__,
        claims="claims.csv of every paper*",
        out="index.html",
        catalogue="catalogue.html",
    )

    def work(job: cli.Job) -> None:
        args, scale = job.args, job.spec["scale"]
        papers = entries(job.spec["papers"], args.claims)
        page = pages.render(
            "index.html",
            title=f"Retrace: replications at {scale} scale",
            scale=scale,
            papers=papers,
            count=tally([row for p in papers for row in p["claims"]]),
            version=__version__,
        )
        listed = pages.render(
            "catalogue.html",
            title="Retrace: catalogue",
            version=__version__,
            **catalogue.context(job.spec),
        )
        embed.write_page(args.catalogue, listed, job.certificate([]))
        embed.write_page(args.out, page, job.certificate(args.claims))

    cli.run("index", parser.parse_args(), work)
