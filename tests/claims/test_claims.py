"""Verdicts as truth tables, and what may stand in a claim's expression."""

import math
import random
import re

import pandas as pd
import pytest
from scipy import stats

from pipeline.claims import verdicts
from pipeline.claims.expressions import evaluate, names, parse
from pipeline.claims.judge import COLUMNS, interval_of_mean, interval_of_median, judge
from pipeline.claims.scalars import summary
from pipeline.errors import RetraceError
from pipeline.figures.kinds_verdicts import label
from pipeline.figures.kinds_verdicts import verdicts as drawn
from pipeline.papers.folders import Paper
from pipeline.spec.claims import Claim
from pipeline.spec.paper import PaperSpec


def metric(*values: float) -> dict:
    return summary(values)


def value_claim(**over) -> Claim:
    base = {
        "id": "c",
        "text": "t",
        "source": "Table 1",
        "kind": "value",
        "metric": "m",
        "paper": 0.5,
        "tolerance": 0.1,
        "reason": "two standard errors",
        "scales": ["laptop", "paper"],
    }
    return Claim.model_validate(base | over)


def order_claim(holds: str, **over) -> Claim:
    base = {"id": "c", "text": "t", "source": "Fig. 1", "kind": "order", "holds": holds}
    return Claim.model_validate(base | over)


@pytest.mark.parametrize(
    "ours, scale, over, verdict",
    [
        (0.5, "laptop", {}, "reproduced"),
        (0.6, "laptop", {"paper": 0.5, "tolerance": 0.125}, "reproduced"),
        (0.625, "laptop", {"tolerance": 0.125}, "reproduced"),  # the border belongs to it
        (0.375, "laptop", {"tolerance": 0.125}, "reproduced"),
        (0.6251, "laptop", {"tolerance": 0.125}, "not reproduced"),
        (0.3749, "laptop", {"tolerance": 0.125}, "not reproduced"),  # two-sided
        (0.5, "laptop", {"tolerance": 0.0}, "reproduced"),
        (0.5000001, "laptop", {"tolerance": 0.0}, "not reproduced"),
        (math.nan, "laptop", {}, "not run"),
        (math.inf, "laptop", {}, "not run"),
        (None, "laptop", {}, "not run"),
        # a reduced run is not held to the paper's number; by default only the scale paper is
        (0.5, "laptop", {"scales": ["paper"]}, "not comparable"),
        (9.9, "laptop", {"scales": ["paper"]}, "not comparable"),
        (None, "laptop", {"scales": ["paper"]}, "not comparable"),
        (0.5, "laptop", {"scales": []}, "not comparable"),
        (0.5, "paper", {"scales": []}, "reproduced"),
        (0.5, "laptop", {"comparable": False}, "not comparable"),
        (0.5, "paper", {"provenance_kind": "M"}, "not comparable"),  # memory decides no verdict
        (0.5, "smoke", {"scales": ["smoke"]}, "plumbing"),  # however right the number is
        (9.9, "smoke", {"scales": ["smoke"]}, "plumbing"),
    ],
)
def test_verdict_of_a_value(ours, scale, over, verdict):
    metrics = {} if ours is None else {"m": metric(ours)}
    row = judge(value_claim(**over), metrics, scale)
    assert row["verdict"] == verdict
    assert row["paper_value"] == 0.5 and row["scale"] == scale
    if ours is not None and math.isfinite(ours):
        assert row["ours"] == ours  # a number that is not judged is shown all the same


