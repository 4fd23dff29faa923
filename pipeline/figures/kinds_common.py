"""What the core kinds of figures share.

1. Titles, names in words, and what a missing column says.
2. The rows that a figure draws, the looks of its lines or bars, and its panels: as their options
   (`spec_figures`) say it.
"""

import re
from itertools import product
from typing import Any

from pipeline.errors import RetraceError, nearest
from pipeline.figures import theme
from pipeline.spec.figures import Look, Names, Rows

SYMBOLS = ["circle", "diamond", "square", "triangle-up"]
LEGEND_ROW, IN_ROW = 22, 3  # pixels of a row of the legend, and entries in it

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


# --- rows, looks and panels ----------------------------------------------------------------


def rows_of(table: Any, name: str, what: Rows) -> Any:
    """The rows of a table that a figure draws."""
    need(table, [*what.where, *what.columns, *(["seed"] if what.seeds == "first" else [])], name)
    for column, wanted in what.where.items():
        wanted = wanted if isinstance(wanted, list) else [wanted]
        table = table[table[column].isin(wanted)]
    if what.seeds == "first" and len(table):
        table = table[table["seed"] == table["seed"].min()]
    if table.empty:
        raise RetraceError(f"table {name}: no row is as options.where says, so nothing to draw")
    return table


def looks(names: Names, values: Any) -> dict[Any, Look]:
    """value -> how it is drawn, of the values that there are; without names, all of them."""
    there = list(dict.fromkeys(values))
    given = names or {str(v): worded(v) for v in there}
    by_text = {str(v): v for v in there}
    out = {}
    for i, (text, look) in enumerate(given.items()):
        if text in by_text:
            look = Look(name=look) if isinstance(look, str) else look
            number = i if look.colour is None else look.colour
            dash = look.dash if names else theme.DASHES[i % len(theme.DASHES)]
            symbol = look.symbol or ("circle" if names else SYMBOLS[i % len(SYMBOLS)])
            change = {"colour": shade(number), "dash": dash, "symbol": symbol}
            out[by_text[text]] = look.model_copy(update=change)
    return out


def shade(number: int | str) -> str:
    """A colour of the palette, or that of text."""
    return theme.INK if number == "ink" else theme.colour(number)


def grid(table: Any, columns: list[str], titles: dict[str, str]) -> list[tuple[str, Any]]:
    """(title, rows) of every panel: the first column across, the second down."""
    if not columns:
        return [("", table)]
    order = list(titles)
    rank = lambda v: order.index(str(v)) if str(v) in order else -1  # noqa: E731
    every = [sorted(dict.fromkeys(table[c]), key=rank) for c in columns]
    out = []
    for values in product(*reversed(every)):
        values = tuple(reversed(values))
        here = table
        for column, value in zip(columns, values, strict=True):
            here = here[here[column] == value]
        out.append(("<br>".join(titles.get(str(v), worded(v)) for v in values), here))
    return out


def in_panels(table: Any, columns: list[str], titles: dict[str, str], across: int = 0) -> tuple:
    """The panels of a figure, and the rows of each."""
    from pipeline.figures.parts import Panels

    parts = grid(table, columns, titles)
    if len(columns) == 2:
        across = len(dict.fromkeys(table[columns[0]]))
    panels = Panels([t for t, _ in parts], across, gap=(0.05, 0.18), shared_yaxes=True)
    return panels, [rows for _, rows in parts]


def finished(panels: Any, entries: int, height: int = 0) -> Any:
    """Panels of one height each, the legend above them as deep as its entries need."""
    deep = LEGEND_ROW * -(-entries // IN_ROW) if entries > 1 else 0
    titled = 34 if any(a.text for a in panels.figure.layout.annotations) else 8
    height = height or (400 if panels.rows == 1 else 250 * panels.rows)
    return panels.finish(height + deep + titled, legend=titled, top=deep + titled + 10)
