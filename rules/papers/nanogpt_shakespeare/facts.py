"""Which text this run has read: nanoGPT's, or the packaged one that serves where it is missing."""

import math

import pandas as pd

from pipeline import cli, provenance, tables
from pipeline.spec_base import Section


class Options(Section):
    """Section own.facts of paper.yaml."""

    tables: list[str] = ["text"]


def facts(certificate: dict, d_vocab: int, splits: pd.Series) -> pd.DataFrame:
    """One row: where the text came from, its sha256, and how much of it there is.

    Args:
        certificate: of tokens.parquet.
        d_vocab: of the tokenizer made from the text.
        splits: the split of every block.
    """
    counts = splits.value_counts() * certificate["n_ctx"]
    return pd.DataFrame(
        {
            "used": [certificate["text"]],
            "sha256": [certificate["text_sha256"]],
            "published": [bool(certificate["published"])],
            "d_vocab": [d_vocab],
            "ln_vocab": [math.log(d_vocab)],
            "n_train": [int(counts.get("train", 0))],
            "n_eval": [int(counts.get("eval", 0))],
        }
    )


def main() -> None:
    parser = cli.parser("facts", __doc__, corpus="tokens.parquet", model="model.json", out="table")

    def work(job: cli.Job) -> None:
        job.section("own.facts", Options)
        args = job.args
        splits = tables.read_arrow(args.corpus, ["split"])["split"].to_pandas()
        d_vocab = tables.read_json(args.model)["d_vocab"]
        frame = facts(provenance.read(args.corpus), d_vocab, splits)
        tables.write_table(args.out, frame, job.certificate([args.corpus, args.model]))

    cli.run("facts", parser.parse_args(), work)


if __name__ == "__main__":
    main()
