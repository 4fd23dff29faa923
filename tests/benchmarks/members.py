"""What several seeds cost beside one, trained in one job: the grokking model at its paper's size.

    python tests/benchmarks/members.py                       1 and 5 seeds, 20 steps each
    python tests/benchmarks/members.py --steps 1000 --device cuda

ours     seconds of 40,000 full-batch steps, from the median of --repeats runs of --steps steps
plain    one seed as one would write it: the same model's modules, all positions, torch.optim.AdamW
         (fused on a GPU), loss in float64
floor    the products of a step over the rate of a large float32 product, measured here; only the
         positions that reach the loss, and the embedding as the lookup that it is

Five seeds have five times the products of one, so on a GPU that one seed fills they cannot cost as
little as one: see the floors.
"""

import time

from harness import ROOT, Row, arguments, interleaved, median, report

STEPS = 40_000


def members_of(n_seeds: int, device):
    """The members of a run of the paper grokking at paper scale, with so many seeds."""
    import torch

    from pipeline.papers import papers
    from pipeline.weights import batches
    from pipeline.weights.members import Members

    folder = ROOT / "rules/papers/grokking"
    spec = papers.load(folder, "paper").spec.training["decay"]
    spec = spec.model_copy(update={"seeds": list(range(n_seeds))})
    device = torch.device(device)
    data = [batches.own(folder / "data.py", spec, s, device) for s in spec.seeds]
    return Members(spec, data, device)


def plain(one):
    """A step of one seed, without what training.py does to be fast."""
    import torch
    from torch.nn.functional import cross_entropy

    from pipeline.weights import initial

    data, how = one.data[0], one.spec.optimiser
    model = initial.build(one.spec.architecture, data.d_vocab).to(one.device)
    initial.initial(model, one.spec.architecture, 0)
    adam = torch.optim.AdamW(
        model.parameters(), how.lr, tuple(how.betas), how.eps, how.weight_decay,
        fused=one.device.type == "cuda",
    )  # fmt: skip

    def step(number: int) -> None:
        tokens, targets = data.batch(number)
        loss = cross_entropy(model(tokens).logits[:, -1].double(), targets[:, -1])
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()

    return step


def floor(one) -> float:
    """Seconds of 40,000 steps of one seed's products, at the rate of a large one."""
    import torch

    a, d_vocab = one.spec.architecture, one.data[0].d_vocab
    rows, n_ctx = one.data[0].batch(0)[0].shape
    width = a.d_model * a.n_heads * a.head_size
    macs = rows * n_ctx * 2 * width  # keys and values
    macs += rows * (2 * width + 2 * a.d_model * a.d_mlp + a.d_model * d_vocab)
    n = 8192 if one.device.type == "cuda" else 2048
    x = torch.randn(n, n, device=one.device)
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        (x @ x)[0, 0].item()
        seconds.append(time.perf_counter() - began)
    rate = n**3 / median(seconds[1:])
    return STEPS * 3 * macs / rate  # forward, and the gradients of inputs and weights


def same_gradient(five) -> None:
    """The members side by side have the gradients that they have under vmap, to rounding."""
    import torch

    batch = five.batch(0)
    want = torch.autograd.grad(five.forward.total_loss(five.flat, *batch), five.flat)[0]
    off = (five.forward.side_by_side(five.flat, *batch) - want).norm(dim=1) / want.norm(dim=1)
    if off.max() > 1e-5:
        raise SystemExit(f"the members' gradients differ by {off.tolist()} of their size")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    import torch

    runs = {"one": members_of(1, args.device), "five": members_of(5, args.device)}
    if runs["five"].forward.streams:
        same_gradient(runs["five"])
    steps = {name: made.step for name, made in runs.items()}
    steps["plain"] = plain(runs["one"])

    def work(name: str):
        def run() -> None:
            for step in range(args.steps):
                steps[name](step)
            for made in runs.values():
                made.optimiser.count.zero_()  # the plan of step sizes ends with the last step
            if args.device == "cuda":
                torch.cuda.synchronize()

        return run

    seconds = interleaved({name: work(name) for name in steps}, args.repeats)
    whole = {n: [s * STEPS / args.steps for s in runs] for n, runs in seconds.items()}
    one, five, alone = (median(whole[n]) for n in ("one", "five", "plain"))
    least = floor(runs["one"])
    on_gpu = args.device == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else "cpu"
    units = "seconds of 40,000 steps"
    rows = [
        Row("grokking, five seeds", five, units, peer=one, peer_name="one seed",
            floor=5 * least, floor_name="products alone", target="ratio >= 0.5" if on_gpu else "",
            higher_is_better=False, runs=whole),
        Row("grokking, five seeds", five, units, peer=alone, peer_name="one seed, plain PyTorch",
            floor=5 * least, floor_name="products alone", higher_is_better=False),
        Row("grokking, one seed", one, units, peer=alone, peer_name="one seed, plain PyTorch",
            floor=least, floor_name="products alone", target="ours <= 180" if on_gpu else "",
            higher_is_better=False),
    ]  # fmt: skip
    report("members", rows, args.out, name)


if __name__ == "__main__":
    main()
