"""What the core kinds of figures share: titles, and a sentence for a missing column."""

from typing import Any

from pipeline.errors import RetraceError, nearest

TITLES = {
    "l0": "L0: active latents a token",
    "k": "k: active latents a token",
    "d_sae": "width: latents",
    "explained_variance": "explained variance",
    "explained_variance_no_outliers": "explained variance, without outlier dimensions",
    "loss_recovered_zero": "loss recovered (against zero ablation)",
    "loss_recovered_mean": "loss recovered (against mean ablation)",
    "delta_loss": "Δ loss (nats a token)",
    "dead_share": "share of dead latents",
    "loss": "training loss",
    "mse": "squared error a token",
    "lr": "learning rate",
    "rows": "training rows (tokens)",
}


def title_of(metric: str) -> str:
    """A metric in words, for an axis."""
    return TITLES.get(metric, metric.replace("_", " "))


def need(frame: Any, columns: list[str], table: str) -> None:
    """A sentence for a table without the columns that a figure plots."""
    for column in columns:
        if column not in frame.columns:
            raise RetraceError(
                f"table {table}: no column '{column}'{nearest(column, frame.columns)}; it has "
                f"{', '.join(map(str, frame.columns))}"
            )


def named(table: str) -> str:
    """What tells a table from its siblings: 'trained' of 'evaluation/trained_history'."""
    return table.split("/", 1)[-1].removesuffix("_history")
