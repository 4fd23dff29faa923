"""The paper superposition_scaling: its data, its weight decay, and exponents of known powers."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT

from pipeline.job.source import import_file

PAPER = ROOT / "rules/papers/superposition_scaling"
STAGE = import_file(PAPER / "scaling.py")
METRICS = import_file(PAPER / "metrics.py")


def options(**more):
    given = {"tables": [], "hidden": [2, 3, 4], "alphas": [0], "decays": [0], "seeds": [0]}
    return STAGE.Options(**given | more)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_frequencies_are_a_power_and_sum_to_one():
    p = STAGE.frequencies(50, 0.5)
    assert float(p.sum()) == pytest.approx(1)
    assert float(p[0] / p[3]) == pytest.approx(4**1.5)


def test_features_are_active_at_their_frequencies_and_uniform_on_0_to_2():
    p = torch.tensor([[0.5, 0.1]])
    x = STAGE.rows(p, 40_000, generator())
    assert (x > 0).float().mean(1)[0].tolist() == pytest.approx([0.5, 0.1], abs=0.01)
    assert float(x[x > 0].mean()) == pytest.approx(1, abs=0.02)
    assert float(x.square().mean(1)[0, 0]) == pytest.approx(0.5 * STAGE.MEAN_SQUARE, rel=0.03)


def test_the_rate_warms_up_and_ends_at_a_twentieth():
    how = options(steps=1000, warmup_steps=100, lr=0.01)
    found = [STAGE.rate(step, how) for step in range(1000)]
    assert found[0] == pytest.approx(1e-4) and max(found) == pytest.approx(0.01)
    assert int(np.argmax(found)) == 99 and found[-1] == pytest.approx(5e-4)


def test_decay_shrinks_and_growth_pulls_norms_to_one():
    W = torch.tensor([[[2.0, 0.0], [0.0, 0.5]]] * 2)
    decay = torch.tensor([0.5, -0.5])
    moved = W * STAGE.decayed(W, decay, 0.1)
    assert moved[0].norm(dim=1).tolist() == pytest.approx([1.9, 0.475])
    assert moved[1].norm(dim=1).tolist() == pytest.approx([1.95, 0.525], abs=1e-5)


def test_a_model_that_keeps_the_first_features_has_the_loss_of_the_others():
    p = STAGE.frequencies(6, 0.5)[None]
    W = torch.zeros(1, 6, 2)
    W[0, :2] = torch.eye(2)
    found = STAGE.measured(W, torch.zeros(1, 6), p, options(n_eval=40_000))
    assert found["loss"][0] == pytest.approx(found["unlearned"][0], rel=0.05)
    assert found["represented"][0] == pytest.approx(1 / 3)
    assert found["overlap"][0] == pytest.approx(0, abs=1e-6)


def test_overlaps_are_means_over_pairs():
    W = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [0.1, 0.1]]])
    assert STAGE.overlap(W)[0] == pytest.approx((0 + 0.5 + 0.5) / 3)
    assert np.isnan(STAGE.overlap(0.1 * torch.eye(2)[None])[0])


def test_training_lowers_the_loss_of_each_model():
    how = options(steps=120, warmup_steps=10, batch_size=128, features=8, n_eval=1024)
    p = torch.stack([STAGE.frequencies(8, a) for a in (0.0, 1.0)])
    W, b = STAGE.initial(8, 3, [0, 1], torch.device("cpu"))
    with torch.no_grad():
        before = STAGE.measured(W, b, p, how)["loss"]
        STAGE.train(W, b, p, torch.tensor([-0.5, 0.5]), how, generator())
        after = STAGE.measured(W.detach(), b.detach(), p, how)["loss"]
    assert all(a < 0.5 * b for a, b in zip(after, before, strict=True))


def test_exponents_of_known_powers_are_found_in_their_regime():
    rows = [
        {"hidden": m, "alpha": 0.5, "decay": d, "seed": 0, "arm": arm, "loss": m**-k,
         "overlap": 1 / m, "represented": 1.0, "unlearned": 2 * m**-k}
        for m in (5, 10, 40) for d, k in ((-1, 1.0), (1, 0.5)) for arm in ("trained", "untrained")
    ]  # fmt: skip
    found = METRICS.metrics({"scaling/models": pd.DataFrame(rows)})
    assert found["strong.a0p5.exponent"] == pytest.approx([1])
    assert found["weak.a0p5.exponent"] == pytest.approx([0.5])
    assert found["weak.a0p5.overlap_exponent"] == pytest.approx([1])
    assert found["weak.a0p5.unlearned_ratio"] == pytest.approx([0.5])
    assert np.isnan(METRICS.slope(pd.DataFrame({"hidden": [1, 2], "loss": [1, np.nan]}), "loss"))
