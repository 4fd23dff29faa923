"""Pairs of prompts of three tasks, as the stage circuits takes them.

    ioi            "When Mary and John went to the store, John gave a drink to" -> Mary
                   (Wang et al. 2022); other prompt: three other names
    greater_than   "The war lasted from the year 1732 to the year 17" -> a later year (Hanna, Liu &
                   Variengien 2023); other prompt: the first year ends in 01
    lookup         "a b c d … b" -> c, on the model trained here (data.py); other prompt: the token
                   that is asked for and another one have changed places

A digit is a token of SmolLM2, so greater_than asks for the first of the two digits: right are those
above the first year's, wrong those below, and the metric is the difference of their mean logits.
The same digit may be right or wrong, and counts as neither.
"""

from typing import Any

import numpy as np

from pipeline.errors import RetraceError
from pipeline.spec.base import Section
from pipeline.text.prompts_ioi import encode, ioi, single

__all__ = ["greater_than", "ioi", "lookup"]

TEMPLATE = "The {noun} lasted from the year {century}{years} to the year {century}"
NOUNS = (
    "war campaign conflict siege expedition voyage journey reign dynasty empire project program "
    "trial debate dispute crisis famine drought strike rebellion revolution movement marriage tour "
    "exhibition festival construction partnership alliance friendship career study"
).split()
CENTURIES = (11, 18)  # from, and before
DECADES = (2, 8)  # some digits are above it and some below


class NoOptions(Section):
    """options of `greater_than`: there are none."""


def digits(tokenizer: Any) -> list[int]:
    """Token ids of the ten digits; RetraceError where one is no token of its own in a number."""
    ids = [encode(tokenizer, str(d)) for d in range(10)]
    if any(len(i) != 1 for i in ids) or encode(tokenizer, "x17")[-1] != ids[7][0]:
        raise RetraceError(
            "prompts of greater_than: a digit is no token of this vocabulary; take a model that "
            "reads numbers digit by digit"
        )
    return [i[0] for i in ids]


def greater_than(options: dict[str, Any], tokenizer: Any, n: int, seed: int) -> dict[str, Any]:
    """Prompts for the stage circuits; answer and foil are lists of digits.

    Positions: decade, the first digit that the prompts differ in; END.
    """
    from pipeline.spec.paper import parse

    parse(NoOptions, options, "options of greater_than")
    ids, nouns, rng = digits(tokenizer), list(single(tokenizer, NOUNS)), np.random.default_rng(seed)
    if not nouns:
        raise RetraceError("prompts of greater_than: no noun is one token of this vocabulary")
    out: dict[str, Any] = {k: [] for k in ("clean", "corrupt", "answer", "foil")}
    places: dict[str, list[int]] = {"decade": [], "END": []}
    for _ in range(n):
        decade, given = int(rng.integers(*DECADES)), {"noun": str(rng.choice(nouns))}
        given["century"] = int(rng.integers(*CENTURIES))
        years = f"{decade}{rng.integers(10)}", "01"
        clean, corrupt = (encode(tokenizer, TEMPLATE.format(**given, years=y)) for y in years)
        out["clean"].append(clean)
        out["corrupt"].append(corrupt)
        out["answer"].append(ids[decade + 1 :])
        out["foil"].append(ids[:decade])
        differ = [a != b for a, b in zip(clean, corrupt, strict=True)]
        places["decade"].append(differ.index(True))
        places["END"].append(len(clean) - 1)
    return out | {"positions": places}


def lookup(options: dict[str, Any], tokenizer: Any, n: int, seed: int) -> dict[str, Any]:
    """Prompts for the stage circuits, BOS included; the tokenizer is not used.

    Positions: the token that is asked for and the one behind it, the same of the other, END.
    """
    import torch

    from . import data

    found = data.checked(options)
    rng = np.random.default_rng(seed)
    out: dict[str, Any] = {k: [] for k in ("clean", "corrupt", "answer", "foil")}
    places: dict[str, list[int]] = {p: [] for p in ("asked", "next", "other", "other_next")}
    # not neighbours, so that what stands behind them stays
    pairs = [(i, j) for i in range(found.length - 1) for j in range(found.length - 1)
             if abs(i - j) > 1]  # fmt: skip
    for listed in data.lists(n, found, torch.Generator().manual_seed(seed)).tolist():
        i, j = pairs[rng.integers(len(pairs))]
        swapped = list(listed)
        swapped[i], swapped[j] = listed[j], listed[i]
        for name, some in (("clean", listed), ("corrupt", swapped)):
            out[name].append([found.n_tokens, *some, listed[i]])
        out["answer"].append(listed[i + 1])
        out["foil"].append(listed[j + 1])
        at = {"asked": i, "next": i + 1, "other": j, "other_next": j + 1}
        for name, place in at.items():
            places[name].append(place + 1)  # behind BOS
    return out | {"positions": places | {"END": [len(c) - 1 for c in out["clean"]]}}
