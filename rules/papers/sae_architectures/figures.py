"""What tells the trained model from the null arms; no torch."""

from typing import Any

import pandas as pd

from pipeline.figures.kinds_common import worded
from pipeline.figures.parts import Drawn, Panels, bars
from pipeline.figures.theme import PAGE, axis, colour

ARMS = {
    "trained": "trained model",
    "reinit": "random weights",
    "shuffled": "trained model, shuffled tokens",
}
MEASURES = {
    "explained_variance": ("explained variance", ".2f"),
    "mean": ("mean token-distribution entropy (bits)", ".2f"),
    "single": ("share of latents below 1 bit", ".0%"),
    "auroc": ("P(the trained model's entropy is larger)", ".2f"),
}


def arms(tables: dict[str, Any], options: dict[str, Any]) -> Drawn:
    """Bars: what each measure says of each arm, dictionaries side by side.

    The reader chooses between explained variance, which Heap et al. find to be similar, and the
    measures of entropy, which they find to differ.
    """
    fits = [
        table[["sae", "explained_variance"]].assign(arm=name.removeprefix("evaluation/"))
        for name, table in tables.items()
        if name.startswith("evaluation/")
    ]
    frame = tables["entropy/summary"].merge(pd.concat(fits), on=["arm", "sae"], how="left")
    frame = frame[frame.groupby("sae")["arm"].transform("nunique") > 1]
    mean = frame.groupby(["arm", "sae"])[list(MEASURES)].mean()
    shown, saes = [a for a in ARMS if a in set(frame["arm"])], list(dict.fromkeys(frame["sae"]))
    panels, axes = Panels(), []
    for case, (measure, (title, form)) in enumerate(MEASURES.items()):
        for i, arm in enumerate(shown):
            y = mean.loc[arm, measure].reindex(saes)
            look = {"marker": {"line": {"color": PAGE, "width": 1}}}
            hover = f"{ARMS[arm]}, %{{x}}: %{{y:.3f}}"
            trace = bars(list(map(worded, saes)), y, ARMS[arm], colour(i), hover=hover, **look)
            panels.add(0, trace, case=case)
        axes.append({"yaxis.title.text": title, "yaxis.tickformat": form})
    panels.choose((title for title, _ in MEASURES.values()), axes)
    panels.axis(0, axis("dictionary"), {"rangemode": "tozero"})
    return panels.figure.update_layout(barmode="group"), frame
