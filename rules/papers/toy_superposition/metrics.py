"""Metrics of Toy Models of Superposition: what they mean, and how they follow from the tables.

A feature is represented where ‖W_i‖ > 0.5 (trained norms lie near 0 or near 1). Every metric has
one value a seed. `d0p03` in a name is the density 0.03; `n2m1` a case of the phase diagram.
"""

from typing import Any

import numpy as np

from pipeline.claims.seeds import per_seed
from pipeline.store.tables import where

from .measures import POLYTOPES, REPRESENTED, SHARED, directions, weights

METRICS = {
    "intro.represented.dense": "features with ‖W_i‖ > 0.5, of five, where every feature is active",
    "intro.represented.sparse": "features with ‖W_i‖ > 0.5, of five, at the lowest density",
    "intro.dense.top_norm": "smallest ‖W_i‖ of the m most important features at density 1",
    "intro.dense.rest_norm": "largest ‖W_i‖ of the other features at density 1",
    "intro.dense.cosine": "largest |cosine| between two of the m most important at density 1",
    "intro.sparse.*": "the same three at the lowest density (null arm of the dense claims)",
    "basic.linear.top_norm": "linear model: smallest ‖W_i‖ of the m most important features, over "
    "all densities",
    "basic.linear.rest_norm": "linear model: largest ‖W_i‖ of the other features, all densities",
    "basic.relu.dense.top_norm": "ReLU model at density 1: smallest ‖W_i‖ of the m most important",
    "basic.relu.dense.rest_norm": "ReLU model at density 1: largest ‖W_i‖ of the other features",
    "basic.relu.sparse.*": "the same two at the lowest density (null arm of the dense claims)",
    "basic.linear.*": "linear model: as basic.relu.* of that name (null arm)",
    "basic.relu.represented.*": "ReLU model: features with ‖W_i‖ > 0.5 at this density",
    "basic.relu.first_shared.*": "ReLU model: index (0 the most important) of the first "
    "represented feature that shares its dimension (interference > 0.25) at this density; n if "
    "there is none",
    "basic.relu.antipodal.*": "ReLU model: share of the represented features that share a "
    "dimension which have a partner at a cosine below −0.95, at this density",
    "phase.*.superposed_dense": "share of the kept models of the grid's row of density 1 that hold "
    "the extra feature in superposition; kept: all of a cell but the one of highest loss",
    "phase.*.superposed_sparse": "the same for the grid's row of lowest density",
    "phase.*.cells_*": "share of the cells whose lowest-loss model leaves the extra feature out "
    "(ignored), gives it a dimension (dedicated), or holds it in superposition (superposed)",
    "phase.*.between": "share of the cells whose lowest-loss model gives the extra feature a norm "
    "between 0.25 and 0.75: neither represented nor not",
    "phase.*.agreement_best": "share of the cells whose lowest-loss model treats the extra feature "
    "as the closed-form solution of least loss does",
    "phase.*.agreement_kept": "share of the kept models that do",
    "phase.*.agreement_chance": "what agreement_best would be if the cells were shuffled: the sum "
    "over the three outcomes of their share here times their share in theory",
    "geometry.*.dense_dims": "D* = m / ‖W‖_F² of the model at density 1",
    "geometry.*.sticky_half": "number of levels with |D* − 1/2| <= 0.03",
    "geometry.*.sparse_dims": "D* of the model at the lowest density",
    "geometry.*.near.*": "features of all levels with |D_i − fraction| <= 0.005, D_i among "
    "represented features alone",
    "geometry.*.contrast.*": "near, divided by the larger of the counts within 0.005 of fraction − "
    "0.0125 and fraction + 0.0125 (at least 1)",
    "geometry.*.line.*": "1 where there is a line: near >= 10 and contrast >= 2, else 0",
    "geometry.*.other_lines": "number of lines at 3/4, 2/3, 2/5 and 3/8",
    "geometry.*.antipodal_half": "share of the features within 0.005 of 1/2 whose group is two "
    "features in one dimension",
    "geometry.*.groups.*": "features, all levels, whose group has the polytope's size and rank, "
    "whatever its angles; groups: components of the graph of represented features joined by a "
    "squared cosine > 0.05",
    "geometry.*.members.*": "of these, features of groups whose every cosine is within 0.1 of the "
    "polytope's, with a D_i (among represented features) within 0.03 of its fraction",
    "geometry.*.packing": "Σ_i D_i / m over all features, mean over the levels where some feature "
    "is represented",
    "geometry.random.*": "the same for the null arm: every norm kept, every direction redrawn",
    "pentagon.angle_error": "largest deviation from 72° of the five angles between neighbours, "
    "degrees, lowest-loss fit, all densities equal; 72 where a feature is not represented",
    "pentagon.dimensionality": "mean D_i of the five features of that fit",
    "pentagon.fits_regular": "share of the fits at equal densities that are pentagons (every angle "
    "within 10° of 72°)",
    "pentagon.gap.*": "mean angle between the first feature and its two neighbours, degrees, "
    "lowest-loss fit; equal: all densities equal, denser: the highest density of feature 0, "
    "sparser: the lowest at which it is still represented",
    "pentagon.sparsest.norm": "‖W_0‖ in the lowest-loss fit at the lowest density of feature 0",
    "pentagon.sparsest.antipodal": "features of that fit, of the other four, with a partner at a "
    "cosine below −0.95",
    "pentagon.sparsest.dimensionality": "mean D_i of these four",
    "pentagon.equal.*": "the same of the lowest-loss fit with all densities equal (null arm)",
}


