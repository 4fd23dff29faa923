"""Training steps of ours on a GPU against SAELens's trainer and sparsify's, from the same weights.

    python tests/benchmarks/sae_gpu.py               d_in 768, d_sae 24576, k 32, batch 4096
    python tests/benchmarks/sae_gpu.py --steps 50

ours      pipeline.sae.train.Dictionary.step with precision: bfloat16, all that training does
peer      SAELens's SAETrainer.step with autocast; sparsify's SparseCoder with autocast and fused
          Adam, where the package eai-sparsify is installed
floor     the encoder's product in bfloat16 and fused Adam on the weights, and nothing else
shards    ours, from Parquet shards of float16 through pipeline.sae.stream

Batches come from a pool on the device. Before the clock starts, a step of ours and one of SAELens's
in float32 must give the same gradients, the step that stores none (sae/fused.py) must leave the
first moments that these gradients make, and steps recorded as a CUDA graph must move the parameters
as the same steps do one by one. Steps with AuxK have a quarter of the latents dead, whose biases
are so low that they stay so. TopK is also trained --long steps by both, and the explained variance
of a held-out batch stands in the rows' names.
"""

import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from harness import Row, arguments, interleaved, median, rates, report

POOL = 64  # batches
EPOCHS = 4  # of the pool, from shards
HOOK, SHARD_ROWS = "blocks.0.hook_out", 16_384
COLUMNS = ("document", "block", "position", "token")
CASES = {
    "topk": ({}, "ratio >= 8"),
    "batchtopk": ({}, "ratio >= 3"),
    "matryoshka_batchtopk": ({}, "ratio >= 3"),
    "standard": ({"l1_coefficient": 1.0}, "ratio >= 2"),
    "jumprelu": ({"l0_coefficient": 1.0}, "ratio >= 2"),
}


def batches(args) -> list[torch.Tensor]:
    """Rows of a mean norm near sqrt(d_in), each a sum of 20 of 4 d_in directions, and noise."""
    generator = torch.Generator("cuda").manual_seed(0)
    draw = {"generator": generator, "device": "cuda"}
    directions = torch.randn(4 * args.d_in, args.d_in, **draw)
    out = []
    for _ in range(POOL):
        shape = (args.batch_size, 20)
        # some directions are common, most are rare
        picked = (torch.rand(*shape, **draw) ** 3 * len(directions)).long()
        size = torch.rand(*shape, 1, **draw) + 0.5
        x = (directions[picked] * size).sum(1) / 20**0.5
        out.append(x + 0.1 * torch.randn(x.shape, **draw))
    return out


def spec_of(architecture: str, args, **options):
    from pipeline.spec.sae import SaeSpec

    return SaeSpec(architecture=architecture, d_sae=args.d_sae, **options)


def ours(spec, args, precision: str = "bfloat16"):
    """A dictionary on the GPU, and its step."""
    from pipeline.sae.sparse import Scratch
    from pipeline.sae.train import Dictionary, build
    from pipeline.spec.sae import SaeTraining

    n_steps = 1_000_000
    training = SaeTraining(
        n_rows=n_steps * args.batch_size, batch_size=args.batch_size, lr=args.lr, warmup_steps=0,
        dead_rows=4_000_000, precision=precision,
    )  # fmt: skip
    dictionary = Dictionary("ours", build(spec, args.d_in).to("cuda"), training, n_steps)
    scratch = Scratch(precision == "bfloat16")
    return dictionary, lambda x, step: dictionary.step(x, step, scratch)


