"""Tests of this paper: python -m pytest <this folder>."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.job.source import import_file

FOLDER = Path(__file__).parent
STAGE = import_file(FOLDER / "measure.py")


@pytest.mark.parametrize("d_model", [2, 16, 64])
def test_cosine_is_the_closed_form(d_model):
    n_pairs = 20_000
    ours = STAGE.mean_abs_cosine(d_model, n_pairs, np.random.default_rng(0))
    exact = import_file(FOLDER / "figures.py").expected(d_model)
    # |cos| lies in [0, 1] and has variance 1/d - exact^2; five standard errors of its mean
    assert abs(ours - exact) < 5 * np.sqrt((1 / d_model - exact**2) / n_pairs)


def test_every_seed_and_dimension_has_its_row():
    options = STAGE.Options(tables=["cosines"], d_model=[4, 8], n_pairs=10, seeds=[0, 1, 2])
    frame = STAGE.measure(options)
    assert len(frame.drop_duplicates(["d_model", "seed"])) == 6
