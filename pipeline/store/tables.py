"""Parquet, safetensors and JSON, written whole or not at all, each with its certificate.

A file appears under its name only when it is complete: it is written beside it under a
temporary name, flushed, and renamed. Activations are one FixedSizeBinary cell a row
(d_model x itemsize bytes), laid out so that a shard is read by mapping it (flat_parquet.py).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from glob import escape
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import RetraceError
from pipeline.store import chunks, flat_parquet, intact, provenance

WRITTEN = 1 << 25  # bytes of a shard that are handed to the disk at a time
NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


def atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Call `write` on a temporary file beside `path`, then rename it to `path`.

    Temporary files that a killed job left for the same path are removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{escape(path.name)}.*.tmp"):
        left.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        raise RetraceError(
            f"{path}: could not be written ({e.strerror or e}); free space or fix the folder, "
            f"then run snakemake again"
        ) from e
    finally:
        temporary.unlink(missing_ok=True)


def write_table(
    path: str | Path, data: Any, certificate: dict, row_group_size: int | None = None
) -> None:
    """Write a pandas DataFrame or an Arrow table as Parquet (zstd), with its certificate.

    Args:
        row_group_size: rows that a reader must take at a time, at least; default: a million.
    """
    import pyarrow as pa

    table = data if isinstance(data, pa.Table) else pa.Table.from_pandas(data, preserve_index=False)

    write_tables(path, lambda: [table], table.schema, certificate, row_group_size)


def write_tables(
    path: str | Path,
    parts: Callable[[], Iterable[Any]],
    schema: Any,
    certificate: dict,
    row_group_size: int | None = None,
) -> None:
    """Write Arrow tables, one after another, as one Parquet file with its certificate.

    Args:
        parts: called twice, since the certificate holds a digest of all that is written; whoever
            has more than memory holds gives a generator. Each part begins a row group.
        schema: the one schema of all parts.
    """
    import pyarrow.parquet as pq

    bare = schema.remove_metadata()

    def once(to: Path, schema: Any) -> None:
        with pq.ParquetWriter(to, schema, compression="zstd") as out:
            for part in parts():
                out.write_table(part.replace_schema_metadata(schema.metadata), row_group_size)

    def write(to: Path) -> None:
        once(to, bare)
        made = intact.to_seal(certificate | {"content": provenance.parquet_digest(to)})
        once(to, bare.with_metadata({provenance.KEY: provenance.canonical(made)}))
        intact.seal(to, ".parquet")

    atomically(path, write)


def read_arrow(path: str | Path, columns: list[str] | None = None) -> Any:
    """A Parquet file as an Arrow table; RetraceError where it is not as it was written."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    _check(path)
    try:
        return pq.read_table(path, columns=columns, memory_map=True)
    except (pa.ArrowInvalid, OSError) as e:
        raise RetraceError(
            f"{path}: not a complete Parquet file ({str(e).splitlines()[0]}); delete it and run "
            f"snakemake again"
        ) from e


def _check(path: str | Path) -> None:
    """A table that carries a certificate is as it was written; one made by hand carries none."""
    if Path(path).is_file() and provenance.read(path) is not None:
        intact.check_alone(path)


def read_table(path: str | Path, columns: list[str] | None = None) -> Any:
    """A Parquet or CSV file as a pandas DataFrame."""
    import pandas as pd

    if Path(path).suffix == ".csv":
        _check(path)
        return pd.read_csv(path)
    return read_arrow(path, columns).to_pandas()


def write_json(path: str | Path, data: dict, certificate: dict) -> None:
    """Write a JSON object with its certificate under the key `provenance`."""
    made = certificate | {"content": provenance.digest(data)}
    _write_sealed(path, {**data, "provenance": intact.to_seal(made)})


def _write_sealed(path: str | Path, data: dict) -> None:
    """Write JSON whose last key is a certificate with room for a seal."""
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    write_sealed(path, text)


def write_sealed(path: str | Path, text: str) -> None:
    """Write text that holds a certificate with room for a seal, and fill in the seal."""

    def write(to: Path) -> None:
        to.write_text(text, "utf-8")
        intact.seal(to, Path(path).suffix)

    atomically(path, write)


