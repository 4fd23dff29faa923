"""Rows across shards are one array; a shard that is not what the manifest says is an error."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import RetraceError
from pipeline.store import provenance, shards, tables
from pipeline.store.shards import Blocks, Rows

HOOK = "blocks.0.hook_resid_post"
SIZES = {"train": [7, 7, 3], "eval": [4]}
D = 5


def acts_of(dtype: str, split: str) -> np.ndarray:
    rng = np.random.default_rng(len(split))
    values = rng.normal(size=(sum(SIZES[split]), D)).astype(np.float32)
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(tables.NUMPY[dtype])


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def stored(request, tmp_path):
    """(manifest path, dtype) of hand-made shards of 7, 7 and 3 training rows and 4 held-out."""
    dtype, entries, files, number = request.param, [], {}, 0
    for split, sizes in SIZES.items():
        acts, at = acts_of(dtype, split), 0
        for rows in sizes:
            name = f"shards/{HOOK}/part-{number:05d}.parquet"
            columns = {c: np.arange(at, at + rows, dtype=np.int32) for c in shards.COLUMNS}
            tables.write_shard(
                tmp_path / name, acts[at : at + rows], columns, dtype, {"hook": HOOK}
            )
            entries.append({"file": name, "split": split, "rows": rows, "mean_norm": 1.0})
            files[name] = provenance.sha256_file(tmp_path / name)
            at, number = at + rows, number + 1
    about = {"d_model": D, "dtype": dtype, "rows": {s: sum(n) for s, n in SIZES.items()}}
    about |= {"mean_norm": 1.0, "variance": 1.0, "shards": entries}
    manifest = {"hooks": {HOOK: about}, "files": files}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path / "manifest.json", dtype


def test_any_range_is_that_of_one_array(stored):
    manifest, dtype = stored
    for split in SIZES:
        rows, whole = Rows(manifest, HOOK, split), acts_of(dtype, split)
        assert (len(rows), rows.d_model, rows.dtype) == (len(whole), D, dtype)
        for start in range(len(whole) + 1):
            for stop in range(start, len(whole) + 2):
                raw, columns = rows.read(start, stop)
                assert np.array_equal(raw, whole[start:stop])
                assert raw.dtype == whole.dtype
                assert raw.shape == whole[start:stop].shape
                for c in shards.COLUMNS:
                    assert columns[c].tolist() == list(range(start, min(stop, len(whole))))


@pytest.mark.parametrize("batch_rows", [1, 5, 7, 100])
def test_iterating_gives_every_row_once(stored, batch_rows):
    manifest, dtype = stored
    parts = [raw for raw, _ in Rows(manifest, HOOK).iterate(batch_rows)]
    assert [len(p) for p in parts[:-1]] == [batch_rows] * (len(parts) - 1)
    assert np.array_equal(np.concatenate(parts), acts_of(dtype, "train"))


def test_few_shards_stay_open(stored):
    rows = Rows(stored[0], HOOK)
    for start in (0, 7, 14, 0, 3):
        rows.read(start, start + 2)
        assert len(rows._open) <= shards.OPEN_SHARDS


def test_rows_cannot_be_changed(stored):
    raw, _ = Rows(stored[0], HOOK).read(0, 3)
    with pytest.raises(ValueError, match="read-only"):
        raw[0, 0] = 1


def first(manifest):
    return manifest.parent / f"shards/{HOOK}/part-00000.parquet"


def test_a_truncated_shard(stored):
    path = first(stored[0])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RetraceError, match=r"part-00000\.parquet: truncated or altered"):
        Rows(stored[0], HOOK).read(0, 1)
    with pytest.raises(RetraceError, match=r"part-00000\.parquet: not a complete Parquet"):
        Rows(stored[0], HOOK, verify=False).read(0, 1)


def test_one_changed_bit(stored):
    path = first(stored[0])
    changed = bytearray(path.read_bytes())
    changed[60] ^= 1
    path.write_bytes(changed)
    rows = Rows(stored[0], HOOK)
    with pytest.raises(RetraceError, match=r"part-00000\.parquet: truncated or altered"):
        rows.read(0, 1)
    rows.read(7, 9)  # the others are whole


def test_a_missing_shard(stored):
    first(stored[0]).unlink()
    with pytest.raises(RetraceError, match=r"part-00000\.parquet: missing"):
        Rows(stored[0], HOOK).read(0, 1)


def test_a_shard_with_other_rows_than_the_manifest_says(stored):
    path = first(stored[0])
    shutil.copy(path.with_name("part-00002.parquet"), path)
    with pytest.raises(RetraceError, match=r"holds 3 rows .* says 7 of 5"):
        Rows(stored[0], HOOK, verify=False).read(0, 1)


def test_unknown_hook_and_split(stored):
    with pytest.raises(RetraceError, match=r"no hook 'blocks\.0\.hook_resid_pots' \(did you mean"):
        Rows(stored[0], "blocks.0.hook_resid_pots")
    with pytest.raises(RetraceError, match="no split 'test'; there are train, eval"):
        Rows(stored[0], HOOK, "test")


# --- blocks --------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 3, 100])
def test_blocks_are_read_across_row_groups(group, tmp_path):
    tokens = np.arange(40, dtype=np.int32).reshape(10, 4)
    table = pa.table(
        {
            "block": pa.array(range(10), pa.int32()),
            "split": ["train"] * 7 + ["eval"] * 3,
            "tokens": pa.array(tokens.tolist(), pa.list_(pa.int32())),
            "documents": pa.array((-tokens).tolist(), pa.list_(pa.int32())),
        }
    )
    made = {"stage": "corpus", "inputs": {}, "n_ctx": 4, "bos_id": 0, "prepend_bos": True}
    tables.write_table(tmp_path / "t.parquet", table, made, row_group_size=group)
    blocks = Blocks(tmp_path / "t.parquet")
    assert (len(blocks), blocks.n_ctx, blocks.bos_id) == (10, 4, 0)
    assert (blocks.range("train"), blocks.range("eval")) == ((0, 7), (7, 10))
    assert blocks.range("test") == (10, 10)
    for start in range(10):
        for stop in range(start + 1, 11):
            found, owners = blocks.read(start, stop)
            assert np.array_equal(found, tokens[start:stop])
            assert np.array_equal(owners, -tokens[start:stop])


def test_a_table_is_no_corpus(tmp_path):
    tables.write_table(tmp_path / "t.parquet", pa.table({"x": [1]}), {"stage": "x", "inputs": {}})
    with pytest.raises(RetraceError, match=r"t\.parquet: is not a corpus"):
        Blocks(tmp_path / "t.parquet")


@pytest.mark.parametrize("name", ["../elsewhere.parquet", "/dev/zero", "a/../../b"])
def test_a_manifest_that_names_a_file_outside_its_folder(tmp_path, name):
    entry = {"file": name, "split": "train", "rows": 1, "mean_norm": 1.0}
    about = {"d_model": 4, "dtype": "float16", "rows": {"train": 1}, "mean_norm": 1.0}
    manifest = {"hooks": {"h": {**about, "shards": [entry]}}, "files": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RetraceError, match="leads out of"):
        Rows(tmp_path / "manifest.json", "h")
