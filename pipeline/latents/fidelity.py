"""Formulas for how well a dictionary reconstructs or matches another, on NumPy arrays.

The tests compare reconstruction.py, which works in passes over shards, with them.
"""

import math
from numbers import Real

import numpy as np


def explained_variance(x: np.ndarray, x_hat: np.ndarray, mean: np.ndarray | None = None) -> float:
    """1 - sum |x - x_hat|^2 / sum |x - mean|^2, in float64.

    Args:
        x: [rows, d] data.
        x_hat: [rows, d] reconstruction.
        mean: [d]; default: the mean of x over rows.
    """
    x, x_hat = np.asarray(x, np.float64), np.asarray(x_hat, np.float64)
    mean = x.mean(0) if mean is None else mean
    return float(1 - ((x - x_hat) ** 2).sum() / ((x - mean) ** 2).sum())


def density_shares(density: np.ndarray) -> dict[str, float]:
    """Share of latents that fire often, and their share of all firing (SAEBench, core).

    Args:
        density: share of rows on which each latent is non-zero, [d_sae].
    """
    out, total = {}, density.sum()
    for percent in (1, 10):
        often = density > percent / 100
        out[f"freq_over_{percent}_percent"] = float(often.mean())
        out[f"normalized_freq_over_{percent}_percent"] = (
            float(density[often].sum() / total) if total else 0.0
        )
    return out


def loss_recovered(loss_model: float, loss_spliced: float, loss_ablated: float) -> float:
    """(L_ablated - L_spliced) / (L_ablated - L_model): 1 is lossless, 0 is as bad as the ablation.

    NaN if the ablation does not raise the loss, which may happen in a model with random weights.
    """
    return share(loss_ablated - loss_spliced, loss_ablated - loss_model)


def share(part: Real, whole: Real) -> Real:
    """part / whole; NaN if the whole is not above zero."""
    return part / whole if whole > 0 else math.nan


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of norm 1, [n d]."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def one_to_one(cosines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows and the columns of the pairs of largest sum, [min(n, m)] each (Hungarian algorithm).

    Args:
        cosines: [n m], of latents of two dictionaries (Paulo & Belrose 2025, 2501.16615), or of
            latents and the true features of synthetic data.
    """
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(cosines, maximize=True)
