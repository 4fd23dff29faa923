"""Causal basis extraction: directions that a lens reads, and whether the model uses them. [torch]

Belrose et al. (2023), Section 4, and the released package (tuned_lens/causal/subspaces.py). With
r(x, v) = x + v v^T (mean - x), which sets x along v to its mean over the sample (mean ablation):

1. The influence of a unit direction v on f is E[KL(f(x) || f(r(x, v)))]. Direction i maximises the
   influence on the lens among those orthogonal to the first i - 1: L-BFGS on the sphere, from
   the singular vectors of the lens's map into the vocabulary.
2. The same directions are ablated in the model at the same place, and the influence on its
   prediction is taken.
3. Stimulus-response alignment: the cosine between what ablation changes in the lens's and in the
   model's log-probabilities, in Aitchison geometry with the model's probabilities as weights.
4. Control: random orthonormal directions through 1's measure, 2 and 3.
"""

from collections.abc import Callable
from typing import Annotated

import pandas as pd
import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline import lens, splice
from pipeline.spec_base import Name, Section
from pipeline.training_data import seeded


class Options(Section):
    """How many directions, of which models and layers, and from how many held-out tokens."""

    models: dict[Name, Annotated[int, Field(ge=1)]] = Field(
        min_length=1, description="model -> a basis for each so-many-th of its translators"
    )
    k: int = Field(default=16, ge=1, description="directions a layer")
    n_blocks: int = Field(default=8, ge=1, description="held-out blocks")
    max_iter: int = Field(default=30, ge=1, description="L-BFGS iterations a direction")
    seed: int = Field(default=0, ge=0, description="of the random directions")


def ablated(x: Tensor, v: Tensor, mean: Tensor) -> Tensor:
    """r(x, v): x [… d_model] with its part along the unit vector v set to the mean's."""
    return x + ((mean - x) @ v)[..., None] * v


def start(read: Callable[[Tensor], Tensor], mean: Tensor, k: int) -> Tensor:
    """The k directions that the lens's logits, linearised at the mean, depend on most: [k d_model].

    Args:
        read: x [… d_model] -> logits.
        mean: [d_model].
    """
    J = torch.func.jacfwd(read)(mean)  # [d_vocab d_model]
    J = J - J.mean(0)  # the softmax does not see what all logits share
    return torch.linalg.eigh(J.T @ J)[1].T.flip(0)[:k]


def direction(influence: Callable[[Tensor], Tensor], v: Tensor, found: Tensor, n: int) -> Tensor:
    """The unit vector of largest influence, orthogonal to the rows of `found` [i d_model].

    Args:
        influence: unit vector -> scalar.
        v: where the search starts, [d_model].
        n: iterations of L-BFGS, at most.
    """

    def unit(t: Tensor) -> Tensor:
        t = t - found.T @ (found @ t)
        return t / t.norm().clamp(min=1e-12)

    v = unit(v).clone().requires_grad_(True)
    search = torch.optim.LBFGS([v], max_iter=n, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        loss = -influence(unit(v))
        loss.backward()
        return loss

    search.step(closure)
    return unit(unit(v.detach()))  # twice: once leaves rounding along `found`


def causal_basis(
    read: Callable[[Tensor], Tensor], x: Tensor, first: Tensor, max_iter: int
) -> Tensor:
    """Orthonormal directions in the order of their extraction, [k d_model].

    Args:
        read: x [tokens d_model] -> logits.
        first: [k d_model], where each search starts.
    """
    mean = x.mean(0)
    with torch.no_grad():
        log_p = read(x).log_softmax(-1)

    def influence(v: Tensor) -> Tensor:
        return lens.kl(log_p, read(ablated(x, v, mean)).log_softmax(-1)).mean()

    found = first[:0]
    for v in first:
        found = torch.cat([found, direction(influence, v, found, max_iter)[None]])
    return found


def aitchison(a: Tensor, b: Tensor, p: Tensor) -> Tensor:
    """Cosine of two changes of log-probabilities with weights p, all [tokens d_vocab]: [tokens].

    Each is taken from its mean under p: a change that is the same for all tokens is none.
    """
    a, b = (t - (p * t).sum(-1, keepdim=True) for t in (a, b))
    inner = lambda s, t: (p * s * t).sum(-1)  # noqa: E731
    return inner(a, b) / (inner(a, a) * inner(b, b)).sqrt().clamp(min=1e-30)


@torch.no_grad()
def influences(
    hf: nn.Module, read: Callable[[Tensor], Tensor], layer: int, tokens: Tensor, skip: int,
    directions: Tensor,
) -> pd.DataFrame:  # fmt: skip
    """One row a direction: rank, influence_lens and influence_model in nats, alignment.

    Args:
        tokens: [blocks pos]; positions below `skip` are neither ablated nor counted.
        directions: [k d_model].
    """
    flat = lambda t: t[:, skip:].flatten(0, 1)  # noqa: E731
    hook = f"blocks.{layer}.hook_resid_pre"
    x = splice.stream(hf, hook, tokens)
    mean = flat(x).mean(0)
    own = flat(splice.resume(hf, hook, tokens, x)).log_softmax(-1)
    seen = read(flat(x)).log_softmax(-1)
    rows = []
    for rank, v in enumerate(directions):
        new = torch.cat([x[:, :skip], ablated(x[:, skip:], v, mean)], 1)
        stimulus = read(flat(new)).log_softmax(-1)
        response = flat(splice.resume(hf, hook, tokens, new)).log_softmax(-1)
        rows.append(
            {
                "rank": rank,
                "influence_lens": float(lens.kl(seen, stimulus).mean()),
                "influence_model": float(lens.kl(own, response).mean()),
                "alignment": float(aitchison(stimulus - seen, response - own, own.exp()).mean()),
            }
        )
    return pd.DataFrame(rows)


def of_model(
    hf: nn.Module, lenses: dict[str, lens.Lens], layers: list[int], tokens: Tensor, skip: int,
    options: Options,
) -> pd.DataFrame:  # fmt: skip
    """One row a lens, layer, kind (causal or random) and direction.

    Args:
        tokens: [blocks pos]; directions are found on the first half and measured on the second.
    """
    half = max(len(tokens) // 2, 1)
    frames = []
    for layer in layers:
        hook = f"blocks.{layer}.hook_resid_pre"
        with torch.no_grad():
            x = splice.stream(hf, hook, tokens[:half])[:, skip:].flatten(0, 1)
        k = min(options.k, x.shape[-1])
        generator = torch.Generator().manual_seed(seeded(options.seed, layer))
        noise = torch.randn(x.shape[-1], k, generator=generator)
        chance = torch.linalg.qr(noise)[0].T.to(x)
        for name, lens_ in lenses.items():
            read = lambda t, lens_=lens_, layer=layer: lens_(layer, t)  # noqa: E731
            first = start(read, x.mean(0), k)
            kinds = {"causal": causal_basis(read, x, first, options.max_iter), "random": chance}
            for kind, directions in kinds.items():
                rows = influences(hf, read, layer, tokens[-half:], skip, directions)
                frames.append(rows.assign(lens=name, layer=layer, kind=kind))
    return pd.concat(frames, ignore_index=True)
