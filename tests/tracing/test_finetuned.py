"""Transcoders fine-tuned on the KL of their replacement model."""

import drawn
import pytest
import torch

from pipeline.tracing import finetuned, replacement


def measured(hf, d, read):
    """(KL of the replacement model, unexplained variance)."""
    kl = replacement.fidelity(hf(read).logits, replacement.spliced(hf, read, d)).kl
    return kl, float(finetuned.unexplained(d, finetuned.Truth.of(hf, read, d)).mean())


def tuned_by(objective, steps=15):
    """What is measured before and after, on random text."""
    hf, d = drawn.model(), drawn.dictionaries("cross")
    read = torch.randint(0, 40, (12, 9), generator=torch.Generator().manual_seed(1))
    before = measured(hf, d, read)
    rows = finetuned.tuned(
        hf, d, read, objective, n_steps=steps, batch_blocks=4, lr=0.1, seed=0
    )  # fmt: skip
    assert [row["step"] for row in rows] == list(range(0, steps, finetuned.EVERY))
    return before, measured(hf, d, read)


def test_tuning_on_kl_lowers_it_more_than_tuning_on_the_error():
    before, kl = tuned_by("kl")
    again, mse = tuned_by("mse")
    _, shuffled = tuned_by("shuffled")
    assert before == again
    assert kl[0] < 0.7 * before[0] and mse[1] < before[1]
    assert kl[0] < min(mse[0], shuffled[0])


def test_what_is_unexplained_is_one_less_the_explained_variance():
    """Beside numpy, layer by layer: variances of what is left and of what the MLP writes."""
    hf, d = drawn.model(), drawn.dictionaries("cross")
    read = torch.randint(0, 40, (5, 9), generator=torch.Generator().manual_seed(1))
    truth = finetuned.Truth.of(hf, read, d)
    torch.testing.assert_close(truth.logits, hf(read).logits)
    f = [torch.relu(x @ W.T + b) for x, W, b in zip(truth.x, d.W_enc, d.b_enc, strict=True)]
    for layer, y in enumerate(truth.y):
        ours = d.b_dec[layer] + sum(f[n] @ d.W_dec[n][:, layer - n] for n in range(layer + 1))
        y, left = (a.flatten(0, 1).double().numpy() for a in (y, y - ours))
        want = (left**2).mean(0).sum() / y.var(0).sum()
        assert float(finetuned.unexplained(d, truth)[layer]) == pytest.approx(want, rel=1e-4)


def test_blocks_come_once_before_any_comes_again():
    draw = torch.Generator().manual_seed(0)
    order = finetuned.batches(6, 4, draw)
    seen = torch.cat([next(order) for _ in range(3)])
    assert sorted(seen[:6].tolist()) == sorted(seen[6:].tolist()) == list(range(6))
