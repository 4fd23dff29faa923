"""Dictionaries: fast steps against SAELens's, the stream, the loop, the stage, and its faults."""

import json
import math
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
import warm
from conftest import ROOT, environment, stage

from pipeline.errors import RetraceError
from pipeline.sae import steps
from pipeline.sae.optimiser import coefficients, learning_rate
from pipeline.sae.sparse import Dense, Scratch, Sparse, largest
from pipeline.sae.stream import CHUNKS, Stream, geometric_median, picked
from pipeline.sae.train import Dictionary, build, train
from pipeline.sharing import verify
from pipeline.spec.sae import SaeSpec, SaeTraining
from pipeline.store import provenance, tables
from pipeline.store.shards import Rows

HOOK = "blocks.0.hook_resid_post"
TOPK = SaeSpec(architecture="topk", d_sae=64, k=4)
L1 = SaeSpec(architecture="standard", d_sae=64, l1_coefficient=2.0)
RESAMPLED = L1.model_copy(
    update={"resample_steps": [250, 500], "resample_window": 100, "resample_rows": 1500}
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small steps on many threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- data ----------------------------------------------------------------------------------


def planted(n: int, d_in: int = 24, n_true: int = 48, active: int = 3, seed: int = 0):
    """Rows that are sums of `active` of `n_true` unit directions, and those directions."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(n_true, d_in))
    truth /= np.linalg.norm(truth, axis=1, keepdims=True)
    codes = np.zeros((n, n_true))
    for row in codes:
        row[rng.choice(n_true, active, replace=False)] = rng.uniform(0.5, 1.5, active)
    return (10 * codes @ truth + 3).astype(np.float32), truth


def store(folder: Path, x: np.ndarray, shard_rows: int = 700, dtype: str = "float32") -> Path:
    """An activations item with `x` as training rows and ten rows held out; its manifest."""
    entries, files = [], {}
    parts = [("train", x[at : at + shard_rows]) for at in range(0, len(x), shard_rows)]
    for i, (split, part) in enumerate([*parts, ("eval", x[:10])]):
        name = f"shards/{HOOK}/part-{i:05d}.parquet"
        raw = part.astype(np.float32)
        norm = float(np.linalg.norm(raw, axis=1).mean())
        if dtype == "bfloat16":
            raw = torch.from_numpy(raw).bfloat16().view(torch.int16).numpy().view(np.uint16)
        columns = {c: np.zeros(len(part), np.int32) for c in ("document", "position", "token")}
        columns["block"] = np.arange(len(part), dtype=np.int32)
        tables.write_shard(folder / name, raw, columns, dtype, {"hook": HOOK})
        entries.append({"file": name, "split": split, "rows": len(part), "mean_norm": norm})
        files[name] = provenance.sha256_file(folder / name)
    about = {
        "d_model": x.shape[1],
        "dtype": dtype,
        "rows": {"train": len(x), "eval": 10},
        "mean_norm": float(np.linalg.norm(x, axis=1).mean()),
        "variance": float(x.var(0).mean()),
        "shards": entries,
    }
    manifest = {
        "hooks": {HOOK: about},
        "skip_first": 1,
        "prepend_bos": True,
        "n_ctx": 16,
        "model": "results/store/model/tiny-0123456789ab/model.json",
        "corpus": "results/store/corpus/made_up-0123456789ab/tokens.parquet",
        "files": files,
    }
    tables.write_json(folder / "manifest.json", manifest, {})
    return folder / "manifest.json"


@pytest.fixture(scope="module")
def activations(tmp_path_factory) -> Path:
    """manifest.json of 3,000 planted rows."""
    return store(tmp_path_factory.mktemp("activations"), planted(3000)[0])


class ArrayRows(Rows):
    """An array in place of stored shards."""

    def __init__(self, x: np.ndarray) -> None:
        self.x, self.reads = x, []
        self.n_rows, self.d_model, self.dtype = len(x), x.shape[1], "float32"
        self.manifest, self.hook = "manifest.json", HOOK
        norm = float(np.linalg.norm(x, axis=1).mean())
        self.shards = [SimpleNamespace(rows=len(x), mean_norm=norm)]

    def read_into(self, start, stop, out):
        self.reads.append((start, stop))
        out[:] = self.x[start:stop]
        return {}

    @property
    def parts(self):
        return (self,)

    def ahead(self, start, stop):
        """Nothing lies on a disk."""

    def again(self):
        return self


def stream_of(x: np.ndarray, batch_size: int, buffer_rows: int = 10**6, seed: int = 0, **more):
    """A Stream over an array; `reads` keeps every (start, stop) that it asked for."""
    rows = ArrayRows(x)
    given = {"normalize": False, **more}
    stream = Stream(rows, batch_size=batch_size, buffer_rows=buffer_rows, seed=seed, **given)
    return stream, rows.reads


def trained(specs: dict, x: np.ndarray, n_steps: int, batch_size: int = 256, lr: float = 3e-3):
    """Train dictionaries on an array; name -> Dictionary, and the stream."""
    training = SaeTraining(n_rows=n_steps * batch_size, batch_size=batch_size, lr=lr)
    stream, _ = stream_of(x, batch_size, normalize=True)
    out = {}
    for name, spec in specs.items():
        sae = build(spec, x.shape[1])
        sae.b_dec.data.copy_(geometric_median(stream.sample(2000)))
        out[name] = Dictionary(name, sae, training, n_steps)
    train(list(out.values()), stream, n_steps)
    return out, stream


# --- one step: fast against SAELens's own --------------------------------------------------


def dictionary_at(architecture: str, d_in: int, d_sae: int, dtype: str, shift: float, **options):
    """A SAELens TrainingSAE away from its initial weights; `shift` moves the encoder's bias."""
    from sae_lens.registry import get_sae_training_class

    sae_class, config = get_sae_training_class(architecture)
    torch.manual_seed(0)
    sae = sae_class(config(d_in=d_in, d_sae=d_sae, dtype=dtype, **options))
    with torch.no_grad():
        if hasattr(sae, "b_enc"):
            sae.b_enc.add_(0.1 * torch.randn_like(sae.b_enc) + shift)
        sae.b_dec.add_(0.1 * torch.randn_like(sae.b_dec))
        sae.W_enc.add_(0.05 * torch.randn_like(sae.W_enc))
        sae.W_dec.mul_(torch.rand(d_sae, 1, dtype=sae.dtype) + 0.5)
    return sae


def one_step(step, sae, x, dead):
    """Outcome of a step, and the gradients that it left."""
    sae.zero_grad(set_to_none=True)
    out = step(sae, x, dead=dead, coefficients={"l1": 1.5}, step=0, scratch=Scratch())
    return out, {n: p.grad for n, p in sae.named_parameters() if p.grad is not None}


SHAPES = [(64, 32, 512), (7, 5, 30), (33, 16, 1024)]  # batch, d_in, d_sae; 30: no equal groups
STEPS = [
    ("topk", {"k": 4, "aux_loss_coefficient": 1 / 32}, 0.0),
    ("topk", {"k": 4, "aux_loss_coefficient": 1 / 32, "rescale_acts_by_decoder_norm": False}, 0.0),
    ("topk", {"k": 4, "aux_loss_coefficient": 0.0}, 0.0),
    ("topk", {"k": 4, "aux_loss_coefficient": 1 / 32}, -0.2),  # fewer than k are above zero
    ("standard", {"l1_coefficient": 1.5}, 0.0),  # half of all active: dense products
    ("standard", {"l1_coefficient": 1.5}, -0.9),  # few active: sparse products
    ("standard", {"l1_coefficient": 1.5}, -50.0),  # none active
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("architecture, options, shift", STEPS)
@pytest.mark.parametrize("dead_share", [0.0, 0.02, 0.7])
# The sums of a step run over at most batch * d_in terms in another order than SAELens's: rounding
# is a small multiple of the type's epsilon (2e-16, 1e-7).
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("float32", 2e-5)])
def test_fast_step_is_saelens_step(
    shape, architecture, options, shift, dead_share, dtype, tolerance
):
    batch, d_in, d_sae = shape
    sae = dictionary_at(architecture, d_in, d_sae, dtype, shift, **options)
    x = torch.randn(batch, d_in, dtype=sae.dtype)
    dead = torch.rand(d_sae) < dead_share
    want, want_grads = one_step(steps.reference, sae, x, dead)
    got, got_grads = one_step(steps.FAST[architecture], sae, x, dead)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)  # noqa: E731
    close(got.loss, want.loss)
    close(got.mse, want.mse)
    assert got.l0.item() == pytest.approx(want.l0.item(), rel=1e-6)
    assert torch.equal(got.fired, want.fired)
    assert got_grads.keys() == want_grads.keys() == {"W_enc", "W_dec", "b_enc", "b_dec"}
    for name, grad in want_grads.items():
        close(got_grads[name], grad)
    if architecture == "topk" and options["aux_loss_coefficient"] and dead_share == 0.7:
        assert got.loss > got.mse  # AuxK took part


