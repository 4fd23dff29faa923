"""Toy models, and their decomposition into rank-one parts, many models at once. [torch]

After Bushnaq, Braun & Sharkey 2025 (Stochastic Parameter Decomposition, arXiv 2506.20790) and the
authors' code (goodfire-ai/spd: spd/experiments/tms, spd/models/components.py).

1. A target is x̂ = ReLU(Wᵀ W x + b), or ReLU(Wᵀ I W x + b); its matrices are W, I where it has one,
   and Wᵀ, each on its own.
2. Each matrix is a sum of C parts U_c V_cᵀ. A small network of its own, γ_c, reads the part's inner
   activation V_c · a and names its causal importance g_c in [0, 1] for this input.
3. Loss = β₀ faithfulness + stochastic reconstruction, of all matrices and of one at a time, +
   β₃ Σ g^p. Parts are multiplied by m = g + (1 - g) r, r uniform: what is unimportant may go.

Shapes: models, rows, C parts, hidden units of γ, d_in and d_out of a matrix.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

LEAK = 0.01  # of the hard sigmoids, appendix "Avoiding dead gradients"


@dataclass(frozen=True)
class Toy:
    """Targets of one shape.

    Attributes:
        W: [models, hidden, features].
        b: [models, features].
        identity: whether an identity matrix stands between W and Wᵀ.
    """

    W: Tensor
    b: Tensor
    identity: bool

    def matrices(self) -> dict[str, Tensor]:
        """name -> [models, d_out, d_in], in the order of computation."""
        eye = torch.eye(self.W.shape[1], device=self.W.device).expand(len(self.W), -1, -1)
        middle = {"identity": eye} if self.identity else {}
        return {"embed": self.W, **middle, "unembed": self.W.mT}

    def __call__(self, x: Tensor) -> Tensor:
        """x̂ of rows x [models, rows, features]."""
        return (x @ self.W.mT @ self.W + self.b[:, None]).relu()


def rows(shape: tuple[int, ...], p: float, generator: torch.Generator) -> Tensor:
    """Features that are 0, or with probability p uniform on [0, 1]."""
    g = {"generator": generator, "device": generator.device}
    u = torch.rand(shape, **g)
    return torch.where(u < p, u / p, 0.0)  # given u < p, u / p is uniform


def train_toy(
    models: int, features: int, hidden: int, *, p: float, steps: int, batch: int, lr: float,
    decay: float, generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """W [models, hidden, features], b [models, features] and the last losses [models].

    W begins as torch's Linear does, b at 0. An identity between W and Wᵀ changes nothing here.
    """
    g = {"generator": generator, "device": generator.device}
    W = (torch.rand(models, hidden, features, **g) * 2 - 1) / math.sqrt(features)
    weights = [W.requires_grad_(), torch.zeros(models, features).to(W).requires_grad_()]
    adam = torch.optim.AdamW(weights, lr=lr, weight_decay=decay)
    recent = torch.zeros(models, device=W.device)
    for _ in range(steps):
        x = rows((models, batch, features), p, generator)
        with torch.enable_grad():
            loss = (Toy(*weights, False)(x) - x).square().mean((1, 2))
            adam.zero_grad()
            loss.sum().backward()
        recent = 0.99 * recent + 0.01 * loss.detach()
        adam.step()
    return *(w.detach() for w in weights), recent


def without_zeros(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [models, k, features] and how many rows of x each stands for, [models, k].

    Without an active feature every inner activation is 0 and masks change nothing, so one such row
    stands for all of a batch: four in five of 5 features. The loss is the same.
    """
    some = x.any(-1)
    k = min(int(some.sum(1).max()) + 1, x.shape[1])
    first = some.to(torch.uint8).argsort(1, descending=True)[:, :k, None]
    count = torch.ones(len(x), k, device=x.device)
    count[:, -1] += x.shape[1] - k
    return x.take_along_dim(first, 1), count


# --- parts ---------------------------------------------------------------------------------


def part_weights(W: Tensor, C: int, hidden: int, generator: torch.Generator) -> dict[str, Tensor]:
    """U, V and γ of one matrix before training, as the authors' components.py draws them.

    U and V have random directions of length 1, U times the part's overlap with W. γ's first layer
    is normal with variance 2 (gain √2, fan-in 1), its second with 1 / hidden, biases 0.

    Returns:
        U [models, C, d_out], V [models, C, d_in], a, b, c [models, C, hidden], d [models, C], with
        γ(h) = c · GELU(a h + b) + d.
    """
    models, d_out, d_in = W.shape
    g = {"generator": generator, "device": generator.device}
    U, V = (torch.randn(models, C, d, **g) for d in (d_out, d_in))
    U, V = U / U.norm(dim=-1, keepdim=True), V / V.norm(dim=-1, keepdim=True)
    overlap = torch.einsum("mco,moi,mci->mc", U, W, V)
    a, c = (torch.randn(models, C, hidden, **g) for _ in range(2))
    zero = torch.zeros_like(a)
    gates = {
        "a": a * math.sqrt(2),
        "b": zero,
        "c": c / math.sqrt(hidden),
        "d": zero[..., 0].clone(),
    }
    return {"U": U * overlap[..., None], "V": V, **gates}


