"""The judge: a claim and what a run measured -> a verdict, with its reason in words.

    reproduced      a value within its tolerance, or an order that holds
    not reproduced  judged, and it does not
    undecided       the seeds disagree, and their interval holds both answers
    says nothing    it holds, and as well where it must not: on its null arm
    not comparable  this run cannot judge it: its scale or budget, a need not met, or a tie
    not run         the metric was not measured in this run
    plumbing        at smoke scale, in place of all that would be judged

How an order is decided over n seeds. Each comparison `a < b` has a margin b - a in every seed; a
seed in which a metric is undefined counts as one that fails, and a seed that is tied is left out.

1. It holds where every seed has it, and fails where the median margin has not.
2. Between the two, the interval of the median margin decides: it holds where the whole interval is
   above zero, and is undecided otherwise. The interval is that of order statistics, which is exact
   for any distribution (David and Nagaraja 2003, Order Statistics, Sec. 7.1): between the j-th
   margin from below and the j-th from above, the median lies with probability
   1 - 2 P(Bin(n, 1/2) < j). j is the largest that leaves at least 95 %; below six seeds, where none
   does, it is 1.

With more seeds the interval narrows around the median: a true order gains from them.

A value is the mean of its seeds. It is reproduced where the mean and most seeds lie within the
tolerance, not reproduced where the 95 % interval of the mean (Student's t) misses what the
tolerance allows, and undecided between the two. One seed has no interval: its value decides.
"""

import ast
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pipeline.claims import expressions, needs
from pipeline.claims.expressions import COMPARE, evaluate, filled, names, parse
from pipeline.spec.claims import Claim

COLUMNS = (
    "id text of source kind paper_value ours sd n held margin low high confidence tolerance reason "
    "verdict why budget share null_arm discussion scale provenance_kind"
).split()
JUDGED = ("reproduced", "not reproduced", "undecided", "says nothing")
CONFIDENCE = 0.95
FULL = 0.95  # of the paper's budget: what a published value is compared with by default
ORDER_OF_STATES = ("fails", "tied", "undecided", "holds")  # `and` takes the first, `or` the last
STRICT = (ast.Lt, ast.Gt)
EMPTY: Mapping[str, dict] = MappingProxyType({})


@dataclass(frozen=True)
class Comparison:
    """One `a < b` over the seeds.

    Args:
        state: one of ORDER_OF_STATES.
        margin: the median over seeds of how far it holds; below zero where it fails.
        low, high: the interval of that median.
        confidence: of the interval.
    """

    state: str
    margin: float
    low: float
    high: float
    confidence: float


def judge(
    claim: Claim, metrics: dict[str, dict], scale: str, budgets: Mapping[str, dict] = EMPTY
) -> dict[str, Any]:
    """One row of claims.csv.

    Args:
        metrics: name -> values (one a seed, NaN where undefined), mean, sd, n.
        budgets: see `claims.budgets`.
    """
    row = dict.fromkeys(COLUMNS)
    copied = {"id", "text", "of", "source", "kind", "reason", "discussion", "provenance_kind"}
    row |= claim.model_dump(include=copied)
    row |= {"scale": scale, "paper_value": claim.paper, "tolerance": claim.tolerance}
    spent = needs.spent(budgets.get(claim.budget), metrics)
    row |= {"budget": needs.told_of(spent), "share": spent.share if spent else None}
    row |= order(claim.holds, metrics) if claim.kind == "order" else value(claim, metrics)
    if claim.null_arm:
        row |= against_null(claim.null_arm, metrics, row["verdict"])
    elif claim.no_null_arm:
        row["null_arm"] = f"none: {claim.no_null_arm}"
    if why := not_comparable(claim, metrics, scale, spent):
        row |= {"verdict": "not comparable", "why": why}
    elif missing := needs.unmeasured(claim, metrics):
        row |= {"verdict": "not run", "why": f"a need was not measured: {missing}"}
    if scale == "smoke" and row["verdict"] in JUDGED:
        row |= {"verdict": "plumbing", "why": f"a smoke run tests the plumbing; {row['verdict']}"}
    return row


