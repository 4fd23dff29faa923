"""Metrics of indirect object identification: what they mean, and how the tables give them.

Names begin with an arm: smollm2, random (as training begins), gpt2 (only with --config hub=true).
`found` is the circuit that path patching finds in the arm, `published` that of the paper. Every
metric has one value a seed, NaN where the seed has none: no head of the class was found, or a share
of a logit difference that is not above zero.
"""

from typing import Any

import numpy as np

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
    "*.gap": "|F(M) - F(C)|, logits",
    "*.incompleteness": "largest |F(M without K) - F(C without K)| over classes and random sets K, "
    "over F(M)",
    "*.searched": "the same for the set K of the greedy search, in logits",
    "*.movers_knocked_out": "share of F(M) that is lost without the name movers",
    "*.minimality": "least over heads v of the circuit of |F(C without K) - F(C without K and v)| "
    "/ F(M), the largest over the sets K that stand for v (judged.py, after the paper's App. K); "
    "as every share of a logit difference, undefined where that is not above zero",
    "*.minimality_of_class": "the same with the rest of the class of v for K",
    "*.circuit_heads": "heads of the circuit",
    "*.logit_diff": "mean logit of IO minus logit of S at the last position",
    "*.io_gt_s": "share of prompts with a larger logit of IO than of S",
    "*.io_probability": "mean probability of IO",
}
LOOK = {"name_mover": ("io", "end_to_io"), "s_inhibition": ("s2", "end_to_s2"),
        "duplicate": ("s1", "s2_to_s1"), "induction": ("s1_next", "s2_to_s1_next"),
        "previous": ("previous", "s1_next_to_s1")}  # fmt: skip
MOVERS, NEGATIVE = {(9, 9), (9, 6), (10, 0)}, {(10, 7), (11, 10)}


def behaviour(table: Any) -> dict[str, float]:
    """Of one arm."""
    rows = table.set_index("prompts")
    out = {k: rows.loc["all", k] for k in ("logit_diff", "io_gt_s", "io_probability")}
    more = {"abc.logit_diff": "p_ABC", "trailing.io_gt_s": "trailing space",
            "demo.logit_diff": "demo", "flipped.logit_diff": "demo, flipped"}  # fmt: skip
    there = {m: row for m, row in more.items() if row in rows.index}
    return out | {m: rows.loc[row, m.split(".")[1]] for m, row in there.items()}


def heads(table: Any, scatter: Any, logit_diff: float) -> dict[str, float]:
    """Of one arm."""
    of = dict(iter(table.groupby("role")))
    empty = table.iloc[:0]
    part = lambda role: of.get(role, empty)  # noqa: E731
    roles = ("name_mover", "suppressor", "writer", "negative", "backup", *LOOK)
    out = {f"n.{role}": float(len(part(role))) for role in dict.fromkeys(roles)}
    mean = lambda role, column: part(role)[column].mean() if len(part(role)) else 0.0  # noqa: E731
    out |= {f"look.{name}": mean(role, column) for role, (name, column) in LOOK.items()}
    out |= {"copies.name_mover": mean("name_mover", "copies")}
    for role in ("negative", "suppressor"):
        out[f"suppresses.{role}"] = mean(role, "suppresses")
        out[f"strongest.{role}"] = share(part(role)["direct"].abs().max(), logit_diff)
    out["strongest.name_mover"] = share(part("name_mover")["direct"].abs().max(), logit_diff)
    out |= {f"{c}.all": table[c].mean() for c in ("copies", "suppresses")}
    placed = lambda role: set(zip(part(role)["layer"], part(role)["head"], strict=True))  # noqa: E731
    out["published_movers"] = float(len(placed("name_mover") & MOVERS))
    out["published_negative"] = float(len(placed("negative") & NEGATIVE))
    out["movers_direct"] = share(-part("name_mover")["direct"].sum(), logit_diff)
    rho = [
        rows["attention"].corr(rows["logit"])
        for head, rows in scatter.groupby(["layer", "head"])
        if head in placed("name_mover")
    ]
    return out | {"rho": min(rho, default=np.nan)}


def circuits(cases: Any, minimality: Any) -> dict[str, float]:
    """Of one circuit of one arm."""
    plain = cases[cases["removed"] == "nothing"].set_index("circuit")
    f, whole = plain["f"], plain.loc["model", "f"]
    recovered = lambda value: 1 - share(abs(whole - value), whole)  # noqa: E731
    at_random = f[[name for name in f.index if name.startswith("random")]]
    out = {"recovered": recovered(f["circuit"]), "gap": abs(whole - f["circuit"])}
    out |= {"circuit_heads": plain.loc["circuit", "n_heads"]}
    out |= {"naive.recovered": recovered(f["naive"])}
    out |= {"random.recovered": np.mean([recovered(value) for value in at_random])}
    sets = cases[cases["removed"] != "nothing"].pivot(
        index="removed", columns="circuit", values="f"
    )
    searched = sets[sets.index.str.startswith("greedy")]
    fixed = sets.drop(searched.index)
    widest = lambda t, c: (t["model"] - t[c]).abs().max() if c in t else np.nan  # noqa: E731
    out |= {"incompleteness": share(widest(fixed, "circuit"), whole)}
    out |= {"naive.incompleteness": share(widest(fixed, "naive"), whole)}
    out |= {"searched": widest(searched, "circuit")}
    if "name_mover" in fixed.index:
        out["movers_knocked_out"] = 1 - share(fixed.loc["name_mover", "model"], whole)
    if len(minimality):
        base = whole if whole > 0 else np.nan
        change = (minimality["with"] - minimality["without"]).abs() / base
        plain, heads = minimality["set"] == "class", ["layer", "head"]
        by_head = change[~plain].groupby([minimality[h] for h in heads]).max()
        out |= {"minimality": by_head.min(), "minimality_of_class": change[plain].min()}
    return out


def of_seed(part: dict[str, Any], judged: dict[str, Any]) -> dict[str, float]:
    """Every metric that the arms have at one seed.

    Args:
        part, judged: name -> the rows of a table at that seed.
    """
    out: dict[str, float] = {}
    for arm, rows in part["behaviour"].groupby("arm"):
        found = behaviour(rows)
        own = part["heads"][part["heads"]["arm"] == arm]
        if len(own):
            scatter = part["scatter"][part["scatter"]["arm"] == arm]
            found |= heads(own, scatter, found["logit_diff"])
        cases = judged["cases"][judged["cases"]["arm"] == arm]
        for source, some in cases.groupby("source"):
            small = judged["minimality"]
            small = small[(small["arm"] == arm) & (small["source"] == source)]
            found |= {f"{source}.{k}": v for k, v in circuits(some, small).items()}
        out |= {f"{arm}.{k}": float(v) for k, v in found.items()}
    return out


def metrics(tables: dict[str, Any]) -> dict[str, list[float]]:
    """See METRICS; one value a seed. What no seed has is left out."""
    parts, judged = ("behaviour", "heads", "scatter"), ("cases", "minimality")
    given = {name: tables[f"circuit/{name}"] for name in (*parts, *judged)}
    found = []
    for seed in given["behaviour"]["seed"].unique():
        here = {name: frame[frame["seed"] == seed] for name, frame in given.items()}
        found.append(of_seed({n: here[n] for n in parts}, {n: here[n] for n in judged}))
    names = dict.fromkeys(name for one in found for name in one)
    every = {name: [one.get(name, np.nan) for one in found] for name in names}
    return {name: values for name, values in every.items() if np.isfinite(values).any()}
