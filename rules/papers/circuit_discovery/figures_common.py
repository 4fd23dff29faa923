"""Names, colours and grids that the figures share."""

from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pipeline.theme import PALETTE

TASKS = {
    "reverse": "reverse",
    "xproportion": "xproportion",
    "letters": "xproportion, letters",
    "siit": "xproportion, trained",
}
ABLATIONS = {"zero": "zero ablation", "corrupt": "corrupt ablation"}
TRUTHS = {
    "wired": "what the weights wire",
    "authors": "the authors' circuit",
    "swapped": "what swapped tokens need",
}
METHODS = {
    "acdc": ("ACDC", PALETTE[0], "solid"),
    "eap": ("EAP", PALETTE[1], "dot"),
    "eap_ig": ("EAP-IG", PALETTE[2], "dash"),
    "exact": ("exact single cuts", PALETTE[4], "dashdot"),
}


def first(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of the trained weights and the first seed."""
    return frame[(frame["weights"] == "trained") & (frame["seed"] == frame["seed"].min())]


def panels(frame: pd.DataFrame, **more: Any) -> tuple[go.Figure, dict[tuple, dict[str, int]]]:
    """A panel a task (across) and ablation (down), and the place of each."""
    tasks = [t for t in TASKS if t in set(frame["task"])]
    ablations = [a for a in ABLATIONS if a in set(frame["ablation"])]
    titles = [f"{TASKS[t]}, {ABLATIONS[a]}" for a in ablations for t in tasks]
    figure = make_subplots(
        rows=len(ablations), cols=len(tasks), subplot_titles=titles, shared_yaxes=True,
        horizontal_spacing=0.04, vertical_spacing=0.16, **more,
    )  # fmt: skip
    figure.update_annotations(font_size=12)
    place = {
        (t, a): {"row": i + 1, "col": j + 1}
        for i, a in enumerate(ablations)
        for j, t in enumerate(tasks)
    }
    return figure, place
