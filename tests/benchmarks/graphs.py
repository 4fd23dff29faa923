"""Seconds and peak memory of an attribution graph, beside circuit-tracer's own code; its growth.

    git clone https://github.com/safety-research/circuit-tracer CODE      (d797c82)
    PYTHONPATH=CODE python tests/benchmarks/graphs.py --device cuda       about 6 minutes
    PYTHONPATH=CODE python tests/benchmarks/graphs.py --shape small       on two cores
    python tests/benchmarks/graphs.py --ours --axes n_tokens d_sae n_layers
    python tests/benchmarks/graphs.py --ours --shape tiny --axes n_tokens d_sae n_layers   a minute

SmolLM2-135M's shape with random weights (30 layers of 576, 9 heads, 3 key heads, 49,152 tokens),
30 x 4,096 random ReLU transcoders with about 40 features active per token and layer, a prompt of 64
random tokens, 7,500 features as nodes and 256 targets a backward pass, which are circuit-tracer's
defaults; both in float32. Each is a process of its own.

seconds   of a whole graph, from tokens to edges, without loading; the best of --repeats; the JSON
          has those of the processor, too, which other processes change little
memory    the most that the process held on the GPU, weights included; without a GPU, what it held
          in all, less what it held before
growth    the exponent p of size^p of both, by least squares, ours; one axis grows at a time
"""

import json
import math
import subprocess
import sys
import threading
import time

from harness import ROOT, Row, arguments, report

sys.path.insert(0, str(ROOT / "tests/circuit_tracer"))

SHAPES = {
    "smollm2": {"n_layers": 30, "d_model": 576, "n_heads": 9, "n_key_heads": 3, "d_mlp": 1536,
                "d_vocab": 49152, "d_sae": 4096, "n_tokens": 64, "max_features": 7500},
    "small": {"n_layers": 30, "d_model": 576, "n_heads": 9, "n_key_heads": 3, "d_mlp": 1536,
              "d_vocab": 49152, "d_sae": 4096, "n_tokens": 12, "max_features": 1024},
    "tiny": {"n_layers": 3, "d_model": 64, "n_heads": 4, "n_key_heads": 2, "d_mlp": 128,
             "d_vocab": 128, "d_sae": 256, "n_tokens": 16, "max_features": 64},
}  # fmt: skip
AXES = {  # times the shape's own size; and what scaling.py calls the axis
    "n_tokens": ((1, 2, 4, 8), "tokens of a prompt"),
    "d_sae": ((0.25, 0.5, 1, 2), "features of a layer"),
    "n_layers": ((0.25, 0.5, 1), "layers traced"),
}
BIAS = -2.33  # of pre-activations of variance 1: 1 % are active
BATCH = 256


def child(who: str, case: dict, device: str, repeats: int) -> dict:
    """Seconds and GB of one program, in this process."""
    import random_case
    import torch

    shape = {k: case[k] for k in ("n_layers", "d_model", "n_heads", "n_key_heads", "d_mlp")}
    hf = random_case.llama(**shape, d_vocab=case["d_vocab"], device=device)
    of_sets = case["n_layers"], case["d_model"], case["d_sae"], False, BIAS, device, 0.0
    tokens = torch.randint(
        0, case["d_vocab"], (case["n_tokens"],), generator=torch.Generator().manual_seed(2)
    ).to(device)
    if who == "theirs":
        import official

        model = official.theirs(hf, official.transcoders(*of_sets))

        def graph() -> int:
            made = official.attribute(
                tokens, model, batch_size=BATCH, max_feature_nodes=case["max_features"]
            )
            return len(made.active_features)

    else:
        from pipeline.tracing.graph import top_logits, trace
        from pipeline.tracing.replacement import Replacement

        dictionaries = random_case.dictionaries(random_case.weights(*of_sets))

        def graph() -> int:
            model = Replacement.of(hf, tokens, dictionaries)
            logits = top_logits(model, 0.0, 10, 0.95)
            made = trace(model, logits, max_features=case["max_features"], batch_size=BATCH)
            return len(made.features)

    seconds, processor, peak = [], [], Peak(device)
    for _ in range(repeats):
        started, before = time.perf_counter(), time.process_time()
        active = graph()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        processor.append(time.process_time() - before)
    return {"seconds": seconds, "processor_seconds": processor, "gb": peak.gb(), "active": active}


