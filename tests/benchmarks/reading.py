"""How long training waits for rows, out of a store larger than the memory that it may use.

    python tests/benchmarks/reading.py                    4 GiB of float16 at 576, 2 GiB of memory
    python tests/benchmarks/reading.py --device cuda --d-in 768 --d-sae 24576 --gib 12 --memory 6 \
        --dictionaries 1 4

ours     percent of an epoch's time in which no batch is there; every chunk of a shard is compared
         with its sha256 when it is first read, and that is included. On a CPU the time until the
         stream gives a batch, its choosing and scaling included; with a GPU what the epoch takes
         longer than its steps on batches that lie there
floor    the epoch's bytes at the rate of reading a file from the disk, as a percentage of that time
ratio    the rate at which the stream alone gives batches, nothing trained on them, to that rate

Shards are dropped from the page cache before. The memory of the child that trains is limited by a
cgroup; where none can be made its shards are dropped twice a second. The case says which.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness import Row, arguments, median, report, waits
from many_saes import HOOK, MALLOC, store


def dropped(folder: Path) -> None:
    """Drop a store's files from the page cache."""
    for path in folder.rglob("*.parquet"):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def read_rate(folder: Path, n: int = 16) -> float:
    """Bytes a second of reading some files that are not in the page cache."""
    dropped(folder)
    paths = sorted(folder.rglob("*.parquet"))[:n]
    started = time.perf_counter()
    size = sum(len(path.read_bytes()) for path in paths)
    return size / (time.perf_counter() - started)


@contextmanager
def limited(gib: float) -> Iterator[Path | None]:
    """The file that takes the ids of processes whose memory, page cache too, is limited; or None.

    A cgroup below this process's own, of version 1 or 2.
    """
    groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    base, limit = None, "memory.max"
    for _, controllers, path in groups:
        if controllers == "memory":
            base, limit = Path("/sys/fs/cgroup/memory" + path), "memory.limit_in_bytes"
        elif not controllers and base is None:
            base = Path("/sys/fs/cgroup" + path)
    group = (base or Path("/none")) / f"retrace_reading_{os.getpid()}"
    try:
        group.mkdir()
        (group / limit).write_text(str(int(gib * 2**30)))
    except OSError:
        if group.exists():
            group.rmdir()
        yield None
        return
    try:
        yield group / "cgroup.procs"
    finally:
        group.rmdir()


def child(given: dict) -> dict:
    """Train for one epoch; what it took, and how long a batch was waited for."""
    import torch

    from pipeline.sae.sparse import Scratch
    from pipeline.sae.stream import Stream
    from pipeline.sae.train import Dictionary, build
    from pipeline.spec.sae import SaeSpec, SaeTraining
    from pipeline.store.shards import Rows

    torch.set_num_threads(given["threads"])
    batch, device, wait = given["batch_size"], given["device"], waits(given["device"])
    half = device == "cuda"
    rows = Rows(given["manifest"], HOOK)
    n_steps = rows.n_rows // batch
    training = SaeTraining(  # no latent dies: AuxK would hide waiting
        n_rows=n_steps * batch, batch_size=batch, precision="bfloat16" if half else "float32",
        dead_rows=n_steps * batch,
    )  # fmt: skip
    stream = Stream(
        rows, batch_size=batch, buffer_rows=training.buffer_rows, seed=0, normalize=True,
        device=device,
    )  # fmt: skip
    scratch, dictionaries = Scratch(half), []
    for i in range(given["dictionaries"]):
        spec = SaeSpec(architecture="topk", d_sae=given["d_sae"], k=given["k"], seed=i)
        sae = build(spec, rows.d_model).to(device)
        dictionaries.append(Dictionary(str(i), sae, training, n_steps))

    def step(x, i: int) -> None:
        for dictionary in dictionaries:
            dictionary.step(x, i, scratch)

    if given["dictionaries"] == 0:  # reading alone
        began = time.perf_counter()
        for _ in stream.batches(0, n_steps):
            wait()
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "rows": n_steps * batch}
    held = [torch.randn(batch, rows.d_model, device=device) for _ in range(8)]
    for i in range(8 if half else 1):
        step(held[i], i)
    wait()
    began = time.perf_counter()
    for i in range(64 if half else 0):
        step(held[i % 8], i)
    wait()
    alone = (time.perf_counter() - began) / 64
    waited, began = [], time.perf_counter()
    batches = stream.batches(0, n_steps)
    for i in range(n_steps):
        asked = time.perf_counter()
        x = next(batches)
        waited.append(time.perf_counter() - asked)
        step(x, i)
    wait()
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "rows": n_steps * batch,
        "first": waited[0],
        "waited": max(seconds - n_steps * alone, 0) if half else sum(waited),
    }