@pytest.mark.parametrize(
    "seeds, verdict, held",
    [
        ([0.45, 0.5, 0.55], "reproduced", 3),
        ([0.3, 0.5, 0.55], "reproduced", 2),  # the mean and most seeds
        ([0.2, 0.5, 0.8], "undecided", 1),  # the mean by luck: most seeds lie outside
        ([0.2, 0.5, 0.5, 0.8], "undecided", 2),  # half of the seeds are not most of them
        ([0.61, 0.62, 0.63], "undecided", 0),  # the interval of the mean reaches the tolerance
        ([0.80, 0.81, 0.82], "not reproduced", 0),
        ([0.61, 0.62] * 10, "not reproduced", 0),  # more seeds settle it
        ([0.5, 0.5, math.nan], "reproduced", 2),
        ([0.5, math.nan, math.nan], "undecided", 1),  # undefined is a failure there
        ([math.nan, math.nan, math.nan], "not run", None),
    ],
)
def test_a_value_is_judged_with_its_spread(seeds, verdict, held):
    row = judge(value_claim(), {"m": metric(*seeds)}, "laptop")
    assert (row["verdict"], row["held"]) == (verdict, held)
    assert row["n"] == (len(seeds) if held is not None else None)


def test_the_interval_of_a_mean_is_students():
    low, high = interval_of_mean([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)))
    assert interval_of_mean([1.0]) == (-math.inf, math.inf)


@pytest.mark.parametrize(
    "holds, metrics, verdict, n",
    [
        ("a < b", {"a": [1], "b": [2]}, "reproduced", 1),
        ("a < b", {"a": [2], "b": [1]}, "not reproduced", 1),
        ("a <= b", {"a": [2], "b": [2]}, "reproduced", 1),
        ("a < b < c", {"a": [1], "b": [2], "c": [3]}, "reproduced", 1),
        ("a < b < c", {"a": [1], "b": [4], "c": [3]}, "not reproduced", 1),
        ("a < b", {"a": [1, 2, 3], "b": [3, 4, 4]}, "reproduced", 3),
        # two of three seeds: neither all, nor an interval that leaves no doubt
        ("a < b", {"a": [1, 2, 5], "b": [3, 4, 4]}, "undecided", 3),
        ("a < b", {"a": [5, 6, 1], "b": [3, 4, 4]}, "not reproduced", 3),
        ("a < b", {"a": [5, 6, 5], "b": [3, 4, 4]}, "not reproduced", 3),
        # a single value stands against every seed of the other
        ("a < b", {"a": [3], "b": [4, 5]}, "reproduced", 2),
        ("a < b", {"a": [3], "b": [4, 2]}, "not reproduced", 2),  # the median margin is zero
        # different numbers of seeds cannot be paired: their means are compared
        ("a < b", {"a": [1, 5], "b": [4, 4, 4]}, "reproduced", 1),
        ("a < b", {"a": [1], "b": [math.nan]}, "not run", None),
        ("a < b", {"a": [1]}, "not run", None),
        ("abs(a - b) <= 0.5 and a > 0", {"a": [1], "b": [1.5]}, "reproduced", 1),
        ("a < b or a > 10", {"a": [2], "b": [1]}, "not reproduced", 1),
        ("x.y.z > 2 * w", {"x.y.z": [5], "w": [2]}, "reproduced", 1),
        # a seed in which a metric is undefined fails, and is counted
        ("a < b", {"a": [1, math.nan, 1], "b": [2, 2, 2]}, "undecided", 3),
        ("a < b", {"a": [1, math.nan, math.nan], "b": [2, 2, 2]}, "not reproduced", 3),
        ("a < b", {"a": [math.nan] * 3, "b": [2, 2, 2]}, "not run", None),
        ("max(a, b) > 1", {"a": [2, 2, 2], "b": [0, math.nan, 0]}, "undecided", 3),
        ("max(b, a) > 1", {"a": [2, 2, 2], "b": [0, math.nan, 0]}, "undecided", 3),
        # tied in every seed: nothing left to improve
        ("a < b", {"a": [0], "b": [0]}, "not comparable", 1),
        ("a > b", {"a": [0.5, 0.5], "b": [0.5, 0.5]}, "not comparable", 2),
        ("a > b and c > 1", {"a": [0], "b": [0], "c": [2]}, "not comparable", 1),
        ("a > b and c > 1", {"a": [0], "b": [0], "c": [0]}, "not reproduced", 1),
        ("a > b or c > 1", {"a": [0], "b": [0], "c": [2]}, "reproduced", 1),
        ("a > 0.5", {"a": [0.5]}, "not reproduced", 1),  # a bound of the claim's is no tie
        # a seed that is tied says nothing: the others decide
        ("a < b", {"a": [1, 2, 3], "b": [2, 2, 4]}, "reproduced", 3),
    ],
)
def test_verdict_of_an_order(holds, metrics, verdict, n):
    row = judge(order_claim(holds), {m: metric(*v) for m, v in metrics.items()}, "laptop")
    assert (row["verdict"], row["n"]) == (verdict, n)


