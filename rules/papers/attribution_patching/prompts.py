"""Pairs of prompts of three tasks, as the stage circuits takes them.

    ioi            "When Mary and John went to the store, John gave a drink to" -> Mary
                   (Wang et al. 2022); other prompt: three other names
    greater_than   "The war lasted from the year 1732 to the year 17" -> a later year (Hanna, Liu &
                   Variengien 2023); other prompt: the first year ends in 01
    lookup         "k1 v1 k2 v2 … k1" -> v1, on the model trained here (data.py); other prompt: k1
                   and another key of the list have changed places, so that the answer is its value

A digit is a token of SmolLM2, so greater_than asks for the first of the two digits: right are those
above the first year's, wrong those below, and the metric is the difference of their mean logits.
The same digit may be right or wrong, and counts as neither.
"""

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import RetraceError
from pipeline.prompts_ioi import encode, ioi, single
from pipeline.source import import_file
from pipeline.spec_base import Section

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
    from pipeline.spec import parse

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

    Positions: key and value of the question, the same of the other pair, END.
    """
    import torch

    data = import_file(Path(__file__).with_name("data.py"))
    found = data.checked(options)
    keys, values = data.draw(n, found, torch.Generator().manual_seed(seed))
    rng = np.random.default_rng(seed)
    out: dict[str, Any] = {k: [] for k in ("clean", "corrupt", "answer", "foil")}
    places: dict[str, list[int]] = {p: [] for p in ("key", "value", "other_key", "other_value")}
    for k, v in zip(keys.tolist(), values.tolist(), strict=True):
        # pairs of equal values would have one answer
        others = [(i, j) for i in range(len(k)) for j in range(len(k)) if v[i] != v[j]]
        if not others:
            raise RetraceError("prompts of lookup: all values of a list are equal; raise n_keys")
        i, j = others[rng.integers(len(others))]
        swapped = list(k)
        swapped[i], swapped[j] = k[j], k[i]
        for name, some in (("clean", k), ("corrupt", swapped)):
            listed = [t for pair in zip(some, v, strict=True) for t in pair]
            out[name].append([2 * found.n_keys, *listed, k[i]])
        out["answer"].append(v[i])
        out["foil"].append(v[j])
        for name, at in (("key", 2 * i + 1), ("other_key", 2 * j + 1)):
            places[name].append(at)
            places[name.replace("key", "value")].append(at + 1)
    return out | {"positions": places | {"END": [len(c) - 1 for c in out["clean"]]}}
