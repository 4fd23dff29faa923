"""Activations equal TransformerBridge's, whatever is killed, and faults are told."""

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
import warm
from conftest import HOOK, environment, rewrite, stage

from pipeline.activations import activations, buffers, checks, files, forward, rows, writers
from pipeline.activations import plan as planning
from pipeline.errors import RetraceError
from pipeline.models import loader
from pipeline.sharing import verify
from pipeline.spec.paper import ActivationsSpec
from pipeline.store import provenance, tables
from pipeline.store.shards import Blocks, Rows

LAYER = ("hook_resid_pre", "attn.hook_q", "attn.hook_z", "hook_attn_out", "hook_resid_mid",
         "ln2.hook_normalized", "mlp.hook_post", "hook_mlp_out", "hook_resid_post")  # fmt: skip
ALL = ["hook_embed", *(f"blocks.{i}.{h}" for i in range(2) for h in LAYER), "ln_final.hook_scale"]


def run(out: Path, model_json, corpus, check=True, **spec):
    """Stage activations into the folder `out`."""
    spec = {"hooks": [HOOK], "dtype": "float32", "batch_size": 8, "shard_rows": 600} | spec
    return stage(
        "activations", {"activations": spec}, check=check, model=model_json, corpus=corpus,
        out=out / "manifest.json", shards=out / "shards", device="cpu", threads=1,
    )  # fmt: skip


def inline(out: Path, model_json, corpus, capsys, monkeypatch, **spec) -> tuple[int, str]:
    """The same in this process, which has imported torch: exit code and what it said."""
    spec = {"hooks": [HOOK], "dtype": "float32", "batch_size": 8, "shard_rows": 600} | spec
    argv = ["--spec", json.dumps({"activations": spec}), "--model", model_json, "--corpus", corpus,
            "--out", out / "manifest.json", "--shards", out / "shards", "--device", "cpu",
            "--threads", "1"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["activations", *map(str, argv)])
    capsys.readouterr()
    try:
        activations.main()
    except SystemExit as e:
        return e.code, capsys.readouterr().err
    return 0, capsys.readouterr().err


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- values --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compatible(tiny_model_json, tmp_path_factory) -> Path:
    """model.json of the tiny model with processing: compatibility."""
    folder = tmp_path_factory.mktemp("compatible")
    rewrite(tiny_model_json, folder / "model.json", processing="compatibility")
    (folder / "checkpoint").symlink_to(tiny_model_json.parent / "checkpoint")
    return folder / "model.json"


@pytest.mark.parametrize("processing", ["raw", "compatibility"])
def test_every_hook_equals_run_with_cache(
    processing, tiny_model_json, compatible, tiny_corpus, tmp_path, capsys, monkeypatch
):
    model_json = compatible if processing == "compatibility" else tiny_model_json
    code, said = inline(tmp_path, model_json, tiny_corpus, capsys, monkeypatch, hooks=ALL)
    assert code == 0, said
    blocks = Blocks(tiny_corpus)
    first, last = blocks.range("eval")
    tokens = torch.from_numpy(blocks.read(first, last)[0].astype(np.int64))
    with torch.no_grad():
        _, cache = loader.bridge(model_json).run_with_cache(tokens)
    for hook in ALL:
        raw, _ = Rows(tmp_path / "manifest.json", hook, "eval").read(0, len(tokens) * 15)
        theirs = cache[hook][:, 1:].reshape(len(raw), -1).numpy()
        # The bridge's eager attention adds in another order than torch's fused one: float32
        # rounding, about 1e-7 of the stream's size a layer.
        np.testing.assert_allclose(raw, theirs, atol=2e-5, rtol=2e-5, err_msg=hook)


INNER = [f"blocks.1.attn.hook_{h}" for h in ("attn_scores", "pattern", "result")]