def test_l1_steps_of_the_table_cover_sparse_and_dense():
    active = {}
    for architecture, options, shift in STEPS[-3:]:
        sae = dictionary_at(architecture, 32, 512, "float32", shift, **options)
        out, _ = one_step(steps.standard, sae, torch.randn(64, 32), torch.zeros(512).bool())
        active[shift] = out.l0.item() / 512
    assert active[0.0] > steps.DENSE_SHARE > active[-0.9] > active[-50.0] == 0


@pytest.mark.parametrize("architecture", ["topk", "standard"])
def test_frozen_decoder_gets_no_gradient(architecture):
    options = {"k": 4} if architecture == "topk" else {}
    sae = dictionary_at(architecture, 16, 256, "float64", 0.0, **options)
    sae.W_dec.requires_grad_(False)
    x, dead = torch.randn(20, 16, dtype=torch.float64), torch.arange(256) < 100
    _, want = one_step(steps.reference, sae, x, dead)
    _, got = one_step(steps.FAST[architecture], sae, x, dead)
    assert got.keys() == want.keys() == {"W_enc", "b_enc", "b_dec"}
    for name in want:
        torch.testing.assert_close(got[name], want[name])


@pytest.mark.parametrize("rows, columns, k", [(5, 64, 2), (9, 1024, 32), (3, 30, 4), (4, 128, 128)])
def test_largest_are_the_k_largest(rows, columns, k):
    scores = torch.randn(rows, columns)
    values, indices = largest(scores, k)
    assert torch.equal(values.sort().values, scores.topk(k).values.sort().values)
    assert torch.equal(scores.gather(1, indices), values)
    assert all(len(set(row)) == k for row in indices.tolist())


