"""Correlations of estimates: against scipy, by leaving out one by one, and on paper."""

import numpy as np
import pytest
from scipy import stats

from pipeline.latents.agreement import agreement, correlation, without_each


@pytest.mark.parametrize("n", [5, 50])
@pytest.mark.parametrize("seed", range(3))
def test_against_scipy_and_a_loop(n, seed):
    rng = np.random.default_rng(seed)
    a = rng.standard_t(2, n)  # heavy tails
    b = a + rng.normal(size=n)
    b[1] = b[0]  # a tie
    found = agreement(a, b)
    assert found.pearson == pytest.approx(stats.pearsonr(a, b).statistic)
    assert found.spearman == pytest.approx(stats.spearmanr(a, b).statistic)
    loop = [stats.pearsonr(np.delete(a, i), np.delete(b, i)).statistic for i in range(n)]
    np.testing.assert_allclose(without_each(a, b), loop, atol=1e-9)
    assert found.largest == int(np.argmax(np.abs(np.array(loop) - found.pearson)))
    assert found.without_largest == pytest.approx(loop[found.largest])


def test_one_part_that_makes_the_correlation():
    """Ten parts in no relation and one far off on the diagonal: .99, and 0 without it."""
    a = np.array([1.0, -1, 1, -1, 1, -1, 1, -1, 0, 0, 1000])
    b = np.array([1.0, 1, -1, -1, 1, 1, -1, -1, 0, 0, 1000])
    found = agreement(a, b)
    assert found.largest == 10 and found.pearson > 0.999
    assert found.without_largest == pytest.approx(0, abs=1e-12)


def test_one_part_that_hides_the_correlation():
    exact = np.arange(10.0)
    estimate = exact.copy()
    estimate[0] = 500.0
    found = agreement(estimate, exact)
    assert found.pearson < 0 and found.largest == 0
    assert found.without_largest == pytest.approx(1)


def test_what_has_no_value():
    assert np.isnan(correlation([1.0], [2.0])) and np.isnan(correlation([1, 1], [1, 2]))
    nothing = agreement([0.0, 0, 0], [1.0, 2, 3])
    assert np.isnan(nothing[:3]).all() and nothing.largest == -1
    alone = agreement([0.0, 0, 7, 0], [0.1, 0.2, 9, 0.3])  # all that varies is the third
    assert alone.largest == 2 and np.isnan(alone.without_largest) and alone.pearson > 0.99
    two = agreement([0.0, 1], [0.0, 2])
    assert two.pearson == pytest.approx(1) and two.largest == -1


def test_the_three_correlations_have_the_names_of_their_metrics():
    found = agreement([1.0, 2.0, 4.0, 3.0], [1.0, 2.0, 3.0, 9.0])
    assert found.correlations == {
        "correlation": found.pearson, "spearman": found.spearman,
        "correlation_without_largest": found.without_largest,
    }  # fmt: skip
