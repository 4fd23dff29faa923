"""What models say to a prompt, where their heads look, and what a Markov chain does. [torch]

1. continuations  each model's text after each prompt, at each temperature; the chain's beside it
2. attention      each head's attention from each token of a text to those before it
3. measures       losses on held-out text, shares of real words of the chain, and what attention
                  the mask lets through
"""

import re
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from pipeline.errors import RetraceError, need_among
from pipeline.job import cli, own
from pipeline.models import loader
from pipeline.models.heads import Heads
from pipeline.spec.base import Name, Section
from pipeline.text.tokens import Texts, encode
from pipeline.weights import batches

from . import markov

TABLES = ("continuations", "attention", "measures")
WORD = re.compile(r"[^\W\d_]{3,}")
BATCH = 64  # blocks at a time
SHUFFLED = 3  # order of the null arm: of a shuffled text nearly every longer context is new


class Markov(Section):
    """The chain."""

    model: Name = Field(description="the model whose text it has read, and whose prompts it has")
    orders: list[int] = Field(min_length=1, description="tokens remembered")
    n_known: int = Field(default=6000, ge=1, description="tokens written to count words in")
    n_loss: int = Field(default=20_000, ge=1, description="held-out tokens of the losses, at most")


class Options(own.Options):
    """Section own.shown of paper.yaml."""

    models: dict[Name, dict[str, str]] = Field(description="as own.<stage>.models everywhere")
    prompts: dict[Name, list[str]] = Field(description="model -> what it is given to go on with")
    texts: dict[Name, list[str]] = Field(description="model -> texts whose attention is shown")
    n_tokens: dict[Name, int] = Field(description="model -> tokens written")
    temperatures: list[float] = Field(min_length=1, description="0: always the likeliest token")
    markov: Markov
    seed: int = Field(default=0, ge=0)

    def check(self) -> None:
        """RetraceError where an option names a model that there is not."""
        for key in ("prompts", "texts", "n_tokens"):
            named = f"own.shown.{key}: no model"
            need_among(getattr(self, key), self.models, named, "own.shown.models has")
        for name in sorted(self.prompts.keys() - self.n_tokens.keys()):
            raise RetraceError(f"own.shown.n_tokens: says nothing of '{name}', which has prompts")


# --- models --------------------------------------------------------------------------------


def ids_of(loaded: Any, text: str) -> list[int]:
    """A text's tokens, behind BOS where the model has one."""
    start = [] if loaded.bos_id is None else [loaded.bos_id]
    return start + encode(loaded.tokenizer, text)


def likely(logits: Tensor, temperatures: list[float]) -> Tensor:
    """Probabilities [batch d_vocab] of logits, each row at its temperature; at 0 all on one."""
    hot = F.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    given = torch.tensor(temperatures, dtype=torch.float64)[:, None]
    soft = (logits.double() / given.clamp(min=1e-9)).softmax(-1)
    return torch.where(given > 0, soft, hot)


@torch.no_grad()
def continued(loaded: Any, prompt: str, n: int, temperatures: list[float], seed: int) -> list[str]:
    """A continuation of n tokens at each temperature; draws are made on the CPU."""
    start, generator = ids_of(loaded, prompt), torch.Generator().manual_seed(seed)
    tokens = torch.tensor([start] * len(temperatures), device=loaded.hf.device)
    n_ctx = loaded.info["n_ctx"]
    for _ in range(n):
        logits = loaded.hf(tokens[:, -n_ctx:]).logits[:, -1].cpu()
        new = torch.multinomial(likely(logits, temperatures), 1, generator=generator)
        tokens = torch.cat([tokens, new.to(tokens.device)], 1)
    return [loaded.tokenizer.decode(row) for row in tokens[:, len(start) :].tolist()]


@torch.no_grad()
def attention(loaded: Any, text: str) -> tuple[list[dict], float]:
    """A row a head, query and key that is not behind it; and the most that goes behind."""
    ids = ids_of(loaded, text)
    shown = Texts(loaded.tokenizer).context(ids, [])
    patterns = Heads(loaded.hf).patterns(torch.tensor([ids], device=loaded.hf.device))
    rows, future = [], 0.0
    for layer, pattern in enumerate(patterns):
        for head, weights in enumerate(pattern[0].float().cpu().numpy()):
            future = max(future, float(np.triu(weights, 1).max()))
            rows += [
                {"layer": layer, "head": head, "query": q, "key": k, "query_token": shown[q],
                 "key_token": shown[k], "weight": float(weights[q, k])}
                for q in range(len(ids)) for k in range(q + 1)
            ]  # fmt: skip
    return rows, future


