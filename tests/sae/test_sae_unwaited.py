"""Steps that never wait for a GPU, run here on the CPU, against the plain ones."""

import pytest
import torch
from test_sae import one_thread  # noqa: F401
from test_sae_steps import BATCH, SHAPES, dictionary_at

from pipeline.sae import dead as dead_latents
from pipeline.sae import graphs
from pipeline.sae.sparse import Scratch
from pipeline.sae.train import FAST, STATIC, Dictionary, build
from pipeline.spec.sae import SaeSpec, SaeTraining

LEAST = dead_latents.LEAST_CAPACITY
NAMES = ["topk", "batchtopk", "matryoshka_batchtopk"]


def gradients(step, sae, x, dead, **more):
    """What a step says and leaves."""
    sae.zero_grad(set_to_none=True)
    out = step(sae, x, dead=dead, coefficients={}, step=0, scratch=Scratch(), **more)
    return {"loss": out.loss} | {n: p.grad for n, p in sae.named_parameters()}


def test_these_are_the_steps_that_wait_for_nothing():
    assert {FAST[name] for name in NAMES} == STATIC


@pytest.mark.parametrize(
    "name, by_level", [*((name, False) for name in NAMES), ("matryoshka_batchtopk", True)]
)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dead_share", [0.0, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("share", [0.3, 0.6, 1.0])
def test_capacity_for_more_latents_than_are_dead_changes_nothing(
    name, shape, dead_share, share, by_level
):
    batch, d_in, d_sae = shape
    options = BATCH | ({"use_matryoshka_aux_loss": True} if by_level else {})
    sae = dictionary_at(name, d_in, d_sae, "float64", 0.0, **options)
    x = torch.randn(batch, d_in, dtype=torch.float64)
    dead = torch.zeros(d_sae, dtype=torch.bool)
    dead[torch.randperm(d_sae)[: int(dead_share * d_sae)]] = True
    want = gradients(FAST[name], sae, x, dead)
    got = gradients(FAST[name], sae, x, dead, capacity=max(int(share * d_sae), int(dead.sum())))
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-11, atol=1e-12)


class Recorded:
    """A recorded step without a GPU: it calls the function that it was made of."""

    made = 0

    def __init__(self, step, x, others):
        Recorded.made += 1
        self.step = step

    def __call__(self, x):
        return self.step(x)


def started(name: str, n_steps: int) -> Dictionary:
    spec = SaeSpec(architecture=name, d_sae=64, k=4)
    training = SaeTraining(n_rows=n_steps * 16, batch_size=16, lr=3e-3, dead_rows=160)
    return Dictionary(name, build(spec, 12).double(), training, n_steps)


@pytest.fixture
def small(monkeypatch):
    """As on a GPU, in small."""
    monkeypatch.setattr(graphs, "RecordedStep", Recorded)
    monkeypatch.setattr(dead_latents, "CHECK_EVERY", 4)
    monkeypatch.setattr(dead_latents, "LEAST_CAPACITY", 4)
    monkeypatch.setattr(Recorded, "made", 0)


@pytest.mark.parametrize("name", NAMES)
def test_a_training_that_waits_for_nothing_is_the_plain_one(name, small):
    """Rows from few directions: latents die, and AuxK revives them."""
    random = torch.Generator().manual_seed(0)
    basis = torch.randn(8, 12, generator=random, dtype=torch.float64)
    plain, unwaited = started(name, 60), started(name, 60)
    unwaited.graphs, capacities, scratch = graphs.StepGraphs("unwaited"), set(), Scratch()
    for step in range(60):
        x = torch.randn(16, 8, generator=random, dtype=torch.float64) @ basis
        n_dead = int(unwaited.dead.mask.sum())
        want, got = (d.step(x, step, scratch) for d in (plain, unwaited))
        assert unwaited.dead.capacity >= n_dead
        capacities.add(unwaited.dead.capacity)
        torch.testing.assert_close(got.loss, want.loss)
    assert 0 in capacities and len(capacities) >= 3 and Recorded.made >= 2
    for key, value in plain.tensors().items():
        torch.testing.assert_close(unwaited.tensors()[key], value, rtol=1e-6, atol=1e-8)


