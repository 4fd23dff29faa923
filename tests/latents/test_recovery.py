"""How well a dictionary recovers known features: closed forms."""

import itertools

import numpy as np
import pytest
import torch

from pipeline.latents import recovery
from pipeline.latents.fidelity import one_to_one, unit


def matched(cosines: np.ndarray) -> np.ndarray:
    """The column of each row, -1 for none."""
    out = np.full(len(cosines), -1)
    rows, columns = one_to_one(cosines)
    out[rows] = columns
    return out


def test_matching_is_the_best_of_all_one_to_one_matchings():
    cosines = np.random.default_rng(0).random((4, 6))
    total = lambda features: sum(cosines[i, j] for i, j in enumerate(features))  # noqa: E731
    best = max(itertools.permutations(range(6), 4), key=total)
    assert matched(cosines).tolist() == list(best)
    more_latents = matched(cosines.T)
    assert (more_latents < 0).sum() == 2 and len(set(more_latents[more_latents >= 0])) == 4


def test_cosines_ignore_sign_and_length():
    directions = torch.eye(3)[:2]
    decoder = torch.tensor([[0.0, -7.0, 0.0], [3.0, 4.0, 0.0]])
    torch.testing.assert_close(
        recovery.cosine(decoder, directions), torch.tensor([[0.0, 1.0], [0.6, 0.8]])
    )


def test_uniqueness_counts_different_features():
    assert recovery.uniqueness(np.array([3, 3, 5, 9])) == 0.75


def test_f1_of_a_latent_that_is_right_half_of_the_time():
    """Two of four firings are true, and two of three of the feature's are caught."""
    on = torch.tensor([1, 1, 1, 1, 0, 0], dtype=torch.bool)[:, None]
    truth = torch.tensor([[1, 0], [1, 0], [0, 1], [0, 1], [1, 0], [0, 0]], dtype=torch.bool)
    counts = recovery.Confusion(torch.tensor([0]))
    counts.add(on[:3], truth[:3])
    counts.add(on[3:], truth[3:])
    rates = counts.rates()
    assert rates["precision"][0] == 1 / 2 and rates["recall"][0] == pytest.approx(2 / 3)
    assert rates["f1"][0] == pytest.approx(2 * (1 / 2) * (2 / 3) / (1 / 2 + 2 / 3))


def test_a_latent_that_never_fires_has_no_precision_and_no_f1():
    counts = recovery.Confusion(torch.tensor([1, 0]))
    counts.add(torch.zeros(5, 2, dtype=torch.bool), torch.ones(5, 2, dtype=torch.bool))
    assert all((v == 0).all() for v in counts.rates().values())


def test_rows_of_norm_one_keep_their_direction():
    rows = unit(np.array([[3.0, 4.0], [0.0, -2.0]]))
    assert rows.tolist() == [[0.6, 0.8], [0.0, -1.0]]


def test_explained_variance_is_that_of_all_samples_at_once():
    x, noise = torch.randn(40, 5) + 3, torch.randn(40, 5) / 10
    sums = recovery.Reconstruction()
    for some in (slice(0, 7), slice(7, 40)):
        sums.add(x[some], (x + noise)[some], x[some] > 3)
    found = sums.summary()
    residual, centred = noise.double(), (x - x.double().mean(0))
    want = 1 - residual.pow(2).sum() / centred.pow(2).sum()
    assert found["explained_variance"] == pytest.approx(float(want), abs=1e-6)
    assert found["l0"] == pytest.approx(float((x > 3).sum() / 40))


def test_shrinkage_is_the_mean_over_samples_that_have_a_length():
    """Two of three samples are shorter in the reconstruction; the third is zero."""
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 2.0]])
    sums = recovery.Reconstruction()
    sums.add(x, x * torch.tensor([0.5, 1.0, 0.75])[:, None], x > 0)
    assert sums.summary()["shrinkage"] == pytest.approx((0.5 + 0.75) / 2)
