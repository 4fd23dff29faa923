"""Which unit of one model does as a unit of another: Pearson correlation over the same tokens.

Bricken et al. 2023, "Universality": a latent of one model is compared with every latent of a model
of another seed, and its best match is the one whose activations correlate most with its own. The
null pairs each row with another row of the batch, so that every unit keeps how often and how
strongly it fires, and all that is left is the best of many chances. [torch]
"""

import numpy as np
import pandas as pd
import torch
from torch import Tensor


class Correlation:
    """Pearson correlation of two groups of units, summed up over batches of rows.

    Sums are of activations less those of the first batch's means, which keeps them small.
    """

    def __init__(self) -> None:
        self.n_rows = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Activations on the same rows, [rows n_x] and [rows n_y]."""
        if not self.n_rows:
            self.shift_x, self.shift_y = x.mean(0), y.mean(0)
            self.sums = [torch.zeros((), dtype=torch.float64, device=x.device)] * 5
            self.fired_x, self.fired_y = (torch.zeros_like(t[0], dtype=torch.int64) for t in (x, y))
        self.n_rows += len(x)
        self.fired_x += (x > 0).sum(0)
        self.fired_y += (y > 0).sum(0)
        x, y = x - self.shift_x, y - self.shift_y
        new = (x.sum(0), y.sum(0), x.square().sum(0), y.square().sum(0), x.T @ y)
        self.sums = [total + part.double() for total, part in zip(self.sums, new, strict=True)]

    def matrix(self) -> Tensor:
        """Correlations [n_x n_y]; 0 where a unit does not vary."""
        x, y, xx, yy, xy = (s / self.n_rows for s in self.sums)
        scale = torch.outer((xx - x**2).clamp_min(0), (yy - y**2).clamp_min(0)).sqrt()
        found = torch.where(scale > 0, (xy - torch.outer(x, y)) / scale, 0)
        return found.clamp(-1, 1)  # of rounding

    def best(self, n_fired: int) -> pd.DataFrame:
        """Best match of every unit of x: unit, match, correlation. Units count that are above zero
        on n_fired rows, in x and in y: two that fire once, on the same row, would correlate
        perfectly."""
        seen = (self.fired_y >= n_fired).nonzero()[:, 0]
        units = (self.fired_x >= n_fired).nonzero()[:, 0]
        if not (len(seen) and len(units)):
            return pd.DataFrame({"unit": [], "match": [], "correlation": []})
        value, at = self.matrix()[units][:, seen].max(1)
        columns = {"unit": units, "match": seen[at], "correlation": value}
        return pd.DataFrame({k: np.asarray(v.cpu()) for k, v in columns.items()})