Parts = dict[str, dict[str, Tensor]]  # matrix -> what part_weights gives


def lower(x: Tensor) -> Tensor:
    """The hard sigmoid that leaks below 0: for masks, which may go below it."""
    return torch.where(x < 0, LEAK * x, x.clamp(max=1))


def upper(x: Tensor) -> Tensor:
    """The hard sigmoid that leaks above 1: for the penalty, which may not go below 0."""
    return torch.where(x > 1, 1 + LEAK * (x - 1), x.clamp(min=0))


def inputs_of(toy: Toy, x: Tensor) -> dict[str, Tensor]:
    """matrix -> the activations that it multiplies in the target, [models, rows, d_in]."""
    hidden = x @ toy.W.mT
    return {name: x if name == "embed" else hidden for name in toy.matrices()}


def raw_importance(part: dict[str, Tensor], a: Tensor) -> Tensor:
    """γ_c(V_c · a) of every part before the sigmoid, [models, rows, C]."""
    h = (a @ part["V"].mT)[..., None]
    hidden = torch.nn.functional.gelu(h * part["a"][:, None] + part["b"][:, None])
    return (hidden * part["c"][:, None]).sum(-1) + part["d"][:, None]


def masked(toy: Toy, parts: Parts, masks: dict[str, Tensor], x: Tensor) -> Tensor:
    """x̂ where the matrices in `masks` are sums of their parts times masks [models, rows, C]."""
    for name, W in toy.matrices().items():
        if name in masks:
            x = ((x @ parts[name]["V"].mT) * masks[name]) @ parts[name]["U"]
        elif name != "identity":
            x = x @ W.mT
    return (x + toy.b[:, None]).relu()


def faithfulness(toy: Toy, parts: Parts) -> Tensor:
    """Squared distance of the sums of parts from the matrices, over their parameters: [models]."""
    matrices = toy.matrices()
    far = [(W - parts[n]["U"].mT @ parts[n]["V"]).square().flatten(1) for n, W in matrices.items()]
    return torch.cat(far, 1).mean(1)


def loss(
    toy: Toy, parts: Parts, x: Tensor, count: Tensor, noise: dict[str, Tensor], weight: Tensor,
    power: float,
) -> Tensor:  # fmt: skip
    """The loss of each model, [models].

    Args:
        count: how many rows each row stands for, [models, rows].
        noise: r of every matrix, uniform, [models, rows, C].
        weight: β₃, [models].
        power: p of the penalty.
    """
    want, taken, share = toy(x), inputs_of(toy, x), count / count.sum(1, keepdim=True)
    raw = {name: raw_importance(parts[name], a) for name, a in taken.items()}
    masks = {name: (g := lower(r)) + (1 - g) * noise[name] for name, r in raw.items()}
    penalty = sum((upper(r).pow(power).sum(-1) * share).sum(-1) for r in raw.values())
    apart = [masked(toy, parts, {name: m}, x) for name, m in masks.items()]
    outputs = (masked(toy, parts, masks, x), *apart)
    error = [((y - want).square().mean(-1) * share).sum(-1) for y in outputs]
    recon = error[0] + sum(error[1:]) / len(apart)
    return faithfulness(toy, parts) + recon + weight * penalty


def decompose(
    toy: Toy, C: int, *, gate: int, weight: Tensor, power: float, p: float, steps: int, batch: int,
    lr: float, generator: torch.Generator,
) -> Iterator[tuple[int, Parts]]:  # fmt: skip
    """(step, parts) before training and after each step; the tensors change in place.

    The rate falls as a quarter of a cosine, as the authors' cosine_decay_lr does. On a GPU one step
    is captured and replayed, for its kernels take less time than their launch.
    """
    device, models = toy.W.device, len(toy.W)
    drawn = {n: part_weights(W, C, gate, generator) for n, W in toy.matrices().items()}
    weights = [w for part in drawn.values() for w in part.values()]
    for w in weights:
        w.requires_grad_()
    captured = device.type == "cuda"
    rate = torch.tensor(lr, device=device) if captured else lr
    adam = torch.optim.Adam(weights, lr=rate, capturable=captured)

    def step() -> None:
        x = rows((models, batch, toy.W.shape[2]), p, generator)
        count = torch.ones(x.shape[:2], device=device)
        if not captured:  # a captured step has fixed shapes
            x, count = without_zeros(x)
        shape = (*x.shape[:2], C)
        noise = {n: torch.rand(shape, generator=generator, device=device) for n in drawn}
        with torch.enable_grad():
            total = loss(toy, drawn, x, count, noise, weight, power).sum()
            for w, gradient in zip(weights, torch.autograd.grad(total, weights), strict=True):
                w.grad = gradient
        adam.step()

    run: Callable[[], object] = step
    yield 0, drawn
    for number in range(1, steps + 1):
        now = lr * math.cos(math.pi / 2 * (number - 1) / max(steps - 1, 1))
        if captured:
            rate.fill_(now)
        else:
            adam.param_groups[0]["lr"] = now
        if captured and number == 4:  # three steps have warmed up its kernels
            graph = torch.cuda.CUDAGraph()
            graph.register_generator_state(generator)
            with torch.cuda.graph(graph):
                step()
            run = graph.replay
        run()
        yield number, drawn