def key(density: float) -> str:
    """0.03 -> 'd0p03'."""
    return "d" + f"{density:g}".replace(".", "p")


def cosines(W: np.ndarray) -> np.ndarray:
    """[n, n] cosines between the features' directions, 0 on the diagonal."""
    unit = directions(W)
    out = unit @ unit.T
    np.fill_diagonal(out, 0)
    return out


def ends(rows: Any) -> dict[str, Any]:
    """The rows of the densest and of the sparsest model."""
    p = rows["density"]
    return {"dense": rows[p == p.max()], "sparse": rows[p == p.min()]}


def norms(model: Any, n_hidden: int) -> dict[str, float]:
    """Smallest norm of the m most important features, largest of the others."""
    top = model["feature"] < n_hidden
    return {"top_norm": model.loc[top, "norm"].min(), "rest_norm": model.loc[~top, "norm"].max()}


def intro(rows: Any) -> dict[str, float]:
    out: dict[str, float] = {}
    for end, model in ends(rows).items():
        W = weights(model)
        found = norms(model, W.shape[1]) | {"cosine": np.abs(cosines(W[: W.shape[1]])).max()}
        out[f"represented.{end}"] = (model["norm"] > REPRESENTED).sum()
        out |= {f"{end}.{name}": value for name, value in found.items()}
    return out


def basic(rows: Any) -> dict[str, float]:
    arms = {arm: where(rows, arm=arm) for arm in ("linear", "relu")}
    models = {"linear": arms["linear"]}
    models |= {f"relu.{end}": model for end, model in ends(arms["relu"]).items()}
    out = {f"{at}.{name}": value for at, model in models.items()
           for name, value in norms(model, len(model["w"].iloc[0])).items()}  # fmt: skip
    for arm, own in arms.items():
        for density, model in own.groupby("density"):
            out |= {f"{arm}.{k}.{key(density)}": v for k, v in superposed(model).items()}
    return out


def superposed(rows: Any) -> dict[str, float]:
    """How many features one model represents, and how it packs them."""
    represented = (rows["norm"] > REPRESENTED).to_numpy()
    shared = represented & (rows["interference"] > SHARED).to_numpy()
    antipodal = cosines(weights(rows)).min(1) < -0.95
    return {
        "represented": represented.sum(),
        "first_shared": rows["feature"][shared].min() if shared.any() else len(rows),
        "antipodal": antipodal[shared].mean() if shared.any() else np.nan,
    }


def phase(table: Any, theory: Any) -> dict[str, float]:
    cell = ["n_features", "n_hidden", "importance", "density"]
    table = table.merge(theory[[*cell, "state"]], on=cell, suffixes=("", "_theory"))
    worst = table.groupby(cell)["loss"].transform("max")
    out: dict[str, float] = {}
    for (n, m), rows in table.groupby(["n_features", "n_hidden"]):
        kept = rows[rows["loss"] < worst[rows.index]]
        best = rows.loc[rows.groupby(cell)["loss"].idxmin()]
        found = {f"superposed_{end}": (own["state"] == 2).mean() for end, own in ends(kept).items()}
        states = [(best["state"] == s).mean() for s in range(3)]
        in_theory = [(best["state_theory"] == s).mean() for s in range(3)]
        names = ("ignored", "dedicated", "superposed")
        found |= {f"cells_{name}": share for name, share in zip(names, states, strict=True)}
        found["between"] = best["norm"].between(0.25, 0.75).mean()
        for name, models in (("best", best), ("kept", kept)):
            found[f"agreement_{name}"] = (models["state"] == models["state_theory"]).mean()
        found["agreement_chance"] = sum(map(float.__mul__, states, in_theory))
        out |= {f"phase.n{n}m{m}.{name}": float(value) for name, value in found.items()}
    return out


