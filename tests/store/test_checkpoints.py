"""How often a checkpoint is written: a tenth of the time at most, and only where there is room.

What is in one, and that a killed job goes on from it, the stages' tests hold.
"""

import itertools
import shutil
from types import SimpleNamespace

import pytest
import torch

from pipeline.store import checkpoints
from pipeline.store.checkpoints import Checkpoints


class Thing:
    """Something of 4,000 bytes in training."""

    def __init__(self, name: str) -> None:
        self.name, self.state = name, torch.zeros(1000)

    def tensors(self):
        return {"state": self.state.clone()}

    def restore(self, state):
        self.state = state["state"]


THINGS = [Thing("a"), Thing("b")]


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, which only a test and writing move on."""
    clock = SimpleNamespace(now=0.0, writing=0.0)
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: clock.now)
    real = checkpoints.write_tensors

    def slow(path, tensors):
        clock.now += clock.writing / len(THINGS)
        real(path, tensors)

    monkeypatch.setattr(checkpoints, "write_tensors", slow)
    return clock


def steps(folder) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in folder.glob("step-*")]


def written(folder, clock, seconds: int, every: int) -> list[int]:
    """After which seconds a checkpoint was written that was asked for every so many of them."""
    found, kept = [], Checkpoints(folder, "key")
    start = clock.now
    while clock.now - start < seconds:
        clock.now += every
        asked = round(clock.now - start)
        kept.save(asked, THINGS)
        if asked in steps(folder):
            found.append(asked)
    return found


def test_what_is_quick_is_written_whenever_it_is_asked_for(tmp_path, clock):
    clock.writing = 0.5
    assert len(written(tmp_path, clock, 600, 60)) == 10


def test_what_is_slow_takes_a_tenth_of_the_time_at_most(tmp_path, clock, monkeypatch):
    """One of 40 seconds, asked for each minute: the first one too, whose size says how long."""
    monkeypatch.setattr(checkpoints, "RATE", 8000 / 40)
    clock.writing = 40.0
    found = written(tmp_path, clock, 3600, 60)
    assert found[0] >= 400 and all(b - a >= 400 for a, b in itertools.pairwise(found))
    assert 5 <= len(found) <= 9 and steps(tmp_path) == found[-1:]


def test_what_has_no_room_leaves_the_one_before_and_is_said(tmp_path, clock, monkeypatch, caplog):
    kept = Checkpoints(tmp_path / "made" / "later", "key")
    kept.save(1, THINGS)
    monkeypatch.setattr(shutil, "disk_usage", lambda at: SimpleNamespace(free=7999))
    kept.save(2, THINGS)
    assert steps(tmp_path / "made/later") == [1]
    assert "a checkpoint of 0.0 GB does not fit" in caplog.text and "free space" in caplog.text
    monkeypatch.setattr(shutil, "disk_usage", lambda at: SimpleNamespace(free=8000))
    kept.save(3, THINGS)
    assert steps(tmp_path / "made/later") == [3]
    assert kept.load(THINGS) == 3
