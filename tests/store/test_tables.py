"""Files are written whole or not at all; shards of activations come back exactly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from pipeline.errors import RetraceError
from pipeline.sharing import verify
from pipeline.store import provenance, tables

ROOT = Path(__file__).parents[2]
CERTIFICATE = {"stage": "test", "inputs": {}}


def writers(path: Path):
    """Every writer, as a function of no arguments, on the format that it writes."""
    frame = pd.DataFrame({"x": [1.0, 2.0], "s": ["a", None]})
    return {
        "parquet": lambda: tables.write_table(path / "t.parquet", frame, CERTIFICATE),
        "json": lambda: tables.write_json(path / "t.json", {"x": 1}, CERTIFICATE),
        "csv": lambda: tables.write_csv(path / "t.csv", frame, CERTIFICATE),
        "shard": lambda: tables.write_shard(
            path / "t.parquet", np.zeros((4, 2), np.float32), {}, "float32", {}
        ),
    }


FORMATS = ["parquet", "json", "csv", "shard"]


@pytest.mark.parametrize("kind", FORMATS)
def test_the_same_data_give_the_same_bytes(tmp_path, kind):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        writers(tmp_path / name)[kind]()
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert one == two and len(one) == (2 if kind == "csv" else 1)


@pytest.mark.parametrize("kind", FORMATS)
def test_nothing_is_left_of_a_write_that_fails(tmp_path, kind, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RetraceError, match=r"No space left on device.*free space"):
        writers(tmp_path)[kind]()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", FORMATS)
def test_a_failed_write_keeps_what_was_there(tmp_path, kind, monkeypatch):
    writers(tmp_path)[kind]()
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(RetraceError):
        writers(tmp_path)[kind]()
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_a_file_size_limit_leaves_nothing_that_reads_as_complete(tmp_path):
    code = """
import resource, signal, sys
import numpy as np
from pipeline.store import tables
from pipeline.errors import RetraceError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
acts = np.random.default_rng(0).standard_normal((1000, 64)).astype(np.float32)
try:
    tables.write_shard(sys.argv[1] + "/s.parquet", acts, {}, "float32", {})
except RetraceError as e:
    sys.exit(str(e))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "s.parquet: could not be written" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_table_comes_back_with_its_certificate(tmp_path):
    frame = pd.DataFrame({"x": [1.5, np.nan], "s": ["a", "b"], "tokens": [[1, 2], []]})
    tables.write_table(tmp_path / "t.parquet", frame, CERTIFICATE)
    back = tables.read_table(tmp_path / "t.parquet")
    assert back["x"].tolist()[0] == 1.5 and np.isnan(back["x"][1])
    assert [list(t) for t in back["tokens"]] == [[1, 2], []]
    assert provenance.read(tmp_path / "t.parquet")["stage"] == "test"
    assert tables.read_arrow(tmp_path / "t.parquet", ["s"]).column_names == ["s"]


def test_arrow_tables_are_written_too(tmp_path):
    tables.write_table(
        tmp_path / "t.parquet", pa.table({"x": pa.array([1], pa.int32())}), CERTIFICATE
    )
    assert tables.read_arrow(tmp_path / "t.parquet").schema.field("x").type == pa.int32()


def test_json_comes_back_with_its_certificate(tmp_path):
    tables.write_json(tmp_path / "t.json", {"title": "é <b>"}, CERTIFICATE)
    back = tables.read_json(tmp_path / "t.json")
    assert back["title"] == "é <b>" and back["provenance"]["stage"] == "test"


def test_csv_comes_back_and_its_twin_holds_the_certificate(tmp_path):
    frame = pd.DataFrame({"x": [1, 2], "s": ["a,b", 'say "c"\nand d']})
    tables.write_csv(tmp_path / "t.csv", frame, CERTIFICATE)
    pd.testing.assert_frame_equal(tables.read_table(tmp_path / "t.csv"), frame)
    assert json.loads((tmp_path / "t.csv.json").read_text())["provenance"]["stage"] == "test"
    assert verify.faults(tmp_path / "t.csv") == []


# --- shards --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("rows", [0, 1, 1000])
def test_a_shard_comes_back_exactly(tmp_path, dtype, rows):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 256, (rows, 24 * np.dtype(tables.NUMPY[dtype]).itemsize), np.uint8)
    acts = bits.view(tables.NUMPY[dtype])  # every bit pattern, NaN and infinities among them
    token = np.arange(rows, dtype=np.int32)
    tables.write_shard(
        tmp_path / "s.parquet", acts, {"token": token}, dtype, {"hook": "blocks.0.hook_resid_post"}
    )
    back, columns, metadata = tables.read_shard(tmp_path / "s.parquet")
    assert back.shape == (rows, 24) and back.tobytes() == acts.tobytes()
    assert columns["token"].tolist() == token.tolist()
    assert metadata == {"dtype": dtype, "d_model": 24, "hook": "blocks.0.hook_resid_post"}


def test_a_shard_is_mapped_not_copied(tmp_path):
    acts = np.ones((1000, 16), np.float16)
    tables.write_shard(tmp_path / "s.parquet", acts, {}, "float16", {})
    back, _, _ = tables.read_shard(tmp_path / "s.parquet")
    assert not back.flags.owndata


def test_a_shard_of_strided_rows_is_written_in_order(tmp_path):
    acts = np.arange(24, dtype=np.float32).reshape(3, 8).T  # not contiguous
    tables.write_shard(tmp_path / "s.parquet", acts, {}, "float32", {})
    assert np.array_equal(tables.read_shard(tmp_path / "s.parquet")[0], acts)


def test_a_shard_of_the_wrong_dtype_is_refused(tmp_path):
    with pytest.raises(ValueError, match="float32 array given for dtype float16"):
        tables.write_shard(tmp_path / "s", np.zeros((1, 2), np.float32), {}, "float16", {})


def test_a_truncated_shard_is_told(tmp_path):
    path = tmp_path / "s.parquet"
    tables.write_shard(path, np.ones((100, 16), np.float32), {}, "float32", {})
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(RetraceError, match=r"s\.parquet: not a complete Parquet file"):
            tables.read_shard(path)


def test_a_table_is_no_shard(tmp_path):
    tables.write_table(tmp_path / "t.parquet", pd.DataFrame({"x": [1]}), CERTIFICATE)
    with pytest.raises(RetraceError, match="is not a shard of activations"):
        tables.read_shard(tmp_path / "t.parquet")


@pytest.mark.parametrize("name", ["none.json", "torn.json"])
def test_json_that_cannot_be_read_is_told(tmp_path, name):
    (tmp_path / "torn.json").write_text('{"x":')
    with pytest.raises(RetraceError, match=rf"{name}: not readable JSON"):
        tables.read_json(tmp_path / name)


def test_what_a_killed_job_left_is_removed(tmp_path):
    left, other = tmp_path / ".m.json.99999.tmp", tmp_path / ".n.json.99999.tmp"
    left.write_text('{"half')
    other.write_text("of another file")
    tables.write_json(tmp_path / "m.json", {"x": 1}, CERTIFICATE)
    assert not left.exists() and other.exists()


def test_rows_of_some_values():
    table = pd.DataFrame({"arm": ["a", "b", "b"], "seed": [0, 0, 1]})
    assert tables.where(table, arm="b", seed=0).index.tolist() == [1]
    assert tables.where(table, seed=[0, 1], arm="b").index.tolist() == [1, 2]
