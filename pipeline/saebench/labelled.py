"""Rows of the activations store -> a mean per document with a label, of rows and latents. [torch]

SAEBench's sparse probing (Karvonen et al. 2025, 2503.09532, Section 3.4) gives a probe one vector a
text: the mean over its first tokens, BOS left out. Here texts are the documents of the corpus, and
the rows are those that stage `activations` has stored, so that no model runs.

1. `chosen` takes the labels with most documents, and as many documents of each.
2. `means` passes the rows once, and adds them and their latents up by document.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.activations.rows import to_tensor
from pipeline.errors import RetraceError
from pipeline.store import shards

BATCH = 4096  # rows
RAW = ""  # name of the stream itself among the dictionaries


class Chosen(NamedTuple):
    """Documents of some labels.

    Attributes:
        labels: their names.
        slot: of each document of the corpus its place among those that are taken, -1 elsewhere.
        of_label: label -> places of its documents.
    """

    labels: list[str]
    slot: np.ndarray
    of_label: dict[str, np.ndarray]


def stored(manifest: Any, hook: str, split: str) -> np.ndarray:
    """The documents that have rows, ascending; BOS, which has none, left out."""
    rows = shards.Rows(manifest, hook, split)
    found = [np.unique(columns["document"]) for _, columns in rows.iterate(BATCH)]
    every = np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)
    return every[every >= 0]


def by_label(documents: Any, there: np.ndarray) -> dict[str, np.ndarray]:
    """Label -> those of some documents that have it, ascending; without a label left out."""
    once = documents.drop_duplicates("document").set_index("document")["label"]
    labels = once.reindex(there).fillna("").astype(str).to_numpy()
    return {name: there[labels == name] for name in np.unique(labels) if name}


def chosen(
    train: dict[str, np.ndarray], test: dict[str, np.ndarray], n_labels: int, most: tuple[int, int],
    least: int, where: str,
) -> tuple[Chosen, Chosen]:  # fmt: skip
    """The labels with most documents, and of each the first documents, as many as of any other.

    Args:
        train, test: see `by_label`.
        most: documents of a label at most, for training and for the test.
        least: a label with fewer, in either, is left out.
        where: the file that a fault names.

    Raises:
        RetraceError: fewer than two labels are left.
    """
    size = {name: min(len(train[name]), len(test[name])) for name in train.keys() & test.keys()}
    left = sorted((n for n in size if size[n] >= least), key=lambda n: (-len(train[n]), n))
    labels = sorted(left[:n_labels])
    if len(labels) < 2:
        raise RetraceError(
            f"{where}: {len(labels)} labels have {least} documents or more in both splits, and a "
            f"probe needs two; set corpus.label_field, raise corpus.n_tokens and n_eval_tokens, or "
            f"lower benchmarks.min_documents"
        )
    return tuple(
        _slots(labels, split, min(limit, *(len(split[name]) for name in labels)))
        for split, limit in zip((train, test), most, strict=True)
    )


def _slots(labels: list[str], split: dict[str, np.ndarray], n: int) -> Chosen:
    taken = [split[name][:n] for name in labels]
    slot = np.full(max(int(t.max()) for t in taken) + 1, -1, np.int64)
    slot[np.concatenate(taken)] = np.arange(n * len(labels))
    places = np.arange(n * len(labels)).reshape(len(labels), n)
    return Chosen(labels, slot, dict(zip(labels, places, strict=True)))


@torch.no_grad()
def means(
    saes: dict[str, Any], manifest: Any, hook: str, split: str, picked: Chosen, n_tokens: int,
    device: torch.device,
) -> dict[str, Float[Tensor, "documents width"]]:  # fmt: skip
    """Mean of the rows of each document, and of the latents of each dictionary on them.

    Args:
        saes: name -> dictionary with `encode`.
        n_tokens: first stored tokens of a document that count.

    Returns:
        name -> means, float32; those of the stream under RAW.
    """
    rows = shards.Rows(manifest, hook, split)
    n = sum(map(len, picked.of_label.values()))
    seen, out = np.zeros(n, np.int64), {}
    for raw, columns in rows.iterate(BATCH):
        place = _places(columns["document"], picked.slot)
        place[_rank(place, seen) >= n_tokens] = -1
        keep = np.flatnonzero(place >= 0)
        if not len(keep):
            continue
        at = torch.from_numpy(place[keep]).to(device)
        x = to_tensor(raw[keep], rows.dtype, device).float()
        for name, values in {RAW: x, **{n: s.encode(x) for n, s in saes.items()}}.items():
            total = out.setdefault(name, torch.zeros(n, values.shape[1], device=device))
            total.index_add_(0, at, values.float())
    counts = torch.from_numpy(np.clip(seen, 1, n_tokens)).to(device)
    return {name: total / counts[:, None] for name, total in out.items()}


def _places(documents: np.ndarray, slot: np.ndarray) -> np.ndarray:
    """The place of each row's document, -1 where it is none of those that are taken."""
    inside = (documents >= 0) & (documents < len(slot))
    return np.where(inside, slot[np.where(inside, documents, 0)], -1)


def _rank(place: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """How many rows of its document stand before each row; `seen` counts on between batches."""
    out = np.zeros(len(place), np.int64)
    order = np.argsort(place, kind="stable")
    found, first, count = np.unique(place[order], return_index=True, return_counts=True)
    out[order] = np.arange(len(place)) - np.repeat(first, count)
    there = found >= 0
    out += np.where(place >= 0, seen[np.maximum(place, 0)], 0)
    seen[found[there]] += count[there]
    return out
