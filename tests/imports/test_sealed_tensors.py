"""A safetensors file written with its certificate at once is the one that two passes give."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline.errors import RetraceError
from pipeline.imports import sealed_tensors
from pipeline.store import intact, provenance, tables

MADE = {"stage": "test", "spec": {"é": 1}, "inputs": {}}


@pytest.fixture(params=[16 << 20, 7])
def written(request, tmp_path, monkeypatch):
    """Three tensors, one of them transposed in memory, and their file; also in small pieces."""
    monkeypatch.setattr(sealed_tensors, "PIECE", request.param)
    found = {"W": torch.randn(5, 7).T, "b": torch.randn(3), "a": torch.tensor([1.0, torch.inf])}
    arrays = sealed_tensors.arrays(found)
    path = tmp_path / "w.safetensors"
    sealed_tensors.write(path, arrays, sealed_tensors.content(arrays), MADE)
    return path, found


def test_its_tensors_and_certificate_are_read_back(written):
    path, found = written
    again = load_file(path)
    assert again.keys() == found.keys() and all(torch.equal(again[n], found[n]) for n in found)
    made = provenance.read(path)
    assert made["spec"] == MADE["spec"] and made["content"] == provenance.content_digest(path)
    with safe_open(path, "pt") as f:
        assert f.metadata()["format"] == "pt"
    assert not intact.broken(path, made)


def test_its_certificate_is_what_two_passes_write(written, tmp_path):
    path, found = written
    other = tmp_path / "other.safetensors"
    save_file({n: found[n].contiguous() for n in sorted(found)}, other, {"format": "pt"})
    tables.stamp_safetensors(other, MADE)
    ours, theirs = (provenance.read(p) for p in (path, other))
    assert {k: v for k, v in ours.items() if k not in ("seal", "content")} == {
        k: v for k, v in theirs.items() if k not in ("seal", "content")
    }
    assert json.dumps(ours["seal"]) != json.dumps(intact.BLANK)


@pytest.mark.parametrize("at", [20, -1])
def test_a_changed_byte_is_found(written, at):
    path, _ = written
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    try:
        assert intact.broken(path)
    except RetraceError as e:  # the header itself can no longer be read
        assert "damaged" in str(e)
