"""Dictionaries trained on rows that are made a window ahead of them and removed behind them."""

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import warm
from conftest import HOOK, ROOT, environment, stage

from pipeline.activations import ahead, plan
from pipeline.errors import RetraceError
from pipeline.job import kills
from pipeline.sae.stream import Stream, WindowStream
from pipeline.sae.train import Dictionary, build, train
from pipeline.spec.base import in_bytes
from pipeline.spec.paper import ActivationsSpec
from pipeline.spec.sae import SaeSpec, SaeTraining
from pipeline.store import provenance, tables
from pipeline.store.shards import Blocks, Rows
from pipeline.store.window import Window

WINDOW = 240_000  # bytes: 6 shards; the store would have 20
SPEC = {"hooks": [HOOK], "dtype": "float32", "batch_size": 5, "shard_rows": 150, "window": WINDOW}
TRAINING = {"n_rows": 9000, "batch_size": 64, "buffer_rows": 400, "warmup_steps": 5}


def training(**more) -> dict:
    """--spec of stage sae, two small dictionaries."""
    specs = {n: {"architecture": n, "d_sae": 64, "k": 4} for n in ("topk", "batchtopk")}
    section = {"hook": HOOK, "training": TRAINING | more, "dictionaries": specs}
    return {"sae": section, "activations": SPEC}


@pytest.fixture(scope="module")
def held(tiny_model_json, tiny_corpus, tmp_path_factory) -> Path:
    """manifest.json of the held-out rows."""
    out = tmp_path_factory.mktemp("window")
    stage(
        "activations", {"activations": SPEC}, model=tiny_model_json, corpus=tiny_corpus,
        out=out / "manifest.json", shards=out / "shards", device="cpu",
    )  # fmt: skip
    return out / "manifest.json"


def command(spec: dict, out: Path, held: Path, model: Path, corpus: Path) -> list[str]:
    paths = {"activations": held, "model": model, "corpus": corpus, "out": out / "manifest.json",
             "saes": out / "saes", "history": out / "history.parquet"}  # fmt: skip
    options = [w for name, path in paths.items() for w in (f"--{name}", str(path))]
    return [sys.executable, "-m", "pipeline", "sae", "--spec", json.dumps(spec), *options,
            "--device", "cpu", "--threads", "1"]  # fmt: skip


def peak(folder: Path, done: threading.Event, found: list[list[int]]) -> None:
    """Note the bytes of each shard in a folder, those being written too, until `done`."""
    while not done.wait(0.01):
        sizes = []
        for file in folder.glob(f"*/saes.partial/window/shards/{HOOK}/*part-*"):
            with contextlib.suppress(OSError):
                sizes.append(file.stat().st_size)
        found.append(sizes)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        f.relative_to(folder).as_posix(): f.read_bytes()
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }


def test_the_held_out_rows_are_stored_alone(held):
    about = tables.read_json(held)
    assert about["window"] == WINDOW
    assert about["hooks"][HOOK]["rows"] == {"train": 0, "eval": 600}
    assert about["hooks"][HOOK]["mean_norm"] > 0


