"""Metrics of indirect object identification: what they mean, and how the tables give them.

Names begin with an arm: smollm2, random (as training begins), gpt2 (only with --config hub=true).
`found` is the circuit that path patching finds in the arm, `published` that of the paper. Every
metric has one value a seed, NaN where the seed has none: no head of the class was found, or a share
of a logit difference that is not above zero.
"""

from typing import Any

import numpy as np

from pipeline.claims.seeds import by_seed, defined
from pipeline.latents.fidelity import share

METRICS = {  # the first pattern that fits a name counts: those of more parts stand first
    "random.logit_diff": "mean logit of IO minus logit of S at the last position, of the model as "
    "training begins (null arm)",
    "random.io_gt_s": "share of prompts with a larger logit of IO than of S, of the same",
    "*.demo.logit_diff": "logit difference on the eight prompts of TransformerLens's demo",
    "*.flipped.logit_diff": "the same with the subject's second mention replaced by the indirect "
    "object, measured for the old answer",
    "*.trailing.io_gt_s": "share of prompts with a space behind them on which IO > S",
    "*.abc.logit_diff": "logit difference on p_ABC, prompts of three other names",
    "*.n.*": "number of heads of a class, by discovery.py",
    "*.look.*": "mean attention of a class of heads (0: has none), over prompts: name movers from "
    "END to IO (io), S-inhibition heads from END to S2 (s2), duplicate-token heads from S2 to S1, "
    "induction heads from S2 to S1+1, previous-token heads from S1+1 to S1",
    "*.copies.*": "copy score: share of names that a head would copy, mean over the class "
    "(all: all heads)",
    "*.suppresses.*": "the same with the sign of the OV circuit turned",
    "*.strongest.*": "largest effect of a head of the class by path patching to the logits, over "
    "the logit difference",
    "*.rho": "least correlation, over name movers, of attention to a name and the logit of that "
    "name that the head writes; over prompts and both names",
    "*.published_movers": "how many of the paper's name movers 9.9, 9.6, 10.0 are among ours",
    "*.published_negative": "how many of 10.7 and 11.10 are among our negative name movers",
    "*.movers_direct": "what the name movers lose by path patching to the logits, over the logit "
    "difference",
    "*.recovered": "1 - |F(M) - F(C)| / F(M), F the mean logit difference with all heads outside a "
    "circuit mean-ablated; random: mean over random circuits of the same layers and positions",
    "*.incompleteness": "largest |F(M without K) - F(C without K)| over classes and random sets K, "
    "over F(M)",
    "*.searched": "the same for the set K of the greedy search, in logits",
    "*.movers_knocked_out": "share of F(M) that is lost without the name movers",
    "*.minimality": "least over heads v of the circuit of |F(C without K) - F(C without K and v)| "
    "/ F(M), the largest over the sets K that stand for v (judged.py, after the paper's App. K); "
    "as every share of a logit difference, undefined where that is not above zero",
    "*.minimality_of_class": "the same with the rest of the class of v for K",
    "*.logit_diff": "mean logit of IO minus logit of S at the last position",
    "*.io_gt_s": "share of prompts with a larger logit of IO than of S",
    "*.io_probability": "mean probability of IO",
}
BEHAVIOUR = {  # metric -> the prompts that it is of
    **dict.fromkeys(("logit_diff", "io_gt_s", "io_probability"), "all"),
    "abc.logit_diff": "p_ABC",
    "trailing.io_gt_s": "trailing space",
    "demo.logit_diff": "demo",
    "flipped.logit_diff": "demo, flipped",
}
LOOK = {"name_mover": ("io", "end_to_io"), "s_inhibition": ("s2", "end_to_s2"),
        "duplicate": ("s1", "s2_to_s1"), "induction": ("s1_next", "s2_to_s1_next"),
        "previous": ("previous", "s1_next_to_s1")}  # fmt: skip
ROLES = tuple(dict.fromkeys(("name_mover", "suppressor", "writer", "negative", "backup", *LOOK)))
MOVERS, NEGATIVE = {(9, 9), (9, 6), (10, 0)}, {(10, 7), (11, 10)}
TABLES = ("behaviour", "heads", "scatter", "cases", "minimality")


def behaviour(table: Any) -> dict[str, float]:
    """What one arm does on each kind of prompts."""
    rows = table.set_index("prompts")
    there = {metric: row for metric, row in BEHAVIOUR.items() if row in rows.index}
    return {metric: rows.loc[row, metric.split(".")[-1]] for metric, row in there.items()}


