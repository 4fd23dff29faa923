"""Dead latents get new directions, towards what a dictionary reconstructs badly.

Bricken et al. 2023, "Neuron Resampling", at a few steps of a training:

1. A latent is dead if it was silent for the last `resample_window` steps.
2. The loss L(x) of `resample_rows` rows: the stream's next ones, which are in random order.
3. For every dead latent a row is drawn, independently, with probability in proportion to L(x)².
4. Its decoder row becomes the row's direction, of unit norm; its encoder column the same
   direction, 0.2 times as long as those of the living in the mean; its bias 0.
5. Adam's moments of all these weights become 0.

Two choices are ours. A row is read less b_dec, as the encoder reads it. And SAELens's decoder rows
may have any norm, where the paper's have 1: an encoder column counts as long as it were if its
latent's decoder row had norm 1, which leaves every activation's effect as it is.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

SHARE = 0.2  # of the living latents' mean encoder norm
ROWS = 4096  # rows whose loss is computed at a time


def losses(sae: Any, x: Tensor, l1: float) -> Tensor:
    """|x - x_hat|^2 + l1 sum a_i |d_i| of every row [rows d_in]: [rows]."""
    norm, out = sae.W_dec.norm(dim=1), []
    for rows in x.split(ROWS):
        acts = ((rows - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
        error = acts @ sae.W_dec + sae.b_dec - rows
        out.append(error.pow(2).sum(1) + l1 * (acts @ norm))
    return torch.cat(out)


@torch.no_grad()
def resample(
    sae: Any, adam: torch.optim.Adam, dead: Tensor, x: Tensor, l1: float, rng: np.random.Generator
) -> None:
    """Give the dead latents new directions, in place.

    Args:
        sae: a SAELens TrainingSAE of architecture standard, all of it trained.
        adam: its optimiser.
        dead: bool [d_sae].
        x: rows to draw from, [rows d_in], as the dictionary is trained on.
        l1: the L1 coefficient at this step.
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
