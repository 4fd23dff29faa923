"""Parquet of one row group whose columns are one uncompressed page each, aligned: mappable.

A shard of activations is read far more often than written. In this layout a column's values lie
in the file as they lie in memory, so that reading is `np.memmap`, and writing is the disk's work.
pyarrow's writer cannot lay a file out so (it cuts pages at their row count and copies
values three times); any Parquet reader reads the file, and a test lets pyarrow do it.

The footer is Thrift's compact protocol, by Parquet's format specification (parquet.thrift,
format 2.x): the few structs that plain, required, unstatisticked columns need.
"""

import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import RetraceError

MAGIC = b"PAR1"
CREATED_BY = "retrace flat 1"  # names the layout
ALIGN = 64  # bytes; a cache line
MAX_PAGE = 2**31 - 1  # a page's size is an int32

# Thrift's compact types, and Parquet's enums
I32, I64, BINARY, LIST, STRUCT = 5, 6, 8, 9, 12
INT32, FIXED_LEN_BYTE_ARRAY = 1, 7
REQUIRED, PLAIN, RLE, UNCOMPRESSED, DATA_PAGE = 0, 0, 3, 0, 0


def varint(n: int) -> bytes:
    """Seven bits a byte, the least significant first."""
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


def encode(kind: int, value: Any) -> bytes:
    """A Thrift value: an int, text, (kind, list of values), or the bytes of a struct."""
    if kind in (I32, I64):
        return varint(value << 1)  # zigzag of a number that is never negative here
    if kind == BINARY:
        text = value.encode()
        return varint(len(text)) + text
    if kind == LIST:
        inner, values = value
        n = len(values)
        size = bytes([n << 4 | inner]) if n < 15 else bytes([0xF0 | inner]) + varint(n)
        return size + b"".join(encode(inner, v) for v in values)
    return value


def struct(*fields: tuple[int, int, Any]) -> bytes:
    """A Thrift struct of (id, kind, value), ids rising by at most 15."""
    out, last = b"", 0
    for number, kind, value in fields:
        out += bytes([number - last << 4 | kind]) + encode(kind, value)
        last = number
    return out + b"\0"


def page_header(rows: int, size: int) -> bytes:
    """PageHeader of a data page of `rows` plain values, `size` bytes."""
    data = struct((1, I32, rows), (2, I32, PLAIN), (3, I32, RLE), (4, I32, RLE))
    return struct((1, I32, DATA_PAGE), (2, I32, size), (3, I32, size), (5, STRUCT, data))


def _kind(column: np.ndarray) -> tuple[int, int]:
    """(Parquet type, bytes a cell): INT32 for [rows] int32, else the cells of [rows, d]."""
    if column.ndim == 1 and column.dtype == np.int32:
        return INT32, 4
    if column.ndim == 2:
        return FIXED_LEN_BYTE_ARRAY, column.shape[1] * column.itemsize
    raise ValueError(
        f"a column must be int32 [rows] or [rows, d], not {column.dtype} {column.ndim}d"
    )


def pieces(columns: dict[str, np.ndarray], metadata: dict[str, str]) -> list[bytes | memoryview]:
    """The bytes of a file, in order; see `parts`.

    Args:
        metadata: key -> text of the schema's metadata.
    """
    body, footer = parts(columns)
    return [*body, footer(metadata)]


def parts(
    columns: dict[str, np.ndarray],
) -> tuple[list[bytes | memoryview], Callable[[dict[str, str]], bytes]]:
    """The bytes before a file's footer, in order; and what makes the footer from the metadata.

    Args:
        columns: int32 [rows], or [rows, d] of any type, which becomes one cell of bytes a row. The
            values are not copied.
    """
    rows = len(next(iter(columns.values())))
    out: list[bytes | memoryview] = [MAGIC]
    at, chunks, schema = len(MAGIC), [], [struct((4, BINARY, "schema"), (5, I32, len(columns)))]
    for name, column in columns.items():
        column = np.ascontiguousarray(column)
        kind, cell = _kind(column)
        if rows * cell > MAX_PAGE:
            raise ValueError(f"column {name}: {rows} rows of {cell} bytes exceed one page of 2 GiB")
        header = page_header(rows, rows * cell)
        gap = -(at + len(header)) % ALIGN
        start, size = at + gap, len(header) + rows * cell
        out += [bytes(gap) + header, memoryview(column.reshape(-1).view(np.uint8))]
        at = start + size
        length = [(2, I32, cell)] if kind == FIXED_LEN_BYTE_ARRAY else []
        schema.append(struct((1, I32, kind), *length, (3, I32, REQUIRED), (4, BINARY, name)))
        chunk_meta = struct(
            (1, I32, kind), (2, LIST, (I32, [PLAIN])), (3, LIST, (BINARY, [name])),
            (4, I32, UNCOMPRESSED), (5, I64, rows), (6, I64, size), (7, I64, size), (9, I64, start),
        )  # fmt: skip
        chunks.append(struct((2, I64, start), (3, STRUCT, chunk_meta)))
    group = struct((1, LIST, (STRUCT, chunks)), (2, I64, at), (3, I64, rows))

    def footer(metadata: dict[str, str]) -> bytes:
        pairs = [struct((1, BINARY, k), (2, BINARY, v)) for k, v in metadata.items()]
        made = struct(
            (1, I32, 2), (2, LIST, (STRUCT, schema)), (3, I64, rows), (4, LIST, (STRUCT, [group])),
            (5, LIST, (STRUCT, pairs)), (6, BINARY, CREATED_BY),
        )  # fmt: skip
        return made + len(made).to_bytes(4, "little") + MAGIC

    return out, footer


