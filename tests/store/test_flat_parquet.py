"""The flat layout is Parquet to others, and memory to us."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.store import flat_parquet as flat


def write(path, columns, metadata=None):
    path.write_bytes(b"".join(flat.pieces(columns, metadata or {})))
    return path


@pytest.mark.parametrize(
    ("n", "out"), [(0, b"\0"), (127, b"\x7f"), (128, b"\x80\x01"), (300, b"\xac\x02")]
)
def test_varints_on_paper(n, out):
    assert flat.varint(n) == out


def test_a_struct_on_paper():
    """Field 1 int32 5, field 3 text 'ab': deltas 1 and 2, zigzag 10, length 2, stop."""
    found = flat.struct((1, flat.I32, 5), (3, flat.BINARY, "ab"))
    assert found == bytes([0x15, 10, 0x28, 2]) + b"ab\0"


@pytest.mark.parametrize("n", [3, 14, 15, 200])
def test_lists_of_any_length_are_read_by_pyarrow(n, tmp_path):
    columns = {f"column_{i}": np.array([i], np.int32) for i in range(n)}
    path = write(tmp_path / "t.parquet", columns, {f"key {i}": f"é{i}" for i in range(n)})
    table = pq.read_table(path)
    assert [table[c].to_pylist() for c in columns] == [[i] for i in range(n)]
    assert table.schema.metadata == {f"key {i}".encode(): f"é{i}".encode() for i in range(n)}


@pytest.mark.parametrize("rows", [0, 1, 63, 70_000])
def test_pyarrow_reads_the_same_values(rows, tmp_path):
    rng = np.random.default_rng(0)
    columns = {
        "act": rng.integers(0, 256, (rows, 12), np.uint8).view(np.float32),
        "token": rng.integers(0, 2**31, rows).astype(np.int32),
        "negative": -rng.integers(0, 2**31, rows).astype(np.int32),
    }
    path = write(tmp_path / "t.parquet", columns, {"retrace": "{}"})
    table = pq.read_table(path)
    table.validate(full=True)
    assert table.schema.types == [pa.binary(12), pa.int32(), pa.int32()]
    assert b"".join(table["act"].to_pylist()) == columns["act"].tobytes()
    for name in ("token", "negative"):
        assert np.array_equal(table[name].to_numpy(), columns[name])
    mapped, metadata = flat.mapped(path)
    assert metadata == {"retrace": "{}"}
    for name, column in columns.items():
        assert mapped[name].tobytes() == column.tobytes()
        assert not rows or mapped[name].ctypes.data % flat.ALIGN == 0
        assert not mapped[name].flags.writeable


def test_row_slices_by_other_readers(tmp_path):
    acts = np.arange(40, dtype=np.float16).reshape(10, 4)
    path = write(tmp_path / "t.parquet", {"act": acts, "i": np.arange(10, dtype=np.int32)})
    batches = list(pq.ParquetFile(path).iter_batches(3, columns=["act"]))
    assert b"".join(x for b in batches for x in b["act"].to_pylist()) == acts.tobytes()


def test_other_layouts_are_not_mapped(tmp_path):
    pq.write_table(pa.table({"x": pa.array([1], pa.int32())}), tmp_path / "t.parquet")
    assert flat.mapped(tmp_path / "t.parquet")[0] == {}


@pytest.mark.parametrize("column", [np.zeros(3), np.zeros((2, 2, 2), np.int32)])
def test_columns_that_cannot_be_laid_out(column):
    with pytest.raises(ValueError, match="a column must be"):
        flat.pieces({"x": column}, {})


def test_a_page_has_an_end(monkeypatch):
    monkeypatch.setattr(flat, "MAX_PAGE", 100)
    with pytest.raises(ValueError, match="column x: 26 rows of 4 bytes exceed one page"):
        flat.pieces({"x": np.zeros(26, np.int32)}, {})
