"""Heads by themselves: their weights as circuits, and what their attention looks at. [torch]

Weights, in the notation of Elhage et al. 2021, columns as vectors: W_QK = W_Qᵀ W_K, W_OV = W_O W_V.

1. `heads` takes the matrices of every head out of the state dict of a native model, layer norm's
   gain and centring folded into what reads the stream (its division by the norm is left out, as it
   only scales).
2. `ov_eigenvalues`: of W_U W_OV W_E, whether attending to a token raises it ("Detecting Copying").
   `qk_eigenvalues`: of W_Eᵀ W_QK W_E, or with an earlier head h of W_Eᵀ W_QK W_OV(h) W_E, whether
   tokens attend to those after their equals ("Checking the Mechanistic Theory").
3. `composition`: how much of what an earlier head writes a later one reads as query, key or value
   ("Analyzing a Two-Layer Model"), against random matrices of the same shapes.

These matrices are vocabulary × vocabulary, of rank d_head at most. A B and B A have the same
eigenvalues other than 0, so each set is computed from a d_head × d_head matrix.

Attention, on `repeated` random segments (Olsson et al. 2022, Model Analysis, "Head activation
evaluators"):

4. `prefix_matching` and `previous_token` score the patterns of a layer's heads; `by_place` says
   what a head looks at instead.

Both, on a task of prompts in pairs (Wang et al. 2022, Sec. 3):

5. `attention_between`: attention of every head from one named position to another.
6. `ov`: what a head writes where it sees one stream alone; `copy_scores`: whether a head that
   looked at a token would write that token, or write against it.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.models.pairs import Task

KINDS = ("Q", "K", "V")
TOP = 5  # a copied token is among so many of the largest logits (Wang et al. 2022, Sec. 3.2)
DRAWS = 50  # random heads of the baseline
OFFSETS = tuple(range(-3, 4))  # places after the earlier occurrence; 1 is prefix matching
LAGS = tuple(range(9))  # places before the present token; 1 is previous-token attention


class Head(NamedTuple):
    """W_Q, W_K, W_V: [d_head d_model]; W_O: [d_model d_head]."""

    W_Q: np.ndarray
    W_K: np.ndarray
    W_V: np.ndarray
    W_O: np.ndarray

    @property
    def qk(self) -> np.ndarray:
        """W_QK, [d_model d_model], queries from the left."""
        return self.W_Q.T @ self.W_K

    @property
    def ov(self) -> np.ndarray:
        """W_OV, [d_model d_model]."""
        return self.W_O @ self.W_V


def reading(weight: np.ndarray, gain: np.ndarray | None) -> np.ndarray:
    """A matrix [… d_model] that reads ln(x), as one that reads x up to the norm's scale."""
    if gain is None:
        return weight
    weight = weight * gain
    return weight - weight.mean(-1, keepdims=True)  # what is read of x minus its mean


def heads(state: Mapping[str, np.ndarray], n_layers: int, n_heads: int) -> list[list[Head]]:
    """The heads of every layer of one member's state dict."""
    out = []
    for i in range(n_layers):
        at = f"model.layers.{i}"
        gain = state.get(f"{at}.ln1.weight")
        q, k, v = (
            np.split(reading(state[f"{at}.attn.{m}.weight"], gain).astype(float), n_heads)
            for m in "qkv"
        )
        o = np.split(state[f"{at}.attn.o.weight"].astype(float), n_heads, axis=1)
        out.append([Head(*parts) for parts in zip(q, k, v, o, strict=True)])
    return out


