"""Stage `measure`: how parallel are two random directions?

1. Draw pairs of directions uniformly on the unit sphere of R^d, for each d and each seed.
2. Report the mean absolute cosine of a pair. Its expectation is Γ(d/2) / (√π Γ((d+1)/2)).

Replace it by what your paper measures. A stage is Options, TABLES and work, over pure functions.
"""

import numpy as np
import pandas as pd
from pydantic import Field

from pipeline.job import cli, own

TABLES = ("cosines",)


class Options(own.Options):
    """Section own.measure of paper.yaml."""

    d_model: list[int] = Field(min_length=1, description="dimensions of the space")
    n_pairs: int = Field(ge=2, description="pairs of directions, each d and seed")
    seeds: list[int] = Field(min_length=1)


def mean_abs_cosine(d_model: int, n_pairs: int, rng: np.random.Generator) -> float:
    """Mean of |cos(a, b)| over random directions a and b of R^d_model."""
    a, b = rng.standard_normal((2, n_pairs, d_model))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return float(np.abs(cosine).mean())


def measure(options: Options) -> pd.DataFrame:
    """One row a dimension and seed: d_model, seed, cosine."""
    rows = [
        (d, seed, mean_abs_cosine(d, options.n_pairs, np.random.default_rng([seed, d])))
        for d in options.d_model
        for seed in options.seeds
    ]
    return pd.DataFrame(rows, columns=["d_model", "seed", "cosine"])


def work(job: cli.Job, options: Options) -> own.Tables:
    """The rows of every table."""
    out = own.Tables(TABLES)
    out.add({"cosines": measure(options)})
    return out
