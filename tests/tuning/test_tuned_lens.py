"""Translators of a tuned lens: against autograd, known maps, and a training that was killed."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_lms import FAMILIES, NEXT, READ, TOKENS, VOCAB, D, silence, tiny
from torch import nn

from pipeline.errors import RetraceError
from pipeline.models import hooks, lens
from pipeline.store.checkpoints import Checkpoints
from pipeline.tuning import tuned_lens


@pytest.fixture(params=FAMILIES)
def hf(request):
    return tiny(request.param)


@pytest.fixture
def gpt2():
    return tiny("gpt2")


def tuned(hf: nn.Module, blocks: torch.Tensor = TOKENS, **how) -> tuned_lens.TunedLens:
    return tuned_lens.TunedLens("m", hf, blocks, tuned_lens.TunedLensSpec(**how))


def plain_loss(hf: nn.Module, trained: tuned_lens.TunedLens, tokens: torch.Tensor, skip: int):
    """The loss of Belrose et al., by autograd through the whole softmax."""
    x, logits = lens.streams(hf, tokens)
    log_p = logits[:, skip:].log_softmax(-1)
    total = 0.0
    for layer in trained.layers:
        h = x[layer][:, skip:]
        q = lens.unembed(hf, h + h @ trained.A[layer].T + trained.b[layer]).log_softmax(-1)
        total = total + (log_p.exp() * (log_p - q)).sum(-1).mean()
    return total


@pytest.mark.parametrize("more", [{}, {"skip_first": 2}, {"every": 2}, {"head": 30, "tail": 10}])
def test_gradients_equal_autograds(hf, more):
    got = tuned(hf, **more)
    for p in got.parameters:
        nn.init.normal_(p, std=0.1)
    n = TOKENS[:, got.how.skip_first :].numel()
    kl = got.gradients(TOKENS[:4], 0, n) + got.gradients(TOKENS[4:], 0, n)
    ours = [p.grad.clone() for p in got.parameters]
    for p in got.parameters:
        p.grad = None
    loss = plain_loss(hf, got, TOKENS, got.how.skip_first)
    loss.backward()
    assert kl.sum() == pytest.approx(loss.item(), rel=1e-5)
    for p, q in zip(got.parameters, ours, strict=True):
        torch.testing.assert_close(q, p.grad, rtol=1e-3, atol=1e-6)


def test_a_sample_of_the_vocabulary_stands_for_the_rest(gpt2):
    how = {"head": 8, "tail": 16}
    got, whole = tuned(gpt2, **how), tuned(gpt2)
    n, draws = TOKENS.numel(), 200
    mean = torch.stack([got.gradients(TOKENS, step, n) for step in range(draws)]).mean(0)
    sampled = torch.stack([got.A[i].grad / draws for i in got.layers])
    exact_kl = whole.gradients(TOKENS, 0, n)
    exact = torch.stack([whole.A[i].grad for i in whole.layers])
    np.testing.assert_allclose(mean, exact_kl, rtol=0.1)
    assert F.cosine_similarity(sampled.flatten(), exact.flatten(), dim=0) > 0.98
    p = gpt2(TOKENS).logits.flatten(0, 1).softmax(-1)
    columns, weight = tuned_lens.vocabulary(p, got.how, 3)
    assert len(set(columns.tolist())) == 24 and weight[:8].abs().max() == 0
    assert set(columns[:8].tolist()) == set(p.mean(0).topk(8).indices.tolist())
    np.testing.assert_allclose(weight[8:].exp(), 32 / 16)


@pytest.mark.parametrize("optimiser, scale, steps", [("sgd", 1.0, 500), ("adam", 20.0, 150)])
def test_translators_recover_a_known_affine_map(optimiser, scale, steps):
    """The last layer is affine here: a hook makes x_3 = x_2 + M x_2 + c, so M and c give KL 0."""
    hf = tiny("native")
    silence(hf)
    draw = torch.Generator().manual_seed(3)
    M, c = torch.randn(D, D, generator=draw) * 0.3, torch.randn(D, generator=draw) * 0.5
    blocks = torch.randint(0, VOCAB, (32, 12), generator=draw)
    got = tuned(hf, blocks, steps=steps, tokens_per_step=384, optimiser=optimiser, lr_scale=scale,
                weight_decay=0, every=2)  # fmt: skip
    with hooks.edited(hf, "blocks.2.hook_resid_post", lambda x: x + x @ M.T + c):
        for step in range(steps):
            got.step(step)
        exact = lens.Translators({2: M}, {2: c})
        right = lens.measure(hf, READ, NEXT, {"tuned": lens.tuned_lens(hf, exact)}, [2])
    assert right["kl"].iloc[0] < 1e-6  # the map that should be found
    assert got.history[-1, -1] < 0.02 * got.history[0, -1]


def test_each_layers_gradient_is_clipped_alone(gpt2):
    got = tuned(gpt2, steps=2, clip=1e-3)
    got.step(0)
    for layer in got.layers:
        both = torch.cat([got.A[layer].grad.flatten(), got.b[layer].grad])
        assert both.norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_the_learning_rate_is_the_packages(gpt2):
    sgd = tuned(gpt2, steps=10)
    assert [sgd.learning_rate(s) for s in (0, 5, 9)] == pytest.approx([0.1, 0.05, 0.01])
    adam = tuned(gpt2, steps=10, optimiser="adam")
    assert [adam.learning_rate(s) for s in (0, 1, 2, 6)] == pytest.approx(
        [5e-4, 1e-3, 1e-3, 5e-4]
    )  # fmt: skip
    assert sgd.optimiser.defaults["nesterov"] and adam.optimiser.defaults["amsgrad"]


def test_every_block_is_read_once_an_epoch(gpt2):
    blocks = torch.arange(10)[:, None] * torch.ones(4, dtype=torch.long) % VOCAB
    got = tuned(gpt2, blocks, tokens_per_step=16)
    seen = [int(b) for step in range(5) for b in got.batch(step)[:, 0]]
    assert sorted(seen) == sorted([*range(10), *range(10)]) and sorted(seen[:10]) == [*range(10)]
    assert torch.equal(got.batch(3), tuned(gpt2, blocks, tokens_per_step=16).batch(3))


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_a_killed_training_ends_with_the_same_bytes(gpt2, tmp_path, optimiser, monkeypatch):
    how = {"steps": 7, "tokens_per_step": 39, "optimiser": optimiser, "save_every": 2}
    whole = tuned(gpt2, **how)
    tuned_lens.train(whole, Checkpoints(tmp_path / "whole", "k"))

    class Killed(Exception):
        pass

    killed = tuned(gpt2, **how)
    step = killed.step
    monkeypatch.setattr(
        killed, "step", lambda s: step(s) if s < 5 else (_ for _ in ()).throw(Killed)
    )
    with pytest.raises(Killed):
        tuned_lens.train(killed, Checkpoints(tmp_path / "part", "k"))
    resumed = tuned(gpt2, **how)
    tuned_lens.train(resumed, Checkpoints(tmp_path / "part", "k"))
    for name, t in whole.tensors().items():
        assert torch.equal(t, resumed.tensors()[name]), name
    assert not resumed.history.isnan().any()


def test_a_loss_that_is_not_finite_is_told(gpt2):
    got = tuned(gpt2, steps=3)
    got.A[0].data.fill_(torch.nan)
    with pytest.raises(RetraceError, match=r"tuned lens of m: the KL of step 0 is not finite"):
        got.step(0)


def test_translators_are_read_as_they_were_packed(tmp_path):
    from safetensors.torch import save_file

    layers = (10, 2)
    A = [{i: torch.randn(3, 3) for i in layers} for _ in range(2)]
    made = [lens.Translators(a, {i: a[i][0].clone() for i in layers}) for a in A]
    packed = [tuned_lens.packed(found, f"m.{seed}") for seed, found in enumerate(made)]
    save_file(packed[0] | packed[1], tmp_path / "t.safetensors")
    found = tuned_lens.read(tmp_path / "t.safetensors", "m.1", torch.device("cpu"))
    assert found.layers == [2, 10] and torch.equal(found.A[10], made[1].A[10])
    assert torch.equal(found.b[2], made[1].b[2])
