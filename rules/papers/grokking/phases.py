"""Where memorisation, circuit formation and cleanup end, by a stated rule; numpy only.

The paper draws the borders by eye (Section 5.2). Ours, over the checkpoints of one model:

1. Memorisation ends where the excluded loss is least, before the test loss has fallen: from then on
   the training pairs come to depend on the key frequencies.
2. Circuit formation ends, and cleanup begins, at the first checkpoint after the largest test loss
   at which the logarithm of the test loss has gone START of its way down.
3. Cleanup ends at the first checkpoint at which it has gone END of its way. The way leads from the
   largest test loss to the median over the last tenth of the checkpoints.

A model that does not generalise (median test accuracy at the end ≤ 0.99) has no phases: NaN.
"""

import numpy as np

START, END = 0.05, 0.9
ENDING = 0.05  # 2,000 of the paper's 40,000 steps
GENERALISED = 0.99


def borders(
    step: np.ndarray, test_loss: np.ndarray, excluded_loss: np.ndarray, test_accuracy: np.ndarray
) -> dict[str, float]:
    """memorised, cleanup and cleaned: the steps at which the three phases end, NaN where none. All
    are [checkpoints], steps ascending, losses in nats."""
    none = dict.fromkeys(("memorised", "cleanup", "cleaned"), np.nan)
    if not np.median(test_accuracy[np.isin(step, ending(step))]) > GENERALISED:
        return none
    top = int(np.argmax(test_loss))
    last = np.log(np.median(test_loss[-max(1, len(step) // 10) :]))
    way = (np.log(test_loss[top]) - np.log(test_loss)) / (np.log(test_loss[top]) - last)
    first = lambda share: top + int(np.argmax(way[top:] >= share))  # noqa: E731
    begins, ends = first(START), first(END)
    memorised = int(np.argmin(excluded_loss[: begins + 1]))
    return {
        "memorised": float(step[memorised]),
        "cleanup": float(step[begins]),
        "cleaned": float(step[ends]),
    }


def ending(step: np.ndarray) -> np.ndarray:
    """The checkpoints of the run's end, its last twentieth: steps, ascending.

    What a model has come to is the median over them. With a constant learning rate a single
    checkpoint may fall into a spike of the loss.
    """
    return step[step >= step[-1] * (1 - ENDING)]


def frames(step: np.ndarray, until: float, n: int) -> np.ndarray:
    """At most about n steps to look at: evenly spaced until a fifth past the end of cleanup (NaN:
    over the whole run), and the last."""
    reach = step[-1] if np.isnan(until) else min(1.2 * until, step[-1])
    inside = np.flatnonzero(step <= reach)
    chosen = np.linspace(0, len(inside) - 1, min(n, len(inside))).round().astype(int)
    return np.unique(np.append(step[inside[chosen]], step[-1]))
