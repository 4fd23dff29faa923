"""What a probe is to be compared with: control tasks, and baselines that see no activations.

Hewitt & Liang (2019): a control task gives each word type a label at random, drawn from the real
labels' distribution, the same wherever the type occurs, in training and in test. Nothing but
memorising can solve it. Selectivity is the accuracy on the real task minus that on the control; a
probe of high accuracy and low selectivity may have memorised the real task as well.

A word type is a token id. A document has none, so its labels have no control task.
"""

import numpy as np
from jaxtyping import Bool, Int

from pipeline.errors import RetraceError
from pipeline.text.labels import by_id


def control(
    name: str,
    codes: Int[np.ndarray, " rows"],
    ids: Int[np.ndarray, " rows"],
    n_classes: int,
    seed: int,
) -> Int[np.ndarray, " rows"]:
    """The control task of labels; -1 where a row has none.

    Args:
        name: the labels' name, for the error.
        codes: each row's class; ids: its token id.

    Raises:
        RetraceError: fewer word types than classes.
    """
    known = codes >= 0
    types, at = np.unique(ids[known], return_inverse=True)
    if len(types) < n_classes:
        raise RetraceError(
            f"probes.labels.{name}: its rows have {len(types)} word types and {n_classes} classes; "
            f"a control task needs at least as many types as classes, so take more text or set "
            f"probes.control: false"
        )
    shares = np.bincount(codes[known], minlength=n_classes) / known.sum()
    drawn = np.random.default_rng([seed, 1]).choice(n_classes, size=len(types), p=shares)
    out = np.full_like(codes, -1)
    out[known] = drawn[at]
    return out


def majority(
    codes: Int[np.ndarray, " rows"], test: Bool[np.ndarray, " rows"], n_classes: int
) -> Int[np.ndarray, " test_rows"]:
    """The most frequent class of the training rows, for each test row."""
    counts = np.bincount(codes[~test & (codes >= 0)], minlength=n_classes)
    return np.full(int(test.sum()), int(counts.argmax()))


def bag_of_ids(
    codes: Int[np.ndarray, " rows"],
    test: Bool[np.ndarray, " rows"],
    n_classes: int,
    row: Int[np.ndarray, " tokens"],
    ids: Int[np.ndarray, " tokens"],
) -> Int[np.ndarray, " test_rows"]:
    """What the token ids of a row say, for each test row.

    Of one token: the class that its id most often has. Of a document: multinomial naive Bayes over
    its ids, one added to every count.

    Args:
        row, ids: the row of each stored token, and its id.
    """
    train = ~test & (codes >= 0)
    if len(row) == len(codes):
        return by_id(ids[train], codes[train], n_classes)(ids[test])
    types, at = np.unique(ids, return_inverse=True)
    counts = np.ones((n_classes, len(types)))
    mine = train[row]
    np.add.at(counts, (codes[row[mine]], at[mine]), 1)
    log_p = np.log(counts / counts.sum(1, keepdims=True))
    scores = np.zeros((len(codes), n_classes))
    np.add.at(scores, row, log_p.T[at])
    prior = np.bincount(codes[train], minlength=n_classes) + 1e-9
    return (scores + np.log(prior / prior.sum())).argmax(1)[test]


def accuracy(
    found: Int[np.ndarray, " rows"], codes: Int[np.ndarray, " rows"], n_classes: int
) -> tuple[float, float]:
    """Accuracy on the rows with a label, and its mean over classes."""
    known = codes >= 0
    if not known.any():
        return float("nan"), float("nan")
    right, codes = found[known] == codes[known], codes[known]
    each = [right[codes == c].mean() for c in range(n_classes) if (codes == c).any()]
    return float(right.mean()), float(np.mean(each))
