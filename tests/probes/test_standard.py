"""Probes in the stream's own units: readings as of standardised rows, and borders."""

import torch
from test_logistic import made, planted

from pipeline.probes import logistic
from pipeline.probes.logistic import Tasks
from pipeline.probes.standard import Standard


def test_readings_and_borders_are_those_of_standardised_rows():
    X = made() * 7 + 3
    tasks = Tasks(torch.stack([planted(X, 5, 1), planted(X, 3, 2)]), [5, 3])
    probes = Standard(X, tasks, 1.0)
    mean, sd = logistic.moments(X)
    rows = (X - mean[:, None]) / sd[:, None]
    W = logistic.fit(rows, tasks, 1.0, tolerance=1e-6).W
    z = logistic.logits(rows, W, [5, 3])
    assert torch.allclose(torch.cat(list(probes.logits(X)), 1), z, atol=1e-4)
    which = torch.tensor([1, 0])
    w, b = probes.border(1, which, 2, 0)
    found = X[1, :2] @ w.T + b
    assert torch.allclose(found, (z[1, :2, :, 2] - z[1, :2, :, 0])[:, which], atol=1e-3)
