"""Many toy models trained at once: x' = ReLU(WᵀWx + b) on sparse features.

Follows "Experiment Setup" of Elhage et al. 2022 and the authors' notebook
(anthropics/toy-models-of-superposition): loss Σ_i I_i (x_i − x'_i)², AdamW, Xavier weights.

1. Data. A feature is 0 with probability 1 − p and else uniform on (0, 1]. One uniform u a feature
   gives both: x = max(0, 1 − u / p). All models of one seed see the same u, each at its own p.
2. Gradient, written out. With V = [W | b] and h = [xW | 1] the model is x' = ReLU(hVᵀ), and
   dL/dV = xᵀ(g [W | 0]) + gᵀh, where g = 2 I (x' − x) 1[x' > 0] / (batch · n).
3. Models are worked in slices small enough for a core's cache, each by one thread. So neither the
   number of threads nor the other models of a run change a model's weights by a single bit.
"""

import hashlib
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from pydantic import Field
from torch import Tensor

from pipeline.spec.base import Section

WIDE = 64  # features, from which a product of few rows is faster than one of few columns
SLICE_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 26}  # of x; three such buffers fit a 2 MiB cache


@dataclass(frozen=True)
class Family:
    """Toy models of one shape that differ in density and importance.

    Attributes:
        name: enters the random seeds, with `ids`.
        density: [models, n] probability 1 − S that a feature is active.
        importance: [models, n] weights I of the loss.
        n_hidden: m.
        init_instances: models in the joint tensor that the notebook hands to xavier_normal_.
        relu: False for the linear model.
        ids: one number per model, its identity whichever other models are trained beside it.
    """

    name: str
    density: Tensor
    importance: Tensor
    n_hidden: int
    init_instances: int
    relu: bool = True
    ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", self.ids or tuple(range(len(self.density))))

    def __getitem__(self, which: slice) -> "Family":
        """Some of the models, with their identities."""
        cut = {name: getattr(self, name)[which] for name in ("density", "importance", "ids")}
        return replace(self, **cut)


class Optimiser(Section):
    """AdamW at a constant rate; the defaults are those of the authors' notebook."""

    steps: int = Field(default=10_000, ge=1)
    batch_size: int = Field(default=1024, ge=1, description="rows a step")
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0, description="torch.optim.AdamW's default")
    eval_batches: int = Field(default=128, ge=1, description="held-out batches for the loss")


