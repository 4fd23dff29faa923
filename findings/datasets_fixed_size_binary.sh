#!/usr/bin/env bash
# datasets 5.2.0 and pyarrow 26.0.1: FixedSizeBinary cells lose bytes in numpy format.
#
# Guess: a column of fixed_size_binary[4] gives four bytes a row in every format, as in arrow's.
# Seen:  numpy format makes it numpy's S4, which drops trailing zero bytes: rows come back 4, 2 and
#        0 bytes long. Activations stored as raw cells (two float16 a cell here) come back short
#        wherever the last values are zero, which they often are behind a ReLU. The arrow and
#        pandas formats, and no format, give all bytes.
# Here:  shards of activations are such cells. Read them with pyarrow, as pipeline.store.tables does.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1
cd "$work"
HF_HUB_OFFLINE=1 HF_HOME="$work/home" HF_DATASETS_DISABLE_PROGRESS_BARS=1 \
    "$work/venv/bin/python" -W ignore - << 'PYTHON'
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

acts = np.array([[1, 2], [3, 0], [0, 0]], np.float16)
cells = pa.array([row.tobytes() for row in acts], pa.binary(4))
pq.write_table(pa.table({"acts": cells}), "acts.parquet")
rows = Dataset.from_parquet("acts.parquet")
sizes = {
    "none": [len(cell) for cell in rows[:]["acts"]],
    "arrow": [len(cell) for cell in rows.with_format("arrow")[:]["acts"].to_pylist()],
    "pandas": [len(cell) for cell in rows.with_format("pandas")[:]["acts"]],
    "numpy": [len(cell) for cell in rows.with_format("numpy")[:]["acts"]],
}
for name, found in sizes.items():
    print(f"format {name}: {found} bytes in three cells of 4")
kept = [np.frombuffer(cell, np.float16).tolist() for cell in rows.with_format("numpy")[:]["acts"]]
print(f"as float16, out of numpy format: {kept}")
whole = [4, 4, 4]
as_told = sizes == {"none": whole, "arrow": whole, "pandas": whole, "numpy": [4, 2, 0]}
sys.exit(0 if as_told and kept == [[1, 2], [3], []] else "this has changed")
PYTHON
echo "as described: numpy format cuts trailing zero bytes"
