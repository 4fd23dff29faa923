"""What a training changed in the weights of a model: how much, and in how many directions. [torch]

A change W' - W has singular values s. Its effective rank is the participation ratio of their
squares, (sum s^2)^2 / sum s^4: 1 for one direction, k for k equal ones. Beside it stands that of a
random matrix of the same shape.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


def spectrum(change: Float[Tensor, "rows columns"]) -> dict[str, float]:
    """Share of the squared norm in the first singular direction (top), and the effective rank.

    Both are 0 where nothing changed.
    """
    power = torch.linalg.svdvals(change.double()).square()
    total, fourth = power.sum(), power.square().sum()
    if not total:
        return {"top": 0.0, "rank": 0.0}
    return {"top": float(power[0] / total), "rank": float(total.square() / fourth)}


def changes(
    before: nn.Module, after: nn.Module, inside: str = ".layers.", seed: int = 0
) -> Iterator[dict[str, Any]]:
    """A row for each matrix of the layers: size, the change over its norm, and `spectrum`.

    Args:
        inside: what stands in the names of the layers' parameters, before a layer's number.
        seed: of the random matrices.
    """
    old, draw = before.state_dict(), torch.Generator().manual_seed(seed)
    for name, w in after.state_dict().items():
        if w.dim() == 2 and inside in name:
            change = (w - old[name]).float().cpu()
            null = spectrum(torch.randn(change.shape, generator=draw))
            layer = int(name.split(inside)[1].split(".")[0])
            size = float(change.norm() / old[name].float().norm())
            yield {"matrix": name, "layer": layer, "size": size, **spectrum(change),
                   "random_top": null["top"], "random_rank": null["rank"]}  # fmt: skip
