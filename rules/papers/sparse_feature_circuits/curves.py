"""Faithfulness and completeness against the number of nodes, for every kind of node. [torch]

Nodes are found on one set of prompts and judged on another (Marks et al. 2024, Sec. 4). They enter
in the order of |effect|. Kinds of nodes, all at the same sites:

    latents            latents and error terms, by latent_ig
    attribution        the same by latent_attribution
    no_errors          latents alone; error terms are always ablated
    errors             error terms alone
    neurons            neurons of MLPs, coordinates of the stream
    random             latents and error terms of random directions (null arm)
    random_no_errors   random directions alone (null arm)
    random_nodes       latents and error terms with an effect, in a random order (null arm)

With no node and with all, the model is the same for every kind: means are linear.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from pipeline.latents.sites import Effects, strongest
from pipeline.latents.subsets import Ablation
from pipeline.latents.units import ERROR, Latent


class Kind(NamedTuple):
    """A kind of nodes: how the model is ablated by them, and their order."""

    name: str
    ablation: Ablation
    order: list[Latent]


def sizes(most: int) -> list[int]:
    """1, 2, 4, … and `most`."""
    return [*(2**i for i in range(64) if 2**i < most), most] if most else []


def kinds(
    ablations: dict[str, Ablation], effects: dict[str, dict[str, Effects]], most: int,
    n_random: int, rng: np.random.Generator,
) -> list[Kind]:  # fmt: skip
    """All kinds of nodes, at most `most` of each.

    Args:
        ablations: by latents, neurons, random.
        effects: of latents, attribution (of latents), neurons, random: hook -> effects.
        n_random: orders of random_nodes.
    """
    everything = {name: strongest(found, 10**9, True) for name, found in effects.items()}
    without = lambda nodes: [n for n in nodes if n.number != ERROR]  # noqa: E731
    latents, random = everything["latents"], everything["random"]
    out = [
        Kind("latents", ablations["latents"], latents),
        Kind("attribution", ablations["latents"], everything["attribution"]),
        Kind("no_errors", ablations["latents"], without(latents)),
        Kind("errors", ablations["latents"], [n for n in latents if n.number == ERROR]),
        Kind("neurons", ablations["neurons"], everything["neurons"]),
        Kind("random", ablations["random"], random),
        Kind("random_no_errors", ablations["random"], without(random)),
    ]
    for i in range(n_random):
        order = [latents[j] for j in rng.permutation(len(latents))]
        out.append(Kind(f"random_nodes {i}", ablations["latents"], order))
    return [k._replace(order=k.order[:most]) for k in out]


def curves(kinds: list[Kind], told: Callable[[int], None] = lambda _: None) -> list[dict[str, Any]]:
    """A row a kind and number of nodes: m and m of the complement, and both as shares."""
    rows = []
    for done, (name, ablation, order) in enumerate(kinds, 1):
        counts = sizes(len(order))
        circuits = [frozenset(order[:n]) for n in counts]
        none = float(ablation.metric([frozenset()]).mean())
        whole = float(ablation.sites.task.before.mean())
        kept = ablation.metric(circuits).mean(-1).tolist() if circuits else []
        gone = [float("nan")] * len(counts)
        if name in ("latents", "neurons"):
            gone = ablation.metric(circuits, complement=True).mean(-1).tolist()
        base = whole - none if whole > none else float("nan")  # no share of what is not there
        share = lambda m, none=none, base=base: (m - none) / base  # noqa: E731
        for n, m, without in [(0, none, whole), *zip(counts, kept, gone, strict=True)]:
            row = {
                "kind": name.split()[0],
                "draw": name,
                "n_nodes": n,
                "m": m,
                "m_without": without,
            }
            rows.append(row | {"faithfulness": share(m), "completeness": share(without)})
        told(done)
    return rows
