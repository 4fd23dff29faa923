"""The paper model_diffing: noise and directions drawn, a toy whose truth is known."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT

from pipeline.job.source import import_file

PAPER = ROOT / "rules/papers/model_diffing"
UPDATES = import_file(PAPER / "updates.py")
TOY = import_file(PAPER / "toy.py")
METRICS = import_file(PAPER / "metrics.py")


def orthogonal(n: int, seed: int = 0) -> torch.Tensor:
    draws = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(draws)[0]


def matrix(singular: list[float]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(W, U, V) with these singular values, W = U diag(s) V'."""
    U, V = orthogonal(len(singular), 1), orthogonal(len(singular), 2)
    return ((U * torch.tensor(singular, dtype=torch.float64)) @ V.T).float(), U, V


# --- weights -------------------------------------------------------------------------------


def test_other_directions_are_as_many_and_none_is_an_intruder():
    for seed in range(20):
        drawn = UPDATES.others([0, 2, 5], 16, np.random.default_rng(seed))
        assert len(set(drawn)) == 3 and not {0, 2, 5} & set(drawn) and max(drawn) <= 8
    assert UPDATES.others([], 16, np.random.default_rng(0)) == []


@pytest.mark.parametrize("rank", [0, 2])
def test_noise_has_the_updates_norm_and_its_rank(rank):
    base = {"a": matrix([4.0, 3.0, 2.0, 1.0])[0]}
    like = {"a": base["a"] + torch.full((4, 4), 0.5)}
    noise = UPDATES.noisy(base, like, rank, torch.Generator().manual_seed(0))["a"] - base["a"]
    assert noise.norm() == pytest.approx(2.0, rel=1e-5)
    assert torch.linalg.matrix_rank(noise, atol=1e-4) == (rank or 4)


# --- the toy -------------------------------------------------------------------------------


def toy_options(**more):
    dictionaries = {
        "l1": {"architecture": "standard", "d_sae": 32, "l1_coefficient": 1},
        "batchtopk": {"architecture": "batchtopk", "d_sae": 32, "k": 2, "topk_threshold_lr": 0.1},
    }
    arms = {"mixed": {"shared": 6, "weak": 3, "base": 2, "tuned": 2}, "copies": {"copies": True}}
    base = {"tables": ["latents"], "arms": arms, "dictionaries": dictionaries, "steps": 250,
            "batch_size": 128, "n_test": 1024}  # fmt: skip
    return TOY.Options.model_validate(base | more)


def test_the_world_is_as_it_says():
    options = toy_options()
    world = TOY.World(options.arms["mixed"], options, 0)
    D, kinds = np.linalg.norm(world.directions, axis=-1), world.kinds
    assert (D[1, kinds == "base"] == 0).all() and (D[0, kinds == "tuned"] == 0).all()
    np.testing.assert_allclose(D[:, kinds == "shared"], 1)
    np.testing.assert_allclose(D[0, kinds == "weak"], options.weak)
    sides = world.draw(4096, 5).split(options.d, 1)
    assert [float(s.norm(dim=1).mean()) for s in sides] == pytest.approx([32**0.5] * 2, rel=0.05)
    copies = TOY.World(options.arms["copies"], options, 0).draw(50, 5).split(options.d, 1)
    torch.testing.assert_close(*copies)


def test_latents_are_called_by_norms_and_confirmed_by_scaling():
    """Latents set to the truth; then those of weak features lose their part in the base."""
    options = toy_options()
    world = TOY.World(options.arms["mixed"], options, 0)
    n = len(world.kinds)
    lengths = np.linalg.norm(world.directions, axis=-1, keepdims=True)
    world.directions = lengths * orthogonal(options.d).numpy()[None, :n]
    decoders = [torch.from_numpy(D * s).float() for D, s in zip(world.directions, world.scale,
                                                                strict=True)]  # fmt: skip
    sae = TOY.crosscoder(
        TOY.SaeSpec(architecture="standard", d_sae=n, l1_coefficient=1), [options.d] * 2
    )
    W_dec = torch.cat(decoders, 1)
    constant = world.scale.repeat(options.d) * 0.2 * world.constant
    state = {"W_dec": W_dec, "W_enc": torch.linalg.pinv(W_dec), "b_enc": torch.full((n,), -1e-4),
             "b_dec": torch.from_numpy(constant).float()}  # fmt: skip
    sae.load_state_dict(state)
    found = TOY.judged(sae, world)
    assert found["truth"].tolist() == world.kinds.tolist()  # each latent stands for its feature
    assert found["called"].tolist() == (world.kinds == "tuned").tolist()
    assert found["confirmed"].equals(found["called"])
    weak = torch.from_numpy(world.kinds == "weak")
    shrunk = W_dec.clone()
    shrunk[weak, : options.d] = 0
    sae.W_dec.data.copy_(shrunk)
    found = TOY.judged(sae, world).set_index("truth")
    assert found.loc["weak", "called"].all() and not found.loc["weak", "confirmed"].any()
    ratio = options.weak * world.scale[0] / world.scale[1]
    assert found.loc["weak", "nu_e"].tolist() == pytest.approx([ratio] * 3, rel=0.05)
    assert found.loc["tuned", "confirmed"].all()
    values = METRICS.of_toy(found.reset_index().assign(arm="a", objective="o", seed=0))
    assert values["a.o.precision"] == [2 / 5]
    assert values["a.o.confirmed_precision"] == values["a.o.recall"] == [1]


def test_both_objectives_are_trained_on_every_arm_and_seed():
    out = dict(TOY.work(None, toy_options(steps=12, batch_size=32)).frames())["latents"]
    cases = out.groupby(["arm", "objective", "seed"]).size()
    assert len(cases) == 4 and out["l0"].gt(0).all()


# --- metrics -------------------------------------------------------------------------------


def test_what_was_forgotten_where_as_much_was_learned():
    """Full fine-tuning learns 1 and forgets 0.5 by its middle; LoRA ends at a fall of 0.5."""
    full = pd.DataFrame(
        {"val": [5.0, 4.0, 3.5], "other": [3.0, 3.5, 4.5]}, index=pd.Index([0, 10, 20], name="step")
    )
    rows = pd.DataFrame({"arm": "r4", "seed": 0, "step": [0, 0, 20, 20],
                         "set": ["val", "other"] * 2, "loss": [5.0, 3.0, 4.5, 3.1]})  # fmt: skip
    got = METRICS.of_curves(rows, "lora", full)
    assert {n: v[0] for n, v in got.items()} == pytest.approx(
        {"r4.learned": 0.5, "r4.forgot": 0.1, "r4.forgot_alike": 0.25}
    )
    rows.loc[rows["set"] == "val", "loss"] = [5.0, 1.0]
    assert np.isnan(METRICS.of_curves(rows, "lora", full)["r4.forgot_alike"][0])


@pytest.mark.parametrize("best, inside", [("lr1em3", 0), ("lr3em3", 1)])
def test_the_best_rate_of_a_sweep(best, inside):
    rates = {"lr1em3": 1e-3, "lr3em3": 3e-3, "lr1em2": 1e-2}
    rows = [{"arm": a, "step": s, "set": "val", "lr": r * s / 2, "loss": 4 - s * (a == best)}
            for a, r in rates.items() for s in (0, 1)]  # fmt: skip
    used = pd.DataFrame({"lr": [0, 1.5e-3]})
    got = METRICS.of_sweep(pd.DataFrame(rows), "full", used)
    want = {"best_lr": rates[best], "inside": inside, "kept": best == "lr3em3"}
    assert got == {f"sweep.full.{name}": value for name, value in want.items()}
