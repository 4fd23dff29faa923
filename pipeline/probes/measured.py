"""Probes of a bench of rows: fitted on the training rows, judged on the others. [torch]

1. `tasks_of` puts the labels of a bench and their control tasks side by side, so that one fit
   serves all of them.
2. `measure` fits every method on a group of layers, for a split and a seed, and gives a row of the
   table scores for each hook, label and method; on rows held out one by one, the first method only.
3. Baselines that see no activations have rows of their own, with the method's name and no hook.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.errors import RetraceError
from pipeline.probes import closed, codelength, controls, logistic, mlp
from pipeline.probes.logistic import Tasks
from pipeline.probes.rows import Bench, held_out
from pipeline.spec.measured import ProbesSpec
from pipeline.text.labels import Labels

# Bytes of activations that are fitted at a time; a layer at least.
GROUP_BYTES = {"cpu": 256 << 20, "cuda": 24 << 30}
NAN = float("nan")


@dataclass(frozen=True)
class Draw:
    """A bench with what a split and a seed make of it.

    Attributes:
        test: held-out rows, bool [n].
        real, control: label -> codes int64 [n], -1 where there is none.
        numbers: label -> (values, control values) float32 [n], NaN where there is none.
        order: the training rows in the order in which the online code sends them.
    """

    bench: Bench
    split: str
    seed: int
    test: Bool[np.ndarray, " rows"]
    labels: dict[str, Labels]
    real: dict[str, np.ndarray]
    control: dict[str, np.ndarray]
    numbers: dict[str, tuple[np.ndarray, np.ndarray]]
    order: Int[np.ndarray, " train_rows"]

    def tasks(self, rows: Int[np.ndarray, " some_rows"], device: torch.device) -> Tasks:
        """The real tasks of some rows, then the control tasks."""
        every = [*self.real.values(), *self.control.values()]
        n_classes = [len(self.labels[name].classes) for name in [*self.real, *self.control]]
        codes = torch.from_numpy(np.stack([c[rows] for c in every]).astype(np.int64))
        return Tasks(codes.to(device), n_classes)


def draw(bench: Bench, labels: dict[str, Labels], spec: ProbesSpec, split: str, seed: int) -> Draw:
    """What a split and a seed make of a bench.

    Raises:
        RetraceError: one class only is left to learn from, or too few word types.
    """
    test = held_out(bench, split, spec.test, seed)
    has_control = spec.control and bench.per == "token"
    real, control, numbers = {}, {}, {}
    for name, found in labels.items():
        values = bench.labels(found)
        if not found.classes:
            numbers[name] = values, control_numbers(values, bench.token, seed, has_control)
            continue
        real[name] = values
        there = np.unique(values[~test & (values >= 0)])
        if len(there) < 2 or not (values[test] >= 0).any():
            named = ", ".join(found.classes[c] for c in there) or "none"
            raise RetraceError(
                f"probes.labels.{name}: one class only to learn from ({named}), or no row to be "
                f"judged on, by {split} at seed {seed}; take more text, or raise probes.n_rows"
            )
        if has_control:
            n = len(found.classes)
            control[name] = controls.control(name, values, bench.token, n, seed)
    train = np.flatnonzero(~test)
    sent = np.random.default_rng([seed, 2]).permutation(np.unique(bench.document))
    rank = np.argsort(np.argsort(sent))[np.searchsorted(np.unique(bench.document), bench.document)]
    order = train[np.argsort(rank[train], kind="stable")]
    return Draw(bench, split, seed, test, labels, real, control, numbers, order)


def control_numbers(
    values: Float[np.ndarray, " rows"], ids: Int[np.ndarray, " rows"], seed: int, wanted: bool
) -> Float[np.ndarray, " rows"]:
    """A control task of numbers: a value for each word type, drawn from the real ones."""
    out = np.full_like(values, np.nan)
    known = np.isfinite(values)
    if wanted and known.any():
        types, at = np.unique(ids[known], return_inverse=True)
        drawn = np.random.default_rng([seed, 1]).choice(values[known], size=len(types))
        out[known] = drawn[at]
    return out


# --- what is fitted ------------------------------------------------------------------------


@dataclass(frozen=True)
class Fitted:
    """A method's probes of a group of layers, ready to be judged.

    Attributes:
        logits: standardised rows [layers rows dims] -> [layers rows tasks classes].
        W: the weights for standardised rows, the bias last; None: the probe is not linear.
        calibrated: whether its softmax is a probability.
    """

    logits: Callable[[Tensor], Tensor]
    W: Float[Tensor, "layers inputs tasks classes"] | None
    calibrated: bool


def fitted(
    method: str,
    X: Float[Tensor, "layers rows dims"],
    tasks: Tasks,
    sd: Float[Tensor, "layers dims"],
    spec: ProbesSpec,
    seed: int,
) -> Fitted:
    """A method's probes of standardised training rows."""
    if method == "mlp":
        probe = mlp.fit(X, tasks, spec.mlp, seed)
        return Fitted(lambda x: probe.logits(x, tasks.n_classes), None, True)
    W = {
        "logistic": lambda: logistic.fit(X, tasks, spec.l2, tolerance=spec.tolerance).W,
        "ridge": lambda: closed.ridge(X, tasks, spec.l2),
        "mean_difference": lambda: closed.mean_difference(X, tasks, sd),
        "mass_mean": lambda: closed.mass_mean(X, tasks),
    }[method]()
    calibrated = method in ("logistic", "mass_mean")
    return Fitted(lambda x: logistic.logits(x, W, tasks.n_classes), W, calibrated)