def mapped(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Columns of a file that `pieces` laid out, mapped read-only, and its metadata.

    Returns:
        int32 [rows], or uint8 [rows, bytes of a cell], none where the file has another layout;
        key -> text.

    Raises:
        RetraceError: the file is not complete.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found = pq.read_metadata(path)
        metadata = {k.decode(): v.decode() for k, v in (found.metadata or {}).items()}
        return (_columns(path, found) if found.created_by == CREATED_BY else {}), metadata
    except (pa.ArrowException, OSError, ValueError, LookupError, OverflowError) as e:
        raise RetraceError(
            f"{path}: not a complete Parquet file ({(str(e).splitlines() or [''])[0]}); delete it "
            f"and run snakemake again"
        ) from e


def read_ahead(values: np.ndarray) -> None:
    """Ask the system to read a part of a mapped column at once; left alone it reads bit by bit."""
    base, _ = whole_of(values)
    if isinstance(base, mmap.mmap):
        start = place_of(values)
        first = start - start % mmap.PAGESIZE
        base.madvise(mmap.MADV_WILLNEED, first, start - first + values.nbytes)


class File:
    """A file to read parts of, from several threads; open as long as somebody holds it.

    Rows that are copied anyway come this way without the page faults of a map, which takes one for
    every 4 KiB. Where the system has no such read (`File.of` gives None), they are copied out of
    the map.
    """

    def __init__(self, path: str | Path) -> None:
        self._fd = os.open(path, os.O_RDONLY)

    @classmethod
    def of(cls, path: str | Path) -> "File | None":
        """The file, where the system can read it so."""
        return cls(path) if hasattr(os, "preadv") else None

    def __del__(self, close=os.close) -> None:  # at the end of Python there is no `os`
        if hasattr(self, "_fd"):
            close(self._fd)

    def read_into(self, start: int, out: np.ndarray) -> bool:
        """Fill `out`, uint8, with the bytes from `start` on; False where the file ends before."""
        at = 0
        while at < len(out):
            n = os.preadv(self._fd, [out[at:].data], start + at)
            if n == 0:
                return False
            at += n
        return True


def whole_of(values: np.ndarray) -> tuple[Any, np.ndarray]:
    """The map that a part of a mapped column lies in, and all of the file's bytes, uint8."""
    base = values
    while isinstance(base, np.ndarray):
        base = base.base
    whole = np.frombuffer(base, np.uint8) if isinstance(base, mmap.mmap) else values
    return base, whole


def place_of(values: np.ndarray) -> int:
    """At which byte of its file a part of a mapped column begins."""
    return values.ctypes.data - whole_of(values)[1].ctypes.data


def _columns(path: str | Path, found: Any) -> dict[str, np.ndarray]:
    """The columns of a file, by its metadata; ValueError where one lies outside the file."""
    whole = np.memmap(path, np.uint8, "r").view(np.ndarray)
    columns = {}
    for i in range(found.num_columns):
        chunk, declared = found.row_group(0).column(i), found.schema.column(i)
        cell = declared.length or 4
        end = chunk.data_page_offset + chunk.total_compressed_size
        start = end - found.num_rows * cell
        if not 0 <= start <= end <= len(whole):
            raise ValueError(f"column {declared.name} lies outside the file")
        values = whole[start:end]
        columns[declared.name] = (
            values.reshape(-1, cell) if declared.length else values.view(np.int32)
        )
    return columns
