"""Numbers of several models lined up as metrics."""

import math

import pandas as pd
import pytest

from pipeline.claims.seeds import at_equal_l0, crossing, evaluations, gathered, per_seed


def test_a_number_that_a_model_lacks_is_nan():
    found = gathered(({"a": i} | ({"b": 2.5} if i else {}) for i in range(2)), "of.")
    assert found["of.a"] == [0.0, 1.0] and list(found) == ["of.a", "of.b"]
    assert math.isnan(found["of.b"][0]) and found["of.b"][1] == 2.5
    assert gathered([]) == {}


def test_one_value_per_seed_ascending():
    table = pd.DataFrame({"seed": [2, 0, 2], "x": [1, 5, 3]})
    assert per_seed(table, lambda rows: {"x": rows["x"].sum()}) == {"x": [5.0, 4.0]}


def test_dictionaries_are_compared_at_the_l0_of_the_other_inside_the_range():
    """b at L0 4, 20 and 200: one is in the range of a; log2 20 is 0.32 of the way from 16 to 32."""
    a = pd.DataFrame({"l0": [32.0, 16.0], "ev": [0.8, 0.6]})
    b = pd.DataFrame({"l0": [4.0, 20.0, 200.0], "ev": [0.1, 0.5, 0.9]})
    share = math.log2(20 / 16)
    assert at_equal_l0(a, b, "ev") == pytest.approx([0.6 + 0.2 * share - 0.5])
    assert len(at_equal_l0(a, b[:1], "ev")) == 0


@pytest.mark.parametrize(
    ("y", "at"),
    [
        ([0, 1, 3, 9], 2.5),  # halfway between the points of 1 and 3
        ([2, 1, 3, 0], 0),  # it begins there
        ([0, 1, 1, 1], math.inf),
        ([0, 2, 0, 2], 1),  # the first time
    ],
)
def test_a_crossing_is_the_first_and_lies_on_a_straight_line(y, at):
    assert crossing([0, 1, 4, 8], y, 2) == at


def test_tables_of_dictionaries_go_by_their_arm_without_their_histories():
    tables = {"evaluation/trained": 1, "evaluation/trained_history": 2, "overlap/pairs": 3}
    assert evaluations(tables) == {"trained": 1}
