"""How many bits a probe needs to send the labels: the online code of Voita & Titov (2020). [torch]

Sender and receiver know the activations. The rows are sent in portions that about double: the first
by a uniform code, each further one by the probe that was trained on all before it. A label that the
activations make easy costs few bits in the early portions already; a control task, which a large
probe can memorise, does not. Codelengths therefore tell effort apart where accuracies do not.

    L = n_1 log2 C - sum_i log2 p_i(labels of portion i + 1),    p_i trained on portions 1 .. i

A probe that saw n rows is mixed with the uniform code at weight 1 / (n + 1), so that a class that
it never saw costs finitely many bits.
"""

import math
from itertools import pairwise

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from pipeline.probes import logistic
from pipeline.probes.logistic import Tasks

# Of all rows, where a portion ends (Voita & Titov 2020, section 2.2.2), in percent.
PORTIONS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.25, 12.5, 25, 50, 100)
LEAST = 32  # rows of the first portion


def ends(n: int) -> list[int]:
    """Rows behind which a portion ends, ascending; the last is n."""
    found = sorted({max(1, round(n * p / 100)) for p in PORTIONS})
    return [e for e in found if e >= LEAST or e == n] or [n]


def online(
    X: Float[Tensor, "layers rows dims"], tasks: Tasks, l2: float
) -> Float64[Tensor, "layers tasks"]:
    """Bits of the online code.

    Args:
        X: standardised rows, in the order in which they are sent.
        tasks: rows without a label are not sent.
    """
    stops = ends(X.shape[1])
    sizes = torch.tensor(tasks.n_classes, dtype=torch.float64, device=X.device)
    known = (tasks.codes >= 0).double()
    bits = (known[:, : stops[0]].sum(1) * sizes.log2()).repeat(len(X), 1)
    W = None
    for start, stop in pairwise(stops):
        # 1e-5 nats a row is far below what a portion costs
        W = logistic.fit(X[:, :start], tasks.rows(slice(start)), l2, W, tolerance=1e-5).W
        here = tasks.rows(slice(start, stop))
        z = logistic.logits(X[:, start:stop], W, tasks.n_classes)
        p = torch.exp(-logistic.losses(z, here).double())  # [L n P]
        seen = known[:, :start].sum(1)
        p = (seen * p + 1 / sizes) / (seen + 1)
        bits -= (p.log2() * known[:, start:stop].T).sum(1)
    return bits


def uniform(tasks: Tasks) -> Float64[Tensor, " tasks"]:
    """Bits of the uniform code."""
    known = (tasks.codes >= 0).sum(1).double().cpu()
    return known * torch.tensor([math.log2(c) for c in tasks.n_classes], dtype=torch.float64)