class Peak:
    """The most memory that is held from now on."""

    def __init__(self, device: str) -> None:
        self.device, self.done = device, False
        if device == "cpu":
            import psutil

            self.process = psutil.Process()
            self.before = self.most = self.process.memory_info().rss
            self.thread = threading.Thread(target=self._watch, daemon=True)
            self.thread.start()

    def _watch(self) -> None:
        while not self.done:
            self.most = max(self.most, self.process.memory_info().rss)
            time.sleep(0.01)

    def gb(self) -> float:
        self.done = True
        if self.device == "cpu":
            self.thread.join()
            return (self.most - self.before) / 1e9
        import torch

        return torch.cuda.max_memory_allocated() / 1e9


def measured(who: str, case: dict, device: str, repeats: int) -> dict:
    """What a child process measures."""
    what = json.dumps([who, case, device, repeats])
    out = subprocess.run(
        [sys.executable, __file__, "--child", what], capture_output=True, text=True, check=False
    )
    if out.returncode:
        raise SystemExit(out.stderr[-3000:])
    found = json.loads(out.stdout.splitlines()[-1])
    print(who, {k: case[k] for k in ("n_layers", "d_sae", "n_tokens")}, found, flush=True)
    return found


def best(found: dict, what: str) -> float:
    """The least of the seconds, or the memory."""
    return min(found[what]) if what == "seconds" else found[what]


def exponent(sizes: list[float], values: list[float]) -> float:
    """p of size^p, by least squares."""
    x, y = ([math.log(v) for v in some] for some in (sizes, values))
    mx, my = sum(x) / len(x), sum(y) / len(y)
    over = sum((a - mx) ** 2 for a in x)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / over


def growth(axis: str, case: dict, device: str, repeats: int) -> list[Row]:
    """Rows of time and memory along an axis, as scaling.py writes and reads them."""
    times, name = AXES[axis]
    sizes = [math.ceil(case[axis] * t) for t in times]
    found = [measured("ours", case | {axis: n}, device, min(repeats, 2)) for n in sizes]
    seconds, gib = ([best(f, what) for f in found] for what in ("seconds", "gb"))
    gib = [max(g, 1e-3) * 1e9 / 2**30 for g in gib]
    return [
        Row(f"graphs against {name}", exponent(sizes, values), f"exponent of {of}",
            higher_is_better=False, runs={"sizes": sizes, key: values})
        for of, key, values in (("time", "seconds", seconds), ("memory", "gib", gib))
    ]  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--ours", action="store_true", help="do not measure circuit-tracer")
    parser.add_argument("--axes", nargs="*", default=[], choices=AXES, help="growth along these")
    parser.add_argument("--child", help="for this file alone")
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(*json.loads(args.child))))
        return
    case, rows = SHAPES[args.shape], []
    mine = measured("ours", case, args.device, args.repeats)
    peer = None if args.ours else measured("theirs", case, args.device, args.repeats)
    for what, units, target in (("seconds", "s", "ratio >= 3"), ("gb", "GB", "ratio >= 2")):
        rows.append(
            Row(
                f"a graph of {case['n_tokens']} tokens, {case['n_layers']} x {case['d_sae']}",
                best(mine, what), units, best(peer, what) if peer else None,
                "circuit-tracer d797c82" if peer else "", target="" if args.ours else target,
                higher_is_better=False, runs={"ours": mine, "theirs": peer or {}},
            )
        )  # fmt: skip
    for axis in args.axes:
        rows += growth(axis, case, args.device, args.repeats)
    report("graphs", rows, args.out, args.device)


if __name__ == "__main__":
    main()
