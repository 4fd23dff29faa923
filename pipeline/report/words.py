"""An order over metrics in words: `a.x.ev < b.x.ev` -> "ev (x): a 0.31 is below b 0.44".

A claim of kind order is an expression over metrics, and claims.csv has the same expression with
our means in their places. Both are parsed and walked side by side, so that each name stands beside
its own number and the page cannot say another one than the table.

1. `conditions` splits an expression at `and` and `or`; each comparison is a condition.
2. Of the metrics in a condition, what all names share is said once, at its beginning.
3. A chain of one direction "rises from … to …"; other comparisons say "is above", "is at most", …
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from pipeline.claims import expressions
from pipeline.claims.expressions import dotted

SEEDS = re.compile(r" \((\d+) of (\d+) seeds\)$")
SAYS = {ast.Lt: "is below", ast.LtE: "is at most", ast.Gt: "is above", ast.GtE: "is at least"}
SIGNS = {ast.Add: "+", ast.Sub: "−", ast.Mult: "×", ast.Div: "÷"}
FUNCTIONS = {"max": "the largest of", "min": "the least of"}


@dataclass(frozen=True)
class Piece:
    """Some words of a condition; with `metric` the short name of one, and its number.

    Args:
        metric: the whole name, which leads to its definition.
    """

    text: str
    metric: str = ""
    number: str = ""


@dataclass
class Condition:
    """One comparison: what it is about, in pieces, and whether our means have it.

    Args:
        joined: 'and', 'or', or nothing before the first.
        about: what the names of all its metrics share; blank where they share nothing.
        holds: None where a number is missing.
    """

    joined: str
    about: str = ""
    pieces: list[Piece] = field(default_factory=list)
    holds: bool | None = None


def conditions(holds: str, ours: str = "") -> list[Condition]:
    """The comparisons of an expression, in words.

    Args:
        ours: the same expression with numbers in the place of metrics, as claims.csv has it;
            where it is blank, or another expression, names stand without numbers.
    """
    tree = expressions.parse(holds)
    numbers: dict[str, str] = {}
    try:
        filled = expressions.parse(SEEDS.sub("", ours)) if ours else None
        numbers = dict(_beside(tree, filled)) if filled is not None else {}
    except ValueError:
        numbers = {}
    return list(_conditions(tree, numbers, ""))


def _beside(names: ast.AST, numbers: ast.AST) -> Iterator[tuple[str, str]]:
    """(metric, its number as written) at the same places of two expressions.

    Raises:
        ValueError: they have different shapes.
    """
    if found := dotted(names):
        number = ast.unparse(numbers)
        float(number)  # a ValueError where a term stands here
        yield found, number
        return
    if type(names) is not type(numbers):
        raise ValueError("another expression")
    if isinstance(names, ast.Call):
        pairs = zip(names.args, numbers.args, strict=True)
    else:
        children = (list(ast.iter_child_nodes(n)) for n in (names, numbers))
        pairs = zip(*children, strict=True)
    for a, b in pairs:
        yield from _beside(a, b)


def _conditions(node: ast.expr, numbers: dict[str, str], joined: str) -> Iterator[Condition]:
    if isinstance(node, ast.BoolOp):
        word = "and" if isinstance(node.op, ast.And) else "or"
        for i, value in enumerate(node.values):
            yield from _conditions(value, numbers, word if i else joined)
        return
    yield _condition(node, numbers, joined)


def _condition(node: ast.Compare, numbers: dict[str, str], joined: str) -> Condition:
    found = sorted(expressions.names(node))
    about, short = shared(found)
    terms = [list(_term(t, short, numbers)) for t in (node.left, *node.comparators)]
    ups = {isinstance(op, ast.Lt | ast.LtE) for op in node.ops}
    known = all(m in numbers and numbers[m] != "nan" for m in found)
    holds = bool(expressions.evaluate(node, lambda m: float(numbers[m]))) if known else None
    return Condition(joined, about, list(_said(terms, node.ops, ups)), holds)


def _said(terms: list[list[Piece]], ops: list[ast.cmpop], ups: set[bool]) -> Iterator[Piece]:
    if len(ops) > 1 and len(ups) == 1:
        yield Piece("rises from" if ups == {True} else "falls from")
        for i, term in enumerate(terms):
            if i:
                yield Piece("to" if i == len(ops) else "over" if i == 1 else "and")
            yield from term
        return
    yield from terms[0]
    for i, (op, term) in enumerate(zip(ops, terms[1:], strict=True)):
        says = SAYS[type(op)]
        yield Piece(f"and that {says}" if i else says)
        yield from term


def _term(node: ast.expr, short: dict[str, str], numbers: dict[str, str]) -> Iterator[Piece]:
    if name := dotted(node):
        yield Piece(short[name], name, numbers.get(name, ""))
        return
    match node:
        case ast.Constant(value=value):
            yield Piece(f"{value:g}")
        case ast.UnaryOp(operand=operand):
            yield Piece("−")
            yield from _term(operand, short, numbers)
        case ast.Call(func=ast.Name(id="abs"), args=[inside]):
            yield Piece("the size of")
            yield from _term(inside, short, numbers)
        case ast.Call(func=ast.Name(id=name), args=args):
            yield Piece(FUNCTIONS[name])
            for i, arg in enumerate(args):
                if i:
                    yield Piece("and" if i == len(args) - 1 else ",")
                yield from _term(arg, short, numbers)
        case ast.BinOp(left=left, op=op, right=right):
            yield from _side(left, op, short, numbers)
            yield Piece(SIGNS[type(op)])
            yield from _side(right, op, short, numbers)


def _side(node: ast.expr, op: ast.operator, short: Any, numbers: Any) -> Iterator[Piece]:
    """A side of an operation; a sum inside a product or behind a minus stands in brackets."""
    loose = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub)
    if loose and not isinstance(op, ast.Add):
        yield Piece("(")
        yield from _term(node, short, numbers)
        yield Piece(")")
    else:
        yield from _term(node, short, numbers)


def shared(names: list[str]) -> tuple[str, dict[str, str]]:
    """What metrics' names share, and the short name of each.

    ['a.topk.l0', 'a.l1.l0'] -> 'l0 (a)', {'a.topk.l0': 'topk', 'a.l1.l0': 'l1'}. One name is
    short by itself: 'l0 (a, topk)'.
    """
    split = {n: n.split(".") for n in names}
    if len(names) < 2:
        return "", {n: said(parts) for n, parts in split.items()}
    parts, least = list(split.values()), min(map(len, split.values())) - 1  # a name keeps one part
    head = next((i for i in range(least) if len({p[i] for p in parts}) > 1), least)
    rest = least - head
    tail = next((i for i in range(rest) if len({p[-1 - i] for p in parts}) > 1), rest)
    short = {n: said(p[head : len(p) - tail]) for n, p in split.items()}
    if not tail:
        return ", ".join(p.replace("_", " ") for p in parts[0][:head]), short
    return said(parts[0][:head] + parts[0][-tail:]), short


def said(parts: list[str]) -> str:
    """['trained', 'topk_k32', 'explained_variance'] -> 'explained variance (trained, topk k32)'."""
    *places, last = (p.replace("_", " ") for p in parts)
    return f"{last} ({', '.join(places)})" if places else last


def seeds(ours: str) -> str:
    """'3 of 3 seeds' at the end of a number of claims.csv, else blank."""
    found = SEEDS.search(ours)
    return f"{found[1]} of {found[2]} seeds" if found else ""


def decimal(text: str) -> str:
    """A text in which 6e-05 % is 0.00006 %."""
    return re.sub(r"\d(?:\.\d+)?e-\d+(?= %)", lambda m: format(Decimal(m[0]), "f"), text)
