"""Rows a second on all GPUs beside one: many dictionaries, and one whose latents are divided.

    python tests/benchmarks/two_gpus.py              8 of 24,576 latents, one of 262,144; d_in 768
    python tests/benchmarks/two_gpus.py --device cpu --tiny     whether it runs, nothing else

many      pipeline.sae.train.train on a pool of batches, dictionary i on GPU i % n
one       steps of Dictionary on one GPU, and of SplitDictionary on all: TopK without AuxK

Peer is the same work on one GPU. Rows lie in a pool on the first. Before the clock starts, steps of
a small dictionary have to leave the same moments and the same loss, divided or not: two steps, and
eight, of which the last run as CUDA graphs. They are in float32: in bfloat16 two scores at the k-th
place are often equal, and either may be kept. On a CPU the kernels run in Triton's interpreter,
which needs Triton.
"""

import copy
import os
import sys
import time
from collections.abc import Iterator
from itertools import pairwise

if "cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from harness import Row, arguments, median, report

POOL = 8  # batches
# steps -> share by which moments may be off: in float32 the parts of a row are summed in another
# order, and Adam divides by gradients near zero, which enlarges that from step to step
CLOSE = {2: 1e-3, 8: 1e-2}


class Pool:
    """Batches of rows that are sums of 20 of 4 d_in directions, over and over."""

    target_scale = 1.0

    def __init__(self, batch_size: int, d_in: int, device: torch.device) -> None:
        self.batch_size = batch_size
        rng = torch.Generator(device).manual_seed(0)
        directions = torch.randn(4 * d_in, d_in, generator=rng, device=device)
        self.pool = []
        for _ in range(POOL):
            picked = torch.rand(batch_size, 20, generator=rng, device=device) ** 3
            x = directions[(picked * len(directions)).long()].sum(1)
            self.pool.append(x * d_in**0.5 / x.norm(dim=1).mean())

    def batches(self, first: int, last: int) -> Iterator[torch.Tensor]:
        yield from (self.pool[i % POOL] for i in range(first, last))


def built(d_sae: int, d_in: int, k: int, aux: float):
    """A TopK of SAELens on the CPU."""
    from pipeline.sae.train import build
    from pipeline.spec.sae import SaeSpec

    spec = SaeSpec(architecture="topk", d_sae=d_sae, k=k, aux_loss_coefficient=aux)
    return build(spec, d_in)


def training_of(batch_size: int, n_steps: int):
    from pipeline.spec.sae import SaeTraining

    return SaeTraining(
        n_rows=n_steps * batch_size, batch_size=batch_size, warmup_steps=0, dead_rows=10_000_000,
        precision="bfloat16",
    )  # fmt: skip


def wait(devices: list[torch.device]) -> None:
    for device in set(devices):
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def many(args, sae, devices: list[torch.device]) -> float:
    """Rows a second, times dictionaries, of one call of `train` after its first steps."""
    from pipeline.sae.train import Dictionary, train

    n_steps, stream = args.warm_up + args.steps, Pool(args.batch_size, args.d_in, devices[0])
    how = training_of(args.batch_size, n_steps)
    dictionaries = [
        Dictionary(f"d{i}", copy.deepcopy(sae).to(devices[i % len(devices)]), how, n_steps)
        for i in range(args.count)
    ]
    begun = []

    def progress(rows: int) -> None:
        if rows == args.warm_up * args.batch_size:
            wait(devices)
            begun.append(time.perf_counter())

    train(dictionaries, stream, n_steps, progress=progress)
    wait(devices)
    seconds = time.perf_counter() - begun[0]
    return args.count * args.steps * args.batch_size / seconds


def one_of(sae, devices: list[torch.device], batch_size: int, n_steps: int):
    """A dictionary in training, divided where there are several devices."""
    from pipeline.sae.split import SplitDictionary
    from pipeline.sae.train import Dictionary

    how, sae = training_of(batch_size, n_steps), copy.deepcopy(sae)
    if len(devices) > 1:
        return SplitDictionary("one", sae, how, n_steps, devices)
    return Dictionary("one", sae.to(devices[0]), how, n_steps)


def scratch_of(half: bool):
    from pipeline.sae.sparse import Scratch

    return Scratch(half)


