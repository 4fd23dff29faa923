"""Digests of a shard by chunk, so that a reader verifies the bytes that it reads and no others.

A file's sha256 can only be compared once all of the file was read, which costs a reader of a store
larger than memory a second reading. So a shard's footer lists the sha256 of every CHUNK bytes
before it, and the manifest the sha256 of the footer (a hash tree of two levels, as Merkle's 1987).
A chunk is compared when a row of it is first read, once a process; then it lies in memory anyway.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

CHUNK = 1 << 16  # bytes; a read of a thousand rows shares few chunks with its neighbours
KEY = "retrace.chunks"  # in a shard's metadata
SHA256 = 32  # bytes


def noted(pieces: Iterable[bytes | memoryview]) -> str:
    """What a footer says of the bytes before it.

    Args:
        pieces: those bytes, in order.
    """
    found, sink, room = [], hashlib.sha256(), CHUNK
    for piece in pieces:
        at = 0
        while at < len(piece):
            part = piece[at : at + room]
            sink.update(part)
            at, room = at + len(part), room - len(part)
            if room == 0:
                found.append(sink.digest())
                sink, room = hashlib.sha256(), CHUNK
    if room < CHUNK:
        found.append(sink.digest())
    return json.dumps({"bytes": CHUNK, "sha256": base64.b64encode(b"".join(found)).decode()})


def tail_length(path: Path) -> int:
    """Bytes of a Parquet file's footer, its length and the last magic included."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        f.seek(max(size - 8, 0))
        return min(size, int.from_bytes(f.read(4), "little") + 8)


def tail_sha256(path: str | Path) -> str:
    """sha256 of a Parquet file's footer, its length and the last magic included."""
    length = tail_length(Path(path))
    with open(path, "rb") as f:
        f.seek(-length, 2)
        return hashlib.sha256(f.read(length)).hexdigest()


class Chunks:
    """The chunks of one mapped shard.

    Args:
        whole: the file's bytes.
        said: what `noted` gave.
        left: which chunks are still to be compared, of an earlier opening; they are marked there.

    Raises:
        ValueError: it is not what `noted` gives.
    """

    def __init__(self, whole: np.ndarray, said: str, left: np.ndarray | None = None) -> None:
        try:
            found = json.loads(said)
            self.size, self._sha256 = int(found["bytes"]), base64.b64decode(found["sha256"])
        except (TypeError, LookupError, binascii.Error) as e:
            raise ValueError(f"no digests of chunks ({e})") from None
        self._whole = whole
        self.left = np.ones(len(self._sha256) // SHA256, bool) if left is None else left

    def around(self, start: int, stop: int) -> tuple[int, int]:
        """From which byte to which to read so that chunks still to be compared are read whole."""
        first, last = start // self.size, -(-stop // self.size)
        if not start < stop or last > len(self.left):
            return start, stop
        return (
            first * self.size if self.left[first] else start,
            min(last * self.size, self._end) if self.left[last - 1] else stop,
        )

    def fit(self, start: int, stop: int, given: np.ndarray | None = None, at: int = 0) -> bool:
        """Whether the chunks that hold bytes start to stop are as they were written.

        Args:
            given: bytes of the file from `at` on, uint8, as far as `around` says; default: the map.
        """
        first, last = start // self.size, -(-stop // self.size)
        if last > len(self.left):
            return False
        whole, offset = (self._whole, 0) if given is None else (given, at)
        for i in map(int, first + np.flatnonzero(self.left[first:last])):
            end = min((i + 1) * self.size, self._end)
            chunk = whole[i * self.size - offset : end - offset]
            if hashlib.sha256(chunk).digest() != self._sha256[i * SHA256 : (i + 1) * SHA256]:
                return False
            self.left[i] = False
        return True

    @property
    def _end(self) -> int:
        """Where the footer begins."""
        return len(self._whole) - int.from_bytes(self._whole[-8:-4].tobytes(), "little") - 8
