"""A corpus larger than the address space that its stage may use (`ulimit -v`, as clusters set it).

The bound is what the stage takes for a small corpus, and a part of what the large one's tokens and
documents take on disk: whoever maps these, or holds them, does not get by.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import environment
from test_hub_corpus import tokenizer_at

from pipeline.store import tables
from pipeline.store.shards import Blocks
from pipeline.text.corpus import ROW_GROUP, block_schema

# Of the large corpus: 8 bytes a token, for its id and for its document.
N_TOKENS, LENGTH = 12_000_000, 20_000
ROOM = 4 * N_TOKENS  # bytes beyond what the small one takes: half of that
STAGE = """
import re, resource, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
from pipeline.text import corpus
corpus.main()
print(re.search(r"VmPeak:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""

READER = """
import re, resource, sys
from pipeline.store.shards import Blocks
import pyarrow.parquet, pyarrow.compute
limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
blocks = Blocks(sys.argv[1])
first, last = blocks.range("eval")
total = sum(int(blocks.read(i, i + 1)[0].sum()) for i in range(0, len(blocks), 512))
print(len(blocks), first, last, total)
print(re.search(r"VmPeak:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


def token_ids(start: int, n: int) -> np.ndarray:
    """Ids below 256, as spread over them as text never is."""
    return (np.arange(start, start + n, dtype=np.int64) * 2654435761 >> 7 & 255).astype(np.int32)


def pretokenised(file: Path, n_tokens: int) -> Path:
    """Documents of LENGTH token ids."""
    schema = pa.schema({"ids": pa.list_(pa.int32())})
    with pq.ParquetWriter(file, schema, compression="none") as out:
        for start in range(0, n_tokens, 50 * LENGTH):
            n = min(50 * LENGTH, n_tokens - start)
            offsets = pa.array(np.arange(0, n + 1, LENGTH, dtype=np.int32))
            ids = pa.ListArray.from_arrays(offsets, pa.array(token_ids(start, n)))
            out.write_table(pa.Table.from_arrays([ids], schema=schema))
    return file


def made(folder: Path, model_json: Path, n_tokens: int, limit: int, **over) -> tuple[Path, int]:
    """(tokens.parquet, bytes of address space at most) of the stage under a limit; -1: none."""
    folder.mkdir()
    text = {"source": "local", "path": str(pretokenised(folder / "in.parquet", n_tokens)),
            "tokens_column": "ids", "n_ctx": 1024, "n_tokens": 0,
            "close_documents": False}  # fmt: skip
    command = [sys.executable, "-c", STAGE, str(limit), "--threads", "1"]
    command += ["--spec", json.dumps({"corpus": text | over}), "--tokenizer", str(model_json)]
    command += ["--out", str(folder / "tokens.parquet")]
    command += ["--documents", str(folder / "documents.parquet")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "tokens.parquet", 1024 * int(done.stdout.split()[-1])


@pytest.mark.workflow
@pytest.mark.parametrize(
    "over",
    [
        pytest.param({"n_eval_tokens": 1024 * 1024}, id="documents"),
        pytest.param({"split": "tail"}, id="tail", marks=pytest.mark.slow),
    ],
)
def test_a_corpus_larger_than_the_address_space(over, tmp_path):
    model_json = tokenizer_at(tmp_path / "tokenizer")
    _, taken = made(tmp_path / "small", model_json, N_TOKENS // 6, -1, **over)
    file, _ = made(tmp_path / "large", model_json, N_TOKENS, taken + ROOM, **over)
    blocks = Blocks(file)
    assert len(blocks) * 1024 > 0.99 * N_TOKENS
    if over.get("split") == "tail":  # the blocks are the text, each behind a BOS
        for at in (0, len(blocks) // 2, len(blocks) - 1):
            tokens, _ = blocks.read(at, at + 1)
            assert np.array_equal(tokens[0, 1:], token_ids(1023 * at, 1023))


def stored(file: Path, n_blocks: int, n_ctx: int = 128) -> np.ndarray:
    """A tokens.parquet whose numbers no codec makes smaller; its tokens, [n_blocks n_ctx]."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 2**31, (n_blocks, n_ctx), dtype=np.int32) for _ in range(2)]
    offsets = pa.array(np.arange(n_blocks + 1, dtype=np.int32) * n_ctx)
    lists = [pa.ListArray.from_arrays(offsets, pa.array(x.ravel())) for x in ids]
    n_eval = n_blocks // 10
    splits = pa.array(["train"] * (n_blocks - n_eval) + ["eval"] * n_eval)
    columns = [pa.array(range(n_blocks), pa.int32()), splits, *lists]
    table = pa.Table.from_arrays(columns, schema=block_schema())
    about = {"n_ctx": n_ctx, "prepend_bos": False, "bos_id": None}
    tables.write_table(file, table, about, ROW_GROUP)
    return ids[0]


def read_back(file: Path, limit: int) -> tuple[list[int], int]:
    """(blocks, the span of eval and a sum of tokens; bytes of address space) under a limit."""
    command = [sys.executable, "-c", READER, str(file), str(limit)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, peak = done.stdout.splitlines()
    return [int(x) for x in said.split()], 1024 * int(peak)


def test_blocks_of_a_corpus_larger_than_the_address_space(tmp_path):
    """The bound is what reading a small corpus takes, and a quarter of the large one's file."""
    stored(tmp_path / "small.parquet", 4 * ROW_GROUP)
    _, taken = read_back(tmp_path / "small.parquet", -1)
    file = tmp_path / "large.parquet"
    tokens = stored(file, 64 * ROW_GROUP)
    size = file.stat().st_size
    assert size > 60 * 2**20
    found, _ = read_back(file, taken + size // 4)
    n = len(tokens)
    assert found == [n, n - n // 10, n, int(tokens[::512].sum(dtype=np.int64))]
