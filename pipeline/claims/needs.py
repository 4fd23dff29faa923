"""What must hold in a run before a claim is judged, and how much of the paper's budget it had.

A core need is a number under its name (`needs: {dead_share: 0.05}`); it is asked of every
dictionary, lens or model that the claim names, or of those under `of`. A need of the paper's own is
an expression over metrics with its words. What is not met makes the claim not comparable, with the
numbers.
"""

import ast
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.claims.expressions import decisive, evaluate, filled, names, parse
from pipeline.spec.claims import Claim, Need

MEASURED = {"dead_share", "l0", "unread", "past_minimum"}  # core needs, each of `<of>.<metric>`


@dataclass(frozen=True)
class Spent:
    """Ours and the paper's budget, in one unit."""

    ours: float
    paper: float
    unit: str

    @property
    def share(self) -> float:
        return self.ours / self.paper

    def __str__(self) -> str:
        amount = f"{number(self.ours)} of the paper's {number(self.paper)} {self.unit}"
        return f"{amount}, {percent(self.share)}"


def number(x: float) -> str:
    """20,000,000 for large numbers, four digits for others."""
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.4g}"


def percent(share: float) -> str:
    """'0.52 %'; two significant digits below one per cent."""
    return f"{100 * share:.2g} %" if share < 0.01 else f"{100 * share:.3g} %"


def spent(budget: dict | None, metrics: dict[str, dict]) -> Spent | None:
    """The budget of a claim in this run; None where it has none or it was not measured.

    Args:
        budget: unit, paper, and ours: an expression over metrics.
    """
    if budget is None:
        return None
    tree = parse(budget["ours"])
    if any(n not in metrics or not math.isfinite(metrics[n]["mean"]) for n in names(tree)):
        return None
    try:
        ours = float(evaluate(tree, lambda name: metrics[name]["mean"]))
    except ArithmeticError:
        return None
    return Spent(ours, budget["paper"], budget["unit"])


def told_of(found: Spent | None) -> str | None:
    return str(found) if found else None


def wanted(claim: Claim) -> set[str]:
    """The metrics that a claim itself compares; ValueError where an expression of it is none."""
    return {claim.metric} - {""} if claim.kind == "value" else set(decisive(claim.holds))


def listed(claim: Claim) -> Iterator[tuple[str, Need]]:
    """Every need of a claim by its name."""
    for name, need in claim.needs.items():
        yield name, need if isinstance(need, Need) else Need(bound=need)


def metric_of(name: str, need: Need) -> str:
    """The metric that a core need bounds: its name; of l0 without a target, l0_off."""
    return "l0_off" if name == "l0" and need.target is None else name


def owners(claim: Claim, name: str, need: Need, known: Any) -> list[str]:
    """What a measured need is asked of: its `of`, else all that the claim names and that have it.

    Args:
        known: whether there is a metric of this name: `known(name)`.
    """
    if need.of:
        return need.of
    prefixes = sorted({m.rpartition(".")[0] for m in wanted(claim)} - {""})
    return [p for p in prefixes if known(f"{p}.{metric_of(name, need)}")]


def metrics_of(claim: Claim, known: Any) -> set[str]:
    """The metrics that the needs of a claim read; ValueError where an expression is none."""
    out: set[str] = set()
    for name, need in listed(claim):
        if need.holds:
            out |= decisive(need.holds)
        elif name in MEASURED:
            found = owners(claim, name, need, known)
            if not found:
                raise ValueError(
                    f"needs.{name}: no metric of this claim has a {metric_of(name, need)} beside "
                    f"it; name what it is asked of under of:"
                )
            out |= {f"{o}.{metric_of(name, need)}" for o in found}
    return out


def unmeasured(claim: Claim, metrics: dict[str, dict]) -> str:
    """The metrics of a claim's needs that this run did not measure, as a list in words."""
    try:
        found = metrics_of(claim, metrics.__contains__)
    except ValueError as e:
        return str(e)
    missing = [m for m in sorted(found) if m not in metrics or math.isnan(metrics[m]["mean"])]
    return ", ".join(missing)


def unmet(claim: Claim, metrics: dict[str, dict], found: Spent | None) -> Iterator[str]:
    """A sentence for every need that this run does not meet."""
    for name, need in listed(claim):
        if need.holds:
            yield from _own(need, metrics)
        elif name == "budget":
            if found is None or not found.share >= need.bound:
                had = str(found) if found else "it was not measured"
                yield f"asks for {percent(need.bound)} of the paper's budget, and here {had}"
        elif name == "seeds":
            n = max((metrics[m]["n"] for m in wanted(claim) if m in metrics), default=0)
            if n < need.bound:
                yield f"asks for {need.bound:g} seeds, and this run has {n}"
        else:
            for owner in owners(claim, name, need, metrics.__contains__):
                values = metrics.get(f"{owner}.{metric_of(name, need)}", {}).get("values", [])
                if said := _bounded(name, need, [v for v in values if not math.isnan(v)], owner):
                    yield said


def _own(need: Need, metrics: dict[str, dict]) -> Iterator[str]:
    """The words of a need of the paper's own, where a seed does not meet it."""
    tree = parse(need.holds)
    joined = isinstance(tree, ast.BoolOp) and isinstance(tree.op, ast.And)
    for part in tree.values if joined else [tree]:  # one that fails is enough, whatever is missing
        mine = {m: metrics[m] for m in names(part) if m in metrics}
        if mine.keys() == names(part) and not _met(part, mine):
            here = filled(part, {m: f"{v['mean']:.4g}" for m, v in mine.items()})
            yield f"{need.because}; here {here}"
            return


def _met(tree: ast.expr, metrics: dict[str, dict]) -> bool:
    """Whether an expression holds in every seed."""
    n = max(m["n"] for m in metrics.values())

    def at(i: int) -> Callable[[str], float]:
        return lambda name: metrics[name]["values"][i if metrics[name]["n"] == n else 0]

    try:
        return all(evaluate(tree, at(i)) for i in range(n))
    except ArithmeticError:
        return False


def _bounded(name: str, need: Need, values: list[float], owner: str) -> str:
    """What a core need says of its worst seed; an empty string where it is met."""
    if not values:
        return ""
    bound, worst = need.bound, max(values)
    match name:
        case "dead_share" if worst > bound:
            return (
                f"asks for at most {percent(bound)} dead latents, and {owner} has {percent(worst)}"
            )
        case "unread" if not worst < bound:
            return (
                f"asks for a lens that beats a constant (unread below {bound:g}), and {owner} "
                f"leaves {worst:.3g}"
            )
        case "past_minimum" if worst > bound:
            return (
                f"asks for a validation loss at most {percent(bound)} above its minimum, and "
                f"{owner} ended {percent(worst)} above"
            )
        case "l0" if need.target is None:
            if worst > bound:
                return (
                    f"asks for an L0 within {percent(bound)} of its target, and {owner} is "
                    f"{percent(worst)} off"
                )
        case "l0":
            worst = max(values, key=lambda v: abs(v / need.target - 1))
            if abs(worst / need.target - 1) > bound:
                return (
                    f"asks for an L0 within {percent(bound)} of {need.target:g}, and {owner} has "
                    f"{worst:.4g}"
                )
    return ""
