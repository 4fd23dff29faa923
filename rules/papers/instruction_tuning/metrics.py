"""Metrics of this paper, one value a seed; arms are base, sft, sft_shuffled and runs of DPO."""

from typing import Any

METRICS = {
    "*.*.letter": "share of held-out words of which the likeliest letter is the one asked for; by "
    "kind of prompt: seen, reworded, mistyped; of broken: of those answered, where mark and goal "
    "differ",
    "*.*.answered": "the same of those that are answered",
    "*.*.policy": "share of prompts behind which the likeliest character is what the goal asks for",
    "*.*.refused": "share of words with a vowel first that are refused: a refusal is likelier than "
    "all letters together",
    "*.*.refused_others": "the same of words with another letter first",
    "*.*.ece": "expected calibration error of letters, ten bins of equal width",
    "*.*.adaptive_ece": "the same, ten bins of equally many answers",
    "*.*.ece_floor": "mean of ece where each answer is right with just the probability it has",
    "*.broken.goal": "share of prompts whose mark contradicts the goal on which the goal is done",
    "*.broken.cue": "share of these on which the mark is followed",
    "*.preference.*": "means over the pairs of the last step of DPO: loss, chosen and rejected "
    "(implicit rewards, nats), margin (their difference), accuracy (share with a margin above 0)",
    "*.probe.*.best": "accuracy of linear probes at the last character of the prompt, at the best "
    "layer; labels goal, cue, choice (what this model does), control (a coin for each word)",
    "*.probe.*.last": "the same behind the last layer",
    "*.probe.*.majority": "accuracy of the more frequent label",
    "*.probe.selectivity": "accuracy on the goal minus that on the control, where it is read best",
    "*.change.*": "of matrices' changes, mean over those of the layers: size (over the norm), top "
    "(share of the squared norm in the first singular direction), rank (participation ratio of the "
    "squared singular values); random_top and random_rank of random matrices",
    "*.moved.*": "behind the last layer, in mean distances to the mean: shift of the mean, "
    "separation by goal, separation_before; same, along: cosines (stage inside)",
    "*.steer.*.plain": "share of prompts to refuse that get the right letter, nothing written",
    "*.steer.*.obeys": "the largest such share of all edits that take the direction out",
    "*.steer.*.refuses": "the largest share of other prompts that are refused where it is added",
}
LAST = {  # stage/table -> (what it is ordered by, what its metrics begin with, columns)
    "tuning/steps": ("step", "preference", "loss chosen rejected margin accuracy"),
    "inside/moved": ("layer", "moved", "shift separation separation_before same along"),
}


def of_shares(rows: Any) -> dict[str, float]:
    """Of the tables answers and broken."""
    if "followed" in rows:
        return {f"broken.{r.followed}": r.share for r in rows.itertuples()}
    return {f"{r.kind}.{r.measure}": r.share for r in rows.itertuples()}


def of_calibration(rows: Any) -> dict[str, float]:
    out = {f"{r.kind}.{'adaptive_' * r.adaptive}ece": r.ece for r in rows.itertuples()}
    return out | {f"{r.kind}.ece_floor": r.floor for r in rows.itertuples() if not r.adaptive}


def of_probes(rows: Any) -> dict[str, float]:
    out = {}
    read = {label: own.set_index("layer")["share"] for label, own in rows.groupby("label")}
    for label, own in read.items():
        often = rows.loc[rows["label"] == label, "majority"].iloc[0]
        values = {"best": own.max(), "last": own[own.index.max()], "majority": often}
        out |= {f"probe.{label}.{name}": value for name, value in values.items()}
    best = read["goal"].idxmax()
    return out | {"probe.selectivity": read["goal"][best] - read["control"][best]}


def of_changes(rows: Any) -> dict[str, float]:
    names = ("size", "top", "rank", "random_top", "random_rank")
    return {f"change.{n}": rows[n].mean() for n in names}


def of_steering(rows: Any) -> dict[str, float]:
    out = {}
    for direction, own in rows.groupby("direction"):
        at, goal, obeys = own["coefficient"], own["group"] == "goal", own["obeys"]
        taken = goal & ((at < 0) | (own["mode"] == "ablate"))
        plain = goal & (at == 0) & (own["mode"] == "add")
        refuses = own.loc[~goal & (at > 0), "share"].max()
        values = {"plain": obeys[plain].mean(), "obeys": obeys[taken].max(), "refuses": refuses}
        out |= {f"steer.{direction}.{name}": value for name, value in values.items()}
    return out


def of_last(rows: Any, by: str, start: str, names: str) -> dict[str, float]:
    """Values of the last step or layer."""
    row = rows.loc[rows[by].idxmax()]
    return {f"{start}.{n}": row[n] for n in names.split()}


def metrics(tables: dict[str, Any]) -> dict[str, Any]:
    """'<arm>.<metric>' -> one value a seed."""
    out: dict[str, list[float]] = {}
    of = {"tuning/answers": of_shares, "tuning/broken": of_shares, "inside/probes": of_probes,
          "tuning/calibration": of_calibration, "inside/changes": of_changes,
          "inside/steering": of_steering} | dict.fromkeys(LAST, of_last)  # fmt: skip
    for table, measure in of.items():
        for (arm, _), rows in tables[table].groupby(["arm", "seed"], sort=False):
            for name, value in measure(rows, *LAST.get(table, ())).items():
                out.setdefault(f"{arm}.{name}", []).append(float(value))
    return out
