"""Probes against scikit-learn's solutions; run by tests/libraries/run.sh, which installs it."""

import os
import sys

import numpy as np
import pytest
import torch
from test_logistic import made, planted

from pipeline.probes import closed, logistic
from pipeline.probes.logistic import Tasks, logits

LIBRARIES = os.environ.get("RETRACE_LIBRARIES")
if not LIBRARIES:
    pytest.skip("needs scikit-learn: tests/libraries/run.sh", allow_module_level=True)
sys.path.append(LIBRARIES)  # behind the project's own packages


@pytest.fixture(scope="module")
def rows():
    """(rows [2 n d], two tasks; some rows of the second have no label)."""
    X = made()
    return X, Tasks(torch.stack([planted(X, 5, 1), planted(X, 3, 2, missing=0.5)]), [5, 3])


def each(rows):
    """(layer, task, rows, codes, classes) of every labelled problem, as NumPy arrays in float64."""
    X, tasks = rows
    for i, x in enumerate(X.numpy().astype(float)):
        for p, n in enumerate(tasks.n_classes):
            codes = tasks.codes[p].numpy()
            yield i, p, x[codes >= 0], codes[codes >= 0], n


@pytest.mark.parametrize("l2", [0.1, 1.0, 30.0])
def test_logistic_has_the_loss_of_logistic_regression(rows, l2):
    """The objective of LogisticRegression(C=1 / l2), to 1e-6 nats a row."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    found = logistic.fit(*rows, l2)
    for i, p, x, codes, _ in each(rows):
        theirs = LogisticRegression(C=1 / l2, tol=1e-9, max_iter=100_000).fit(x, codes)
        want = log_loss(codes, theirs.predict_proba(x))
        want += 0.5 * l2 * (theirs.coef_**2).sum() / len(x)
        assert found.loss[i, p].item() == pytest.approx(want, abs=1e-6)


def test_ridge_is_ridge_classifier(rows):
    from sklearn.linear_model import RidgeClassifier

    X, tasks = rows
    z = logits(X, closed.ridge(X, tasks, 2.0), tasks.n_classes)
    for i, p, x, codes, n in each(rows):
        theirs = RidgeClassifier(alpha=2.0).fit(x, codes)
        mine = z[i, tasks.codes[p] >= 0, p, :n].numpy()
        np.testing.assert_allclose(mine, theirs.decision_function(x), atol=1e-4)


def test_mass_mean_is_linear_discriminant_analysis(rows, monkeypatch):
    """Without the floor under the covariance, which scikit-learn has not."""
    monkeypatch.setattr(closed, "FLOOR", 0.0)
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    X, tasks = rows
    z = logits(X, closed.mass_mean(X, tasks), tasks.n_classes)
    for i, p, x, codes, n in each(rows):
        theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(x, codes)
        mine = z[i, tasks.codes[p] >= 0, p, :n].argmax(-1).numpy()
        assert (mine == theirs.predict(x)).mean() > 0.995  # float32 against float64


def test_the_mean_difference_is_nearest_centroid(rows):
    from sklearn.neighbors import NearestCentroid

    X, tasks = rows
    z = logits(X, closed.mean_difference(X, tasks, torch.ones(2, 12)), tasks.n_classes)
    for i, p, x, codes, n in each(rows):
        mine = z[i, tasks.codes[p] >= 0, p, :n].argmax(-1).numpy()
        assert (mine == NearestCentroid().fit(x, codes).predict(x)).all()
