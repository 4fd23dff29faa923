"""Metrics of this paper, one value a seed: of the model, of the crosscoder, or of the toy."""

from typing import Any

import numpy as np
import pandas as pd

METRICS = {
    "*.*.exclusive": "<pair>.<objective>: latents of the tuned model alone by their norms (Δnorm > "
    "0.9), of those that held-out tokens make fire",
    "*.*.exclusive_share": "the same over the latents that fire",
    "*.*.confirmed_share": "share of these that latent scaling calls exclusive, too (ν_r < 0.5 and "
    "ν_ε < 0.2); NaN where there are none",
    "*.*.shared_share": "share of the latents that fire with 0.4 <= Δnorm <= 0.6",
    "*.*.l0": "latents active a token, or a row",
    "*.*.explained_variance": "mean of both models",
    "*.*.kl.*": "KL in nats of the tuned model from itself with the base's stream and the "
    "differences of some latents: none, all, top, larger and smaller (halves of top by Δnorm), "
    "lower_nu and higher_nu (by latent scaling), random (half)",
    "*.*.called": "of the toy, <arm>.<objective>: latents that norms call tuned-only",
    "*.*.precision": "share of these whose feature is tuned-only; NaN where there are none",
    "*.*.confirmed_precision": "the same of those that latent scaling confirms",
    "*.*.recall": "share of tuned-only features that a called latent stands for",
    "*.learned": "fall of the loss on held-out text of the task, nats, at the end",
    "*.forgot": "rise of the loss on held-out text of before, nats, at the end",
    "*.forgot_alike": "the same of full fine-tuning where it had learned as much as this arm has "
    "at its end, between two evaluations on a line; NaN where it never had",
    "*.intruders": "intruder dimensions a matrix, of 10, at ε = 0.5",
    "*.rank90": "rank of the update: singular values that make 90 % of its squared norm, mean over "
    "matrices",
    "*.size": "norm of the update over that of the matrix, mean over matrices",
    "*.scaled.*.*": "change of the loss with intruders, or random directions, at half their "
    "singular value, nats: task, or before",
    "sweep.*.best_lr": "learning rate of the least held-out loss of the task at the end",
    "sweep.*.inside": "1 where that is none of the ends of the sweep",
    "sweep.*.kept": "1 where the run has that rate",
}
HALF, EPSILON = 0.5, 0.5  # λ of *.scaled, and the published ε


def objective_of(sae: str) -> tuple[str, str, int]:
    """(objective, tuned arm, seed) of l1_full_seed0."""
    objective, arm, seed = sae.rsplit("_", 2)
    return objective, arm, int(seed.removeprefix("seed"))


def of_crosscoders(table: Any) -> dict[str, list[float]]:
    """Latents of the tuned model alone, and how good the crosscoders are."""
    out: dict[str, list[float]] = {}
    for sae, rows in sorted(table.groupby("sae"), key=lambda found: objective_of(found[0])):
        objective, arm, _ = objective_of(sae)
        row = rows[rows["source"] == arm].iloc[0]
        n, living = row["exclusive"], max(row["living"], 1)
        found = {
            "exclusive": n, "exclusive_share": n / living, "shared_share": row["shared"] / living,
            "confirmed_share": row["confirmed"] / n if n else np.nan, "l0": row["l0"],
            "explained_variance": rows["explained_variance"].mean(),
        }  # fmt: skip
        for name, value in found.items():
            out.setdefault(f"{arm}.{objective}.{name}", []).append(float(value))
    return out


def of_closed(table: Any) -> dict[str, list[float]]:
    """KL of every subset; random ones are averaged."""
    table = table.assign(subset=table["subset"].str.replace(r"_\d+$", "", regex=True))
    keys = ["objective", "arm", "subset", "seed"]
    out: dict[str, list[float]] = {}
    for (objective, arm, subset, _), kl in table.groupby(keys)["kl"].mean().items():
        out.setdefault(f"{arm}.{objective}.kl.{subset}", []).append(float(kl))
    return out


