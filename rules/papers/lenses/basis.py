"""Causal bases of the lenses of a model, and random directions beside them. [torch]"""

from functools import partial
from typing import Annotated

import pandas as pd
import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.latents.causal_basis import causal_basis, influences
from pipeline.models import lens, splice
from pipeline.spec.base import Name, Section
from pipeline.weights.batches import seeded


class Options(Section):
    """How many directions, of which models and layers, and from how many held-out tokens."""

    models: dict[Name, Annotated[int, Field(ge=1)]] = Field(
        min_length=1, description="model -> a basis for each so-many-th of its translators"
    )
    k: int = Field(default=16, ge=1, description="directions a layer")
    n_blocks: int = Field(default=8, ge=1, description="held-out blocks")
    max_iter: int = Field(default=30, ge=1, description="L-BFGS iterations a direction and start")
    n_starts: int = Field(
        default=6, ge=1, description="searches a direction, the best of which counts"
    )
    seed: int = Field(default=0, ge=0, description="of the random directions")


def of_model(
    hf: nn.Module, lenses: dict[str, lens.Lens], layers: list[int], tokens: Tensor, skip: int,
    options: Options, seed: int,
) -> pd.DataFrame:  # fmt: skip
    """One row per lens, layer, kind (causal or random) and direction.

    Args:
        tokens: [blocks pos]; directions are found on the first half and measured on the second.
        seed: of the translators; random directions follow it.
    """
    half = max(len(tokens) // 2, 1)
    frames = []
    for layer in layers:
        hook = f"blocks.{layer}.hook_resid_pre"
        with torch.no_grad():
            x = splice.stream(hf, hook, tokens[:half])[:, skip:].flatten(0, 1)
        k = min(options.k, x.shape[-1])
        generator = torch.Generator().manual_seed(seeded(options.seed + seed, layer))
        noise = torch.randn(x.shape[-1], k, generator=generator)
        chance = torch.linalg.qr(noise)[0].T.to(x)
        for name, lens_ in lenses.items():
            read = partial(lens_, layer)
            causal = causal_basis(read, x, k, options.max_iter, options.n_starts)
            kinds = {"causal": causal, "random": chance}
            for kind, directions in kinds.items():
                rows = influences(hf, read, layer, tokens[-half:], skip, directions)
                frames.append(rows.assign(lens=name, layer=layer, kind=kind))
    return pd.concat(frames, ignore_index=True)
