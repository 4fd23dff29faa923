"""Names, colours and grids that the figures share."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pipeline.claims import roc
from pipeline.report.theme import PALETTE

TASKS = {
    "reverse": "reverse",
    "xproportion": "xproportion",
    "letters": "xproportion, letters",
    "siit": "xproportion, trained",
}
ABLATIONS = {"zero": "zero ablation", "corrupt": "corrupt ablation"}
TRUTHS = {
    "wired": "what is built in",
    "authors": "the authors' circuit",
    "swapped": "what swapped tokens need",
}
METHODS = {  # name, line; thinner lines lie on wider ones, as curves often coincide
    "acdc": ("ACDC", {"color": PALETTE[0], "width": 6}),
    "eap": ("EAP", {"color": PALETTE[1], "width": 4}),
    "eap_ig": ("EAP-IG", {"color": PALETTE[2], "width": 2.5}),
    "exact": ("exact single cuts", {"color": PALETTE[4], "width": 1.5, "dash": "dot"}),
}
ORDERS = {  # ACDC in a drawn order of the edges, and in that of the authors' code
    "acdc": METHODS["acdc"],
    "acdc_canonical": ("ACDC, authors' order", {"color": PALETTE[3], "width": 5, "dash": "dash"}),
}
NOUGHT = 1e-20  # where 0 stands on a log scale


def first(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of the trained weights and the first seed."""
    return frame[(frame["weights"] == "trained") & (frame["seed"] == frame["seed"].min())]


def relative(edges: pd.DataFrame, known: np.ndarray) -> pd.DataFrame:
    """|score| of every edge over its method's largest, at least NOUGHT; x spreads them out.

    Of ACDC the rises at its smallest threshold count, so far as they are rises.
    """
    out = []
    for place, method in enumerate(METHODS):
        rows = edges[edges["method"] == method]
        if method == "acdc":
            rows = rows[rows["threshold"] == rows["threshold"].min()]
        size = rows["score"].clip(lower=0) if method == "acdc" else rows["score"].abs()
        ends = [roc.ends(e) for e in rows[roc.COLUMNS].itertuples(index=False, name=None)]
        spread = np.linspace(-0.32, 0.32, len(rows))
        out.append(
            pd.DataFrame(
                {
                    "method": method,
                    "edge": [" → ".join(pair) for pair in ends],
                    "x": place + spread,
                    "size": (size / (size.max() or 1)).clip(lower=NOUGHT).to_numpy(),
                    "known": known,
                }
            )
        )
    return pd.concat(out, ignore_index=True)


def panels(frame: pd.DataFrame, **more: Any) -> tuple[go.Figure, dict[tuple, dict[str, int]]]:
    """A panel a task (across) and ablation (down), and the place of each."""
    tasks = [t for t in TASKS if t in set(frame["task"])]
    ablations = [a for a in ABLATIONS if a in set(frame["ablation"])]
    titles = [f"{TASKS[t]}<br>{ABLATIONS[a]}" for a in ablations for t in tasks]
    figure = make_subplots(
        rows=len(ablations), cols=len(tasks), subplot_titles=titles, shared_yaxes=True,
        horizontal_spacing=0.04, vertical_spacing=0.2, **more,
    )  # fmt: skip
    figure.update_annotations(font_size=12)
    place = {
        (t, a): {"row": i + 1, "col": j + 1}
        for i, a in enumerate(ablations)
        for j, t in enumerate(tasks)
    }
    return figure, place
