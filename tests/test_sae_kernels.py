"""The GPU's kernels in Triton's interpreter, against plain PyTorch; skipped without Triton."""

import importlib.util
import itertools
import os

import pytest
import torch

if not importlib.util.find_spec("triton"):
    pytest.skip("Triton is not installed", allow_module_level=True)
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from pipeline import sae_kernels

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
    got = sae_kernels.largest(scores, k).sort(1).values
    want = (-scores.float()).argsort(dim=1, stable=True)[:, :k].sort(1).values
    assert torch.equal(got, want)


@pytest.mark.parametrize("d", [24, 300])
def test_bags_are_weighted_sums_of_rows(d):
    values, weights = drawn(7), drawn(4, d)
    matrix = torch.zeros(3, 4, device=DEVICE)
    for bag, (first, last) in enumerate(itertools.pairwise(STARTS)):
        for e in range(first, last):
            matrix[bag, INDEX[e]] += values[e]
    got = sae_kernels.bags(INDEX, STARTS, values, weights)
    torch.testing.assert_close(got, matrix @ weights, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("d", [24, 300])
def test_dots_are_entries_of_a_product(d):
    left, weights = drawn(3, d), drawn(4, d)
    rows = torch.tensor([0, 0, 2, 2, 2, 2, 2], device=DEVICE)
    got = sae_kernels.dots(INDEX, STARTS, left, weights)
    want = (left @ weights.T)[rows, INDEX]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