def saelens(spec, args, autocast: bool = True):
    """SAELens's object, and its trainer's step."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    from pipeline.sae.train import build

    sae = build(spec, args.d_in).to("cuda")
    config = SAETrainerConfig(
        total_training_samples=10**9, train_batch_size_samples=args.batch_size, lr=args.lr,
        lr_end=args.lr, device="cuda", autocast=autocast, dead_feature_window=1000,
    )  # fmt: skip
    trainer = SAETrainer(config, sae, iter(()))

    def step(x, _) -> None:
        trainer.step(x)

    step.trainer = trainer
    return sae, step


def with_dead(spec, args) -> dict:
    """Both steps with a quarter of the latents dead, which AuxK then trains."""
    n_dead = args.d_sae // 4
    dictionary, step = ours(spec, args)
    sae, theirs = saelens(spec, args)
    trainer = theirs.trainer
    for of in (dictionary.sae, sae):
        of.b_enc.data[:n_dead] = -100.0
    dictionary.dead.rows_since_fired[:n_dead] = 10**12
    trainer.n_forward_passes_since_fired[:n_dead] = 1e9
    return {"dead": step, "peer, dead": theirs}


def sparsify(args):
    """sparsify's SparseCoder and a step as its trainer takes it, with fused Adam."""
    from sparsify import SparseCoder, SparseCoderConfig

    config = SparseCoderConfig(num_latents=args.d_sae, k=args.k)
    coder = SparseCoder(args.d_in, config, device="cuda", dtype=torch.float32)
    adam = torch.optim.Adam(coder.parameters(), args.lr, fused=True)

    def step(x, _) -> None:
        if config.normalize_decoder:
            coder.set_decoder_norm_to_unit_norm()
        with torch.autocast("cuda", torch.bfloat16):
            coder(x).fvu.backward()
        if config.normalize_decoder:
            coder.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()

    return step


def same_gradients(spec, args, x: torch.Tensor, n_dead: int = 0) -> None:
    """In float32 our step has the gradients of SAELens's, parameter by parameter."""
    from pipeline.sae import steps as sae_steps
    from pipeline.sae.optimiser import coefficients
    from pipeline.sae.sparse import Scratch
    from pipeline.sae.train import FAST

    found, dead = [], torch.arange(args.d_sae, device="cuda") < n_dead
    for step in (FAST[spec.architecture], sae_steps.reference):
        dictionary, _ = ours(spec, args, "float32")
        sae = dictionary.sae
        how = {"dead": dead if n_dead else None, "step": 0, "scratch": Scratch()}
        if n_dead and step is not sae_steps.reference:
            how["capacity"] = 2 * n_dead
        outcome = step(sae, x, coefficients=coefficients(dictionary.sae, 0), **how)
        found.append({"loss": outcome.loss} | {n: p.grad for n, p in sae.named_parameters()})
    for name, want in found[1].items():
        off = float((found[0][name] - want).norm() / want.norm())
        if off > 1e-2:  # in float32 a score at the threshold may fall on either side
            raise SystemExit(f"{spec.architecture}, {n_dead} dead: {name} is off by {off:.1e}")


def same_moments(spec, args, x: torch.Tensor, n_dead: int) -> None:
    """In float32, the fused step leaves (1 - beta1) times SAELens's gradients, clipped."""
    from pipeline.sae import steps as sae_steps
    from pipeline.sae.fused import FusedStep
    from pipeline.sae.optimiser import CLIP_NORM, coefficients
    from pipeline.sae.sparse import Scratch

    dead = torch.arange(args.d_sae, device="cuda") < n_dead if n_dead else None
    plain, fused = (ours(spec, args, "float32")[0] for _ in range(2))
    how = {"step": 0, "scratch": Scratch(), "coefficients": coefficients(plain.sae, 0)}
    sae_steps.reference(plain.sae, x, dead=dead, **how)
    grads = {n: p.grad for n, p in plain.optimiser.trained.items()}
    norm = torch.nn.utils.get_total_norm(list(grads.values()))
    factor = (1 - fused.training.betas[0]) / ((norm + 1e-6) / CLIP_NORM).clamp(min=1)
    step = FusedStep(fused.sae, fused.optimiser, fused.training)
    step(x, dead=dead, scratch=Scratch(), capacity=2 * n_dead or None)
    for name, parameter in fused.optimiser.trained.items():
        want, got = grads[name] * factor, fused.optimiser.adam.state[parameter]["exp_avg"]
        off = float((got - want).norm() / want.norm())
        print(f"{spec.architecture}, {n_dead} dead: fused, {name}'s moment is off by {off:.1e}")
        if off > 1e-2:  # as in same_gradients
            raise SystemExit(f"{spec.architecture}: {name}'s gradient is another in fused steps")


