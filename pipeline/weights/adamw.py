"""AdamW (Loshchilov & Hutter 2019) on rows of weights. [torch]

It is written out because the members of a run may differ in learning rate and weight decay, and
torch.optim.AdamW has one of each for all values of a tensor. The factors of every step are computed
before the first one, so that no step waits for a GPU.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.spec.training import TrainingSpec
from pipeline.weights.flat import Layout
from pipeline.weights.initial import learning_rate


def setting(spec: TrainingSpec, arm: str, field: str) -> float:
    """A setting of the optimiser: the arm's own, or else that of the run."""
    own = getattr(spec.arms.get(arm), field, None)
    return getattr(spec.optimiser, field) if own is None else own


def learning_rate_of(spec: TrainingSpec, arm: str, step: int) -> float:
    """Learning rate of an arm at update `step`, counted from 1; 0 for step 0."""
    lr = setting(spec, arm, "lr")
    return learning_rate(spec.optimiser, lr, step, spec.steps) if step else 0.0


def plan(spec: TrainingSpec) -> Float[Tensor, "steps members 3"]:
    """Step size, root of the second moment's correction, and decay of every update.

    AdamW's update n is  w <- w · decay − size · m / (sqrt(v) / root + eps)  with
    size = lr / (1 − β1^n),  root = sqrt(1 − β2^n),  decay = lr · weight_decay.
    """
    (b1, b2), members = spec.optimiser.betas, spec.members()
    n = np.arange(1, spec.steps + 1, dtype=np.float64)
    out = np.empty((spec.steps, len(members), 3))
    for i, (_, arm, _) in enumerate(members):
        lr = np.array([learning_rate_of(spec, arm, int(step)) for step in n])
        decay = setting(spec, arm, "weight_decay")
        out[:, i] = np.stack([lr / (1 - b1**n), np.sqrt(1 - b2**n), lr * decay], 1)
    return torch.from_numpy(out).float()


class AdamW:
    """The optimiser of all members.

    Args:
        flat: their weights, [members n].
        layout: says which values are of matrices.

    Attributes:
        mean, square: the moments, [members n].
        count: number of updates done, [1] on the device.
    """

    def __init__(
        self, spec: TrainingSpec, flat: Float[Tensor, "members n"], layout: Layout
    ) -> None:
        device = flat.device
        self.how = spec.optimiser
        self.mean, self.square = torch.zeros_like(flat), torch.zeros_like(flat)
        self.count = torch.zeros(1, dtype=torch.long, device=device)
        self._plan = plan(spec).to(device)
        matrix = torch.tensor([float(len(s) > 1) for s in layout.shapes])
        decays = matrix if self.how.decay == "matrices" else torch.ones_like(matrix)
        self._decays = decays.repeat_interleave(torch.tensor(layout.sizes)).to(device)

    @torch.no_grad()
    def step(self, flat: Float[Tensor, "members n"], gradient: Float[Tensor, "members n"]) -> None:
        """Clip each member's gradient and update its weights in place, on the device."""
        how = self.how
        if how.clip:
            norm = gradient.norm(dim=1, keepdim=True)
            gradient = gradient * (how.clip / (norm + 1e-6)).clamp(max=1)
        size, root, decay = self._plan.index_select(0, self.count)[0].split(1, 1)
        self.count += 1
        self.mean.lerp_(gradient, 1 - how.betas[0])
        self.square.mul_(how.betas[1]).addcmul_(gradient, gradient, value=1 - how.betas[1])
        scale = (self.square.sqrt() / root).add_(how.eps)
        flat.sub_(flat * (decay * self._decays))
        flat.sub_(size * self.mean / scale)
