"""Expressions over metrics: `a.ev < b.ev < c.ev`, `abs(x - y) <= 0.1 and z > 0`.

They are parsed and walked, never executed as Python.
"""

import ast
import contextlib
import copy
import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

COMPARE = {ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge}
ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def _defined(function: Callable) -> Callable:
    """min or max, undefined (NaN) where a term is; Python's own depend on the order of terms."""

    def of(*terms: float) -> float:
        return math.nan if any(math.isnan(t) for t in terms) else function(terms)

    return of


FUNCTIONS: dict[str, Callable] = {"abs": abs, "min": _defined(min), "max": _defined(max)}
DEEPEST = 100  # levels of an expression; Python 3.13 parses 3,000, more than the walks here survive


def dotted(node: ast.AST) -> str | None:
    """'a.b.c' for a chain of attributes on a name, else None."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return None


def parse(expression: str) -> ast.expr:
    """The syntax tree of an expression of at most DEEPEST levels; ValueError where it is none."""
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
    except SyntaxError as e:
        raise ValueError(f"'{expression}' is not an expression ({e.msg})") from None
    except (ValueError, RecursionError, MemoryError):
        raise ValueError("it holds a null byte, or nests too deep to be an expression") from None
    level = [tree]
    for _ in range(DEEPEST):
        level = [child for node in level for child in ast.iter_child_nodes(node)]
    if level:
        raise ValueError(f"it nests deeper than {DEEPEST} levels; split it into two claims")
    return tree


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
    again = functools.partial(evaluate, value=value)
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return number
        case ast.Compare(left=left, ops=ops, comparators=rest) if all(
            type(o) in COMPARE for o in ops
        ):
            terms = [again(left), *map(again, rest)]
            pairs = zip(ops, terms, terms[1:], strict=False)
            return all(COMPARE[type(op)](a, b) for op, a, b in pairs)
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


@functools.cache
def decisive(expression: str) -> frozenset[str]:
    """The metrics of an expression that is true or false; ValueError where it is not."""
    tree = parse(expression)
    with contextlib.suppress(ArithmeticError):  # of the ones that stand in for the metrics
        evaluate(tree, lambda _: 1.0)
    if not is_judgement(tree):
        raise ValueError(f"'{expression}' compares nothing; write e.g. a.ev < b.ev")
    if not (found := names(tree)):
        raise ValueError(f"'{expression}' names no metric, so no run can decide it")
    return frozenset(found)


def comparisons(node: ast.Compare) -> list[ast.Compare]:
    """`a < b < c` as `a < b` and `b < c`."""
    terms = [node.left, *node.comparators]
    steps = zip(node.ops, terms, terms[1:], strict=False)
    return [ast.Compare(left=a, ops=[op], comparators=[b]) for op, a, b in steps]


class _Replace(ast.NodeTransformer):
    """Puts other text where a metric's name stands."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self.texts = texts

    def visit(self, node: ast.AST) -> ast.AST:
        if (name := dotted(node)) in self.texts:
            return ast.Name(self.texts[name])
        return self.generic_visit(node)


def filled(tree: ast.AST, texts: Mapping[str, str]) -> str:
    """The expression with a text in the place of each metric."""
    found = _Replace(texts).visit(copy.deepcopy(tree))
    if isinstance(found, ast.BoolOp) and all(isinstance(v, ast.Compare) for v in found.values):
        word = " and " if isinstance(found.op, ast.And) else " or "
        return word.join(map(ast.unparse, found.values))  # unparse puts the third in brackets
    return ast.unparse(found)
