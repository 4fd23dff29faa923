"""Kinds of dictionaries at equal numbers of kept features, k for k, and by themselves."""

from typing import Any

import numpy as np
import pandas as pd

from pipeline.claims.seeds import at_equal_l0

METRICS = {
    "equal.*": "equal.<a>_<b>.<measure>: a minus b in a measure of the graphs, mean over prompts, "
    "at the features that pruning keeps per token in b's graphs, for each k of b in the range of "
    "a's, a interpolated linearly in the logarithm; mean over these, one value a seed",
    "same_k.*": "same_k.<a>_<b>.<measure>: a minus b, mean over ks, one value a seed",
    "family.*": "family.<a>.<measure>: mean over prompts and ks, one value a seed",
    "finetuned.*": "finetuned.<family>.<objective>.<measure>: on held-out text and the graphs of "
    "prompts, after fine-tuning on an objective (none: before); mean over ks, one value a seed",
    "greater.difference": "p(digits above the first year's) - p(those below), mean over prompts",
    "greater.effect": "what of it is lost where the MLP that is taken apart is at its mean",
    "greater.*.lead": "greater.<family>.lead: share of that effect that the first n latents keep, "
    "less that of the first n neurons, mean over n from 1 to 23",
    "prompt.*": "prompt.<prompt>.<measure>: of the true model: answer_rank, p_answer; and "
    "prompt.<prompt>.<family>.<measure> of graphs, mean over ks and seeds",
    "graphs.balance_error_max": "largest balance_error of any graph",
}
PAIRS = (
    ("clt", "plt"), ("skip", "plt"), ("clt", "clt_random"), ("plt", "plt_random"),
    ("clt_random", "plt_random"), ("clt_untrained", "plt_untrained"),
)  # fmt: skip
GRAPH = ("replacement_score", "completeness_score", "kl_frozen", "faithfulness",
         "faithfulness_null", "pruned_l0")  # fmt: skip


def named(table: Any, column: str) -> pd.DataFrame:
    """A table with the family, k and seed that a dictionary's name says: clt_k8_seed0."""
    parts = table[column].str.extract(r"^(?P<family>\w+?)_k(?P<k>\d+)_seed(?P<seed>\d+)$")
    return table.assign(**parts.astype({"k": int, "seed": int}))


def by_dictionary(tables: dict[str, Any]) -> pd.DataFrame:
    """A row per dictionary: its graphs' means over prompts, next tokens, and reconstruction."""
    key, found = ["family", "k", "seed"], []
    for name, table in tables.items():
        stage, _, part = name.partition("/")
        if stage == "graphs" and part.endswith("_scores"):
            found.append(named(table, "dictionary").groupby(key)[list(GRAPH)].mean())
        elif stage == "graphs" and part.endswith("_replacement"):
            found.append(named(table, "dictionary").set_index(key)[["kl", "agreement"]])
        elif stage == "transcoders":
            whole = named(table[table["layer"] < 0], "sae").set_index(key)
            found.append(whole[["explained_variance", "l0", "dead_share"]])
    # one frame of each kind of table; arms lie below each other
    kinds: dict[tuple, list] = {}
    for frame in found:
        kinds.setdefault(tuple(frame.columns), []).append(frame)
    return pd.concat([pd.concat(same) for same in kinds.values()], axis=1).reset_index()


def equal(a: pd.DataFrame, b: pd.DataFrame) -> dict[str, float]:
    """Measures of graphs of a minus b where as many features are kept, of one seed."""
    a, b = (of.assign(l0=of["pruned_l0"]).dropna(subset=["l0"]) for of in (a, b))
    if a.empty or b.empty:
        return {}
    found = {measure: at_equal_l0(a, b, measure) for measure in GRAPH[:-1]}
    return {m: float(gaps.mean()) if len(gaps) else np.nan for m, gaps in found.items()}


def same_k(a: pd.DataFrame, b: pd.DataFrame) -> dict[str, float]:
    """Mean over ks of a minus b, of one seed."""
    columns = [c for c in a if c not in ("family", "k", "seed")]
    gap = a.set_index("k")[columns] - b.set_index("k")[columns]
    return gap.mean().dropna().to_dict()


def metrics(tables: dict[str, Any]) -> dict[str, Any]:
    """The numbers of METRICS."""
    out: dict[str, list[float]] = {}
    for _, rows in by_dictionary(tables).groupby("seed"):
        for name, value in of_seed(rows).items():
            out.setdefault(name, []).append(float(value))
    out |= finetuned(tables.get("finetuning/tuned"))
    out |= greater(tables.get("greater/effects"), tables.get("greater/kept"))
    out |= of_prompts(tables.get("graphs/trained_scores"))
    scores = [t["balance_error"].max() for n, t in tables.items() if n.endswith("_scores")]
    return out | ({"graphs.balance_error_max": float(max(scores))} if scores else {})


def finetuned(table: pd.DataFrame | None) -> dict[str, list[float]]:
    """Measures by family and objective, one value a seed."""
    if table is None:
        return {}
    table = named(table, "dictionary")
    measures = [c for c in table if c not in ("dictionary", "objective", "family", "k", "seed")]
    means = table.groupby(["family", "objective", "seed"])[measures].mean()
    return {
        f"finetuned.{family}.{objective}.{measure}": rows[measure].tolist()
        for (family, objective), rows in means.groupby(level=[0, 1])
        for measure in measures
    }


FEWER = 24  # latents below which neurons do worse, in Dunefsky et al.


def greater(effects: pd.DataFrame | None, kept: pd.DataFrame | None) -> dict[str, float]:
    """What MLPs do for greater-than, and the lead of latents over neurons by dictionary family."""
    if effects is None or kept is None:
        return {}
    by_layer = effects.set_index("layer")["difference"]
    out = {"greater.difference": by_layer[-1]}
    out["greater.effect"] = by_layer[-1] - by_layer[kept["layer"].iloc[0]]
    few = named(kept[kept["n"].between(1, FEWER - 1)], "dictionary")
    for family, rows in few.groupby("family"):
        mean = rows.groupby("units")["recovered"].mean()
        out[f"greater.{family}.lead"] = mean["latents"] - mean["neurons"]
    return out


def of_prompts(scores: pd.DataFrame | None) -> dict[str, float]:
    """Whether the model gives each prompt's answer, and how its graphs do."""
    if scores is None or "answer_rank" not in scores:
        return {}
    out, table = {}, named(scores, "dictionary")
    for prompt, rows in table.groupby("prompt"):
        for column in ("answer_rank", "p_answer"):
            out[f"prompt.{prompt}.{column}"] = float(rows[column].iloc[0])
        for family, some in rows.groupby("family"):
            for column in ("replacement_score", "faithfulness_logits", "faithfulness_logits_null"):
                out[f"prompt.{prompt}.{family}.{column}"] = float(some[column].mean())
    return out


def of_seed(table: pd.DataFrame) -> dict[str, float]:
    """The numbers of one seed, of its rows of `by_dictionary`."""
    family, out = dict(list(table.groupby("family"))), {}
    for name, rows in family.items():
        means = rows.drop(columns=["family", "k", "seed"]).mean().dropna()
        out |= {f"family.{name}.{m}": v for m, v in means.items()}
    for a, b in PAIRS:
        if a in family and b in family:
            for kind, of in (("equal", equal), ("same_k", same_k)):
                gaps = of(family[a], family[b])
                out |= {f"{kind}.{a}_{b}.{m}": v for m, v in gaps.items()}
    return out
