"""Write a safetensors file with its certificate, touching the disk once. [torch]

`tables.stamp_safetensors` reads and writes a file again to put a certificate into its header, and
reads it once more for the seal. Where the tensors are in memory, their digest is known before the
file is begun, and the seal is taken of what is written: of 1.2 GB, one pass in place of four.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pipeline.store import intact, provenance, tables

PIECE = 16 << 20  # bytes written while those before them are hashed


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
    path: Path, found: dict[str, np.ndarray], digest: str, certificate: dict[str, Any]
) -> None:
    """Write arrays whose `content` is `digest`, sealed, whole or not at all."""
    head = header(found, intact.to_seal(certificate | {"content": digest}))
    seal = list(intact.SEAL.finditer(head))[-1].start(1)

    def put(to: Path) -> None:
        sink = hashlib.sha256(head)
        with open(to, "wb") as f, ThreadPoolExecutor(1) as hashing:
            f.write(head)
            for array in found.values():
                data = memoryview(array.reshape(-1).view(np.uint8))
                for start in range(0, len(data), PIECE):
                    done = hashing.submit(sink.update, data[start : start + PIECE])
                    f.write(data[start : start + PIECE])
                    done.result()
            f.seek(seal)
            f.write(sink.hexdigest().encode())

    tables.atomically(path, put)
