"""Numbers of the paper out of its tables: one main dictionary, the paper's A/1, and its company.

One value a trained model; models differ in the seed of their training.
"""

from typing import Any

import numpy as np

from pipeline.claims.seeds import evaluations

ULTRALOW = 1e-5  # share of rows; the border is ours, the paper draws it between two clusters
METRICS = {
    "main.width": "latents of the main dictionary, the one that all arms train",
    "main.loss_recovered": "(loss_zero - loss_spliced) / (loss_zero - loss_model) of the main "
    "dictionary of model a: the MLP's activations after its nonlinearity replaced by the "
    "reconstruction, against replaced by zero",
    "main.dead": "latents of it that fire on no scanned row",
    "main.ultralow": "latents of it that fire on some, but fewer than 1e-5 of the scanned rows",
    "widest.width": "latents of the widest dictionary with the main dictionary's L1 coefficient",
    "widest.loss_recovered": "its loss recovered, as main.loss_recovered",
    "widths.smallest_rise": "smallest increase of loss recovered from one width to the next, equal "
    "L1 coefficient",
    "resampling.dead_share": "dead share of the main dictionary when its training ended",
    "resampling.dead_share_without": "the same of its twin that was never resampled",
    "null.loss_recovered": "loss recovered of a dictionary whose decoder keeps its random "
    "directions",
    "null.matched": "the same of the learned dictionary of its width and L1 coefficient",
    "universality.latents": "median over latents of model a's main dictionary of the largest "
    "Pearson correlation with a latent of model b's, same held-out tokens; units that fire on too "
    "few rows (own.latents.n_fired) are left out",
    "universality.neurons": "the same over the two models' neurons",
    "universality.null_latents": "universality.latents with the rows of model b shifted",
    "universality.null_neurons": "universality.neurons with the rows of model b shifted",
    "splitting.near_first": "mean number of latents of the second narrowest dictionary near a "
    "latent of the narrowest: a cosine of decoder rows above the narrow latent's largest with "
    "another of its own dictionary",
    "splitting.near_null": "splitting.near_last with the entries of each wide row permuted",
    "splitting.near_last": "the same of the widest",
    "splitting.smallest_rise": "smallest increase of that number from one width to the next",
    "purity.*": "median over units of H(q0) - H(q) in bits: q the tokens weighted by a unit's "
    "activation, q0 the same with the tokens of other rows; by how much a unit narrows down which "
    "token was read, higher: fewer different tokens. latents, neurons and random directions of a "
    "trained model; untrained and untrained_neurons: of the model before training",
    "said.*": "median over units of E_r[rank] - E_r0[rank]: r the next tokens weighted by a unit's "
    "activation, r0 those of other rows, rank from 0 to 1 in what the unit adds to the logits; "
    "whether what a unit says of the next token is what comes. The same groups as purity",
    "splice_check.max": "largest splice check of any dictionary, nats",
}


def main_of(table: Any) -> str:
    """The main dictionary's name in an evaluation: what `unresampled` is the twin of."""
    named = table.set_index("sae")
    twin, learned = named.loc["unresampled"], ~named["frozen_decoder"].astype(bool)
    same = (named["d_sae"] == twin["d_sae"]) & (named["l1_coefficient"] == twin["l1_coefficient"])
    return named.index[same & learned & (named.index != "unresampled")][0]


def ladder(evaluation: Any, main: str) -> Any:
    """Rows of an evaluation table that differ from the main dictionary in width alone, by width."""
    named = evaluation.set_index("sae", drop=False)
    same = named["l1_coefficient"] == named.loc[main, "l1_coefficient"]
    twin = named["frozen_decoder"].astype(bool) | named.index.str.startswith("unresampled")
    return named[same & ~twin].sort_values("d_sae")


def single_minded(named: dict[str, Any]) -> dict[str, float]:
    """The medians of the measures of groups of units."""
    columns = {"purity": "narrowing", "said": "said"}
    return {f"{measure}.{name}": group[column].median()
            for measure, column in columns.items() for name, group in named.items()}  # fmt: skip


def of_arm(tables: dict[str, Any], arm: str, main: str) -> dict[str, float]:
    """The numbers of one trained model and its dictionaries."""
    table = tables[f"evaluation/{arm}"]
    named, steps = table.set_index("sae"), ladder(table, main)
    of_main, without, null = (named.loc[n] for n in (main, "unresampled", "random_directions"))
    matched = steps[steps["d_sae"] == null["d_sae"]].iloc[0]
    recovered = "loss_recovered_zero"
    out = {
        "main.width": of_main["d_sae"],
        "main.loss_recovered": of_main[recovered],
        "widest.width": steps.iloc[-1]["d_sae"],
        "widest.loss_recovered": steps.iloc[-1][recovered],
        "widths.smallest_rise": np.diff(steps[recovered]).min(),
        "resampling.dead_share": of_main["dead_share"],
        "resampling.dead_share_without": without["dead_share"],
        "null.loss_recovered": null[recovered],
        "null.matched": matched[recovered],
    }
    own = {n: t[t["arm"] == arm] for n, t in tables.items() if n.startswith("latents/")}
    for kind, found in own["latents/matches"].groupby("kind"):
        out[f"universality.{kind}"] = found["correlation"].median()
    near = own["latents/splitting"].groupby("wide", sort=False)
    counts, last = near["n_near"].mean().to_numpy(), list(near)[-1][1]
    groups = dict(iter(own["latents/units"].groupby("group")))
    density = groups[main]["density"]
    named = {"latents": groups[main], "neurons": groups["neurons"], "random": groups["random"]}
    return out | single_minded(named) | {
        "main.dead": (density == 0).sum(),
        "main.ultralow": ((density > 0) & (density < ULTRALOW)).sum(),
        "splitting.near_first": counts[0],
        "splitting.near_last": counts[-1],
        "splitting.smallest_rise": np.diff(counts).min(),
        "splitting.near_null": last["n_null"].mean(),
    }  # fmt: skip


def metrics(tables: dict[str, Any]) -> dict[str, Any]:
    """See METRICS; one value a trained model, each of another seed."""
    arms = list(tables["latents/matches"]["arm"].unique())
    main = main_of(tables[f"evaluation/{arms[0]}"])
    found = [of_arm(tables, arm, main) for arm in arms]
    out: dict[str, Any] = {name: [f[name] for f in found] for name in found[0]}
    units = tables["latents/units"]
    if len(null := units[units["arm"] == "untrained"]):
        groups = dict(iter(null.groupby("group")))
        named = {"untrained": groups[main], "untrained_neurons": groups["neurons"]}
        out |= single_minded(named)
    checks = [table["splice_check"].max() for table in evaluations(tables).values()]
    return out | {"splice_check.max": max(checks)}
