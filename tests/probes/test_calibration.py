"""Calibration against a published interval, hand-made bins and probabilities that are true."""

import numpy as np
import pytest

from pipeline.probes import calibration

P = np.array([0.05, 0.1, 0.55, 0.55, 0.95, 1.0])
RIGHT = np.array([False, True, True, False, True, True])


def test_the_interval_is_wilsons():
    """15 of 148 (Newcombe 1998, Table I, method 3, which prints 0.0624 to 0.1605)."""
    found = calibration.share(np.arange(148) < 15)
    assert (found["low"], found["high"]) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert found["n"] == 148 and found["share"] == 15 / 148
    assert np.isnan(calibration.share(np.zeros(0, bool))["share"])


def test_bins_by_hand():
    rows = calibration.bins(P, RIGHT, 2)
    assert [(r["n"], r["share"]) for r in rows] == [(2, 0.5), (4, 0.75)]
    assert [r["confidence"] for r in rows] == pytest.approx([0.075, 0.7625])
    assert calibration.calibration_error(P, RIGHT, 2) == pytest.approx((2 * 0.425 + 4 * 0.0125) / 6)
    rows = calibration.bins(P, RIGHT, 3, adaptive=True)
    assert [(r["n"], r["share"]) for r in rows] == [(2, 0.5), (2, 0.5), (2, 1.0)]


def test_bins_are_closed_above_as_in_guo_et_al():
    """I_m = ((m - 1) / M, m / M]; probabilities of quarters lie on the borders of four bins."""
    p = np.array([1.0, 0.5, 0.25, 0.75, 0.26, 0.5])
    by_sentence = [[i for i in range(6) if m / 4 < p[i] <= (m + 1) / 4] for m in range(4)]
    assert [sorted(rows.tolist()) for rows in calibration.parts(p, 4)] == by_sentence
    assert calibration.parts(np.zeros(2), 4)[0].tolist() == [0, 1]  # and 0 lies in the first


@pytest.mark.parametrize("adaptive", [False, True])
def test_error_is_a_plain_sum_over_bins(adaptive):
    rng = np.random.default_rng(0)
    p = rng.random(500)
    right = rng.random(500) < p**2
    found = calibration.bins(p, right, 7, adaptive)
    want = sum(b["n"] * abs(b["share"] - b["confidence"]) for b in found) / 500
    assert calibration.calibration_error(p, right, 7, adaptive) == pytest.approx(want)
    assert sum(b["n"] for b in found) == 500


def test_true_probabilities_lie_at_the_floor_and_boasts_far_above():
    rng = np.random.default_rng(1)
    p = rng.random(2000)
    right = rng.random(2000) < p
    found = calibration.errors(p, right)
    assert found["low"] < found["ece"] < found["high"]
    assert abs(found["ece"] - found["floor"]) < 0.02 < found["floor"] + 0.02
    boast = calibration.errors(np.clip(p + 0.3, 0, 1), right)
    assert boast["low"] > found["high"] and boast["ece"] > 10 * boast["floor"]


def test_the_bootstrap_covers_the_mean_as_the_normal_interval_does():
    x = np.random.default_rng(2).normal(size=400)
    low, high = calibration.bootstrap(lambda v: float(v.mean()), x, n_draws=2000)
    half = 1.96 * x.std() / 20
    assert (low, high) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.02)