@pytest.mark.parametrize("processing", ["raw", "compatibility"])
def test_scores_patterns_and_results_are_tables_as_all_others(
    processing, tiny_model_json, compatible, tiny_corpus, tmp_path, capsys, monkeypatch
):
    """A row for each query: its scores, or pattern, of all heads and keys; or what heads write."""
    model_json = compatible if processing == "compatibility" else tiny_model_json
    code, said = inline(tmp_path, model_json, tiny_corpus, capsys, monkeypatch, hooks=INNER)
    if processing == "compatibility":
        assert code == 1 and "what a head writes is not formed" in said
        inline(tmp_path, model_json, tiny_corpus, capsys, monkeypatch, hooks=INNER[:2])
    else:
        assert code == 0, said
    names = list(tables.read_json(tmp_path / "manifest.json")["hooks"])
    assert names == INNER[: len(names)] and len(names) >= 2
    blocks = Blocks(tiny_corpus)
    first, last = blocks.range("eval")
    tokens = torch.from_numpy(blocks.read(first, last)[0].astype(np.int64))
    bridge = loader.bridge(model_json)
    if processing == "raw":
        bridge.set_use_attn_result(True)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens)
    hidden = (cache[INNER[1]] == 0).transpose(1, 2)
    for hook in names:
        raw, _ = Rows(tmp_path / "manifest.json", hook, "eval").read(0, len(tokens) * 15)
        theirs = cache[hook] if hook.endswith("result") else cache[hook].transpose(1, 2)
        if hook.endswith("scores"):
            theirs = theirs.masked_fill(hidden, 0)  # -inf there, which no shard holds
        theirs = theirs[:, 1:].reshape(len(raw), -1).numpy()
        np.testing.assert_allclose(raw, theirs, atol=1e-5, rtol=1e-5, err_msg=hook)
    manifest = tables.read_json(tmp_path / "manifest.json")["hooks"]
    n_heads = loader.load(tiny_model_json).hf.config.num_attention_heads
    widths = {"attn_scores": 16, "pattern": 16, "result": 32}
    for hook in names:
        assert manifest[hook]["d_model"] == n_heads * widths[hook.rsplit("hook_", 1)[1]]


def test_columns_say_where_a_row_comes_from(tiny_activations, tiny_corpus):
    corpus = pd.read_parquet(tiny_corpus)
    for split in ("train", "eval"):
        rows = Rows(tiny_activations, HOOK, split)
        here = corpus[corpus["split"] == split]
        _, columns = rows.read(0, rows.n_rows)
        assert rows.n_rows == len(here) * 15
        assert columns["block"].tolist() == np.repeat(here["block"], 15).tolist()
        assert columns["position"].tolist() == list(range(1, 16)) * len(here)
        assert columns["token"].tolist() == np.stack(here["tokens"])[:, 1:].ravel().tolist()
        assert columns["document"].tolist() == np.stack(here["documents"])[:, 1:].ravel().tolist()


def test_the_manifest_describes_the_training_rows(tiny_activations):
    manifest = tables.read_json(tiny_activations)
    for hook, about in manifest["hooks"].items():
        rows = Rows(tiny_activations, hook)
        x = rows.read(0, rows.n_rows)[0].astype(np.float64)
        assert about["rows"] == {"train": 3000, "eval": 600}
        # float64 sums in another order
        assert about["mean_norm"] == pytest.approx(np.linalg.norm(x, axis=1).mean(), rel=1e-12)
        assert about["variance"] == pytest.approx(x.var(0).mean(), rel=1e-10)
        assert [s["rows"] for s in about["shards"]] == [600, 600, 600, 600, 600, 600]
        assert {s["split"] for s in about["shards"][:5]} == {"train"}
        assert about["shards"][5]["split"] == "eval"
    assert verify.faults(tiny_activations) == []


