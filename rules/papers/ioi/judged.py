"""Faithfulness, completeness and minimality of a circuit (Wang et al. 2022, Sec. 4). [torch]

F is the mean logit difference with all heads outside the circuit mean-ablated over p_ABC by
template, and M the whole model.

The naive circuit has the paper's five classes, and suppressors (discovery.py).

1. faithfulness    |F(M) - F(C)| / F(M). A small or wrong circuit can be faithful, too, which is why
                   the naive circuit and random circuits stand beside it.
2. completeness    |F(C \\ K) - F(M \\ K)| over sets K of heads: each class, random sets, and a set
                   that grows by the head that widens the gap most (Sec. 4.2 and App. I).
3. minimality      |F(C \\ (K + v)) - F(C \\ K)| over F(M) for each head v, the largest over sets
                   K that stand for v: "for every v there is a K" (Sec. 4.3). The paper names one K
                   for each head of GPT-2 small (App. K); `companions` is the rule behind them.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pipeline.circuits.knockout import Circuit, Knockout
from pipeline.job import cli

EMPTY: Circuit = frozenset()
WRITERS = ("name_mover", "suppressor", "writer")
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


class Worth(NamedTuple):
    """A head of the circuit, and C \\ K and C \\ (K + v) for one set K; kept.removed names K."""

    role: str
    node: tuple[int, int, str]
    kept: Case
    lost: Case


def companions(role: str, i: int, roles: dict[str, list]) -> dict[str, list]:
    """The sets K that stand for head i of a class, name -> heads, in the paper's ways (App. K).

    rest      the rest of the class
    stronger  of heads that write the answer: those of the class that do more. What is left of the
              class takes over from a head that is lost, so the rest is not taken away before it
    movers    of a backup head: all name movers, and the backups that do more
    negative  of an induction head: the negative name movers, against which it acts, too
    """
    heads = roles[role]
    before = [(role, h) for h in heads[:i]]
    every = lambda name: [(name, h) for h in roles.get(name, [])]  # noqa: E731
    if role in WRITERS:
        return {"stronger": before}
    if role == "backup":
        return {"movers": every("name_mover") + before}
    sets = {"rest": before + [(role, h) for h in heads[i + 1 :]]}
    return sets | ({"negative": every("negative")} if role == "induction" else {})


def minimality(
    roles: dict[str, list], place: dict[str, str], given: dict[tuple, list] | None = None
) -> list[Worth]:
    """C \\ K and C \\ (K + v) for each head v of the circuit and each set K.

    The set `class`, the rest of the class of v, is there for all; it is no set of the paper's.

    Args:
        roles: class -> heads, strongest first; place: class -> where its heads work.
        given: a published circuit's K, head -> heads; heads that are not in it have the rest of
            their class. None: `companions`.
    """
    role_of = {h: r for r, heads in roles.items() for h in heads}
    node = lambda role, h: (*h, place[role])  # noqa: E731
    circuit = frozenset(node(r, h) for h, r in role_of.items())
    out = []
    for role, heads in roles.items():
        for i, head in enumerate(heads):
            rest = [(role, h) for h in heads if h != head]
            if given is None:
                sets = companions(role, i, roles)
            elif head in given:
                sets = {"published": [(role_of[h], h) for h in given[head]]}
            else:
                sets = {"published": rest}
            for name, some in (sets | {"class": rest}).items():
                gone, v = frozenset(node(*one) for one in some), node(role, head)
                pair = (Case("circuit", name, circuit, k) for k in (gone, gone | {v}))
                out.append(Worth(role, v, *pair))
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