def one(args, sae, devices: list[torch.device]) -> list[float]:
    """Rows a second of every run."""
    n_steps = args.warm_up + args.repeats * args.steps
    dictionary, scratch = (
        one_of(sae, devices, args.batch_size, n_steps),
        scratch_of(on_gpu(devices)),
    )
    stream, out = Pool(args.batch_size, args.d_in, devices[0]), []
    edges = [0, *range(args.warm_up, n_steps + 1, args.steps)]
    for first, last in pairwise(edges):
        wait(devices)
        started = time.perf_counter()
        for i, x in enumerate(stream.batches(first, last), first):
            dictionary.step(x, i, scratch)
        wait(devices)
        out.append((last - first) * args.batch_size / (time.perf_counter() - started))
    dictionary.check()
    return out[1:]


def on_gpu(devices: list[torch.device]) -> bool:
    return devices[0].type == "cuda"


def same_results(args, devices: list[torch.device]) -> None:
    """Moments and loss of a small dictionary, divided and not, after a few steps."""
    batch_size, d_in, d_sae = (16, 8, 64) if args.tiny else (1024, 256, 16_384)
    sae, stream = built(d_sae, d_in, 4, 0.0), Pool(batch_size, d_in, devices[0])
    for last, bound in CLOSE.items():
        left = []
        for where in (devices[:1], devices):
            dictionary, scratch = one_of(sae, where, batch_size, 100), scratch_of(False)
            for i, x in enumerate(stream.batches(0, last)):
                dictionary.record(dictionary.step(x, i, scratch), x, i, 1.0)
            left.append(dictionary.tensors())
        want, got = left
        offs = {
            name: float((got[name] - want[name]).norm() / want[name].norm())
            for name in want
            if name.startswith("adam.") and not name.endswith("step")
        }
        worst = max(offs, key=lambda name: offs[name])
        off = float((got["history"][-1, 3] / want["history"][-1, 3] - 1).abs())
        print(f"{last} steps: loss off by {off:.1e}, {worst} by {offs[worst]:.1e}", flush=True)
        if not (off < bound and offs[worst] < bound):
            raise SystemExit(f"{len(devices)} devices: {worst} is off by {offs[worst]:.1e}")


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(repeats=3)
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=24_576, help="of each of many")
    parser.add_argument("--d-sae-one", type=int, default=262_144)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--count", type=int, default=8, help="dictionaries of many")
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=100, help="timed steps a run")
    parser.add_argument("--warm-up", type=int, default=20, help="steps before")
    parser.add_argument("--device", default="cuda", help="cpu or cuda")
    parser.add_argument("--devices", type=int, help="default: all GPUs, or two times the CPU")
    parser.add_argument("--only", choices=["many", "one"])
    parser.add_argument("--tiny", action="store_true", help="no measurement")
    args = parser.parse_args()
    if args.tiny:
        args.d_in, args.d_sae, args.d_sae_one, args.k, args.count = 8, 64, 128, 4, 3
        args.batch_size, args.steps, args.warm_up, args.repeats = 16, 2, 2, 2
    cuda = args.device == "cuda"
    n = args.devices or (torch.cuda.device_count() if cuda else 2)
    devices = [torch.device("cuda", i) if cuda else torch.device("cpu") for i in range(n)]
    where = "GPU" if cuda else "CPU"
    same_results(args, devices)
    rows = []
    if args.only != "one":
        sae = built(args.d_sae, args.d_in, args.k, 1 / 32)
        found = {}
        for some in (devices[:1], devices):
            found[len(some)] = [many(args, sae, some) for _ in range(args.repeats)]
        shape = f"{args.count} of {args.d_sae:,} latents, d_in {args.d_in}, k {args.k}"
        rows.append(row(shape, found, n, where, 0.9))
    if args.only != "many":
        sae = built(args.d_sae_one, args.d_in, args.k, 0.0)
        found = {len(some): one(args, sae, some) for some in (devices[:1], devices)}
        shape = f"one of {args.d_sae_one:,} latents, d_in {args.d_in}, k {args.k}"
        rows.append(row(shape, found, n, where, 0.8))
    report("two_gpus", rows, args.out, torch.cuda.get_device_name() if cuda else "cpu")


def row(shape: str, found: dict[int, list[float]], n: int, where: str, share: float) -> Row:
    """What n devices do beside one; wanted is a share of n times as much."""
    return Row(
        f"{shape}, {n} {where}s", median(found[n]), "rows/s", peer=median(found[1]),
        peer_name=f"1 {where}", target=f"ratio >= {share * n:g}",
        runs={"ours": found[n], "peer": found[1]},
    )  # fmt: skip


if __name__ == "__main__":
    main()
