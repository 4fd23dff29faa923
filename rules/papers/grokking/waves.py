"""Waves over the numbers mod p: the Fourier basis, norms of components, and what depends on a + b.

The basis is orthonormal: row 0 is constant, rows 2k − 1 and 2k are cos and sin of w_k n with
w_k = 2πk / p, for k = 1 … K, K = (p − 1) / 2. "Frequency k" at index k − 1 of a result.

A function of (a, b) that depends on a + b alone is spanned by cos(w_k (a + b)) and
sin(w_k (a + b)): the projection on these is the mean over all pairs of one sum, followed by a
Fourier transform over the sum. It keeps what the released code keeps (get_component_cos_xpy and
get_component_sin_xpy) without a transform over p² inputs.
"""

from typing import Any

import torch
from torch import Tensor


def basis(p: int, device: Any = "cpu") -> Tensor:
    """[p, p], orthonormal rows; p is odd."""
    n = torch.arange(p, dtype=torch.float64, device=device)
    turn = 2 * torch.pi * n[1 : (p + 1) // 2, None] * n / p
    waves = torch.stack([turn.cos(), turn.sin()], 1).reshape(p - 1, p)
    rows = torch.cat([torch.ones_like(n)[None], waves])
    return rows / rows.norm(dim=1, keepdim=True)


def component_norms(matrix: Tensor) -> Tensor:
    """Norm of each Fourier component of the columns of matrix [p, d]: [p]."""
    return (basis(len(matrix), matrix.device) @ matrix).norm(dim=1)


def frequency_norms(matrix: Tensor) -> Tensor:
    """Norm of cos and sin together, of each frequency: [K]."""
    return component_norms(matrix)[1:].reshape(-1, 2).norm(dim=1)


def gini(x: Tensor) -> float:
    """Gini coefficient of numbers ≥ 0 (Hurley & Rickard 2009): 0 all equal, 1 − 1/n one alone.

    Σ_i (2i − n − 1) x_i / (n Σ x), x ascending, i from 1.
    """
    n = len(x)
    rank = torch.arange(1, n + 1, dtype=x.dtype, device=x.device)
    return float(((2 * rank - n - 1) * x.sort().values).sum() / (n * x.sum()))


def sums(p: int, device: Any = "cpu") -> Tensor:
    """(a + b) mod p of each input, row a·p + b: int64 [p²]."""
    n = torch.arange(p, device=device)
    return ((n[:, None] + n) % p).reshape(-1)


def by_sum(values: Tensor, p: int) -> Tensor:
    """Mean of values [p², d] over the inputs of each sum: [p, d]."""
    out = values.new_zeros(p, values.shape[1])
    return out.index_add_(0, sums(p, values.device), values) / p


def waves_of_sum(values: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """The parts of values [p², d] along 1, and along cos and sin of w_k (a + b), by sum.

    Returns:
        constant [p, d] (its rows are equal) and waves [K, p, d]; add row (a + b) mod p.
    """
    B = basis(p, values.device)
    mean = by_sum(values, p)
    part = B[:, :, None] * (B @ mean)[:, None]  # [component, sum, d]
    return part[0], part[1:].unflatten(0, (-1, 2)).sum(1)


def both(matrix: Tensor, grid: Tensor) -> Tensor:
    """A matrix [m, p] applied to the first and to the second index of grid [p, p, n]: [m, m, n].

    One after the other: a single einsum would build the matrix of m² × p² first.
    """
    first = torch.einsum("fa,abn->fbn", matrix, grid)
    return torch.einsum("gb,fbn->fgn", matrix, first)


def plane_powers(values: Tensor, p: int) -> tuple[Tensor, Tensor, Tensor]:
    """How much of each column of values [p², n] each frequency explains.

    A frequency has eight components over (a, b): cos and sin of w_k a, of w_k b, and their four
    products (Section 4.3: a polynomial of degree two of one frequency).

    Returns:
        transform [p, p, n] of the centred columns; power [K, n] in the eight components of each
        frequency; total power [n].
    """
    B = basis(p, values.device)
    grid = (values - values.mean(0)).reshape(p, p, -1)
    transform = both(B, grid)
    power = transform**2
    linear = (power[1:, 0] + power[0, 1:]).unflatten(0, (-1, 2)).sum(1)
    products = power[1:, 1:].unflatten(1, (-1, 2)).unflatten(0, (-1, 2)).sum((1, 3))
    return transform, linear + products.diagonal(dim1=0, dim2=1).T, power.sum((0, 1))


def plane_parts(values: Tensor, p: int, frequencies: Tensor) -> Tensor:
    """Values [p², n] with only the mean and the eight components of some frequencies kept, of each
    column those that bool [K, n] names."""
    B = basis(p, values.device)
    transform = plane_powers(values, p)[0]
    keep = torch.zeros(p, p, values.shape[1], dtype=torch.bool, device=values.device)
    for i in range(2):
        rows = slice(1 + i, None, 2)
        keep[rows, 0] = keep[0, rows] = frequencies
        for j in range(2):
            block = keep[rows, 1 + j :: 2]
            block.diagonal(dim1=0, dim2=1).copy_(frequencies.T)
    grid = both(B.T, transform * keep)
    return grid.reshape(p * p, -1) + values.mean(0)