@pytest.mark.parametrize("density", [0.0, 0.05, 1.0])
def test_sparse_products_are_the_dense_ones(density):
    torch.manual_seed(0)
    full = torch.randn(12, 40) * (torch.rand(12, 40) < density)
    W, x, d, offset = (torch.randn(n) for n in ((40, 6), (12, 6), (12, 6), (40,)))
    rows, latents = full.nonzero(as_tuple=True)
    full = full.abs()
    support, values = Sparse(latents, rows, (12, 40)), full[rows, latents]
    product, pull = support.decode(values, W)
    dense_product, dense_pull = Dense(Scratch()).decode(full, W)
    torch.testing.assert_close(product, dense_product)
    torch.testing.assert_close(pull(d, None), dense_pull(d, None)[rows, latents])
    pull = support.decode(values, W)[1]
    torch.testing.assert_close(pull(d, offset), dense_pull(d, offset)[rows, latents])
    torch.testing.assert_close(support.gather(values, x), Dense(Scratch()).gather(full, x))
    torch.testing.assert_close(support.total(values), Dense(Scratch()).total(full))
    assert torch.equal(support.fired(values), Dense(Scratch()).fired(full))
    torch.testing.assert_close(support.l0_(values), Dense(Scratch()).l0_(full))


# --- the stream ----------------------------------------------------------------------------

NUMBERED = np.arange(1000, dtype=np.float32)[:, None] * np.ones((1, 2), np.float32)