def test_combined_is_the_variance_of_all_rows():
    x = torch.randn(90, 7, dtype=torch.float64) * torch.arange(1, 8) + 3
    parts = []
    for some in (x[:50], x[50:51], x[51:]):
        sums = buffers.Sums()
        for batch in some.split(20):
            sums.add(batch)
        parts.append(sums.statistics(len(some)))
    found = buffers.combined(parts)
    assert found["variance"] == pytest.approx(x.var(0, correction=0).mean().item(), rel=1e-12)
    assert found["mean_norm"] == pytest.approx(x.norm(dim=1).mean().item(), rel=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_smaller_dtype_rounds_the_same_numbers(
    dtype, tiny_model_json, tiny_corpus, tiny_activations, tmp_path, capsys, monkeypatch
):
    inline(tmp_path, tiny_model_json, tiny_corpus, capsys, monkeypatch, dtype=dtype)
    full, rounded = (
        Rows(path, HOOK, "eval").read(0, 600)[0]
        for path in (tiny_activations, tmp_path / "manifest.json")
    )
    expected = torch.from_numpy(full.copy()).to(getattr(torch, dtype))
    assert torch.equal(rows.to_tensor(rounded, dtype), expected)


# --- the plan ------------------------------------------------------------------------------


class FakeBlocks(Blocks):
    """100 training and 30 held-out blocks of 16 tokens."""

    def __init__(self):
        self.n_ctx = 16

    def range(self, split):
        return (0, 100) if split == "train" else (100, 130)


def planned(**spec):
    given = ActivationsSpec(**({"hooks": [HOOK], "batch_size": 8, "shard_rows": 240} | spec))
    return planning.plan(given, FakeBlocks(), {HOOK: 32})


def test_rows_of_large_norm_are_dropped_and_the_rest_is_untouched(
    tiny_activations, tiny_model_json, tiny_corpus, tmp_path, capsys, monkeypatch
):
    whole = Rows(tiny_activations, HOOK, "train")
    acts, cols = whole.read(0, whole.n_rows)
    norms = np.linalg.norm(acts, axis=1)
    info = tables.read_json(tiny_activations)
    first = (info["n_ctx"] - info["skip_first"]) * 8  # rows of a batch of eight blocks
    median = float(torch.from_numpy(norms[:first].copy()).median())
    ratio = float(np.quantile(norms, 0.9)) / median
    code, said = inline(
        tmp_path, tiny_model_json, tiny_corpus, capsys, monkeypatch,
        max_norm_ratio=ratio, max_dropped=0.5,
    )  # fmt: skip
    assert code == 0, said
    fewer = Rows(tmp_path / "manifest.json", HOOK, "train")
    got, got_cols = fewer.read(0, fewer.n_rows)
    about = json.loads((tmp_path / "manifest.json").read_text())["hooks"][HOOK]
    assert about["max_norm"] == pytest.approx(ratio * median, rel=1e-5)
    keep = norms <= about["max_norm"]
    assert 0 < (~keep).sum() < len(keep)
    np.testing.assert_array_equal(got, acts[keep])
    for name, column in cols.items():
        np.testing.assert_array_equal(got_cols[name], column[keep])
    assert about["dropped"] >= (~keep).sum() and about["mean_norm"] < whole.mean_norm
    kept = sum(about["rows"].values())
    assert about["dropped_share"] == about["dropped"] / (kept + about["dropped"])


@pytest.mark.parametrize("quantile, fails", [(0.9, True), (0.999, False)])
def test_a_bound_that_cuts_more_than_sinks_is_an_error(
    quantile, fails, tiny_activations, tiny_model_json, tiny_corpus, tmp_path, capsys, monkeypatch
):
    """A tenth of the rows is ordinary text; a thousandth may be sinks."""
    acts, _ = Rows(tiny_activations, HOOK, "train").read(0, 10**9)
    norms = np.linalg.norm(acts, axis=1)
    ratio = float(np.quantile(norms, quantile) / np.median(norms))
    code, said = inline(
        tmp_path, tiny_model_json, tiny_corpus, capsys, monkeypatch, max_norm_ratio=ratio
    )
    assert code == int(fails), said
    assert ("more than attention sinks are; raise it" in said) == fails
    assert (tmp_path / "manifest.json").exists() != fails


def test_a_bound_that_cuts_most_rows_is_an_error(
    tiny_model_json, tiny_corpus, tmp_path, capsys, monkeypatch
):
    code, said = inline(
        tmp_path, tiny_model_json, tiny_corpus, capsys, monkeypatch, max_norm_ratio=1e-3
    )
    assert code == 1 and "activations.max_norm_ratio: 0.001 drops" in said
    assert not (tmp_path / "manifest.json").exists()


def test_shards_cover_every_block_once_and_never_mix_splits():
    for size in (1, 100, 240, 1600, 10**6):
        plan = planned(shard_rows=size)
        spans = [(s.start, s.stop) for s in plan.shards]
        assert spans[0][0] == 0
        assert spans[-1][1] == 130
        assert all(a[1] == b[0] for a, b in pairwise(spans))
        assert all((s.split == "train") == (s.stop <= 100) for s in plan.shards)
        assert all(plan.rows(s) <= max(size, 15) for s in plan.shards)


def test_batches_stay_inside_a_shard():
    plan = planned(shard_rows=300)  # 20 blocks fit: two whole batches are taken
    assert [(s.start, s.stop) for s in plan.shards[:2]] == [(0, 16), (16, 32)]
    assert list(plan.batches(plan.shards[-1])) == [(116, 124), (124, 130)]


class Aside:
    """A stream or event of a GPU, on a machine without one; notes what was waited for."""

    waited = 0

    def wait_stream(self, other):
        pass

    def record(self, stream):
        pass

    def synchronize(self):
        Aside.waited += 1


def given_as_a_gpu_is(monkeypatch):
    """Buffers, threads and the order of work as on a GPU; its memory is the host's."""
    aside = lambda *_, **__: Aside()  # noqa: E731
    fakes = {"Stream": aside, "Event": aside, "current_stream": aside}
    for name, fake in (fakes | {"stream": lambda _: nullcontext()}).items():
        monkeypatch.setattr(torch.cuda, name, fake)

    def like(rows, widths, dtype, device):
        two = (buffers.ShardRows.empty(rows, widths, dtype) for _ in range(2))
        return buffers.Buffers(*two)

    monkeypatch.setattr(buffers.Buffers, "like", like)
    monkeypatch.setattr(writers, "WRITERS", {"cpu": 4})
    monkeypatch.setattr(forward, "AHEAD", {"cpu": 1})


@pytest.mark.parametrize("bound", [0, 1.2])
def test_the_order_of_work_on_a_gpu_leaves_the_bytes_as_they_are(
    bound, tiny_model_json, tiny_corpus, tmp_path, capsys, monkeypatch
):
    """Several shards on their way and several written at a time."""
    small = {"hooks": [HOOK, "blocks.1.hook_mlp_out"], "shard_rows": 150, "max_norm_ratio": bound}
    small["max_dropped"] = 0.5
    for name in ("plain", "gpu"):
        if name == "gpu":
            given_as_a_gpu_is(monkeypatch)
        args = (tmp_path / name, tiny_model_json, tiny_corpus, capsys, monkeypatch)
        code, said = inline(*args, **small)
        assert code == 0, said
    shards = [contents(tmp_path / name / "shards") for name in ("plain", "gpu")]
    assert shards[0] == shards[1] and len(shards[0]) == 2 * 30
    assert Aside.waited >= 30


def test_rows_left_out_add_nothing_to_a_gpus_sums():
    x = torch.randn(3, 5, 7)
    keep = torch.rand(3, 5) < 0.5
    there = buffers.ShardRows.empty(15, {HOOK: 7}, torch.float32)
    there.sums = {HOOK: buffers.Sums()}
    there.add(HOOK, slice(0, 15), x, keep)
    masked = buffers.Sums()
    masked.add(x.masked_fill(~keep[..., None], 0).view(15, 7))
    for name, value in vars(there.sums[HOOK]).items():
        torch.testing.assert_close(value, vars(masked)[name], rtol=1e-12, atol=1e-12)


def test_many_hooks_make_shards_smaller(monkeypatch):
    monkeypatch.setattr(planning, "BUFFER_BYTES", 32 * 2 * 15 * 8)  # eight blocks of one hook
    assert planned(shard_rows=10**6).shards[0].stop == 8


def test_skipping_a_whole_block():
    with pytest.raises(RetraceError, match="skip_first: 16 leaves nothing of blocks of 16"):
        planned(skip_first=16)


# --- killed, full, stale -------------------------------------------------------------------


@pytest.mark.workflow
def test_a_killed_job_resumes_and_ends_with_the_same_bytes(tiny_model_json, tiny_corpus, tmp_path):
    many = {"hooks": [HOOK, "blocks.1.hook_resid_post"], "shard_rows": 30, "batch_size": 1}
    out = {name: tmp_path / name / "item" for name in ("whole", "killed")}
    run(out["whole"], tiny_model_json, tiny_corpus, **many)
    spec = {"activations": {"dtype": "float32", **many}}
    command = [warm.python(), "-m", "pipeline", "activations", "--spec", json.dumps(spec),
               "--model", tiny_model_json, "--corpus", tiny_corpus, "--device", "cpu",
               "--threads", "1", "--out", out["killed"] / "manifest.json",
               "--shards", out["killed"] / "shards"]  # fmt: skip
    partial = out["killed"] / "shards.partial"
    job = subprocess.Popen(
        [str(c) for c in command], env=environment(),
        stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 600
    while len(list(partial.rglob("part-*.parquet"))) < 20 and time.monotonic() < deadline:
        assert job.poll() is None
        time.sleep(0.002)
    job.send_signal(signal.SIGKILL)
    job.communicate()  # to the end of what wrote to its stderr
    left = {p: p.stat().st_mtime_ns for p in partial.rglob("part-*.parquet")}
    assert 20 <= len(left) < 240
    assert not (out["killed"] / "shards").exists()
    assert not (out["killed"] / "manifest.json").exists()
    done = run(out["killed"], tiny_model_json, tiny_corpus, **many)
    kept = int(re.search(r"going on after (\d+) of 120 shards", done.stderr)[1])
    assert len(left) // 2 - 1 <= kept <= len(left) // 2
    assert contents(out["killed"]) == contents(out["whole"])


@pytest.mark.workflow
def test_a_partial_folder_of_another_spec_is_not_used(
    tiny_model_json, tiny_corpus, tiny_activations, tmp_path
):
    shutil.copytree(tiny_activations.parent / "shards", tmp_path / "shards.partial")
    (tmp_path / "shards.partial" / "key.json").write_text('{"spec":"another"}')
    shard = next((tmp_path / "shards.partial").rglob("*00001.parquet"))
    shard.write_bytes(b"of another run")
    done = run(tmp_path, tiny_model_json, tiny_corpus, hooks=[HOOK, "blocks.1.hook_resid_post"])
    assert "going on" not in done.stderr
    assert contents(tmp_path) == contents(tiny_activations.parent)


def test_the_key_names_all_that_bytes_depend_on(tmp_path):
    plan = planned()
    key = {"spec": 1, "code": 2, "versions": 3, "device": 4, "inputs": 5}
    for field in key:
        files.resume(tmp_path / "p", plan, key)
        (tmp_path / "p" / HOOK).mkdir()
        name = files.path_of(HOOK, plan.shards[0])
        (tmp_path / "p" / name).write_bytes(b"x")
        assert files.resume(tmp_path / "p", plan, key) == 0  # written by nobody
        noted = {"files": {name: provenance.sha256_file(tmp_path / "p" / name)}}
        tables.write_json(files.note_of(tmp_path / "p", plan.shards[0]), noted, {})
        assert files.resume(tmp_path / "p", plan, key) == 1
        (tmp_path / "p" / name).write_bytes(b"y")
        assert files.resume(tmp_path / "p", plan, key) == 0
        assert files.resume(tmp_path / "p", plan, key | {field: 9}) == 0
        assert not (tmp_path / "p" / HOOK).exists()
        shutil.rmtree(tmp_path / "p")


@pytest.mark.workflow
def test_a_full_disk_leaves_nothing_that_reads_as_complete(
    tiny_model_json, tiny_corpus, tiny_activations, tmp_path
):
    """A file-size limit stands for a full disk: writing fails in the middle of a shard."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))  # noqa: E731
    spec = {
        "activations": {"hooks": [HOOK], "dtype": "float32", "batch_size": 8, "shard_rows": 600}
    }
    code = (
        "import signal, runpy, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "runpy.run_module('pipeline', run_name='__main__')"
    )
    command = [sys.executable, "-c", code, "activations", "--spec", json.dumps(spec)]
    command += ["--device", "cpu"]
    command += ["--model", tiny_model_json, "--corpus", tiny_corpus, "--threads", "1"]
    command += ["--out", tmp_path / "manifest.json", "--shards", tmp_path / "shards"]
    done = subprocess.run(
        [str(c) for c in command], env=environment(), text=True,
        stderr=subprocess.PIPE, preexec_fn=limit,
    )  # fmt: skip
    assert done.returncode == 1
    assert re.search(
        r"part-00000\.parquet: could not be written .*File too large.*free space", done.stderr
    )
    assert not (tmp_path / "shards").exists()
    assert not (tmp_path / "manifest.json").exists()
    assert not list(tmp_path.rglob("part-*.parquet"))
    run(tmp_path, tiny_model_json, tiny_corpus)
    assert Rows(tmp_path / "manifest.json", HOOK).n_rows == 3000


@pytest.mark.workflow
def test_memory_does_not_grow_with_the_tokens(tiny_model_json, tmp_path, monkeypatch):
    """Ten times the tokens, 150 MB more on disk: the peak stays."""
    monkeypatch.setenv("RETRACE_PYTHON", sys.executable)  # a peak of its own, imports and all
    peaks = []
    for n_blocks in (300, 3_000):
        table = pa.table(
            {
                "block": pa.array(range(n_blocks), pa.int32()),
                "split": ["train"] * n_blocks,
                "tokens": pa.array([[0, *range(4, 35)]] * n_blocks, pa.list_(pa.int32())),
                "documents": pa.array([[-1] + [0] * 31] * n_blocks, pa.list_(pa.int32())),
            }
        )
        made = {"stage": "corpus", "inputs": {}, "n_ctx": 32, "bos_id": 0, "prepend_bos": True}
        corpus = tmp_path / f"{n_blocks}.parquet"
        tables.write_table(corpus, table, made, row_group_size=1024)
        out = tmp_path / str(n_blocks)
        wide = [h for h in ALL if h != "hook_embed"]
        done = run(out, tiny_model_json, corpus, hooks=wide, batch_size=64, shard_rows=2048)
        peaks.append(float(re.search(r"peak ([\d.]+) GiB", done.stderr)[1]))
        size = sum(p.stat().st_size for p in (out / "shards").rglob("*.parquet"))
    assert size > 100e6
    assert peaks[1] - peaks[0] < 0.04  # GiB; the log rounds to 0.01, allocators keep some pages


# --- faults --------------------------------------------------------------------------------


def altered(tiny_model_json: Path, folder: Path, change) -> Path:
    """model.json of the tiny model after `change(state dict)`."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_model_json.parent, folder, dirs_exist_ok=True)
    weights = folder / "checkpoint" / "model.safetensors"
    state = load_file(weights)
    change(state)
    save_file(state, weights, metadata={"format": "pt"})
    listed = tables.read_json(tiny_model_json)["files"]
    listed = listed | {"checkpoint/model.safetensors": provenance.sha256_file(weights)}
    return rewrite(folder / "model.json", files=listed)


EMBED = "model.embed_tokens.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "spec", "says"),
    [
        (lambda s: s[DOWN].fill_(float("nan")), {"hooks": [HOOK, "blocks.1.hook_mlp_out"]},
         r"hook 'blocks.1.hook_mlp_out' \(layer 1\), block 0: the model gives NaN or infinity"),
        (lambda s: s[EMBED].mul_(1e6), {"dtype": "float16"},
         r"layer 0\), block 0: .* is more than float16 can hold \(65504\); set activations.dtype "
         r"to bfloat16 or float32"),
        (lambda s: s[EMBED].zero_(), {}, "activations are constant"),
        (lambda s: s[EMBED].copy_(torch.ones(32) + 1e-9 * s[EMBED]), {"hooks": ["hook_embed"]},
         "hook 'hook_embed': the activations are constant"),
    ],
)  # fmt: skip
def test_activations_that_no_one_can_use(
    change, spec, says, tiny_model_json, tiny_corpus, tmp_path, capsys, monkeypatch
):
    broken = altered(tiny_model_json, tmp_path / "model", change)
    code, said = inline(tmp_path / "out", broken, tiny_corpus, capsys, monkeypatch, **spec)
    assert code == 1
    (line,) = [x for x in said.splitlines() if x.startswith("error")]
    assert re.search(says, line), line
    assert not (tmp_path / "out" / "shards").exists()
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_the_first_bad_block_is_named(tiny_model_json, tiny_corpus):
    """One token's embedding is NaN: the block named is the first that holds it."""
    loaded, blocks = loader.load(tiny_model_json), Blocks(tiny_corpus)
    tokens = blocks.read(0, len(blocks))[0]
    target = int(tokens[30:, 1:].max())
    first = int(np.flatnonzero((tokens == target).any(1))[0])
    loaded.hf.model.embed_tokens.weight.data[target] = float("nan")
    spec = ActivationsSpec(hooks=[HOOK], dtype="bfloat16", batch_size=8, shard_rows=10**6)
    plan = planning.plan(spec, blocks, {HOOK: 32})
    full = buffers.Buffers.like(
        plan.rows(plan.shards[0]), plan.widths, torch.bfloat16, torch.device("cpu")
    )
    forward.compute(loaded.hf, plan, plan.shards[0], blocks, full)
    with pytest.raises(RetraceError, match=rf"block {first}: the model gives NaN"):
        checks.check_finite(loaded.hf, plan, plan.shards[0], blocks, full)


def test_a_hook_that_the_model_has_not(tiny_model_json, tiny_corpus, tmp_path, capsys, monkeypatch):
    wrong = {"hooks": ["blocks.7.hook_mlp_out"]}
    _, said = inline(tmp_path, tiny_model_json, tiny_corpus, capsys, monkeypatch, **wrong)
    assert said.splitlines()[-1] == (
        "error in stage activations: hook 'blocks.7.hook_mlp_out': the model has 2 layers; use "
        "blocks.0 to blocks.1"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("info", "says"),
    [({"n_ctx": 8, "bos_id": 0}, "context is 8"), ({"n_ctx": 64, "bos_id": 5}, "tokenizer")],
)
def test_a_corpus_that_does_not_fit_the_model(info, says, tiny_corpus):
    with pytest.raises(RetraceError, match=says):
        checks.check_fits(info, Blocks(tiny_corpus), "tokens.parquet")
