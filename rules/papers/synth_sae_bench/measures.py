"""How well a dictionary recovers the true features: Section 3 of the paper, on fresh samples.

1. cosine        |cos| of every decoder row with every true direction.
2. matching      MCC is the mean of the cosines of a one-to-one matching of the largest total
                 (Hungarian algorithm); uniqueness the share of different features among the best
                 of each latent.
3. confusion     A latent is a classifier of its best feature: it says yes where it fires. Counts of
                 true and false answers over all samples give precision, recall and F1, averaged
                 over latents (0 where nothing fires).
4. reconstruction  Explained variance, shrinkage (mean of |x_hat| / |x|), L0, latents that never
                 fire.

A batch is encoded as in training: BatchTopK keeps its k a row over the batch, as in SAELens's own
`eval_sae_on_synthetic_data`.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

BLOCK = 1024  # features a block of the cosines


def cosine(decoder: Tensor, directions: Tensor) -> Tensor:
    """|cos| of latents and true features: [d_sae n_features], on the device of both."""
    unit = [t.detach().float() / t.detach().float().norm(dim=1, keepdim=True).clamp_min(1e-8)
            for t in (decoder, directions)]  # fmt: skip
    blocks = [unit[0] @ block.T for block in unit[1].split(BLOCK)]
    return torch.cat(blocks, dim=1).abs_()


def matching(cosines: np.ndarray) -> np.ndarray:
    """The feature of each latent in the one-to-one matching of the largest sum; -1 for none.

    Args:
        cosines: [d_sae n_features].
    """
    from scipy.optimize import linear_sum_assignment

    latents, features = linear_sum_assignment(cosines, maximize=True)
    out = np.full(len(cosines), -1)
    out[latents] = features
    return out


def uniqueness(best: np.ndarray) -> float:
    """The share of different features among the best of each latent, [d_sae]."""
    return len(np.unique(best)) / len(best)


@dataclass
class Confusion:
    """Counts a latent over samples; `best` is the feature that each latent is to detect."""

    best: Tensor  # int64 [d_sae]
    both: Tensor = field(init=False)  # latent and feature active
    fired: Tensor = field(init=False)
    true: Tensor = field(init=False)  # feature active

    def __post_init__(self) -> None:
        self.both, self.fired, self.true = (torch.zeros_like(self.best) for _ in range(3))

    def add(self, on: Tensor, truth: Tensor) -> None:
        """A batch: bool [batch d_sae] and [batch n_features]."""
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
        """x, x_hat [batch d_in]; on [batch d_sae]."""
        x, x_hat = x.double(), x_hat.double()
        self.n += len(x)
        self.error += (x - x_hat).pow(2).sum()
        self.square += x.pow(2).sum()
        self.total += x.sum(0)
        self.active += on.sum()
        some = x.norm(dim=1) > 1e-6
        self.some += some.sum()
        self.shrinkage += (x_hat.norm(dim=1) / x.norm(dim=1))[some].sum()

    def told(self) -> dict[str, float]:
        """explained_variance, shrinkage, l0."""
        variance = self.square - self.total.pow(2).sum() / self.n
        return {
            "explained_variance": float(1 - self.error / variance),
            "shrinkage": float(self.shrinkage / self.some),
            "l0": float(self.active / self.n),
        }


class Recovery:
    """The measures of one dictionary, to which batches are added."""

    def __init__(self, sae: Any, scale: float, directions: Tensor) -> None:
        cosines = cosine(sae.W_dec, directions)
        self.sae, self.scale = sae, scale
        best = cosines.max(1)
        self.best, self.best_cosine = best.indices, best.values.cpu().numpy()
        self.feature_cosine = cosines.max(0).values.cpu().numpy()
        cosines = cosines.cpu().numpy()
        self.matched = matching(cosines)
        self.matched_cosine = np.where(
            self.matched < 0, np.nan, cosines[np.arange(len(cosines)), self.matched]
        )
        self.confusion, self.reconstruction = Confusion(self.best), Reconstruction()

    @torch.no_grad()
    def add(self, x: Tensor, truth: Tensor) -> None:
        """A batch: x [batch d_in], truth bool [batch n_features]."""
        acts = self.sae.encode(x * self.scale)
        x_hat, on = self.sae.decode(acts) / self.scale, acts != 0
        self.confusion.add(on, truth)
        self.reconstruction.add(x, x_hat, on)

    def told(self) -> dict[str, float]:
        """Every measure as one number."""
        rates = {name: float(v.mean()) for name, v in self.confusion.rates().items()}
        return rates | {
            "mcc": float(np.nanmean(self.matched_cosine)),
            "uniqueness": uniqueness(self.best.cpu().numpy()),
            **self.reconstruction.told(),
            "dead_share": float((self.confusion.fired == 0).double().mean()),
        }

    def latents(self) -> pd.DataFrame:
        """One row a latent: best feature and its cosine, the matched one, rates, firing rate."""
        out = pd.DataFrame(
            {
                "latent": np.arange(len(self.matched)),
                "feature": self.best.cpu().numpy(),
                "cosine": self.best_cosine,
                "matched": self.matched,
                "matched_cosine": self.matched_cosine,
                **self.confusion.rates(),
                "density": self.confusion.fired.cpu().numpy() / max(self.reconstruction.n, 1),
            }
        )
        floats = out.select_dtypes("float64").columns
        return out.astype(dict.fromkeys(floats, "float32"))
