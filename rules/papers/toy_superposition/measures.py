"""What is measured of trained weights W [..., n features, m dimensions]; numpy only.

Definitions are those of Elhage et al. 2022: "Basic Results" (norm, interference), "Feature
Dimensionality" (D_i, D*), "Superposition as a Phase Change" (the three outcomes and the closed-form
losses, whose derivation is in wattenberg/superposition).
"""

from typing import Any

import numpy as np
from scipy.sparse.csgraph import connected_components

REPRESENTED = 0.5  # ‖W_i‖ above this: the feature is represented; norms cluster near 0 and 1
SHARED = 0.25  # interference above this: the dimension is shared (alone 0, triangle 1/2, digon 1)
# Two represented features interfere where (Ŵ_i · Ŵ_j)² exceeds this. The polytopes below hold
# together by squared cosines of 1/9 (tetrahedron) or more; orthogonal features have 0.
JOINED = 0.05
SHAPE = 0.1  # each cosine of a polytope may be off by this: about 6° at a right angle
STATES = ("not represented", "dedicated dimension", "superposition")


def weights(rows: Any) -> np.ndarray:
    """W [n, m] of the rows (features) of one model, out of a table."""
    return np.stack(rows.sort_values("feature")["w"].to_list()).astype(float)


def directions(W: np.ndarray) -> np.ndarray:
    """Ŵ [..., n, m]: rows of length one; those without weight stay 0."""
    return W / np.maximum(np.linalg.norm(W, axis=-1, keepdims=True), 1e-12)


def feature_measures(W: np.ndarray) -> dict[str, np.ndarray]:
    """Three numbers per feature, each [..., n].

    norm            ‖W_i‖
    interference    Σ_{j≠i} (Ŵ_i · W_j)²
    dimensionality  D_i = ‖W_i‖² / Σ_j (Ŵ_i · W_j)², 0 for a feature without weight
    """
    W = np.asarray(W, np.float64)
    norm = np.linalg.norm(W, axis=-1)
    unit = directions(W)
    shared = np.einsum("...im,...jm->...ij", unit, W) ** 2
    interference = shared.sum(-1) - norm**2
    total = np.maximum(shared.sum(-1), 1e-24)
    return {"norm": norm, "interference": interference, "dimensionality": norm**2 / total}


def dimensions_per_feature(W: np.ndarray) -> np.ndarray:
    """D* = m / ‖W‖_F² of each model: [...]."""
    W = np.asarray(W, np.float64)
    return W.shape[-1] / np.maximum((W**2).sum((-2, -1)), 1e-24)


def state(norm: np.ndarray, interference: np.ndarray) -> np.ndarray:
    """Index into STATES: not represented, dedicated dimension or superposition."""
    return np.where(norm <= REPRESENTED, 0, np.where(interference <= SHARED, 1, 2))


def represented_dimensionality(W: np.ndarray) -> np.ndarray:
    """D_i among the represented features alone, 0 for the others: [..., n].

    The many features of a dense model that are not represented keep short weights, whose sum lowers
    the D_i of the others by some percent, away from the fraction of their polytope.
    """
    W = np.asarray(W, np.float64)
    long = np.linalg.norm(W, axis=-1, keepdims=True) > REPRESENTED
    return feature_measures(np.where(long, W, 0))["dimensionality"]


def _polygon(n: int) -> np.ndarray:
    turn = 2 * np.pi * np.arange(n) / n
    return np.stack([np.cos(turn), np.sin(turn)], 1)


def _antiprism() -> np.ndarray:
    """Two squares, one turned by 45°, at heights ±1/√3, where Σ_i v_i v_iᵀ is a multiple of 1."""
    square = _polygon(8) * np.sqrt(2 / 3)
    return np.c_[square, np.where(np.arange(8) % 2, 1, -1) / np.sqrt(3)]


# Vertices [n, m] of the article's polytopes ("Why these geometric structures?"); D_i is m / n.
POLYTOPES = {
    "tetrahedron": np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / np.sqrt(3),
    "triangle": _polygon(3),
    "antipodal": np.array([[1.0], [-1.0]]),
    "pentagon": _polygon(5),
    "antiprism": _antiprism(),
}


def sorted_cosines(unit: np.ndarray) -> np.ndarray:
    """Row i: the cosines of vertex i with the others, ascending; [n, n − 1]."""
    others = ~np.eye(len(unit), dtype=bool)
    return np.sort((unit @ unit.T)[others].reshape(len(unit), -1), axis=1)


def polytope(unit: np.ndarray, rank: int) -> str:
    """The polytope of one group of unit vectors [n, m]; "" for another figure.

    Dimensions and size must be the polytope's, and every vertex must see the others at its angles
    (SHAPE): a cube has size, rank and D_i of an antiprism, half a hexagon those of a triangle. All
    of this is the same in any rotation.
    """
    for name, vertices in POLYTOPES.items():
        if (len(unit), rank) == vertices.shape:
            off = np.abs(sorted_cosines(unit) - sorted_cosines(vertices))
            return name if off.max() <= SHAPE else ""
    return ""


def groups(W: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Size, rank and polytope of the group of each feature of one model.

    A group is a connected component of the graph of interference: represented features, joined
    where their squared cosine exceeds JOINED. Groups are the factors of the article's tegum
    product ("two subgraphs are disconnected if and only if they are in different tegum factors").

    Args:
        W: [n, m].

    Returns:
        size [n] and rank [n], 0 where not represented; polytope [n], a key of POLYTOPES or "".
    """
    W = np.asarray(W, np.float64)
    size, rank = np.zeros(len(W), int), np.zeros(len(W), int)
    name = np.full(len(W), "", dtype=object)
    unit, long = directions(W), np.flatnonzero(np.linalg.norm(W, axis=-1) > REPRESENTED)
    joined = (unit @ unit.T) ** 2 > JOINED
    count, component = connected_components(joined[np.ix_(long, long)])
    for rows in (long[component == i] for i in range(count)):
        singular = np.linalg.svd(unit[rows], compute_uv=False)
        found = int((singular > 0.5 * singular[0]).sum())
        size[rows], rank[rows], name[rows] = len(rows), found, polytope(unit[rows], found)
    return size, rank, name


def theory(n_features: int, importance: np.ndarray, density: np.ndarray) -> dict[str, np.ndarray]:
    """Expected loss, summed over features, of each natural way to leave one direction out.

    All features but the last have importance 1, the last ("extra") has `importance`. An ignored
    feature costs p/3 − p²/4 times its importance; two features in an antipodal pair cost p²/6
    times the sum of theirs, paid when both are active.
    """
    r, p = np.asarray(importance, float), np.asarray(density, float)
    ignored = p / 3 - p**2 / 4
    out = {
        "extra ignored": r * ignored,
        "another ignored": ignored + 0 * r,
        "extra in a pair": (1 + r) * p**2 / 6,
    }
    if n_features > 2:
        out["two others in a pair"] = p**2 / 3 + 0 * r
    return out


THEORY_STATE = {"extra ignored": 0, "another ignored": 1,
                "extra in a pair": 2, "two others in a pair": 1}  # fmt: skip