def of_toy(table: Any) -> dict[str, list[float]]:
    """How right the calls are, against the truth."""
    out: dict[str, list[float]] = {}
    for (arm, objective, _), rows in table.groupby(["arm", "objective", "seed"]):
        called, sure = rows[rows["called"]], rows[rows["confirmed"]]
        right = called[called["truth"] == "tuned"]
        found = {
            "called": len(called), "l0": rows["l0"].iloc[0],
            "precision": (called["truth"] == "tuned").mean(),
            "confirmed_precision": (sure["truth"] == "tuned").mean(),
            "recall": right["feature"].nunique() / max(int(rows["n_tuned"].iloc[0]), 1),
        }  # fmt: skip
        for name, value in found.items():
            out.setdefault(f"{arm}.{objective}.{name}", []).append(float(value))
    return out


def of_curves(table: Any, run: str, full: Any) -> dict[str, list[float]]:
    """What a run learned and forgot; full: the curves of full fine-tuning, mean over seeds."""
    out: dict[str, list[float]] = {}
    for (arm, _), rows in table.groupby(["arm", "seed"]):
        losses = rows.pivot(index="step", columns="set", values="loss")
        learned = losses["val"].iloc[0] - losses["val"].iloc[-1]
        found = {"learned": learned, "forgot": losses["other"].iloc[-1] - losses["other"].iloc[0]}
        reached = full["val"].iloc[0] - full["val"]
        rising = np.maximum.accumulate(reached.to_numpy())
        forgot = (full["other"] - full["other"].iloc[0]).to_numpy()
        never = learned > rising[-1]
        found["forgot_alike"] = np.nan if never else np.interp(learned, rising, forgot)
        for name, value in found.items():
            out.setdefault(f"{arm or run}.{name}", []).append(float(value))
    return out


def of_updates(tables: dict[str, Any]) -> dict[str, list[float]]:
    """Intruders a matrix, and the rank and size of updates."""
    out: dict[str, list[float]] = {}
    for (arm, _), rows in tables["updates/intruders"].groupby(["arm", "seed"]):
        n = rows.loc[rows["epsilon"] == EPSILON, "intruders"].mean()
        out.setdefault(f"{arm}.intruders", []).append(float(n))
    for (arm, _), rows in tables["updates/ranks"].groupby(["arm", "seed"]):
        for name in ("rank90", "size"):
            out.setdefault(f"{arm}.{name}", []).append(float(rows[name].mean()))
    keys = ["arm", "which", "text", "seed"]
    for (arm, which, text, _), rows in tables["updates/scaled"].groupby(keys):
        by = rows.set_index("factor")["loss"]
        out.setdefault(f"{arm}.scaled.{which}.{text}", []).append(float(by[HALF] - by[1.0]))
    return out


def of_sweep(table: Any, run: str, used: Any) -> dict[str, float]:
    """The learning rate that a sweep finds, of arms called lr1em3; used: the run's own table."""
    last = table[(table["set"] == "val") & (table["step"] == table["step"].max())]
    rates = last["arm"].str.removeprefix("lr").str.replace("em", "e-").astype(float)
    last = last.assign(rate=rates, at=last["arm"].map(table.groupby("arm")["lr"].max()))
    last = last.sort_values("rate")
    best = last.loc[last["loss"].idxmin()]
    inside = last["rate"].iloc[0] < best["rate"] < last["rate"].iloc[-1]
    kept = bool(np.isclose(used["lr"].max(), best["at"]))
    found = {"best_lr": best["rate"], "inside": inside, "kept": kept}
    return {f"sweep.{run}.{name}": float(value) for name, value in found.items()}


def metrics(tables: dict[str, Any]) -> dict[str, Any]:
    """The numbers of METRICS."""
    out: dict[str, Any] = of_crosscoders(tables["crosscoders/base"])
    out |= of_closed(tables["closed/closed"]) | of_toy(tables["toy/latents"]) | of_updates(tables)
    full = tables["training/full"]
    mean = full.pivot_table(index="step", columns="set", values="loss", aggfunc="mean")
    for run in ("full", "lora"):
        out |= of_curves(tables[f"training/{run}"], run, pd.DataFrame(mean))
        out |= of_sweep(tables[f"training/sweep_{run}"], run, tables[f"training/{run}"])
    return out
