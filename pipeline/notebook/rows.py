"""Stored activations as one array of rows that lies on the disk.

    rows = run.activations["trained"]["blocks.12.hook_resid_post"]
    rows.shape                    (n, d_model)
    rows[:1000]                   float32 [1000, d_model]
    rows[rows.tokens["token"] == 42]
    rows.labels()                 the label of each row's document, where the corpus has one

1. A row is a token of the corpus, as in `reading.activations`: first those of the split train, then
   those of eval, in the order of the corpus, BOS left out.
2. The shards are memory-mapped. A read touches those that hold a row of it, and compares each once
   with the digest of its manifest.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.store import reading
from pipeline.store.shards import COLUMNS, Rows


class Activations:
    """The rows of one hook.

    Args:
        manifest: manifest.json of the activations.
        hook: one that is stored.
        documents: documents.parquet of the corpus, for `labels`.

    Raises:
        RetraceError: no such hook; later, a shard that was altered.
    """

    def __init__(self, manifest: Path, hook: str, documents: Path) -> None:
        self.hook, self._documents = hook, documents
        self._readers = [Rows(manifest, hook, split) for split in reading.SPLITS]
        self.d_model = self._readers[0].d_model

    @cached_property
    def _every(self) -> pd.DataFrame:
        """The columns of all stored rows, BOS among them."""
        parts = [
            pd.DataFrame(columns).assign(split=rows.split)
            for rows in self._readers
            for _, columns in rows.iterate(reading.BATCH)
        ]
        frame = pd.concat(parts, ignore_index=True)
        return frame.astype(dict.fromkeys(COLUMNS, np.int64))

    @cached_property
    def _places(self) -> np.ndarray:
        """Where each row stands among all that are stored."""
        return np.flatnonzero(self._every["document"] >= 0)

    @property
    def tokens(self) -> pd.DataFrame:
        """A row each: document, block, position, token (its id), split (train or eval)."""
        return self._every.iloc[self._places].reset_index(drop=True)

    def labels(self, column: str = "label") -> np.ndarray:
        """The label, or the `title`, of the document that each row's token stands in.

        Raises:
            RetraceError: the corpus has none.
        """
        return reading.labels(self._documents, self.tokens, column)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self._places), self.d_model

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, which: Any) -> np.ndarray:
        """Rows as float32 [n, d_model]; of a single number [d_model].

        Args:
            which: a number, a slice, numbers, or a mask, as of an array.
        """
        places = np.atleast_1d(self._places[_index(which)])
        out = np.empty((len(places), self.d_model), np.float32)
        first = 0
        for rows in self._readers:
            for start in range(0, len(rows), reading.BATCH):
                at = places - first - start
                here = (at >= 0) & (at < min(reading.BATCH, len(rows) - start))
                if here.any():
                    raw, _ = rows.read(start, start + reading.BATCH)
                    out[here] = reading.as_float32(raw[at[here]], rows.dtype)
            first += len(rows)
        return out[0] if isinstance(which, int | np.integer) else out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:] if dtype is None else self[:].astype(dtype)

    def __repr__(self) -> str:
        return f"{self.hook}: {len(self):,} rows of {self.d_model}"


def _index(which: Any) -> Any:
    """An index as NumPy takes it; of an empty list it would make numbers with a fraction."""
    if isinstance(which, slice | int | np.integer):
        return which
    found = np.asarray(which)
    return found if found.size else found.astype(int)
