"""A training run, and what its models are measured on; the options of stage heads. [torch]"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pipeline.circuits import head_circuits
from pipeline.errors import RetraceError
from pipeline.job import own
from pipeline.spec.base import Section
from pipeline.store import tables
from pipeline.weights import batches, trained

from . import attention, data

Interval = tuple[int, int]


class Icl(Section):
    """Which tokens the in-context learning score compares; BOS is token 0. Both ends count."""

    early: Interval = Field(description="Olsson et al. take token 50 of 512")
    late: Interval = Field(description="… and token 500")

    def score(self, by_index: np.ndarray) -> float:
        """Loss at early minus loss at late tokens, nats; by_index[i] is of token i + 1."""
        early, late = (by_index[a - 1 : b].mean() for a, b in (self.early, self.late))
        return float(early - late)


class Repeat(Section):
    """Sequences for prefix matching: a segment of distinct random tokens, several times over."""

    length: int = Field(ge=2, description="Olsson et al.: 25")
    times: int = Field(ge=2, description="Olsson et al.: 4")
    n: int = Field(default=32, ge=1, description="sequences; Olsson et al.: 10")


class Options(own.Options):
    """Section own.heads of paper.yaml."""

    icl: Icl = Field(description="of runs that learn from repeated sequences")
    text_icl: Icl | None = Field(default=None, description="of runs that learn from text")
    repeat: Repeat


class Held:
    """A run, its members' models at a step, and what they are measured on.

    Attributes:
        name: of the run in paper.yaml.
        tokens, targets: held-out sequences, [batch pos].
        copies: name -> [batch pos], where the targets of the first and second copy stand.
        repeated: sequences of `head_circuits.repeated`.
        budget: corpus_tokens, how many different tokens a member is trained on (NaN where each
            batch is drawn anew), and document_length, the mean tokens of a document.
    """

    def __init__(self, manifest: str, corpus: list[str], options: Options, device: Any) -> None:
        self.device, self.options, self.run = device, options, trained.open_run(manifest)
        self.name = self.run.name
        need_attention_only(self.name, self.run.spec.architecture)
        n_ctx, how = self.run.spec.architecture.n_ctx, options.repeat
        drawn = self.run.spec.data.source == "own"
        pool = self._drawn(n_ctx) if drawn else self._text(corpus, n_ctx)
        if (last := max(self.icl.late)) > n_ctx:
            raise RetraceError(f"own.heads: token {last} of icl is behind n_ctx {n_ctx}")
        bos = int(self.tokens[0, 0])
        self.repeated = head_circuits.repeated(how.n, pool, how.length, how.times, bos)
        if self.repeated.shape[1] > n_ctx:
            size = f"{how.times} × {how.length}"
            raise RetraceError(f"own.heads: repeat: {size} tokens exceed {n_ctx}")

    def _drawn(self, n_ctx: int) -> Tensor:
        """What a run of drawn sequences is measured on; the tokens to repeat."""
        found = data.held_out(self.run.spec.data.options, n_ctx)
        self.tokens, self.targets, self.icl = found.tokens, found.targets, self.options.icl
        self.copies = {"first_copy": found.first, "second_copy": found.second}
        self.n_tokens = self.run.info["d_vocab"] - 1  # without BOS
        self.budget = {"corpus_tokens": np.nan, "document_length": float(n_ctx + 1)}
        return torch.arange(self.n_tokens)

    def _text(self, corpus: list[str], n_ctx: int) -> Tensor:
        """What a run of text is measured on; the tokens to repeat."""
        if self.options.text_icl is None or not corpus:
            raise RetraceError(f"own.heads: run '{self.name}' learns from text; add text_icl")
        ids = torch.from_numpy(batches.read_corpus(corpus[0])["eval"].astype(np.int64))
        self.tokens, self.targets = batches.windows(ids, n_ctx)
        self.icl, self.copies, self.n_tokens = self.options.text_icl, {}, self.run.info["d_vocab"]
        self.budget = corpus_budget(corpus[0])
        return attention.common(self.tokens)

    def models(self, step: int) -> Iterator[tuple[dict[str, Any], Any, dict[str, np.ndarray]]]:
        """(columns that name it, the model, its weights) of every member after `step` updates."""
        per_step = self.run.spec.batch_size * self.run.spec.architecture.n_ctx
        for member in self.run.members:
            model = self.run.model(member, step)
            state = {name: p.numpy() for name, p in model.state_dict().items()}
            columns = {"run": self.name, "member": member, "seed": self.run.seed(member)}
            columns |= {"step": step, "tokens": step * per_step}
            yield columns, model.to(self.device), state

    def summary(self, losses: np.ndarray) -> dict[str, float]:
        """Mean loss, loss on either copy and in-context learning score of losses [batch pos]."""
        out = {"loss": float(losses.mean()), "icl": self.icl.score(losses.mean(0))}
        for name in ("first_copy", "second_copy"):
            there = self.copies.get(name)
            out[name] = float(losses[there.numpy()].mean()) if there is not None else np.nan
        return out

    def patterns(self, model: Any) -> list[Any]:
        """Attention of every layer on the repeated sequences, [batch n_heads pos pos]."""
        return attention.forward(model, self.repeated.to(self.device))[1]


def corpus_budget(path: str) -> dict[str, float]:
    """corpus_tokens and document_length of the training blocks of a tokens.parquet."""
    table = tables.read_table(path, ["split", "documents"])
    documents = np.concatenate(table["documents"][table["split"] == "train"].to_list())
    owned = documents[documents >= 0]  # a BOS is nobody's
    return {
        "corpus_tokens": float(len(documents)),
        "document_length": len(owned) / len(np.unique(owned)),
    }


def need_attention_only(name: str, architecture: Any) -> None:
    """RetraceError for a run whose models `attention.forward` does not compute."""
    if architecture.family != "native" or architecture.d_mlp:
        raise RetraceError(
            f"training.{name}: stage heads reads attention-only models; use family native, d_mlp 0"
        )
