"""Logistic probes against another solver of the same objective, and the code that rests on them."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from pipeline.probes import codelength, logistic
from pipeline.probes.logistic import Tasks


def made(n: int = 600, d: int = 12, n_layers: int = 2, seed: int = 0) -> torch.Tensor:
    """Standardised rows whose directions are as unlike in scale as a residual stream's."""
    draw = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(d, d, generator=draw))[0]
    X = torch.randn(n_layers, n, d, generator=draw) * (10.0 ** -torch.arange(d).div(4)) @ turn
    mean, sd = logistic.moments(X)
    return (X - mean[:, None]) / sd[:, None]


def planted(X: torch.Tensor, n_classes: int, seed: int, missing: float = 0.0) -> torch.Tensor:
    """Classes that follow a noisy linear rule of the first layer; a share of them is unknown."""
    draw = torch.Generator().manual_seed(seed)
    W = torch.randn(X.shape[2], n_classes, generator=draw)
    noise = -torch.log(-torch.log(torch.rand(X.shape[1], n_classes, generator=draw)))
    codes = (X[0] @ W + noise).argmax(1)
    return torch.where(torch.rand(len(codes), generator=draw) < missing, -1, codes)


def reference(X: np.ndarray, codes: np.ndarray, n_classes: int, l2: float) -> float:
    """The least mean loss by SciPy's L-BFGS-B in float64, as scikit-learn calls it."""
    X, codes = X[codes >= 0].astype(float), codes[codes >= 0]
    n, d = X.shape

    def objective(w: np.ndarray) -> tuple[float, np.ndarray]:
        W = w.reshape(d + 1, n_classes)
        z = X @ W[:-1] + W[-1]
        log_p = z - np.logaddexp.reduce(z, 1, keepdims=True)
        r = np.exp(log_p)
        r[np.arange(n), codes] -= 1
        grad = np.vstack([X.T @ r + l2 * W[:-1], r.sum(0)])
        loss = -log_p[np.arange(n), codes].sum() + 0.5 * l2 * (W[:-1] ** 2).sum()
        return loss / n, grad.ravel() / n

    options = {"maxiter": 10_000, "maxfun": 20_000, "ftol": 1e-15, "gtol": 1e-9}
    start = np.zeros((d + 1) * n_classes)
    return minimize(objective, start, jac=True, method="L-BFGS-B", options=options).fun


@pytest.mark.parametrize("l2", [0.1, 1.0, 30.0])
def test_the_loss_is_that_of_another_solver(l2):
    """All layers and tasks in one solve: classes of other numbers, rows without a label."""
    X = made()
    tasks = Tasks(torch.stack([planted(X, 5, 1), planted(X, 2, 2, missing=0.6)]), [5, 2])
    found = logistic.fit(X, tasks, l2)
    for i, x in enumerate(X.numpy()):
        for p, n in enumerate(tasks.n_classes):
            want = reference(x, tasks.codes[p].numpy(), n, l2)
            assert found.loss[i, p].item() == pytest.approx(want, abs=1e-6)
    assert (found.W[:, :, 1, 2:] == 0).all()  # the second task has two classes


def test_a_search_that_begins_elsewhere_ends_at_the_same_loss():
    X = made()
    tasks = Tasks(planted(X, 4, 3)[None], [4])
    start = 0.3 * torch.randn(2, 13, 1, 4, generator=torch.Generator().manual_seed(5))
    cold, warm = logistic.fit(X, tasks, 1.0), logistic.fit(X, tasks, 1.0, start)
    torch.testing.assert_close(cold.loss, warm.loss, atol=1e-6, rtol=0)


def test_layers_and_tasks_do_not_see_each_other():
    X = made()
    codes = torch.stack([planted(X, 4, 3), planted(X, 4, 4, missing=0.3)])
    both = logistic.fit(X, Tasks(codes, [4, 4]), 1.0)
    alone = logistic.fit(X[1:], Tasks(codes[1:], [4]), 1.0)
    torch.testing.assert_close(both.loss[1:, 1:], alone.loss, atol=1e-6, rtol=0)


def test_the_gradient_is_that_of_the_loss():
    X = made(n=50, d=6)
    tasks = Tasks(torch.stack([planted(X, 3, 1), planted(X, 2, 2, missing=0.4)]), [3, 2])
    W = torch.randn(2, 7, 2, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)
    z = logistic.logits(X, W, tasks.n_classes)
    counts = (tasks.codes >= 0).sum(1)
    plain = logistic.losses(z, tasks).sum(1) / counts
    plain = plain + 0.5 * 2.0 * W[:, :-1].square().sum((1, 3)) / counts
    want = torch.autograd.grad(plain.sum(), W)[0]
    loss, grad = logistic.Objective(X, tasks, 2.0)(W.detach())
    torch.testing.assert_close(loss.float(), plain.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grad, want, atol=1e-5, rtol=1e-4)


