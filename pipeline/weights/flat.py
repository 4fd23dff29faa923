"""The weights of a model as one vector; those of several models are rows of a tensor. [torch]"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.spec.training import Architecture
from pipeline.weights.initial import is_trained


@dataclass(frozen=True)
class Layout:
    """Which parameters of a model are trained, in the order in which a row of weights holds them.

    Attributes:
        names: the trained parameters' names.
        shapes, sizes: shape and number of values of each.
    """

    names: list[str]
    shapes: list[torch.Size]
    sizes: list[int]

    @classmethod
    def of(cls, model: nn.Module, architecture: Architecture) -> "Layout":
        """The layout of a model's trained parameters."""
        named = dict(model.named_parameters())
        names = [n for n in named if is_trained(n, architecture)]
        shapes, sizes = [named[n].shape for n in names], [named[n].numel() for n in names]
        return cls(names, shapes, sizes)

    def flat(self, model: nn.Module) -> Float[Tensor, " n"]:
        """A model's trained parameters as one vector, copied."""
        named = dict(model.named_parameters())
        return torch.cat([named[name].detach().flatten() for name in self.names])

    def named(self, flat: Float[Tensor, " n"]) -> dict[str, Tensor]:
        """Name -> parameter, as views of one model's weights."""
        pieces = flat.split(self.sizes)
        return {n: p.view(s) for n, p, s in zip(self.names, pieces, self.shapes, strict=True)}

    def stacked(self, flat: Float[Tensor, "members n"]) -> dict[str, Tensor]:
        """Name -> [members …], copied to the CPU."""
        pieces = flat.detach().cpu().split(self.sizes, 1)
        return {
            name: piece.reshape(len(flat), *shape).contiguous()
            for name, piece, shape in zip(self.names, pieces, self.shapes, strict=True)
        }