@pytest.mark.parametrize("buffer_rows", [64, 300, 10**6])
@pytest.mark.parametrize("batch_size", [10, 64, 300])
def test_an_epoch_shows_every_row_once_in_any_buffer(batch_size, buffer_rows):
    stream, reads = stream_of(NUMBERED, batch_size, buffer_rows)
    n = math.ceil(2000 / batch_size)
    shown = torch.cat(list(stream.batches(0, n)))[:2000, 0]
    for epoch in shown.split(1000):
        assert sorted(epoch.tolist()) == list(range(1000))
        assert epoch.tolist() != list(range(1000))
    assert shown[:1000].tolist() != shown[1000:].tolist()
    chunk = max(1, min(buffer_rows, 1000) // CHUNKS)
    assert all(0 < stop - start <= chunk for start, stop in reads)


def test_a_batch_depends_on_seed_and_step_alone():
    whole = list(stream_of(NUMBERED, 70, 200)[0].batches(0, 40))
    for first in (1, 13, 15, 39):
        rest = stream_of(NUMBERED, 70, 200)[0].batches(first, 40)
        for want, got in zip(whole[first:], rest, strict=True):
            assert torch.equal(want, got)
    other = next(stream_of(NUMBERED, 70, 200, seed=1)[0].batches(0, 1))
    assert not torch.equal(whole[0], other)


def test_rows_of_distant_chunks_meet_in_a_batch():
    batch = next(stream_of(NUMBERED, 128, 128)[0].batches(0, 1))[:, 0]  # chunks of 2 rows
    assert sorted(batch.tolist()) == sorted(
        r + i for r in batch[batch % 2 == 0].tolist() for i in (0, 1)
    )
    assert len({int(row) // 100 for row in batch.tolist()}) == 10


def test_memory_is_a_buffer_not_the_store(tmp_path):
    """A buffer of so many rows, however many there are."""
    x = np.random.default_rng(0).normal(size=(6000, 64)).astype(np.float32)
    rows = Rows(store(tmp_path, x, shard_rows=500), HOOK, "train")
    stream = Stream(rows, batch_size=100, buffer_rows=800, seed=0, normalize=False)
    largest_buffer = max(len(b) for b, _ in zip_first(stream._buffers(0, 10**6), 20))
    assert largest_buffer <= 800


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_gpu_reads_hook_by_hook_are_the_same_rows(tmp_path, dtype):
    """On the CPU, where the same lines put the hooks side by side."""
    x = np.random.default_rng(0).normal(size=(900, 24)).astype(np.float32)
    one, other = (Rows(store(tmp_path / n, x[:, at], 100, dtype), HOOK, "train")
                  for n, at in (("a", slice(0, 16)), ("b", slice(16, 24))))  # fmt: skip
    stream = Stream(one, batch_size=100, buffer_rows=400, seed=0, normalize=False, target=other)
    for starts, stops, order, _ in zip_first(stream._plans(0, 2000), 5):
        rows, _ = stream._load(starts, stops, order)
        spans = list(zip(starts.tolist(), stops.tolist(), strict=True))
        assert torch.equal(stream._on_gpu(spans), rows)
        at = np.concatenate([np.arange(a, b) for a, b in spans])
        assert torch.equal(rows, torch.from_numpy(x[at]).to(getattr(torch, dtype)))


def zip_first(iterator, n):
    """The first n items of an iterator."""
    return [item for _, item in zip(range(n), iterator, strict=False)]


def test_rows_are_scaled_to_a_mean_norm_of_sqrt_d(activations):
    rows = Rows(activations, HOOK, "train")
    stream = Stream(rows, batch_size=3000, buffer_rows=10**6, seed=0, normalize=True)
    x = next(stream.batches(0, 1))
    assert x.norm(dim=1).mean().item() == pytest.approx(math.sqrt(24), rel=1e-5)
    assert x.dtype == torch.float32


def test_bfloat16_rows_come_out_as_they_went_in(tmp_path):
    x = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    rows = Rows(store(tmp_path, x, 20, "bfloat16"), HOOK, "train")
    stream = Stream(rows, batch_size=50, buffer_rows=10**6, seed=0, normalize=False)
    got = next(stream.batches(0, 1))
    want = torch.from_numpy(x).bfloat16().float()
    assert sorted(got.tolist()) == sorted(want.tolist())


def test_geometric_median_is_the_middle_point_of_a_line():
    x = torch.tensor([0.0, 1.0, 2.0, 3.0, 1000.0])[:, None] * torch.tensor([[0.6, 0.8]])
    torch.testing.assert_close(
        geometric_median(x), torch.tensor([1.2, 1.6]), rtol=0, atol=0.05
    )  # Weiszfeld nears a data point slowly; the mean is at 201


def test_geometric_median_has_the_least_sum_of_distances():
    x = torch.from_numpy(planted(400)[0]).double()
    median = geometric_median(x, tolerance=1e-9)
    cost = lambda m: (x - m).norm(dim=1).sum()  # noqa: E731
    torch.manual_seed(0)
    for _ in range(20):
        assert cost(median) < cost(median + 0.05 * torch.randn(24, dtype=torch.float64))


# --- the loop ------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup, decay", [(0, 0.0), (7, 0.0), (0, 0.2), (10, 0.3)])
def test_learning_rate_and_coefficients_are_saelens(warmup, decay):
    from sae_lens.training.optim import CoefficientScheduler, get_lr_scheduler

    n, lr = 50, 0.01
    training = SaeTraining(lr=lr, warmup_steps=warmup, decay_share=decay)
    adam = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    rates = get_lr_scheduler(
        "constant", adam, n, lr=lr, warm_up_steps=warmup, decay_steps=round(decay * n),
        lr_end=lr / 10, num_cycles=1,
    )  # fmt: skip
    spec = L1.model_copy(update={"l1_warmup_steps": warmup})
    sae = build(spec, 8)
    l1 = CoefficientScheduler(warm_up_steps=warmup, final_value=2.0)
    for step in range(n):
        want = adam.param_groups[0]["lr"]
        assert learning_rate(step, n, training) == pytest.approx(want, rel=1e-9)
        assert coefficients(sae, step) == {"l1": pytest.approx(l1.value)}
        adam.step()
        rates.step()
        l1.step()


@pytest.mark.parametrize("spec", [TOPK, L1], ids=["topk", "standard"])
@pytest.mark.parametrize("step", [None, steps.reference], ids=["fast", "reference"])
def test_training_is_saelens_training(spec, step):
    """60 steps of ours against 60 of SAETrainer.fit on the same batches, AuxK at work."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    x, batch, n = planted(2000)[0], 100, 60
    training = SaeTraining(
        n_rows=n * batch, batch_size=batch, lr=2e-3, warmup_steps=5, decay_share=0.2, dead_rows=300
    )
    stream, _ = stream_of(x, batch, normalize=True)
    ours = Dictionary("ours", build(spec, 24), training, n, step)
    loss = []
    for i, rows in enumerate(stream.batches(0, n)):
        loss.append(ours.step(rows, i, Scratch()))
    theirs = build(spec, 24)
    config = SAETrainerConfig(
        total_training_samples=n * batch, train_batch_size_samples=batch, lr=2e-3,
        lr_end=2e-4, lr_warm_up_steps=5, lr_decay_steps=12, dead_feature_window=2,
    )  # fmt: skip
    SAETrainer(config, theirs, stream.batches(0, n)).fit()
    if spec is TOPK:
        assert any(out.loss > out.mse for out in loss)  # some latents were dead for a while
    before = build(spec, 24)
    for name, parameter in ours.sae.named_parameters():
        moved = (theirs.state_dict()[name] - before.state_dict()[name]).norm()
        apart = (theirs.state_dict()[name] - parameter).norm()
        # Adam divides by the size of a gradient, so rounding of small ones grows step by step;
        # a wrong factor anywhere leaves them as far apart as they have moved.
        assert apart < 0.01 * moved


def mean_max_cosine(decoder: torch.Tensor, truth: np.ndarray) -> float:
    """Mean over true directions of the best cosine with a decoder row (MMCS)."""
    rows = decoder.detach() / decoder.detach().norm(dim=1, keepdim=True)
    return (torch.tensor(truth, dtype=torch.float32) @ rows.T).amax(1).mean().item()


@pytest.mark.workflow
def test_a_planted_dictionary_is_recovered_and_a_random_one_is_not():
    x, truth = planted(20_000)
    topk = TOPK.model_copy(update={"k": 3, "d_sae": 96})
    specs = {
        "topk": topk,
        "standard": L1.model_copy(update={"d_sae": 96, "l1_coefficient": 0.5}),
        "null": topk.model_copy(update={"frozen_decoder": True}),
    }
    out, _ = trained(specs, x - 3, 1200)
    found = {name: mean_max_cosine(d.sae.W_dec, truth) for name, d in out.items()}
    explained = {name: d.history[-1][4] for name, d in out.items()}
    assert found["topk"] > 0.95
    assert found["standard"] > 0.9
    assert found["null"] < 0.65  # what 96 random directions in 24 dimensions give
    assert explained["topk"] > 0.9 > explained["null"] + 0.1


def test_a_frozen_decoder_stays_at_unit_norm_and_the_rest_trains():
    spec = TOPK.model_copy(update={"frozen_decoder": True})
    start = build(spec, 24)
    out, _ = trained({"null": spec}, planted(2000)[0], 30)
    sae = out["null"].sae
    assert torch.equal(sae.W_dec, start.W_dec)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))
    for name in ("W_enc", "b_enc", "b_dec"):
        assert not torch.equal(sae.state_dict()[name], start.state_dict()[name])


def test_a_silent_latent_is_dead_after_dead_rows_and_alive_when_it_fires():
    training = SaeTraining(n_rows=1000, batch_size=10, dead_rows=25, lr=1e-9)
    sae = build(TOPK.model_copy(update={"aux_loss_coefficient": 0}), 24)
    sae.b_enc.data[7] = -1e3
    dictionary = Dictionary("topk", sae, training, 100)
    x = torch.from_numpy(planted(10)[0])
    dead = []
    for step in range(4):
        dictionary.step(x, step, Scratch())
        dead.append(bool(dictionary.dead.mask[7]))
    assert dead == [False, False, True, True]
    sae.b_enc.data[7] = 1e3
    dictionary.step(x, 4, Scratch())
    assert not dictionary.dead.mask[7]


def test_in_a_run_shorter_than_dead_rows_a_latent_that_never_fired_is_dead():
    training = SaeTraining(n_rows=20, batch_size=10, dead_rows=10**6)
    sae = build(TOPK, 24)
    sae.b_enc.data[7] = -1e3
    dictionary = Dictionary("topk", sae, training, 2)
    for step in range(2):
        assert not dictionary.dead.mask.any()
        dictionary.step(torch.from_numpy(planted(10)[0]), step, Scratch())
    assert dictionary.dead.mask[7]


def test_initial_weights_are_a_function_of_the_seed():
    first = build(TOPK, 24).state_dict()
    torch.rand(100)
    again, other = build(TOPK, 24).state_dict(), build(L1, 24).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(first["W_dec"], other["W_dec"])  # paired across architectures
    seeded = build(TOPK.model_copy(update={"seed": 1}), 24).state_dict()
    assert not torch.equal(first["W_dec"], seeded["W_dec"])


def test_every_architecture_of_saelens_can_be_driven_by_the_reference_step():
    """The step takes any TrainingSAE; test_sae_architectures.py trains them by their specs."""
    x = planted(2000)[0]
    stream, _ = stream_of(x, 100, normalize=True)
    training = SaeTraining(n_rows=2000, batch_size=100, lr=3e-3)
    for architecture, options in {"batchtopk": {"k": 4}, "gated": {}, "jumprelu": {}}.items():
        sae = dictionary_at(architecture, 24, 64, "float32", 0.0, **options)
        dictionary = Dictionary(architecture, sae, training, 20)
        dictionary.gradients = steps.reference
        train([dictionary], stream, 20)
        assert dictionary.history[-1][4] > dictionary.history[0][4]


def test_a_nan_loss_names_the_dictionary_and_the_step():
    x = planted(1000)[0]
    x[17] = np.nan
    training = SaeTraining(n_rows=1000, batch_size=50)
    bad = Dictionary("broken", build(TOPK, 24), training, 20)
    stream, _ = stream_of(x, 50)
    at = next(i for i, rows in enumerate(stream.batches(0, 20)) if rows.isnan().any())
    with pytest.raises(RetraceError, match=rf"'broken': the loss is nan at step {at + 1} of 20"):
        train([bad], stream, 20)


# --- the stage -----------------------------------------------------------------------------

SPEC = {
    "hook": HOOK,
    "training": {
        "n_rows": 128_000,
        "batch_size": 128,
        "lr": 3e-3,
        "dead_rows": 2000,
        "checkpoint_seconds": 0.05,  # some checkpoints in the second or two that it takes
    },
    "dictionaries": {
        "topk": TOPK.model_dump(exclude={"grid", "arms"}) | {"hook": HOOK},
        "l1": L1.model_dump(exclude={"grid", "arms"}) | {"hook": HOOK},
        "resampled": RESAMPLED.model_dump(exclude={"grid", "arms"}) | {"hook": HOOK},
        "null": TOPK.model_dump(exclude={"grid", "arms"}) | {"hook": HOOK, "frozen_decoder": True},
    },
}


def run(out: Path, activations: Path, spec: dict = SPEC, check: bool = True):
    """The stage in a process of its own."""
    return stage("sae", {"sae": spec}, check=check, **arguments(out, activations))


def arguments(out: Path, activations: Path) -> dict:
    return {
        "activations": activations,
        "out": out / "manifest.json",
        "saes": out / "saes",
        "history": out / "history.parquet",
        "device": "cpu",
        "threads": 1,
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def made(activations, tmp_path_factory) -> Path:
    """The store's item of SPEC."""
    out = tmp_path_factory.mktemp("sae")
    run(out, activations)
    return out


def test_the_item_is_complete_and_verifies(made, activations):
    manifest = tables.read_json(made / "manifest.json")
    assert manifest["hook"] == HOOK and manifest["d_in"] == 24
    assert manifest["activations"] == str(activations)
    assert set(manifest["saes"]) == set(SPEC["dictionaries"])
    entry = manifest["saes"]["topk"]
    assert entry["steps"] == 1000 and entry["rows"] == 128_000 and entry["folder"] == "saes/topk"
    assert entry["spec"]["k"] == 4 and entry["spec"]["hook"] == HOOK
    assert len(entry["dead"]) == round(entry["dead_share"] * 64)
    assert not (made / "saes.partial").exists()
    assert verify.faults(made) == []
    for name in manifest["files"]:
        assert provenance.read(made / name)["stage"] == "sae"


def test_the_history_has_every_dictionary_and_ends_at_the_last_step(made):
    frame = tables.read_table(made / "history.parquet")
    columns = "sae step rows lr mse explained_variance l0 dead_share loss".split()
    assert list(frame.columns) == columns
    assert set(frame["sae"]) == set(SPEC["dictionaries"])
    assert (frame.groupby("sae")["step"].max() == 1000).all()
    assert (frame["rows"] == frame["step"] * 128).all()
    topk = frame[frame["sae"] == "topk"]
    assert topk["explained_variance"].iloc[-1] > topk["explained_variance"].iloc[0] + 0.2
    assert topk["l0"].iloc[-1] == 4


@pytest.mark.workflow
@pytest.mark.parametrize("name", list(SPEC["dictionaries"]))
def test_saelens_loads_what_we_wrote_and_reconstructs_what_ours_does(made, activations, name):
    """The trained object on scaled rows against the saved folder on rows as they are stored."""
    from sae_lens import SAE

    loaded = SAE.load_from_disk(str(made / "saes" / name))
    assert loaded.cfg.normalize_activations == "none"
    assert loaded.cfg.metadata.hook_name == HOOK
    training = SaeTraining.model_validate(SPEC["training"])
    spec = SaeSpec.model_validate(SPEC["dictionaries"][name])
    rows = Rows(activations, HOOK, "train")
    stream = Stream(rows, batch_size=128, buffer_rows=65_536, seed=0, normalize=True)
    sae = build(spec, 24)
    sae.b_dec.data.copy_(geometric_median(stream.sample(32_768)))
    train([Dictionary(name, sae, training, 1000, spec=spec)], stream, 1000)
    x = torch.from_numpy(rows.read(0, 500)[0].copy())
    with torch.no_grad():
        want = sae(x * stream.scale) / stream.scale
        torch.testing.assert_close(loaded(x), want, rtol=1e-3, atol=1e-3)  # of rows of norm 20
        assert loaded.encode(x).bool().sum(1).float().mean() > 0
        total = (x - x.mean(0)).pow(2).sum()
        explained = 1 - (loaded(x) - x).pow(2).sum() / total
    frame = tables.read_table(made / "history.parquet").set_index("sae").loc[name]
    assert explained.item() == pytest.approx(frame["explained_variance"].iloc[-1], abs=0.1)


def test_company_changes_nothing(made, activations, tmp_path):
    alone = {**SPEC, "dictionaries": {"topk": SPEC["dictionaries"]["topk"]}}
    run(tmp_path, activations, alone)
    weights = Path("saes/topk/sae_weights.safetensors")
    want = provenance.content_digest(made / weights)
    assert provenance.content_digest(tmp_path / weights) == want


@pytest.mark.workflow
def test_a_killed_run_resumes_and_ends_with_the_bytes_of_another(activations, tmp_path):
    """`kill -9` at the first checkpoint; another process was left in peace.

    All three hold the same packages: a run goes on from another's state only then.
    """
    killed = tmp_path / "killed"
    run(tmp_path / "whole", activations)
    command = [warm.python(), "-m", "pipeline", "sae", "--spec", json.dumps({"sae": SPEC})]
    for option, value in arguments(killed, activations).items():
        command += [f"--{option}", str(value)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE)
    until = time.monotonic() + 120
    while not list((killed / "saes.partial").glob("step-*")) and time.monotonic() < until:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "manifest.json").exists() and not (killed / "saes").exists()
    told = run(killed, activations).stderr
    assert "resumed at step" in told
    assert contents(killed) == contents(tmp_path / "whole")


def test_a_checkpoint_of_another_spec_or_one_that_is_broken_is_not_used(tmp_path):
    from pipeline.store.checkpoints import Checkpoints

    training = SaeTraining(n_rows=1000, batch_size=50)
    stream, _ = stream_of(planted(1000)[0], 50)

    def fresh():
        return [Dictionary("topk", build(TOPK, 24), training, 20)]

    half = fresh()
    train(half, stream, 10)
    Checkpoints(tmp_path, "key").save(10, half)
    train(half, stream, 12, first=10)
    Checkpoints(tmp_path, "key").save(12, half)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000012"]
    assert Checkpoints(tmp_path, "other").load(fresh()) == 0
    resumed = fresh()
    assert Checkpoints(tmp_path, "key").load(resumed) == 12
    got, want = resumed[0].tensors(), half[0].tensors()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    file = tmp_path / "step-000000012/topk.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert Checkpoints(tmp_path, "key").load(fresh()) == 0
    Checkpoints(tmp_path, "key").save(12, half)  # in place of the broken one, at the same step
    assert Checkpoints(tmp_path, "key").load(fresh()) == 12
    Checkpoints(tmp_path, "other").save(12, half)  # and in place of another job's
    assert Checkpoints(tmp_path, "other").load(fresh()) == 12
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000012"]


@pytest.mark.workflow
def test_a_full_disk_leaves_nothing_that_reads_as_complete(activations, tmp_path):
    command = [sys.executable, "-m", "pipeline", "sae", "--spec", json.dumps({"sae": SPEC})]
    for option, value in arguments(tmp_path, activations).items():
        command += [f"--{option}", str(value)]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))  # noqa: E731
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, preexec_fn=limit
    )
    assert done.returncode == 1
    assert "could not be written" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "manifest.json").exists() and not (tmp_path / "saes").exists()


