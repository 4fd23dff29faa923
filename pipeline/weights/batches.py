"""Where the sequences of a training run come from: a paper's own function, or a corpus. [torch]

A batch is a function of (seed, step) alone, so that a killed run goes on as if undisturbed.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from pipeline.errors import RetraceError, nearest
from pipeline.job.source import functions, import_file
from pipeline.spec.training import TrainingSpec
from pipeline.store import tables

IGNORED = -100  # a target that no loss is taken of, as in torch's cross_entropy
DRAWN_STEPS = 512  # steps whose windows are drawn at once
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Batches:
    """The data of one member.

    Attributes:
        d_vocab: tokens of the vocabulary.
        batch: step -> (tokens, targets), int64 [batch pos] each; targets[:, t] is what should be
            predicted at position t, IGNORED where nothing is.
        evaluation: name of a set -> (tokens, targets), all of it, the same at every evaluation.
        constant: every step has the same batch.
    """

    d_vocab: int
    batch: Callable[[int], Pair]
    evaluation: dict[str, Pair] = field(default_factory=dict)
    constant: bool = False


def own(file: Path, spec: TrainingSpec, seed: int, device: torch.device) -> Batches:
    """The data that a function of a paper's data.py gives for one seed.

    Raises:
        RetraceError: there is no such function, or it returns something else.
    """
    name = spec.data.function
    if name not in (known := functions(file)):
        raise RetraceError(f"{file}: no function '{name}'{nearest(name, known)}")
    make = getattr(import_file(file), name)
    found = make(spec.data.options, seed, spec.batch_size, spec.architecture.n_ctx, device)
    if not isinstance(found, Batches):
        raise RetraceError(
            f"{file}: {name} returned {type(found).__name__}; return Batches of "
            f"pipeline.weights.batches"
        )
    for what, (tokens, targets) in {"batch": found.batch(0), **found.evaluation}.items():
        if tokens.shape != targets.shape or tokens.dim() != 2:
            raise RetraceError(
                f"{file}: {name}: {what} has tokens {list(tokens.shape)} and targets "
                f"{list(targets.shape)}; both must be [sequences, positions]"
            )
        if int(tokens.min()) < 0 or int(tokens.max()) >= found.d_vocab:
            raise RetraceError(
                f"{file}: {name}: {what} holds token {int(tokens.max())}, d_vocab is "
                f"{found.d_vocab}"
            )
    return found


def of_corpus(
    tokens: dict[str, np.ndarray], d_vocab: int, spec: TrainingSpec, seed: int, device: torch.device
) -> Batches:
    """Random windows of the training tokens, and the held-out ones in consecutive windows.

    Args:
        tokens: split -> token ids [n] in the order of the text.
    """
    n_ctx = spec.architecture.n_ctx
    for split, ids in tokens.items():
        if len(ids) <= n_ctx:
            raise RetraceError(
                f"corpus: {len(ids)} {split} tokens are not even one window of n_ctx {n_ctx} and "
                f"the token behind it; give more text or lower n_ctx"
            )
    train = torch.from_numpy(tokens["train"].astype(np.int64)).to(device)
    reach, drawn = torch.arange(n_ctx + 1, device=device), {}

    def batch(step: int) -> Pair:
        chunk = step // DRAWN_STEPS
        if chunk not in drawn:
            generator = torch.Generator().manual_seed(seeded(seed, chunk))
            size = (DRAWN_STEPS, spec.batch_size)
            starts = torch.randint(len(train) - n_ctx, size, generator=generator)
            drawn.clear()
            drawn[chunk] = starts.to(device)
        window = train[drawn[chunk][step % DRAWN_STEPS][:, None] + reach]
        return window[:, :-1], window[:, 1:]

    held_out = {"train": train[: len(tokens["eval"])]}
    for name, split in {"val": "eval", "other": "other"}.items():
        if split in tokens:
            held_out[name] = torch.from_numpy(tokens[split].astype(np.int64)).to(device)
    evaluation = {name: windows(ids, n_ctx) for name, ids in held_out.items()}
    return Batches(d_vocab, batch, evaluation)


def seeded(*identity: int) -> int:
    """A seed for a generator out of several numbers; torch's on the CPU reads 32 bits of it."""
    return int.from_bytes(hashlib.sha256(repr(identity).encode()).digest()[:4], "big")


def windows(
    ids: Int[Tensor, " tokens"], n_ctx: int
) -> tuple[Int[Tensor, "windows n_ctx"], Int[Tensor, "windows n_ctx"]]:
    """Consecutive windows of a text, and for each token the one behind it."""
    n = (len(ids) - 1) // n_ctx
    return ids[: n * n_ctx].view(n, n_ctx), ids[1 : n * n_ctx + 1].view(n, n_ctx)


def read_labelled(
    path: str | Path, documents: str | Path, labels: list[str]
) -> dict[str, np.ndarray]:
    """Token ids of the documents with some labels, in the order of blocks, without BOS.

    Args:
        documents: documents.parquet.
        labels: '' is the label of documents that have none.

    Returns:
        train and eval of these documents; `other`, the held-out ones of all others, where there
        are some.

    Raises:
        RetraceError: no document has one of the labels.
    """
    about = tables.read_table(documents, ["document", "label"])
    known = set(about["label"])
    for label in labels:
        if label not in known:
            raise RetraceError(
                f"{documents}: no document has the label '{label}'{nearest(label, known)}; name "
                f"one under corpus.label_field or corpus.books"
            )
    wanted = about.loc[about["label"].isin(labels), "document"].to_numpy()
    table = tables.read_arrow(path, ["split", "tokens", "documents"])
    ids, owners = (table[c].combine_chunks().flatten().to_numpy() for c in ("tokens", "documents"))
    splits = np.asarray(table["split"].to_pylist()).repeat(len(ids) // max(len(table), 1))
    mine, held_out = np.isin(owners, wanted), splits == "eval"
    out = {"train": ids[mine & ~held_out], "eval": ids[mine & held_out]}
    other = ids[~mine & held_out & (owners >= 0)]
    return out | ({"other": other} if len(other) else {})


def read_corpus(path: str | Path) -> dict[str, np.ndarray]:
    """Token ids of each split of a tokens.parquet, blocks joined in order: split -> [n].

    Raises:
        RetraceError: no held-out tokens.
    """
    table = tables.read_arrow(path, ["split", "tokens"])
    splits = np.asarray(table["split"].to_pylist())
    values = table["tokens"].combine_chunks()
    flat = values.flatten().to_numpy()
    per_block = len(flat) // max(len(splits), 1)
    out = {s: flat.reshape(-1, per_block)[splits == s].ravel() for s in ("train", "eval")}
    if not len(out["eval"]):
        raise RetraceError(f"{path}: holds no held-out tokens; raise corpus.n_eval_tokens")
    return out
