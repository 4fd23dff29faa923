"""A probe with one hidden layer, for all layers and tasks at once. [torch]

ReLU between two affine maps, the cross-entropy, Adam, the learning rate falling to 0 (Hewitt &
Liang 2019 take the same probe with 1,000 units). Every layer and task has weights of its own, and
all see the same rows in the same order: an epoch is a permutation drawn from the seed.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.probes.logistic import Tasks, absent, losses
from pipeline.spec.measured import MlpSpec

UNITS = 1 << 26  # hidden units of rows, layers and tasks that are held at once


class Mlp:
    """Probes of L layers and P tasks.

    Attributes:
        weights: [L d P h], [L P h], [L P h C], [L P C].
    """

    def __init__(self, shape: tuple[int, int, int, int], hidden: int, seed: int) -> None:
        """
        Args:
            shape: layers, d, tasks, classes at most.
            seed: draws the first weights, normal with variance 2 / fan-in (He et al. 2015).
        """
        n_layers, d, n_tasks, most = shape
        draw = torch.Generator().manual_seed(seed)
        first = torch.randn(n_layers, d, n_tasks, hidden, generator=draw) * (2 / d) ** 0.5
        last = torch.randn(n_layers, n_tasks, hidden, most, generator=draw) * (2 / hidden) ** 0.5
        biases = torch.zeros(n_layers, n_tasks, hidden), torch.zeros(n_layers, n_tasks, most)
        self.weights = [first, biases[0], last, biases[1]]

    def to(self, device: torch.device) -> "Mlp":
        """The same, on a device."""
        self.weights = [w.to(device) for w in self.weights]
        return self

    def logits(
        self, X: Float[Tensor, "layers rows dims"], n_classes: list[int]
    ) -> Float[Tensor, "layers rows tasks classes"]:
        """Logits of the rows, some at a time; -inf for classes that a task does not have."""
        at_once = max(1, UNITS // self.weights[1].numel())
        z = torch.cat([self._logits(x) for x in X.split(at_once, 1)], 1)
        return z + absent(n_classes, z.shape[-1], X.device)

    def _logits(
        self, X: Float[Tensor, "layers rows dims"]
    ) -> Float[Tensor, "layers rows tasks classes"]:
        first, b, last, c = self.weights
        h = (X @ first.flatten(2)).view(*X.shape[:2], *first.shape[2:]) + b[:, None]
        return torch.einsum("lnph,lphc->lnpc", h.relu(), last) + c[:, None]


def fit(X: Float[Tensor, "layers rows dims"], tasks: Tasks, spec: MlpSpec, seed: int) -> Mlp:
    """Probes trained on standardised rows."""
    n_layers, n, d = X.shape
    shape = (n_layers, d, len(tasks.n_classes), max(tasks.n_classes))
    probe = Mlp(shape, spec.hidden, seed).to(X.device)
    for w in probe.weights:
        w.requires_grad_(True)
    adam = torch.optim.Adam(probe.weights, lr=spec.lr)
    draw = torch.Generator().manual_seed(seed + 1)
    steps = spec.epochs * -(-n // spec.batch_size)
    fall = torch.optim.lr_scheduler.LambdaLR(adam, lambda i: 1 - i / steps)
    with torch.enable_grad():
        for _ in range(spec.epochs):
            for some in torch.randperm(n, generator=draw).split(spec.batch_size):
                some = some.to(X.device)
                here = tasks.rows(some)
                counts = (here.codes >= 0).sum(1).clamp(min=1)
                z = probe.logits(X[:, some], tasks.n_classes)
                loss = (losses(z, here).sum(1) / counts).sum()
                adam.zero_grad()
                loss.backward()
                adam.step()
                fall.step()
    probe.weights = [w.detach() for w in probe.weights]
    return probe
