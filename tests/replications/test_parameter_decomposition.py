"""The paper parameter_decomposition: its losses against plain sums, and planted decompositions."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT

from pipeline.job.source import import_file

PAPER = ROOT / "rules/papers/parameter_decomposition"
STAGE = import_file(PAPER / "decomposition.py")
SPD = STAGE.spd
METRICS = import_file(PAPER / "metrics.py")


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def some_toy(models: int = 2, identity: bool = True):
    g = generator()
    return SPD.Toy(
        torch.randn(models, 2, 4, generator=g), torch.randn(models, 4, generator=g), identity
    )


def some_parts(toy, C: int = 3):
    g = generator()
    return {n: SPD.part_weights(W, C, 5, g) for n, W in toy.matrices().items()}


def planted(toy, C: int = 6):
    """Parts that are the columns of each matrix, and C - columns of length 0."""
    parts = some_parts(toy, C)
    for name, W in toy.matrices().items():
        U, V = torch.zeros(len(W), C, W.shape[1]), torch.zeros(len(W), C, W.shape[2])
        U[:, : W.shape[2]] = W.mT
        V[:, : W.shape[2]] = torch.eye(W.shape[2])
        parts[name] |= {"U": U, "V": V}
    return parts


def test_features_are_active_as_often_as_asked_and_uniform():
    x = SPD.rows((1, 40_000, 5), 0.05, generator())
    active = x[x > 0]
    assert len(active) / x.numel() == pytest.approx(0.05, abs=0.003)
    assert float(active.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(active.max()) <= 1


def test_the_two_hard_sigmoids_leak_on_one_side_each():
    x = torch.tensor([-2.0, 0.25, 3.0])
    torch.testing.assert_close(SPD.lower(x), torch.tensor([-0.02, 0.25, 1.0]))
    torch.testing.assert_close(SPD.upper(x), torch.tensor([0.0, 0.25, 1.02]))


def test_an_importance_is_its_own_small_network():
    toy = some_toy()
    part = some_parts(toy)["embed"]
    a = torch.rand(2, 7, 4, generator=generator())
    got = SPD.raw_importance(part, a)
    model, row, c = 1, 3, 2
    h = part["V"][model, c] @ a[model, row]
    hidden = torch.nn.functional.gelu(part["a"][model, c] * h + part["b"][model, c])
    want = part["c"][model, c] @ hidden + part["d"][model, c]
    torch.testing.assert_close(got[model, row, c], want)


def test_columns_as_parts_are_the_target_and_are_recovered():
    toy = some_toy()
    parts, x = planted(toy), torch.rand(2, 9, 4, generator=generator())
    masks = {n: torch.ones(2, 9, 6) for n in parts}
    torch.testing.assert_close(SPD.masked(toy, parts, masks, x), toy(x))
    torch.testing.assert_close(SPD.faithfulness(toy, parts), torch.zeros(2))
    cosine, at, ratio = STAGE.matched(parts["embed"], toy.W)
    torch.testing.assert_close(cosine, torch.ones(2, 4))
    torch.testing.assert_close(ratio, torch.ones(2, 4))
    assert at.tolist() == [[0, 1, 2, 3]] * 2
    assert (STAGE.part_norms(parts["embed"], toy.W) > 0.1).sum(1).tolist() == [4, 4]


def test_short_parts_keep_their_direction_and_lose_length():
    toy = some_toy()
    part = planted(toy)["embed"]
    cosine, _, ratio = STAGE.matched(part | {"U": 0.6 * part["U"]}, toy.W)
    torch.testing.assert_close(cosine, torch.ones(2, 4))
    torch.testing.assert_close(ratio, torch.full((2, 4), 0.6))


def test_the_loss_is_the_papers_sum():
    toy = some_toy(1)
    parts, x = some_parts(toy), torch.rand(1, 6, 4, generator=generator())
    noise = {n: torch.rand(1, 6, 3, generator=generator()) for n in parts}
    weight = torch.tensor([0.3])
    got = SPD.loss(toy, parts, x, torch.ones(1, 6), noise, weight, 2.0)[0]
    want, taken = toy(x), SPD.inputs_of(toy, x)
    raw = {n: SPD.raw_importance(parts[n], taken[n]) for n in parts}
    masks = {n: SPD.lower(r) + (1 - SPD.lower(r)) * noise[n] for n, r in raw.items()}
    error = [(SPD.masked(toy, parts, m, x) - want).square().mean()
             for m in (masks, *({n: m} for n, m in masks.items()))]  # fmt: skip
    penalty = sum((SPD.upper(r) ** 2).sum(-1).mean() for r in raw.values())
    total = SPD.faithfulness(toy, parts)[0] + error[0] + sum(error[1:]) / 3 + 0.3 * penalty
    torch.testing.assert_close(got, total)


def test_one_row_without_features_stands_for_all():
    toy = some_toy()
    parts, x = some_parts(toy), SPD.rows((2, 40, 4), 0.1, generator())
    few, count = SPD.without_zeros(x)
    assert few.shape[1] < 40 and count.sum(1).tolist() == [40, 40]
    weight, ones = torch.tensor([0.1, 0.2]), {n: torch.zeros(2, 40, 3) for n in parts}
    every = SPD.loss(toy, parts, x, torch.ones(2, 40), ones, weight, 1.0)
    some = {n: torch.zeros(2, few.shape[1], 3) for n in parts}
    torch.testing.assert_close(SPD.loss(toy, parts, few, count, some, weight, 1.0), every)


def test_a_toy_learns_and_its_decomposition_becomes_faithful():
    with torch.no_grad():
        W, b, _ = SPD.train_toy(1, 3, 3, p=0.3, steps=500, batch=64, lr=0.01, decay=0.01,
                                generator=generator())  # fmt: skip
        toy = SPD.Toy(W, b, False)
        x = SPD.rows((1, 500, 3), 0.3, generator())
        assert float((toy(x) - x).square().mean()) < 0.2 * float(x.square().mean())
        how = {"gate": 4, "weight": torch.tensor([1e-3]), "power": 1.0, "p": 0.3, "batch": 32}
        far = [float(SPD.faithfulness(toy, parts)[0]) for _, parts in SPD.decompose(
            toy, 6, **how, steps=150, lr=0.01, generator=generator())]  # fmt: skip
    assert far[-1] < 0.05 * far[0]


def test_importances_are_put_in_the_order_of_features():
    one = np.zeros((3, 5))
    one[[0, 1, 2], [4, 0, 2]] = [1, 0.9, 0.7]
    assert STAGE.identity_error(one) == 1  # 0.7 is further than 0.2 from 1
    assert np.allclose(STAGE.aligned(one)[:, :3].diagonal(), [1, 0.9, 0.7])


def test_metrics_of_curves_and_ablations():
    curve = pd.DataFrame({"mmcs": [0.9, 0.991, 1], "ml2r": [0.2, 0.6, 1]})
    assert METRICS.aligned_length(curve) == 0.6
    assert math.isnan(METRICS.aligned_length(curve.head(1)))
    parts = pd.DataFrame({"own": [1.0, 2.0, math.nan], "mean": [0.5, 0.4, 0.1]})
    alive = np.array([True, True, False])
    assert METRICS.gap(parts, alive) == pytest.approx(10)
