"""Claims of a paper.yaml and measured scalars -> a row per claim, with its verdict (judge.py).

Before anything runs, `faults` reads every claim of a paper: the metrics, budgets and null arms that
it names must exist, and every expression must be one (expressions.py).
"""

import ast
import math
import re
from collections.abc import Iterator
from typing import Any

from pipeline.claims import expressions, needs, scalars
from pipeline.claims.judge import judge
from pipeline.errors import RetraceError, nearest
from pipeline.spec.claims import Claim
from pipeline.store.provenance import digest

SHORT = 8  # characters of a definition's digest


def faults(paper: Any) -> Iterator[str]:
    """A sentence for every claim that no run could judge: claim, metric, the nearest one.

    A scale that does not judge a claim may leave out what it measures.
    """
    definitions = scalars.known(scalars.parts(paper))

    def known(name: str) -> bool:
        return scalars.definition(name, definitions) is not None

    for name, fault in _budget_faults(paper, known):
        yield f"{paper.folder / 'paper.yaml'}: budget.{name}: {fault}"
    for claim in paper.spec.claims:
        where = f"{paper.folder / 'paper.yaml'}: claim '{claim.id}'"
        try:
            wanted = needs.wanted(claim) | needs.metrics_of(claim, known)
            if null := null_of(claim, paper.spec.arm_names()):
                wanted |= expressions.decisive(null)
        except (ValueError, TypeError, RecursionError) as e:
            yield f"{where}: {e}"
            continue
        for name in sorted(wanted):
            if not known(name) and not _known_elsewhere(name, claim, paper):
                yield (
                    f"{where}: no metric '{name}'{nearest(name, definitions)}; metrics come from "
                    f"the sections of paper.yaml and from METRICS in the paper's metrics.py"
                )


def _known_elsewhere(name: str, claim: Claim, paper: Any) -> bool:
    """Whether this scale does not judge the claim, and one that does has its metric."""
    others = [s for s in claim.scales if s != paper.scale]
    if paper.at is None or len(others) < len(claim.scales):
        return False
    found = (scalars.known(scalars.parts(paper.at(scale))) for scale in others)
    return any(scalars.definition(name, definitions) is not None for definitions in found)


def check(paper: Any) -> None:
    """Raise a RetraceError for the first of `faults`."""
    for fault in faults(paper):
        raise RetraceError(fault)


def null_of(claim: Claim, arms: list[str]) -> str:
    """The expression that must not hold: `null_arm`; for an arm's name, the claim on that arm.

    Raises:
        ValueError: no such arm, or it changes nothing.
    """
    if not claim.null_arm:
        return ""
    tree = expressions.parse(claim.null_arm)
    if not isinstance(tree, ast.Name):
        return claim.null_arm
    arm = tree.id
    if arm not in arms:
        raise ValueError(f"null_arm: unknown arm '{arm}'{nearest(arm, arms)}")
    stated = claim.holds or f"abs({claim.metric} - {claim.paper}) <= {claim.tolerance}"
    holds = expressions.parse(stated)
    split = [name.partition(".") for name in expressions.names(holds)]
    moved = {"".join(p): f"{arm}.{p[2]}" for p in split if p[0] in arms}
    null = expressions.filled(holds, moved)
    if null == expressions.filled(holds, {}):
        raise ValueError(f"null_arm: '{arm}' is the arm that the claim speaks of; name another")
    return null


def setting(spec: Any, path: str) -> float | None:
    """A number of paper.yaml by its dotted path, such as `sae.training.n_rows`; None: no such."""
    found = spec
    for key in path.split("."):
        found = found.get(key) if isinstance(found, dict) else getattr(found, key, None)
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        return None
    return found


def budgets(paper: Any) -> dict[str, dict]:
    """Name -> unit, paper and ours of every budget; settings of paper.yaml in ours as numbers."""
    out = {}
    for name, budget in paper.spec.budget.items():
        tree = expressions.parse(budget.ours)
        numbers = {n: setting(paper.spec, n) for n in expressions.names(tree)}
        ours = expressions.filled(tree, {n: repr(v) for n, v in numbers.items() if v is not None})
        out[name] = {"unit": budget.unit, "paper": budget.paper, "ours": ours}
    return out


def _budget_faults(paper: Any, known: Any) -> Iterator[tuple[str, str]]:
    for name, budget in paper.spec.budget.items():
        try:
            tree = expressions.parse(budget.ours)
            expressions.evaluate(tree, lambda _: 1.0)
        except (ValueError, TypeError, RecursionError, ArithmeticError) as e:
            yield name, f"ours: {e}"
            continue
        for wanted in sorted(expressions.names(tree)):
            here = wanted.partition(".")[0] in type(paper.spec).model_fields  # at another scale
            if setting(paper.spec, wanted) is None and not known(wanted) and not here:
                yield name, f"ours: '{wanted}' is neither a number of paper.yaml nor a metric"


def for_the_job(paper: Any) -> dict[str, Any]:
    """What the stage needs of a paper: its claims with their null arms and budgets, the scale."""
    spec = paper.spec
    update = lambda c: {"null_arm": null_of(c, spec.arm_names()), "budget": spec.budget_of(c)}  # noqa: E731
    claims = [c.model_copy(update=update(c)) for c in spec.claims]
    out = {"budgets": budgets(paper), "scale": paper.scale, "definitions": defined(paper, claims)}
    return out | {"claims": [c.model_dump(mode="json") for c in claims]}


def defined(paper: Any, claims: list[Claim]) -> dict[str, str]:
    """Metric -> digest of its definition, of every metric that a claim, a need or a null reads."""
    definitions = scalars.known(scalars.parts(paper))

    def known(name: str) -> bool:
        return scalars.definition(name, definitions) is not None

    read: set[str] = set()
    for claim in claims:
        read |= needs.wanted(claim) | needs.metrics_of(claim, known)
        read |= expressions.names(expressions.parse(claim.null_arm)) if claim.null_arm else set()
    found = {name: scalars.definition(name, definitions) for name in sorted(read)}
    return {name: meaning(text) for name, text in found.items() if text is not None}


def meaning(definition: str) -> str:
    """A short digest of a definition; the file that computes it, '(claims/roc.py)', is no part."""
    return digest(re.sub(r" \([\w/]+\.py\)", "", definition), SHORT)


def _digests(definition: str) -> tuple[str, str]:
    """`meaning`, and what stood in a job's spec in its place before version 0.2."""
    return meaning(definition), digest(definition, SHORT)


def judged(spec: dict[str, Any], measured: dict[str, dict]) -> list[dict[str, Any]]:
    """The rows of claims.csv.

    Args:
        spec: see `for_the_job`.
        measured: the metrics of metrics.json. One whose definition is not today's was not measured:
            results that were published before it changed cannot decide a claim of today.
    """
    wanted = spec.get("definitions", {})
    same = {
        name: metric
        for name, metric in measured.items()
        if name not in wanted or wanted[name] in _digests(metric.get("definition", ""))
    }
    claims = [Claim.model_validate(c) for c in spec["claims"]]
    return [judge(c, same, spec["scale"], spec["budgets"]) for c in claims]
