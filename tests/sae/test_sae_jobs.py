"""A job of many dictionaries: the order of rows, one stream for all, transcoders, resume."""

import json
import math
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from conftest import ROOT, environment, stage
from pydantic import ValidationError
from safetensors.torch import load_file
from synthetic import call
from test_sae import contents, one_thread, planted, stream_of, zip_first  # noqa: F401

from pipeline.errors import RetraceError
from pipeline.job import cli
from pipeline.sae import sae as stage_sae
from pipeline.sae import steps, transcoder
from pipeline.sae import stream as sae_stream
from pipeline.sae import train as sae_train
from pipeline.sae.stream import CHUNKS, Stream, geometric_median
from pipeline.sae.train import Dictionary, build, shared_out, train
from pipeline.spec.sae import SaeSpec, SaeTraining
from pipeline.store import provenance, tables
from pipeline.store.shards import PairedRows, Rows

HOOK, OUT = "blocks.0.hook_resid_mid", "blocks.0.hook_mlp_out"
SPARSITY = {
    "standard": {"l1_coefficient": 1.0},
    "gated": {"l1_coefficient": 2.0},
    "topk": {"k": 3},
    "batchtopk": {"k": 3},
    "matryoshka_batchtopk": {"k": 3, "matryoshka_shares": [0.5, 1.0]},
    "jumprelu": {"l0_coefficient": 0.3},
    "matching_pursuit": {"k": 3},
}


# --- data ----------------------------------------------------------------------------------