def measure(
    drawn: Draw, names: list[str], X: Tensor, spec: ProbesSpec
) -> Iterator[tuple[dict[str, Any], np.ndarray | None]]:
    """A row of the table scores for each hook, label and method; with it a linear probe's weights.

    Args:
        names: the hooks of X.
        X: activations of all rows, float32 [L n d].

    Yields:
        (row, [C d+1] for activations as they are, the bias last; None where it is not linear).
    """
    device, train = X.device, np.flatnonzero(~drawn.test)
    which = {"train": train, "test": np.flatnonzero(drawn.test), "order": drawn.order}
    at = {name: torch.from_numpy(rows).to(device) for name, rows in which.items()}
    mean, sd = logistic.moments(X[:, at["train"]])
    part = {k: (X[:, rows] - mean[:, None]) / sd[:, None] for k, rows in at.items()}
    yield from _numbers(drawn, names, part, spec)
    if not drawn.real:
        return
    tasks = drawn.tasks(train, device)
    bits = None
    if spec.codelength and drawn.split == "document":
        sent = drawn.tasks(drawn.order, device)
        bits = codelength.online(part["order"], sent, spec.l2).cpu(), codelength.uniform(sent)
    del part["order"]
    methods = spec.methods if drawn.split == "document" else spec.methods[:1]
    for method in methods:
        probe = fitted(method, part["train"], tasks, sd, spec, drawn.seed)
        found = _judged(drawn, probe, part, tasks)
        for i, hook in enumerate(names):
            for p, name in enumerate(drawn.real):
                row = {"hook": hook, "probe": method, **_card(drawn, name), **found[i][p]}
                if name in drawn.control:
                    twin = found[i][p + len(drawn.real)]
                    row["control_accuracy"] = twin["accuracy"]
                    row["selectivity"] = row["accuracy"] - twin["accuracy"]
                if bits is not None and method == "logistic":
                    row |= _bits(drawn, name, p, i, *bits)
                weights = None
                if probe.W is not None:
                    own = probe.W[i, :, p, : len(drawn.labels[name].classes)]
                    weights = as_they_are(own, mean[i], sd[i]).cpu().numpy()
                yield row, weights


def as_they_are(
    W: Float[Tensor, "inputs classes"], mean: Float[Tensor, " dims"], sd: Float[Tensor, " dims"]
) -> Float[Tensor, "classes dims+1"]:
    """Weights for rows as they are stored, of the weights W for standardised rows."""
    slopes = (W[:-1] / sd[:, None]).T
    return torch.cat([slopes, (W[-1] - slopes @ mean)[:, None]], 1)


def _card(drawn: Draw, name: str) -> dict[str, Any]:
    """What all rows of a label at a draw share."""
    found, bench = drawn.labels[name], drawn.bench
    values = drawn.real[name] if name in drawn.real else drawn.numbers[name][0]
    known = values >= 0 if found.classes else np.isfinite(values)
    return {
        "label": name,
        "per": bench.per,
        "split": drawn.split,
        "seed": drawn.seed,
        "n_train": int((known & ~drawn.test).sum()),
        "n_test": int((known & drawn.test).sum()),
        "n_classes": len(found.classes),
        "n_types": len(np.unique(bench.token[known])),
    }