@pytest.mark.parametrize("n, failing, verdict", [
    (5, 1, "undecided"), (8, 1, "undecided"), (9, 1, "reproduced"), (12, 2, "reproduced"),
    (20, 5, "reproduced"), (20, 6, "undecided"), (20, 10, "not reproduced"),
    (100, 30, "reproduced"),
])  # fmt: skip
def test_more_seeds_settle_a_true_order_that_some_seeds_miss(n, failing, verdict):
    """The numbers of the sign test: of 9 seeds 8 leave a two-sided p of .039, of 8 seeds 7 .070."""
    margins = [-1.0 - i for i in range(failing)] + [1.0 + i for i in range(n - failing)]
    row = judge(order_claim("m > zero"), {"m": metric(*margins), "zero": metric(0.0)}, "laptop")
    assert (row["verdict"], row["held"]) == (verdict, n - failing)
    p = stats.binomtest(failing, n, alternative="two-sided").pvalue
    assert (verdict == "reproduced") == (p < 0.05 and failing < n / 2)


@pytest.mark.parametrize("n", [6, 9, 13, 20, 57])
def test_the_interval_of_the_median_is_scipys(n):
    sizes = sorted(random.Random(n).gauss(0, 1) for _ in range(n))
    low, high, confidence = interval_of_median(sizes)
    # scipy's bounds are one-sided quantile tests of 2.5 % each
    for side, found in (("less", high), ("greater", low)):
        theirs = stats.quantile_test(sizes, p=0.5, alternative=side).confidence_interval(0.975)
        assert found == (theirs.high if side == "less" else theirs.low)
    assert 0.95 <= confidence < 1


def test_an_order_is_judged_at_every_scale_unless_it_names_some():
    metrics = {"a": metric(1), "b": metric(2)}
    for scale, verdict in (
        ("smoke", "plumbing"),
        ("laptop", "reproduced"),
        ("paper", "reproduced"),
    ):
        assert judge(order_claim("a < b"), metrics, scale)["verdict"] == verdict
    only = order_claim("a < b", scales=["paper"])
    assert judge(only, metrics, "laptop")["verdict"] == "not comparable"


# --- needs, budgets, null arms ---------------------------------------------------------------

NEEDED = {"x.ev": metric(0.9), "y.ev": metric(0.5), "x.dead_share": metric(0.02, 0.04),
          "y.dead_share": metric(0.4), "x.l0": metric(25.1), "y.l0": metric(27.2),
          "y.l0_off": metric(0.0, 0.088),
          "x.unread": metric(0.4), "y.unread": metric(1.2), "x.past_minimum": metric(0.0),
          "y.past_minimum": metric(0.35), "text.same": metric(1, 0),
          "seen": metric(2e7)}  # fmt: skip