def pairs(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows x [n 24] with planted directions, and y [n 10], a ReLU of linear maps of x."""
    x = planted(n, seed=seed)[0] - 3
    maps = np.random.default_rng(1).normal(size=(24, 10))
    return x, (np.maximum(x @ maps, 0) + 5).astype(np.float32)


def store(folder: Path, hooks: dict[str, tuple], shard_rows: int = 700, block: int = 20) -> Path:
    """An activations item: hook -> (training rows, held-out rows); its manifest."""
    about, files = {}, {}
    for hook, parts in hooks.items():
        entries, first = [], 0
        for split, x in zip(("train", "eval"), parts, strict=True):
            for at in range(0, len(x), shard_rows):
                raw = x[at : at + shard_rows]
                name = f"shards/{hook}/part-{len(entries):05d}.parquet"
                index = np.arange(first + at, first + at + len(raw), dtype=np.int32)
                columns = dict.fromkeys(("document", "block"), index // block)
                columns |= {"position": index % block, "token": index * 0}
                tables.write_shard(folder / name, raw, columns, "float32", {"hook": hook})
                norm = float(np.linalg.norm(raw, axis=1).mean())
                entries += [{"file": name, "split": split, "rows": len(raw), "mean_norm": norm}]
                files[name] = provenance.sha256_file(folder / name)
            first += len(x)
        about[hook] = {
            "d_model": parts[0].shape[1],
            "dtype": "float32",
            "rows": {"train": len(parts[0]), "eval": len(parts[1])},
            "mean_norm": float(np.linalg.norm(parts[0], axis=1).mean()),
            "max_norm": 0,
            "shards": entries,
        }
    manifest = {
        "hooks": about,
        "skip_first": 1,
        "prepend_bos": True,
        "n_ctx": block,
        "model": "results/store/model/tiny-0123456789ab/model.json",
        "corpus": "results/store/corpus/made_up-0123456789ab/tokens.parquet",
        "files": files,
    }
    tables.write_json(folder / "manifest.json", manifest, {})
    return folder / "manifest.json"


@pytest.fixture(scope="module")
def activations(tmp_path_factory) -> Path:
    """manifest.json of 3,000 rows at two hooks."""
    x, y = pairs(3200)
    folder = tmp_path_factory.mktemp("activations")
    return store(folder, {HOOK: (x[:3000], x[3000:]), OUT: (y[:3000], y[3000:])})


def job(specs: dict[str, SaeSpec], output_hook: str | None = None, **training) -> dict:
    """--spec of the stage."""
    given = {"n_rows": 6400, "batch_size": 128, "lr": 3e-3, "dead_rows": 2000} | training
    return {
        "sae": {
            "hook": HOOK,
            **({"output_hook": output_hook} if output_hook else {}),
            "training": given,
            "dictionaries": {n: s.model_dump(exclude={"grid", "arms"}) for n, s in specs.items()},
        }
    }


def paths(out: Path, activations: Path) -> dict:
    return {
        "activations": activations,
        "out": out / "manifest.json",
        "saes": out / "saes",
        "history": out / "history.parquet",
        "device": "cpu",
        "threads": 1,
    }


def specs(*names: str, output_hook: str = "") -> dict[str, SaeSpec]:
    """Small dictionaries by architecture; default: one of each."""
    return {
        n: SaeSpec(architecture=n, d_sae=64, hook=HOOK, output_hook=output_hook, **SPARSITY[n])
        for n in names or SPARSITY
    }


# --- the order of rows ---------------------------------------------------------------------


def test_rows_of_a_document_are_spread_over_their_buffer():
    """In a batch they meet as often as in a random order of the buffer, which holds whole chunks.

    A chunk of c rows puts c (c - 1) / 2 of the buffer's n (n - 1) / 2 pairs into one document, so
    of a batch's b (b - 1) / 2 pairs this share is expected; in the order of the store, every row
    would stand beside its whole document.
    """
    c, n, b, n_rows = 10, 10 * CHUNKS, 32, 64_000
    numbered = np.arange(n_rows, dtype=np.float32)[:, None] * np.ones((1, 2), np.float32)
    stream, _ = stream_of(numbered, b, n)
    documents = [(x[:, 0] // c).long() for x in stream.batches(0, n_rows // b)]
    met = np.mean([sum(k * (k - 1) // 2 for k in d.unique(return_counts=True)[1].tolist())
                   for d in documents])  # fmt: skip
    expected = CHUNKS * (c * (c - 1) / 2) * (b * (b - 1)) / (n * (n - 1))
    assert met == pytest.approx(expected, rel=0.05)
    assert expected < (b // c) * c * (c - 1) / 2 / 15


def test_a_document_longer_than_a_chunk_goes_to_several_buffers():
    """Neighbouring chunks are drawn apart, so even the buffer holds a fair sample of the store."""
    n_rows, n = 64_000, 640
    numbered = np.arange(n_rows, dtype=np.float32)[:, None] * np.ones((1, 2), np.float32)
    stream, reads = stream_of(numbered, 64, n)
    list(stream.batches(0, n // 64))
    starts = np.array([start for start, _ in reads])
    assert len(starts) == CHUNKS and np.ptp(starts) > 0.9 * n_rows
    quarters = np.histogram(starts, 4, (0, n_rows))[0]
    assert quarters.min() >= 6  # of 16 expected, a binomial's sd is 3.5


def test_the_store_is_read_in_chunks_that_ascend_through_a_buffer():
    numbered = np.arange(6400, dtype=np.float32)[:, None] * np.ones((1, 2), np.float32)
    stream, reads = stream_of(numbered, 64, 640)
    list(stream.batches(0, 100))
    buffers = [reads[at : at + CHUNKS] for at in range(0, len(reads), CHUNKS)]
    assert len(buffers) == 10
    assert all(buffer == sorted(buffer) for buffer in buffers)
    assert sorted(reads) == [(at, at + 10) for at in range(0, 6400, 10)]  # every row once


@pytest.mark.parametrize("seed", [0, 1])
def test_the_order_is_a_function_of_the_seed_and_not_of_the_rows(seed):
    """Other values, another random state and another batch size: the same order."""
    numbered = np.arange(1000, dtype=np.float32)[:, None] * np.ones((1, 2), np.float32)
    torch.manual_seed(7)
    np.random.seed(7)
    first = torch.cat(list(stream_of(numbered, 50, 200, seed=seed)[0].batches(0, 40)))
    torch.manual_seed(8)
    other = torch.cat(list(stream_of(-numbered, 125, 200, seed=seed)[0].batches(0, 16)))
    assert torch.equal(first, -other)


# --- one stream for all --------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch) -> list:
    """Every (split, start, stop) that is read of a store, and every estimate of a scale."""
    seen, read, norm = [], Rows.read_into, sae_stream.mean_norm

    def counted(self, start, stop, out):
        seen.append((self.split, start, min(stop, self.n_rows)))
        return read(self, start, stop, out)

    monkeypatch.setattr(Rows, "read_into", counted)
    monkeypatch.setattr(sae_stream, "mean_norm", lambda rows: seen.append("norm") or norm(rows))
    return seen


def test_many_dictionaries_read_the_shards_as_often_as_one(activations, tmp_path, reads):
    """Two epochs of 3,000 rows, the first buffer once more for the start of b_dec."""
    few = job(specs("topk"), n_rows=6000, batch_size=100, buffer_rows=1000)
    many = job(specs(), n_rows=6000, batch_size=100, buffer_rows=1000)
    call("sae", few, **paths(tmp_path / "few", activations))
    alone = list(reads)
    reads.clear()
    call("sae", many, **paths(tmp_path / "many", activations))
    assert reads == alone
    assert reads.count("norm") == 1
    rows = [stop - start for _, start, stop in (r for r in reads if r != "norm")]
    assert sum(rows) - 2 * 3000 == 64 * (1000 // CHUNKS)


def test_no_dictionary_trains_on_held_out_rows(activations, tmp_path, reads):
    """Nothing is read of them; held-out rows that are not numbers change no byte of the weights."""
    x, _ = pairs(3200)
    spoilt = store(tmp_path / "spoilt", {HOOK: (x[:3000], np.full((200, 24), np.nan, np.float32))})
    few = job(specs("topk", "standard"))
    for name, manifest in (("spoilt", spoilt), ("whole", activations)):
        call("sae", few, **paths(tmp_path / name / "out", manifest))
    assert {r[0] for r in reads if r != "norm"} == {"train"}
    for name in ("topk", "standard"):
        weights = f"out/saes/{name}/sae_weights.safetensors"
        digests = {provenance.content_digest(tmp_path / d / weights) for d in ("spoilt", "whole")}
        assert len(digests) == 1


@pytest.mark.workflow
def test_a_killed_job_of_many_architectures_ends_with_the_bytes_of_another(activations, tmp_path):
    """`kill -9` at the first checkpoint, against a run in one go."""
    spec = job(specs(), n_rows=25_600, checkpoint_seconds=0.2)
    whole, killed = (started(spec, tmp_path / n, activations) for n in ("whole", "killed"))
    until = time.monotonic() + 120
    while not list((tmp_path / "killed/saes.partial").glob("step-*")) and time.monotonic() < until:
        assert killed.poll() is None, killed.stderr.read()
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed/saes").exists()
    told = stage("sae", spec, **paths(tmp_path / "killed", activations)).stderr
    assert "resumed at step" in told
    whole.communicate()
    assert whole.returncode == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def started(spec: dict, out: Path, activations: Path) -> subprocess.Popen:
    """The stage, in a process that runs."""
    command = [warm.python(), "-m", "pipeline", "sae", "--spec", json.dumps(spec)]
    for option, value in paths(out, activations).items():
        command += [f"--{option}", str(value)]
    return subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE)


# --- transcoders ---------------------------------------------------------------------------

TRANSCODERS = SaeSpec.TRANSCODERS


def pair_stream(activations: Path, batch_size: int = 128) -> Stream:
    return Stream(
        Rows(activations, HOOK), batch_size=batch_size, buffer_rows=65_536, seed=0,
        normalize=True, target=Rows(activations, OUT),
    )  # fmt: skip


def test_a_pair_is_two_rows_of_one_token_each_with_its_own_scale(activations):
    x, y = pairs(3200)
    stream = pair_stream(activations, 3000)
    wide = next(stream.batches(0, 1))
    assert wide.shape == (3000, 34)
    given, target = wide[:, :24], wide[:, 24:]
    assert given.norm(dim=1).mean().item() == pytest.approx(math.sqrt(24), rel=1e-5)
    assert target.norm(dim=1).mean().item() == pytest.approx(math.sqrt(10), rel=1e-5)
    order = next(stream_of(np.arange(3000.0)[:, None].repeat(2, 1), 3000)[0].batches(0, 1))
    at = order[:, 0].long()
    torch.testing.assert_close(given, torch.from_numpy(x)[at] * stream.scale)
    torch.testing.assert_close(target, torch.from_numpy(y)[at] * stream.target_scale)


@pytest.mark.parametrize("change", ["fewer", "others"])
def test_rows_of_other_tokens_are_no_pairs(tmp_path, change):
    x, y = pairs(200)
    manifest = store(tmp_path, {HOOK: (x, x), OUT: (y[: 200 - 20 * (change == "fewer")], y)})
    rows, target = Rows(manifest, HOOK), Rows(manifest, OUT)
    if change == "others":
        read = target.read_into

        def shifted(start, stop, out):
            at = read(start, stop, out)
            return at | {"position": at["position"][::-1]}

        target.read_into = shifted
    with pytest.raises(RetraceError, match="do not hold the same tokens"):
        PairedRows(rows, target).read(0, 200)


@pytest.mark.parametrize("name", TRANSCODERS)
def test_a_transcoder_of_equal_hooks_has_the_loss_and_gradients_of_saelens_autoencoder(name):
    """With y = x and no b_dec at the input the two are the same function of the same weights."""
    spec = specs(name)[name]
    plain = build(spec, 24).to(torch.float64)
    plain.cfg.apply_b_dec_to_input = False
    wide = build(specs(name, output_hook=OUT)[name], 24, d_out=24).to(torch.float64)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(0.1 * torch.randn_like(p))
    wide.load_state_dict(plain.state_dict())
    x, dead = torch.randn(50, 24, dtype=torch.float64), torch.arange(64) < 30
    coefficients = dict.fromkeys(plain.get_coefficients(), 0.7)
    outcomes, grads = [], []
    for sae, rows in ((plain, x), (wide, torch.cat([x, x], 1))):
        outcomes.append(
            steps.reference(sae, rows, dead=dead, coefficients=coefficients, step=0, scratch=None)
        )
        grads.append({n: p.grad for n, p in sae.named_parameters()})
    torch.testing.assert_close(outcomes[0].loss, outcomes[1].loss)
    torch.testing.assert_close(outcomes[0].mse, outcomes[1].mse)
    assert outcomes[0].loss > outcomes[0].mse
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad)


@pytest.fixture(scope="module")
def transcoders(activations, tmp_path_factory) -> Path:
    """The store's item of a job of transcoders."""
    out = tmp_path_factory.mktemp("transcoders")
    more = specs(*TRANSCODERS, output_hook=OUT)
    spec = job(more, OUT, n_rows=76_800)
    call("sae", spec, **paths(out, activations))
    return out


@pytest.mark.workflow
@pytest.mark.parametrize("name", TRANSCODERS)
def test_a_saved_transcoder_is_saelens_and_reconstructs_what_ours_does(
    activations, transcoders, name
):
    """The trained object on scaled rows against the folder on rows as they are stored."""
    from sae_lens import SAE
    from sae_lens.saes.transcoder import JumpReLUTranscoder, Transcoder

    loaded = SAE.load_from_disk(str(transcoders / "saes" / name))
    kind = Transcoder if name == "standard" else JumpReLUTranscoder
    assert type(loaded) is kind
    assert (loaded.cfg.d_in, loaded.cfg.d_out) == (24, 10)
    assert (loaded.cfg.metadata.hook_name, loaded.cfg.metadata.hook_name_out) == (HOOK, OUT)
    stream = pair_stream(activations)
    training = SaeTraining(n_rows=76_800, batch_size=128, lr=3e-3, dead_rows=2000)
    sae = build(specs(name, output_hook=OUT)[name], 24, d_out=10, normalize=training.normalize)
    sae.b_dec.data.copy_(geometric_median(stream.sample(32_768)[:, -10:]))
    train([Dictionary(name, sae, training, 600, steps.reference)], stream, 600)
    x, y = (torch.from_numpy(a[3000:]) for a in pairs(3200))
    with torch.no_grad():
        got = loaded(x)
        if name in ("standard", "jumprelu"):  # the others have no batch to take a top k of
            want = sae.decode(sae.encode(x * stream.scale)) / stream.target_scale
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
        explained = 1 - (got - y).pow(2).sum() / (y - y.mean(0)).pow(2).sum()
        null = 1 - (x[:, :10] - y).pow(2).sum() / (y - y.mean(0)).pow(2).sum()
    assert explained > 0.5 > null
    frame = tables.read_table(transcoders / "history.parquet").set_index("sae").loc[name]
    assert explained.item() == pytest.approx(frame["explained_variance"].iloc[-1], abs=0.2)


@pytest.mark.parametrize("name", TRANSCODERS)
def test_a_transcoder_folds_its_two_scales(name, tmp_path):
    """Saved for scales (a, b) it answers x as the one saved for (1, 1) answers a x, over b."""
    from sae_lens import SAE

    spec, x = specs(name, output_hook=OUT)[name], torch.randn(50, 24)
    saved = {}
    for scales in ((1.0, 1.0), (3.0, 0.25)):
        sae = build(spec, 24, d_out=10)
        sae.b_dec.data += torch.arange(10.0)
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold += 0.05
        dictionary = Dictionary(name, sae, SaeTraining(n_rows=4096), 1, steps.reference)
        folder = tmp_path / str(scales[0])
        folder.mkdir()
        stage_sae.save(dictionary, folder, scales[0], {"stage": "t"}, target_scale=scales[1])
        saved[scales] = SAE.load_from_disk(str(folder))
    with torch.no_grad():
        want = saved[1.0, 1.0](3 * x) / 0.25
        torch.testing.assert_close(saved[3.0, 0.25](x), want, rtol=1e-4, atol=1e-4)
        assert 0 < saved[3.0, 0.25].encode(x).bool().float().mean() < 1


@pytest.mark.workflow
@pytest.mark.parametrize("name", TRANSCODERS)
def test_each_transcoder_resumes_exactly(activations, name):
    stream, training = pair_stream(activations), SaeTraining(n_rows=2560, batch_size=128)

    def started():
        sae = build(specs(name, output_hook=OUT)[name], 24, d_out=10)
        return Dictionary(name, sae, training, 20, steps.reference)

    whole, half, again = started(), started(), started()
    train([whole], stream, 20)
    train([half], stream, 10)
    again.restore({n: t.clone() for n, t in half.tensors().items()})
    train([again], stream, 20, first=10)
    for key, value in whole.tensors().items():
        assert torch.equal(value, again.tensors()[key]), key


def test_a_transcoder_starts_from_unit_directions_and_the_median_of_its_target(activations):
    stream = pair_stream(activations)
    spec = job(specs("batchtopk", output_hook=OUT), OUT)["sae"]
    given = stage_sae.SaeJob.model_validate(spec)
    sae = stage_sae.prepare(given, stream, tables.read_json(activations))[0].sae
    assert sae.W_enc.shape == (24, 64) and sae.W_dec.shape == (64, 10)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.full((64,), 0.1))
    want = geometric_median(stream.sample(32_768)[:, 24:])
    torch.testing.assert_close(sae.b_dec.data, want)
    assert transcoder.training_class(type(sae).__mro__[1], 10) is type(sae)


