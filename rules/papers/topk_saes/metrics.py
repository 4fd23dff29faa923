"""The orderings of Gao et al. 2024 as single numbers, so that a claim holds on any grid."""

from typing import Any

import numpy as np
import pandas as pd

from pipeline.claims.seeds import at_equal_l0

METRICS = {
    "step_k.*": "smallest increase of a metric between neighbouring k at equal width, over all "
    "pairs of the TopK grid trained with AuxK",
    "step_width.*": "smallest increase of a metric between neighbouring widths at equal k, over "
    "all pairs of the TopK grid trained with AuxK",
    "topk_minus_l1.explained_variance": "smallest difference of explained variance, TopK minus L1, "
    "at the L0 of each L1 dictionary whose L0 lies in the range of TopK's; equal width; TopK "
    "interpolated linearly in log L0",
    "topk_minus_l1.delta_loss": "the largest such difference of delta_loss (negative: TopK loses "
    "less)",
    "topk_minus_l1.n_matched": "L1 dictionaries whose L0 lies in the range of TopK's",
    "auxk.dead_share": "dead share of the TopK dictionary that is trained with AuxK",
    "auxk.dead_share_without": "dead share of its twin that is trained without",
    "null.matched": "explained variance of the learned TopK dictionary with the nulls' k and width",
    "null.random_dictionary": "explained variance with decoder directions kept as drawn; the "
    "encoder is trained",
    "null.random_weights": "explained variance of a TopK dictionary of the same k and width on the "
    "model with random weights, of that model's own activations",
    "splice_check.max": "largest splice check of any dictionary of any arm, nats",
}


def smallest_step(grid: pd.DataFrame, along: str, fixed: str, metric: str) -> float:
    """Smallest increase of `metric` between neighbours along one axis, the other fixed."""
    steps = [
        np.diff(group.sort_values(along)[metric].to_numpy())
        for _, group in grid.groupby(fixed)
        if len(group) > 1
    ]
    return float(np.concatenate(steps).min()) if steps else float("nan")


def of_seed(trained: pd.DataFrame, null: pd.Series) -> dict[str, float]:
    """The metrics of the rows of evaluation/trained of one seed; null is the dictionary of the
    model with redrawn weights, of the same seed."""
    learned = trained[~trained["frozen_decoder"].astype(bool)]
    l1 = learned[learned["architecture"] == "standard"]
    topk = learned[learned["architecture"] == "topk"]
    grid = topk[topk["aux_loss_coefficient"] > 0]
    out = {}
    for metric in ("explained_variance", "loss_recovered_mean"):
        out[f"step_k.{metric}"] = smallest_step(grid, "k", "d_sae", metric)
        out[f"step_width.{metric}"] = smallest_step(grid, "d_sae", "k", metric)
    same_width = grid[grid["d_sae"].isin(l1["d_sae"])]
    gaps = {m: at_equal_l0(same_width, l1, m) for m in ("explained_variance", "delta_loss")}
    n = len(gaps["delta_loss"])
    out["topk_minus_l1.explained_variance"] = gaps["explained_variance"].min() if n else np.nan
    out["topk_minus_l1.delta_loss"] = gaps["delta_loss"].max() if n else np.nan
    out["topk_minus_l1.n_matched"] = n
    without = topk[topk["aux_loss_coefficient"] == 0].iloc[0]
    frozen = trained[trained["frozen_decoder"].astype(bool)].iloc[0]
    twin, matched = (
        grid[(grid["k"] == one["k"]) & (grid["d_sae"] == one["d_sae"])].iloc[0]
        for one in (without, frozen)
    )
    return out | {
        "auxk.dead_share": twin["dead_share"],
        "auxk.dead_share_without": without["dead_share"],
        "null.matched": matched["explained_variance"],
        "null.random_dictionary": frozen["explained_variance"],
        "null.random_weights": null["explained_variance"],
    }


def metrics(tables: dict[str, pd.DataFrame]) -> dict[str, Any]:
    """See METRICS; one value a seed of the dictionaries' first weights."""
    trained, null = tables["evaluation/trained"], tables["evaluation/random"].set_index("seed")
    seeds = trained[trained["seed"].isin(null.index)].groupby("seed")
    found = [of_seed(rows, null.loc[seed]) for seed, rows in seeds]
    out = {name: np.array([f[name] for f in found]) for name in found[0]}
    checks = max(trained["splice_check"].max(), null["splice_check"].max())
    return out | {"splice_check.max": checks}