def not_comparable(claim: Claim, metrics: dict, scale: str, spent: Any) -> str:
    """Why this run cannot judge a claim; an empty string where it can."""
    if not claim.comparable:
        return claim.reason
    if claim.provenance_kind == "M":
        return "quoted from memory; read it in the paper before it is judged"
    if not claim.judged_at(scale):
        why = "no published value at this scale" if claim.kind == "value" else "run is too small"
        return f"{why} ({spent})" if spent else why
    at_paper_scale = set(claim.scales or ["paper"]) == {"paper"}  # others do not depend on a budget
    whole = claim.kind == "value" and claim.of == "paper" and at_paper_scale
    if whole and spent and "budget" not in claim.needs and not spent.share >= FULL:
        return f"a published value is compared with a run of the paper's budget, and here {spent}"
    return "; ".join(needs.unmet(claim, metrics, spent))


def against_null(null: str, metrics: dict, verdict: str) -> dict[str, Any]:
    """What the null arm does, and the verdict where the claim holds there as well."""
    found = order(null, metrics)
    if found["verdict"] == "not run":
        measured = names(parse(null)) <= metrics.keys()
        return {"null_arm": "undefined there: does not hold" if measured else "not run"}
    meets = found["verdict"] == "reproduced"
    text = f"{found['ours']}: {'holds' if meets else 'does not hold'}"
    if meets and verdict == "reproduced":
        return {
            "null_arm": text,
            "verdict": "says nothing",
            "why": f"its null arm meets it, too: {text}",
        }
    return {"null_arm": text}


# --- values --------------------------------------------------------------------------------


def value(claim: Claim, metrics: dict[str, dict]) -> dict[str, Any]:
    """The number of a claim beside the paper's, and its verdict."""
    found = metrics.get(claim.metric)
    seeds = [v for v in found["values"] if math.isfinite(v)] if found else []
    if not seeds:
        return {"verdict": "not run"}
    n, mean, tolerance = len(found["values"]), sum(seeds) / len(seeds), claim.tolerance
    row = {"ours": mean, "sd": found["sd"], "n": n, "confidence": CONFIDENCE if n > 1 else None}
    if tolerance is None:
        return row | {"verdict": "not reproduced"}  # comparable: false says why it is not judged
    near = sum(abs(v - claim.paper) <= tolerance for v in seeds)
    row |= {"held": near, "margin": tolerance - abs(mean - claim.paper)}
    low, high = interval_of_mean(seeds)
    row |= {"low": low, "high": high} if n > 1 else {}
    if abs(mean - claim.paper) <= tolerance and 2 * near > n:
        return row | {"verdict": "reproduced"}
    undefined = f"; undefined in {n - len(seeds)} of {n} seeds" if len(seeds) < n else ""
    if n == 1 or high < claim.paper - tolerance or low > claim.paper + tolerance:
        return row | {"verdict": "not reproduced", "why": undefined.strip("; ") or None}
    why = f"{near} of {n} seeds lie within the tolerance, and the interval of the mean is "
    return row | {"verdict": "undecided", "why": f"{why}{low:.4g} to {high:.4g}{undefined}"}


