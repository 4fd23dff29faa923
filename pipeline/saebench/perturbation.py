"""Targeted probe perturbation: what ablating a label's latents does to all probes. [torch]

SAEBench 0.6.0's TPP (Karvonen et al. 2025, 2503.09532, Section 3.6), on texts' means:

1. A probe of each label is fitted on the means of the stream: the regression of probes.py, where
   SAEBench keeps the epoch that is best on the test texts.
2. The effect of latent j on label c is max(mean f_j of texts of c - mean f_j of others, 0) times
   the probe's direction along the decoder's row, w_c . d_j. Its n largest are ablated.
3. A text's mean without them is x - sum_j f_j d_j, since decoding is linear: the error of the
   reconstruction stays, and no forward pass is needed. SAEBench ablates masked rows of zeros, too,
   so that its scores depend on the padding wherever a latent fires on zero; a test shows it.
4. The score of a label is the accuracy that its own probe loses, less the mean of what the others
   lose; that of a dictionary the mean over labels.

Texts of other labels are drawn anew for every accuracy, in SAEBench's order, and the draws move the
scores: their spread over seeds stands beside every one.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pipeline.errors import RetraceError
from pipeline.saebench.probes import accuracy, drawn, fitted

ByLabel = dict[str, Tensor]  # label -> [texts width]


def probes_of(x: ByLabel, generator: torch.Generator) -> dict[str, np.ndarray]:
    """Label -> weights and, last, intercept of its probe."""
    out = {}
    for label in x:
        texts, y = drawn(x, label, generator)
        out[label] = fitted(texts.numpy(), y.numpy())
    return out


def accuracies(
    weights: dict[str, np.ndarray], x: ByLabel, generator: torch.Generator
) -> dict[str, float]:
    """Label -> share of its texts and as many others on whose side of its probe they are."""
    out = {}
    for label in weights:
        texts, y = drawn(x, label, generator)
        out[label] = accuracy(texts.numpy(), y.numpy(), weights[label])
    return out


def effect(
    f: ByLabel,
    label: str,
    direction: Float[Tensor, " d"],
    W_dec: Float[Tensor, "d_sae d"],
    generator: torch.Generator,
) -> Float[Tensor, " d_sae"]:
    """What each latent contributes to a label's probe on its texts, beyond that on others."""
    texts, y = drawn(f, label, generator)
    more = (texts[y == 1].mean(0) - texts[y == 0].mean(0)).clamp(min=0)
    return more * (W_dec @ direction)


def strongest(effects: Float[Tensor, " d_sae"], n: int) -> Bool[Tensor, " d_sae"]:
    """The n latents of largest effect, of those that have one."""
    taken = effects.topk(min(n, int(effects.count_nonzero()))).indices
    return torch.zeros_like(effects, dtype=torch.bool).index_fill(0, taken, True)


def perturbed(
    weights: dict[str, np.ndarray],
    train: ByLabel,
    test: tuple[ByLabel, ByLabel],
    W_dec: Float[Tensor, "d_sae d"],
    ns: Iterable[int],
    generator: torch.Generator,
) -> list[dict[str, Any]]:
    """A row for each label and number of latents that are ablated for it.

    Args:
        weights: of each label's probe.
        train: latents of the texts that choose what is ablated.
        test: rows and latents of the texts that judge.
    """
    x, f = test
    clean = accuracies(weights, x, generator)
    effects = {
        label: effect(train, label, torch.from_numpy(w[:-1]).to(W_dec), W_dec, generator)
        for label, w in weights.items()
    }
    out = []
    for label in weights:
        for n in ns:
            gone = strongest(effects[label], n)
            without = {name: x[name] - f[name][:, gone] @ W_dec[gone] for name in x}
            after = accuracies(weights, without, generator)
            lost = {name: clean[name] - after[name] for name in clean}
            others = float(np.mean([lost[name] for name in lost if name != label]))
            out.append(
                {"k": n, "label": label, "accuracy": after[label], "intended": lost[label],
                 "unintended": others, "tpp": lost[label] - others}
            )  # fmt: skip
    return out


def rows(
    train: tuple[ByLabel, ByLabel],
    test: tuple[ByLabel, ByLabel],
    W_dec: Float[Tensor, "d_sae d"],
    ns: list[int],
    seeds: Iterable[int],
) -> list[dict[str, Any]]:
    """The rows of `perturbed` for each seed of the draws, probes fitted anew.

    Args:
        train, test: rows of the stream and latents.

    Raises:
        RetraceError: more latents are to be ablated than there are.
    """
    if max(ns) > len(W_dec):
        raise RetraceError(f"benchmarks.tpp: {max(ns)} of {len(W_dec)} latents; lower it")
    out = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        weights = probes_of(train[0], generator)
        found = perturbed(weights, train[1], test, W_dec, ns, generator)
        out += [{"seed": seed} | row for row in found]
    return out
