"""Many dictionaries on one stream: what reading, shuffling, normalising and start-up cost beside
the dictionaries' own steps, and what memory does when the store grows.

    python tests/benchmarks/many_saes.py                      d_in 576, d_sae 4608, k 32
    python tests/benchmarks/many_saes.py --d-sae 1152 --n-rows 50000

Each number is one whole job of stage sae, `python -m pipeline.sae` with its imports, on a store
that is made up here. ours: seconds of one job that trains n dictionaries. peer: n times the seconds
of a job that trains one. floor: the seconds inside the n dictionaries' steps; wanted is a job of 20
that spends at most a tenth elsewhere. Memory: the job's peak on a store four times as long, with
that on the store itself as peer.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import ROOT, Row, arguments, median, report

HOOK = "blocks.0.hook_resid_post"
# As rules/common.smk sets them: what is freed stays with the process.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}


def child() -> None:
    """One job in this process; its cost is the last line of what it prints."""
    import resource
    import time

    from pipeline import cli, sae
    from pipeline.sae_train import Dictionary

    inside, step = [0.0], Dictionary.step

    def timed(self, *args):
        started = time.perf_counter()
        out = step(self, *args)
        inside[0] += time.perf_counter() - started
        return out

    Dictionary.step = timed
    sae.main()
    cost = {
        "seconds": cli._seconds_since_start(),
        "steps": inside[0],
        "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(cost))


def store(folder: Path, n_rows: int, d_in: int, shard_rows: int = 16_384) -> Path:
    """An activations item of rows that are sums of 20 of 4 d_in directions; its manifest."""
    import numpy as np
    from sae_cpu import batch

    from pipeline import provenance, tables

    x = batch(min(n_rows, shard_rows), d_in).numpy()
    norm, entries, files = float(np.linalg.norm(x, axis=1).mean()), [], {}
    for at in range(0, n_rows, shard_rows):
        rows = x[: n_rows - at]
        index = np.arange(at, at + len(rows), dtype=np.int32)
        columns = dict.fromkeys(("document", "block", "position", "token"), index)
        name = f"shards/{HOOK}/part-{len(entries):05d}.parquet"
        tables.write_shard(folder / name, rows, columns, "float32", {"hook": HOOK})
        entries.append({"file": name, "split": "train", "rows": len(rows), "mean_norm": norm})
        files[name] = provenance.sha256_file(folder / name)
    about = {
        "d_model": d_in, "dtype": "float32", "rows": {"train": n_rows}, "mean_norm": norm,
        "max_norm": 0, "shards": entries,
    }  # fmt: skip
    item = {"skip_first": 1, "n_ctx": 128, "model": "made_up/model.json", "corpus": "made_up/t"}
    tables.write_json(folder / "manifest.json", item | {"hooks": {HOOK: about}, "files": files}, {})
    return folder / "manifest.json"


def run(args, manifest: Path, n: int, out: Path) -> dict:
    """Seconds, seconds of steps and peak MiB of a job of n dictionaries."""
    one = {"architecture": "topk", "d_sae": args.d_sae, "k": args.k, "hook": HOOK}
    n_rows = args.epochs * args.n_rows
    training = {"n_rows": n_rows, "batch_size": args.batch_size, "checkpoint_seconds": 1e9}
    spec = {"hook": HOOK, "training": training}
    spec["dictionaries"] = {f"topk_{i}": one | {"seed": i} for i in range(n)}
    command = [sys.executable, __file__, "--child", "--spec", json.dumps({"sae": spec})]
    command += ["--activations", manifest, "--out", out / "manifest.json", "--saes", out / "saes"]
    command += ["--history", out / "history.parquet", "--device", "cpu"]
    command += ["--threads", args.threads]
    done = subprocess.run(
        [str(part) for part in command], cwd=ROOT, env=os.environ | MALLOC,
        stdout=subprocess.PIPE, check=True, text=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    if "--child" in sys.argv:
        sys.argv.remove("--child")
        return child()
    parser = arguments(__doc__)
    parser.set_defaults(repeats=1)
    parser.add_argument("--d-in", type=int, default=576)
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--n-rows", type=int, default=100_000, help="of the store")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 4, 16, 20])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        short = store(at / "short", args.n_rows, args.d_in)
        long = store(at / "long", 4 * args.n_rows, args.d_in)
        found = {
            n: [run(args, short, n, at / f"out{n}") for _ in range(args.repeats)]
            for n in args.counts
        }
        memory = {
            "ours": [run(args, long, 1, at / "out")["mib"] for _ in range(args.repeats)],
            "peer": [cost["mib"] for cost in found[args.counts[0]]],
        }
    rows = [of_count(n, found[n], found[args.counts[0]]) for n in sorted(found, reverse=True)]
    rows.append(
        Row(
            case="peak memory, 4 times the rows",
            ours=median(memory["ours"]),
            units="MiB",
            peer=median(memory["peer"]),
            peer_name="the rows once",
            target="ratio >= 0.95",
            higher_is_better=False,
            runs=memory,
        )
    )
    report("many_saes", rows, args.out)
    return None


def of_count(n: int, jobs: list[dict], single: list[dict]) -> Row:
    """A job of n dictionaries against n jobs of one, and against its own steps."""
    return Row(
        case=f"{n} dictionaries in one job",
        ours=median([job["seconds"] for job in jobs]),
        units="s",
        peer=n * median([job["seconds"] for job in single]),
        peer_name=f"{n} jobs of one",
        floor=median([job["steps"] for job in jobs]),
        floor_name="the steps alone",
        target="share_of_floor >= 0.9" if n >= 20 else "",
        higher_is_better=False,
        runs={key: [job[key] for job in jobs] for key in ("seconds", "steps", "mib")},
    )


if __name__ == "__main__":
    main()
