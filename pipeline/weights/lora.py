"""LoRA: a low-rank update of a model's matrices as one row of numbers a member. [torch]

Hu et al. (2021, 2106.09685), Section 4.1. Of every matrix W_0 [out in] of the layers

    W = W_0 + (alpha / rank) B A        A [rank in], B [out rank]

A is drawn as the authors' code and the library peft draw it, uniform in +- 1 / sqrt(in), and B is
0, so that training starts at W_0. Members may differ in rank and alpha: a row has room for the
largest rank, and holds alpha / rank of its components, 0 where it has fewer. These are not trained:
no gradient reaches them, nor A and B of a component whose scale is 0.

What an update does to a matrix is seen in singular vectors (Shuttleworth et al. 2024, 2410.21228):
one of W that no singular vector of W_0 comes near is an intruder dimension.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.spec.training import TrainingSpec
from pipeline.weights.flat import Layout

SCALE = "scale"  # alpha / rank of each component


@dataclass(frozen=True)
class LowRank(Layout):
    """The rows of low-rank updates: `scale`, then A and B of each matrix.

    Attributes:
        base: name -> W_0 of every matrix that is updated.
        transposed: W_0 are [in out], as in GPT-2's code.
        rank: the largest of all members.
    """

    base: dict[str, Tensor]
    transposed: bool
    rank: int

    @classmethod
    def of(cls, model: nn.Module, spec: TrainingSpec) -> "LowRank":
        """The layout of a run's members on a model with the weights that they start from."""
        base = {n: model.get_parameter(n).detach().clone() for n in matrices(model)}
        transposed = spec.architecture.family == "gpt2"
        rank = max(spec.low_rank(arm)[0] for _, arm, _ in spec.members())
        names, shapes = [SCALE], [torch.Size([rank])]
        for name, W in base.items():
            d_out, d_in = reversed(W.shape) if transposed else W.shape
            names += [f"{name}.A", f"{name}.B"]
            shapes += [torch.Size([rank, d_in]), torch.Size([d_out, rank])]
        return cls(names, shapes, [s.numel() for s in shapes], base, transposed, rank)

    def drawn(self, rank: int, alpha: float, seed: int) -> Float[Tensor, " n"]:
        """The first row of a member, on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        scale = torch.zeros(self.rank)
        scale[:rank] = alpha / rank
        parts = [scale]
        for name, shape in list(zip(self.names, self.shapes, strict=True))[1:]:
            if name.endswith(".A"):
                draws = torch.rand(shape, generator=generator)
                parts.append((2 * draws - 1).flatten() / math.sqrt(shape[1]))
            else:
                parts.append(torch.zeros(shape.numel()))
        return torch.cat(parts)

    def named(self, flat: Float[Tensor, " n"]) -> dict[str, Tensor]:
        """Name -> W of one member."""
        scale, *factors = flat.split(self.sizes)
        out, shapes = {}, self.shapes[1:]
        for i, (name, W) in enumerate(self.base.items()):
            A, B = (factors[2 * i + j].view(shapes[2 * i + j]) for j in (0, 1))
            delta = (B * scale.detach()) @ A
            out[name] = W + (delta.mT if self.transposed else delta)
        return out

    @torch.no_grad()
    def stacked(self, flat: Float[Tensor, "members n"]) -> dict[str, Tensor]:
        """Name -> W [members …], on the CPU."""
        each = [self.named(row) for row in flat.detach()]
        return {n: torch.stack([one[n] for one in each]).cpu().contiguous() for n in self.base}


def matrices(model: nn.Module) -> list[str]:
    """Names of the weight matrices of a model's layers: not embeddings, norms, biases."""
    inside = (".layers.", ".h.")  # native, gpt2
    named = model.named_parameters()
    return [n for n, p in named if p.dim() == 2 and any(part in n for part in inside)]


def svd(W: Float[Tensor, "out in"]) -> tuple[Tensor, Tensor, Tensor]:
    """U [out n], singular values [n] and V' [n in], float64, n the smaller side."""
    return torch.linalg.svd(W.double(), full_matrices=False)


def best_cosines(W_0: Float[Tensor, "out in"], W: Float[Tensor, "out in"]) -> Float[Tensor, " n"]:
    """Of every left singular vector of W the largest |cosine| with one of W_0, largest value first.

    An intruder dimension is one below 0.5 among the first ten (Shuttleworth et al. 2024, code).
    """
    return (svd(W)[0].T @ svd(W_0)[0]).abs().max(1).values


def rank_of(delta: Float[Tensor, "out in"], share: float = 0.9) -> float:
    """Singular values that make a share of the squared norm; 0 of a zero matrix."""
    squares = torch.linalg.svdvals(delta.double()).square()
    if not squares.sum() > 0:
        return 0.0
    return float((squares.cumsum(0) / squares.sum() < share).sum() + 1)


def scaled(W: Float[Tensor, "out in"], which: list[int], factor: float) -> Float[Tensor, "out in"]:
    """W with some of its singular values multiplied by a factor, float32."""
    U, s, V = svd(W)
    at = torch.tensor(which, dtype=torch.long, device=W.device)
    return (W.double() - (1 - factor) * (U[:, at] * s[at]) @ V[at]).float()
