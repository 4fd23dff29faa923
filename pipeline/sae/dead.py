"""Which latents of a dictionary are dead, and for how many of them AuxK keeps a place.

1. A latent is dead once `dead_rows` rows have passed since it last fired. In a run shorter than
   that, a latent that never fired counts as dead at the end.
2. The fast steps on a GPU must not wait for a count of the dead latents, whose number decides the
   shapes in AuxK. So they work on a fixed number of latents, the capacity, which is an upper bound
   for the next few steps: all latents that have been silent long enough to die in that time.
"""

import torch
from jaxtyping import Bool
from torch import Tensor

from pipeline.spec.sae import SaeTraining

CHECK_EVERY = 64  # steps, at most, after which a GPU is asked for a new capacity
LEAST_CAPACITY = 256  # larger ones are powers of two, so that only a few graphs are captured


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