def test_pieces_of_rows_change_nothing(monkeypatch):
    X = made()
    tasks = Tasks(planted(X, 3, 1, missing=0.2)[None], [3])
    W = torch.randn(2, 13, 1, 3, generator=torch.Generator().manual_seed(1))
    whole = logistic.Objective(X, tasks, 1.0)(W)
    monkeypatch.setattr(logistic, "PIECE", 64)
    torch.testing.assert_close(logistic.Objective(X, tasks, 1.0)(W), whole, atol=1e-5, rtol=1e-5)


def test_classes_that_a_line_parts_have_a_finite_probe():
    X = made()
    tasks = Tasks((X[0, :, 0] > 0).long()[None], [2])
    found = logistic.fit(X, tasks, 1.0)
    assert found.W.isfinite().all() and found.loss[0, 0] < 0.2


# --- the online code -----------------------------------------------------------------------


def test_portions_about_double_and_end_at_all_rows():
    found = codelength.ends(10_000)
    assert found[0] >= codelength.LEAST and found[-1] == 10_000
    assert all(1.5 < b / a < 2.6 for a, b in pairwise(found))
    assert codelength.ends(20) == [20]


def test_easy_labels_cost_fewer_bits_than_random_ones():
    """Random labels cost about the uniform code, and no less."""
    X = made(n=2000)[:1]
    draw = torch.Generator().manual_seed(7)
    easy = (X[0, :, 0] > 0).long()
    noise = torch.randint(0, 2, (2000,), generator=draw)
    tasks = Tasks(torch.stack([easy, noise]), [2, 2])
    bits, whole = codelength.online(X, tasks, 1.0)[0], codelength.uniform(tasks)
    assert whole.tolist() == [2000, 2000]
    assert bits[0] < 0.25 * whole[0] and 0.98 * whole[1] < bits[1] < 1.3 * whole[1]


def test_the_code_of_one_portion_is_uniform():
    X = made(n=20)
    tasks = Tasks(torch.arange(20)[None] % 4, [4])
    assert codelength.online(X, tasks, 1.0).tolist() == [[40.0], [40.0]]


def test_what_activations_say_nothing_of_costs_the_bits_of_the_frequencies_so_far():
    """Of activations that are all alike a probe knows how often each class came, and no more."""
    n, n_classes = 300, 3
    codes = torch.randint(0, n_classes, (n,), generator=torch.Generator().manual_seed(2)) // 2 * 2
    codes[5] = 1
    stops = codelength.ends(n)
    want = stops[0] * math.log2(n_classes)
    for start, stop in pairwise(stops):
        count = torch.bincount(codes[:start], minlength=n_classes).double()
        p = (count + 1 / n_classes) / (start + 1)  # start times the frequency, and 1 / C once
        want -= float(p[codes[start:stop]].log2().sum())
    found = codelength.online(torch.zeros(1, n, 4), Tasks(codes[None], [n_classes]), 1.0)
    assert found.item() == pytest.approx(want, rel=1e-3)


def test_rows_without_a_label_are_not_sent():
    X = made(n=400)[:1]
    codes = planted(X, 2, 1)
    gaps = torch.where(torch.arange(400) % 2 == 0, codes, -1)
    some = codelength.online(X, Tasks(gaps[None], [2]), 1.0)
    assert codelength.uniform(Tasks(gaps[None], [2])).tolist() == [200]
    assert 0 < some.item() < codelength.online(X, Tasks(codes[None], [2]), 1.0).item()


def test_a_class_that_comes_late_costs_finitely_many_bits():
    X = made(n=400)[:1]
    codes = (torch.arange(400) > 300).long()
    assert codelength.online(X, Tasks(codes[None], [2]), 1.0).isfinite().all()


def test_a_looser_tolerance_takes_fewer_passes_and_ends_near_the_least_loss():
    rng = torch.Generator().manual_seed(0)
    X = torch.randn(1, 400, 30, generator=rng)
    tasks = logistic.Tasks(torch.randint(0, 3, (1, 400), generator=rng), [3])
    exact, loose = (logistic.fit(X, tasks, 0.1, tolerance=t) for t in (2e-8, 1e-4))
    assert loose.passes < exact.passes
    assert 0 <= float(loose.loss - exact.loss) < 1e-3
