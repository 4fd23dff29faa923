"""Numbers of several models lined up as metrics."""

import math

import pandas as pd

from pipeline.claims.seeds import gathered, per_seed


def test_a_number_that_a_model_lacks_is_nan():
    found = gathered(({"a": i} | ({"b": 2.5} if i else {}) for i in range(2)), "of.")
    assert found["of.a"] == [0.0, 1.0] and list(found) == ["of.a", "of.b"]
    assert math.isnan(found["of.b"][0]) and found["of.b"][1] == 2.5
    assert gathered([]) == {}


def test_one_value_per_seed_ascending():
    table = pd.DataFrame({"seed": [2, 0, 2], "x": [1, 5, 3]})
    assert per_seed(table, lambda rows: {"x": rows["x"].sum()}) == {"x": [5.0, 4.0]}
