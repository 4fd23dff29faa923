"""Probes in closed form against NumPy, and the probe with one hidden layer."""

import numpy as np
import pytest
import torch
from test_logistic import made, planted

from pipeline.probes import closed, mlp
from pipeline.probes.logistic import Tasks, logits, moments
from pipeline.probes.measured import as_they_are
from pipeline.spec.measured import MlpSpec


@pytest.fixture(scope="module")
def rows():
    """(rows [1 n d], tasks: all rows, and some of them)."""
    X = made()[:1]
    return X, Tasks(torch.stack([planted(X, 3, 1), planted(X, 2, 2, missing=0.5)]), [3, 2])


def test_ridge_solves_the_normal_equations(rows):
    X, tasks = rows
    W = closed.ridge(X, tasks, 2.0)
    for p, n in enumerate(tasks.n_classes):
        known = (tasks.codes[p] >= 0).numpy()
        x, y = X[0].numpy()[known].astype(float), tasks.codes[p].numpy()[known]
        targets = 2.0 * np.eye(n)[y] - 1
        centred = x - x.mean(0)
        want = np.linalg.solve(centred.T @ centred + 2 * np.eye(12), centred.T @ targets)
        np.testing.assert_allclose(W[0, :-1, p, :n], want, atol=1e-4)
        np.testing.assert_allclose(W[0, -1, p, :n], targets.mean(0) - x.mean(0) @ want, atol=1e-4)


def test_ridge_of_several_layers_on_two_threads_is_that_of_each_alone():
    """What a run with -c2 does; a batched LU of this size raises there (torch 2.13, MKL)."""
    g = torch.Generator().manual_seed(0)
    X, targets = torch.randn(3, 400, 200, generator=g), torch.randn(400, 1, 2, generator=g)
    known, before = torch.ones(400, 1, dtype=torch.bool), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = closed.least_squares(X, targets, known, 1.0)
    finally:
        torch.set_num_threads(before)
    alone = [closed.least_squares(x[None], targets, known, 1.0) for x in X]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_the_difference_of_means_names_the_nearest_mean_of_the_stream(rows):
    """In the stream's own units, though the rows are standardised."""
    X, tasks = rows
    sd = torch.linspace(0.1, 5, 12)[None]
    raw, codes = (X * sd[:, None])[0], tasks.codes[0]
    centres = torch.stack([raw[codes == c].mean(0) for c in range(3)])
    want = torch.cdist(raw, centres).argmin(1)
    W = closed.mean_difference(X, tasks, sd)
    assert torch.equal(logits(X, W, tasks.n_classes)[0, :, 0].argmax(-1), want)
    plain = as_they_are(W[0, :, 0, :3], torch.zeros(12), sd[0])[:, :-1]
    torch.testing.assert_close(plain, centres, atol=1e-4, rtol=1e-4)


def test_the_mass_mean_whitens_what_differs_within_classes(rows):
    X, tasks = rows
    W = closed.mass_mean(X, tasks)
    x, y = X[0].double(), tasks.codes[0]
    centres = torch.stack([x[y == c].mean(0) for c in range(3)])
    left = x - centres[y]
    covariance = left.T @ left / len(x)
    covariance += closed.FLOOR * covariance.diagonal().mean() * torch.eye(12)
    found = (W[0, :-1, 0, 1] - W[0, :-1, 0, 0]).double()
    torch.testing.assert_close(covariance @ found, centres[1] - centres[0], atol=1e-4, rtol=1e-3)


def test_the_mass_mean_says_the_posterior_of_normal_classes_that_are_not_equally_frequent():
    X = made(n=900)[:1]
    y = torch.arange(900).remainder(9).clamp(max=2)  # shares of 1/9, 1/9 and 7/9
    x = X[0] + 0.7 * torch.randn(3, 12, generator=torch.Generator().manual_seed(4))[y]
    z = logits(x[None], closed.mass_mean(x[None], Tasks(y[None], [3])), [3])[0, :, 0].double()
    x = x.double()
    centres = torch.stack([x[y == c].mean(0) for c in range(3)])
    left = x - centres[y]
    covariance = left.T @ left / len(x)
    covariance += closed.FLOOR * covariance.diagonal().mean() * torch.eye(12)
    normal = torch.distributions.MultivariateNormal(centres, covariance)
    log_p = normal.log_prob(x[:, None]) + torch.bincount(y).double().log()
    torch.testing.assert_close(z.log_softmax(-1), log_p.log_softmax(-1), atol=1e-3, rtol=1e-3)


def test_weights_for_rows_as_they_are_give_the_same_logits():
    raw = 3 + 2 * made()
    mean, sd = moments(raw)
    X = (raw - mean[:, None]) / sd[:, None]
    W = torch.randn(2, 13, 1, 4, generator=torch.Generator().manual_seed(0))
    plain = as_they_are(W[1, :, 0], mean[1], sd[1])
    found = raw[1] @ plain[:, :-1].T + plain[:, -1]
    torch.testing.assert_close(found, logits(X, W, [4])[1, :, 0], atol=1e-4, rtol=1e-4)


def test_the_hidden_layer_learns_what_no_line_parts():
    """Exclusive or; a linear probe stays near chance."""
    draw = torch.Generator().manual_seed(0)
    X = torch.randn(1, 2000, 4, generator=draw)
    codes = ((X[0, :, 0] > 0) ^ (X[0, :, 1] > 0)).long()
    tasks = Tasks(codes[None], [2])
    spec = MlpSpec(hidden=32, epochs=30, batch_size=128, lr=1e-2)
    probe = mlp.fit(X, tasks, spec, seed=0)
    right = (probe.logits(X, [2])[0, :, 0].argmax(-1) == codes).float().mean()
    line = (logits(X, closed.ridge(X, tasks, 1.0), [2])[0, :, 0].argmax(-1) == codes).float().mean()
    assert right > 0.9 and line < 0.65


def test_a_seed_gives_the_same_hidden_layer_and_another_seed_another(rows):
    X, tasks = rows
    spec = MlpSpec(hidden=4, epochs=1)
    a, b, c = (mlp.fit(X, tasks, spec, seed).weights[0] for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_ridge_of_many_rows_with_rare_large_values_is_that_of_double_precision(monkeypatch):
    """Dimensions like those of a stream whose first position is thousands of times the others."""
    monkeypatch.setattr(closed, "ROWS", 7000)
    g = torch.Generator().manual_seed(0)
    X = torch.randn(1, 40_000, 3, generator=g) @ torch.randn(3, 24, generator=g) * 0.01
    X[:, ::997] += 30 * torch.randn(24, generator=g)  # few rows, one direction, 97 deviations
    targets = torch.randn(40_000, 1, 1, generator=g)
    known = torch.ones(40_000, 1, dtype=torch.bool)
    W = closed.least_squares(X, targets, known, 1e-4)[0, :-1, 0]
    x, t = X[0].double(), targets[:, 0].double()
    x, t = x - x.mean(0), t - t.mean(0)
    want = torch.linalg.solve(x.T @ x + 1e-4 * torch.eye(24).double(), x.T @ t)
    torch.testing.assert_close(W.double(), want, atol=1e-3, rtol=1e-3)


def test_logits_of_a_hidden_layer_are_the_same_in_pieces(rows, monkeypatch):
    X, tasks = rows
    probe = mlp.fit(X, tasks, MlpSpec(hidden=4, epochs=1), 0)
    whole = probe.logits(X, tasks.n_classes)
    monkeypatch.setattr(mlp, "UNITS", 8 * 4 * 7)
    torch.testing.assert_close(probe.logits(X, tasks.n_classes), whole)
