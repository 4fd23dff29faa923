"""The measures of one dictionary: Section 3 of the paper, on fresh samples. [torch]

Their definitions are those of pipeline/latents/recovery.py; MCC is the mean of the cosines of a
one-to-one matching of the largest total (Hungarian algorithm).

A batch is encoded as in training: BatchTopK keeps its k a row over the batch, as in SAELens's own
`eval_sae_on_synthetic_data`.
"""

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pipeline.latents.fidelity import one_to_one
from pipeline.latents.recovery import Confusion, Reconstruction, cosine, uniqueness


class Recovery:
    """The measures of one dictionary, to which batches are added."""

    def __init__(self, sae: Any, scale: float, directions: Tensor) -> None:
        self.sae, self.scale = sae, scale
        cosines = cosine(sae.W_dec, directions)
        best = cosines.max(1)
        self.best, self.best_cosine = best.indices.cpu().numpy(), best.values.cpu().numpy()
        self.feature_cosine = cosines.max(0).values.cpu().numpy()
        cosines = cosines.cpu().numpy()
        pairs = one_to_one(cosines)
        self.matched = np.full(len(cosines), -1)
        self.matched_cosine = np.full(len(cosines), np.nan, cosines.dtype)
        self.matched[pairs[0]], self.matched_cosine[pairs[0]] = pairs[1], cosines[pairs]
        self.confusion, self.reconstruction = Confusion(best.indices), Reconstruction()

    @torch.no_grad()
    def add(self, x: Tensor, truth: Tensor) -> None:
        """Take in a batch: x [batch d_in], truth bool [batch n_features]."""
        acts = self.sae.encode(x * self.scale)
        x_hat, on = self.sae.decode(acts) / self.scale, acts != 0
        self.confusion.add(on, truth)
        self.reconstruction.add(x, x_hat, on)

    def summary(self) -> dict[str, float]:
        """Every measure as one number."""
        rates = {name: float(v.mean()) for name, v in self.confusion.rates().items()}
        return rates | {
            "mcc": float(np.nanmean(self.matched_cosine)),
            "uniqueness": uniqueness(self.best),
            **self.reconstruction.summary(),
            "dead_share": float((self.confusion.fired == 0).double().mean()),
        }

    def latents(self) -> pd.DataFrame:
        """Per latent: best feature and its cosine, the matched one, rates, firing rate."""
        out = pd.DataFrame(
            {
                "latent": np.arange(len(self.matched)),
                "feature": self.best,
                "cosine": self.best_cosine,
                "matched": self.matched,
                "matched_cosine": self.matched_cosine,
                **self.confusion.rates(),
                "density": self.confusion.fired.cpu().numpy() / max(self.reconstruction.n, 1),
            }
        )
        floats = out.select_dtypes("float64").columns
        return out.astype(dict.fromkeys(floats, "float32"))