@pytest.mark.workflow
def test_a_killed_job_ends_with_the_bytes_of_another(
    held, tiny_model_json, tiny_corpus, tiny_activations, tmp_path
):
    """`kill -9` at a shard in the middle; the disk never holds more than the window."""
    where, found, done = (held, tiny_model_json, tiny_corpus), [], threading.Event()
    spec = training(checkpoint_seconds=0.3)
    thread = threading.Thread(target=peak, args=(tmp_path, done, found))
    thread.start()
    for name in ("whole", "killed", "killed"):
        (tmp_path / name).mkdir(exist_ok=True)
        process = subprocess.Popen(
            command(spec, tmp_path / name, *where), env=environment(), cwd=ROOT,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        notes = tmp_path / name / "saes.partial/window/made.jsonl"
        first = name == "killed" and not notes.exists()
        until = time.monotonic() + 300
        at = np.random.default_rng().integers(15, 45)
        while first and time.monotonic() < until and process.poll() is None:
            n = len(notes.read_text().splitlines()) if notes.exists() else 0
            if n >= at and list(notes.parent.parent.glob("step-*")):
                process.kill()
                break
            time.sleep(0.002)
        said = process.communicate()[1]
        assert process.returncode == (-signal.SIGKILL if first else 0), said
    done.set()
    thread.join()
    whole, killed = (contents(tmp_path / n) for n in ("whole", "killed"))
    assert "resumed at step" in said
    assert whole.keys() == killed.keys() and [n for n in whole if whole[n] != killed[n]] == []
    assert not list(tmp_path.rglob("part-*"))
    assert 3 <= max(map(len, found)) <= 6 and max(map(sum, found)) <= WINDOW
    shards = tables.read_json(tmp_path / "whole/manifest.json")["window"]["shards"]
    assert len(shards) == 20 and sum(s["rows"] for s in shards.values()) == 3000
    assert list(pd.read_parquet(tmp_path / "whole/history.parquet")["rows"])[-1] == 8960


@contextlib.contextmanager
def opened(folder: Path, model: Path, corpus: Path, seed: int, **over) -> Iterator[Window]:
    """A window and its maker."""
    argv = ["--spec", json.dumps({"activations": SPEC | over}), "--model", str(model), "--corpus",
            str(corpus), "--out", "none", "--shards", "none", "--ahead", str(folder), "--device",
            "cpu", "--threads", "1"]  # fmt: skip

    def start(log):
        line = [warm.python(), "-m", "pipeline", "activations", *argv]
        env = environment() | {kills.PARENT: ""}
        return subprocess.Popen(line, stdout=log, stderr=log, cwd=ROOT, env=env)

    window = Window(folder, start, seed)
    try:
        yield window
    finally:
        window.stop()


def test_the_rows_are_those_of_the_whole_store(
    tiny_model_json, tiny_corpus, tiny_activations, tmp_path
):
    """An epoch through the window gives the rows of the whole store, and the digests listed."""
    how = {"norms": [1.0], "buffer_rows": 400, "seed": 3, "normalize": False}
    with opened(tmp_path / "w", tiny_model_json, tiny_corpus, seed=3) as window:
        stream = WindowStream(window, [HOOK], total=3000, batch_size=50, **how)
        assert stream.n_rows == 3000 and window.sizes.capacity * window.sizes.shard_bytes <= WINDOW
        files, rows = {}, []
        for x in stream.batches(0, 60):
            rows.append(x.numpy())
            for file in window.folder.rglob("*.parquet"):
                with contextlib.suppress(OSError):
                    files[file.name] = provenance.sha256_file(file)
        with pytest.raises(RetraceError, match=r"less than a batch of 100,000; raise it"):
            WindowStream(window, [HOOK], total=3000, batch_size=100_000, **how)
    whole, ours = Rows(tiny_activations, HOOK).read(0, 3000)[0], np.concatenate(rows)
    assert not np.allclose(ours, whole)
    assert np.allclose(ours.sum(0), whole.sum(0), rtol=1e-3, atol=1e-2)
    assert np.allclose(np.sort(ours, 0), np.sort(whole, 0), atol=1e-5)  # column by column
    said = {Path(e["file"]).name: e["sha256"] for m in window.made for e in m.hooks.values()}
    assert files and all(said[name] == sha for name, sha in files.items())


def fitted(stream: Stream, manifest: Path, seed: int) -> float:
    """Explained variance of held-out rows by a small dictionary that a stream trained."""
    training = SaeTraining.model_validate(TRAINING | {"lr": 3e-3})
    n_steps = training.n_rows // training.batch_size
    spec = SaeSpec(architecture="topk", d_sae=64, k=4, seed=seed)
    one = Dictionary("one", build(spec, 32), training, n_steps)
    one.sae.b_dec.data.copy_(stream.median(2000))
    train([one], stream, n_steps)
    x = torch.tensor(Rows(manifest, HOOK, "eval").read(0, 600)[0]) * stream.scale
    with torch.no_grad():
        lost = (one.sae.decode(one.sae.encode(x)) - x).square().sum()
    return float(1 - lost / (x - x.mean(0)).square().sum())


@pytest.mark.workflow
def test_a_window_on_changing_text_explains_little_less_than_the_whole_store(
    tiny_model_json, tiny_corpus, tiny_activations, tmp_path
):
    """The window holds a third of 67 shards of a text that changes from start to end.

    Its rows are mixed less than those of the whole store: 0.751 is explained in place of 0.761,
    which is beyond the spread over seeds (0.0001). The bound below guards that gap, twice as large.
    """
    small = {"shard_rows": 45, "window": 530_000}
    how, found = {"batch_size": 64, "buffer_rows": 400, "normalize": True}, []
    for seed in (0, 1):
        made = (tmp_path / str(seed), tiny_model_json, tiny_corpus, seed)
        with opened(*made, **small) as window:
            assert 20 <= window.sizes.capacity <= 24 and len(window.sizes.rows) == 67
            norm = tables.read_json(tiny_activations)["hooks"][HOOK]["mean_norm"]
            stream = WindowStream(window, [HOOK], norms=[norm], total=9000, seed=seed, **how)
            ours = fitted(stream, tiny_activations, seed)
        whole = Stream(Rows(tiny_activations, HOOK), seed=seed, **how)
        found.append([ours, fitted(whole, tiny_activations, seed)])
    ours, whole = np.array(found).T
    assert whole.min() > 0.3 and abs(ours.mean() - whole.mean()) < 0.02, found


@pytest.mark.parametrize(("n_bytes", "said"), [
    (60_000, r"60,000 bytes hold 1 of the shards of 150 rows"),
    (10**17, r"the window takes [\d,]+ bytes and the disk has"),
])  # fmt: skip
def test_a_window_that_does_not_fit(n_bytes, said, tiny_corpus, tmp_path):
    spec = ActivationsSpec.model_validate(SPEC | {"shard_rows": 150})
    planned = plan.plan(spec, Blocks(tiny_corpus), {HOOK: 32})
    with pytest.raises(RetraceError, match=said):
        found = ahead.sizes(planned, n_bytes)
        ahead.check_room(tmp_path, found._replace(shard_bytes=n_bytes // 10))


def test_sizes_of_a_window():
    assert [in_bytes(s) for s in ("50GB", "4GiB", "1.5 MB", 7)] == [5e10, 2**32, 1.5e6, 7]
    for wrong in ("50", "GB", "-1GB", "50 gigabytes", True, 0, "0.0001kB"):
        with pytest.raises(ValueError, match="is no size; write 50GB"):
            in_bytes(wrong)