def same_when_recorded(spec, args, pool: list[torch.Tensor], n_dead: int) -> None:
    """Steps replayed as a CUDA graph move the parameters as steps taken kernel by kernel do."""
    moved = []
    for recorded in (True, False):
        dictionary, step = ours(spec, args)
        if not recorded:
            dictionary.graphs = None
        dictionary.dead.rows_since_fired[:n_dead] = 10**12
        began = {n: p.detach().clone() for n, p in dictionary.optimiser.trained.items()}
        for i in range(8):
            step(pool[i], i)
        if recorded and not dictionary.graphs.recorded:
            raise SystemExit(f"{spec.architecture}: no step of ours was recorded")
        moved.append({n: p.detach() - began[n] for n, p in dictionary.optimiser.trained.items()})
    for name, want in moved[1].items():
        off = float((moved[0][name] - want).norm() / want.norm())
        print(f"{spec.architecture}, {n_dead} dead: recorded, {name} moves with a difference of "
              f"{off:.1e}")  # fmt: skip
        if off > 0.1:  # Adam's first steps have a gradient's sign, however small: rounding shows
            raise SystemExit(f"{spec.architecture}: {name} moves otherwise in recorded steps")


def floor(args, x: torch.Tensor):
    """The encoder's product and Adam on weights that have gradients."""
    shapes = [(args.d_in, args.d_sae), (args.d_sae, args.d_in)]
    weights = [torch.randn(s, device="cuda", requires_grad=True) for s in shapes]
    for w in weights:
        w.grad = torch.randn_like(w)
    adam = torch.optim.Adam(weights, 1e-9, fused=True)
    a, b = x.bfloat16(), torch.randn(shapes[0], device="cuda").bfloat16()
    out = torch.empty(len(x), args.d_sae, device="cuda", dtype=torch.bfloat16)

    def step(_, __) -> None:
        torch.mm(a, b, out=out)
        adam.step()

    return step


def measured(args, steps: dict, pool: list[torch.Tensor]) -> dict[str, list[float]]:
    """Rows a second of each step, interleaved."""

    def several(step):
        def work() -> None:
            for i in range(args.steps):
                step(pool[i % POOL], i)
            torch.cuda.synchronize()

        return work

    work = {name: several(step) for name, step in steps.items()}
    return rates(interleaved(work, args.repeats), args.steps * args.batch_size)


