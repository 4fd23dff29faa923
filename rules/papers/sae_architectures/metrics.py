"""Architectures at equal L0, and what the seeds, the null arms and the tokens say of them."""

from typing import Any

import numpy as np
import pandas as pd

from pipeline.claims.seeds import at_equal_l0 as gap
from pipeline.claims.seeds import evaluations

METRICS = {
    "gap.*.explained_variance_min": "gap.<a>_<b>: a minus b in explained variance at the L0 of "
    "each dictionary of b that lies in the range of a's L0, a interpolated linearly in log L0; "
    "equal width and one seed, one value a seed whose grids are whole; the smallest",
    "gap.*.explained_variance_max": "the largest such difference",
    "gap.*.delta_loss_min": "the smallest such difference in delta_loss, nats",
    "gap.*.delta_loss_max": "the largest (negative: a loses less everywhere)",
    "gap.*.loss_recovered_mean_min": "the smallest such difference in loss_recovered_mean",
    "gap.*.shrinkage_max": "the largest such difference in |relative_bias - 1|",
    "gap.*.delta_loss_densest": "the difference in delta_loss at b's densest matched dictionary",
    "gap.*.n": "dictionaries of b whose L0 lies in the range of a's",
    "saving.gated_standard": "L0 of Gated over L0 of L1 at L1's loss_recovered_mean, Gated "
    "interpolated linearly, mean over L1's dictionaries in its range",
    "bias.*": "relative_bias of an architecture's densest and sparsest dictionary, as "
    "bias.<architecture>_dense and _sparse",
    "grid.*.dead_share": "the largest dead_share in the grid of an architecture",
    "overlap.*.shared": "share of one-to-one matched decoder rows with a cosine of 0.7 or more "
    "between two seeds of an architecture, one value a pair of seeds",
    "overlap.*.cosine": "mean cosine of these matched rows",
    "overlap.*.random": "mean cosine of as many random directions matched with the dictionary's",
    "entropy.reinit.*": "mean token-distribution entropy, bits, on the model as first initialised; "
    "one value a seed, under the name of the first, as in the other arms",
    "entropy_auroc.reinit.*": "probability that a latent of the trained model's dictionary has the "
    "larger entropy than one of the same seed on the model as first initialised",
    "entropy.*": "mean token-distribution entropy, bits: entropy.<arm>.<dictionary>",
    "entropy_single.*": "share of latents below 1 bit: entropy_single.<arm>.<dictionary>",
    "entropy_auroc.*": "probability that a latent of the trained model's dictionary has the larger "
    "entropy than one of this arm's: entropy_auroc.<arm>.<dictionary>",
    "null.reinit": "explained variance of TopK (k of the nulls) on the model as first initialised; "
    "as of the other arms, one value a seed that every arm has",
    "null.*": "explained variance: null.learned of TopK (k of the nulls) on the trained model, "
    "null.frozen with decoder directions as drawn, null.reinit and null.shuffled on those arms",
    "settings.rows": "training rows a dictionary was shown",
    "splice_check.max": "largest splice check of any dictionary of any arm, nats",
}
PAIRS = (
    ("batchtopk", "topk"), ("batchtopk", "jumprelu"), ("jumprelu", "topk"), ("jumprelu", "gated"),
    ("gated", "standard"), ("topk", "standard"), ("matryoshka_batchtopk", "batchtopk"),
    ("matching_pursuit", "topk"), ("topk", "matching_pursuit"),
)  # fmt: skip
SETTINGS = ("architecture_y", "d_sae", "k", "l1_coefficient", "l0_coefficient", "frozen_decoder")
GAPS = {  # which of the differences at equal L0 are told of a metric
    "explained_variance": ("min", "max"), "delta_loss": ("min", "max", "densest"),
    "loss_recovered_mean": ("min",), "shrinkage": ("max",),
}  # fmt: skip


def curves(trained: pd.DataFrame, seed: int = 0) -> dict[str, pd.DataFrame]:
    """Architecture -> its dictionaries of one seed that learned, by rising L0."""
    shrinkage = (trained["relative_bias"] - 1).abs()
    learned = (trained["seed"] == seed) & ~trained["frozen_decoder"].astype(bool)
    kept = trained.assign(shrinkage=shrinkage)[learned]
    return {name: g.sort_values("l0") for name, g in kept.groupby("architecture")}


def of_seeds(trained: pd.DataFrame) -> list[dict[str, pd.DataFrame]]:
    """`curves` of every seed; an architecture is left out of a seed that lacks part of its grid.

    A twin, one dictionary of another seed, makes no curve.
    """
    first = curves(trained)
    others = [curves(trained, s) for s in sorted(set(trained["seed"]) - {0})]
    whole = [{n: g for n, g in by.items() if len(g) == len(first.get(n, []))} for by in others]
    return [first, *filter(None, whole)]


