"""Documents and tokens on disk while a corpus is made, so that memory does not grow with it.

Both kinds lie in files that have no name: they go when the process ends, however it ends. They are
made in the folder of the result, since /tmp may be memory. What stays in memory is 8 bytes for the
place of each document.
"""

import os
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import IO, Any

import numpy as np

BUFFER = 1 << 20  # bytes


def _nameless(scratch: Path | None) -> IO[bytes]:
    return tempfile.TemporaryFile(dir=scratch, buffering=BUFFER)


class Spool(Sequence):
    """Values that are written one after another and read in any order.

    Args:
        scratch: folder of the file; None: the system's own for temporary files.
        encode, decode: value -> bytes, and back.
    """

    def __init__(
        self, scratch: Path | None, encode: Callable[[Any], bytes], decode: Callable[[bytes], Any]
    ) -> None:
        self._file = _nameless(scratch)
        self._ends = array("q", [0])
        self._encode, self._decode = encode, decode

    def append(self, value: Any) -> None:
        self._ends.append(self._ends[-1] + self._file.write(self._encode(value)))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(i)
        self._file.flush()
        start, end = self._ends[i], self._ends[i + 1]
        return self._decode(os.pread(self._file.fileno(), end - start, start))

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))


def texts(scratch: Path | None) -> Spool:
    """A spool of strings."""
    return Spool(scratch, str.encode, bytes.decode)


def token_rows(scratch: Path | None) -> Spool:
    """A spool of int32 arrays."""
    return Spool(scratch, np.ndarray.tobytes, lambda data: np.frombuffer(data, np.int32))


class Ids:
    """int32 numbers that are appended, then read a part at a time.

    A slice is another `Ids` on the same file, and np.asarray reads it. Nothing is mapped: what is
    mapped counts against a limit on address space (`ulimit -v`, which clusters set), read or not.
    """

    def __init__(self, scratch: Path | None) -> None:
        self._file = _nameless(scratch)
        self._start = self._end = 0

    def append(self, ids: np.ndarray) -> None:
        self._end += self._file.write(np.ascontiguousarray(ids, np.int32).data.cast("B")) // 4

    def __len__(self) -> int:
        return self._end - self._start

    def __getitem__(self, part: slice) -> "Ids":
        start, stop, _ = part.indices(len(self))
        out = copy(self)
        out._start, out._end = self._start + start, self._start + max(start, stop)
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """int32 [n], read from the file."""
        self._file.flush()
        out, at = np.empty(len(self), np.int32), 4 * self._start
        left = out.data.cast("B")
        while left:  # one call reads 2 GiB at most
            n = os.preadv(self._file.fileno(), [left], at)
            left, at = left[n:], at + n
        return out if dtype is None else out.astype(dtype, copy=False)
