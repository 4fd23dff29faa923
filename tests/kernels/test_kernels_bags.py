"""The GPU's kernels in Triton's interpreter, against plain PyTorch; skipped without Triton."""

import importlib.util
import itertools
import os

import pytest
import torch

if not importlib.util.find_spec("triton"):
    pytest.skip("Triton is not installed", allow_module_level=True)
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from pipeline.kernels import bags as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INDEX = torch.tensor([3, 1, 2, 0, 3, 3, 1], device=DEVICE)
STARTS = torch.tensor([0, 2, 2, 7], device=DEVICE)  # the second bag is empty


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("columns, k", [(37, 5), (64, 64), (300, 32), (1500, 7)])
def test_largest_is_a_stable_sort(dtype, columns, k):
    """Also with ties, of which the first count, and in rows of negative numbers or of zeros."""
    scores = ((drawn(6, columns) * 4).round() / 4).to(dtype)
    scores[0], scores[1] = -scores[0].abs() - 1, 0
    got = kernels.largest(scores, k).sort(1).values
    want = (-scores.float()).argsort(dim=1, stable=True)[:, :k].sort(1).values
    assert torch.equal(got, want)


@pytest.mark.parametrize("d", [24, 300])
def test_bags_are_weighted_sums_of_rows(d):
    values, weights = drawn(7), drawn(4, d)
    matrix = torch.zeros(3, 4, device=DEVICE)
    for bag, (first, last) in enumerate(itertools.pairwise(STARTS)):
        for e in range(first, last):
            matrix[bag, INDEX[e]] += values[e]
    got = kernels.bags(INDEX, STARTS, values, weights)
    torch.testing.assert_close(got, matrix @ weights, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(12))
def test_long_bags_are_joined_out_of_their_pieces(seed, monkeypatch):
    """Bags that begin and end at the cuts, one long bag after another, and empty ones between."""
    monkeypatch.setattr(kernels, "LONG", 8)
    random = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([0, 1, 7, 8, 9, 16, 17, 40])
    lengths = lengths[torch.randint(0, len(lengths), (14,), generator=random)]
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    n = int(starts[-1])
    index, values = torch.randint(0, 5, (n,), generator=random), torch.randn(n, generator=random)
    weights, matrix = drawn(5, 24).cpu(), torch.zeros(14, 5)
    bags = torch.repeat_interleave(torch.arange(14), lengths)
    matrix.index_put_((bags, index), values, accumulate=True)
    got = kernels.bags(*(t.to(DEVICE) for t in (index, starts, values, weights)))
    torch.testing.assert_close(got.cpu(), matrix @ weights, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("d", [24, 300])
def test_scaled_is_the_product_rounded_once(d):
    weights, scale = drawn(5, d), drawn(5)
    got, want = kernels.scaled(weights, scale), weights * scale[:, None]
    assert got.dtype == torch.bfloat16
    if DEVICE == "cuda":
        assert torch.equal(got, want.bfloat16())
    else:  # the interpreter cuts off the bits that a GPU rounds
        torch.testing.assert_close(got.float(), want, rtol=2**-7, atol=0)


@pytest.mark.parametrize("d", [24, 300])
def test_dots_are_entries_of_a_product(d):
    left, weights = drawn(3, d), drawn(4, d)
    rows = torch.tensor([0, 0, 2, 2, 2, 2, 2], device=DEVICE)
    got = kernels.dots(INDEX, STARTS, left, weights)
    want = (left @ weights.T)[rows, INDEX]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
