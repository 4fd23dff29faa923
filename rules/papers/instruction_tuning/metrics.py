"""Metrics of this paper, one value a seed; arms are base, sft, sft_shuffled and runs of DPO."""

from typing import Any

METRICS = {
    "*.*.letter": "share of held-out words of which the likeliest letter is the one asked for; by "
    "kind of prompt: seen, reworded, mistyped; of broken: of those that are answered, where mark "
    "and goal differ",
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


def last(rows: Any, by: str, start: str, names: str) -> dict[str, float]:
    """Values of the last row."""
    row = rows.loc[rows[by].idxmax()]
    return {f"{start}.{n}": float(row[n]) for n in names.split()}


def of_answers(rows: Any) -> dict[str, float]:
    return {f"{r.kind}.{r.measure}": float(r.share) for r in rows.itertuples()}


def of_calibration(rows: Any) -> dict[str, float]:
    out = {}
    for r in rows.itertuples():
        out[f"{r.kind}.{'adaptive_' * r.adaptive}ece"] = float(r.ece)
        if not r.adaptive:
            out[f"{r.kind}.ece_floor"] = float(r.floor)
    return out


def of_broken(rows: Any) -> dict[str, float]:
    return {f"broken.{r.followed}": float(r.share) for r in rows.itertuples()}


def of_steps(rows: Any) -> dict[str, float]:
    return last(rows, "step", "preference", "loss chosen rejected margin accuracy")


def of_probes(rows: Any) -> dict[str, float]:
    out = {}
    tables = {label: own.set_index("layer") for label, own in rows.groupby("label")}
    for label, own in tables.items():
        out |= {f"probe.{label}.best": float(own["share"].max()),
                f"probe.{label}.last": float(own["share"][own.index.max()]),
                f"probe.{label}.majority": float(own["majority"].iloc[0])}  # fmt: skip
    best = tables["goal"]["share"].idxmax()
    both = (float(tables[label]["share"][best]) for label in ("goal", "control"))
    return out | {"probe.selectivity": next(both) - next(both)}


def of_changes(rows: Any) -> dict[str, float]:
    names = ("size", "top", "rank", "random_top", "random_rank")
    return {f"change.{n}": float(rows[n].mean()) for n in names}


def of_moved(rows: Any) -> dict[str, float]:
    return last(rows, "layer", "moved", "shift separation separation_before same along")


def of_steering(rows: Any) -> dict[str, float]:
    out = {}
    for direction, own in rows.groupby("direction"):
        at, goal = own["coefficient"], own["group"] == "goal"
        taken = goal & ((at < 0) | (own["mode"] == "ablate"))
        plain = goal & (at == 0) & (own["mode"] == "add")
        obeys, refuses = own["obeys"], own.loc[~goal & (at > 0), "share"].max()
        values = {"plain": obeys[plain].mean(), "obeys": obeys[taken].max(), "refuses": refuses}
        out |= {f"steer.{direction}.{name}": float(value) for name, value in values.items()}
    return out


def metrics(tables: dict[str, Any]) -> dict[str, Any]:
    """'<arm>.<metric>' -> one value a seed."""
    out: dict[str, list[float]] = {}
    of = {
        "tuning": (of_answers, of_calibration, of_broken, of_steps),
        "inside": (of_probes, of_changes, of_moved, of_steering),
    }
    for stage, measures in of.items():
        for measure in measures:
            table = tables[f"{stage}/{measure.__name__.removeprefix('of_')}"]
            for (arm, _), rows in table.groupby(["arm", "seed"], sort=False):
                for name, value in measure(rows).items():
                    out.setdefault(f"{arm}.{name}", []).append(value)
    return out
