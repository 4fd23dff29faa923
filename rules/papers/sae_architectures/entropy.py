"""Token-distribution entropy: over how many tokens a latent's activation is spread. [torch]

Heap et al. 2025 (2501.17727), Section 3, "Latent explanation complexity": latents of models with
random weights sit on single tokens, those of trained models need not, though reconstruction and
auto-interpretability cannot tell the two apart.

1. Stored rows pass a dictionary once. A context is CONTEXT neighbouring positions of a block.
2. A latent's maximally activating examples are the `n_contexts` contexts in which its largest
   activation is largest.
3. Its token distribution is its total activation a token id over these contexts; the measure is
   that distribution's Shannon entropy, in bits: 0 for a latent of one token.

The paper does not say how many examples of which length it uses, nor the unit.
"""

from typing import Any

import numpy as np
import pandas as pd
from pydantic import Field

from pipeline.errors import need_among
from pipeline.job import cli, own
from pipeline.latents import features
from pipeline.latents.stored import load_saes
from pipeline.store import tables

CONTEXT = 32  # tokens of an example
SINGLE = 1.0  # bits; below: about one or two tokens
BIN = 0.25  # bits, of the histogram
TABLES = ("summary", "histogram")


class Options(own.Options):
    """Section own.entropy of paper.yaml."""

    dictionaries: list[str] = Field(min_length=1)
    n_rows: int = Field(default=100_000, ge=1, description="rows scanned, at most")
    n_contexts: int = Field(default=20, ge=1, description="maximally activating examples a latent")


def token_entropy(
    values: np.ndarray, tokens: np.ndarray, contexts: np.ndarray, n_contexts: int
) -> float:
    """Entropy in bits of a latent's activation over tokens, in its best contexts.

    Args:
        values: [active], activations above zero.
        tokens: [active], token ids.
        contexts: [active], ids of contexts, ascending.

    Returns:
        nan where the latent is active in fewer than n_contexts contexts.
    """
    starts = np.flatnonzero(np.diff(contexts, prepend=-1))
    if len(starts) < n_contexts:
        return float("nan")
    peaks = np.maximum.reduceat(values, starts)
    best = np.argsort(-peaks, kind="stable")[:n_contexts]
    sizes = np.diff(np.append(starts, len(values)))
    kept = np.isin(np.repeat(np.arange(len(starts)), sizes), best)
    _, token = np.unique(tokens[kept], return_inverse=True)
    return features.entropy_bits(np.bincount(token, values[kept].astype(np.float64)))


def entropies(scanned: features.Scan, n_contexts: int) -> np.ndarray:
    """Entropy of every latent in bits, nan for those that are seldom active; [d_sae]."""
    at = scanned.at
    parts = int(at["position"].max()) // CONTEXT + 1
    context = at["block"].astype(np.int64) * parts + at["position"] // CONTEXT
    columns = (scanned.column(i) for i in range(scanned.acts.shape[1]))
    found = [token_entropy(v, at["token"][rows], context[rows], n_contexts) for rows, v in columns]
    return np.array(found)


def summary(bits: np.ndarray, trained: np.ndarray) -> dict[str, Any]:
    """What one dictionary's entropies come to.

    Args:
        bits: [d_sae], with nan.
        trained: those of the same dictionary on the trained model.

    Returns:
        auroc: the probability that a latent of `trained` has the larger entropy, ties half.
    """
    from scipy.stats import mannwhitneyu

    found, others = bits[~np.isnan(bits)], trained[~np.isnan(trained)]
    if len(found) == 0:
        return dict.fromkeys(("mean", "single", "auroc"), np.nan)
    n = len(others) * len(found)
    return {
        "mean": found.mean(),
        "single": (found < SINGLE).mean(),
        "auroc": mannwhitneyu(others, found, method="asymptotic").statistic / n if n else np.nan,
    }


def histogram(bits: np.ndarray, top: float) -> pd.DataFrame:
    """low, high, latents: how many latents have which entropy."""
    edges = np.arange(0, top + BIN, BIN)
    counts = np.histogram(bits[~np.isnan(bits)], edges)[0]
    return pd.DataFrame({"low": edges[:-1], "high": edges[1:], "latents": counts})


def work(job: cli.Job, options: Options) -> own.Tables:
    """Rows of both tables, of every dictionary of every arm that has it."""
    args, device, out = job.args, job.device(), own.Tables(TABLES)
    manifests = own.by_arm(job, [tables.read_json(file) for file in args.saes])
    where = "own.entropy.dictionaries: the arm trained has no dictionary"
    need_among(options.dictionaries, manifests["trained"]["saes"], where, "it has")
    files = own.by_arm(job, list(zip(args.saes, args.activations, strict=True)))
    found: dict[tuple[str, str], np.ndarray] = {}
    for arm, (file, activations) in files.items():
        about = manifests[arm]
        names = [n for n in options.dictionaries if n in about["saes"]]
        for name, sae in (load_saes(file, device, names) if names else {}).items():
            scanned = features.scan(sae, activations, about["hook"], options.n_rows, device)
            found[arm, name] = entropies(scanned, options.n_contexts)
            cli.log.info("%s, %s", arm, name)
    top = np.ceil(max(bits[~np.isnan(bits)].max(initial=1) for bits in found.values()))
    for (arm, name), bits in found.items():
        architecture = manifests[arm]["saes"][name]["spec"]["architecture"]
        which = {"arm": arm, "sae": name, "architecture": architecture}
        out.add({"summary": [summary(bits, found["trained", name])]}, which)
        out.add({"histogram": histogram(bits, top)}, **which)
    return out
