"""Directions paired one to one, so that the sum of their cosines is largest (Hungarian algorithm).

Latents of two dictionaries (Paulo & Belrose 2025, 2501.16615), or latents and the true features of
synthetic data. On NumPy arrays; no torch.
"""

import numpy as np


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of norm 1, [n d]."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def one_to_one(cosines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows and the columns of the best pairs of a matrix [n m], [min(n, m)] each."""
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(cosines, maximize=True)
