"""What the arms know of the language: text they write, and the logit lens. [torch]

1. Which text was read: nanoGPT's, or the packaged one that serves where that is missing.
2. Samples of every arm, beside held-out text (samples.py).
3. The logit lens of every arm, over held-out text and along one excerpt (lens.py).
"""

import math

import pandas as pd
import torch

from pipeline.job import cli, own
from pipeline.models import loader
from pipeline.store import provenance
from pipeline.weights import batches

from . import lens, samples

TABLES = ("text", "samples", "lens", "excerpt")
READS = {"corpus": "tokens.parquet"}


class Options(own.Options):
    """Section own.language of paper.yaml."""

    samples: samples.Options
    lens: lens.Options

    @property
    def seed(self) -> int:
        """Of what is drawn, for the certificate."""
        return self.samples.seed


def text(certificate: dict, d_vocab: int, n_train: int, n_eval: int) -> pd.DataFrame:
    """One row out of the certificate of tokens.parquet: where the text came from, its sha256, and
    how much of it there is; d_vocab is of the tokenizer made from it."""
    row = {"used": certificate["text"], "sha256": certificate["text_sha256"]}
    row |= {"published": bool(certificate["published"])}
    row |= {"d_vocab": d_vocab, "ln_vocab": math.log(d_vocab)}
    return pd.DataFrame([row | {"n_train": n_train, "n_eval": n_eval}])


def work(job: cli.Job, options: Options) -> own.Tables:
    """Rows of all tables, each arm in turn."""
    args, device, out = job.args, job.device(), own.Tables(TABLES)
    tokens = batches.read_corpus(args.corpus)
    for arm, file in own.by_arm(job, args.models).items():
        loaded = loader.load(file, device)
        made = {"samples": samples.of_model(loaded, tokens, options.samples)}
        held_out = torch.from_numpy(tokens["eval"])
        made["lens"], made["excerpt"] = lens.of_model(loaded, held_out, options.lens)
        out.add(made, arm=arm)
        cli.log.info("%s: samples and lens", arm)
    counts = {f"n_{s}": len(t) for s, t in tokens.items()}
    out.add({"text": text(provenance.read(args.corpus), loaded.info["d_vocab"], **counts)})
    return out
