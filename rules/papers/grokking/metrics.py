"""Metrics of Progress Measures for Grokking: what they mean, and how they follow from the tables.

One value per seed. Without a prefix: the arm `decay`, as in the paper; `null.`: the arm `no_decay`;
`untrained.`: the arm `decay` at step 0. Losses are nats, float64, over p classes; "test" are the
pairs that are not trained on. Steps are updates on the full batch (the paper's epochs). "At the
end" is the median over the checkpoints of the last twentieth of the run, 2,000 of the paper's
40,000 steps; which frequencies are key is said by the last checkpoint.
"""

from typing import Any

import numpy as np

from pipeline.claims.seeds import gathered
from pipeline.store.tables import where

from . import phases

METRICS = {
    "accuracy.train": "share of the training pairs that are answered right, at the end",
    "accuracy.test": "share of the other pairs that are answered right, at the end",
    "steps.fitted": "first evaluated step at which every training pair is answered right; NaN if "
    "none",
    "steps.generalised": "first evaluated step with a test accuracy above 0.99; NaN if none",
    "steps.delay": "generalised - fitted, updates",
    "steps.delay_share": "the same over the steps of the run, 0 where it never generalises; "
    "0.025 is 1,000 of the paper's 40,000 steps",
    "phase.memorised": "step at which the excluded loss (training pairs) is least, before cleanup: "
    "the end of memorisation",
    "phase.cleanup": "first checkpoint after the largest test loss at which log test loss has gone "
    "5 % of its way to its final value: circuit formation ends, cleanup begins",
    "phase.cleaned": "first checkpoint at which it has gone 90 % of that way: cleanup ends",
    "key.count": "key frequencies: those whose removal from the logits of the last checkpoint "
    "raises the test loss at least key_ratio times (paper.yaml: 10)",
    "key.weakest": "smallest ratio of the test loss without a key frequency to the full test loss, "
    "at the end",
    "key.other": "largest such ratio of a frequency that is not key",
    "embedding.frequencies": "frequencies whose norm in W_E is above a quarter of the largest",
    "neurons.single": "share of the neurons of which one frequency (its eight components over a "
    "and b) explains more than 85 % of the variance, at the end",
    "logits.explained": "share of the variance of all p^3 logits that sum_k alpha_k cos(w_k (a + b "
    "- c)) over key k explains, at the end; alpha by least squares",
    "readout.explained": "smallest share, over key k, of the variance of u_k MLP(a, b) that "
    "cos(w_k (a + b)) explains, and of v_k MLP(a, b) that sin does; u_k, v_k are W_L's rows at k",
    "readout.residual": "norm of W_L outside its key frequencies over the norm of W_L",
    "loss.test": "test loss at the end; all that begins with loss. is of the end",
    "loss.all": "loss over all pairs",
    "loss.uniform": "ln p, the loss of equal logits",
    "loss.restricted": "test loss with only the constant and the key frequencies' cos and sin of "
    "w_k (a + b) kept in the logits",
    "loss.excluded": "training loss with these waves removed from the logits, all at once",
    "loss.blocks": "loss over all pairs with only the mean and the eight components of each key "
    "frequency kept in the logits (40 components for five)",
    "loss.without_blocks": "loss over all pairs with the mean kept and these components removed",
    "loss.formula": "loss over all pairs with the logits replaced by the fitted sum_k alpha_k "
    "cos(w_k (a + b - c)); right for any positive alpha, so only its size says something",
    "loss.polynomials": "loss over all pairs with every single-frequency neuron replaced by its "
    "mean and the eight components of its frequency",
    "loss.polynomials_ratio": "the same over loss.all",
    "loss.neuron_waves": "loss over all pairs with every neuron reduced to its mean and the key "
    "frequencies' cos and sin of w_k (a + b)",
    "loss.directions": "loss over all pairs with the neurons projected on the span of u_k, v_k",
    "loss.nullspace": "loss over all pairs with the neurons projected on the rest",
    "during.restricted_fall": "restricted test loss when cleanup begins over that at the end of "
    "memorisation",
    "during.test_fall": "the same of the full test loss",
    "during.excluded_rise": "excluded training loss when cleanup begins over that at the end of "
    "memorisation",
    "during.excluded_rise_after": "excluded training loss at the end over that when cleanup begins",
    "during.*.formation": "change of the quantity a thousand steps during circuit formation",
    "during.*.cleanup": "the same during cleanup",
    "null.accuracy.train": "arm without weight decay: as accuracy.train",
    "null.accuracy.test": "arm without weight decay: largest test accuracy at any evaluation",
    "null.logits.explained_any": "arm without weight decay: share of the variance of the logits "
    "that the formula explains with all frequencies, key or not",
    "null.loss.sum_only": "arm without weight decay: test loss with the waves of a + b of all "
    "frequencies kept; it averages over the pairs of a sum, the trained ones among them",
    "null.*": "arm without weight decay: the same",
    "untrained.*": "step 0: the same",
}
CHANGES = ("gini_W_E", "gini_W_L", "sum_squares")
# Metric -> the number at the end that it is, most of them columns of the table progress.
MEASURED = {
    "accuracy.train": "train_accuracy", "accuracy.test": "test_accuracy",
    "logits.explained": "explained", "readout.residual": "residual", "loss.test": "test_loss",
    "loss.all": "all_loss", "loss.uniform": "uniform", "loss.restricted": "restricted_test",
    "loss.excluded": "excluded_train", "neurons.single": "single",
    "loss.polynomials_ratio": "polynomials_ratio",
}  # fmt: skip
EDITS = ("blocks", "without_blocks", "formula", "polynomials", "neuron_waves", "directions")
EDITS += ("nullspace",)


