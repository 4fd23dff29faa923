"""Faithfulness and completeness of a circuit by mean ablation (Wang et al. 2022, Sec. 4). [torch]

F is the mean logit difference with all heads outside the circuit mean-ablated (knockout.py), and M
the whole model.

1. faithfulness    |F(M) - F(C)|. A small or wrong circuit can be faithful, too, which is why random
                   circuits of the same layers and positions stand beside it.
2. completeness    |F(C \\ K) - F(M \\ K)| over sets K of heads: each class, random sets, and a set
                   that grows by the head that widens the gap most (Sec. 4.2 and App. I).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pipeline.circuits.knockout import Circuit, Knockout
from pipeline.job import cli

EMPTY: Circuit = frozenset()


class Case(NamedTuple):
    """A circuit of a kind, and the set of heads that is knocked out of it."""

    circuit: str
    removed: str
    kept: Circuit
    gone: Circuit


def random_circuit(circuit: Circuit, n_heads: int, rng: np.random.Generator) -> Circuit:
    """As many heads of the same layers at the same positions, drawn from outside the circuit."""
    drawn: set = set()
    for layer, _, position in sorted(circuit):
        taken = circuit | drawn
        free = [h for h in range(n_heads) if (layer, h, position) not in taken]
        if free:
            drawn.add((layer, int(rng.choice(free)), position))
    return frozenset(drawn)


def cases(
    parts: dict[str, Circuit], others: dict[str, Circuit], knockout: Knockout, n_random: int,
    rng: np.random.Generator,
) -> list[Case]:  # fmt: skip
    """The circuits of faithfulness, and of completeness each without K.

    Args:
        parts: class of heads -> its part of the circuit.
        others: name -> circuits that are compared with it.
        n_random: random circuits, and random sets K.
    """
    circuit = frozenset().union(*parts.values())
    named = {"model": knockout.whole(), "circuit": circuit, **others}
    out = [Case(name, "nothing", c, EMPTY) for name, c in named.items()]
    out.append(Case("no head", "nothing", EMPTY, EMPTY))
    for i in range(n_random):
        drawn = random_circuit(circuit, knockout.heads.n_heads, rng)
        out.append(Case(f"random {i}", "nothing", drawn, EMPTY))
    sets = {role: part for role, part in parts.items() if part}
    nodes = sorted(circuit)
    for i in range(n_random if nodes else 0):
        some = rng.choice(len(nodes), max(1, len(nodes) // 2), replace=False)
        sets[f"random set {i}"] = frozenset(nodes[j] for j in some)
    return out + [Case(n, k, c, gone) for k, gone in sets.items() for n, c in named.items()]


def measure(
    found: list[Case], knockout: Knockout, on_progress: Callable[[int], None] = lambda _: None
) -> list[float]:
    """F of every case; one that stands there twice is run once."""
    wanted = list(dict.fromkeys((c.kept, c.gone) for c in found))
    f = dict(zip(wanted, knockout.metric(wanted, on_progress).mean(-1).tolist(), strict=True))
    return [f[c.kept, c.gone] for c in found]


def greedy(
    circuit: Circuit, knockout: Knockout, steps: int, tried: int, rng: np.random.Generator
) -> list[tuple[Circuit, float, float]]:
    """Sets K of growing size, each with F(M \\ K) and F(C \\ K); the last is the worst found.

    Args:
        tried: candidates of a step, drawn from the rest of the circuit.
    """
    whole, gone, out = knockout.whole(), EMPTY, []
    progress = cli.Progress("search for what is missing", steps, "steps")
    for step in range(steps):
        rest = sorted(circuit - gone)
        if not rest:
            break
        some = rng.choice(len(rest), min(tried, len(rest)), replace=False)
        sets = [gone | {rest[i]} for i in some]
        both = [(c, s) for c in (whole, circuit) for s in sets]
        m, c = knockout.metric(both).mean(-1).cpu().numpy().reshape(2, -1)
        worst = int(np.abs(m - c).argmax())
        gone = sets[worst]
        out.append((gone, float(m[worst]), float(c[worst])))
        progress.at(step + 1)
    return out
