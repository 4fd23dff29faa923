"""Metrics of tables that hold several seeds, for the metrics.py of papers; no torch.

`by_seed` calls a paper's function once per seed and lines its numbers up; `of_rows` names the
numbers of a table by the columns that tell its rows apart.
"""

from collections.abc import Callable
from typing import Any

import numpy as np


def by_seed(
    tables: dict[str, Any], of_seed: Callable[[dict[str, Any]], dict[str, float]]
) -> dict[str, list[float]]:
    """Every metric with one value per seed, NaN where a seed has none.

    Args:
        tables: name -> DataFrame with a column seed; the seeds are those of the first.
        of_seed: the tables' rows of one seed -> its metrics.
    """
    seeds = next(iter(tables.values()))["seed"].unique()
    found = [of_seed({n: t[t["seed"] == seed] for n, t in tables.items()}) for seed in seeds]
    names = dict.fromkeys(name for one in found for name in one)
    return {name: [float(one.get(name, np.nan)) for one in found] for name in names}


def defined(metrics: dict[str, list[float]]) -> dict[str, list[float]]:
    """The metrics that have a finite value at some seed."""
    return {name: values for name, values in metrics.items() if np.isfinite(values).any()}


def of_rows(table: Any, keys: list[str], columns: Any) -> dict[str, Any]:
    """`<key>.<key>.<column>` -> value of some columns of every row.

    Args:
        keys: columns whose values name the row.
    """
    return {
        ".".join([*(str(row[k]) for k in keys), column]): row[column]
        for row in table.to_dict("records")
        for column in columns
    }
