"""Losses of a circuit with frequencies taken away or kept; all in float64.

Sets of pairs: train, test and all. A loss is the mean of −log softmax(logits)[a + b mod p], nats.

1. key_frequencies  those whose removal from the logits raises the test loss (rule below).
2. restricted       only the constant and the waves cos, sin of w_k (a + b) of the key frequencies
                    are kept in the logits (Section 5.1); excluded: only these waves are removed.
3. formula          logits replaced by Σ_k α_k cos(w_k (a + b − c)), α fitted by least squares
                    (Section 4.2).
4. edits            the ablations of Section 4.4, in the logits and in the neurons.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import waves

SINGLE = 0.85  # a neuron is of one frequency where that explains more of its variance (Section 4.3)


@dataclass(frozen=True)
class Pairs:
    """Which inputs are trained on; row a·p + b is the pair (a, b)."""

    p: int
    train: Tensor  # bool [p²]

    @classmethod
    def of(cls, tokens: Tensor, p: int) -> "Pairs":
        """From the training sequences a, b, =: [pairs, 3]."""
        train = torch.zeros(p * p, dtype=torch.bool, device=tokens.device)
        train[tokens[:, 0] * p + tokens[:, 1]] = True
        return cls(p, train)

    def means(self, values: Tensor) -> dict[str, float]:
        """Mean over each set of values [p²]."""
        parts = {"train": values[self.train], "test": values[~self.train], "all": values}
        return {name: float(v.mean()) for name, v in parts.items()}

    @property
    def sums(self) -> Tensor:
        return waves.sums(self.p, self.train.device)


def nll(logits: Tensor, answer: Tensor) -> Tensor:
    """−log softmax(logits)[answer]: [n], from logits [n, p]."""
    return logits.logsumexp(1) - logits.gather(1, answer[:, None])[:, 0]


def right(logits: Tensor, answer: Tensor) -> Tensor:
    """1 where the largest logit is the answer's: [n], float64."""
    return (logits.argmax(1) == answer).double()


def losses(logits: Tensor, pairs: Pairs) -> dict[str, float]:
    """Loss on each set."""
    return pairs.means(nll(logits, pairs.sums))


def without_each(logits: Tensor, pairs: Pairs) -> dict[str, Tensor]:
    """Loss on each set when one frequency's waves of a + b are removed: set -> [K]."""
    _, parts = waves.waves_of_sum(logits, pairs.p)
    rows = [losses(logits - part[pairs.sums], pairs) for part in parts]
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def key_frequencies(logits: Tensor, pairs: Pairs, ratio: float) -> Tensor:
    """Bool [K]: a frequency is key where removing it makes the test loss at least `ratio` times
    as large. The paper has no numeric rule ("nontrivial coefficients" of W_L, Appendix C.2)."""
    full = losses(logits, pairs)["test"]
    return without_each(logits, pairs)["test"].to(logits.device) >= ratio * full


def restricted(logits: Tensor, pairs: Pairs, key: Tensor) -> dict[str, float]:
    """Loss on each set with only the constant and the key frequencies' waves of a + b."""
    constant, parts = waves.waves_of_sum(logits, pairs.p)
    by_sum = constant + parts[key].sum(0)  # logits that depend on the sum alone: [p sums, p]
    return pairs.means(nll(by_sum, torch.arange(pairs.p, device=by_sum.device))[pairs.sums])


def excluded(logits: Tensor, pairs: Pairs, key: Tensor) -> dict[str, float]:
    """Loss on each set without the key frequencies' waves of a + b."""
    _, parts = waves.waves_of_sum(logits, pairs.p)
    return losses(logits - parts[key].sum(0)[pairs.sums], pairs)


