"""When something forms in training: the phase change, its bump, and what comes first. [no torch]

Curves are values at ascending numbers of training tokens, the first at 0. They are read between
the checkpoints on straight lines.
"""

import numpy as np

from pipeline.claims.seeds import crossing

GRID = 400  # places at which a window may begin


def doubling(tokens: np.ndarray, score: np.ndarray) -> tuple[float, float, float]:
    """The phase change: the doubling [s, 2 s] of training tokens in which a score gains most.

    Olsson et al. 2022 (Argument 1) choose their window by the derivative of the in-context learning
    score; it is 2.5 to 5 billion tokens, a doubling. A window of that width by rule leaves the
    share of the score that forms in it free: a score that grows in proportion to the tokens has
    half of it in the last doubling, one that grows in proportion to their logarithm less.

    Returns:
        s, 2 s (tokens), and the gain in the window over the whole change from the first checkpoint
        to the last; 0, 0 and NaN where the score does not grow.
    """
    tokens, score = np.asarray(tokens, float), np.asarray(score, float)
    change = score[-1] - score[0]
    if change <= 0:
        return 0.0, 0.0, float("nan")
    starts = np.geomspace(tokens[1] / 2, tokens[-1] / 2, GRID)
    gain = np.interp(2 * starts, tokens, score) - np.interp(starts, tokens, score)
    best = int(gain.argmax())
    return float(starts[best]), float(2 * starts[best]), float(gain[best] / change)


def halfway(tokens: np.ndarray, score: np.ndarray) -> float:
    """Training tokens at which a score is first halfway from its first to its last value."""
    sign = 1 if score[-1] >= score[0] else -1
    return crossing(tokens, sign * np.asarray(score), sign * (score[0] + score[-1]) / 2)


def bump(tokens: np.ndarray, loss: np.ndarray, start: float, end: float) -> float:
    """How much further a loss falls in a window than it would have at the pace just before, nats.

    (L(s) - L(e)) - (L(s/2) - L(s)) (e - s) / (s/2). Below 0 for a convex curve. Above 0 is the bump
    of Olsson et al. 2022: a stretch visibly steeper than the one before it.
    """
    if end <= start:
        return float("nan")
    before, at, after = np.interp([start / 2, start, end], tokens, loss)
    return float((at - after) - (before - at) * (end - start) / (start / 2))
