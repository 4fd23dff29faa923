"""Areas under ROC curves of edges and nodes: closed forms."""

import numpy as np
import pandas as pd
import pytest

from pipeline.claims import roc


@pytest.mark.parametrize(
    "fpr, tpr, area",
    [
        ([0, 1], [0, 1], 0.0),
        ([0, 0, 1], [0, 1, 1], 1.0),
        ([0, 0, 1], [0, 0.2, 1], 0.2),
        ([0, 0.5, 1], [0, 0.5, 1], 0.25),
        ([0, 0.25, 1], [0, 0.25, 1], 0.1875),
        ([0, 0.25, 0.5, 1], [0, 0.25, 0.5, 1], 5 / 16),
        ([0, 0.25, 0.75, 1], [0, 0.25, 0.5, 1], 4 / 16),
    ],
)
def test_pessimistic_area(fpr, tpr, area):
    assert roc.pessimistic_auc(np.array(fpr), np.array(tpr)) == pytest.approx(area)


def test_a_curve_keeps_what_no_other_point_beats():
    truth = np.array([1, 1, 0, 0], bool)
    found = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [1, 1, 1, 0], [1, 0, 1, 1]], bool)
    fpr, tpr = roc.curve(found, truth)
    assert list(zip(fpr, tpr, strict=True)) == [(0, 0), (0, 0.5), (0.5, 1), (1, 1)]
    assert roc.pessimistic_auc(fpr, tpr) == pytest.approx(0.5 + 0.5 * 0.5)


def test_the_area_of_many_scores_is_the_share_of_ordered_pairs():
    rng = np.random.default_rng(0)
    scores, truth = rng.permutation(60) + 1.0, rng.random(60) < 0.3
    pairs = scores[truth][:, None] > scores[~truth][None]
    area = roc.pessimistic_auc(*roc.curve(roc.sets_of_scores(scores), truth))
    assert area == pytest.approx(pairs.mean())


def test_ties_are_taken_pessimistically():
    truth = np.array([1, 0], bool)
    assert roc.pessimistic_auc(*roc.curve(roc.sets_of_scores(np.ones(2)), truth)) == 0


EDGES = [
    ("embed", 0, -1, "head", 0, 0, "v"),
    ("input", 0, 0, "head", 0, 0, "v"),
    ("head", 0, 0, "mlp", 0, -1, ""),
    ("mlp", 0, -1, "logits", -1, -1, ""),
]


def test_nodes_that_edges_touch():
    assert [roc.ends(e) for e in EDGES] == [
        ("embed", "0.0.v input"),
        ("0.0.v input", "0.0.v"),
        ("head 0.0", "mlp 0"),
        ("mlp 0", "logits"),
    ]
    nodes, touched = roc.incidence(pd.DataFrame(EDGES, columns=roc.COLUMNS))
    assert nodes == sorted(["0.0.v", "0.0.v input", "embed", "head 0.0", "logits", "mlp 0"])
    assert touched.sum() == 8 and touched.sum(0).max() == 2


def test_areas_of_edges_and_nodes():
    _, touched = roc.incidence(pd.DataFrame(EDGES, columns=roc.COLUMNS))
    truth = np.array([1, 1, 0, 0], bool)
    found = np.array([[1, 0, 0, 0]], bool)  # half of the edges, two of three nodes
    assert roc.areas(touched, found, truth) == pytest.approx({"edges": 0.5, "nodes": 2 / 3})


def test_sets_out_of_rows():
    rows = pd.DataFrame({"score": [0.3, 0.05, 0.2, 0.05], "threshold": [0.1, 0.1, 0.01, 0.01]})
    assert roc.found_sets(rows).tolist() == [[True, False], [True, True]]
    plain = rows.head(2).assign(score=[-3.0, 2.0], threshold=np.nan)
    assert roc.found_sets(plain).tolist() == [[True, False], [True, True]]