def line(dimensionality: np.ndarray, fraction: float) -> dict[str, float]:
    """The corrected rule for a line of features at a fraction: near, contrast and the verdict."""
    centres = (fraction, fraction - 0.0125, fraction + 0.0125)
    near, *beside = (int((np.abs(dimensionality - c) <= 0.005).sum()) for c in centres)
    contrast = near / max(*beside, 1)
    return {"near": near, "contrast": contrast, "line": float(near >= 10 and contrast >= 2)}


def sweep_metrics(rows: Any) -> dict[str, float]:
    """Sticky levels, lines and packing of one sweep of one seed."""
    levels = rows.groupby("density").agg(
        dims=("dims_per_feature", "first"), total=("dimensionality", "sum"),
        norm=("norm", "max"), m=("n_hidden", "first"),
    )  # fmt: skip
    D, dims = rows["represented_dimensionality"].to_numpy(float), levels["dims"]
    groups = rows[["group_size", "group_rank"]].to_numpy()
    half = np.abs(D - 0.5) <= 0.005
    pairs = (groups == (2, 1)).all(1)
    packed = levels[levels["norm"] > REPRESENTED]
    out = {
        "dense_dims": dims.iloc[-1],
        "sparse_dims": dims.iloc[0],
        "sticky_half": (np.abs(dims - 0.5) <= 0.03).sum(),
        "antipodal_half": pairs[half].mean() if half.any() else np.nan,
        "packing": (packed["total"] / packed["m"]).mean(),
    }
    for name, (size, rank) in ((n, vertices.shape) for n, vertices in POLYTOPES.items()):
        out |= {f"{k}.{name}": v for k, v in line(D, rank / size).items()}
        out[f"groups.{name}"] = (groups == (size, rank)).all(1).sum()
        near = np.abs(D - rank / size) <= 0.03
        out[f"members.{name}"] = ((rows["polytope"].to_numpy() == name) & near).sum()
    out["other_lines"] = sum(out[f"line.{name}"] for name in POLYTOPES if name != "antipodal")
    return out


def angles(W: np.ndarray) -> np.ndarray:
    """Degrees between each represented feature and the next around the circle, feature 0 first."""
    turn = np.degrees(np.arctan2(W[:, 1], W[:, 0]))[np.linalg.norm(W, axis=1) > REPRESENTED]
    if not len(turn):
        return turn
    order = np.argsort(turn)
    order = np.roll(order, -int(np.flatnonzero(order == 0)[0]))
    return np.mod(np.diff(np.append(turn[order], turn[order[0]])), 360)


def pentagon(rows: Any) -> dict[str, float]:
    """Angles, dimensionality and the collapse to two digons, of one seed."""
    best = {f: g[g["loss"] == g["loss"].min()] for f, g in rows.groupby("first")}
    same = min(best, key=lambda f: abs(f - rows["density"].iloc[0]))
    fits = [angles(weights(g)) for _, g in where(rows, first=same).groupby("fit")]
    gaps = {f: angles(weights(g))[[0, -1]].mean() for f, g in best.items()
            if g["norm"].iloc[0] > REPRESENTED}  # fmt: skip
    turns = angles(weights(best[same]))
    out = {
        "angle_error": np.abs(turns - 72).max() if len(turns) == 5 else 72,
        "dimensionality": best[same]["dimensionality"].mean(),
        "fits_regular": np.mean([len(a) == 5 and np.abs(a - 72).max() < 10 for a in fits]),
        "gap.equal": gaps.get(same, np.nan),
        "gap.denser": gaps.get(max(best), np.nan),
        "gap.sparser": gaps[min(gaps)] if gaps else np.nan,
    }
    for at, fit in (("sparsest", best[min(best)]), ("equal", best[same])):
        others = cosines(weights(fit)).min(1)[1:]
        out[f"{at}.norm"] = fit["norm"].iloc[0]
        out[f"{at}.antipodal"] = (others < -0.95).sum()
        out[f"{at}.dimensionality"] = fit["dimensionality"].iloc[1:].mean()
    return out


def metrics(tables: dict[str, Any]) -> dict[str, Any]:
    """See METRICS; one value per seed."""
    of = {name.removeprefix("superposition/"): table for name, table in tables.items()}
    out: dict[str, Any] = per_seed(of["intro"], intro, "intro.")
    out |= per_seed(of["basic"], basic, "basic.") | phase(of["phase"], of["theory"])
    for (sweep, arm), rows in of["geometry"].groupby(["sweep", "arm"]):
        front = f"geometry.{sweep}." if arm == "trained" else f"geometry.random.{sweep}."
        out |= per_seed(rows, sweep_metrics, front)
    return out | per_seed(of["pentagon"], pentagon, "pentagon.")
