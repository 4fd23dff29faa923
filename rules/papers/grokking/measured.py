"""Rows of the tables of stage `fourier`, each from one circuit; the measures stand in waves.py and
ablations.py. Frequencies count from 1."""

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from . import ablations, circuit, waves


def array(t: Tensor) -> np.ndarray:
    return t.cpu().numpy()


def explained(c: circuit.Circuit) -> tuple[Tensor, Tensor]:
    """Share of each neuron's variance that its best frequency explains, and that frequency's index:
    [d_mlp] each; share 0 for a neuron that is constant."""
    _, power, total = waves.plane_powers(c.neurons, c.p)
    return (power / total.clamp(min=1e-300)).max(0)


def progress(c: circuit.Circuit, pairs: ablations.Pairs, key: Tensor) -> dict[str, float]:
    """One row of `progress`: losses in nats, shares, and Σ w² of all weights.

    sum_only: all frequencies' waves of a + b are kept, key or not. It averages over the pairs of a
    sum, trained ones among them: what a model that memorised them gets by this alone.
    explained: by the formula with key frequencies; explained_any: with all frequencies.
    gini_W_E and gini_W_L are of the norms of the p Fourier components.
    """
    logits, every = c.logits, torch.ones_like(key)
    alpha, (share, _) = ablations.coefficients(logits, c.p), explained(c)
    plain = {"loss": ablations.losses(logits, pairs)}
    plain["accuracy"] = pairs.means(ablations.right(logits, pairs.sums))
    edited = {
        "restricted": ablations.restricted(logits, pairs, key),
        "excluded": ablations.excluded(logits, pairs, key),
        "sum_only": ablations.restricted(logits, pairs, every),
    }
    return {
        **{f"{s}_{what}": value for what, found in plain.items() for s, value in found.items()},
        **{f"{what}_{s}": value for what, found in edited.items() for s, value in found.items()},
        "explained": ablations.fit_quality(logits, alpha * key),
        "explained_any": ablations.fit_quality(logits, alpha),
        "single": float((share > ablations.SINGLE).double().mean()),
        "gini_W_E": waves.gini(waves.component_norms(c.W_E)),
        "gini_W_L": waves.gini(waves.component_norms(c.W_L)),
        "sum_squares": c.sum_squares,
    }


def spectrum(c: circuit.Circuit) -> pd.DataFrame:
    """Norm of each frequency in W_E, the neurons (eight components, centred) and W_L."""
    _, power, _ = waves.plane_powers(c.neurons, c.p)
    norms = {
        "W_E": waves.frequency_norms(c.W_E),
        "neurons": power.sum(1).sqrt() / c.p,  # root mean square over the p² inputs
        "W_L": waves.frequency_norms(c.W_L),
    }
    frames = [
        pd.DataFrame({"part": part, "frequency": np.arange(1, len(n) + 1), "norm": array(n)})
        for part, n in norms.items()
    ]
    return pd.concat(frames, ignore_index=True).astype({"norm": np.float32})


def frequencies(c: circuit.Circuit, pairs: ablations.Pairs, key: Tensor) -> pd.DataFrame:
    """One row per frequency: whether it is key, loss without it, norms, neurons, readout.

    without_test, without_train: loss when its waves of a + b are removed from the logits.
    alpha: coefficient of cos(w_k (a + b − c)). neurons: of which it explains more than 85 %.
    readout_cos, readout_sin: Table 1's shares, for all frequencies.
    """
    logits = c.logits
    without = ablations.without_each(logits, pairs)
    share, best = explained(c)
    readout = ablations.readout_explained(c.neurons, c.W_L, torch.ones_like(key))
    columns = {
        "without_test": without["test"],
        "without_train": without["train"],
        "alpha": ablations.coefficients(logits, c.p),
        "norm_W_E": waves.frequency_norms(c.W_E),
        "norm_W_L": waves.frequency_norms(c.W_L),
        "neurons": torch.bincount(best[share > ablations.SINGLE], minlength=len(key)),
        "readout_cos": readout[:, 0],
        "readout_sin": readout[:, 1],
    }
    known = {"frequency": np.arange(1, len(key) + 1), "key": array(key)}
    known["full_test"] = ablations.losses(logits, pairs)["test"]
    return pd.DataFrame(known | {name: array(values) for name, values in columns.items()})


