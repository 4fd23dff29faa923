"""Steps that store no gradient, in Triton's interpreter, against gradients and Adam of PyTorch."""

import importlib.util
import os
from types import SimpleNamespace

import pytest
import torch
from test_sae_steps import BATCH, WIDTHS, dictionary_at

if not importlib.util.find_spec("triton"):
    pytest.skip("Triton is not installed", allow_module_level=True)
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from pipeline.kernels import choice, gradients
from pipeline.sae import fused
from pipeline.sae.optimiser import Optimiser
from pipeline.sae.sparse import Scratch
from pipeline.sae.train import FAST
from pipeline.spec.sae import SaeTraining

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRAINING = SaeTraining(n_rows=1600, batch_size=16, lr=1e-2, precision="bfloat16")
D_IN, D_SAE, ROWS = 12, 30, 18


def pair(architecture: str, **options):
    """A dictionary twice, each with an optimiser: for gradients and Adam, and for a FusedStep."""
    out = []
    for _ in range(2):
        sae = dictionary_at(architecture, D_IN, D_SAE, "float32", 0.0, **BATCH | options)
        sae.b_enc.data[[7, 29]] = 9.0  # active on every row: their gradients are made in pieces
        sae.to(DEVICE).W_enc.data = sae.W_enc.data.T.contiguous().T
        out.append((sae, Optimiser(sae, TRAINING)))
    (sae, plain), (other, optimiser) = out
    step = fused.FusedStep(other, optimiser, TRAINING)
    optimiser.adam.param_groups[0]["lr"] = torch.tensor(TRAINING.lr, device=DEVICE)
    return sae, plain, step


@pytest.mark.parametrize("dead, capacity", [(0, None), (5, 8), (20, 24)])
@pytest.mark.parametrize(
    "architecture, options",
    [("topk", {}), ("topk", {"rescale_acts_by_decoder_norm": False}), ("batchtopk", {}),
     ("batchtopk", {"k": 20}), ("matryoshka_batchtopk", {})],
)  # fmt: skip
def test_a_fused_step_is_a_step_of_adam(architecture, options, dead, capacity, monkeypatch):
    """With k = 20, fewer than k a row are above zero."""
    monkeypatch.setattr(gradients, "LONG", 8)
    monkeypatch.setattr(choice, "WIDTH", 2)
    sae, plain, step = pair(architecture, **options)
    random = torch.Generator().manual_seed(1)
    mask = torch.arange(D_SAE, device=DEVICE) < dead if dead else None
    for i in range(2):
        x = torch.randn(ROWS, D_IN, generator=random).to(DEVICE)
        how = {"dead": mask, "scratch": Scratch()}
        more = {"capacity": capacity} if dead else {}
        want = FAST[architecture](sae, x, coefficients={}, step=i, **how, **more)
        plain.step()
        got = step(x, **how, **more)
        torch.testing.assert_close(got.loss, want.loss)
        torch.testing.assert_close(got.mse, want.mse)
        assert got.l0.item() == pytest.approx(want.l0.item()) and got.l0 <= sae.cfg.k
        assert torch.equal(got.fired, want.fired)
    if hasattr(sae, "topk_threshold"):
        torch.testing.assert_close(step.sae.topk_threshold, sae.topk_threshold)
    moments = step.optimiser.tensors()
    for name, value in plain.tensors().items():
        if name.endswith("step"):
            assert moments[name] == value == 2
        else:
            torch.testing.assert_close(moments[name], value, rtol=1e-4, atol=1e-9)
    for (name, value), now in zip(sae.named_parameters(), step.sae.parameters(), strict=True):
        torch.testing.assert_close(now, value, rtol=0, atol=2e-6, msg=name)
    norm = sae.W_dec.norm(dim=1) if step.sae.cfg.rescale_acts_by_decoder_norm else 1
    torch.testing.assert_close(step.operands.dec, sae.W_dec.detach(), rtol=0, atol=2e-6)
    torch.testing.assert_close(step.operands.bias, sae.b_enc * norm, rtol=0, atol=1e-5)


def test_gradients_are_clipped_by_their_global_norm():
    """Rows so short that nothing is clipped, and so long that all is."""
    for size in (1e-2, 10.0):
        sae, plain, step = pair("topk", aux_loss_coefficient=0.0)
        x = size * torch.randn(ROWS, D_IN, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        sae.b_enc.data[[7, 29]] = step.sae.b_enc.data[[7, 29]] = 0.0
        how = {"dead": None, "scratch": Scratch()}
        FAST["topk"](sae, x, coefficients={}, step=0, **how)
        norm = torch.nn.utils.get_total_norm([p.grad for p in sae.parameters()])
        assert (norm > 1) == (size > 1)
        plain.step()
        step(x, **how)
        for name, value in plain.tensors().items():
            torch.testing.assert_close(step.optimiser.tensors()[name], value, rtol=1e-4, atol=1e-9)


def test_a_checkpoint_goes_on_with_one_count_of_steps():
    step = pair("topk")[2]
    x = torch.randn(ROWS, D_IN, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    how = {"dead": None, "scratch": Scratch()}
    step(x, **how)
    again = pair("topk")[2]
    again.sae.load_state_dict(step.sae.state_dict())
    again.optimiser.restore(step.optimiser.tensors(), torch.device(DEVICE))
    again.operands = None
    for one in (step, again):
        one(x, **how)
    for name, value in step.optimiser.tensors().items():
        torch.testing.assert_close(again.optimiser.tensors()[name], value)
    assert again.optimiser.count == 2


def test_which_dictionaries_it_suits():
    sae = dictionary_at("topk", D_IN, D_SAE, "float32", 0.0, **BATCH)
    assert fused.suits(sae, TRAINING)
    assert not fused.suits(sae, TRAINING.model_copy(update={"precision": "float32"}))
    other = SimpleNamespace(columns=[slice(0, 6), slice(6, 12)], **vars(sae)["_parameters"])
    other.cfg = sae.cfg
    assert not fused.suits(other, TRAINING)
    sae.W_dec.requires_grad_(False)
    assert not fused.suits(sae, TRAINING)
    standard = dictionary_at("standard", D_IN, D_SAE, "float32", 0.0)
    assert not fused.suits(standard, TRAINING)
    assert WIDTHS[D_SAE][-1] == D_SAE
