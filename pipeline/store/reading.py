"""What a stage of a paper's own reads of stored activations: rows, their labels, and a split.

    acts, tokens = reading.activations(manifest, "blocks.8.hook_resid_post")
    topics = reading.labels(documents, tokens)
    test = reading.held_out(tokens["document"], share=0.3, seed=0)

Row i of `acts` is the token of row i of `tokens`, the label `topics[i]`, and is judged on where
`test[i]`. The files are handed to the stage by `needs: [activations, labels]` of own.<stage>, one
for every arm (`job.own.by_arm`). rules/papers/TUTORIAL_PROBES.md goes through a whole paper that
uses them. No torch is needed.
"""

from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from pipeline.errors import RetraceError, nearest
from pipeline.store import tables
from pipeline.store.shards import COLUMNS, Rows

BATCH = 16_384  # rows read at a time
SPLITS = ("train", "eval")


def activations(
    manifest: str | Path, hook: str, n_rows: int | None = None
) -> tuple[np.ndarray, pd.DataFrame]:
    """Stored activations of a hook, and the tokens that they belong to.

    Args:
        manifest: manifest.json of the activations.
        hook: one that is stored.
        n_rows: at most so many; the same places for hooks that store the same tokens. Default: all.

    Returns:
        acts: float32 [n d_model], in the order of the corpus, BOS left out.
        tokens: a row each: document, block, position, token (its id), and split, train or eval: the
            corpus's own, whose documents differ.

    Raises:
        RetraceError: no such hook, a shard that was altered, or NaN or infinity.
    """
    readers = [Rows(manifest, hook, split) for split in SPLITS]
    about = [_about(rows) for rows in readers]
    kept = np.flatnonzero(np.concatenate([frame["document"] for frame in about]) >= 0)
    if n_rows is not None and n_rows < len(kept):
        kept = np.sort(np.random.default_rng(0).choice(kept, n_rows, replace=False))
    parts, start = [], 0
    for rows in readers:
        here = kept[(kept >= start) & (kept < start + len(rows))] - start
        parts += list(_chosen(rows, here))
        start += len(rows)
    acts = np.concatenate(parts) if parts else np.empty((0, readers[0].d_model), np.float32)
    if not np.isfinite(acts).all():
        raise RetraceError(
            f"{manifest}: activations of hook '{hook}' hold NaN or infinity; store them as "
            f"float32, or check the model's weights"
        )
    return acts, pd.concat(about, ignore_index=True).iloc[kept].reset_index(drop=True)


def _about(rows: Rows) -> pd.DataFrame:
    """The columns of a split's rows."""
    parts = [pd.DataFrame(columns) for _, columns in rows.iterate(BATCH)]
    frame = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=list(COLUMNS))
    return frame.astype(dict.fromkeys(COLUMNS, np.int64)).assign(split=rows.split)


def _chosen(rows: Rows, which: np.ndarray):
    """Some rows as float32, batch by batch."""
    for start in range(0, len(rows), BATCH):
        here = which[(which >= start) & (which < start + BATCH)] - start
        if len(here):
            raw, _ = rows.read(start, start + BATCH)
            yield as_float32(raw[here], rows.dtype)


def as_float32(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Numbers of stored rows; those of bfloat16 are stored as their 16 bits."""
    if dtype == "bfloat16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32)


def labels(
    documents: str | Path, tokens: pd.DataFrame, column: Literal["label", "title"] = "label"
) -> np.ndarray:
    """The label of the document that each token stands in.

    Args:
        documents: documents.parquet of the corpus.
        tokens: of `activations`, or any frame with a column document.
        column: label (corpus.label_field) or title (corpus.title_field).

    Returns:
        Text, [n]; empty where the document has none.

    Raises:
        RetraceError: no such column, no document has a label, or the documents are of another
            corpus.
    """
    frame = tables.read_table(documents)
    if column not in frame:
        raise RetraceError(f"{documents}: no column '{column}'{nearest(column, frame.columns)}")
    named = frame.set_index("document")[column].fillna("").astype(str)
    missing = ~tokens["document"].isin(named.index)
    if missing.any():
        raise RetraceError(
            f"{documents}: has no document {tokens['document'][missing].iloc[0]}, so it is of "
            f"another corpus than the activations; hand over the one of the same arm"
        )
    out = named.loc[tokens["document"]].to_numpy(object)
    if len(out) and not (out != "").any():
        raise RetraceError(
            f"{documents}: no document has a {column}; set corpus.{column}_field to a field of "
            f"the text"
        )
    return out


def held_out(documents: np.ndarray | pd.Series, share: float = 0.3, seed: int = 0) -> np.ndarray:
    """Which rows are judged on: all rows of some documents, so that no document is on both sides.

    Rows drawn one by one would leak: neighbours in one text say the same.

    Args:
        documents: the document of each row, [n].
        share: which share of the documents is held out; at least one is, and one is not.
        seed: draws the documents that are held out.

    Returns:
        bool [n].

    Raises:
        RetraceError: fewer than two documents.
    """
    every = np.unique(documents)
    if len(every) < 2:
        raise RetraceError(
            f"only {len(every)} document has rows with a label, so none can be held out; store "
            f"more text"
        )
    n = min(max(1, round(share * len(every))), len(every) - 1)
    drawn = np.random.default_rng([seed, 1]).permutation(every)[:n]
    return np.isin(documents, drawn)
