"""Logistic probes of many layers against scikit-learn's LogisticRegression, layer by layer.

    pip install --no-deps --target FOLDER scikit-learn joblib threadpoolctl
    python tests/benchmarks/probes.py --scikit-learn FOLDER

ours     pipeline.probes.logistic.fit of all layers, as many at a time as the stage takes
peer     scikit-learn's default solver (lbfgs) on the same rows, float32, one layer and label after
         another; timed on the first layers (--peer-layers), and counted for all of them
above    how far each objective ends above the lower one, nats a row

The first row is of one label, the second of two that are read off the same rows, as the stage reads
every label beside its control task.

The rows are made: directions whose scales fall as 1 / sqrt(i), turned at random, with a few
dimensions that are far larger than the rest, as in a residual stream; then standardised, which both
are given. The classes follow a noisy linear rule. scikit-learn stops at --tolerance (its `tol`, the
largest entry of the gradient of the mean loss): 1e-6 brings it within 1e-6 nats a row, and its own
default of 1e-4 does not. Making the rows is not timed.
"""

import os
import sys

import numpy as np
from harness import Row, arguments, interleaved, median, report


def rows_of(layer: int, n: int, d: int):
    """Standardised rows of a layer, float32 [1 n d]."""
    import torch

    from pipeline.probes import logistic

    draw = torch.Generator().manual_seed(layer)
    turn = torch.linalg.qr(torch.randn(d, d, generator=draw))[0]
    scales = torch.arange(1, d + 1) ** -0.5
    X = torch.randn(n, d, generator=draw).mul_(scales) @ turn
    X[:, torch.randperm(d, generator=draw)[:3]] *= 100
    mean, sd = logistic.moments(X[None])
    return X[None].sub_(mean[:, None]).div_(sd[:, None])


def classes_of(X, n_classes: int, label: int):
    """Codes [n] of a noisy linear rule, another one for each label."""
    import torch

    draw = torch.Generator().manual_seed(1000 + label)
    W = 0.3 * torch.randn(X.shape[2], n_classes, generator=draw)
    noise = -torch.log(-torch.log(torch.rand(X.shape[1], n_classes, generator=draw)))
    return (X[0] @ W + noise).argmax(1)


def objective(X: np.ndarray, codes: np.ndarray, W: np.ndarray, bias: np.ndarray, l2: float):
    """Mean loss and penalty of W [d C] and bias [C], nats a row, in float64."""
    z = X.astype(float) @ W.astype(float) + bias
    top = z.max(1, keepdims=True)
    log_z = top[:, 0] + np.log(np.exp(z - top).sum(1))
    loss = (log_z - z[np.arange(len(z)), codes]).mean()
    return loss + 0.5 * l2 * (W.astype(float) ** 2).sum() / len(X)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--scikit-learn", required=True, help="folder in which it is installed")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument(
        "--peer-layers", type=int, default=1, help="layers that the peer is timed on"
    )
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--d-model", type=int, default=576, help="SmolLM2-135M's")
    parser.add_argument("--classes", type=int, default=12)
    parser.add_argument("--l2", type=float, default=1.0)
    parser.add_argument("--tolerance", type=float, default=1e-6)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(args.threads)
    sys.path.append(args.scikit_learn)  # behind the project's own packages

    import torch
    from sklearn.linear_model import LogisticRegression

    from pipeline.probes import logistic, measured

    torch.set_num_threads(args.threads)
    first = rows_of(0, args.rows, args.d_model)
    codes = torch.stack([classes_of(first, args.classes, label) for label in range(2)])
    del first
    names = [f"layer {i}" for i in range(args.layers)]
    widths = [args.d_model] * args.layers
    seconds: dict[str, list[float]] = {"one": [], "two": [], "peer 0": [], "peer 1": []}
    for group in measured.groups(names, args.rows, widths, torch.device("cpu")):
        at = [names.index(name) for name in group]
        X = torch.cat([rows_of(i, args.rows, args.d_model) for i in at])
        found = {}

        def ours(n, X=X, found=found):
            tasks = logistic.Tasks(codes[:n], [args.classes] * n)
            found[n] = logistic.fit(X, tasks, args.l2)

        def peer(label, X=X, found=found):
            settings = {"C": 1 / args.l2, "tol": args.tolerance, "max_iter": 10_000}
            found[f"peer {label}"] = LogisticRegression(**settings).fit(
                X[0].numpy(), codes[label].numpy()
            )

        work = {"one": lambda ours=ours: ours(1), "two": lambda ours=ours: ours(2)}
        if at[0] < args.peer_layers:
            work |= {f"peer {i}": lambda peer=peer, i=i: peer(i) for i in range(2)}
        for name, runs in interleaved(work, args.repeats, warm_up=0).items():
            seconds[name].append(median(runs))
            print(f"{', '.join(group)}, {name}: {seconds[name][-1]:.1f} s", flush=True)
        for label in range(2 if at[0] < args.peer_layers else 0):
            W, model = found[2].W[0, :, label].numpy(), found[f"peer {label}"]
            x, y = X[0].numpy(), codes[label].numpy()
            ends = [
                objective(x, y, W[:-1], W[-1], args.l2),
                objective(x, y, model.coef_.T, model.intercept_, args.l2),
            ]
            above = [end - min(ends) for end in ends]
            print(f"label {label}: {found[2].passes} passes, {model.n_iter_[0]} iterations")
            print("above the lower loss: ours {:.1e}, peer {:.1e}".format(*above), flush=True)
    per = {name: sum(runs) / len(runs) for name, runs in seconds.items()}
    case = f"{args.layers} layers of {args.rows:,} rows, %s of {args.classes} classes"
    both = per["peer 0"] + per["peer 1"]
    told = f"scikit-learn, of {len(seconds['peer 0'])} layer, times {args.layers}"
    rows = [
        Row(
            case=case % name, ours=sum(seconds[mine]), units="s", peer=args.layers * theirs,
            higher_is_better=False, target="ratio >= 10", peer_name=told, runs=seconds,
        )
        for name, mine, theirs in (("1 label", "one", per["peer 0"]), ("2 labels", "two", both))
    ]  # fmt: skip
    report("probes", rows, args.out)


if __name__ == "__main__":
    main()