# --- bad input -----------------------------------------------------------------------------


def fault(out: Path, activations: Path, spec: dict, capsys) -> str:
    """The sentence with which the stage fails, in this process."""
    from pipeline.sae import sae

    argv = ["sae", "--spec", json.dumps({"sae": spec})]
    for option, value in arguments(out, activations).items():
        argv += [f"--{option}", str(value)]
    before, sys.argv = sys.argv, argv
    try:
        with pytest.raises(SystemExit) as stopped:
            sae.main()
    finally:
        sys.argv = before
    assert stopped.value.code == 1
    assert not (out / "manifest.json").exists()
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "section, key, value, sentence",
    [
        ("training", "batchsize", 10, "unknown key 'batchsize' (did you mean 'batch_size'?)"),
        ("training", "batch_size", 10**6, "n_rows 128000 is less than one batch of 1000000"),
        ("topk", "d_sae", 4096, "sae.topk: 4096 latents are wider than the 3000 training rows"),
        ("topk", "architecture", "top_k", "architecture"),
        ("topk", "resample_steps", [5], "resample_steps: only for architecture standard"),
        ("l1", "resample_steps", [9, 5], "resample_steps: [9, 5] do not rise"),
        (
            "l1",
            "resample_steps",
            [1000],
            "resample_steps: 1000, but the training ends at step 1000",
        ),
        ("", "hook", "blocks.1.hook_resid_post", "holds no hook 'blocks.1.hook_resid_post'"),
    ],
)
def test_a_bad_spec_is_told_in_one_sentence(
    activations, tmp_path, capsys, section, key, value, sentence
):
    spec = json.loads(json.dumps(SPEC))
    {"training": spec["training"], "": spec, **spec["dictionaries"]}[section][key] = value
    assert sentence in fault(tmp_path, activations, spec, capsys)


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (lambda x: x * 0, "mean norm of 0"),  # trap T1: the hook caught nothing
        (lambda x: x * 0 + x[0], "do not vary"),
        (lambda x: np.where(x > 5, np.nan, x), "mean norm of nan"),
    ],
    ids=["zeros", "constant", "nan"],
)
def test_activations_that_cannot_train_anything_are_refused(tmp_path, capsys, spoil, sentence):
    manifest = store(tmp_path / "activations", spoil(planted(500)[0]))
    assert sentence in fault(tmp_path / "out", manifest, SPEC, capsys)


