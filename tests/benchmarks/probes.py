"""Logistic probes of many layers against scikit-learn's LogisticRegression, layer by layer.

    pip install --no-deps --target FOLDER scikit-learn joblib threadpoolctl
    python tests/benchmarks/probes.py --scikit-learn FOLDER

ours     pipeline.probes.logistic.fit of all layers, as many at a time as the stage takes
peer     scikit-learn's default solver (lbfgs) on the same rows, float32, one layer after another;
         timed on the first layers (--peer-layers), and counted for all of them
equal    how far each objective ends above the lower one, nats a row

The rows are made: directions whose scales fall as 1 / sqrt(i), turned at random, with a few
dimensions that are far larger than the rest, as in a residual stream; then standardised, which both
are given. The classes follow a noisy linear rule. scikit-learn stops at --tolerance (its `tol`, the
largest entry of the gradient of the mean loss): 1e-5 brings it within 1e-6 nats a row, and its own
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


def classes_of(X, n_classes: int):
    """Codes [n] of a noisy linear rule."""
    import torch

    draw = torch.Generator().manual_seed(1)
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
    parser.add_argument("--tolerance", type=float, default=1e-5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(args.threads)
    sys.path.append(args.scikit_learn)  # behind the project's own packages

    import torch
    from sklearn.linear_model import LogisticRegression

    from pipeline.probes import logistic, measured

    torch.set_num_threads(args.threads)
    codes = classes_of(rows_of(0, args.rows, args.d_model), args.classes)
    tasks = logistic.Tasks(codes[None], [args.classes])
    names = [f"layer {i}" for i in range(args.layers)]
    widths = [args.d_model] * args.layers
    taken = measured.groups(names, args.rows, widths, torch.device("cpu"))
    ours, theirs, above = [], [], []
    for group in taken:
        at = [names.index(name) for name in group]
        X = torch.cat([rows_of(i, args.rows, args.d_model) for i in at])
        found = {}

        def fit(X=X, found=found):
            found["ours"] = logistic.fit(X, tasks, args.l2)

        work = {"ours": fit}
        if at[0] < args.peer_layers:
            x, y = X[0].numpy(), codes.numpy()
            settings = {"C": 1 / args.l2, "tol": args.tolerance, "max_iter": 10_000}

            def peer(x=x, y=y, found=found, settings=settings):
                found["peer"] = LogisticRegression(**settings).fit(x, y)

            work["peer"] = peer
        seconds = interleaved(work, args.repeats, warm_up=0)
        ours.append(median(seconds["ours"]))
        print(f"{', '.join(group)}: {ours[-1]:.1f} s, {found['ours'].passes} passes", flush=True)
        if "peer" not in work:
            continue
        theirs.append(median(seconds["peer"]))
        W, model = found["ours"].W[0, :, 0].numpy(), found["peer"]
        ends = [
            objective(x, y, W[:-1], W[-1], args.l2),
            objective(x, y, model.coef_.T, model.intercept_, args.l2),
        ]
        above.append([end - min(ends) for end in ends])
        took = f"{theirs[-1]:.1f} s, {model.n_iter_[0]} iterations"
        print(f"{group[0]}, scikit-learn: {took}", flush=True)
        print("above the lower loss: ours {:.1e}, peer {:.1e}".format(*above[-1]), flush=True)
    mine, other = sum(ours), args.layers * sum(theirs) / len(theirs)
    row = Row(
        case=f"{args.layers} layers of {args.rows:,} rows, {args.classes} classes",
        ours=mine, units="s", peer=other, higher_is_better=False, target="ratio >= 10",
        peer_name=f"scikit-learn, {args.layers} times {len(theirs)} layer's mean",
        runs={"ours": ours, "peer": theirs},
    )  # fmt: skip
    report("probes", [row], args.out)


if __name__ == "__main__":
    main()
