"""Choices of the largest scores in Triton's interpreter; skipped without Triton."""

import importlib.util
import os

import pytest
import torch

if not importlib.util.find_spec("triton"):
    pytest.skip("Triton is not installed", allow_module_level=True)
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from pipeline.kernels import auxk, batch, choice

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def scores(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Quarters, with many ties; the first row is negative."""
    out = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    out = ((out * 4).round() / 4).to(DEVICE)
    out[0] = -out[0].abs() - 1
    return out.to(dtype)


def norms(columns: int) -> torch.Tensor:
    return torch.linspace(0.5, 2, columns, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("columns, k", [(192, 7), (272, 3), (64, 1)])
def test_the_largest_of_a_row(dtype, columns, k, monkeypatch):
    monkeypatch.setattr(choice, "WIDTH", 16)
    x, norm = scores(5, columns, dtype), norms(columns)
    latents, acts = choice.largest(x, norm, k, choice.groups_of(columns, k))
    got, want = x.gather(1, latents.long()), x.float().topk(k, 1).values
    assert torch.equal(got.float().sort(1, descending=True).values, want)
    assert all(len(row.unique()) == k for row in latents)
    torch.testing.assert_close(acts, got.float().relu() / norm[latents.long()])


def test_a_row_is_cut_where_its_shape_allows_it():
    assert choice.groups_of(24_576, 32) == 12 and choice.groups_of(65_536, 64) == 16
    assert choice.groups_of(4_608, 32) == 9
    assert choice.groups_of(24_577, 32) is None and choice.groups_of(64, 64) is None
    assert batch.groups_of(24_576) == 12 and batch.groups_of(24_577) is None


@pytest.mark.parametrize("shift, n", [(0, 20), (0, 60), (-1.5, 30), (-50, 10), (50, 100)])
def test_the_largest_of_a_batch(shift, n, monkeypatch):
    """Of those above zero, row by row."""
    monkeypatch.setattr(batch, "PART", 8)
    x, norm = scores(5, 96) + shift, norms(96)
    latents, rows, values, acts = batch.largest(x, norm, n, 16)
    flat = x.float().flatten()
    want = flat.topk(n).values
    m = int((want > 0).sum())
    got = rows[:m].long() * 96 + latents[:m]
    assert len(got.unique()) == m and torch.equal(rows[:m], rows[:m].sort().values)
    assert torch.equal(values[:m], flat[got])
    assert torch.equal(values[:m].sort(descending=True).values, want[:m])
    torch.testing.assert_close(acts[:m], flat[got] / norm[got % 96])
    assert not values[m:].any() and not acts[m:].any() and latents.max() < 96 and rows.max() < 5


@pytest.mark.parametrize("n_dead, k", [(0, 3), (2, 3), (11, 3), (12, 12)])
def test_auxk_keeps_the_largest_of_the_dead(n_dead, k):
    x, norm, latents = scores(4, 40), norms(40), torch.arange(3, 39, 3, device=DEVICE)
    got = auxk.kept(x, latents, torch.tensor(n_dead, device=DEVICE), norm, k).float()
    assert got.shape == (4, len(latents)) and not got[:, n_dead:].any()
    among = x.float()[:, latents[:n_dead]]
    for row, kept in zip(among, got[:, :n_dead], strict=True):
        chosen = (-row).argsort(stable=True)[:k]
        want = torch.zeros_like(row)
        want[chosen] = (row / norm[latents[:n_dead]])[chosen]
        torch.testing.assert_close(kept, want, rtol=2**-7, atol=0)
    values = torch.ones_like(got)
    assert torch.equal(auxk.masked_(values, got), (got != 0).float())
