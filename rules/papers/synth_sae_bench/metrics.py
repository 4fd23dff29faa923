"""Metrics of SynthSAEBench: `<dictionary>.<measure>` of a dictionary when its training ended.

Names end in `_true` where L0 is that of the most frequent features, as many as there are latents
(25 in the paper), and in `_low` where it is a fifth less (20). One value a seed. In the worlds of
stage `sweep` they are `sweep.<world>.<dictionary>.<measure>`.
"""

from typing import Any

import numpy as np

METRICS = {
    "world.true_l0": "mean number of true features active in a sample",
    "world.true_l0_first": "the same of the first d_sae features, the most frequent ones",
    "*.f1": "each latent is a classifier of its best feature (largest |cos| of decoder row and "
    "feature): F1 of 'the latent is not zero' against 'the feature is active' over all evaluation "
    "samples, 0 where neither is ever so; mean over latents",
    "*.precision": "the precision of those classifiers, 0 for a latent that never fires; mean over "
    "latents",
    "*.recall": "their recall; mean over latents",
    "*.mcc": "mean |cos| of decoder rows and true features over the one-to-one matching of the "
    "largest sum (Hungarian algorithm)",
    "*.uniqueness": "different features among the best of each latent, as a share of the latents",
    "*.explained_variance": "1 - sum |x - x_hat|^2 / sum |x - mean|^2 over all evaluation samples",
    "*.shrinkage": "mean over samples of |x_hat| / |x|",
    "*.l0": "mean number of latents that are not zero in a sample",
    "*.l0_off": "|l0 / target - 1|, the target being the L0 that the recipe asks for",
    "*.dead_share": "share of latents that no evaluation sample makes non-zero",
    "*.n_samples": "training samples",
    "*.coefficient": "of the sparsity penalty when training ended, where a controller moved it",
    "*.lead": "explained variance of matching pursuit less the larger one of BatchTopK and "
    "Matryoshka, in a world",
    "*.random_lead": "the same of the random decoder",
    "*.gap": "F1 of matching pursuit less the smaller one of BatchTopK and Matryoshka, in a world",
    "*.random_gap": "the same of the random decoder",
    "*.overlap": "mean over true features of the largest |cos| with another one",
}
MEASURES = (
    "f1", "precision", "recall", "mcc", "uniqueness", "explained_variance", "shrinkage", "l0",
    "l0_off", "dead_share", "n_samples", "coefficient",
)  # fmt: skip


def of_seeds(rows: Any) -> dict[str, np.ndarray]:
    """Every measure of one dictionary, one value a seed; unmeasured ones left out.

    Args:
        rows: one a seed.
    """
    rows = rows.sort_values("seed").assign(l0_off=(rows["l0"] / rows["target_l0"] - 1).abs())
    return {m: rows[m].to_numpy(float) for m in MEASURES if rows[m].notna().all()}


def metrics(tables: dict[str, Any]) -> dict[str, Any]:
    """See METRICS."""
    table = tables["recovery/dictionaries"]
    first = table.iloc[0]
    out = {f"world.{name}": first[name] for name in ("true_l0", "true_l0_first")}
    for name, rows in table.groupby("dictionary"):
        out |= {f"{name}.{m}": v for m, v in of_seeds(rows).items()}
    for world, rows in tables["sweep/worlds"].groupby("world"):
        out |= {f"sweep.{world}.{name}": value for name, value in of_world(rows).items()}
    return out


def of_world(rows: Any) -> dict[str, Any]:
    """The metrics of a world's dictionaries, and where two of them stand beside the others."""
    of = {name: of_seeds(some) for name, some in rows.groupby("dictionary")}
    out = {f"{name}.{m}": v for name, measures in of.items() for m, v in measures.items()}
    variance, f1 = ({n: found[m] for n, found in of.items()} for m in ("explained_variance", "f1"))
    most = np.maximum(variance["batchtopk"], variance["matryoshka"])
    least = np.minimum(f1["batchtopk"], f1["matryoshka"])
    for prefix, name in {"": "matching_pursuit", "random_": "random_decoder"}.items():
        out |= {f"{prefix}lead": variance[name] - most, f"{prefix}gap": f1[name] - least}
    return out | {"overlap": rows["overlap"].iloc[0]}
