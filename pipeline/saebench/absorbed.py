"""Feature absorption: where a latent of a letter is silent, and others carry the letter. [torch]

Chanin et al. 2024 (2409.14507), as SAEBench 0.6.0 measures it:

1. A linear probe on the stream finds the direction of a letter.
2. `split` finds the latents that stand for the letter: those of largest weight in an L1 probe on
   all latents, one more as long as it adds JUMP to the F1 of a probe on them.
3. `absorption`: on words whose letter the probe sees, how much of the stream's projection on the
   probe comes from other latents that point along it. It is full absorption if the letter's latents
   are silent and one other latent carries most.

Step 3 is SAEBench's calculation number by number (a test) where decoder rows have norm 1; it leaves
the norms out, and here an activation counts with that of its row. Its linear probe is trained by
Adam for some epochs; here it is the optimum of a regression, on rows of a mean norm of sqrt(d).
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.saebench import probes

# SAEBench 0.6.0, feature_absorption.py
FULL_COSINE, COSINE, SHARE, MOST = 0.025, 0.1, 0.4, 3
SILENT = 1e-8
# its AbsorptionEvalConfig
EPOCHS, RATES, L1, DECAY = 50, (1e-2, 1e-5), 0.01, 1e-6
BATCHES = 8  # an epoch: about as many as its batches of 4,096 make of a vocabulary of words


class Absorbed(NamedTuple):
    """Of each word, [words]: the share that other latents carry, and whether it is full."""

    fraction: np.ndarray
    full: np.ndarray


@torch.no_grad()
def absorption(
    x: Float[Tensor, "words d_in"],
    f: Float[Tensor, "words d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
    probe: Float[Tensor, " d_in"],
    main: list[int],
) -> Absorbed:
    """How far the latents of a letter are replaced by others on each word.

    Args:
        x, f: rows and latents of words whose letter the probe sees.
        probe: its direction, of any length.
        main: the letter's latents.
    """
    unit = probe / probe.norm()
    cosine = torch.nn.functional.cosine_similarity(unit, W_dec, dim=-1)
    along, total = f * (W_dec @ unit), x @ unit
    own = along[:, main].sum(1)
    others = along.clone()
    others[:, main] = 0
    others = torch.where((cosine >= COSINE) & (others > 0), others, 0)
    carried = others.topk(min(MOST, others.shape[1])).values.sum(1)
    part = torch.minimum(carried, total - own)
    fraction = (part / (part + own)).clamp(0, 1)
    fraction = torch.where(own <= 0, torch.ones_like(own), fraction)
    nothing = (own >= total) | (carried / total < SHARE)
    best = along.argmax(1)
    full = (f[:, main] < SILENT).all(1) & (cosine[best] >= FULL_COSINE) & (total >= 0)
    full &= along.gather(1, best[:, None])[:, 0] / total >= SHARE
    return Absorbed(torch.where(nothing, 0, fraction).cpu().numpy(), full.cpu().numpy())


def l1_weights(
    f: Float[Tensor, "words d_sae"], y: Float[Tensor, "words letters"], seed: int
) -> Float[Tensor, "letters d_sae"]:
    """Weights of a probe on all latents for all letters, with an L1 penalty, by Adam."""
    draw = torch.Generator().manual_seed(seed)
    bound = f.shape[1] ** -0.5  # of nn.Linear
    W = ((torch.rand(y.shape[1], f.shape[1], generator=draw) * 2 - 1) * bound).to(f)
    b = torch.zeros(y.shape[1]).to(f)
    with torch.enable_grad():
        parameters = [W.requires_grad_(), b.requires_grad_()]
        adam = torch.optim.Adam(parameters, lr=RATES[0], weight_decay=DECAY)
        slower = torch.optim.lr_scheduler.ExponentialLR(adam, (RATES[1] / RATES[0]) ** (1 / EPOCHS))
        weight = (len(y) - y.sum(0)) / y.sum(0)
        loss_of = torch.nn.BCEWithLogitsLoss(pos_weight=weight)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(f), generator=draw).tensor_split(BATCHES):
                adam.zero_grad()
                loss = loss_of(f[rows] @ W.T + b, y[rows]) + L1 * W.abs().sum(1).mean()
                loss.backward()
                adam.step()
            slower.step()
    return W.detach()


def f1(y: np.ndarray, said: np.ndarray) -> float:
    """Harmonic mean of precision and recall; 0 where nothing is found."""
    hits = float((said & (y == 1)).sum())
    return 2 * hits / (said.sum() + (y == 1).sum()) if hits else 0.0


def scored(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Scores of a probe of `probes.fitted`."""
    return x @ weights[:-1] + weights[-1]


def split(
    train: tuple[Tensor, np.ndarray], test: tuple[Tensor, np.ndarray], ranked: Tensor, most: int,
    jump: float,
) -> tuple[list[int], float]:  # fmt: skip
    """The latents that stand for a letter, and the F1 of a probe on them.

    Args:
        train, test: latents [words d_sae], and whether each word has the letter.
        ranked: the letter's weights of `l1_weights`.
        most: latents at most.
        jump: what one more must add to F1.
    """
    best, found = -np.inf, []
    for k in range(1, min(most, len(ranked)) + 1):
        ids = ranked.topk(k).indices
        probe = probes.fitted(train[0][:, ids].cpu().numpy(), train[1], balanced=True)
        score = f1(test[1], scored(test[0][:, ids].cpu().numpy(), probe) > 0)
        if score <= best + jump:
            break
        best, found = score, ids.tolist()
    return found, best