def first(rows: Any, holds: Any) -> float:
    """The first step at which something holds, NaN where it never does."""
    return float(rows["step"][holds].min()) if holds.any() else np.nan


def curves(history: Any) -> dict[str, float]:
    """When one model fits the training pairs, and when it generalises."""
    train, test = where(history, set="train"), where(history, set="test")
    fitted = first(train, train["accuracy"] >= 1)
    generalised = first(test, test["accuracy"] > 0.99)
    delay, steps = generalised - fitted, int(history["step"].max())
    return {
        "steps.fitted": fitted,
        "steps.generalised": generalised,
        "steps.delay": delay,
        "steps.delay_share": float(np.nan_to_num(delay)) / steps,
    }


def structure(frequencies: Any) -> dict[str, float]:
    """Key frequencies, and how far embedding and readout keep to them."""
    key, rest = frequencies[frequencies["key"]], frequencies[~frequencies["key"]]
    norm, full = frequencies["norm_W_E"], frequencies["full_test"].iloc[0]
    readout = key[["readout_cos", "readout_sin"]].to_numpy()
    return {
        "key.count": len(key),
        "key.weakest": key["without_test"].min() / full,
        "key.other": rest["without_test"].max() / full,
        "embedding.frequencies": (norm > norm.max() / 4).sum(),
        "readout.explained": readout.min() if readout.size else np.nan,
    }


def at_the_end(progress: Any) -> Any:
    """The median of each measure of one model over the last twentieth of the run."""
    rows = progress.set_index("step").sort_index()
    return rows.loc[phases.ending(rows.index.to_numpy())].median(numeric_only=True)


def endings(progress: Any, edits: Any, p: int) -> dict[str, float]:
    """Losses and fits at the end."""
    found, loss = at_the_end(progress), where(edits, set="all").set_index("edit")["loss"]
    found["residual"], found["uniform"] = edits["residual_W_L"].iloc[0], np.log(p)
    found["polynomials_ratio"] = loss["polynomials"] / loss["full"]
    out = {name: found[measure] for name, measure in MEASURED.items()}
    return out | {f"loss.{edit}": loss[edit] for edit in EDITS}


def during(progress: Any, phase: Any) -> dict[str, float]:
    """What happens in the phases of one model; NaN where it has none."""
    ends = phase[["memorised", "cleanup", "cleaned"]]
    at = progress.set_index("step").select_dtypes("number").reindex(ends.to_numpy(float))
    rise = at.iloc[1] / at.iloc[0]
    after = at_the_end(progress)["excluded_train"] / at["excluded_train"].iloc[1]
    out = {"during.restricted_fall": rise["restricted_test"], "during.test_fall": rise["test_loss"],
           "during.excluded_rise": rise["excluded_train"],
           "during.excluded_rise_after": after}  # fmt: skip
    for name in CHANGES:
        for i, phase_name in enumerate(("formation", "cleanup")):
            thousands = (ends.iloc[i + 1] - ends.iloc[i]) / 1000
            change = at[name].iloc[i + 1] - at[name].iloc[i]
            out[f"during.{name}.{phase_name}"] = change / thousands if thousands else np.nan
    return out | {f"phase.{name}": step for name, step in ends.items()}


def of_model(tables: dict[str, Any], arm: str, seed: int) -> dict[str, float]:
    """Every metric of one model, with the prefix of its arm."""
    names = ("progress", "phases", "frequencies", "edits")
    own = {name: where(tables[f"fourier/{name}"], arm=arm, seed=seed) for name in names}
    history, progress = where(tables[f"training/{arm}"], seed=seed), own["progress"]
    progress = progress.sort_values("step")
    found = endings(progress, own["edits"], 2 * len(own["frequencies"]) + 1) | curves(history)
    found |= structure(own["frequencies"]) | during(progress, own["phases"].iloc[0])
    if arm == "no_decay":
        last = progress.iloc[-1]
        return {f"null.{name}": value for name, value in found.items()} | {
            "null.accuracy.test": where(history, set="test")["accuracy"].max(),
            "null.logits.explained_any": last["explained_any"],
            "null.loss.sum_only": last["sum_only_test"],
        }
    return found | {"untrained.neurons.single": progress["single"].iloc[0]}


def metrics(tables: dict[str, Any]) -> dict[str, Any]:
    """See METRICS; one value per seed."""
    out: dict[str, Any] = {}
    for arm in ("decay", "no_decay"):
        seeds = sorted(tables[f"training/{arm}"]["seed"].unique())
        out |= gathered(of_model(tables, arm, seed) for seed in seeds)
    return out
