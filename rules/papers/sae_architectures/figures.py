"""What tells the trained model from the null arms; no torch."""

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from pipeline.figures.parts import Drawn, bars, chosen
from pipeline.figures.theme import PAGE, axis, colour, literal

ARMS = {
    "trained": "trained model",
    "reinit": "random weights",
    "shuffled": "trained model, shuffled tokens",
}
MEASURES = {
    "explained_variance": ("explained variance", ".2f"),
    "mean": ("mean token-distribution entropy (bits)", ".2f"),
    "single": ("share of latents below 1 bit", ".0%"),
    "auroc": ("P(a latent of the trained model has the larger entropy)", ".2f"),
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
    heights = {m: [mean.loc[a, m].reindex(saes).tolist() for a in shown] for m in MEASURES}
    figure = go.Figure()
    for i, (arm, y) in enumerate(zip(shown, heights["explained_variance"], strict=True)):
        look = {"marker": {"line": {"color": PAGE, "width": 1}}}
        hover = f"{ARMS[arm]}, %{{x}}: %{{y:.3f}}"
        x = [literal(s) for s in saes]
        figure.add_trace(bars(x, y, ARMS[arm], colour(i), hover=hover, **look))
    choices = {
        title: [{"y": heights[m]}, {"yaxis.title.text": title, "yaxis.tickformat": form}]
        for m, (title, form) in MEASURES.items()
    }
    y = axis("explained variance", rangemode="tozero", tickformat=".2f")
    chosen(figure, choices).update_layout(barmode="group", xaxis=axis("dictionary"), yaxis=y)
    return figure, frame
