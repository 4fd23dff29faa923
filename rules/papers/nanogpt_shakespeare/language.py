"""What the arms know of the language: text they write, and the logit lens. [torch]

1. Which text was read: nanoGPT's, or the packaged one that serves where that is missing.
2. Samples of every arm, beside held-out text (samples.py).
3. The logit lens of every arm, over held-out text and along one excerpt (lens.py).
"""

import math
from pathlib import Path

import pandas as pd
import torch

from pipeline.job import cli
from pipeline.job.source import import_file
from pipeline.models import loader
from pipeline.spec.base import Section
from pipeline.store import provenance, tables
from pipeline.weights import batches

lens = import_file(Path(__file__).with_name("lens.py"))
samples = import_file(Path(__file__).with_name("samples.py"))
TABLES = ("text", "samples", "lens", "excerpt")


class Options(Section):
    """Section own.language of paper.yaml."""

    tables: list[str]
    samples: samples.Options
    lens: lens.Options


def text(certificate: dict, d_vocab: int, n_train: int, n_eval: int) -> pd.DataFrame:
    """One row: where the text came from, its sha256, and how much of it there is.

    Args:
        certificate: of tokens.parquet.
        d_vocab: of the tokenizer made from the text.
    """
    row = {
        "used": certificate["text"],
        "sha256": certificate["text_sha256"],
        "published": bool(certificate["published"]),
        "d_vocab": d_vocab,
        "ln_vocab": math.log(d_vocab),
        "n_train": n_train,
        "n_eval": n_eval,
    }
    return pd.DataFrame([row])


def main() -> None:
    parser = cli.parser(
        "language", __doc__, models="model.json of every arm, arms sorted by name*",
        corpus="tokens.parquet", **{t: f"{t}.parquet" for t in TABLES},
    )  # fmt: skip

    def work(job: cli.Job) -> None:
        args, options = job.args, job.section("own.language", Options)
        tokens, device = batches.read_corpus(args.corpus), job.device()
        parts: dict[str, list[pd.DataFrame]] = {t: [] for t in TABLES[1:]}
        for arm, file in zip(sorted(job.spec["arms"]), args.models, strict=True):
            loaded = loader.load(file, device)
            written = samples.of_model(loaded, tokens, options.samples)
            over, along = lens.of_model(loaded, torch.from_numpy(tokens["eval"]), options.lens)
            for name, frame in zip(TABLES[1:], (written, over, along), strict=True):
                parts[name].append(frame.assign(arm=arm))
            cli.log.info("%s: samples and lens", arm)
        frames = {n: pd.concat(f, ignore_index=True) for n, f in parts.items()}
        counts = {f"n_{s}": len(t) for s, t in tokens.items()}
        frames["text"] = text(provenance.read(args.corpus), loaded.info["d_vocab"], **counts)
        made = job.certificate([*args.models, args.corpus], seed=options.samples.seed)
        for name, frame in frames.items():
            tables.write_table(getattr(args, name), frame, made)

    cli.run("language", parser.parse_args(), work)


if __name__ == "__main__":
    main()
