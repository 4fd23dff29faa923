"""Orders in words: each name beside its own number, and nothing that the table does not say."""

import ast
import csv
import math
from pathlib import Path

import pytest

from pipeline.claims import expressions
from pipeline.report import words

REFERENCE = Path(__file__).parents[2] / "results/reference"


def said(holds: str, ours: str = "") -> list[str]:
    """Conditions as plain lines: names with their numbers in brackets."""
    out = []
    for c in words.conditions(holds, ours):
        pieces = [p.text + (f" [{p.number}]" if p.number else "") for p in c.pieces]
        about = f"{c.about}: " if c.about else ""
        out.append(" ".join(filter(None, [c.joined, about + " ".join(pieces)])))
    return out


@pytest.mark.parametrize(
    "holds, ours, lines",
    [
        ("a.b > 0", "0.1 > 0", ["b (a) [0.1] is above 0"]),
        ("a.x.ev < a.y.ev", "1 < 2", ["ev (a): x [1] is below y [2]"]),
        ("a.ev_x <= b", "1 <= 2", ["ev x (a) [1] is at most b [2]"]),
        ("n.d1 < n.d2 < n.d3", "1 < 2 < 3 (3 of 3 seeds)",
         ["n: rises from d1 [1] over d2 [2] to d3 [3]"]),
        ("a.x > 0.5 > b.x", "", ["x: falls from a over 0.5 to b"]),
        ("a > 1 and max(b, c) < abs(d)", "2 > 1 and max(3, 4) < abs(-5)",
         ["a [2] is above 1",
          "and b [3] , c"]),
        ("a >= b - 0.1 or 2 * (a + b) > 1", "1 >= 2 - 0.1 or 2 * (1 + 2) > 1",
         ["a [1] is at least b [2] − 0.1", "or 2 × ( a [1] + b [2] ) is above 1"]),
        ("a.b > a.b.c", "1 > 0", ["a: b [1] is above c (b) [0]"]),
    ],
)  # fmt: skip
def test_orders_in_words(holds, ours, lines):
    if "max" in holds:
        lines = [
            "a [2] is above 1",
            "and the largest of b [3] and c [4] is below the size of d [-5]",
        ]
    assert said(holds, ours) == lines


@pytest.mark.parametrize("ours", ["", "1 > 2 > 3", "max(1, 2) < 3", "nonsense ("])
def test_another_expression_gives_names_without_numbers(ours):
    (made,) = words.conditions("a < b", ours)
    assert made.holds is None and not any(p.number for p in made.pieces)


def test_a_tick_is_what_the_means_say():
    made = words.conditions("a < b and b < c", "1 < 2 and 2 < 0")
    assert [c.holds for c in made] == [True, False]
    assert words.conditions("a < b", "nan < 2")[0].holds is None


def test_every_published_order_keeps_its_names_and_numbers():
    """Names and numbers of the words are those of the expression, whatever its shape."""
    seen = 0
    for file in sorted(REFERENCE.glob("*/*/claims.csv")):
        for row in csv.DictReader(file.open(encoding="utf-8")):
            if row["kind"] != "order":
                continue
            made = words.conditions(row["paper_value"], row["ours"])
            pieces = [p for c in made for p in c.pieces if p.metric]
            assert {p.metric for p in pieces} == expressions.names(ast.parse(row["paper_value"]))
            if row["ours"]:
                numbers = [n for n in ast.walk(ast.parse(words.SEEDS.sub("", row["ours"])))
                           if isinstance(n, ast.Constant)]  # fmt: skip
                shown = {abs(float(p.number)) for p in pieces}
                assert shown <= {abs(float(n.value)) for n in numbers} | {math.inf, math.nan}
                seen += 1
    assert seen > 100


@pytest.mark.parametrize(
    "names, about, short",
    [
        (["a.topk.l0", "a.l1.l0"], "l0 (a)", ["topk", "l1"]),
        (["a.x", "a.y"], "a", ["x", "y"]),
        (["x", "y"], "", ["x", "y"]),
        (["a.b", "a.b.c"], "a", ["b", "c (b)"]),
        (["one.two_three"], "", ["two three (one)"]),
    ],
)
def test_what_names_share_is_said_once(names, about, short):
    assert words.shared(names) == (about, dict(zip(names, short, strict=True)))


def test_a_tiny_share_is_written_out():
    assert words.decimal("24 of 40, 6e-05 %") == "24 of 40, 0.00006 %"
    assert words.decimal("1.5e-03 % and 0.2 %") == "0.0015 % and 0.2 %"
