"""What the core kinds of figures share: titles, names in words, and what a missing column says."""

import re
from typing import Any

from pipeline.errors import RetraceError, nearest
from pipeline.figures import theme

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


ARCHITECTURES = {
    "topk": "TopK",
    "standard": "L1",
    "gated": "Gated",
    "jumprelu": "JumpReLU",
    "batchtopk": "BatchTopK",
    "matryoshka_batchtopk": "Matryoshka",
    "matching_pursuit": "Matching pursuit",
}
# What a grid writes into a dictionary's name (SaeSpec.expand) -> the same in words.
CODES = {
    "k": "k {}", "d": "{} latents", "c": "L1 coefficient {}", "l0": "L0 coefficient {}",
    "aux": "AuxK {}", "seed": "seed {}",
}  # fmt: skip
CODE = re.compile(rf"({'|'.join(sorted(CODES, key=len, reverse=True))})(m?\d+(?:p\d+)?)")
SPELT = ARCHITECTURES | {"l1": "L1", "l0": "L0", "noaux": "no AuxK"}


def in_words(name: str) -> str:
    """A dictionary's name for a legend: 'topk_k16_d1152' -> 'TopK, k 16, 1,152 latents'."""
    said, plain = [], []
    for part in name.split("_"):
        found = None if part in SPELT else CODE.fullmatch(part)
        if found is None:
            plain.append(SPELT.get(part, part))
            continue
        value = found[2].replace("p", ".").replace("m", "-")
        grouped = f"{int(value):,}" if value.isdigit() and found[1] == "d" else value
        said.append(CODES[found[1]].format(grouped))
    return ", ".join([" ".join(plain), *said] if plain else said)


def without_seed(name: str) -> str:
    """What the seeds of a dictionary share: 'topk_k16' of 'topk_k16_seed2'."""
    return re.sub(r"_seed\d+(?=_|$)", "", name)


def worded(value: Any) -> str:
    """A value of a column as a label: 'hallway untrained' of hallway_untrained."""
    return theme.literal(str(value).replace("_", " "))


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