def generator(device: torch.device | str, *identity: object) -> torch.Generator:
    """A generator seeded by the sha256 of what it is for."""
    digest = hashlib.sha256(repr(identity).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


def init_std(n_features: int, n_hidden: int, instances: int) -> float:
    """Standard deviation that xavier_normal_ gives a joint [instances, n, m] tensor.

    Of three dimensions torch makes fan_in = n · m and fan_out = instances · m, so the spread of
    the first weights depends on how many models share the tensor.
    """
    return math.sqrt(2 / ((n_features + instances) * n_hidden))


def initial(family: Family, seed: int) -> Tensor:
    """V = [W | 0] of every model before training, drawn on the CPU: [models, n, m + 1]."""
    n, m = family.density.shape[1], family.n_hidden
    V = torch.zeros(len(family.ids), n, m + 1)
    for i, id in enumerate(family.ids):
        W = torch.randn(n, m, generator=generator("cpu", family.name, "init", seed, id))
        V[i, :, :m] = W * init_std(n, m, family.init_instances)
    return V


class _Slice:
    """Models whose buffers fit the cache: their gradient and loss.

    Rows of a batch stand last: x is [models, n, rows], h is [models, m + 1, rows].
    """

    def __init__(
        self, family: Family, s: int, rows: int, weights: tuple[Tensor, Tensor], scratch: Tensor
    ) -> None:
        """
        Args:
            s: how many seeds; models of one seed stand together.
            weights: V and its gradient of these models, which `gradient` fills.
        """
        (models, n), m = family.density.shape, family.n_hidden
        self.relu, self.n_hidden = family.relu, m
        self.V, self.dV = weights
        device = self.V.device
        self.importance = family.importance.to(device).repeat(s, 1)[:, :, None]
        self.gain = self.importance * (2 / (rows * n))
        density = family.density.to(device)[:, :, None]
        self.slope = -1 / density  # [models, n, 1]
        if bool((density == density[:, :1]).all()):
            self.slope = self.slope[:, :1]  # one scalar a model is faster to broadcast
        shapes = [(s * models, n, rows)] * 3 + [(s * models, m + 1, rows)] * 2
        cuts = torch.tensor(shapes).prod(1).cumsum(0).tolist()
        self.x, self.out, self.error, self.h, self.dh = (
            scratch[start:stop].view(shape)
            for start, stop, shape in zip([0, *cuts], cuts, shapes, strict=False)
        )

    def forward(self, u: Tensor) -> None:
        """x, h and the pre-activation of x', from uniform u [seeds, n, rows]."""
        x = self.x.view(len(u), -1, *u.shape[1:])
        torch.mul(u[:, None], self.slope, out=x)
        self.x.add_(1).relu_()
        torch.bmm(self.V.mT, self.x, out=self.h)
        self.h[:, self.n_hidden] = 1
        torch.bmm(self.V, self.h, out=self.out)

    def gradient(self, u: Tensor) -> None:
        """dL/dV [models, n, m + 1] on one batch, into self.dV."""
        self.forward(u)
        torch.sub(self.out, self.x, out=self.error)
        if self.relu:
            masked = torch.ops.aten.threshold_backward.grad_input
            masked(self.error, self.out, 0.0, grad_input=self.error)
        torch.bmm((self.V * self.gain).mT, self.error, out=self.dh)
        self.dh[:, self.n_hidden] = 0
        if self.V.shape[1] >= WIDE:
            decoder = torch.bmm(self.h, self.error.mT).mul_(self.gain.mT)
            self.dV.copy_(decoder.baddbmm_(self.dh, self.x.mT).mT)
        else:
            torch.bmm(self.error, self.h.mT, out=self.dV)
            self.dV.mul_(self.gain).baddbmm_(self.x, self.dh.mT)

    def loss(self, u: Tensor) -> Tensor:
        """Mean over rows and features of I (x − x')²: [models]."""
        self.forward(u)
        out = self.out.relu_() if self.relu else self.out
        squared = out.sub_(self.x).square_().mean(2)
        return (squared * self.importance[..., 0]).mean(1)


def _train_block(
    family: Family, seeds: list[int], how: Optimiser, device: torch.device, on_step: Callable
) -> tuple[Tensor, Tensor]:
    """All models of a family, once per seed: V [seeds, models, n, m + 1], loss [seeds, models]."""
    models, n = family.density.shape
    elements = SLICE_ELEMENTS.get(device.type, SLICE_ELEMENTS["cuda"])
    rows = len(seeds) * how.batch_size
    width = min(models, max(1, elements // (rows * n)))
    scratch = torch.empty(width * rows * (3 * n + 2 * family.n_hidden + 2), device=device)
    parts = [family[i : i + width] for i in range(0, models, width)]
    weights = torch.cat([initial(part, seed) for part in parts for seed in seeds]).to(device)
    weights.grad = torch.zeros_like(weights)
    # its defaults, as in the notebook; of one model's few weights a step's start would take longest
    adamw = torch.optim.AdamW([weights], how.lr, weight_decay=how.weight_decay, foreach=False)
    sizes = [len(seeds) * len(part.ids) for part in parts]
    cuts = zip(weights.split(sizes), weights.grad.split(sizes), strict=True)
    slices = [
        _Slice(part, len(seeds), how.batch_size, cut, scratch)
        for part, cut in zip(parts, cuts, strict=True)
    ]
    u = torch.empty(len(seeds), n, how.batch_size, device=device)
    streams = [generator(device, family.name, "data", seed) for seed in seeds]
    for _ in range(how.steps):
        for row, stream in zip(u, streams, strict=True):
            row.uniform_(generator=stream)
        for part in slices:
            part.gradient(u)
        adamw.step()
        on_step(len(seeds) * models * n)
    held_out = generator(device, family.name, "held out")
    losses = torch.zeros(len(seeds) * models, dtype=torch.float64)
    for _ in range(how.eval_batches):
        u[0].uniform_(generator=held_out)
        u[1:] = u[:1]
        batch = [part.loss(u).view(len(seeds), -1) for part in slices]
        losses += torch.cat(batch, 1).flatten().cpu().double() / how.eval_batches
    V = torch.cat([part.V.view(len(seeds), -1, *part.V.shape[1:]) for part in slices], 1)
    return V.cpu(), losses.view(len(seeds), models)


def train(
    family: Family, seeds: list[int], how: Optimiser, *, device: torch.device | str = "cpu",
    threads: int = 1, on_step: Callable[[int], None] = lambda n: None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Train every model of a family once per seed.

    Args:
        on_step: called with the number of features whose weights just took a step.

    Returns:
        W [seeds, models, n, m], b [seeds, models, n], and loss [seeds, models]: a mean over
        features and over held-out batches that all models of the family share.
    """
    device, (models, n) = torch.device(device), family.density.shape
    threads = min(threads, models) if device.type == "cpu" else 1
    groups = [[s] for s in seeds] if device.type == "cpu" else [seeds]
    blocks = [(group, slice(i, None, threads)) for group in groups for i in range(threads)]
    V = torch.empty(len(seeds), models, n, family.n_hidden + 1)
    loss = torch.empty(len(seeds), models, dtype=torch.float64)

    def work(block: tuple[list[int], slice]) -> None:
        group, which = block
        rows = [seeds.index(s) for s in group]
        with torch.inference_mode():
            found = _train_block(family[which], group, how, device, on_step)
            V[rows, which], loss[rows, which] = found

    before = torch.get_num_threads()
    try:
        if device.type == "cpu":
            torch.set_num_threads(1)  # a block a thread: no thread waits inside an operation
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, blocks))
    finally:
        torch.set_num_threads(before)
    return V[..., :-1], V[..., -1], loss
