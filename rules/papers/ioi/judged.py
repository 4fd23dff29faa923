"""Faithfulness, completeness and minimality of a circuit (Wang et al. 2022, Sec. 4). [torch]

F is the mean logit difference with all heads outside the circuit mean-ablated over p_ABC by
template, and M the whole model.

The naive circuit has the paper's five classes, and suppressors (discovery.py).

1. faithfulness    |F(M) - F(C)| / F(M). A small or wrong circuit can be faithful, too, which is why
                   the naive circuit and random circuits stand beside it.
2. completeness    |F(C \\ K) - F(M \\ K)| over sets K of heads: each class, random sets, and a set
                   that grows by the head that widens the gap most (Sec. 4.2 and App. I).
3. minimality      |F(C \\ (K + v)) - F(C \\ K)| over F(M) for each head v, K the rest of its class.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pipeline import cli
from pipeline.knockout import Circuit, Knockout

EMPTY: Circuit = frozenset()
NAIVE = {
    "name_mover": 3,
    "suppressor": 3,
    "s_inhibition": 4,
    "induction": 2,
    "duplicate": 2,
    "previous": 2,
}


class Case(NamedTuple):
    """A circuit of a kind, and the set of heads that is knocked out of it."""

    circuit: str
    removed: str
    kept: Circuit
    gone: Circuit


def naive(parts: dict[str, Circuit], strongest: dict[str, list]) -> Circuit:
    """The naive circuit: the strongest heads, no backup or negative ones, no writers."""
    chosen = {(r, tuple(h)) for r, n in NAIVE.items() for h in strongest.get(r, [])[:n]}
    return frozenset(node for r, part in parts.items() for node in part if (r, node[:2]) in chosen)


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
    parts: dict[str, Circuit], strongest: dict[str, list], knockout: Knockout, n_random: int,
    rng: np.random.Generator,
) -> list[Case]:  # fmt: skip
    """The circuits of faithfulness, and M, C and the naive one without each class."""
    whole, circuit = knockout.whole(), frozenset().union(*parts.values())
    small = naive(parts, strongest)
    named = {"model": whole, "circuit": circuit, "naive": small}
    out = [Case(name, "nothing", c, EMPTY) for name, c in named.items()]
    out.append(Case("no head", "nothing", EMPTY, EMPTY))
    n_heads = knockout.heads.n_heads
    out += [
        Case(f"random {i}", "nothing", random_circuit(circuit, n_heads, rng), EMPTY)
        for i in range(n_random)
    ]
    sets = {role: part for role, part in parts.items() if part}
    nodes = sorted(circuit)
    for i in range(n_random if nodes else 0):
        some = rng.choice(len(nodes), max(1, len(nodes) // 2), replace=False)
        sets[f"random set {i}"] = frozenset(nodes[j] for j in some)
    for removed, gone in sets.items():
        out += [Case(name, removed, c, gone) for name, c in named.items()]
    return out


def minimality(parts: dict[str, Circuit]) -> list[tuple[str, tuple, Case, Case]]:
    """For each head of the circuit: its class, the head, C \\ K and C \\ (K + v)."""
    circuit, out = frozenset().union(*parts.values()), []
    for role, part in parts.items():
        for node in sorted(part):
            others = part - {node}
            less = Case("circuit", "others of the class", circuit, others)
            out.append((role, node, less, Case("circuit", "class", circuit, part)))
    return out


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


def measure(
    found: list[Case], knockout: Knockout, told: Callable[[int], None] = lambda _: None
) -> list[float]:
    """F of every case; what stands twice is run once."""
    wanted = list(dict.fromkeys((c.kept, c.gone) for c in found))
    f = dict(zip(wanted, knockout.metric(wanted, told).mean(-1).tolist(), strict=True))
    return [f[c.kept, c.gone] for c in found]
