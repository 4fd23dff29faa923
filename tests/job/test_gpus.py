"""Several GPUs on one machine: each job takes another, and gives it back however it ends."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from pipeline.job import cli, gpus

HOLD = """
import sys, time
from pathlib import Path
from pipeline.job import gpus
print(gpus.take(["a", "b"], Path(sys.argv[1])), flush=True)
time.sleep(60)
"""


def holder(folder):
    """A process that takes a GPU, and which one it took."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return process, int(process.stdout.readline())


@pytest.fixture(autouse=True)
def nothing_held():
    yield
    while gpus._held:
        gpus._held.pop().close()


def test_each_job_takes_another_and_a_killed_one_gives_its_own_back(tmp_path):
    first, one = holder(tmp_path)
    second, two = holder(tmp_path)
    assert (one, two) == (0, 1)
    assert gpus.take(["a", "b"], tmp_path) in (0, 1)  # shared: none is free
    first.kill()
    first.wait()
    assert gpus.take(["a", "b"], tmp_path) == 0
    second.kill()
    second.wait()


def test_a_job_holds_as_many_more_as_it_asks_for_and_are_free(tmp_path):
    process, one = holder(tmp_path)
    assert one == 0
    assert gpus.take(["a", "b", "c"], tmp_path) == 1
    more = gpus.others(["a", "b", "c", "d"], 1, tmp_path)
    assert next(more) == 2
    assert gpus.take(["a", "b", "c", "d"], tmp_path) == 3  # not held before it is asked for
    assert list(more) == []
    process.kill()
    process.wait()


def test_gpus_are_counted_without_torch(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus.count(tmp_path / "none") == 1
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / name).mkdir()
    assert gpus.count(tmp_path) == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert gpus.count(tmp_path) == 1


@pytest.mark.parametrize(("asked", "index"), [("auto", 1), ("cuda", 1), ("cuda:0", 0)])
def test_a_job_runs_on_the_gpu_it_took_or_on_the_one_that_is_named(
    asked, index, tmp_path, monkeypatch
):
    import torch

    chosen = []
    gpu = lambda i: SimpleNamespace(uuid=f"uuid-{torch.device(i).index or 0}")  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: gpu(torch.device("cuda", i)))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: f"GPU {d.index}")
    monkeypatch.setattr(gpus.tempfile, "gettempdir", lambda: str(tmp_path))
    command = [sys.executable, "-c", HOLD.replace('["a", "b"]', '["uuid-0"]'), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "0\n"  # another job holds the first
        args = cli.parser("metrics", None).parse_args(["--spec", "{}", "--device", asked])
        device = cli.Job("metrics", args).device()
        other.kill()
    assert (device.type, device.index) == ("cuda", index)
    assert chosen == [device]