def neurons(c: circuit.Circuit) -> pd.DataFrame:
    """One row per neuron: its best frequency, and the share of its variance that this explains."""
    share, best = explained(c)
    columns = {"neuron": np.arange(len(best)), "frequency": array(best) + 1, "share": array(share)}
    return pd.DataFrame(columns).astype({"share": np.float32})


def edits(c: circuit.Circuit, pairs: ablations.Pairs, key: Tensor) -> pd.DataFrame:
    """One row per ablation and set: loss and accuracy; residual_W_L is the norm of W_L outside the
    key frequencies over the norm of W_L."""
    rows = []
    for edit, logits in ablations.edits(c, pairs, key).items():
        loss = ablations.losses(logits, pairs)
        accuracy = pairs.means(ablations.right(logits, pairs.sums))
        rows += [{"edit": edit, "set": s, "loss": loss[s], "accuracy": accuracy[s]} for s in loss]
    kept = float((waves.frequency_norms(c.W_L)[key] ** 2).sum())
    residual = max(0.0, 1 - kept / float((c.W_L**2).sum())) ** 0.5
    return pd.DataFrame(rows).assign(residual_W_L=residual)


def circle(c: circuit.Circuit, pairs: ablations.Pairs, key: Tensor) -> pd.DataFrame:
    """Points on the plane of each key frequency, from weights of this checkpoint alone.

    part `number`: the embedding of n against the directions along which the other numbers' cos and
    sin of w_k m lie. n itself is left out: with p ≤ d_model even a random embedding would lie on
    the circle that it draws itself.
    part `sum`: u_k·MLP(a, b) and v_k·MLP(a, b) over the norm of u_k and v_k, centred over all
    inputs, for one pair of the test set for each sum; `value` is the sum.
    """
    chosen = torch.nonzero(key)[:, 0]
    B = waves.basis(c.p, c.W_E.device)
    centred = c.W_E - c.W_E.mean(0)
    inputs = held_out(pairs)
    u = ablations.readout(c.W_L, key)
    u = u / u.norm(dim=-1, keepdim=True)
    seen = torch.einsum("xn,kin->xki", c.neurons - c.neurons.mean(0), u)[inputs]
    frames = []
    for place, k in enumerate(chosen.tolist()):
        wave = B[2 * k + 1 : 2 * k + 3]  # [2, p]
        others = (wave @ centred)[None] - wave.T[:, :, None] * centred[:, None]  # [p, 2, d_model]
        number = torch.einsum("nid,nd->ni", others / others.norm(dim=-1, keepdim=True), centred)
        for part, xy in (("number", number), ("sum", seen[:, place])):
            columns = {"part": part, "frequency": k + 1, "value": np.arange(c.p)}
            columns |= {"x": array(xy[:, 0]), "y": array(xy[:, 1])}
            frames.append(pd.DataFrame(columns))
    if not frames:
        return pd.DataFrame(columns=["part", "frequency", "value", "x", "y"])
    return pd.concat(frames, ignore_index=True).astype({"x": np.float32, "y": np.float32})


def held_out(pairs: ablations.Pairs) -> Tensor:
    """One input of the test set for each sum, spread over a: [p]."""
    p, test = pairs.p, ~pairs.train
    out = []
    for s in range(p):
        a = (torch.arange(p, device=test.device) + 7 * s) % p
        row = a * p + (s - a) % p
        free = row[test[row]]
        out.append(free[0] if len(free) else row[0])
    return torch.stack(out)
