"""Latents of two dictionaries on the same stream, matched by the cosine of their decoder rows.

Paulo and Belrose 2025 (2501.16615) ask how many features two dictionaries share that differ in
their seed alone: latents are paired, and a pair above a cosine of 0.7 counts as shared. They pair
by an optimal assignment; here two latents are a pair where each is the other's nearest, which
takes one product and no assignment of thousands by thousands. As a null, random directions take
the place of the second decoder.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.errors import RetraceError

SHARED = 0.7  # Paulo and Belrose 2025, section 3
BLOCK = 2048  # rows of a product at a time


@dataclass(frozen=True)
class Match:
    """Latents of A and B, each the other's nearest.

    Args:
        pairs: [n, 2] latents of A and of B, by falling cosine.
        cosines: [n] of those pairs.
        nearest: [d_sae of A] cosine of each latent of A with its nearest of B.
        null: mean of `nearest` with random directions in place of B.
    """

    pairs: np.ndarray
    cosines: np.ndarray
    nearest: np.ndarray
    null: float

    @property
    def shared(self) -> float:
        """Share of A's latents with a partner above SHARED."""
        return float((self.cosines > SHARED).sum() / len(self.nearest))


def unit(W_dec: np.ndarray) -> np.ndarray:
    """Rows of length one; a row of zeros stays."""
    norms = np.linalg.norm(W_dec, axis=1, keepdims=True)
    return W_dec / np.where(norms == 0, 1, norms)


def nearest(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each unit row of a [n, d]: the index of its nearest row of b [m, d], and their cosine."""
    index, cosine = [], []
    for i in range(0, len(a), BLOCK):
        found = a[i : i + BLOCK] @ b.T
        index.append(found.argmax(1))
        cosine.append(found.max(1))
    return np.concatenate(index), np.concatenate(cosine)


def match(a: np.ndarray, b: np.ndarray, rng: np.random.Generator) -> Match:
    """Match two decoders, W_dec [d_sae, d_in] each; d_in is the same, d_sae need not be."""
    a, b = unit(np.asarray(a, np.float32)), unit(np.asarray(b, np.float32))
    forth, cosine = nearest(a, b)
    back, _ = nearest(b, a)
    mutual = np.flatnonzero(back[forth] == np.arange(len(a)))
    mutual = mutual[np.argsort(-cosine[mutual], kind="stable")]
    random = unit(rng.standard_normal(b.shape, np.float32))
    return Match(
        pairs=np.stack([mutual, forth[mutual]], 1),
        cosines=cosine[mutual],
        nearest=cosine,
        null=float(nearest(a, random)[1].mean()),
    )


def decoder(folder: Path) -> np.ndarray | None:
    """W_dec [d_sae, d_in] of a SAELens folder, float32; None where its weights are not there.

    Raises:
        RetraceError: they are damaged, or hold no such matrix.
    """
    from safetensors import SafetensorError, safe_open

    file = folder / "sae_weights.safetensors"
    if not file.is_file():
        return None
    try:
        with safe_open(file, "numpy") as f:
            found = np.asarray(f.get_tensor("W_dec"), np.float32)
    except (SafetensorError, OSError, ValueError, TypeError, LookupError, AttributeError) as e:
        raise RetraceError(f"{file}: has no readable W_dec ({e}); copy the folder again") from e
    if found.ndim != 2 or not found.size:
        raise RetraceError(f"{file}: W_dec has shape {found.shape}, and not [d_sae, d_in]")
    return found
