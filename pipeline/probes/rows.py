"""The rows that a probe reads: activations, labels, documents and token ids, side by side. [torch]

1. `Bench` fixes which stored rows take part. A row is a token, or a document: the mean of its
   rows, or the last of them. Hooks that dropped other rows are brought to those that all have.
2. `held_out` draws, for a seed, what is judged on: whole documents, or rows (which leaks).
3. `Bench.acts` reads the rows of one hook, as float32; what is not finite is refused.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from pipeline.activations.rows import to_tensor
from pipeline.errors import RetraceError
from pipeline.store import reading
from pipeline.store.shards import Rows
from pipeline.text.labels import Corpus, Labels

BATCH = 16_384  # rows read at a time
SPLITS = ("train", "eval")


@dataclass(frozen=True)
class Bench:
    """Rows of one kind, for all hooks.

    Attributes:
        manifest: path of the activations' manifest.json.
        per: token, document or last.
        block, position: where the stored rows that are read lie, in their order.
        row: which row of the bench each of these belongs to; where a row is a token, 0, 1, 2 ….
        ids: token ids of the stored rows.
        document, token: document and token id of each row of the bench; a document's last token.
    """

    manifest: str
    per: str
    block: Int[np.ndarray, " stored"]
    position: Int[np.ndarray, " stored"]
    row: Int[np.ndarray, " stored"]
    ids: Int[np.ndarray, " stored"]
    document: Int[np.ndarray, " rows"]
    token: Int[np.ndarray, " rows"]

    def __len__(self) -> int:
        return len(self.document)

    def labels(self, found: Labels) -> Int[np.ndarray, " rows"] | Float[np.ndarray, " rows"]:
        """The label of each row: codes, -1 for none, or numbers, NaN for none."""
        values = found.values[self.block, self.position]
        out = np.full(len(self), -1 if found.classes else np.nan, values.dtype)
        out[self.row] = values  # all rows of a document have one label, or the last one's counts
        return out

    def acts(self, hook: str, device: torch.device) -> Float32[Tensor, "rows dims"]:
        """Activations of the rows.

        Raises:
            RetraceError: NaN or infinity among them.
        """
        out = None
        for at, raw in _matching(self.manifest, hook, self.block, self.position):
            x = raw.to(device, torch.float32)
            if not bool(torch.isfinite(x).all()):
                raise RetraceError(
                    f"{self.manifest}: activations of hook '{hook}' hold NaN or infinity, of which "
                    f"no probe can learn; store them as float32, or check the model's weights"
                )
            if out is None:
                out = torch.zeros(len(self), x.shape[1], device=device)
            out.index_add_(0, torch.from_numpy(self.row[at]).to(device), x)
        counts = torch.from_numpy(np.bincount(self.row, minlength=len(self))).to(device)
        return out / counts[:, None]


def _matching(
    manifest: str,
    hook: str,
    block: Int[np.ndarray, " stored"],
    position: Int[np.ndarray, " stored"],
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """(which of the wanted rows, their activations as stored), batch by batch."""
    wanted = key(block, position)
    order = np.argsort(wanted)
    ordered = wanted[order]
    for split in SPLITS:
        rows = Rows(manifest, hook, split)
        for raw, columns in rows.iterate(BATCH):
            found = key(columns["block"], columns["position"])
            place = np.searchsorted(ordered, found).clip(max=len(ordered) - 1)
            here = ordered[place] == found
            if here.any():
                yield order[place[here]], to_tensor(raw[here], rows.dtype)


def key(
    block: Int[np.ndarray, " stored"], position: Int[np.ndarray, " stored"]
) -> Int[np.ndarray, " stored"]:
    """One number for a place in a corpus, in its order."""
    return block.astype(np.int64) << 24 | position.astype(np.int64)


def stored_places(
    manifest: str, names: list[str], corpus: Corpus
) -> tuple[Int[np.ndarray, " stored"], Int[np.ndarray, " stored"]]:
    """(block, position) of the tokens that every hook has a row of, BOS left out.

    Raises:
        RetraceError: the activations are of another corpus.
    """
    common = None
    for hook in names:
        keys = []
        for split in SPLITS:
            for _, columns in Rows(manifest, hook, split, verify=False).iterate(BATCH):
                block, position = columns["block"], columns["position"]
                n, n_ctx = corpus.tokens.shape
                inside = (block < n) & (position < n_ctx)
                same = inside & (corpus.tokens[block % n, position % n_ctx] == columns["token"])
                if not same.all():
                    raise RetraceError(
                        f"{manifest}: holds activations of another corpus than the one that is "
                        f"labelled; delete its folder, then run snakemake again"
                    )
                keys.append(key(block, position)[columns["document"] >= 0])
        found = np.concatenate(keys)
        common = found if common is None else np.intersect1d(common, found, assume_unique=True)
    common = np.sort(common)
    return common >> 24, common & (1 << 24) - 1


def bench(
    manifest: str, per: str, names: list[str], corpus: Corpus, known: list[np.ndarray], n_rows: int
) -> Bench:
    """The rows of one kind.

    Args:
        known: for each label, which tokens of the corpus have one, bool [blocks n_ctx].
        n_rows: tokens that are taken, at most; drawn at random, and the same for all seeds, hooks
            and arms.
    """
    block, position = stored_places(manifest, names, corpus)
    any_label = np.logical_or.reduce([k[block, position] for k in known])
    block, position = block[any_label], position[any_label]
    if not len(block):
        raise RetraceError(f"{manifest}: no stored row has a label; store more rows, or correct it")
    if per == "token" and len(block) > n_rows:
        chosen = np.sort(np.random.default_rng(0).permutation(len(block))[:n_rows])
        block, position = block[chosen], position[chosen]
    owner = corpus.document[block, position]
    token = corpus.tokens[block, position]
    if per == "token":
        return Bench(manifest, per, block, position, np.arange(len(block)), token, owner, token)
    _, last = np.unique(owner[::-1], return_index=True)
    last = np.sort(len(owner) - 1 - last)
    number = {int(owner[i]): j for j, i in enumerate(last)}
    if per == "last":
        block, position, kept = block[last], position[last], owner[last]
    else:
        kept = owner
    row = np.array([number[int(d)] for d in kept], np.int64)
    ids = corpus.tokens[block, position]
    return Bench(manifest, per, block, position, row, ids, owner[last], token[last])


def held_out(bench: Bench, split: str, share: float, seed: int) -> np.ndarray:
    """Which rows are judged on, bool [n].

    Args:
        split: document: all rows of documents that are drawn; token: rows, drawn one by one.
        share: which share of the documents or rows is held out.
    """
    if split == "document":
        return reading.held_out(bench.document, share, seed)
    n = min(max(1, round(share * len(bench))), len(bench) - 1)
    drawn = np.random.default_rng([seed, 0]).permutation(len(bench))[:n]
    return np.isin(np.arange(len(bench)), drawn)
