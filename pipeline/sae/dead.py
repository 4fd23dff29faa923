"""Which latents of a dictionary are dead, for how many AuxK keeps a place, and their resampling.

1. A latent is dead once `dead_rows` rows have passed since it last fired. In a run shorter than
   that, a latent that never fired counts as dead at the end.
2. The fast steps on a GPU must not wait for a count of the dead latents, whose number decides the
   shapes in AuxK. So they work on a fixed number of latents, the capacity, which is an upper bound
   for the next few steps: all latents that have been silent long enough to die in that time.

Resampling: dead latents get new directions, towards rows that are reconstructed badly.

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

from pipeline.spec.sae import SaeTraining

CHECK_EVERY = 64  # steps, at most, after which a GPU is asked for a new capacity
LEAST_CAPACITY = 256  # larger ones are powers of two, so that only a few graphs are captured
SHARE = 0.2  # share of the living latents' mean encoder norm
ROWS = 4096  # rows whose loss is computed at a time


class DeadLatents:
    """Counts for each latent the rows since it last fired.

    Args:
        d_sae: number of latents.
        training: batch_size and dead_rows.
        n_steps: steps of the whole run.

    Attributes:
        rows_since_fired: int64 [d_sae].
        capacity: upper bound on the number of dead latents until the next check; 0 turns AuxK
            off, None before the first check.
        rows_seen: rows of all steps since this object was made.
    """

    def __init__(
        self, d_sae: int, training: SaeTraining, n_steps: int, device: torch.device
    ) -> None:
        self.rows_since_fired = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.dead_rows = min(training.dead_rows, n_steps * training.batch_size)
        # A quarter of dead_rows between checks: only latents that were silent for three quarters
        # of it can die until the next one, so that the capacity stays close to the number of dead.
        self.check_every = max(1, min(CHECK_EVERY, self.dead_rows // (4 * training.batch_size)))
        self.capacity: int | None = None
        self.rows_seen = self._none_before = 0

    @property
    def mask(self) -> Bool[Tensor, " d_sae"]:
        """Which latents are dead."""
        return self.rows_since_fired >= self.dead_rows

    def mask_if_any(self) -> Bool[Tensor, " d_sae"] | None:
        """`mask`, or None while no latent is dead.

        Reading the counts waits for the device. It is done only when a latent can have died since
        the last time.
        """
        if self.rows_seen < self._none_before:
            return None
        left = self.dead_rows - int(self.rows_since_fired.max())
        self._none_before = self.rows_seen + max(left, 0)
        return self.mask if left <= 0 else None

    def capacity_at(self, step: int, batch_size: int) -> int:
        """The capacity at a step, counted from 0.

        It is computed anew at fixed steps, so that a resumed run does so at the same ones.
        """
        if self.capacity is None or step % self.check_every == 0:
            before = self.dead_rows - self.check_every * batch_size
            n, d_sae = int((self.rows_since_fired >= before).sum()), len(self.rows_since_fired)
            self.capacity = min(max(LEAST_CAPACITY, 1 << (n - 1).bit_length()), d_sae) if n else 0
        return self.capacity

    def count(self, fired: Bool[Tensor, " d_sae"], n_rows: int) -> None:
        """Take in which latents fired on a batch of n_rows."""
        self.rows_since_fired.add_(n_rows).masked_fill_(fired, 0)

    def tensors(self) -> dict[str, Tensor]:
        """The counts and the capacity, for a checkpoint."""
        out = {"silent": self.rows_since_fired}
        return out if self.capacity is None else out | {"room": torch.tensor(self.capacity)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `tensors` gave."""
        self.rows_since_fired = tensors["silent"].to(self.rows_since_fired.device, copy=True)
        if "room" in tensors:
            self.capacity = int(tensors["room"])


# --- resampling ------------------------------------------------------------------------------


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