@torch.no_grad()
def explained(sae, x: torch.Tensor) -> float:
    """Explained variance of a batch."""
    return float(1 - (sae(x) - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum())


def quality(args, pool: list[torch.Tensor]) -> dict[str, float]:
    """Explained variance of a held-out batch after --long steps of TopK, ours and SAELens's."""
    spec, out = spec_of("topk", args, k=args.k), {}
    for name, (of, step) in {"ours": ours(spec, args), "SAELens": saelens(spec, args)}.items():
        sae = getattr(of, "sae", of)
        for i in range(args.long):
            step(pool[i % (POOL - 1)], i)
        out[name] = explained(sae, pool[-1])
    return out


def stored(pool: list[torch.Tensor], folder: Path) -> Path:
    """The pool as an activations item of float16; its manifest."""
    import numpy as np

    from pipeline.store import provenance, tables

    rows = torch.cat(pool).half().cpu().numpy()
    entries, files = [], {}
    for i, at in enumerate(range(0, len(rows), SHARD_ROWS)):
        part, name = rows[at : at + SHARD_ROWS], f"shards/{HOOK}/part-{i:05d}.parquet"
        columns = {c: np.zeros(len(part), np.int32) for c in COLUMNS}
        tables.write_shard(folder / name, part, columns, "float16", {"hook": HOOK})
        norm = float(np.linalg.norm(part.astype(np.float32), axis=1).mean())
        entries.append({"file": name, "split": "train", "rows": len(part), "mean_norm": norm})
        files[name] = provenance.sha256_file(folder / name)
    about = {"d_model": rows.shape[1], "dtype": "float16", "rows": {"train": len(rows)},
             "mean_norm": 1.0, "shards": entries}  # fmt: skip
    tables.write_json(folder / "manifest.json", {"hooks": {HOOK: about}, "files": files}, {})
    return folder / "manifest.json"


def from_shards(args, pool: list[torch.Tensor], folder: Path) -> list[float]:
    """Rows a second of TopK from Parquet shards, in each epoch of the store."""
    from pipeline.sae.stream import Stream
    from pipeline.store.shards import Rows

    stream = Stream(
        Rows(stored(pool, folder), HOOK, "train"), batch_size=args.batch_size, buffer_rows=65_536,
        seed=0, normalize=False, device="cuda",
    )  # fmt: skip
    _, step = ours(spec_of("topk", args, k=args.k), args)
    seconds, began = [], time.perf_counter()
    for i, x in enumerate(stream.batches(0, EPOCHS * POOL)):
        step(x, i)
        if (i + 1) % POOL == 0:
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
            began = time.perf_counter()
    return [POOL * args.batch_size / s for s in seconds]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=24_576)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--steps", type=int, default=40, help="steps a run")
    parser.add_argument("--only", nargs="*", default=list(CASES), help="architectures")
    parser.add_argument("--long", type=int, default=1500, help="steps of the comparison of quality")
    args = parser.parse_args()
    from pipeline.sae.train import FAST, STATIC

    pool = batches(args)
    rows, name = [], torch.cuda.get_device_name()
    for architecture in args.only:
        options, target = CASES[architecture]
        spec = spec_of(architecture, args, **({"k": args.k} | options))
        if architecture in FAST:
            same_gradients(spec, args, pool[0])
        if FAST.get(architecture) in STATIC:
            same_gradients(spec, args, pool[0], args.d_sae // 4)
            for n_dead in (0, args.d_sae // 4):
                same_moments(spec, args, pool[0], n_dead)
                same_when_recorded(spec, args, pool, n_dead)
        steps = {"ours": ours(spec, args)[1], "peer": saelens(spec, args)[1]}
        if architecture == "topk":
            steps |= {"floor": floor(args, pool[0]), "float32": ours(spec, args, "float32")[1]}
            steps |= {"sparsify": sparsify(args)} if find_spec("sparsify") else {}
        if FAST.get(architecture) in STATIC:
            steps |= with_dead(spec, args)
        found = measured(args, steps, pool)
        rate = {n: median(runs) for n, runs in found.items()}
        row = Row(architecture, rate["ours"], "rows/s", peer=rate["peer"], target=target,
                  peer_name="SAELens, autocast", runs=found)  # fmt: skip
        if architecture == "topk":
            ev = quality(args, pool)
            row.case += ", explained variance " + ", ".join(f"{n} {v:.4f}" for n, v in ev.items())
            row.floor, row.floor_name = rate["floor"], "x W_enc and Adam"
            rows.append(row)
            rows.append(Row("topk, float32", rate["float32"], "rows/s", peer=rate["peer"],
                            peer_name="SAELens, autocast"))  # fmt: skip
            if "sparsify" in rate:
                rows.append(Row("topk", rate["ours"], "rows/s", peer=rate["sparsify"],
                                peer_name="sparsify", target="ratio >= 2"))  # fmt: skip
            with tempfile.TemporaryDirectory() as folder:
                epochs = from_shards(args, pool, Path(folder))
            rows.append(Row("topk from shards", epochs[-1], "rows/s", peer=rate["ours"],
                            peer_name="from memory", target="ratio >= 0.95",
                            runs={"epochs": epochs}))  # fmt: skip
        else:
            rows.append(row)
        if "dead" in rate:
            case = f"{architecture}, a quarter of the latents dead"
            rows.append(Row(case, rate["dead"], "rows/s", peer=rate["peer, dead"],
                            peer_name="SAELens, autocast"))  # fmt: skip
        torch.cuda.empty_cache()
    report("sae_gpu", rows, args.out, name)


if __name__ == "__main__":
    main()
