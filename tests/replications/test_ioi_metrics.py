"""Metrics of indirect object identification in closed form."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipeline.job.source import import_file

metrics = import_file(Path(__file__).parents[2] / "rules/papers/ioi/metrics.py")


@pytest.mark.parametrize("whole", [2.0, 0.0, -1.0])
def test_a_share_of_no_logit_difference_is_undefined(whole):
    """Half of F(M) lost is half where F(M) is above zero, and nothing elsewhere."""
    rows = [(c, "nothing", f, 1) for c, f in
            {"model": whole, "circuit": whole / 2, "naive": 0, "random 0": 0}.items()]  # fmt: skip
    rows += [("model", "name_mover", whole / 2, 0), ("circuit", "name_mover", whole, 0),
             ("naive", "name_mover", whole, 0)]  # fmt: skip
    cases = pd.DataFrame(rows, columns=["circuit", "removed", "f", "n_heads"])
    worth = {"layer": [0, 0], "head": [1, 1], "set": ["rest", "class"], "with": [whole] * 2}
    found = metrics.circuits(cases, pd.DataFrame(worth | {"without": [whole / 2] * 2}))
    shares = "recovered incompleteness naive.incompleteness movers_knocked_out minimality".split()
    for name in (*shares, "minimality_of_class"):
        expected = 0.5 if whole > 0 else np.nan
        assert found[name] == pytest.approx(expected, nan_ok=True), name
    assert found["random.recovered"] == pytest.approx(0 if whole > 0 else np.nan, nan_ok=True)
    heads = {"role": ["name_mover"], "layer": [0], "head": [1], "direct": [-whole / 2]}
    measured = {key: [0.5] for key in ("end_to_io", "copies", "suppresses")}
    scatter = pd.DataFrame({"layer": [], "head": [], "attention": [], "logit": []})
    found = metrics.heads(pd.DataFrame(heads | measured), scatter, whole)
    for name in ("movers_direct", "strongest.name_mover"):
        assert found[name] == pytest.approx(0.5 if whole > 0 else np.nan, nan_ok=True), name
