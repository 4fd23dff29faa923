"""Faithfulness and completeness against the number of nodes of a circuit of latents. [torch]

Nodes enter in the order of |effect| and are judged on other prompts than those on which they were
found (Marks et al. 2024, 2403.19647, Sec. 4):

    faithfulness(C) = (m(C) - m(none)) / (m(all) - m(none))
    completeness(C) = faithfulness(all but C)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from pipeline.latents.sites import Latent
from pipeline.latents.subsets import Ablation


class Kind(NamedTuple):
    """A kind of nodes: how the model is ablated by them, and their order.

    Attributes:
        name: with the number of the draw behind it, where the order is drawn.
        taken_out: whether the complement is measured, too.
    """

    name: str
    ablation: Ablation
    order: list[Latent]
    taken_out: bool = False


def sizes(most: int) -> list[int]:
    """1, 2, 4, … and `most`."""
    return [*(2**i for i in range(64) if 2**i < most), most] if most else []


def curves(
    kinds: list[Kind], on_progress: Callable[[int], None] = lambda _: None
) -> list[dict[str, Any]]:
    """m and m of the complement for each kind and number of nodes, and both as shares."""
    rows = []
    for done, (name, ablation, order, taken_out) in enumerate(kinds, 1):
        counts = sizes(len(order))
        circuits = [frozenset(order[:n]) for n in counts]
        none = float(ablation.metric([frozenset()]).mean())
        whole = float(ablation.sites.task.before.mean())
        kept = ablation.metric(circuits).mean(-1).tolist() if circuits else []
        gone = [float("nan")] * len(counts)
        if taken_out:
            gone = ablation.metric(circuits, complement=True).mean(-1).tolist()
        base = whole - none if whole > none else float("nan")  # no share of what is not there
        for n, m, without in [(0, none, whole), *zip(counts, kept, gone, strict=True)]:
            row = {"kind": name.split()[0], "draw": name, "n_nodes": n, "m": m}
            row |= {"m_without": without, "faithfulness": (m - none) / base}
            rows.append(row | {"completeness": (without - none) / base})
        on_progress(done)
    return rows
