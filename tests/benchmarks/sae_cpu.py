"""A training step of ours against SAELens's trainer, on the CPU, with the same weights and batch.

    python tests/benchmarks/sae_cpu.py                      d_in 576, d_sae 4608, k 32, batch 4096
    python tests/benchmarks/sae_cpu.py --batch-size 2048

ours     pipeline.sae.train.Dictionary.step: loss, gradients, clipping, fused Adam, dead counters
peer     SAELens's SAETrainer.step, float32: the same, by autograd, plain Adam
floor    the encoder's product x W_enc and nothing else, which both must do

The learning rate is next to zero, so that every run meets the same activations. L1 dictionaries
start dense and grow sparse as they train; both ends are timed. Matching pursuit takes 8 latents.
"""

import functools

from harness import Row, arguments, interleaved, median, rates, report


def batch(n: int, d_in: int):
    """Rows of a mean norm near sqrt(d_in), each a sum of 20 of 4 d_in directions."""
    import torch

    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4 * d_in, d_in, generator=generator)
    picked = torch.randint(0, 4 * d_in, (n, 20), generator=generator)
    return directions[picked].sum(1) / 20**0.5


def pair(args, options: dict, x, n_dead: int, l0: float | None):
    """A step of ours and one of SAELens's trainer, from the same weights."""
    import torch
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    from pipeline.sae.sparse import Scratch
    from pipeline.sae.train import Dictionary, build
    from pipeline.spec.sae import SaeSpec, SaeTraining

    n_rows = 10_000 * args.batch_size
    spec = SaeSpec(d_sae=args.d_sae, **options)
    training = SaeTraining(n_rows=n_rows, batch_size=args.batch_size, lr=1e-9, warmup_steps=0)
    saes = [build(spec, args.d_in) for _ in range(2)]
    for sae in saes:
        with torch.no_grad():
            bias = dict(sae.named_parameters()).get("b_gate", getattr(sae, "b_enc", None))
            if l0 is not None:
                scores = (x[:512] @ sae.W_enc).flatten()
                bias -= scores.kthvalue(int(len(scores) * (1 - l0 / args.d_sae))).values
            if n_dead:
                bias[:n_dead] = -100.0
    ours = Dictionary("ours", saes[0], training, 10_000)
    ours.dead.rows_since_fired[:n_dead] = 10**12
    config = SAETrainerConfig(
        total_training_samples=n_rows,
        train_batch_size_samples=args.batch_size,
        lr=1e-9,
        lr_end=1e-9,
    )
    theirs = SAETrainer(config, saes[1], iter(()))
    theirs.n_forward_passes_since_fired[:n_dead] = 1e9
    scratch = Scratch()
    return lambda: ours.step(x, 0, scratch), lambda: theirs.step(x)


def measure(args, case: str, options: dict, n_dead: int = 0, l0: float | None = None, target=""):
    """One row of the table, in rows of activations a second."""
    import torch

    x = batch(args.batch_size, args.d_in)
    ours, peer = pair(args, options, x, n_dead, l0)
    weights = torch.randn(args.d_in, args.d_sae)
    out = torch.empty(args.batch_size, args.d_sae)
    work = {"ours": ours, "peer": peer, "floor": functools.partial(torch.mm, x, weights, out=out)}
    found = rates(interleaved(work, args.repeats), args.batch_size)
    last = ours()
    return Row(
        case=f"{case}, L0 {last.l0.item():.0f}",
        ours=median(found["ours"]),
        units="rows/s",
        peer=median(found["peer"]),
        peer_name="SAELens",
        floor=median(found["floor"]),
        floor_name="x W_enc",
        target=target,
        runs=found,
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--d-in", type=int, default=576)
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    topk = {"architecture": "topk", "k": args.k}
    l1 = {"architecture": "standard", "l1_coefficient": 1.0}
    jump = {"architecture": "jumprelu", "l0_coefficient": 1.0}
    tenth, third = args.d_sae // 10, args.d_sae // 3
    rows = [
        measure(args, "TopK", topk, target="ratio >= 2.5"),
        measure(args, f"TopK, AuxK on {tenth} dead", topk, n_dead=tenth, target="ratio >= 2.5"),
        measure(args, f"TopK, AuxK on {third} dead", topk, n_dead=third, target="ratio >= 2.5"),
        measure(args, "TopK, frozen decoder", topk | {"frozen_decoder": True}),
        measure(args, "L1, sparse", l1, l0=args.k),
        measure(args, "L1, less so", l1, l0=4 * args.k),
        measure(args, "L1, at the start", l1),
        measure(args, "BatchTopK", {"architecture": "batchtopk", "k": args.k}),
        measure(args, "Matryoshka", {"architecture": "matryoshka_batchtopk", "k": args.k}),
        measure(args, "Gated, sparse", l1 | {"architecture": "gated"}, l0=args.k),
        measure(args, "JumpReLU, sparse", jump, l0=args.k),
        measure(args, "matching pursuit", {"architecture": "matching_pursuit", "k": 8}),
    ]
    report("sae_cpu", rows, args.out)


if __name__ == "__main__":
    main()
