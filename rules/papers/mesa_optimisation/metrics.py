"""Metrics of this paper, one value a seed: from losses, alignments and curves of each arm."""

from typing import Any

import numpy as np

METRICS = {
    "*.loss": "half of the mean squared error on test tasks",
    "*.shuffled_loss": "the same where contexts have the labels of other tasks",
    "*.*_loss": "of another predictor: gd (gradient descent, a step a layer, each at a tuned "
    "rate), gdpp (GD++, tuned η and γ), gd_half and gd_double (gd at ½ and 2 times the rates), "
    "lstsq (least squares), zero (predicts 0), between (weights half-way to the construction, the "
    "gauge fixed), unfixed (the same from another gauge), theory and theory_zero (closed forms)",
    "*.*_ratio": "loss over that of gd or gdpp; between and unfixed: their loss over the model's; "
    "theory and theory_zero: loss of gd and of zero over the closed forms",
    "*.*_prediction_cosine": "cosine of the predictions with those of gd or gdpp, over test tasks",
    "*.*_prediction_distance": "mean |difference| of the predictions",
    "*.*_sensitivity_cosine": "cosine of the predictions' gradients in the query, mean over tasks",
    "*.*_sensitivity_distance": "length of their difference, mean over test tasks",
    "*.weight_cosine": "cosine of A ⊗ O, which is the same in every gauge, with the construction's",
    "*.eta": "η that was tuned for GD++, at the first layer",
    "*.gamma": "γ that was tuned for GD++, at the first layer",
    "*.*_gap": "largest |log(loss / loss of another)| over sizes; inputs_gd_gap: where inputs are "
    "larger or smaller, from gd; targets, laws: likewise; gdpp, lstsq: from these",
    "iterated.*_gap": "largest |log(loss / loss of gd)| over the applications of one layer",
    "iterated.*_last": "loss after the last application",
}
OTHERS = {"gd": "gd", "gdpp": "gdpp", "least_squares": "lstsq"}


def of_models(table: Any) -> dict[str, Any]:
    """'<arm>.<column>' and the ratios."""
    out: dict[str, Any] = {}
    for arm, rows in table.groupby("arm", sort=False):
        own = rows.drop(columns=["arm", "seed"]).dropna(axis=1)
        for name in ("gd", "gdpp"):
            own[f"{name}_ratio"] = own["loss"] / own[f"{name}_loss"]
        for name in ("between", "unfixed"):
            if f"{name}_loss" in own:
                own[f"{name}_ratio"] = own[f"{name}_loss"] / own["loss"]
        own["theory_ratio"] = own["gd_loss"] / own["theory_loss"]
        own["theory_zero_ratio"] = own["zero_loss"] / own["theory_zero_loss"]
        out |= {f"{arm}.{name}": own[name].tolist() for name in own}
    return out


def gap(curve: Any, beside: Any) -> float:
    """Largest |log ratio| of two losses at the same places."""
    return float(np.abs(np.log(np.asarray(curve) / np.asarray(beside))).max())


def of_sweeps(table: Any) -> dict[str, Any]:
    """'<arm>.<quantity>_<other>_gap', trained and untrained."""
    out: dict[str, Any] = {}
    for (arm, quantity), rows in table.groupby(["arm", "quantity"], sort=False):
        for front, predictor in (("", "model"), ("untrained_", "untrained")):
            curves = rows[rows["predictor"] == predictor].groupby("seed")["loss"]
            for other, short in OTHERS.items():
                beside = rows.loc[rows["predictor"] == other, "loss"]
                gaps = [gap(curve, beside) for _, curve in curves]
                out[f"{front}{arm}.{quantity}_{short}_gap"] = gaps
    return out


def of_iterated(table: Any) -> dict[str, Any]:
    """'iterated.<predictor>_gap' and '_last'."""
    out: dict[str, Any] = {}
    gd = table.loc[table["predictor"] == "gd", "loss"]
    for name, rows in table.groupby("predictor", sort=False):
        curves = [curve["loss"] for _, curve in rows.groupby("seed")]
        out[f"iterated.{name}_gap"] = [gap(curve, gd) for curve in curves]
        out[f"iterated.{name}_last"] = [float(curve.iloc[-1]) for curve in curves]
    return out


def metrics(tables: dict[str, Any]) -> dict[str, Any]:
    """The numbers of METRICS."""
    of = {name.removeprefix("regression/"): table for name, table in tables.items()}
    return of_models(of["models"]) | of_sweeps(of["sweeps"]) | of_iterated(of["iterated"])
