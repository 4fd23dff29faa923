"""Scalars against the paper's numbers -> verdicts.

    reproduced      a value within its tolerance, or an ordering that holds for every seed
    not reproduced  judged, and it does not
    not comparable  the claim holds only at the paper's scale or on the paper's model, or is quoted
                    from memory, or its comparable_if is false in this run
    not run         the metric was not measured in this run

A claim of kind order is an expression over metrics, such as `a.ev < b.ev < c.ev` or
`abs(x - y) <= 0.1 and z > 0`; it is parsed, never executed as Python.
"""

import ast
import contextlib
import copy
import functools
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

from pipeline.errors import RetraceError, nearest
from pipeline.spec import Claim

COLUMNS = (
    "id text source kind paper_value ours sd n tolerance reason verdict scale provenance_kind"
).split()
COMPARE = {ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge}
ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
FUNCTIONS: dict[str, Callable] = {"abs": abs, "min": min, "max": max}


def dotted(node: ast.AST) -> str | None:
    """'a.b.c' for a chain of attributes on a name, else None."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return None


def parse(expression: str) -> ast.expr:
    """The syntax tree of an expression; ValueError where it is none."""
    try:
        return ast.parse(expression.strip(), mode="eval").body
    except SyntaxError as e:
        raise ValueError(f"'{expression}' is not an expression ({e.msg})") from None
    except (ValueError, RecursionError, MemoryError):
        raise ValueError("it holds a null byte, or nests too deep to be an expression") from None


def names(node: ast.AST) -> set[str]:
    """The metrics that an expression speaks of."""
    if isinstance(node, ast.Call):
        return set().union(*(names(a) for a in node.args))
    if found := dotted(node):
        return {found}
    return set().union(*(names(child) for child in ast.iter_child_nodes(node)), set())


def evaluate(node: ast.AST, value: Callable[[str], float]) -> Any:
    """The value of an expression of names, numbers, + - * /, comparisons, and, or, abs, min, max.

    Args:
        node: from `parse`.
        value: gives a metric's number.
    """
    again = lambda n: evaluate(n, value)  # noqa: E731
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return number
        case ast.Compare(left=left, ops=ops, comparators=rest) if all(
            type(o) in COMPARE for o in ops
        ):
            terms = [again(left), *map(again, rest)]
            pairs = zip(ops, terms, terms[1:], strict=False)
            return all(COMPARE[type(o)](a, b) for o, a, b in pairs)
        case ast.BinOp(left=a, op=op, right=b) if type(op) in ARITHMETIC:
            return ARITHMETIC[type(op)](again(a), again(b))
        case ast.UnaryOp(op=ast.USub(), operand=a):
            return -again(a)
        case ast.BoolOp(op=op, values=values):
            return (all if isinstance(op, ast.And) else any)(again(v) for v in values)
        case ast.Call(func=ast.Name(id=f), args=args, keywords=[]) if f in FUNCTIONS:
            return FUNCTIONS[f](*map(again, args))
    if found := dotted(node):
        return value(found)
    raise ValueError(f"'{ast.unparse(node)}' may not stand in a claim")


def is_judgement(node: ast.AST) -> bool:
    """Whether an expression is true or false: comparisons, joined by `and` and `or`."""
    if isinstance(node, ast.BoolOp):
        return all(is_judgement(v) for v in node.values)
    return isinstance(node, ast.Compare)


def _wanted(claim: Claim) -> set[str]:
    """The metrics that a claim needs; ValueError where an expression of it is none."""
    found = {claim.metric} - {""} if claim.kind == "value" else set(_decisive(claim.holds))
    return found | (_decisive(claim.comparable_if) if claim.comparable_if else frozenset())


@functools.cache
def _decisive(expression: str) -> frozenset[str]:
    """The metrics of an expression that is true or false; ValueError where it is not."""
    tree = parse(expression)
    with contextlib.suppress(ArithmeticError):  # of the ones that stand in for the metrics
        evaluate(tree, lambda _: 1.0)
    if not is_judgement(tree):
        raise ValueError(f"'{expression}' compares nothing; write e.g. a.ev < b.ev")
    if not (found := names(tree)):
        raise ValueError(f"'{expression}' names no metric, so no run can decide it")
    return frozenset(found)


def faults(paper: Any) -> Iterator[str]:
    """A sentence for every claim that no run could judge: the claim, the metric, the nearest one.

    Every metric that a claim names must exist, and every expression must be one.
    """
    from pipeline import metrics

    definitions = metrics.known(metrics.parts(paper))
    for claim in paper.spec.claims:
        where = f"{paper.folder / 'paper.yaml'}: claim '{claim.id}'"
        try:
            wanted = _wanted(claim)
        except (ValueError, TypeError, RecursionError) as e:
            yield f"{where}: {e}"
            continue
        for name in sorted(wanted):
            if metrics.definition(name, definitions) is None:
                yield (
                    f"{where}: no metric '{name}'{nearest(name, definitions)}; metrics come from "
                    f"the sections of paper.yaml and from METRICS in the paper's metrics.py"
                )


def check(paper: Any) -> None:
    """Raise a RetraceError for the first of `faults`."""
    for fault in faults(paper):
        raise RetraceError(fault)


def judge(claim: Claim, metrics: dict[str, dict], scale: str) -> dict[str, Any]:
    """One row of claims.csv."""
    row = dict.fromkeys(COLUMNS)
    row |= claim.model_dump(include={"id", "text", "source", "kind", "reason", "provenance_kind"})
    row |= {"scale": scale, "paper_value": claim.paper, "tolerance": claim.tolerance}
    row |= _order(claim.holds, metrics) if claim.kind == "order" else _value(claim, metrics)
    premise = _order(claim.comparable_if, metrics) if claim.comparable_if else None
    if premise and premise["verdict"] == "not run":
        row["verdict"] = "not run"
    if why := _not_comparable(claim, scale, premise):
        row |= {"verdict": "not comparable", "reason": f"{why}; {claim.reason}".strip(" ;")}
    return row


def _not_comparable(claim: Claim, scale: str, premise: dict | None) -> str | None:
    """Why a claim is not judged; None where it is; blank where its own reason says it.

    Args:
        premise: its comparable_if, judged as an order; None where it has none.
    """
    if not claim.comparable:
        return " "
    if claim.provenance_kind == "M":
        return "quoted from memory; read it in the paper before it is judged"
    if not claim.judged_at(scale):
        return "no published value at this scale" if claim.kind == "value" else "run is too small"
    if premise and premise["verdict"] == "not reproduced":
        return f"comparable only if {claim.comparable_if}, and here {premise['ours']}"
    return None


def _value(claim: Claim, metrics: dict[str, dict]) -> dict[str, Any]:
    found = metrics.get(claim.metric)
    if found is None or not math.isfinite(found["mean"]):
        return {"verdict": "not run"}
    near = claim.tolerance is not None and abs(found["mean"] - claim.paper) <= claim.tolerance
    verdict = "reproduced" if near else "not reproduced"
    return {"ours": found["mean"], "sd": found["sd"], "n": found["n"], "verdict": verdict}


def _order(holds: str, metrics: dict[str, dict]) -> dict[str, Any]:
    tree = parse(holds)
    wanted = sorted(names(tree))
    if any(n not in metrics or not math.isfinite(metrics[n]["mean"]) for n in wanted):
        return {"paper_value": holds, "verdict": "not run"}
    counts = {metrics[n]["n"] for n in wanted} - {1}
    if len(counts) > 1:  # different numbers of seeds cannot be paired
        counts, values = {1}, {n: [metrics[n]["mean"]] for n in wanted}
    else:
        values = {n: metrics[n]["values"] for n in wanted}
    n = max(counts, default=1)
    try:
        held = [
            bool(evaluate(tree, lambda m, i=i: values[m][i if len(values[m]) > 1 else 0]))
            for i in range(n)
        ]
    except ArithmeticError:  # a division by zero, a number too large
        return {"paper_value": holds, "verdict": "not run"}
    return {
        "paper_value": holds,
        "ours": _filled(tree, {m: metrics[m]["mean"] for m in wanted}) + _of_seeds(held),
        "n": n,
        "verdict": "reproduced" if all(held) else "not reproduced",
    }


def _of_seeds(held: list[bool]) -> str:
    return f" ({sum(held)} of {len(held)} seeds)" if len(held) > 1 else ""


class _Fill(ast.NodeTransformer):
    """Puts the mean of a metric where its name stands."""

    def __init__(self, values: dict[str, float]) -> None:
        self.values = values

    def visit(self, node: ast.AST) -> ast.AST:
        if (name := dotted(node)) in self.values:
            return ast.Name(f"{self.values[name]:.4g}")
        return self.generic_visit(node)


def _filled(tree: ast.AST, values: dict[str, float]) -> str:
    """The expression with the mean of each metric in its place."""
    filled = _Fill(values).visit(copy.deepcopy(tree))
    if isinstance(filled, ast.BoolOp) and all(isinstance(v, ast.Compare) for v in filled.values):
        word = " and " if isinstance(filled.op, ast.And) else " or "
        return word.join(map(ast.unparse, filled.values))  # unparse puts the third in brackets
    return ast.unparse(filled)


def main() -> None:
    from pipeline import cli, tables

    parser = cli.parser("claims", __doc__, metrics="metrics.json", out="claims.csv")

    def work(job: cli.Job) -> None:
        import pandas as pd

        metrics = tables.read_json(job.args.metrics)["metrics"]
        claims = [Claim.model_validate(c) for c in job.spec["claims"]]
        rows = [judge(c, metrics, job.spec["scale"]) for c in claims]
        frame = pd.DataFrame(rows, columns=COLUMNS)
        tables.write_csv(job.args.out, frame, job.certificate([job.args.metrics]))

    cli.run("claims", parser.parse_args(), work)


if __name__ == "__main__":
    main()