def embeddings(state: Mapping[str, np.ndarray], n_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """W_E and W_U of the first n_tokens tokens, [n_tokens d_model] each."""
    W_U = reading(state["model.head.weight"], state.get("model.ln_out.weight"))
    W_E = state["model.tok_embed.weight"]
    return W_E[:n_tokens].astype(float), W_U[:n_tokens].astype(float)


def ov_eigenvalues(head: Head, W_E: np.ndarray, W_U: np.ndarray) -> np.ndarray:
    """Eigenvalues [d_head], complex, of W_U W_OV W_E: the full OV circuit, token to logits."""
    return np.linalg.eigvals(head.W_V @ (W_E.T @ W_U) @ head.W_O)


def qk_eigenvalues(head: Head, W_E: np.ndarray, earlier: Head | None = None) -> np.ndarray:
    """Eigenvalues [d_head], complex, of the QK circuit from query token to key token.

    Args:
        earlier: the key is what this head of an earlier layer writes about the token that it
            attends to: the term Id ⊗ A ⊗ W of K-composition.
    """
    written = W_E.T if earlier is None else earlier.ov @ W_E.T
    return np.linalg.eigvals(head.W_K @ written @ W_E @ head.W_Q.T)


def positivity(eigenvalues: np.ndarray) -> float:
    """Σ λ / Σ |λ|, from -1 to 1: 1 where all are positive ("Detecting Copying")."""
    return float(eigenvalues.sum().real / np.abs(eigenvalues).sum())


def composition(earlier: Head, later: Head) -> dict[str, float]:
    """Q-, K- and V-composition: ‖W_QKᵀ W_OV‖ / (‖W_QK‖ ‖W_OV‖) and its like, Frobenius norms."""
    norm = np.linalg.norm
    read = {"Q": later.qk.T, "K": later.qk, "V": later.ov}
    return {
        kind: float(norm(matrix @ earlier.ov) / (norm(matrix) * norm(earlier.ov)))
        for kind, matrix in read.items()
    }


def baseline(d_model: int, d_head: int, rng: np.random.Generator) -> dict[str, tuple[float, float]]:
    """Kind -> mean and standard deviation of composition between heads of normal numbers."""
    shapes = ((d_head, d_model),) * 3 + ((d_model, d_head),)
    drawn = [
        composition(*(Head(*(rng.standard_normal(s) for s in shapes)) for _ in range(2)))
        for _ in range(DRAWS)
    ]
    values = {kind: np.array([d[kind] for d in drawn]) for kind in KINDS}
    return {kind: (float(v.mean()), float(v.std(ddof=1))) for kind, v in values.items()}


# --- attention ----------------------------------------------------------------------------


def repeated(n: int, pool: Tensor, length: int, times: int, bos: int, seed: int = 0) -> Tensor:
    """BOS and a random segment several times over, [n, 1 + times * length].

    The tokens of a segment are distinct, so that a token has one place to match a repeat.

    Args:
        pool: the tokens that they are drawn from, [tokens].
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(len(pool), generator=generator)[:length] for _ in range(n)]
    body = pool[torch.stack(drawn)].repeat(1, times)
    return torch.cat([torch.full((n, 1), bos), body], 1)


def prefix_matching(pattern: Tensor, length: int, times: int, offset: int = 1) -> Tensor:
    """Attention to the tokens that followed the present one in earlier repeats, [n_heads].

    Summed over the earlier repeats, averaged over the tokens of all repeats but the first and over
    sequences of `repeated`; 1 for a perfect induction head.

    Args:
        pattern: [batch n_heads query key].
        offset: places after the earlier occurrence; neither BOS nor the future counts.
    """
    found = []
    for query in range(1 + length, 1 + times * length):
        keys = [k + offset for k in range(query - length, 0, -length)]
        keys = [k for k in keys if 1 <= k <= query]
        found.append(pattern[..., query, keys].sum(-1))
    return torch.stack(found).mean(0).mean(0)


def previous_token(pattern: Tensor, lag: int = 1) -> Tensor:
    """Mean attention of a token to the one `lag` before, [n_heads]; [batch n_heads pos pos]."""
    return pattern.diagonal(-lag, -2, -1).mean(-1).mean(0)


def by_place(pattern: Tensor, length: int, times: int) -> list[dict[str, list[float]]]:
    """What each head of a layer looks at, where it is not the token of an induction head.

    Returns:
        A dict per head: by_offset [OFFSETS], `prefix_matching` at each offset; by_lag [LAGS], mean
        attention to the token so many places back, of tokens that have one; to_bos, mean attention
        to BOS of the tokens further on.
    """
    offsets = torch.stack([prefix_matching(pattern, length, times, k) for k in OFFSETS], 1)
    body = pattern[..., 1:, 1:]  # without BOS, which is a place of rest and no lag
    lags = torch.stack([previous_token(body, k) for k in LAGS], 1)
    bos = pattern[..., 1:, 0].mean((0, 2))
    names = ("by_offset", "by_lag", "to_bos")
    columns = zip(offsets.tolist(), lags.tolist(), bos.tolist(), strict=True)
    return [dict(zip(names, values, strict=True)) for values in columns]


def attention_between(
    task: Task, patterns: list[Tensor], looks: Mapping[str, tuple[str, str]]
) -> dict[str, Tensor]:
    """Mean attention over the base prompts, name -> [n_layers n_heads].

    Args:
        patterns: of every layer, [n n_heads pos pos].
        looks: name -> the position that attends, and the position attended to.
    """
    places = {name: [task.pairs.place(end) for end in ends] for name, ends in looks.items()}
    return {
        name: torch.stack([p[task.pairs.rows, :, q, k].mean(0) for p in patterns])
        for name, (q, k) in places.items()
    }


def ov(task: Task, layer: int, x: Tensor) -> Tensor:
    """What each head would write if it saw only x [m d_model], [m n_heads d_model]."""
    heads = task.heads
    normed = heads.attn_reads(layer, x)
    shared = heads.n_heads // heads.n_key_heads
    z = []
    for h in range(heads.n_heads):
        place = heads.place(layer, "v", h // shared)
        z.append(place.module(normed)[..., place.columns])
    return torch.einsum("hmd,hdo->mho", torch.stack(z), heads.W_O(layer))


def copy_scores(task: Task, n_tokens: int) -> dict[str, Tensor]:
    """Share of the answers and foils that a head copies, and suppresses, [n_layers n_heads] each.

    A token is copied if, of its stream behind the first MLP, the head's OV circuit, the final norm
    and the unembedding make logits in which the token is among the TOP largest; suppressed if it is
    with the sign of the OV circuit turned.
    """
    ids = torch.cat([task.pairs.answer, task.pairs.foil]).unique()[:n_tokens]
    where = [(task.pairs.base == token).nonzero()[0] for token in ids]
    first = torch.stack([task.base.post[0][tuple(at)] for at in where])
    W_U = task.hf.get_output_embeddings().weight
    found: dict[str, list[Tensor]] = {"copies": [], "suppresses": []}
    for layer in range(task.heads.n_layers):
        written = ov(task, layer, first)
        for sign, into in zip((1, -1), found.values(), strict=True):
            logits = task.metric.norm(sign * written) @ W_U.T  # [tokens n_heads d_vocab]
            top = logits.topk(min(TOP, logits.shape[-1]), -1).indices
            into.append((top == ids[:, None, None]).any(-1).float().mean(0))
    return {name: torch.stack(scores) for name, scores in found.items()}
