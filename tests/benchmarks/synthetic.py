"""Samples of SynthSAEBench a second: our sampler against SAELens's, on one ground truth.

    python tests/benchmarks/synthetic.py                    1,024 and 16,384 features, on the CPU
    python tests/benchmarks/synthetic.py --device cuda

ours     rules/papers/synth_sae_bench/world.py: Sampler.draw and Sampler.rows, a bulk at a time
peer     SAELens's SyntheticModel.sample, a training batch of 1,024 rows at a time
floor    the normal numbers of the features that have to be drawn densely, and nothing else

Directions are as drawn: pushing them apart changes neither one's work.
"""

from harness import ROOT, Row, arguments, interleaved, median, rates, report

from pipeline.job.source import import_file

BATCH = 1024
SIZES = {  # features -> dimensions, trees, rows of a bulk of ours
    1024: (64, 8, 16_384),
    16_384: (768, 128, 4096),
}


def measure(n_features: int, device: str, repeats: int) -> Row:
    """One size: rows a second."""
    import torch

    world = import_file(ROOT / "rules/papers/synth_sae_bench/world.py")
    d_model, roots, bulk = SIZES[n_features]
    truth = world.build(
        world.World(
            n_features=n_features, d_model=d_model, roots=roots, orthogonalization_steps=0
        ),
        device,
    )  # fmt: skip
    sampler, random = world.Sampler(truth), torch.Generator(device).manual_seed(0)
    if device == "cuda":
        bulk = 64 * BATCH
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def ours():
        sampler.rows(bulk, sampler.draw(bulk, random))
        wait()

    def theirs():
        truth.sample(BATCH)
        wait()

    def floor():
        torch.randn(bulk, len(sampler.top), generator=random, device=device)
        wait()

    seconds = interleaved({"ours": ours, "peer": theirs, "floor": floor}, repeats)
    amounts = {"ours": bulk, "peer": BATCH, "floor": bulk}
    runs = {k: rates({k: v}, amounts[k])[k] for k, v in seconds.items()}
    found = {k: median(v) for k, v in runs.items()}
    return Row(
        f"{n_features:,} features in {d_model}",
        found["ours"],
        "samples/s",
        found["peer"],
        "SAELens",
        found["floor"],
        "normal numbers",
        target="ratio >= 10" if n_features == max(SIZES) else "",
        runs=runs,
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args()
    rows = [measure(n, args.device, args.repeats) for n in SIZES]
    report("synthetic", rows, args.out, args.device)


if __name__ == "__main__":
    main()