@pytest.mark.parametrize(
    "holds, needs, why",
    [
        ("x.ev > 0", {"dead_share": 0.05}, None),
        ("x.ev > 0", {"dead_share": 0.03},
         "asks for at most 3 % dead latents, and x has 4 %"),  # in the worst seed
        ("x.ev > y.ev", {"dead_share": 0.05}, "asks for at most 5 % dead latents, and y has 40 %"),
        ("x.ev > y.ev", {"dead_share": {"bound": 0.05, "of": ["x"]}}, None),
        ("x.ev > 0", {"l0": {"bound": 0.01, "target": 25}}, None),
        ("x.ev > y.ev", {"l0": {"bound": 0.01, "target": 25}},
         "asks for an L0 within 1 % of 25, and y has 27.2"),
        ("y.ev > 0", {"l0": 0.01}, "asks for an L0 within 1 % of its target, and y is 8.8 % off"),
        ("x.ev > 0", {"unread": 1}, None),
        ("y.ev > 0", {"unread": 1},
         "asks for a lens that beats a constant (unread below 1), and y leaves 1.2"),
        ("x.ev > 0", {"unread": 0.4},  # as good is no better
         "asks for a lens that beats a constant (unread below 0.4), and x leaves 0.4"),
        ("x.ev > 0", {"dead_share": 0.04}, None),  # at most
        ("x.ev > 0", {"past_minimum": 0.01}, None),
        ("y.ev > 0", {"past_minimum": 0.01},
         "asks for a validation loss at most 1 % above its minimum, and y ended 35 % above"),
        ("x.ev > 0", {"budget": 0.1}, None),
        ("x.ev > 0", {"budget": 0.5}, "asks for 50 % of the paper's budget, and here 20,000,000 of "
         "the paper's 200,000,000 samples, 10 %"),
        ("x.ev > 0", {"seeds": 3}, "asks for 3 seeds, and this run has 1"),
        ("x.ev > 0", {"same": {"holds": "text.same > 0", "because": "another text"}},
         "another text; here 0.5 > 0"),  # one seed is enough
        ("x.ev > 0", {"dead_share": 0.03, "seeds": 3},
         "asks for at most 3 % dead latents, and x has 4 %; asks for 3 seeds, and this run has 1"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["value", "order"])
def test_a_need_that_is_not_met_is_said_in_numbers(kind, holds, needs, why):
    if kind == "value" and "y.ev" in holds and "x.ev" in holds:
        return
    metric_of = "y.ev" if "y.ev" in holds else "x.ev"
    claim = (
        value_claim(metric=metric_of, paper=0.7, tolerance=1, needs=needs, budget="b")
        if kind == "value"
        else order_claim(holds, needs=needs, budget="b")
    )
    row = judge(claim, NEEDED, "laptop", BUDGETS)
    assert row["verdict"] == ("not comparable" if why else "reproduced")
    assert row["why"] == why and row["ours"] is not None  # shown all the same


@pytest.mark.parametrize("n, verdict", [(2, "reproduced"), (3, "not comparable")])
def test_as_many_seeds_as_a_need_asks_for_are_enough(n, verdict):
    two = {"a": metric(1, 2), "b": metric(3, 4)}
    assert judge(order_claim("a < b", needs={"seeds": n}), two, "laptop")["verdict"] == verdict


BUDGETS = {"b": {"unit": "samples", "paper": 2e8, "ours": "seen"}}


@pytest.mark.parametrize("scales", [[], ["paper"]])  # what is the default may be written down
def test_a_published_value_asks_for_the_papers_budget(scales):
    said = "20,000,000 of the paper's 200,000,000 samples, 10 %"
    claim = value_claim(scales=scales, budget="b")
    row = judge(claim, NEEDED | {"m": metric(0.5)}, "paper", BUDGETS)
    assert row["verdict"] == "not comparable" and row["why"].endswith(said)
    assert row["budget"] == said and row["share"] == pytest.approx(0.1)
    enough = {"b": BUDGETS["b"] | {"ours": "10 * seen"}}
    assert judge(claim, NEEDED | {"m": metric(0.5)}, "paper", enough)["verdict"] == "reproduced"
    lower = value_claim(scales=scales, budget="b", needs={"budget": 0.05})
    assert judge(lower, NEEDED | {"m": metric(0.5)}, "paper", BUDGETS)["verdict"] == "reproduced"
    small = judge(claim, NEEDED | {"m": metric(0.5)}, "laptop", BUDGETS)
    assert small["why"] == f"no published value at this scale ({said})"


def test_one_part_of_a_need_that_fails_is_enough_whatever_was_not_measured():
    own = {"text": {"holds": "seen >= 3e8 and passes <= 1", "because": "the paper sees billions"}}
    row = judge(order_claim("x.ev > 0", needs=own), NEEDED, "laptop")
    assert row["verdict"] == "not comparable"
    assert row["why"] == "the paper sees billions; here 2e+07 >= 300000000.0"


def test_a_need_that_was_not_measured_leaves_the_claim_not_run():
    own = {"same": {"holds": "elsewhere > 0", "because": "another text"}}
    row = judge(order_claim("x.ev > 0", needs=own), NEEDED, "laptop")
    assert row["verdict"] == "not run" and "elsewhere" in row["why"]


@pytest.mark.parametrize(
    "x, null, verdict",
    [
        ([0.9], [0.1], "reproduced"),
        ([0.9], [0.8], "says nothing"),  # the null arm meets it as well
        ([0.1], [0.1], "not reproduced"),
        ([0.9, 0.9], [0.8, 0.1], "reproduced"),  # the null arm has it in one seed of two
        ([0.9, 0.9], [0.8, 0.8], "says nothing"),
    ],
)
def test_a_claim_must_be_able_to_fail(x, null, verdict):
    metrics = {"trained.ev": metric(*x), "random.ev": metric(*null)}
    row = judge(order_claim("trained.ev > 0.5", null_arm="random.ev > 0.5"), metrics, "laptop")
    assert row["verdict"] == verdict
    assert ("its null arm meets it" in (row["why"] or "")) == (verdict == "says nothing")
    assert row["null_arm"].endswith(": holds") == (null[0] > 0.5 and null[-1] > 0.5)


def test_a_value_has_a_null_arm_too():
    claim = value_claim(metric="trained.ev", null_arm="random")
    null = verdicts.null_of(claim, ["trained", "random"])
    assert null == "abs(random.ev - 0.5) <= 0.1"
    metrics = {"trained.ev": metric(0.5), "random.ev": metric(0.55)}
    row = judge(claim.model_copy(update={"null_arm": null}), metrics, "laptop")
    assert row["verdict"] == "says nothing"
    undefined = judge(
        claim.model_copy(update={"null_arm": null}),
        metrics | {"random.ev": metric(math.nan)},
        "laptop",
    )
    assert (undefined["verdict"], undefined["null_arm"][:15]) == ("reproduced", "undefined there")


def test_a_null_arm_that_did_not_run_leaves_the_verdict():
    row = judge(order_claim("a < b", null_arm="c < d"), {"a": metric(1), "b": metric(2)}, "laptop")
    assert (row["verdict"], row["null_arm"]) == ("reproduced", "not run")


@pytest.mark.parametrize(
    "null, found",
    [
        ("", ""),
        ("random", "random.topk.ev > random.l1.ev and other.ev > 0"),
        ("b.x > c.x", "b.x > c.x"),
        ("rando", "unknown arm 'rando' (did you mean 'random'?)"),
        ("trained", "'trained' is the arm that the claim speaks of"),
    ],
)
def test_an_arms_name_stands_for_the_order_on_it(null, found):
    claim = order_claim("trained.topk.ev > trained.l1.ev and other.ev > 0", null_arm=null)
    if "'" not in found:
        assert verdicts.null_of(claim, ["trained", "random"]) == found
        return
    with pytest.raises(ValueError, match=re.escape(found)):
        verdicts.null_of(claim, ["trained", "random"])


@pytest.mark.parametrize(
    "over, said",
    [
        ({"needs": {"dead_shar": 0.1}}, "unknown need (did you mean 'dead_share'?)"),
        ({"needs": {"seeds": 1}}, "an interval needs at least 2 seeds, and 1 is asked"),
        ({"needs": {"dead_share": -0.1}}, "needs a number from 0 on"),
        ({"needs": {"dead_share": {"of": ["x"]}}}, "needs a number from 0 on"),
        ({"needs": {"text": {"holds": "a > 0"}}}, "needs because: the same in words"),
        (
            {"null_arm": "a > 0", "no_null_arm": "none exists"},
            "has null_arm: and no_null_arm: both",
        ),
    ],
)
def test_what_a_claim_asks_for_is_checked(over, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        order_claim("a < b", **over)


@pytest.mark.parametrize(
    "budget, claim, said",
    [
        ({}, {}, None),
        ({"unit": "token"}, {}, "'token' is no unit of a budget (did you mean 'tokens'?)"),
        ({"ours": "train.stepz"}, {}, "'train.stepz' is neither a number of paper.yaml nor a"),
        ({"ours": "own.other.steps"}, {}, None),  # a setting of another scale
        ({"ours": "own.train.steps +"}, {}, "is not an expression"),
        ({"paper": 0}, {}, "greater than 0"),
        ({}, {"budget": "runs"}, "no budget 'runs' (did you mean 'run'?)"),
    ],
)
def test_a_budget_is_checked_before_anything_runs(tmp_path, budget, claim, said):
    card = CARD | {
        "own": {"train": {"tables": ["t"], "steps": 50}},
        "budget": {"run": {"unit": "steps", "paper": 100, "ours": "2 * own.train.steps",
                           "source": "Sec. 4"} | budget},
        "claims": [order_claim("ev.topk > 0", **claim).model_dump(exclude_defaults=True)],
    }  # fmt: skip
    try:
        made = paper(tmp_path, **card)
        verdicts.check(made)
    except (RetraceError, ValueError) as e:
        assert said and said in str(e)
        return
    assert said is None
    job = verdicts.for_the_job(made)
    ours = budget.get("ours", "2 * 50")
    assert job["budgets"] == {"run": {"unit": "steps", "paper": 100.0, "ours": ours}}
    assert job["claims"][0]["budget"] == "run"


def test_dividing_by_a_metric_that_is_zero_is_not_run():
    metrics = {"a": metric(1), "b": metric(0)}
    row = judge(order_claim("a / b > 1"), metrics, "laptop")
    assert row["verdict"] == "not run"


def test_the_row_shows_the_numbers_in_the_expression_and_spares_its_functions():
    metrics = {"a": metric(0.5), "b": metric(2), "b.a": metric(3)}
    row = judge(order_claim("abs(a - b) < b.a"), metrics, "laptop")
    assert row["ours"] == "abs(0.5 - 2) < 3"


@pytest.mark.parametrize(
    "holds, ours",
    [
        ("a < b and b < c and c < 9", "1 < 2 and 2 < 3 and 3 < 9"),
        ("a > b or b > c or c < 9", "1 > 2 or 2 > 3 or 3 < 9"),
        ("(a > b or b < c) and c < 9", "(1 > 2 or 2 < 3) and 3 < 9"),
    ],
)
def test_the_row_has_brackets_only_where_they_say_something(holds, ours):
    metrics = {"a": metric(1), "b": metric(2), "c": metric(3)}
    assert judge(order_claim(holds), metrics, "laptop")["ours"] == ours


def test_the_row_counts_the_seeds_that_hold():
    metrics = {"a.ev": metric(0.25), "a.ev2": metric(0.5, 0.75)}
    row = judge(order_claim("a.ev < a.ev2"), metrics, "laptop")
    assert row["ours"] == "0.25 < 0.625 (2 of 2 seeds)"
    assert row["paper_value"] == "a.ev < a.ev2"


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true') > 0",
        "open('f') > 0",
        "a.b() > 0",
        "a[0] > 0",
        "[x for x in a] > 0",
        "(lambda: 1)() > 0",
        "a ** b > 0",
        "9 ** 9 ** 9 > 0",
        "a << 9 > 0",
        "a % b > 0",
        "a == b",
        "a is b",
        "not a",
        "'text' > a",
        "(a := 1) > 0",
        "min(a, key=b) > 0",
        "f'{a}' > 0",
        "max(*a) > 0",
        "True > a",
        "1j > a",
        "None",
        "a, b",
    ],
)
def test_only_arithmetic_and_comparison_are_evaluated(text):
    with pytest.raises(ValueError, match="may not stand in a claim"):
        evaluate(parse(text), lambda _: 1.0)


@pytest.mark.parametrize("text", ["a <", "a b", "import os", "", "a = 1", "a < b\nc < d"])
def test_what_is_no_expression_is_told(text):
    with pytest.raises(ValueError, match="is not an expression"):
        parse(text)


@pytest.mark.parametrize(
    "text, found",
    [
        ("a < b.c < 0.1", {"a", "b.c"}),
        ("abs(a.b - c) <= 2 and max(d, e) > -f", {"a.b", "c", "d", "e", "f"}),
        ("1 < 2", set()),
    ],
)
def test_names_of_an_expression(text, found):
    assert names(parse(text)) == found


@pytest.mark.parametrize(
    "text, value",
    [("1 + 2 * 3 == 7", None), ("7 - 2 * 3 > 0.5", True), ("-2 < -1", True), ("min(3, 1)", 1)],
)
def test_arithmetic(text, value):
    if value is None:
        with pytest.raises(ValueError):
            evaluate(parse(text), float)
    else:
        assert evaluate(parse(text), float) == value


CARD = {"title": "T", "authors": "A", "year": 2022, "url": "https://example.org"}


def paper(tmp_path, *listed: dict, **card) -> Paper:
    (tmp_path / "metrics.py").write_text('METRICS = {"ev.topk": "a", "ev.l1": "b", "d*": "c"}')
    spec = PaperSpec.model_validate(CARD | {"claims": list(listed)} | card)
    return Paper("p", tmp_path, "smoke", spec)


@pytest.mark.parametrize(
    "holds, said",
    [
        ("ev.topk > ev.l1", None),
        ("d7 > 0", None),  # by a pattern of METRICS
        ("ev.topk / 0 > 1", None),  # parses; judged when its numbers are there
        ("ev.topl > ev.l1", "claim 'c': no metric 'ev.topl' (did you mean 'ev.topk'?)"),
        ("exec('1') > 0", "claim 'c': 'exec('1')' may not stand in a claim"),
        ("ev.topk >", "claim 'c': 'ev.topk >' is not an expression"),
        ("ev.topk[0] > 1", "may not stand in a claim"),
        ("ev.topk - ev.l1", "compares nothing"),
        ("ev.topk and ev.l1", "compares nothing"),
        ("1 < 2", "names no metric"),
        ("(" * 500 + "ev.topk" + ")" * 500 + " > 0", "too many nested parentheses"),
        ("-" * 3000 + "ev.topk > 0", "nest"),
        ("-" * 150 + "ev.topk > 0", "nests deeper than 100 levels"),
        ("ev.topk" + " + ev.topk" * 150 + " > 0", "nests deeper than 100 levels"),
        ("ev.topk" + ".a" * 150 + " > 0", "nests deeper than 100 levels"),
        ("ev.topk" + " + ev.topk" * 80 + " > 0", None),
    ],
)
def test_claims_are_checked_before_anything_runs(tmp_path, holds, said):
    claim = {"id": "c", "text": "t", "source": "s", "kind": "order", "holds": holds}
    if said is None:
        return verdicts.check(paper(tmp_path, claim))
    with pytest.raises(RetraceError) as e:
        verdicts.check(paper(tmp_path, claim))
    assert said in str(e.value) and str(tmp_path / "paper.yaml") in str(e.value)


@pytest.mark.parametrize(
    "premise, said",
    [
        ("ev.topk > 0.5", None),
        ("ev.topl > 0.5", "no metric 'ev.topl' (did you mean 'ev.topk'?)"),
        ("ev.topk", "'ev.topk' compares nothing"),
        ("1 < 2", "names no metric"),
        ("open('f') > 0", "may not stand in a claim"),
    ],
)
def test_a_need_is_checked_before_anything_runs(tmp_path, premise, said):
    needs = {"own": {"holds": premise, "because": "in words"}}
    claim = value_claim(metric="ev.l1", needs=needs).model_dump(exclude_defaults=True)
    if said is None:
        return verdicts.check(paper(tmp_path, claim))
    with pytest.raises(RetraceError) as e:
        verdicts.check(paper(tmp_path, claim))
    assert said in str(e.value)


def test_a_value_claim_names_a_metric_that_exists(tmp_path):
    claim = value_claim(metric="nonsense").model_dump(exclude_defaults=True)
    with pytest.raises(RetraceError, match="no metric 'nonsense'"):
        verdicts.check(paper(tmp_path, claim))


def test_a_metric_of_another_definition_was_not_measured(tmp_path):
    """Published results cannot decide a claim after a metric that it reads came to mean else."""
    claim = order_claim("ev.topk > ev.l1", null_arm="ev.l1 > ev.topk")
    made = paper(tmp_path, claim.model_dump(exclude_defaults=True))
    job = verdicts.for_the_job(made)
    assert set(job["definitions"]) == {"ev.topk", "ev.l1"}
    found = {
        "ev.topk": metric(2) | {"definition": "a"},
        "ev.l1": metric(1) | {"definition": "b"},
    }
    (row,) = verdicts.judged(job | {"scale": "laptop"}, found)
    assert row["verdict"] == "reproduced"
    (row,) = verdicts.judged(
        job | {"scale": "laptop"}, found | {"ev.l1": metric(1) | {"definition": "of old"}}
    )
    assert row["verdict"] == "not run"


# --- the figure ------------------------------------------------------------------------------


def test_the_figure_of_verdicts_has_each_judged_claim_in_the_unit_of_its_border():
    found = {"a": metric(1, 2, 4), "z": metric(0), "m": metric(0.4, 0.5, 0.6), "one": metric(1)}
    claimed = [
        order_claim("a > z", id="grows"),
        order_claim("z > a", id="falls"),
        order_claim("one > z", id="single"),
        value_claim(id="near"),
        value_claim(id="unjudged", comparable=False),
    ]
    rows = pd.DataFrame([judge(c, found, "laptop") for c in claimed], columns=COLUMNS)
    figure, frame = drawn({"claims": rows}, {})
    at = frame.set_index("id")[["at", "low", "high"]].round(6).to_dict("index")
    assert at["grows"] == {"at": 0.5, "low": 0.25, "high": 1.0}
    assert at["falls"] == {"at": -0.5, "low": -1.0, "high": -0.25}
    assert at["single"]["at"] == 1 and math.isnan(at["single"]["low"])
    half = 4.302653 * 0.1 / math.sqrt(3) / 0.1  # Student's t of two degrees of freedom
    assert at["near"] == {"at": 0, "low": pytest.approx(-half), "high": pytest.approx(half)}
    assert "unjudged" not in at
    assert {t.name for t in figure.data} == {"reproduced", "not reproduced"}
    assert sum(t.showlegend for t in figure.data) == 2


def test_the_figure_of_verdicts_names_claims_in_words():
    assert label("topk_above_l1") == "topk above l1" and label("<b>") == "&lt;b&gt;"


def test_a_run_that_judges_nothing_has_an_empty_figure_of_verdicts():
    rows = pd.DataFrame(
        [judge(value_claim(comparable=False), {"m": metric(1)}, "laptop")], columns=COLUMNS
    )
    figure, frame = drawn({"claims": rows}, {})
    assert frame.empty and "no claim" in figure.layout.annotations[0].text