@torch.no_grad()
def loss(loaded: Any, blocks: np.ndarray) -> float:
    """Mean cross entropy over all tokens of blocks [n pos] but the first of each, nats a token."""
    total = 0.0
    for part in torch.from_numpy(blocks).long().split(BATCH):
        part = part.to(loaded.hf.device)
        logits = loaded.hf(part).logits[:, :-1].double()
        total += float(F.cross_entropy(logits.mT, part[:, 1:], reduction="sum"))
    return total / (len(blocks) * (blocks.shape[1] - 1))


# --- the chain -----------------------------------------------------------------------------


def known_share(text: str, vocabulary: set[str]) -> float:
    """Share of a text's words of three letters or more that stand in the vocabulary."""
    found = [w.lower() for w in WORD.findall(text)]
    return float(np.mean([w in vocabulary for w in found])) if found else 0.0


def chains(loaded: Any, text: dict[str, np.ndarray], options: Options) -> dict[str, list[dict]]:
    """What the chains of one text write and measure, for the tables.

    Args:
        loaded: the model that has read the same text.
        text: token ids of train and eval, [n] each.
    """
    what, seed = options.markov, options.seed
    most, d_vocab = max(what.orders), loaded.info["d_vocab"]
    chain = markov.Chain(text["train"], most, d_vocab)
    mixed = np.random.default_rng(seed).permutation(text["train"])
    shuffled = markov.Chain(mixed, min(most, SHUFFLED), d_vocab)
    decode = loaded.tokenizer.decode
    vocabulary = {w.lower() for w in WORD.findall(decode(text["train"].tolist()))}
    blocks = blocks_of(text["eval"], loaded.info["n_ctx"], what.n_loss)
    measures, said = [], []
    for order in what.orders:
        measures.append(
            {"kind": "loss", "writer": "markov", "order": order, "loss": chain.loss(blocks, order)}
        )
        for name, source in (("markov", chain), ("shuffled", shuffled)):
            if order > source.order:
                continue
            ids = markov.written(source, [], what.n_known, order, 1.0, seed)
            share = known_share(decode(ids), vocabulary)
            measures.append({"kind": "known", "writer": name, "order": order, "known": share})
        for prompt in options.prompts[what.model]:
            start, n = encode(loaded.tokenizer, prompt), options.n_tokens[what.model]
            for temperature in options.temperatures:
                ids = markov.written(chain, start, n, order, temperature, seed)
                said.append({"writer": f"markov_{order}", "prompt": prompt,
                             "temperature": temperature, "text": decode(ids)})  # fmt: skip
    return {"measures": measures, "continuations": said}


def blocks_of(tokens: np.ndarray, n_ctx: int, most: int) -> np.ndarray:
    """The first `most` tokens as blocks [n n_ctx]; at least one."""
    n = max(1, min(len(tokens), most) // n_ctx)
    return tokens[: n * n_ctx].reshape(n, n_ctx)


# --- the stage -----------------------------------------------------------------------------


def work(job: cli.Job, options: Options) -> own.Tables:
    """Rows of all tables, model by model."""
    options.check()
    args, out = job.args, own.Tables(TABLES)
    like = options.markov.model  # models of its text have a loss beside the chain's
    pairs = zip(args.models, args.corpora, strict=True)
    files = dict(zip(sorted(options.models), pairs, strict=True))
    for name, (file, corpus) in files.items():
        loaded = loader.load(file, job.device())
        for prompt in options.prompts.get(name, []):
            said = continued(
                loaded, prompt, options.n_tokens[name], options.temperatures, options.seed
            )
            out.add({"continuations": [
                {"writer": name, "prompt": prompt, "temperature": t, "text": text}
                for t, text in zip(options.temperatures, said, strict=True)
            ]})  # fmt: skip
        for i, text in enumerate(options.texts.get(name, [])):
            rows, future = attention(loaded, text)
            out.add({"attention": rows}, first={"model": name, "text": i})
            out.add({"measures": [{"kind": "future", "writer": name, "future": future}]})
        if corpus == files[like][1]:
            text = batches.read_corpus(corpus)
            blocks = blocks_of(text["eval"], loaded.info["n_ctx"], options.markov.n_loss)
            value = loss(loaded, blocks)
            out.add({"measures": [
                {"kind": "loss", "writer": name, "order": order, "loss": value}
                for order in options.markov.orders
            ]})  # fmt: skip
        if name == like:
            out.add(chains(loaded, text, options))
        cli.log.info("%s: texts and attention", name)
    return out