def interval_of_mean(seeds: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean by Student's t; without bounds for one seed."""
    from scipy import stats

    n, mean = len(seeds), sum(seeds) / len(seeds)
    if n < 2:
        return -math.inf, math.inf
    error = math.sqrt(sum((v - mean) ** 2 for v in seeds) / (n - 1) / n)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * error
    return mean - half, mean + half


# --- orders --------------------------------------------------------------------------------


def order(holds: str, metrics: dict[str, dict]) -> dict[str, Any]:
    """Whether an order holds, over the seeds of its metrics."""
    tree = parse(holds)
    wanted = sorted(names(tree))
    if any(m not in metrics or not any(map(math.isfinite, metrics[m]["values"])) for m in wanted):
        return {"paper_value": holds, "verdict": "not run"}
    n, at = paired({m: metrics[m] for m in wanted})
    held = [holds_at(tree, at(i)) for i in range(n)]
    if all(h is None for h in held):  # a division by zero, a number too large
        return {"paper_value": holds, "verdict": "not run"}
    found: list[Comparison] = []
    state = decide(tree, lambda leaf: found.append(compare(leaf, n, at)) or found[-1].state)
    k = sum(h is True for h in held)
    row = {"paper_value": holds, "n": n, "held": k, "ours": shown(tree, metrics, wanted, k, n)}
    weakest = min(found, key=lambda c: (ORDER_OF_STATES.index(c.state), c.low))
    fields = ("margin", "low", "high", "confidence") if n > 1 else ("margin",)
    row |= {f: v for f in fields if math.isfinite(v := getattr(weakest, f))}
    return row | verdict_of(state, row, weakest)


def verdict_of(state: str, row: dict, weakest: Comparison) -> dict[str, Any]:
    """The verdict that a state of `decide` stands for, and why."""
    match state:
        case "holds":
            return {"verdict": "reproduced"}
        case "fails":
            return {"verdict": "not reproduced"}
        case "tied":
            return {"verdict": "not comparable", "why": f"nothing left to improve: {row['ours']}"}
    interval = f"between {weakest.low:.4g} and {weakest.high:.4g} ({weakest.confidence:.0%})"
    why = f"{row['held']} of {row['n']} seeds have it, and the median margin is {interval}"
    return {"verdict": "undecided", "why": why}


def paired(metrics: dict[str, dict]) -> tuple[int, Callable[[int], Callable[[str], float]]]:
    """How many seeds can be compared, and, for each of them, the value of a metric.

    A metric with one value stands beside every seed of the others. Different numbers of seeds
    cannot be paired: then the means are compared, as one seed.
    """
    counts = {m["n"] for m in metrics.values()} - {1}
    if len(counts) > 1:
        return 1, lambda i: lambda name: metrics[name]["mean"]

    def at(i: int) -> Callable[[str], float]:
        return lambda name: metrics[name]["values"][i if metrics[name]["n"] > 1 else 0]

    return max(counts, default=1), at


def holds_at(tree: ast.expr, value: Callable[[str], float]) -> bool | None:
    """Whether an expression holds in a seed; None where it cannot be computed."""
    try:
        return bool(evaluate(tree, value))
    except ArithmeticError:
        return None


def decide(node: ast.expr, compared: Callable[[ast.Compare], str]) -> str:
    """The state of an expression out of those of its comparisons."""
    if isinstance(node, ast.BoolOp):
        states = [decide(v, compared) for v in node.values]
        pick = min if isinstance(node.op, ast.And) else max
    else:
        states, pick = [compared(c) for c in expressions.comparisons(node)], min
    return pick(states, key=ORDER_OF_STATES.index)


def compare(leaf: ast.Compare, n: int, at: Callable) -> Comparison:
    """One comparison over n seeds."""
    (op,) = leaf.ops
    strict, both = isinstance(op, STRICT), bool(names(leaf.left) and names(leaf.comparators[0]))
    margins = [margin(leaf, at(i)) for i in range(n)]
    tied = [strict and both and m is not None and m.tied for m in margins]
    sizes = sorted(
        m.size if m and not math.isnan(m.size) else -math.inf
        for m, t in zip(margins, tied, strict=True)
        if not t
    )
    if not sizes:
        return Comparison("tied", 0.0, 0.0, 0.0, 1.0)
    low, high, confidence = interval_of_median(sizes)
    good = functools.partial(COMPARE[ast.Gt if strict else ast.GtE])
    middle = median(sizes)
    if all(good(m, 0) for m in sizes):
        state = "holds"
    elif not good(middle, 0):
        state = "fails"
    else:
        state = "holds" if good(low, 0) else "undecided"
    return Comparison(state, middle, low, high, confidence)


@dataclass(frozen=True)
class Margin:
    """By how much a comparison holds in a seed, and whether both sides are the same number."""

    size: float
    tied: bool


def margin(leaf: ast.Compare, value: Callable[[str], float]) -> Margin | None:
    """The margin in one seed; None where it cannot be computed."""
    try:
        a, b = evaluate(leaf.left, value), evaluate(leaf.comparators[0], value)
    except ArithmeticError:
        return None
    up = isinstance(leaf.ops[0], (ast.Lt, ast.LtE))
    return Margin(b - a if up else a - b, math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-12))


def median(sizes: Sequence[float]) -> float:
    """Of sorted margins; the mean of the middle two of an even number."""
    n = len(sizes)
    return (sizes[(n - 1) // 2] + sizes[n // 2]) / 2


def interval_of_median(sizes: Sequence[float]) -> tuple[float, float, float]:
    """The exact interval of the median of sorted margins: low, high and its confidence."""
    from scipy import stats

    n = len(sizes)
    inside = [1 - 2 * float(stats.binom.cdf(j - 1, n, 0.5)) for j in range(1, n // 2 + 1)]
    j = max((j for j, c in enumerate(inside, 1) if c >= CONFIDENCE), default=1)
    return sizes[j - 1], sizes[n - j], inside[j - 1] if inside else 0.0


def shown(tree: ast.expr, metrics: dict, wanted: list[str], k: int, n: int) -> str:
    """The order with our means in it, and in how many seeds it holds."""
    means = {m: f"{metrics[m]['mean']:.4g}" for m in wanted}
    return filled(tree, means) + (f" ({k} of {n} seeds)" if n > 1 else "")
