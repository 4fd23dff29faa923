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

from pipeline.store.shards import Blocks

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
