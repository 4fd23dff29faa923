"""The paper mesa_optimisation: its layers against the sums they stand for, and against descent."""

import dataclasses
import math

import pytest
import torch
from conftest import ROOT

from pipeline.job.source import import_file

PAPER = ROOT / "rules/papers/mesa_optimisation"
STAGE = import_file(PAPER / "regression.py")
ATTENTION = STAGE.attention
METRICS = import_file(PAPER / "metrics.py")


def some_tasks(n: int = 6, context: int = 5, inputs: int = 3, seed: int = 0):
    return ATTENTION.tasks(n, context, inputs, torch.Generator().manual_seed(seed))


def random_layers(models: int, layers: int, heads: int, d: int, **more):
    g = torch.Generator().manual_seed(3)
    A, O = (0.3 * torch.randn(models, layers, heads, d, d, generator=g) for _ in range(2))  # noqa: E741
    return ATTENTION.Layers(A, O, **more)


@pytest.mark.parametrize("softmax", [False, True])
def test_a_layer_is_the_sum_over_heads_and_context(softmax):
    layers = random_layers(2, 1, 2, 4, softmax=softmax, d_key=7)
    tokens = some_tasks().tokens
    got = layers.layer(tokens[None].expand(2, -1, -1, -1), 0, False)
    for model, batch, asked in ((0, 0, 0), (1, 4, 5)):
        e, want = tokens[batch], tokens[batch, asked].clone()
        for head in range(2):
            A, O = layers.A[model, 0, head], layers.O[model, 0, head]  # noqa: E741
            scores = torch.stack([e[asked] @ A @ e[i] for i in range(5)])
            if softmax:
                scores = (scores / math.sqrt(7)).softmax(0)
            want += sum(scores[i] * (e[i] @ O) for i in range(5))
        torch.testing.assert_close(got[model, batch, asked], want)


def test_the_construction_is_gradient_descent_with_a_rate_a_step():
    given = some_tasks()
    rates = torch.tensor([[0.7, 0.2, 0.4]])
    got = ATTENTION.gradient_descent(rates, 0 * rates, 3, 3)(given.tokens[None])[0]
    x, y = given.tokens[:, :-1, :-1], given.tokens[:, :-1, -1:]
    w = torch.zeros(len(x), 3, 1, requires_grad=True)
    for rate in rates[0]:
        loss = (x @ w - y).square().sum() / 2
        w = (w - rate * torch.autograd.grad(loss, w)[0]).detach().requires_grad_()
    torch.testing.assert_close(got, (given.tokens[:, -1:, :-1] @ w).detach()[:, 0, 0])


def test_gd_plus_plus_turns_inputs_and_steps_at_once():
    given, eta, gamma = some_tasks(), 0.6, 0.2
    rates = (torch.tensor([[eta]]), torch.tensor([[gamma]]))
    got = ATTENTION.gradient_descent(*rates, 3, 2)(given.tokens[None])[0]
    for task, want in zip(given.tokens, got, strict=True):
        X, y = task[:, :-1], task[:, -1]
        for _ in range(2):
            S, r = X[:-1].T @ X[:-1], X[:-1].T @ y[:-1]
            y, X = y - eta * X @ r, X - gamma * X @ S
        torch.testing.assert_close(-y[-1], want)


def test_closed_form_is_the_mean_over_many_tasks_and_the_best_rate():
    given = some_tasks(100_000, 4, 2)
    eta, best, zero = ATTENTION.closed_form(4, 2)
    loss = {}
    for factor in (0.9, 1.0, 1.1):
        rate = torch.tensor([[eta * factor]])
        predicted = ATTENTION.gradient_descent(rate, 0 * rate, 2, 1)(given.tokens[None])
        loss[factor] = float(ATTENTION.half_square(predicted, given.target)[0])
    assert loss[1.0] == pytest.approx(best, rel=0.03) and loss[1.0] < min(loss[0.9], loss[1.1])
    nothing = float(ATTENTION.half_square(0 * given.target, given.target))
    assert nothing == pytest.approx(zero, rel=0.03)


def test_least_squares_is_exact_where_the_context_determines_the_weights():
    given = some_tasks(20, 5, 3)
    torch.testing.assert_close(ATTENTION.least_squares(given), given.target)


def test_the_gauge_changes_no_prediction_and_no_weight_cosine():
    layers, tokens = random_layers(3, 1, 1, 4, depth=2), some_tasks().tokens[None]
    fixed = STAGE.gauge(layers)
    torch.testing.assert_close(fixed(tokens), layers(tokens), rtol=1e-3, atol=1e-5)
    diagonal = fixed.A[:, 0, 0].diagonal(dim1=-2, dim2=-1)[:, :-1]
    torch.testing.assert_close(diagonal.mean(1), torch.ones(3))
    other = dataclasses.replace(layers, A=layers.A * 4, O=layers.O / 4)
    reference = ATTENTION.gradient_descent(torch.ones(1, 1), torch.ones(1, 1), 3, 2)
    cosines = [STAGE.weight_cosine(m, reference) for m in (layers, other, fixed)]
    torch.testing.assert_close(cosines[0], cosines[1])
    torch.testing.assert_close(cosines[0].abs(), cosines[2].abs())
    torch.testing.assert_close(STAGE.weight_cosine(reference, reference), torch.ones(1))


def test_sensitivities_are_those_of_differences():
    layers, given = random_layers(2, 1, 1, 4, depth=2), some_tasks()
    predicted, sensed = layers.sensitivities(given.tokens[None])
    torch.testing.assert_close(predicted, layers(given.tokens[None]))
    moved = given.tokens.clone()
    moved[:, -1, 1] += 1e-2
    back = given.tokens.clone()
    back[:, -1, 1] -= 1e-2
    slope = (layers(moved[None]) - layers(back[None])) / 2e-2
    torch.testing.assert_close(sensed[..., 1], slope, rtol=1e-2, atol=1e-3)


def test_other_laws_have_the_norm_that_is_asked_for():
    given = ATTENTION.other_tasks(10, 5, 3, torch.Generator().manual_seed(0), 2.5)
    norms = given.tokens[:, :-1, :-1].flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.full((10,), 2.5))


def test_a_gap_is_the_largest_ratio_of_two_curves():
    assert METRICS.gap([1, 2, 4], [1, 1, 5]) == pytest.approx(math.log(2))


def test_a_model_that_is_the_construction_has_its_loss_and_agrees_with_it():
    options = STAGE.Options(
        tables=[], arms={"one": {}}, inputs=2, context=4, n_test=20_000, n_tuning=2000,
        sweeps={}, seeds=[0],
    )  # fmt: skip
    world = STAGE.Regression(options, torch.device("cpu"))
    references = world.references(options.arms["one"])
    row = STAGE.model_rows(references["gd"], references, world).iloc[0]
    assert row["loss"] == pytest.approx(row["gd_loss"]) == pytest.approx(row["between_loss"])
    assert row["gd_loss"] == pytest.approx(row["theory_loss"], rel=0.04)
    assert row["zero_loss"] == pytest.approx(row["theory_zero_loss"], rel=0.04)
    assert min(row["gd_half_loss"], row["gd_double_loss"]) > row["gd_loss"]
    assert row["shuffled_loss"] > row["zero_loss"] and row["lstsq_loss"] < 1e-6
    assert row["gd_sensitivity_cosine"] == pytest.approx(1, abs=1e-5)
    assert row["weight_cosine"] == pytest.approx(1, abs=1e-5)
    assert row["unfixed_loss"] > 1.02 * row["loss"]
