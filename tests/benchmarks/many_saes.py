"""Many dictionaries on one stream: what reading, shuffling, normalising and start-up cost beside
the dictionaries' own steps, and what memory does when the store grows.

    python tests/benchmarks/many_saes.py                      d_in 576, d_sae 4608, k 32
    python tests/benchmarks/many_saes.py --d-sae 1152 --n-rows 50000
    python tests/benchmarks/many_saes.py --divide --counts 1 4 16 64 --n-rows 65536 --epochs 4
    python tests/benchmarks/many_saes.py --divide --counts 1 4 16 64 --n-rows 65536 --epochs 80 \
        --device cuda --d-in 768 --d-sae 24576

Each number is one whole job of stage sae, `python -m pipeline sae` with its imports, on a store
that is made up here. ours: seconds of one job that trains n dictionaries. peer: n times the seconds
of a job that trains one. floor: the seconds inside the n dictionaries' steps; wanted is a job of 20
that spends at most a tenth elsewhere. With --divide a job of n is shown an n-th of the rows, at
least eight batches, and only throughput and memory are told.
Throughput: rows a second times n while training, without start-up and writing, with that of the
fewest dictionaries as peer; floor: the encoder's products at the measured rate of a product.
Memory: each job's peak, of the GPU where there is one; and the peak on a store four times as long,
with that on the store itself as peer.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import ROOT, Row, arguments, matmul_rate, median, report

HOOK = "blocks.0.hook_resid_post"
# As rules/common.smk sets them: what is freed stays with the process.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}


def child() -> None:
    """One job in this process; its cost is the last line of what it prints."""
    import resource
    import time

    import torch

    from pipeline.job import cli
    from pipeline.sae import sae
    from pipeline.sae.train import Dictionary

    inside, step, train, trained = [0.0], Dictionary.step, sae.train, [0.0]

    def timed(self, *args):
        started = time.perf_counter()
        out = step(self, *args)
        inside[0] += time.perf_counter() - started
        return out

    def timed_train(*args, **more):
        started = time.perf_counter()
        train(*args, **more)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        trained[0] += time.perf_counter() - started

    Dictionary.step, sae.train = timed, timed_train
    sae.main()
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    if torch.cuda.is_initialized():
        used = torch.cuda.max_memory_reserved()
    cost = {
        "seconds": cli._seconds_since_start(),
        "steps": inside[0],
        "training": trained[0],
        "mib": used / 2**20,
    }
    print(json.dumps(cost))


def store(
    folder: Path, n_rows: int, d_in: int, shard_rows: int = 16_384, dtype: str = "float32"
) -> Path:
    """An activations item of rows that are sums of 20 of 4 d_in directions; its manifest."""
    import numpy as np
    from sae_cpu import batch

    from pipeline.store import chunks, provenance, tables

    x = batch(min(n_rows, shard_rows), d_in).numpy().astype(dtype)
    norm, entries, files = float(np.linalg.norm(x.astype(np.float32), axis=1).mean()), [], {}
    for at in range(0, n_rows, shard_rows):
        rows = x[: n_rows - at]
        index = np.arange(at, at + len(rows), dtype=np.int32)
        columns = dict.fromkeys(("document", "block", "position", "token"), index)
        name = f"shards/{HOOK}/part-{len(entries):05d}.parquet"
        tables.write_shard(folder / name, rows, columns, dtype, {"hook": HOOK})
        entry = {"file": name, "split": "train", "rows": len(rows), "mean_norm": norm}
        entries.append(entry | {"footer": chunks.tail_sha256(folder / name)})
        files[name] = provenance.sha256_file(folder / name)
    about = {
        "d_model": d_in, "dtype": dtype, "rows": {"train": n_rows}, "mean_norm": norm,
        "max_norm": 0, "shards": entries,
    }  # fmt: skip
    item = {"skip_first": 1, "prepend_bos": True, "n_ctx": 128, "corpus": "made_up/t"}
    item["model"] = "made_up/model.json"
    tables.write_json(folder / "manifest.json", item | {"hooks": {HOOK: about}, "files": files}, {})
    return folder / "manifest.json"


def rows_of(args, n: int) -> int:
    """What a job of n dictionaries is shown: whole batches."""
    rows = args.epochs * args.n_rows // (n if args.divide else 1)
    return max(rows // args.batch_size, 8 if args.divide else 1) * args.batch_size


def precision(args) -> str:
    """Of the dictionaries' products."""
    return "bfloat16" if args.device == "cuda" else "float32"


def run(args, manifest: Path, n: int, out: Path) -> dict:
    """Seconds, seconds of steps and peak MiB of a job of n dictionaries."""
    one = {"architecture": "topk", "d_sae": args.d_sae, "k": args.k, "hook": HOOK}
    training = {
        "n_rows": rows_of(args, n),
        "batch_size": args.batch_size,
        "checkpoint_seconds": 1e9,
    }
    training["precision"] = precision(args)
    spec = {"hook": HOOK, "training": training}
    spec["dictionaries"] = {f"topk_{i}": one | {"seed": i} for i in range(n)}
    command = [sys.executable, __file__, "--child", "--spec", json.dumps({"sae": spec})]
    command += ["--activations", manifest, "--out", out / "manifest.json", "--saes", out / "saes"]
    command += ["--history", out / "history.parquet", "--device", args.device]
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
    parser.add_argument("--divide", action="store_true", help="an n-th of the rows for a job of n")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
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
    rows, single = [], found[args.counts[0]]
    if not args.divide:
        rows += [of_count(args, n, found[n], single) for n in sorted(found, reverse=True)]
    products = matmul_rate(args.device, precision(args)) / (2 * args.d_in * args.d_sae)
    for n in sorted(found):
        rows += scaling(args, n, found[n], single, products)
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
    report("many_saes", rows, args.out, args.device)
    return None


def scaling(args, n: int, jobs: list[dict], single: list[dict], products: float) -> list[Row]:
    """Throughput and peak memory of a job of n dictionaries, against the job of the fewest."""
    speed = [n * rows_of(args, n) / job["training"] for job in jobs]
    first = args.counts[0]
    alone = [first * rows_of(args, first) / job["training"] for job in single]
    gib = [job["mib"] / 1024 for job in jobs]
    where = "GPU memory" if args.device == "cuda" else "memory"
    return [
        Row(f"{n} dictionaries, throughput", median(speed), "rows/s x dictionaries", median(alone),
            f"{first} of them", products, "products alone", runs={"ours": speed}),
        Row(f"{n} dictionaries, peak {where}", median(gib), "GiB",
            median([job["mib"] / 1024 for job in single]), f"{first} of them",
            higher_is_better=False, runs={"ours": gib}),
    ]  # fmt: skip


def of_count(args, n: int, jobs: list[dict], single: list[dict]) -> Row:
    """A job of n dictionaries against n jobs of one, and against its own steps."""
    return Row(
        case=f"{n} dictionaries in one job",
        ours=median([job["seconds"] for job in jobs]),
        units="s",
        peer=n * median([job["seconds"] for job in single]),
        peer_name=f"{n} jobs of one",
        floor=median([job["steps"] for job in jobs]) if args.device == "cpu" else None,
        floor_name="the steps alone",  # which a GPU does while the next are given to it
        target="share_of_floor >= 0.9" if n >= 20 and args.device == "cpu" else "",
        higher_is_better=False,
        runs={key: [job[key] for job in jobs] for key in ("seconds", "steps", "mib")},
    )


if __name__ == "__main__":
    main()
