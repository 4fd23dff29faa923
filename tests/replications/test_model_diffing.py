"""The paper model_diffing: singular vectors, subsets of latents, a toy whose truth is known."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT

from pipeline.job.source import import_file
from pipeline.models import native, splice
from pipeline.spec.training import Architecture
from pipeline.weights import initial

PAPER = ROOT / "rules/papers/model_diffing"
UPDATES = import_file(PAPER / "updates.py")
CLOSED = import_file(PAPER / "closed.py")
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


def test_a_planted_direction_is_the_only_intruder():
    """The mean of all left singular vectors has a cosine of 1 / sqrt(n) with each of them."""
    n = 16
    W_0, U, V = matrix([n - i for i in range(n)])
    u, v = U.mean(1) * n**0.5, V.mean(1) * n**0.5
    W = (W_0.double() + 400 * torch.outer(u, v)).float()
    cosines = UPDATES.best_cosines(W_0, W)
    assert cosines[0] == pytest.approx(n**-0.5, abs=0.02)
    assert (UPDATES.best_cosines(W_0, W_0) > 0.999).all()
    turned = UPDATES.best_cosines(W_0, (orthogonal(n, 3) @ W_0.double()).float())
    assert turned.max() < 0.9  # another basis


@pytest.mark.parametrize(
    "singular, want", [([4, 1, 0, 0], 1), ([3, 1.1, 0, 0], 2), ([1, 1, 1, 1], 4), ([0, 0, 0, 0], 0)]
)
def test_the_rank_makes_nine_tenths_of_the_squared_norm(singular, want):
    assert UPDATES.rank_of(matrix(singular)[0]) == want


def test_scaling_changes_one_singular_value_and_no_vector():
    W, U, V = matrix([5.0, 3.0, 2.0, 1.0])
    want = (U * torch.tensor([5.0, 1.5, 2.0, 0.5], dtype=torch.float64)) @ V.T
    torch.testing.assert_close(UPDATES.scaled(W, [1, 3], 0.5), want.float())
    torch.testing.assert_close(UPDATES.scaled(W, [1, 3], 1.0), W)
    torch.testing.assert_close(UPDATES.scaled(W, [], 0.0), W)


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


# --- latents -------------------------------------------------------------------------------


def test_halves_are_by_norm_by_scaling_and_by_chance():
    frame = pd.DataFrame({
        "latent": range(7), "density": [0.1] * 6 + [0.0],
        "delta": [0.95, 0.2, 0.99, 0.7, 0.92, 0.5, 1.0],
        "nu_r": [0.1, 0, 0.9, 0.2, 0.8, 0, 0], "nu_e": [0.1, 0, 0.9, 0.2, 0.8, 0, 0],
    })  # fmt: skip
    options = CLOSED.Options(
        tables=["closed"], hook="blocks.0.hook_resid_post", base="base", labels=["x"], n_ctx=8
    )
    found = {n: ids.tolist() for n, ids in CLOSED.subsets(frame, 4, options).items()}
    assert found["none"] == [] and found["all"] == list(range(7))
    assert found["top"] == [2, 0, 4, 3]  # latent 6 never fires
    assert (found["larger"], found["smaller"]) == ([2, 0], [4, 3])
    assert found["lower_nu"] == [0, 3] and set(found["higher_nu"]) == {2, 4}
    for i in range(3):
        assert len(found[f"random_{i}"]) == 2 and set(found[f"random_{i}"]) < set(found["top"])


class Exact:
    """A dictionary of both streams that codes them without loss, a latent a sign and dimension."""

    def __init__(self, d: int) -> None:
        eye = torch.eye(2 * d)
        self.W_dec = torch.cat([eye, -eye])

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ self.W_dec.T)


def test_all_latents_of_an_exact_dictionary_close_the_gap_and_none_leave_it():
    """h_S is then x_t, and x_b; positions before skip_first keep x_t."""
    shape = Architecture(n_layers=2, d_model=8, n_heads=2, d_mlp=16, n_ctx=6)
    model = native.NativeForCausalLM({"d_vocab": 11, **shape.model_dump()})
    initial.initial(model, shape, 0)
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    model.eval().requires_grad_(False)
    hook = "blocks.0.hook_resid_post"
    tokens = torch.randint(0, 11, (3, 6), generator=torch.Generator().manual_seed(2))
    x_t = splice.stream(model, hook, tokens)
    x_b = x_t + torch.randn(x_t.shape, generator=torch.Generator().manual_seed(3))
    options = CLOSED.Options(
        tables=["closed"], hook=hook, base="base", labels=["x"], n_ctx=6, skip_first=1
    )
    chosen = {"none": np.array([], int), "all": np.arange(32)}
    at = [slice(0, 8), slice(8, 16)]
    found = CLOSED.closed(model, x_b, x_t, tokens, Exact(8), at, chosen, options)
    assert found["all"] == pytest.approx(0, abs=1e-6)
    patched = x_b.clone()
    patched[:, :1] = x_t[:, :1]
    p, q = (splice.resume(model, hook, tokens, x).log_softmax(-1)[:, 1:] for x in (x_t, patched))
    want = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum") / (3 * 5)
    assert found["none"] == pytest.approx(float(want), rel=1e-4) and float(want) > 0.01


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
    assert values["toy.a.o.precision"] == [2 / 5]
    assert values["toy.a.o.confirmed_precision"] == values["toy.a.o.recall"] == [1]


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


@pytest.mark.parametrize("best, inside", [(1e-3, 0), (3e-3, 1)])
def test_the_best_rate_of_a_sweep(best, inside):
    rates = {"a": 1e-3, "b": 3e-3, "c": 1e-2}
    rows = [{"arm": a, "step": s, "set": "val", "lr": r * (0.5 if s else 1),
             "loss": 4 - s * (r == best)} for a, r in rates.items() for s in (0, 1)]  # fmt: skip
    got = METRICS.of_sweep(pd.DataFrame(rows), "full")
    assert got == {"sweep.full.best_lr": best, "sweep.full.inside": inside}
