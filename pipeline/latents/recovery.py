"""How well a dictionary recovers the features that its data are made of. [torch]

1. `cosine`          |cos| of every decoder row with every true direction.
2. `uniqueness`      share of different features among the best of each latent.
3. `Confusion`       a latent as a classifier of its best feature: it says yes where it fires.
4. `Reconstruction`  explained variance, shrinkage and L0.

These are the measures of SynthSAEBench (Chanin & Garriga-Alonso 2026, Sec. 3); MCC is the mean
cosine over the pairs of pipeline/latents/fidelity.py.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

BLOCK = 1024  # features per product of the cosines


def cosine(decoder: Tensor, directions: Tensor) -> Tensor:
    """|cos| of latents and true features: [d_sae n_features], on the device of both."""
    unit = [t.detach().float() / t.detach().float().norm(dim=1, keepdim=True).clamp_min(1e-8)
            for t in (decoder, directions)]  # fmt: skip
    blocks = [unit[0] @ block.T for block in unit[1].split(BLOCK)]
    return torch.cat(blocks, dim=1).abs_()


def uniqueness(best: np.ndarray) -> float:
    """The share of different features among the best of each latent, [d_sae]."""
    return len(np.unique(best)) / len(best)


@dataclass
class Confusion:
    """Counts per latent over samples; `best` is the feature that each latent is to detect."""

    best: Tensor  # int64 [d_sae]
    both: Tensor = field(init=False)  # latent and feature active
    fired: Tensor = field(init=False)
    true: Tensor = field(init=False)  # feature active

    def __post_init__(self) -> None:
        self.both, self.fired, self.true = (torch.zeros_like(self.best) for _ in range(3))

    def add(self, on: Tensor, truth: Tensor) -> None:
        """Take in a batch: bool [batch d_sae] and [batch n_features]."""
        wanted = truth[:, self.best]
        self.both += (on & wanted).sum(0)
        self.fired += on.sum(0)
        self.true += wanted.sum(0)

    def rates(self) -> dict[str, np.ndarray]:
        """precision, recall and f1 of every latent: [d_sae] each; 0 where undefined."""
        both, fired, true = (t.double().cpu().numpy() for t in (self.both, self.fired, self.true))
        return {
            "precision": both / np.maximum(fired, 1),
            "recall": both / np.maximum(true, 1),
            "f1": 2 * both / np.maximum(fired + true, 1),
        }


@dataclass
class Reconstruction:
    """Running sums over samples, float64; the variance is that around the mean of all samples."""

    n: int = 0
    error: float = 0.0
    square: float = 0.0
    active: float = 0.0
    shrinkage: float = 0.0
    some: int = 0  # samples that are not zero
    total: Any = 0.0  # [d_in]

    def add(self, x: Tensor, x_hat: Tensor, on: Tensor) -> None:
        """Take in x, x_hat [batch d_in] and on [batch d_sae]."""
        x, x_hat = x.double(), x_hat.double()
        self.n += len(x)
        self.error += (x - x_hat).pow(2).sum()
        self.square += x.pow(2).sum()
        self.total += x.sum(0)
        self.active += on.sum()
        some = x.norm(dim=1) > 1e-6
        self.some += some.sum()
        self.shrinkage += (x_hat.norm(dim=1) / x.norm(dim=1))[some].sum()

    def summary(self) -> dict[str, float]:
        """explained_variance, shrinkage (mean of |x_hat| / |x|) and l0."""
        variance = self.square - self.total.pow(2).sum() / self.n
        return {
            "explained_variance": float(1 - self.error / variance),
            "shrinkage": float(self.shrinkage / self.some),
            "l0": float(self.active / self.n),
        }