@pytest.mark.parametrize("change", ["truncated", "altered", "missing"])
def test_a_shard_that_was_changed_is_refused(tmp_path, capsys, change):
    manifest = store(tmp_path / "activations", planted(2000)[0])
    shard = sorted((tmp_path / "activations/shards" / HOOK).iterdir())[1]
    data = shard.read_bytes()
    if change == "missing":
        shard.unlink()
    else:
        shard.write_bytes(data[:-500] if change == "truncated" else data[:900] + b"x" + data[901:])
    told = fault(tmp_path / "out", manifest, SPEC, capsys)
    assert shard.name in told and "run snakemake again" in told


def test_a_stage_writes_what_evaluation_reads(made):
    """The columns of the evaluation table come out of the manifest's spec."""
    listed = tables.read_json(made / "manifest.json")["saes"]
    frame = pd.DataFrame([entry["spec"] for entry in listed.values()])
    for column in "architecture k d_sae l1_coefficient frozen_decoder seed hook".split():
        assert column in frame


@pytest.mark.parametrize("name", ["checkpoint.json", "a.safetensors", "beside"])
@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "deleted"])
def test_a_checkpoint_that_has_changed_is_not_used(tmp_path, name, damage):
    """Partial work carries digests, as finished work does."""
    from pipeline.store.checkpoints import Checkpoints, write_tensors

    class Thing:
        name = "a"
        state: ClassVar = {"w": torch.arange(6.0)}

        def tensors(self):
            return self.state

        def restore(self, state):
            raise AssertionError("restored out of a damaged checkpoint")

    beside = tmp_path / "weights"
    write_tensors(beside / "step.safetensors", {"w": torch.ones(3)})
    Checkpoints(tmp_path / "p", "key", beside).save(4, [Thing()])
    folder = tmp_path / "p/step-000000004"
    file = beside / "step.safetensors" if name == "beside" else folder / name
    data = file.read_bytes()
    changed = {"bit": data[:-3] + bytes([data[-3] ^ 4]) + data[-2:], "cut": data[:-9], "empty": b""}
    file.unlink()
    if damage != "deleted":
        file.write_bytes(changed[damage])
    assert Checkpoints(tmp_path / "p", "key", beside).load([Thing()]) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_picked_rows_are_those_of_an_index(dtype):
    """Bit for bit, NaN and denormal numbers too; an empty choice has no rows."""
    bits = torch.randint(0, 256, (50, 8 * dtype.itemsize), dtype=torch.uint8)
    rows, at = bits.view(dtype), torch.randperm(50)[:20]
    assert torch.equal(picked(rows, at).view(torch.uint8), bits[at])
    assert picked(rows, at[:0]).shape == (0, 8)
