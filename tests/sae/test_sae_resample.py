"""Resampling of dead latents (Bricken et al. 2023): against a plain version, and what it is for."""

import numpy as np
import pytest
import torch
from test_sae import planted, stream_of

from pipeline.sae import dead as dead_latents
from pipeline.sae.sparse import Scratch
from pipeline.sae.train import Dictionary, build, resample, train
from pipeline.spec.sae import SaeSpec, SaeTraining

D_IN, D_SAE, BATCH = 24, 64, 100
SPEC = SaeSpec(
    architecture="standard", d_sae=D_SAE, l1_coefficient=1.0, resample_steps=[20],
    resample_window=10, resample_rows=350,
)  # fmt: skip
TRAINING = SaeTraining(n_rows=4000, batch_size=BATCH, lr=3e-3)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def dictionary(n_silent: int, spec: SaeSpec = SPEC, n_steps: int = 40) -> Dictionary:
    """A dictionary whose first latents never fire."""
    sae = build(spec, D_IN)
    sae.b_enc.data[:n_silent] = -1e4
    return Dictionary("l1", sae, TRAINING, n_steps, spec=spec)


def plain(before: dict, dead: list[int], x: np.ndarray, l1: float, seed: list[int]) -> dict:
    """The paper's steps, a row and a latent at a time, in float64."""
    W_enc, W_dec, b_enc, b_dec = (
        before[n].double().numpy().copy() for n in ("W_enc", "W_dec", "b_enc", "b_dec")
    )
    loss = []
    for row in x.astype(np.float64):
        acts = [max(0.0, (row - b_dec) @ W_enc[:, i] + b_enc[i]) for i in range(D_SAE)]
        x_hat = b_dec + sum(a * W_dec[i] for i, a in enumerate(acts))
        sparsity = sum(a * np.sqrt((W_dec[i] ** 2).sum()) for i, a in enumerate(acts))
        loss.append(((row - x_hat) ** 2).sum() + l1 * sparsity)
    p = np.array(loss) ** 2
    chosen = np.random.default_rng(seed).choice(len(x), len(dead), p=p / p.sum())
    living = [
        np.linalg.norm(W_enc[:, i]) * np.linalg.norm(W_dec[i])
        for i in range(D_SAE)
        if i not in dead
    ]
    for i, row in zip(dead, chosen, strict=True):
        direction = (x[row] - b_dec) / np.linalg.norm(x[row] - b_dec)
        W_dec[i], W_enc[:, i], b_enc[i] = direction, 0.2 * np.mean(living) * direction, 0
    return {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}


def test_resampling_is_the_papers():
    made, n_silent = dictionary(n_silent=5), 5
    stream, _ = stream_of(planted(2000)[0], BATCH, normalize=True)
    for step, x in enumerate(stream.batches(0, 20)):
        made.step(x, step, Scratch())
    dead = (made.dead.rows_since_fired >= 10 * BATCH).nonzero()[:, 0].tolist()
    assert dead[:n_silent] == list(range(n_silent)) and len(dead) < D_SAE
    before = {n: t.clone() for n, t in made.sae.state_dict().items()}
    moments = {n: {k: v.clone() for k, v in made.optimiser.adam.state[p].items()}
               for n, p in made.optimiser.trained.items()}  # fmt: skip
    rows = torch.cat(list(stream.batches(20, 24)))[:350]
    want = plain(before, dead, rows.numpy(), 1.0, [0, 20])
    resample([made], stream, 20)
    for name, value in want.items():
        got = made.sae.state_dict()[name].double().numpy()
        np.testing.assert_allclose(got, value, rtol=1e-5, atol=1e-6)
    alive = [i for i in range(D_SAE) if i not in dead]
    for name, p in made.optimiser.trained.items():
        for key in ("exp_avg", "exp_avg_sq"):
            now, then = made.optimiser.adam.state[p][key], moments[name][key]
            now, then = (now.T, then.T) if name == "W_enc" else (now, then)
            if name == "b_dec":
                assert torch.equal(now, then)
                continue
            assert not now[dead].any() and then[alive].any()
            assert torch.equal(now[alive], then[alive])
    assert not made.dead.rows_since_fired[dead].any()


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_rows_are_drawn_in_proportion_to_the_squared_loss(share):
    """Two kinds of rows, whose losses are 1 and 2: the second is drawn four times as often."""
    sae = build(SPEC.model_copy(update={"d_sae": 4096}), 2)
    for p in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec):
        p.data.zero_()
    adam = torch.optim.Adam(sae.parameters())
    for p in sae.parameters():
        adam.state[p] = {k: torch.zeros_like(p) for k in ("exp_avg", "exp_avg_sq")}
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0**0.5]])
    dead = torch.rand(4096, generator=torch.Generator().manual_seed(0)) >= share
    dead_latents.resample(sae, adam, dead, x, 0.0, np.random.default_rng(0))
    second = sae.W_dec[dead][:, 1] == 1
    n = int(dead.sum())
    assert second.double().mean().item() == pytest.approx(0.8, abs=4 * (0.16 / n) ** 0.5)
    assert not sae.W_dec[~dead].any()


def test_a_resumed_training_is_the_undisturbed_one_across_a_resampling():
    x = planted(2000)[0]
    spec = SPEC.model_copy(update={"resample_steps": [12, 24]})
    stream, _ = stream_of(x, BATCH, normalize=True)
    whole = dictionary(5, spec)
    train([whole], stream, 40)
    for stop in (11, 12, 13, 24):
        half, rest = dictionary(5, spec), dictionary(5, spec)
        train([half], stream, stop)
        rest.restore(half.tensors())
        train([rest], stream_of(x, BATCH, normalize=True)[0], 40, first=stop)
        want = whole.tensors()
        assert all(torch.equal(t, want[n]) for n, t in rest.tensors().items() if n != "history")


def test_a_latent_is_resampled_once_it_was_silent_for_the_whole_window():
    made, window = dictionary(0), SPEC.resample_window * BATCH
    (x,) = stream_of(planted(2000)[0], BATCH, normalize=True)[0].batches(0, 1)
    made.step(x, 0, Scratch())
    made.dead.rows_since_fired[:] = 0
    made.dead.rows_since_fired[:3] = torch.tensor([window - 1, window, window + 1])
    before = made.sae.W_dec.detach().clone()
    made.resample(x, 20)
    moved = (made.sae.W_dec != before).any(1)
    assert moved[:3].tolist() == [False, True, True] and not moved[3:].any()
    assert made.dead.rows_since_fired[:3].tolist() == [window - 1, 0, 0]


def test_resampled_latents_live():
    x = planted(4000)[0]
    stream, _ = stream_of(x, BATCH, normalize=True)
    with_it, without = (
        dictionary(20),
        dictionary(20, SPEC.model_copy(update={"resample_steps": []})),
    )
    train([with_it, without], stream, 40)
    assert int((without.dead.rows_since_fired >= 10 * BATCH)[:20].sum()) == 20
    assert int((with_it.dead.rows_since_fired >= 10 * BATCH)[:20].sum()) < 10


def test_nothing_is_drawn_where_nothing_is_dead():
    made = dictionary(0)
    before = {n: t.clone() for n, t in made.sae.state_dict().items()}
    none = torch.zeros(D_SAE, dtype=torch.bool)
    dead_latents.resample(
        made.sae, made.optimiser.adam, none, torch.ones(3, D_IN), 1.0, np.random.default_rng(0)
    )
    assert all(torch.equal(t, before[n]) for n, t in made.sae.state_dict().items())
