"""The naive circuit, and minimality of a circuit (Wang et al. 2022, Sec. 4). [torch]

Faithfulness and completeness stand in pipeline/circuits/judged.py; F is the mean logit difference
with all heads outside the circuit mean-ablated over p_ABC by template, and M the whole model.

1. naive        the strongest heads of the paper's five classes, and suppressors (discovery.py).
2. minimality   |F(C \\ (K + v)) - F(C \\ K)| over F(M) for each head v, the largest over sets K
                that stand for v: "for every v there is a K" (Sec. 4.3). The paper names one K for
                each head of GPT-2 small (App. K); `companions` is the rule behind them.
"""

from typing import NamedTuple

from pipeline.circuits.judged import Case
from pipeline.circuits.knockout import Circuit

WRITERS = ("name_mover", "suppressor", "writer")
NAIVE = {"name_mover": 3, "suppressor": 3, "s_inhibition": 4, "induction": 2, "duplicate": 2,
         "previous": 2}  # fmt: skip


def naive(parts: dict[str, Circuit], strongest: dict[str, list]) -> Circuit:
    """The naive circuit: the strongest heads, no backup or negative ones, no writers."""
    chosen = {(r, tuple(h)) for r, n in NAIVE.items() for h in strongest.get(r, [])[:n]}
    return frozenset(node for r, part in parts.items() for node in part if (r, node[:2]) in chosen)


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
    before = [(role, h) for h in roles[role][:i]]
    every = {name: [(name, h) for h in roles.get(name, [])] for name in ("name_mover", "negative")}
    if role in WRITERS:
        return {"stronger": before}
    if role == "backup":
        return {"movers": every["name_mover"] + before}
    sets = {"rest": before + [(role, h) for h in roles[role][i + 1 :]]}
    return sets | ({"negative": every["negative"]} if role == "induction" else {})


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
    node = {(r, h): (*h, place[r]) for r, heads in roles.items() for h in heads}
    circuit, out = frozenset(node.values()), []
    for role, heads in roles.items():
        for i, head in enumerate(heads):
            rest = [(role, h) for h in heads if h != head]
            known = rest if head not in (given or {}) else [(role_of[h], h) for h in given[head]]
            sets = companions(role, i, roles) if given is None else {"published": known}
            for name, some in (sets | {"class": rest}).items():
                gone, v = frozenset(node[one] for one in some), node[role, head]
                pair = (Case("circuit", name, circuit, k) for k in (gone, gone | {v}))
                out.append(Worth(role, v, *pair))
    return out
