"""How far dictionaries have the same directions: one-to-one matching of decoder rows.

Paulo & Belrose 2025 (2501.16615): dictionaries that differ in the seed of their initial weights
alone share part of their latents.

1. Decoder rows of living latents are scaled to norm 1.
2. The Hungarian algorithm pairs the latents of two dictionaries so that the sum of cosines is
   largest; of two sizes, all of the smaller one's are paired.
3. A pair of a cosine of SHARED or more is shared.
4. The null of a dictionary: as many random directions, paired with it in the same way.

Compared are an architecture's dictionaries that differ in their seed, and architectures with each
other. Two seeds are compared always: dictionaries of one seed start from the same decoder rows, and
in a short run they would share these.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from pydantic import Field
from safetensors.numpy import load_file

from pipeline.errors import RetraceError, need_among
from pipeline.job import cli, own
from pipeline.latents.fidelity import one_to_one, unit
from pipeline.store import tables

SHARED = 0.7
TABLES = ("pairs", "cosines")
EDGES = np.linspace(-1, 1, 81)  # of the histogram of matched cosines


class Options(own.Options):
    """Section own.overlap of paper.yaml."""

    dictionaries: list[str] = Field(
        default=[], description="whose twins are matched, by the first seed's name; none: all"
    )
    seed: int = 0  # of the random directions


def matched(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines [min(n_a, n_b)] of the best one-to-one pairs of rows of norm 1, [n_a d] and [n_b
    d]."""
    cosine = a @ b.T
    return cosine[one_to_one(cosine)]


def living(manifest: str | Path) -> dict[str, tuple[dict, np.ndarray]]:
    """Name -> spec and decoder rows of norm 1 of latents that were alive at the end of training;
    RetraceError where a dictionary has none."""
    out = {}
    for name, entry in tables.read_json(manifest)["saes"].items():
        file = Path(manifest).parent / entry["folder"] / "sae_weights.safetensors"
        alive = np.delete(load_file(file)["W_dec"], entry["dead"], axis=0)
        if len(alive) == 0:
            raise RetraceError(f"{file}: every latent is dead; change the settings of '{name}'")
        out[name] = entry["spec"], unit(alive.astype(np.float32))
    return out


def twins(dictionaries: dict[str, tuple[dict, np.ndarray]]) -> list[list[str]]:
    """Names of dictionaries that differ in their seed alone, by rising seed; one list a kind."""
    kinds: dict[str, list[str]] = {}
    for name, (spec, _) in dictionaries.items():
        same = json.dumps({k: v for k, v in spec.items() if k != "seed"}, sort_keys=True)
        kinds.setdefault(same, []).append(name)
    by_seed = lambda n: dictionaries[n][0]["seed"]  # noqa: E731
    return [sorted(names, key=by_seed) for names in kinds.values() if len(names) > 1]


def chosen(groups: list[list[str]], wanted: list[str]) -> list[list[str]]:
    """The groups of twins whose first dictionary is wanted, all where none is named; RetraceError
    where a dictionary of that name has no twin."""
    where = "own.overlap.dictionaries: no dictionary that has a twin of another seed is called"
    need_among(wanted, [g[0] for g in groups], where, "these have one:")
    return [g for g in groups if g[0] in wanted or not wanted]


def pairs(groups: list[list[str]]) -> list[tuple[str, str, str]]:
    """(kind, name, name) of all that is compared."""
    out = [("seeds", a, b) for g in groups for a, b in combinations(g, 2)]
    return out + [("architectures", one[0], other[1]) for one, other in combinations(groups, 2)]


def compare(kind: str, a: tuple, b: tuple) -> tuple[dict, pd.DataFrame]:
    """A row of the table `pairs`, and the histogram of its cosines as rows of `cosines`; a and b
    are (name, architecture, decoder rows)."""
    cosines = matched(a[2], b[2])
    which = {"kind": kind, "a": a[0], "architecture_a": a[1], "b": b[0], "architecture_b": b[1]}
    row = which | {"n_a": len(a[2]), "n_b": len(b[2])}
    row |= {"cosine": float(cosines.mean()), "shared": float((cosines >= SHARED).mean())}
    counts = np.histogram(cosines.clip(-1, 1), EDGES)[0]
    bins = pd.DataFrame({"low": EDGES[:-1], "high": EDGES[1:], "pairs": counts})
    return row, bins.assign(**which)


def work(job: cli.Job, options: Options) -> own.Tables:
    """Rows of both tables: pairs of dictionaries, and each dictionary with random directions."""
    found = living(own.by_arm(job, job.args.saes)["trained"])
    ends = {name: (name, spec["architecture"], rows) for name, (spec, rows) in found.items()}
    groups, rng = chosen(twins(found), options.dictionaries), np.random.default_rng(options.seed)
    wanted = [(kind, ends[a], ends[b]) for kind, a, b in pairs(groups)]
    for name, *_ in groups:
        drawn = unit(rng.standard_normal(found[name][1].shape, dtype=np.float32))
        wanted.append(("random", ("random", "random", drawn), ends[name]))
    with ThreadPoolExecutor(job.args.threads) as pool:  # a matching runs without Python's lock
        made = list(pool.map(compare, *zip(*wanted, strict=True)))
    cli.log.info("%d pairs of dictionaries matched", len(made))
    out = own.Tables(TABLES)
    out.add({"pairs": [row for row, _ in made], "cosines": pd.concat([bins for _, bins in made])})
    return out
