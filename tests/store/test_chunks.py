"""A shard's digests by chunk: what is read is verified, once, and nothing else is."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.errors import RetraceError
from pipeline.store import chunks, provenance, shards, tables
from pipeline.store.shards import Rows

HOOK, D, ROWS = "blocks.0.hook_resid_post", 64, 3000  # 384 KB, six chunks and a bit


@pytest.fixture
def manifest(tmp_path) -> Path:
    """Two shards with digests by chunk."""
    acts = np.random.default_rng(0).normal(size=(2 * ROWS, D)).astype(np.float16)
    entries, files = [], {}
    for i in range(2):
        name = f"shards/{HOOK}/part-{i:05d}.parquet"
        columns = {c: np.arange(ROWS, dtype=np.int32) + i * ROWS for c in shards.COLUMNS}
        part = acts[i * ROWS : (i + 1) * ROWS]
        files[name] = tables.write_shard(tmp_path / name, part, columns, "float16", {"hook": HOOK})
        entry = {"file": name, "split": "train", "rows": ROWS, "mean_norm": 1.0}
        entries.append(entry | {"footer": chunks.tail_sha256(tmp_path / name)})
    about = {"d_model": D, "dtype": "float16", "rows": {"train": 2 * ROWS}, "mean_norm": 1.0}
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({"hooks": {HOOK: about | {"shards": entries}}, "files": files}))
    return path


def flip(manifest: Path, at: int, i: int = 0) -> None:
    """Change a bit of a shard; `at` counts from the end where it is negative."""
    path = manifest.parent / f"shards/{HOOK}/part-{i:05d}.parquet"
    changed = bytearray(path.read_bytes())
    changed[at] ^= 1
    path.write_bytes(changed)


def test_the_digests_are_those_of_the_file_before_its_footer(manifest):
    path = manifest.parent / f"shards/{HOOK}/part-00000.parquet"
    whole = path.read_bytes()
    body = whole[: -chunks.tail_length(path)]
    said = pq.read_metadata(path).metadata[chunks.KEY.encode()].decode()
    cut = [body[i : i + chunks.CHUNK] for i in range(0, len(body), chunks.CHUNK)]
    found = chunks.Chunks(np.frombuffer(whole, np.uint8), said)
    assert found._sha256 == b"".join(hashlib.sha256(c).digest() for c in cut)
    assert len(found.left) == len(cut) == 7
    files = json.loads(manifest.read_text())["files"]
    assert files[f"shards/{HOOK}/part-00000.parquet"] == provenance.sha256_bytes(whole)


def test_a_changed_bit_is_found_where_it_is_read_and_only_there(manifest):
    flip(manifest, 1000 * D * 2)
    rows = Rows(manifest, HOOK)
    rows.read(0, 400)
    rows.read(2000, 2 * ROWS)
    for reader in (rows, rows.again()):
        with pytest.raises(RetraceError, match=r"part-00000\.parquet: truncated or altered"):
            reader.read(990, 1010)
    Rows(manifest, HOOK, verify=False).read(990, 1010)


@pytest.mark.parametrize("start, stop", [(0, 400), (990, 1010), (2990, 3010), (0, 2 * ROWS)])
@pytest.mark.parametrize("wide", [False, True])
def test_rows_are_copied_as_they_are_read(manifest, start, stop, wide):
    """Into rows of their own, or into columns of wider ones; with and without the map."""
    raw, columns = Rows(manifest, HOOK).read(start, stop)
    for file in (True, False):
        rows = Rows(manifest, HOOK)
        if not file:
            for i in range(2):
                rows._open[i] = rows._opened(i)._replace(file=None)
        out = np.zeros((stop - start, D + 7 * wide), np.float16)
        found = rows.read_into(start, stop, out[:, 7:] if wide else out)
        assert np.array_equal(out[:, 7 * wide :], raw) and not out[:, : 7 * wide].any()
        assert all(np.array_equal(found[c], columns[c]) for c in shards.COLUMNS)


def test_a_change_is_found_before_rows_are_copied(manifest):
    flip(manifest, 2 * D * 1000 + 700)
    rows, out = Rows(manifest, HOOK), np.zeros((20, D), np.float16)
    rows.read_into(100, 120, out)
    with pytest.raises(RetraceError, match=r"part-00000\.parquet: truncated or altered"):
        rows.read_into(990, 1010, out)


def test_a_file_that_became_shorter_is_found_while_rows_are_copied(manifest):
    rows, out = Rows(manifest, HOOK, verify=False), np.zeros((20, D), np.float16)
    rows.read_into(100, 120, out)
    with open(manifest.parent / f"shards/{HOOK}/part-00000.parquet", "r+b") as f:
        f.truncate(2 * D * 1000)
    with pytest.raises(RetraceError, match=r"part-00000\.parquet: truncated or altered"):
        rows.read_into(2000, 2020, out)


@pytest.mark.parametrize("at", [-20, -8, -1, -600, -(16 * ROWS)])
def test_a_changed_footer_or_column_is_found_at_once(manifest, at):
    """The last lies in the columns beside the rows."""
    flip(manifest, at)
    with pytest.raises(RetraceError, match=r"part-00000\.parquet: truncated or altered"):
        Rows(manifest, HOOK).read(0, 1)


@pytest.mark.parametrize("copied", [False, True])
def test_every_byte_is_hashed_once_a_process(manifest, monkeypatch, copied):
    hashed = []
    real = hashlib.sha256

    def counting(data=b""):
        hashed.append(len(data))
        return real(data)

    monkeypatch.setattr(chunks.hashlib, "sha256", counting)
    rows = Rows(manifest, HOOK)
    for start in range(0, 2 * ROWS, 500):
        rows.ahead(start, start + 500)
        if copied:
            rows.again().read_into(start, start + 500, np.empty((500, D), np.float16))
        else:
            rows.again().read(start, start + 500)
    body = sum(p.stat().st_size - chunks.tail_length(p) for p in manifest.parent.rglob("*.parquet"))
    large = [n for n in hashed if n > 2000]  # footers are shorter
    assert body == sum(large)
    hashed.clear()
    rows.read(0, 2 * ROWS)
    assert not [n for n in hashed if n > 2000]
