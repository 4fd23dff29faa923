"""Resampling: dead latents get new directions, towards rows that are reconstructed badly.

Bricken et al. 2023, "Neuron Resampling", done after a few chosen steps:

1. A latent is dead if it was silent for the last `resample_window` steps.
2. The loss L(x) is computed on `resample_rows` rows: the stream's next ones, in random order.
3. For every dead latent a row is drawn, independently, with probability in proportion to L(x)².
4. Its decoder row becomes the row's direction, of unit norm; its encoder column the same
   direction, with 0.2 times the mean norm of the living latents' columns; its bias becomes 0.
5. Adam's moments of these weights become 0.

Two choices are ours. A row's direction is that of x - b_dec, which is what the encoder reads. And
SAELens's decoder rows may have any norm, where the paper's have norm 1: the norm of an encoder
column is measured after rescaling its latent to a decoder norm of 1.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

SHARE = 0.2  # share of the living latents' mean encoder norm
ROWS = 4096  # rows whose loss is computed at a time


def losses(sae: Any, x: Float[Tensor, "rows d_in"], l1: float) -> Float[Tensor, " rows"]:
    """The loss |x - x_hat|^2 + l1 sum a_i |d_i| of every row."""
    norm, out = sae.W_dec.norm(dim=1), []
    for rows in x.split(ROWS):
        acts = ((rows - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
        error = acts @ sae.W_dec + sae.b_dec - rows
        out.append(error.pow(2).sum(1) + l1 * (acts @ norm))
    return torch.cat(out)


@torch.no_grad()
def resample(
    sae: Any,
    adam: torch.optim.Adam,
    dead: Bool[Tensor, " d_sae"],
    x: Float[Tensor, "rows d_in"],
    l1: float,
    rng: np.random.Generator,
) -> None:
    """Give the dead latents new directions, in place.

    Args:
        sae: a SAELens TrainingSAE of architecture standard, all of it trained.
        adam: its optimiser.
        x: rows to draw from, scaled as for training.
        l1: the L1 coefficient at this step.
        rng: draws the rows.
    """
    at = dead.nonzero()[:, 0]
    if len(at) == 0:
        return
    p = losses(sae, x, l1).double().pow(2).cpu().numpy()
    drawn = torch.from_numpy(rng.choice(len(p), len(at), p=p / p.sum())).to(x.device)
    direction = torch.nn.functional.normalize(x[drawn] - sae.b_dec, dim=1)
    length = sae.W_enc.norm(dim=0) * sae.W_dec.norm(dim=1)
    living = length[~dead] if len(at) < len(dead) else length
    sae.W_dec[at] = direction
    sae.W_enc[:, at] = SHARE * living.mean() * direction.T
    sae.b_enc[at] = 0
    for moment in ("exp_avg", "exp_avg_sq"):
        adam.state[sae.W_dec][moment][at] = 0
        adam.state[sae.W_enc][moment][:, at] = 0
        adam.state[sae.b_enc][moment][at] = 0
