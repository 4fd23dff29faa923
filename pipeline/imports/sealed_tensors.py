"""Write a safetensors file with its certificate, touching the disk once. [torch]

`tables.stamp_safetensors` reads and writes a file again to put a certificate into its header, and
reads it once more for the seal. Where the tensors are in memory, their digest is known before the
file is begun, and the seal is taken of what is written: of 1.2 GB, one pass in place of four. Seal
and disk work in threads beside the writing.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pipeline.store import intact, provenance, tables

PIECE = 1 << 20  # bytes of a write: of 16 MB they take four times the processor's time
SYNCED = 64 << 20  # bytes between two calls that send them to the disk


def arrays(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """float32 tensors as arrays in one piece, sorted by name; those that are so are not copied."""
    return {name: tensors[name].contiguous().numpy() for name in sorted(tensors)}


def content(found: dict[str, np.ndarray]) -> str:
    """The digest that `provenance.content_digest` gives of the file with these arrays."""
    sink = hashlib.sha256()
    for array in found.values():
        sink.update(array.reshape(-1).view(np.uint8))
    return sink.hexdigest()


def header(found: dict[str, np.ndarray], certificate: dict[str, Any]) -> bytes:
    """Length and JSON in front of the data, padded to 8 bytes."""
    at, entries = 0, {}
    for name, array in found.items():
        span = [at, at + array.nbytes]
        entries[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": span}
        at = span[1]
    stamp = {"format": "pt", provenance.KEY: provenance.canonical(certificate)}
    text = json.dumps({"__metadata__": stamp, **entries}, separators=(",", ":"), ensure_ascii=False)
    data = text.encode()
    data += b" " * (-len(data) % 8)
    return len(data).to_bytes(8, "little") + data


def write(
    path: Path, found: dict[str, np.ndarray], content: str, certificate: dict[str, Any]
) -> None:
    """Write arrays whose digest is `content`, sealed, whole or not at all."""
    head = header(found, intact.to_seal(certificate | {"content": content}))
    seal = list(intact.SEAL.finditer(head))[-1].start(1)

    def put(to: Path) -> None:
        pieces = [memoryview(array.reshape(-1).view(np.uint8)) for array in found.values()]
        with open(to, "wb") as f, ThreadPoolExecutor(2) as pool:
            f.write(head)
            sealing, synced = pool.submit(_seal, head, pieces), []
            for done, piece in enumerate(_cut(pieces), 1):
                f.write(piece)
                if done * PIECE % SYNCED == 0:
                    synced.append(pool.submit(os.fsync, f.fileno()))
            for one in synced:
                one.result()
            f.seek(seal)
            f.write(sealing.result().encode())

    tables.atomically(path, put)


def _seal(head: bytes, pieces: list[memoryview]) -> str:
    sink = hashlib.sha256(head)
    for piece in pieces:
        sink.update(piece)
    return sink.hexdigest()


def _cut(pieces: list[memoryview]) -> Iterator[memoryview]:
    for piece in pieces:
        for start in range(0, len(piece), PIECE):
            yield piece[start : start + PIECE]
