"""Bringing in a published dictionary: time against copying its file, and memory against its size.

    python tests/benchmarks/import_sae.py                 65,536 latents on rows of 2,304, 1.2 GB
    python tests/benchmarks/import_sae.py --d-sae 16384

ours     GB/s of stage sae_import, from the published params.npz to the sealed item in the store:
         read, checked for NaN, hashed, written, read again and compared with the original. What the
         process does before (imports, modules of the model) is timed alone on a dictionary of 64
         latents, and left out
digests  GB/s of the four SHA-256 that an item has (published file, tensors, seal, written file),
         the last three of which follow each other: what an import cannot beat, whatever the disk
floor    GB/s of `cp` of the same file and fsync, in turn with it; ours syncs, too
memory   the peak of the process less the peak on 64 latents, in sizes of the file
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import ROOT, Row, arguments, median, report

sys.path.insert(0, str(ROOT / "tests"))

HOOK = "blocks.1.hook_resid_post"
SMALL = 64


def model(folder: Path, d: int) -> Path:
    """A store item of a GPT-2 of two layers, as far as an import looks at it."""
    from transformers import GPT2Config

    from pipeline.store import tables

    GPT2Config(vocab_size=64, n_embd=d, n_layer=2, n_head=4).save_pretrained(folder / "checkpoint")
    about = {"n_ctx": 1024, "bos_id": 0}
    tables.write_json(folder / "model.json", about, {"stage": "model", "inputs": {}})
    return folder / "model.json"


def published(folder: Path, d: int, n: int) -> Path:
    """params.npz of Gemma Scope's layout, of random numbers."""
    import numpy as np

    draw = np.random.default_rng(0)
    shapes = {"W_enc": (d, n), "W_dec": (n, d), "b_enc": (n,), "b_dec": (d,), "threshold": (n,)}
    folder.mkdir(parents=True)
    np.savez(
        folder / "params.npz",
        **{k: draw.standard_normal(s, dtype=np.float32) for k, s in shapes.items()},
    )
    return folder / "params.npz"


def brought(model_json: Path, file: Path, out: Path) -> tuple[float, float]:
    """Seconds of work and GiB of memory of the stage, as its log gives them."""
    import json

    job = {"name": "x", "source": "folder", "format": "gemma_scope", "path": str(file)}
    spec = json.dumps({"import": job | {"hook": HOOK}})
    command = [sys.executable, "-m", "pipeline", "sae_import", "--spec", spec, "--threads", "2"]
    command += ["--model", str(model_json), "--out", str(out / "manifest.json")]
    done = subprocess.run(
        [*command, "--saes", str(out / "saes")], cwd=ROOT, capture_output=True, text=True
    )
    found = re.search(r"done: ([\d.]+) s of work.*peak ([\d.]+) GiB", done.stderr)
    if done.returncode or not found:
        sys.exit(done.stderr)
    shutil.rmtree(out)
    return float(found[1]), float(found[2])


def copied(file: Path) -> float:
    """Seconds of a copy."""
    started = time.perf_counter()
    subprocess.run(["cp", str(file), f"{file}.copy"], check=True)
    with open(f"{file}.copy", "rb+") as f:
        os.fsync(f.fileno())
    took = time.perf_counter() - started
    Path(f"{file}.copy").unlink()
    return took


def hashed(file: Path) -> float:
    """Seconds of the three digests that cannot be taken at once."""
    started = time.perf_counter()
    for _ in range(3):
        with open(file, "rb") as f:
            hashlib.file_digest(f, "sha256")
    return time.perf_counter() - started


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--d-sae", type=int, default=65_536)
    parser.add_argument("--d-in", type=int, default=2304)
    parser.add_argument("--folder", help="where the files lie; default: the system's")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as root:
        folder = Path(root)
        model_json = model(folder / "model", args.d_in)
        small = published(folder / "small", args.d_in, SMALL)
        file = published(folder / "whole", args.d_in, args.d_sae)
        gb, runs, memory = file.stat().st_size / 1e9, {"ours": [], "digests": [], "cp": []}, []
        for _ in range(args.repeats):
            base = brought(model_json, small, folder / "out")
            whole = brought(model_json, file, folder / "out")
            runs["ours"].append(gb / max(whole[0] - base[0], 1e-9))
            runs["digests"].append(gb / hashed(file))
            runs["cp"].append(gb / copied(file))
            memory.append((whole[1] - base[1]) * 2**30 / 1e9 / gb)
    case = f"{args.d_sae:,} latents, d_in {args.d_in}, {gb:.2f} GB"
    report(
        "import_sae",
        [
            Row(case, median(runs["ours"]), "GB/s", peer=median(runs["digests"]),
                peer_name="digests alone", floor=median(runs["cp"]), floor_name="cp and fsync",
                target="share_of_floor >= 0.7", runs=runs),
            Row("digests alone", median(runs["digests"]), "GB/s", floor=median(runs["cp"]),
                floor_name="cp and fsync", runs={"digests": runs["digests"]}),
            Row("memory", median(memory), "sizes of the file", target="ours <= 2",
                higher_is_better=False, runs={"ours": memory}),
        ],
        args.out,
    )  # fmt: skip


if __name__ == "__main__":
    main()