def read_json(path: str | Path) -> dict:
    """A JSON object, its certificate included; RetraceError where it is not as it was written."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise RetraceError(
            f"{path}: not readable JSON ({e}); delete it, run snakemake again"
        ) from e
    if not isinstance(found, dict):
        raise RetraceError(f"{path}: must be a JSON object; delete it, run snakemake again")
    if "provenance" in found:
        intact.check_alone(path)
    return found


def write_csv(path: str | Path, frame: Any, certificate: dict) -> None:
    """Write a DataFrame as CSV, its certificate as the twin `<path>.json`."""
    atomically(path, lambda to: frame.to_csv(to, index=False))
    made = certificate | {"content": provenance.sha256_file(path)}
    _write_sealed(f"{path}.json", {"provenance": intact.to_seal(made)})


def stamp_safetensors(path: str | Path, certificate: dict) -> None:
    """Write a certificate into `__metadata__` of a safetensors file; tensors stay as they are."""
    made = intact.to_seal(certificate | {"content": provenance.content_digest(path)})
    with open(path, "rb") as old:
        header = json.loads(old.read(int.from_bytes(old.read(8), "little")))
        kept = header.get("__metadata__", {})
        header["__metadata__"] = {**kept, provenance.KEY: provenance.canonical(made)}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # safetensors keeps its data aligned to 8 bytes

        def write(to: Path) -> None:
            with open(to, "wb") as new:
                new.write(len(text).to_bytes(8, "little") + text)
                shutil.copyfileobj(old, new, 1 << 20)
            intact.seal(to, ".safetensors")

        atomically(path, write)


def write_shard(
    path: str | Path, acts: np.ndarray, columns: dict[str, np.ndarray], dtype: str, metadata: dict
) -> str:
    """Write activations as one FixedSizeBinary cell a row; return the file's sha256.

    Args:
        acts: [rows, d_model], float16 or float32, or uint16 bit patterns for bfloat16.
        columns: int32 arrays of [rows] that stand beside the cells: document, block, position,
            token.
        dtype: float16, bfloat16 or float32.
        metadata: written as the schema's metadata, JSON under the key `retrace`.
    """
    if acts.dtype != NUMPY[dtype]:
        raise ValueError(f"{path}: {acts.dtype} array given for dtype {dtype}")
    about = {"dtype": dtype, "d_model": acts.shape[1], **metadata}
    body, footer = flat_parquet.parts(
        {"act": acts} | {n: np.asarray(c, np.int32) for n, c in columns.items()}
    )

    def digest() -> Any:
        sink = hashlib.sha256()
        for piece in body:
            sink.update(piece)
        return sink

    def write(to: Path) -> None:
        with open(to, "wb") as f, ThreadPoolExecutor(1) as disk:
            begun = []  # now, so that the last wait for the disk is short
            for piece in chain(body, last()):
                for at in range(0, len(piece), WRITTEN):
                    f.write(piece[at : at + WRITTEN])
                    f.flush()
                    begun.append(disk.submit(os.fsync, f.fileno()))
            for one in begun:
                one.result()

    with ThreadPoolExecutor(2) as beside:  # hashing and writing each take a core most of the time
        whole, parts = beside.submit(digest), beside.submit(chunks.noted, body)

        @cache
        def end() -> bytes:
            return footer({provenance.KEY: provenance.canonical(about), chunks.KEY: parts.result()})

        def last() -> Iterator[bytes]:
            yield end()  # waits for the digests, while the disk is at work

        atomically(path, write)
        found = whole.result()
        found.update(end())
        return found.hexdigest()


def read_shard(path: str | Path) -> tuple[np.ndarray, dict[str, np.ndarray], dict]:
    """Map a shard into memory; nothing is copied. See `open_shard`."""
    return open_shard(path)[:3]


def open_shard(path: str | Path) -> tuple[np.ndarray, dict[str, np.ndarray], dict, str]:
    """Map a shard into memory; nothing is copied.

    Returns:
        acts [rows, d_model] (uint16 bit patterns for bfloat16), the int32 columns, and the
        metadata (dtype, d_model, hook, …); what its footer says of its chunks (chunks.py), blank in
        shards of before. The arrays are read-only.
    """
    found, metadata = flat_parquet.mapped(path)
    try:
        about = json.loads(metadata.get(provenance.KEY, "{}"))
        cells, kind, d_model = found.pop("act"), NUMPY[about["dtype"]], int(about["d_model"])
    except (ValueError, TypeError, LookupError, RecursionError) as e:
        raise RetraceError(
            f"{path}: is not a shard of activations; delete it, run snakemake again"
        ) from e
    if cells.ndim != 2 or cells.shape[1] != d_model * kind().itemsize:
        raise RetraceError(f"{path}: its cells are not {about['d_model']} {about['dtype']} long")
    return cells.view(kind), found, about, metadata.get(chunks.KEY, "")


def where(table: Any, **values: Any) -> Any:
    """The rows of a DataFrame in which each named column has a value, or one of a list of them."""
    for column, value in values.items():
        several = isinstance(value, list | tuple | set)
        table = table[table[column].isin(value) if several else table[column] == value]
    return table
