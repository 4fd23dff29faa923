"""What the arms know of the language: text they write, and the logit lens. [torch]

1. Which text was read: nanoGPT's, or the packaged one that serves where that is missing.
2. Samples of every arm, beside held-out text (samples.py).
3. The logit lens of every arm, over held-out text and along one excerpt.
"""

import math
from typing import Any

import pandas as pd
import torch
from pydantic import Field
from torch import Tensor

from pipeline.errors import RetraceError
from pipeline.job import cli, own
from pipeline.models import lens, loader
from pipeline.spec.base import Section
from pipeline.store import provenance
from pipeline.text.tokens import Texts
from pipeline.weights import batches

from . import samples

TABLES = ("text", "samples", "lens", "excerpt")
READS = {"corpus": "tokens.parquet"}


class Lens(Section):
    """How much held-out text the logit lens is measured on, and which of it is shown."""

    n_tokens: int = Field(default=20_000, ge=1, description="held-out tokens measured, at most")
    n_shown: int = Field(default=40, ge=1, description="positions of the excerpt, at most")
    window: int = Field(default=0, ge=0, description="held-out window that the excerpt ends")


class Options(own.Options):
    """Section own.language of paper.yaml."""

    samples: samples.Options
    lens: Lens

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


def excerpt(hf: Any, tokens: Tensor, behind: int, decode: Any, shown: int) -> pd.DataFrame:
    """One row a layer and position: the likeliest character at the last positions of a window of
    tokens [pos], which the token `behind` follows; decode: token id -> its character."""
    found = lens.trajectory(
        hf, tokens, {"logit": lens.logit_lens(hf)}, decode,
        first=max(len(tokens) - shown, 0), n_top=1, behind=behind,
    )  # fmt: skip
    found = found.assign(**{c: found[c].str[0] for c in ("top", "p_top")})
    return found[["layer", "position", "token", "target", "top", "p_top", "p_target"]]


def through(loaded: Any, held_out: Tensor, options: Lens) -> dict[str, pd.DataFrame]:
    """The tables `lens` and `excerpt` of a loaded model: over held-out token ids [n]."""
    n_ctx = min(loaded.info["n_ctx"], len(held_out) - 1)
    held_out = held_out.long().to(loaded.hf.device)
    tokens, targets = batches.windows(held_out, n_ctx)
    if options.window >= len(tokens):
        raise RetraceError(
            f"own.language.lens.window: {options.window}, but the held-out text has {len(tokens)} "
            f"windows of {n_ctx} tokens; lower it"
        )
    n, at = max(1, options.n_tokens // n_ctx), options.window
    logit = {"logit": lens.logit_lens(loaded.hf)}
    over = lens.measure(loaded.hf, tokens[:n], targets[:n], logit).drop(columns="lens")
    decode, behind = Texts(loaded.tokenizer).alone, int(targets[at, -1])
    along = excerpt(loaded.hf, tokens[at], behind, decode, options.n_shown)
    return {"lens": over, "excerpt": along}


def work(job: cli.Job, options: Options) -> own.Tables:
    """Rows of all tables, each arm in turn."""
    args, device, out = job.args, job.device(), own.Tables(TABLES)
    tokens = batches.read_corpus(args.corpus)
    for arm, file in own.by_arm(job, args.models).items():
        loaded = loader.load(file, device)
        out.add({"samples": samples.of_model(loaded, tokens, options.samples)}, arm=arm)
        out.add(through(loaded, torch.from_numpy(tokens["eval"]), options.lens), arm=arm)
        cli.log.info("%s: samples and lens", arm)
    counts = {f"n_{s}": len(t) for s, t in tokens.items()}
    out.add({"text": text(provenance.read(args.corpus), loaded.info["d_vocab"], **counts)})
    return out
