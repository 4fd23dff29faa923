"""Arrays read where they lie, and a check that rounding alone does not fail."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.errors import RetraceError
from pipeline.imports import compared, mapped
from pipeline.imports.original import Original, tensors

ARRAYS = {
    "W": np.arange(12, dtype=np.float32).reshape(3, 4),
    "turned": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    "half": np.ones(5, np.float16),
    "k": np.array(3),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_numpys_own(save, tmp_path):
    save(tmp_path / "a.npz", **ARRAYS)
    found = mapped.npz(tmp_path / "a.npz")
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name].numpy(), array)
        assert found[name].numpy().dtype == array.dtype


def test_what_is_written_into_them_does_not_reach_the_file(tmp_path):
    np.savez(tmp_path / "a.npz", **ARRAYS)
    before = (tmp_path / "a.npz").read_bytes()
    mapped.npz(tmp_path / "a.npz")["W"].mul_(2)
    assert (tmp_path / "a.npz").read_bytes() == before


def changed(path: Path, **arrays) -> Path:
    """An archive with one byte of W changed."""
    np.savez(path, **arrays or ARRAYS)
    data = bytearray(path.read_bytes())
    at = data.index(np.float32(7).tobytes())
    data[at] ^= 1
    path.write_bytes(data)
    return path


def test_a_damaged_archive_is_one_sentence(tmp_path):
    with pytest.raises(RetraceError, match=r"a\.npz: cannot be read \(W\.npy is damaged"):
        tensors(changed(tmp_path / "a.npz"))


def test_python_objects_are_not_read(tmp_path):
    np.savez(tmp_path / "a.npz", W=np.array([{"a": 1}], dtype=object))
    with pytest.raises(RetraceError, match="which need pickle"):
        tensors(tmp_path / "a.npz")


def test_an_entry_that_is_no_array_is_one_sentence(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("W.npy", b"x" * 200)
    with pytest.raises(RetraceError, match=r"a\.npz: cannot be read"):
        tensors(tmp_path / "a.npz")


class Encoder:
    """ReLU latents of which one is off, in the dtypes that are named."""

    def __init__(self, *off: torch.dtype) -> None:
        self.off = off
        self.W = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        f = torch.relu(x @ self.W.to(x))
        f[-1, 4] += 1.0 * (x.dtype in self.off)
        return f


@pytest.mark.parametrize("off, same", [((), True), ((torch.float32,), True),
                                       ((torch.float32, torch.float64), False)])  # fmt: skip
def test_rows_that_float32_leaves_unclear_are_compared_in_float64(off, same):
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    original = Original("standard", {"W_enc": Encoder().W}, Encoder().encode)
    wanted = compared.Expected(x, original.encode(x), torch.zeros(0, 9), None)
    asked = []

    def again():
        asked.append(1)
        return original

    if same:
        assert compared.check_same(wanted, Encoder(*off), Path("w"), again) < 1e-5
    else:
        with pytest.raises(RetraceError, match="w: encode differs from the original's by"):
            compared.check_same(wanted, Encoder(*off), Path("w"), again)
    assert len(asked) == bool(off)