def test_the_capacity_is_part_of_a_checkpoint(small):
    """A resumed run counts the dead latents at the steps of an undisturbed one."""
    whole, half = started("topk", 40), started("topk", 40)
    whole.graphs, half.graphs = graphs.StepGraphs("whole"), graphs.StepGraphs("half")
    rows = torch.randn(40, 16, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows[:, :, 2:] = 0
    scratch = Scratch()
    for step in range(40):
        whole.step(rows[step], step, scratch)
    for step in range(18):
        half.step(rows[step], step, scratch)
    again = started("topk", 40)
    again.graphs = graphs.StepGraphs("again")
    again.restore({n: t.clone() for n, t in half.tensors().items()})
    assert again.dead.capacity == half.dead.capacity
    for step in range(18, 40):
        again.step(rows[step], step, scratch)
    for key, value in whole.tensors().items():
        assert torch.equal(value, again.tensors()[key]), key


def test_where_recording_fails_steps_are_taken_one_by_one(small, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("capture failed")

    monkeypatch.setattr(graphs, "RecordedStep", fail)
    plain, unwaited = started("topk", 10), started("topk", 10)
    unwaited.graphs = graphs.StepGraphs("unwaited")
    x, scratch = torch.randn(16, 12, dtype=torch.float64), Scratch()
    for step in range(8):
        plain.step(x, step, scratch)
        unwaited.step(x, step, scratch)
    assert not unwaited.graphs.recording and not unwaited.graphs.recorded
    assert torch.equal(plain.sae.W_enc, unwaited.sae.W_enc)


def test_dictionaries_of_one_kind_compile_once_and_share_the_batch(small, monkeypatch):
    """Each takes one plain step; three of them together have compiled what the others replay."""
    held = []

    class Kept(Recorded):
        def __call__(self, x):
            held.append(x)
            return self.step(x)

    monkeypatch.setattr(graphs, "RecordedStep", Kept)
    several, scratch = [started("topk", 10) for _ in range(4)], Scratch()
    for one in several:
        one.graphs = graphs.StepGraphs("one of them", "kind")
    for step in range(3):
        x = torch.randn(16, 12, dtype=torch.float64)
        for one in several:
            one.step(x, step, scratch)
        assert all(torch.equal(x, shown) for shown in held[-4:])
    assert Recorded.made == 4 and len(held) == 8 and len({x.data_ptr() for x in held}) == 1


def test_a_history_is_read_when_it_is_asked_for():
    one, x = started("topk", 10), torch.randn(16, 12, dtype=torch.float64)
    outcome = one.step(x, 0, Scratch())
    one.record(outcome, x, 0, 2.0)
    step, rows, lr, mse, explained, l0, dead, loss = one.history[0]
    assert (step, rows, lr) == (1, 16, pytest.approx(one.training.lr / one.training.warmup_steps))
    assert mse == outcome.mse.item() / 4 and loss == outcome.loss.item() and l0 == 4 and dead == 0
    total = x.var(0, correction=0).sum()
    assert explained == 1 - (outcome.mse / total).item() and len(one.history) == 1


def test_a_short_window_of_dead_latents_keeps_no_place_for_the_living():
    """Else AuxK is computed over all of them: a step of 2 ms took 9 on an H100."""
    training = SaeTraining(n_rows=4096 * 100, batch_size=4096, dead_rows=100_000)
    spec = SaeSpec(architecture="topk", d_sae=1024, k=4)
    dictionary = Dictionary("short", build(spec, 12), training, 100)
    assert dictionary.dead.check_every * 4096 <= 25_000
    assert dictionary.dead_capacity(0, 4096) == 0
    dictionary.dead.rows_since_fired[:3] = 90_000
    assert dictionary.dead_capacity(dictionary.dead.check_every, 4096) == LEAST