@pytest.mark.parametrize("name", [n for n in SPARSITY if n not in TRANSCODERS])
def test_a_transcoder_that_saelens_cannot_load_is_refused(name):
    with pytest.raises(ValidationError, match=f"SAELens has no {name} transcoder to save"):
        specs(name, output_hook=OUT)


def test_a_transcoders_latents_are_not_resampled():
    given = SPARSITY["standard"] | {"resample_steps": [5]}
    with pytest.raises(ValidationError, match="resample_steps: not for transcoders"):
        SaeSpec(architecture="standard", d_sae=64, output_hook=OUT, **given)


def test_buffers_of_pairs_stay_small(activations):
    stream = Stream(
        Rows(activations, HOOK), batch_size=10, buffer_rows=640, seed=0, normalize=False,
        target=Rows(activations, OUT),
    )  # fmt: skip
    assert max(len(b) for b, _ in zip_first(stream._buffers(0, 10**6), 10)) <= 640


def test_memory_of_the_stream_does_not_grow_with_the_store(tmp_path, monkeypatch):
    """Over an epoch of a store and of one four times as long: two buffers, and what Python holds.

    The latter grows by the order of the chunks, two numbers a chunk of 20 rows (by default a
    thousand).
    """
    import gc
    import tracemalloc
    import weakref

    peaks = []
    for n_rows in (4000, 16_000):
        x = np.random.default_rng(0).normal(size=(n_rows, 64)).astype(np.float32)
        manifest = store(tmp_path / str(n_rows), {HOOK: (x, x[:10])})
        stream = Stream(
            Rows(manifest, HOOK), batch_size=100, buffer_rows=1280, seed=0, normalize=True
        )
        buffers, load, most = [], stream._load, 0

        def watched(*plan, load=load, buffers=buffers):
            assert sum(ref() is not None for ref in buffers) <= 1  # the one that is used
            rows, order = load(*plan)
            buffers.append(weakref.ref(rows))
            return rows, order

        monkeypatch.setattr(stream, "_load", watched)
        seldom = gc.get_threshold()
        gc.collect()
        gc.set_threshold(100, 1, 1)  # checks of shapes leave cycles: no memory of ours
        tracemalloc.start()
        for _ in stream.batches(0, n_rows // 100):
            most = max(most, sum(ref().shape[0] for ref in buffers if ref() is not None))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        gc.set_threshold(*seldom)
        assert 1280 <= most <= 2 * 1280 and len(buffers) == math.ceil(n_rows / 1280)
    assert peaks[1] - peaks[0] < 0.02 * 12_000 * 64 * 4


# --- several devices -----------------------------------------------------------------------


def test_the_widest_dictionaries_are_shared_out_first():
    wide = {f"d{n}": specs("topk")["topk"].model_copy(update={"d_sae": n}) for n in (10, 40, 30)}
    a, b = (torch.device("cuda", n) for n in range(2))
    assert shared_out(wide, [a, b]) == {"d40": a, "d30": b, "d10": b}
    assert set(shared_out(wide, [a]).values()) == {a}


class Groups(list):
    """Groups of dictionaries, as a dict's items."""

    def items(self):
        return self


def one_each(dictionaries: list[Dictionary]) -> Groups:
    return Groups((d.sae.W_dec.device, [d]) for d in dictionaries)


def test_dictionaries_of_several_devices_see_the_batches_of_one(activations, tmp_path, monkeypatch):
    """Each on a device of its own as `train` has it: the same bytes, and no row read twice."""
    call("sae", job(specs()), **paths(tmp_path / "one", activations))
    asked = []
    monkeypatch.setattr(cli.Job, "devices", lambda self, n: asked.append(n) or [self.device()])
    monkeypatch.setattr(sae_train, "by_device", one_each)
    call("sae", job(specs()), **paths(tmp_path / "apart", activations), gpus=3)
    assert asked == [3]
    for name in SPARSITY:
        a, b = (tmp_path / f / "saes" / name / "sae_weights.safetensors" for f in ("one", "apart"))
        for key, value in load_file(a).items():
            assert torch.equal(value, load_file(b)[key]), (name, key)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_what_one_does(activations, tmp_path):
    for n in (1, 2):
        given = paths(tmp_path / str(n), activations) | {"device": "cuda"}
        call("sae", job(specs()), **given, gpus=n)
    for name in SPARSITY:
        a, b = (load_file(tmp_path / n / "saes" / name / "sae_weights.safetensors") for n in "12")
        for key, value in a.items():
            torch.testing.assert_close(value, b[key], rtol=1e-3, atol=1e-4)