def epoch(args, manifest: Path, n: int, tasks: Path | None) -> dict:
    """What `child` measured with n dictionaries, in a process of its own."""
    given = {key: getattr(args, key) for key in ("batch_size", "device", "threads", "d_sae", "k")}
    given |= {"manifest": str(manifest), "dictionaries": n}
    dropped(manifest.parent)
    process = subprocess.Popen(
        [sys.executable, __file__, "--child", json.dumps(given)], stdout=subprocess.PIPE, text=True,
        env=os.environ | MALLOC,
        preexec_fn=(lambda: tasks.write_text(str(os.getpid())) and None) if tasks else None,
    )  # fmt: skip
    done = threading.Event()

    def dropping() -> None:
        while not done.wait(0.5):
            dropped(manifest.parent)

    if tasks is None:
        threading.Thread(target=dropping, daemon=True).start()
    said, _ = process.communicate()
    done.set()
    if process.returncode:
        sys.exit(f"training failed with {process.returncode}")
    return json.loads(said.splitlines()[-1])


def row(args, found: list[dict], n: int, rate: float, how: str) -> Row:
    """The share of n dictionaries."""
    share = [100 * one["waited"] / one["seconds"] for one in found]
    seconds = median([one["seconds"] for one in found])
    speed = median([one["rows"] / one["seconds"] for one in found])
    first = median([one["first"] for one in found])
    read = found[0]["rows"] * args.d_in * 2 / rate
    return Row(
        f"{n} dictionaries of {args.d_sae}, {args.gib:g} GiB, {how}, {speed:,.0f} rows/s, "
        f"first batch after {first:.1f} s",
        median(share), "% of the time", floor=100 * read / seconds,
        floor_name=f"reading at {rate / 1e9:.2f} GB/s", target="ours <= 5", higher_is_better=False,
        runs={"share": share, "seconds": [one["seconds"] for one in found]},
    )  # fmt: skip


def alone(args, found: list[dict], rate: float, how: str) -> Row:
    """The stream's rate without training, beside the disk's."""
    size = found[0]["rows"] * args.d_in * 2
    rates = [size / one["seconds"] / 1e6 for one in found]
    return Row(
        f"reading alone, verified, {args.gib:g} GiB, {how}", median(rates), "MB/s",
        peer=rate / 1e6, peer_name="the disk, by a file", target="ratio >= 0.95",
        runs={"rate": rates},
    )  # fmt: skip


def main() -> None:
    if "--child" in sys.argv:
        print(json.dumps(child(json.loads(sys.argv[-1]))))
        return
    parser = arguments(__doc__)
    parser.set_defaults(repeats=1)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--gib", type=float, default=4, help="of the store")
    parser.add_argument("--memory", type=float, default=2, help="GiB of the child")
    parser.add_argument("--d-in", type=int, default=576)
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--dictionaries", type=int, nargs="+", default=[1])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    rows = []
    with (
        tempfile.TemporaryDirectory(dir=args.work) as folder,
        limited(args.memory) as tasks,
    ):
        n_rows = int(args.gib * 2**30 / (2 * args.d_in))
        manifest = store(Path(folder), n_rows, args.d_in, dtype="float16")
        rate = read_rate(Path(folder))
        how = f"{args.memory:g} GiB by a cgroup" if tasks else "shards dropped twice a second"
        for n in args.dictionaries:
            found = [epoch(args, manifest, n, tasks) for _ in range(args.repeats)]
            rows.append(row(args, found, n, rate, how))
        found = [epoch(args, manifest, 0, tasks) for _ in range(args.repeats)]
        rows.append(alone(args, found, rate, how))
    report("reading", rows, args.out, args.device)


if __name__ == "__main__":
    main()
