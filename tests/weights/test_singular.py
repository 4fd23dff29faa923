"""Singular vectors before and after an update: planted directions, closed forms, and peft."""

import os
import sys

import pytest
import torch

from pipeline.weights import lora


def orthogonal(n: int, seed: int = 0) -> torch.Tensor:
    draws = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(draws)[0]


def matrix(singular: list[float]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(W, U, V) with these singular values, W = U diag(s) V'."""
    U, V = orthogonal(len(singular), 1), orthogonal(len(singular), 2)
    return ((U * torch.tensor(singular, dtype=torch.float64)) @ V.T).float(), U, V


def test_a_planted_direction_is_the_only_intruder():
    """The mean of all left singular vectors has a cosine of 1 / sqrt(n) with each of them."""
    n = 16
    W_0, U, V = matrix([float(n - i) for i in range(n)])
    u, v = U.mean(1) * n**0.5, V.mean(1) * n**0.5
    W = (W_0.double() + 400 * torch.outer(u, v)).float()
    assert lora.best_cosines(W_0, W)[0] == pytest.approx(n**-0.5, abs=0.02)
    assert (lora.best_cosines(W_0, W_0) > 0.999).all()


@pytest.mark.parametrize(
    "singular, want",
    [([4, 1, 0, 0], 1), ([3, 1.1, 0, 0], 2), ([1, 1, 1, 1], 4), ([0, 0, 0, 0], 0)],
)
def test_the_rank_makes_nine_tenths_of_the_squared_norm(singular, want):
    assert lora.rank_of(matrix(singular)[0]) == want


def test_one_value_that_makes_just_nine_tenths_is_enough():
    assert lora.rank_of(torch.diag(torch.tensor([3.0, 1.0]))) == 1  # 9 of 10


def test_a_member_of_lower_rank_has_its_own_scale_and_no_more_components():
    """Hu et al. 2021: W_0 + (alpha / r) B A; A is drawn as a linear layer is, over its inputs."""
    W, shapes = torch.randn(300, 40), [torch.Size([4]), torch.Size([4, 40]), torch.Size([300, 4])]
    names = ["scale", "w.A", "w.B"]
    layout = lora.LowRank(names, shapes, [s.numel() for s in shapes], {"w": W}, False, 4)
    row = layout.drawn(rank=2, alpha=8.0, seed=0)
    torch.testing.assert_close(layout.named(row)["w"], W)  # B begins at 0
    A = row[4:164].view(4, 40)
    assert 0.95 < A.abs().max() * 40**0.5 <= 1 and abs(A.mean()) < 0.05
    B = torch.randn(300, 4)
    row[164:] = B.flatten()
    torch.testing.assert_close(layout.named(row)["w"], W + 8.0 / 2 * B[:, :2] @ A[:2])


def test_scaling_changes_one_singular_value_and_no_vector():
    W, U, V = matrix([5.0, 3.0, 2.0, 1.0])
    want = (U * torch.tensor([5.0, 1.5, 2.0, 0.5], dtype=torch.float64)) @ V.T
    torch.testing.assert_close(lora.scaled(W, [1, 3], 0.5), want.float())
    torch.testing.assert_close(lora.scaled(W, [1, 3], 1.0), W)
    torch.testing.assert_close(lora.scaled(W, [], 0.0), W)


# --- peft (tests/libraries/lora.sh) --------------------------------------------------------

PEFT = os.environ.get("RETRACE_PEFT", "")


@pytest.fixture
def peft(monkeypatch):
    if not PEFT:
        pytest.skip("needs peft; run tests/libraries/lora.sh")
    monkeypatch.syspath_prepend(PEFT)
    yield pytest.importorskip("peft")
    for name in [n for n in sys.modules if n.split(".")[0] in ("peft", "accelerate")]:
        del sys.modules[name]


def wrapped(peft, alpha: float):
    """Two layers under peft's LoRA of rank 4."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(24, 32), torch.nn.Tanh(), torch.nn.Linear(32, 24))
    config = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=["0", "2"])
    return peft.get_peft_model(net, config)


def test_a_trained_update_is_pefts(peft):
    """AdamW on the factors that peft drew: the merged weights of both."""
    model = wrapped(peft, alpha=12)
    net = model.base_model.model
    layers = {"0": net[0], "2": net[2]}
    base = {n: m.get_base_layer().weight.detach().clone() for n, m in layers.items()}
    names, shapes = [lora.SCALE], [torch.Size([4])]
    row = [torch.full((4,), 12 / 4)]
    for n, m in layers.items():
        factors = {"A": m.lora_A["default"].weight, "B": m.lora_B["default"].weight}
        names += [f"{n}.{f}" for f in factors]
        shapes += [w.shape for w in factors.values()]
        row += [w.detach().flatten() for w in factors.values()]
    sizes = [s.numel() for s in shapes]
    layout = lora.LowRank(names, shapes, sizes, base, False, 4)
    drawn = layout.named(torch.cat(row))
    assert all(torch.equal(drawn[n], base[n]) for n in base)  # both start at W_0
    flat = torch.cat(row).requires_grad_()
    x, y = torch.randn(64, 24), torch.randn(64, 24)
    theirs = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02,
                               weight_decay=0)  # fmt: skip
    ours = torch.optim.AdamW([flat], lr=0.02, weight_decay=0)
    biases = [m.get_base_layer().bias.detach() for m in layers.values()]
    for _ in range(20):
        theirs.zero_grad()
        (model(x) - y).square().mean().backward()
        theirs.step()
        ours.zero_grad()
        W = layout.named(flat)
        hidden = torch.tanh(torch.nn.functional.linear(x, W["0"], biases[0]))
        (torch.nn.functional.linear(hidden, W["2"], biases[1]) - y).square().mean().backward()
        ours.step()
    merged = layout.stacked(flat[None])
    for n, m in layers.items():
        want = m.get_base_layer().weight + m.get_delta_weight("default")
        torch.testing.assert_close(merged[n][0], want.detach(), rtol=1e-4, atol=1e-5)
        assert (want - base[n]).abs().max() > 0.05


def test_intruders_and_their_scaling_are_pefts(peft):
    """peft multiplies intruders by mitigation_lambda (its docstring has it the other way round),
    and cuts what is left of the update to the adapter's rank."""
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    model = wrapped(peft, alpha=400)
    layers = [model.base_model.model[i] for i in (0, 2)]
    for m in layers:
        torch.nn.init.normal_(m.lora_B["default"].weight)
    reduce_intruder_dimension(model, top_k=10, threshold_epsilon=0.5, mitigation_lambda=0.25,
                              logging_sink=None)  # fmt: skip
    for m in layers:
        W_0 = m.get_base_layer().weight.detach()
        W = W_0 + m.get_delta_weight("default").detach()
        low = lora.best_cosines(W_0, W)[:10] < 0.5
        assert 0 < low.sum() < 10
        delta = lora.scaled(W, low.nonzero().flatten().tolist(), 0.25) - W_0
        U, s, V = torch.linalg.svd(delta, full_matrices=False)
        want = m.get_delta_weight("intruder_reduced").detach()
        torch.testing.assert_close((U[:, :4] * s[:4]) @ V[:4], want, rtol=1e-3, atol=1e-2)
