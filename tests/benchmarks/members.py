"""What several seeds cost beside one, trained in one job: the grokking model at its paper's size.

    python tests/benchmarks/members.py                       1 and 5 seeds, 20 steps each
    python tests/benchmarks/members.py --steps 1000 --device cuda

ours     seconds of 40,000 full-batch steps, from the median of --repeats runs of --steps steps
peer     (five seeds) the same of one seed: a ratio of 0.5 means twice the time for five
"""

from harness import ROOT, Row, arguments, interleaved, median, report

STEPS = 40_000


def team(n_seeds: int, device):
    """The members of a run of the paper grokking at paper scale, with so many seeds."""
    import torch

    from pipeline import papers, training, training_data

    folder = ROOT / "rules/papers/grokking"
    spec = papers.load(folder, "paper").spec.training["decay"]
    spec = spec.model_copy(update={"seeds": list(range(n_seeds))})
    device = torch.device(device)
    data = [training_data.own(folder / "data.py", spec, s, device) for s in spec.seeds]
    return training.Team(spec, data, device)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    import torch

    teams = {"one": team(1, args.device), "five": team(5, args.device)}

    def work(name: str):
        def run() -> None:
            for step in range(args.steps):
                teams[name].step(step)
            if args.device == "cuda":
                torch.cuda.synchronize()

        return run

    seconds = interleaved({name: work(name) for name in teams}, args.repeats)
    whole = {n: [s * STEPS / args.steps for s in runs] for n, runs in seconds.items()}
    one, five = median(whole["one"]), median(whole["five"])
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    rows = [
        Row("grokking, five seeds", five, "seconds of 40,000 steps", peer=one, peer_name="one seed",
            target="ratio >= 0.5" if args.device == "cuda" else "", higher_is_better=False,
            runs=whole),
        Row("grokking, one seed", one, "seconds of 40,000 steps",
            target="ours <= 180" if args.device == "cuda" else "", higher_is_better=False),
    ]  # fmt: skip
    report("members", rows, args.out, name)


if __name__ == "__main__":
    main()