def coefficients(logits: Tensor, p: int) -> Tensor:
    """α_k of the least squares fit Σ_k α_k cos(w_k (a + b − c)) to logits [p², p]: [K].

    The K regressors are orthogonal and depend on d = a + b − c alone, so that
    α_k = 2/p Σ_d cos(w_k d) mean of the logits of this d.
    """
    n = torch.arange(p, device=logits.device)
    mean = waves.by_sum(logits, p)  # [sum, c]
    of_d = mean[n[:, None], (n[:, None] - n) % p].mean(0)  # [d], over the sums
    cosines = waves.basis(p, logits.device)[1::2] * (p / 2) ** 0.5
    return 2 / p * cosines @ of_d


def fit_quality(logits: Tensor, alpha: Tensor) -> float:
    """Share of the variance over all p³ logits that Σ_k α_k cos(w_k (a + b − c)) explains; alpha
    [K] are least squares coefficients, 0 for frequencies that are left out."""
    found = float((alpha**2).sum()) * logits.numel() / 2
    return found / float(((logits - logits.mean()) ** 2).sum())


def formula(alpha: Tensor, p: int) -> Tensor:
    """Σ_k α_k cos(w_k (s − c)) by sum: [p sums, p]."""
    n = torch.arange(p, device=alpha.device)
    of_d = alpha @ waves.basis(p, alpha.device)[1::2] * (p / 2) ** 0.5
    return of_d[(n[:, None] - n) % p]


def readout(W_L: Tensor, key: Tensor) -> Tensor:
    """u_k and v_k, the rows of W_L along cos and sin of w_k c: [K chosen, 2, d_mlp]."""
    B = waves.basis(len(W_L), W_L.device)
    return (B @ W_L)[1:].unflatten(0, (-1, 2))[key]


def readout_explained(neurons: Tensor, W_L: Tensor, key: Tensor) -> Tensor:
    """Share of the variance of u_k·MLP that cos(w_k (a + b)) explains, of v_k·MLP sin: [k, 2]
    (Table 1)."""
    p = len(W_L)
    found = torch.einsum("xn,kin->xki", neurons, readout(W_L, key))
    centred = found - found.mean(0)
    wave = waves.basis(p, neurons.device)[1:].unflatten(0, (-1, 2))[key]  # [k, 2, p]
    wave = wave[:, :, waves.sums(p, neurons.device)] / p**0.5  # unit vectors over the p² inputs
    return torch.einsum("xki,kix->ki", centred, wave) ** 2 / (centred**2).sum(0)


def edits(circuit, pairs: Pairs, key: Tensor) -> dict[str, Tensor]:
    """Logits [p², p] of each ablation of Section 4.4; `full` is the model as it is."""
    p, logits, neurons = pairs.p, circuit.logits, circuit.neurons
    constant, parts = waves.waves_of_sum(logits, p)
    wave = parts[key].sum(0)[pairs.sums]
    blocks = waves.plane_parts(logits, p, key[:, None].expand(-1, p))
    _, power, total = waves.plane_powers(neurons, p)
    share, best = (power / total.clamp(min=1e-300)).max(0)
    chosen = torch.arange(len(power), device=best.device)[:, None] == best
    polynomials = torch.where(share > SINGLE, waves.plane_parts(neurons, p, chosen), neurons)
    n_constant, n_parts = waves.waves_of_sum(neurons, p)
    span = torch.linalg.qr(readout(circuit.W_L, key).flatten(0, 1).T)[0]  # [d_mlp, 2 k]
    inside = neurons @ span @ span.T
    return {
        "full": logits,
        "restricted": constant[pairs.sums] + wave,
        "excluded": logits - wave,
        "blocks": blocks,
        "without_blocks": logits - blocks + logits.mean(0),
        "formula": formula(coefficients(logits, p) * key, p)[pairs.sums],
        "polynomials": circuit.read(polynomials),
        "neuron_waves": circuit.read((n_constant + n_parts[key].sum(0))[pairs.sums]),
        "directions": circuit.read(inside),
        "nullspace": circuit.read(neurons - inside),
    }