def _judged(
    drawn: Draw, probe: Fitted, part: dict[str, Tensor], tasks: Tasks
) -> list[list[dict[str, float]]]:
    """accuracy, balanced_accuracy, loss and train_loss of each layer and task."""
    test = drawn.tasks(np.flatnonzero(drawn.test), part["test"].device)
    z = probe.logits(part["test"])
    guess, codes = z.argmax(-1).cpu().numpy(), test.codes.cpu().numpy()
    nats = [[NAN] * z.shape[2]] * len(z), [[NAN] * z.shape[2]] * len(z)
    if probe.calibrated:
        learnt = probe.logits(part["train"])
        nats = mean_loss(z, test), mean_loss(learnt, tasks)
    out = []
    for i in range(len(z)):
        rows = []
        for p, n in enumerate(tasks.n_classes):
            right, balanced = controls.accuracy(guess[i, :, p], codes[p], n)
            scores = {"accuracy": right, "balanced_accuracy": balanced}
            rows.append(scores | {"loss": nats[0][i][p], "train_loss": nats[1][i][p]})
        out.append(rows)
    return out


def mean_loss(z: Float[Tensor, "layers rows tasks classes"], tasks: Tasks) -> list[list[float]]:
    """Mean cross-entropy over the rows with a label in nats, of each layer and task."""
    counts = (tasks.codes >= 0).sum(1).clamp(min=1)
    return (logistic.losses(z, tasks).double().sum(1) / counts).tolist()


def _bits(drawn: Draw, name: str, p: int, i: int, bits: Tensor, whole: Tensor) -> dict[str, float]:
    """The codelength of a label and of its control, in kbit, and how far below the uniform code."""
    row = {"codelength": bits[i, p] / 1e3, "compression": whole[p] / bits[i, p]}
    if name in drawn.control:
        twin = p + len(drawn.real)
        row["control_codelength"] = bits[i, twin] / 1e3
        row["control_compression"] = whole[twin] / bits[i, twin]
    return {k: float(v) for k, v in row.items()}


def _numbers(
    drawn: Draw, names: list[str], part: dict[str, Tensor], spec: ProbesSpec
) -> Iterator[tuple[dict[str, Any], None]]:
    """Rows of labels that are numbers: R^2 of ridge on held-out rows, and of its control."""
    device = part["train"].device
    for name, pair in drawn.numbers.items():
        found = []
        for values in pair:
            train, test = (
                torch.from_numpy(values[m]).to(device) for m in (~drawn.test, drawn.test)
            )
            if not bool(train.isfinite().any()):
                found.append([NAN] * len(names))
                continue
            targets = train.nan_to_num(0.0)[:, None, None]
            W = closed.least_squares(part["train"], targets, train.isfinite()[:, None], spec.l2)
            guess = part["test"] @ W[:, :-1, 0] + W[:, -1:, 0]
            known = test.isfinite()
            left = (guess[:, known, 0] - test[known]).square().sum(1)
            whole = (test[known] - train[train.isfinite()].mean()).square().sum()
            found.append((1 - left / whole).tolist())
        for i, hook in enumerate(names):
            row = {"hook": hook, "probe": "ridge", **_card(drawn, name), "r2": found[0][i]}
            yield row | {"control_r2": found[1][i], "selectivity": found[0][i] - found[1][i]}, None


def baselines(drawn: Draw) -> Iterator[dict[str, Any]]:
    """Rows of the table scores for what sees no activations."""
    bench, test = drawn.bench, drawn.test
    for name, codes in drawn.real.items():
        n = len(drawn.labels[name].classes)
        guess: dict[str, Callable[[np.ndarray], np.ndarray]] = {
            "majority": lambda c, n=n: controls.majority(c, test, n),
            "bag_of_ids": lambda c, n=n: controls.bag_of_ids(c, test, n, bench.row, bench.ids),
        }
        for method, rule in guess.items():
            right, balanced = controls.accuracy(rule(codes), codes[test], n)
            row = {"hook": "", "probe": method, **_card(drawn, name)}
            row |= {"accuracy": right, "balanced_accuracy": balanced}
            if name in drawn.control:
                twin = drawn.control[name]
                row["control_accuracy"] = controls.accuracy(rule(twin), twin[test], n)[0]
                row["selectivity"] = right - row["control_accuracy"]
            yield row


def groups(names: list[str], n: int, widths: list[int], device: torch.device) -> list[list[str]]:
    """Hooks that are fitted together: of one width, and few enough for memory."""
    out: list[list[str]] = []
    budget = GROUP_BYTES.get(device.type, GROUP_BYTES["cpu"])
    for i, hook in enumerate(names):
        alike = out and widths[i] == widths[i - 1]
        if alike and (len(out[-1]) + 1) * n * widths[i] * 4 <= budget:
            out[-1].append(hook)
        else:
            out.append([hook])
    return out
