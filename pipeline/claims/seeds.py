"""Metrics of tables that hold several seeds, for the metrics.py of papers; no torch.

`by_seed` calls a paper's function once per seed and lines its numbers up; `of_rows` names the
numbers of a table by the columns that tell its rows apart; `evaluations` are the tables of the
arms' dictionaries, which `at_equal_l0` compares; `crossing` says where a curve reaches a level.
"""

from collections.abc import Callable, Iterable
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
    return gathered(of_seed({n: t[t["seed"] == seed] for n, t in tables.items()}) for seed in seeds)


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


def at_equal_l0(a: Any, b: Any, metric: str) -> np.ndarray:
    """a minus b at the L0 of each row of b that lies in the range of a's; [matched], in b's order.

    Args:
        a, b: dictionaries of an evaluation table, a interpolated linearly in log L0.
    """
    a = a.sort_values("l0")
    inside = b[b["l0"].between(a["l0"].min(), a["l0"].max())]
    there = np.interp(np.log(inside["l0"]), np.log(a["l0"]), a[metric])
    return there - inside[metric].to_numpy()


def evaluations(tables: dict[str, Any]) -> dict[str, Any]:
    """Arm -> its table of the stage evaluation, curves of training left out."""
    of = {n.split("/")[1]: t for n, t in tables.items() if n.startswith("evaluation/")}
    return {arm: table for arm, table in of.items() if not arm.endswith("_history")}


def crossing(x: Any, y: Any, level: float) -> float:
    """x at which a curve first reaches a level from below, on straight lines between its points.

    Args:
        x, y: [points], x ascending.

    Returns:
        The first x where the curve begins at the level, inf where it never reaches it.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    above = np.flatnonzero(y >= level)
    if not len(above):
        return float("inf")
    i = above[0]
    return float(x[0] if i == 0 else np.interp(level, y[i - 1 : i + 1], x[i - 1 : i + 1]))


def gathered(models: Iterable[dict[str, Any]], front: str = "") -> dict[str, list[float]]:
    """Numbers of several models as metrics: `front` + name -> one value per model, NaN for none."""
    models = list(models)
    names = dict.fromkeys(name for model in models for name in model)
    return {f"{front}{n}": [float(model.get(n, np.nan)) for model in models] for n in names}


def per_seed(
    table: Any, of_seed: Callable[[Any], dict[str, float]], front: str = ""
) -> dict[str, list[float]]:
    """`gathered` numbers of the rows of every seed, ascending."""
    return gathered((of_seed(rows) for _, rows in table.groupby("seed")), front)
