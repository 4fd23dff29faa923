"""Fine-tuning on answers and preferences, against closed forms and plain sums."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.models.native import Output
from pipeline.tuning import change, finetuning
from pipeline.weights.batches import IGNORED


class Bigram(nn.Module):
    """Logits of the next token out of a table."""

    def __init__(self, d_vocab: int = 5) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(d_vocab, d_vocab))

    def forward(self, tokens):
        return Output(self.table[tokens])


def drawn(seed: int, d_vocab: int = 5) -> Bigram:
    model = Bigram(d_vocab)
    model.table.data = torch.randn(d_vocab, d_vocab, generator=torch.Generator().manual_seed(seed))
    return model


def test_targets_stand_on_answers_only():
    tokens, targets = finetuning.pairs([[1, 2, 3], [1]], [[4], [2, 3]])
    assert tokens.tolist() == [[1, 2, 3], [1, 2, 3]]
    assert targets.tolist() == [[IGNORED, IGNORED, 4], [2, 3, IGNORED]]


def test_log_probabilities_are_those_of_the_answer_alone():
    model = drawn(0)
    p = model.table.detach().softmax(-1)
    tokens, targets = finetuning.pairs([[1, 2], [3]], [[4, 0], [2]])
    found = finetuning.sequence_logps(model(tokens).logits, targets)
    want = [math.log(p[2, 4] * p[4, 0]), math.log(p[3, 2])]
    assert found.tolist() == pytest.approx(want, rel=1e-5)
    loss = finetuning.answer_loss(model, tokens, targets)
    assert float(loss.detach()) == pytest.approx(-sum(want) / 3, rel=1e-5)


def test_dpo_is_bradley_terry_of_log_ratios():
    numbers = torch.tensor([[-1.0, -4.0], [-2.0, -1.0], [-1.5, -3.0], [-2.0, -5.0]])
    found = finetuning.dpo(*numbers, beta=0.3)
    for i in range(2):
        chosen, rejected, before, other = (math.exp(x) for x in numbers[:, i].tolist())
        odds = (chosen / before) ** 0.3 / (rejected / other) ** 0.3
        assert float(found.loss[i]) == pytest.approx(-math.log(odds / (1 + odds)), rel=1e-5)
        assert float(found.chosen[i]) == pytest.approx(0.3 * math.log(chosen / before), rel=1e-5)


def test_dpo_starts_at_the_loss_of_a_coin_with_the_gradient_of_equation_7():
    """The gradient is -beta/2 (grad log chosen - grad log rejected) where both models agree."""
    model, reference = drawn(1), drawn(1)
    rows = finetuning.pairs([[1], [2], [1], [2]], [[3], [0, 1], [0], [4]])
    found = finetuning.preference(model, reference, 0.2, *rows)
    assert found.loss.tolist() == pytest.approx([math.log(2)] * 2, rel=1e-5)
    got = torch.autograd.grad(found.loss.sum(), model.table)[0]
    chosen, rejected = finetuning.sequence_logps(model(rows[0]).logits, rows[1]).chunk(2)
    want = torch.autograd.grad((chosen - rejected).sum(), model.table)[0]
    torch.testing.assert_close(got, -0.1 * want)


def test_the_optimum_of_dpo_is_the_reference_times_the_exponential_reward():
    """Rafailov et al. 2023, Equation 4, from preferences of a known reward over four answers."""
    reward, beta, reference = torch.tensor([0.0, 0.3, -0.4, 0.8]), 0.5, drawn(2)
    a, b = (x.flatten() for x in torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"))
    weight = torch.sigmoid(reward[a] - reward[b])
    prompts, answers = [[4]] * 32, [[int(x)] for x in torch.cat([a, b])]
    tokens, targets = finetuning.pairs(prompts, answers)

    def loss(model, step):
        return (weight * finetuning.preference(model, reference, beta, tokens, targets).loss).mean()

    tuned = finetuning.finetune(reference, loss, steps=300, lr=0.1, clip=10.0)
    ratio = (tuned.table.log_softmax(-1) - reference.table.log_softmax(-1)).detach()[4, :4]
    torch.testing.assert_close(beta * (ratio - ratio[0]), reward - reward[0], atol=0.02, rtol=0)


def test_fine_tuning_leaves_the_model_it_began_with():
    model, rows = drawn(3), finetuning.pairs([[1]], [[2]])
    before = model.table.detach().clone()
    tuned = finetuning.finetune(model, lambda m, _: finetuning.answer_loss(m, *rows), 20, 0.1)
    assert torch.equal(model.table, before)
    losses = [float(finetuning.answer_loss(m, *rows).detach()) for m in (model, tuned)]
    assert losses[1] < losses[0] - 0.1
    assert not tuned.training and not tuned.table.requires_grad


def test_rank_of_a_change_is_the_number_of_equal_directions():
    eye = torch.eye(6)[:3] * 2
    assert change.spectrum(eye) == pytest.approx({"top": 1 / 3, "rank": 3})
    u, v = torch.arange(1.0, 4.0), torch.arange(1.0, 6.0)
    assert change.spectrum(torch.outer(u, v)) == pytest.approx({"top": 1, "rank": 1})
    assert change.spectrum(torch.zeros(2, 3)) == {"top": 0, "rank": 0}
    # singular values of 3 and 1: nine tenths of the squared norm, and (9 + 1)² / (9² + 1²)
    assert change.spectrum(torch.diag(torch.tensor([1.0, 3.0]))) == pytest.approx(
        {"top": 0.9, "rank": 100 / 82}
    )


def test_changes_name_the_matrices_of_the_layers():
    class Two(nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
            for layer in self.layers:
                layer.weight.data = torch.eye(3) + by * torch.ones(3, 3)
            self.head = nn.Linear(3, 3)

    rows = list(change.changes(Two(0), Two(0.5), inside="layers."))
    assert [(r["matrix"], r["layer"]) for r in rows] == [("layers.0.weight", 0),
                                                         ("layers.1.weight", 1)]  # fmt: skip
    assert rows[0]["size"] == pytest.approx(1.5 / math.sqrt(3))
    assert rows[0]["rank"] == pytest.approx(1, abs=1e-5) and rows[0]["random_rank"] > 1.2


def test_the_learning_rate_rises_to_its_peak_and_falls_along_a_line_to_nothing():
    """Of a gradient that never changes Adam's step is the learning rate itself."""
    model, seen = nn.Linear(1, 1, bias=False).double(), []

    def loss(tuned, step):
        seen.append(float(tuned.weight.detach()))
        return 0.5 * tuned.weight.sum()

    tuned = finetuning.finetune(model, loss, 8, 0.1, warmup_steps=2)
    moved = -np.diff([*seen, float(tuned.weight)])
    want = [0.05, *(0.1 * (1 - step / 8) for step in range(1, 8))]
    np.testing.assert_allclose(moved, want, rtol=1e-6)