def saving(a: pd.DataFrame, b: pd.DataFrame, metric: str = "loss_recovered_mean") -> float:
    """Mean over b's rows in the range of a's metric: L0 of a at that metric, over b's L0."""
    a = a.sort_values(metric)
    inside = b[b[metric].between(a[metric].min(), a[metric].max())]
    if inside.empty:
        return float("nan")
    there = np.exp(np.interp(inside[metric], a[metric], np.log(a["l0"])))
    return float((there / inside["l0"]).mean())


def _at_equal_l0(by: dict[str, pd.DataFrame]) -> dict[str, float]:
    out = {}
    for one, other in PAIRS:
        if one not in by or other not in by:
            continue
        name = f"gap.{one}_{other}"
        for metric, ends in GAPS.items():
            found = gap(by[one], by[other], metric)
            found = found if len(found) else np.array([np.nan])
            values = {"min": found.min(), "max": found.max(), "densest": found[-1]}
            out |= {f"{name}.{metric}_{end}": values[end] for end in ends}
        out[f"{name}.n"] = len(gap(by[one], by[other], "l0"))
    return out


def _overlaps(pairs: pd.DataFrame) -> dict[str, Any]:
    out = {}
    for kind, columns in (("seeds", ("shared", "cosine")), ("random", ("cosine",))):
        rows = pairs[pairs["kind"] == kind]
        for architecture, group in rows.groupby("architecture_b"):
            for column in columns:
                name = "random" if kind == "random" else column
                out[f"overlap.{architecture}.{name}"] = group[column].to_numpy()
    return out


def of_grids(by: dict[str, pd.DataFrame]) -> dict[str, float]:
    """The metrics of the grids of one seed."""
    out = _at_equal_l0(by)
    if {"gated", "standard"} <= by.keys():
        out["saving.gated_standard"] = saving(by["gated"], by["standard"])
    for name, rows in by.items():
        out[f"bias.{name}_sparse"], out[f"bias.{name}_dense"] = rows["relative_bias"].iloc[[0, -1]]
        out[f"grid.{name}.dead_share"] = rows["dead_share"].max()
    return out


def _alike(table: pd.DataFrame, k: int) -> pd.Series:
    """Explained variance of the TopK dictionaries of this k that learned: seed -> value."""
    learned = (table["architecture"] == "topk") & ~table["frozen_decoder"].astype(bool)
    return table[learned & (table["k"] == k)].set_index("seed")["explained_variance"]


def _entropies(table: pd.DataFrame, arms: dict[str, pd.DataFrame]) -> dict[str, np.ndarray]:
    """Every arm's entropies (arm, sae, mean, single, auroc), dictionaries that differ in their seed
    alone under the first's name; arms are the arms' evaluations."""
    kinds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    first: dict[tuple, str] = {}
    given = pd.concat(arms).rename_axis(["arm", "row"]).reset_index()
    for row in table.merge(given, on=["arm", "sae"]).sort_values("seed").to_dict("records"):
        same = tuple(row[c] for c in SETTINGS)
        kinds.setdefault((row["arm"], first.setdefault(same, row["sae"])), []).append(row)
    columns = {"entropy": "mean", "entropy_single": "single", "entropy_auroc": "auroc"}
    return {
        f"{name}.{arm}.{sae}": np.array([row[column] for row in rows])
        for (arm, sae), rows in kinds.items()
        for name, column in columns.items()
    }


def metrics(tables: dict[str, pd.DataFrame]) -> dict[str, Any]:
    """See METRICS."""
    arms = evaluations(tables)
    trained = arms["trained"]
    seeds = [of_grids(grids) for grids in of_seeds(trained)]
    out: dict[str, Any] = {
        name: np.array([found[name] for found in seeds if name in found]) for name in seeds[0]
    } | _overlaps(tables["overlap/pairs"])
    out |= _entropies(tables["entropy/summary"], arms)
    frozen = trained[trained["frozen_decoder"].astype(bool)].iloc[0]
    alike = {arm: _alike(table, frozen["k"]) for arm, table in arms.items()}
    shared = sorted(set.intersection(*(set(values.index) for values in alike.values())))
    out["null.frozen"] = frozen["explained_variance"]
    for arm, values in alike.items():
        out[f"null.{'learned' if arm == 'trained' else arm}"] = values[shared].to_numpy()
    out["settings.rows"] = tables["evaluation/trained_history"]["rows"].max()
    out["splice_check.max"] = max(t["splice_check"].max() for t in arms.values())
    return out