def heads(table: Any, scatter: Any, logit_diff: float) -> dict[str, float]:
    """What the classes of heads of one arm are like."""
    part = {role: table[table["role"] == role] for role in ROLES}
    placed = {r: set(zip(rows["layer"], rows["head"], strict=True)) for r, rows in part.items()}
    strongest = {r: share(f["direct"].abs().max(), logit_diff) for r, f in part.items()}

    def mean(role: str, column: str) -> float:
        return part[role][column].mean() if len(part[role]) else 0.0

    out = {f"n.{role}": float(len(rows)) for role, rows in part.items()}
    out |= {f"look.{name}": mean(role, column) for role, (name, column) in LOOK.items()}
    out |= {"copies.name_mover": mean("name_mover", "copies")}
    for role in ("negative", "suppressor"):
        out[f"suppresses.{role}"] = mean(role, "suppresses")
        out[f"strongest.{role}"] = strongest[role]
    out["strongest.name_mover"] = strongest["name_mover"]
    out |= {f"{c}.all": table[c].mean() for c in ("copies", "suppresses")}
    out["published_movers"] = float(len(placed["name_mover"] & MOVERS))
    out["published_negative"] = float(len(placed["negative"] & NEGATIVE))
    out["movers_direct"] = share(-part["name_mover"]["direct"].sum(), logit_diff)
    rho = [
        rows["attention"].corr(rows["logit"])
        for head, rows in scatter.groupby(["layer", "head"])
        if head in placed["name_mover"]
    ]
    return out | {"rho": min(rho, default=np.nan)}


def circuits(cases: Any, minimality: Any) -> dict[str, float]:
    """How faithful, complete and minimal one circuit of one arm is."""
    plain = cases[cases["removed"] == "nothing"].set_index("circuit")
    sets = cases[cases["removed"] != "nothing"]
    sets = sets.pivot(index="removed", columns="circuit", values="f")
    f, whole, searched = plain["f"], plain.loc["model", "f"], sets.index.str.startswith("greedy")

    def recovered(value: float) -> float:
        return 1 - share(abs(whole - value), whole)

    def widest(some: Any, circuit: str) -> float:
        return (some["model"] - some[circuit]).abs().max() if circuit in some else np.nan

    out = {"recovered": recovered(f["circuit"]), "naive.recovered": recovered(f["naive"])}
    at_random = f[f.index.str.startswith("random")]
    out |= {"random.recovered": np.mean([recovered(value) for value in at_random])}
    out |= {"incompleteness": share(widest(sets[~searched], "circuit"), whole)}
    out |= {"naive.incompleteness": share(widest(sets[~searched], "naive"), whole)}
    out |= {"searched": widest(sets[searched], "circuit")}
    if "name_mover" in sets.index:
        out["movers_knocked_out"] = 1 - share(sets.loc["name_mover", "model"], whole)
    if len(minimality):
        base = whole if whole > 0 else np.nan
        change = (minimality["with"] - minimality["without"]).abs() / base
        of_class = minimality["set"] == "class"
        by_head = change[~of_class].groupby([minimality[h] for h in ("layer", "head")]).max()
        out |= {"minimality": by_head.min(), "minimality_of_class": change[of_class].min()}
    return out


def of_seed(tables: dict[str, Any]) -> dict[str, float]:
    """Every metric of all arms at one seed, out of the tables' rows of that seed."""
    out: dict[str, float] = {}
    for arm in sorted(set(tables["behaviour"]["arm"])):
        here = {name: table[table["arm"] == arm] for name, table in tables.items()}
        found = behaviour(here["behaviour"])
        if len(here["heads"]):
            logit_diff = float(found["logit_diff"])
            found |= heads(here["heads"], here["scatter"], logit_diff)
        for source, cases in here["cases"].groupby("source"):
            small = here["minimality"]
            worth = circuits(cases, small[small["source"] == source])
            found |= {f"{source}.{k}": v for k, v in worth.items()}
        out |= {f"{arm}.{k}": float(v) for k, v in found.items()}
    return out


def metrics(tables: dict[str, Any]) -> dict[str, list[float]]:
    """See METRICS; one value per seed. What no seed has is left out."""
    return defined(by_seed({name: tables[f"circuit/{name}"] for name in TABLES}, of_seed))
