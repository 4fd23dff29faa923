"""Metrics of this paper, one value a seed; policies and `counts`, which are no models, have one."""

from typing import Any

METRICS = {
    "*.share.*.*": "share of mazes of a kind that are right in a task: exact, valid, target of "
    "rollouts; path_start, origin, first_choice, any_token, not_end, last_token, path_end",
    "*.probe.*.best": "accuracy of linear probes of connections at <PATH_START>, mean over "
    "connections, at the best layer behind the embeddings; by kind of mazes",
    "*.probe.*.embed": "the same at the embeddings",
    "*.probe.*.majority": "accuracy of each connection's more frequent answer",
    "*.probe.*.depth": "the best layer, as a share of all",
    "*.heads.semicolon": "share of the first layer's heads of which most attention from semicolons "
    "is on the two cells before them",
    "*.edit.*.*": "share of pairs in which an edit moves the model to the other maze's next cell, "
    "at the scale at which most move; edits activate and remove, directions mean, random, other",
    "*.edit.solved": "share of pairs of which it names both mazes' next cells unedited",
}


def of_tasks(rows: Any) -> dict[str, float]:
    """The metrics of one model's table tasks."""
    return {f"share.{r.kind}.{r.task}": float(r.share) for r in rows.itertuples()}


def of_probes(rows: Any) -> dict[str, float]:
    """The metrics of one model's table probes."""
    out = {}
    for kind, own in rows.groupby("kind"):
        own = own.sort_values("layer")
        best = own.loc[own[own["layer"] != 0]["accuracy"].idxmax()]
        depth, embed = best["layer"] / own["layer"].max(), own["accuracy"].iloc[0]
        named = {"best": best["accuracy"], "majority": best["majority"], "depth": depth}
        named["embed"] = embed
        out |= {f"probe.{kind}.{name}": float(value) for name, value in named.items()}
    return out


def of_heads(rows: Any) -> dict[str, float]:
    """The metric of one model's table heads."""
    early = rows[rows["layer"] == 0]
    return {"heads.semicolon": float((early["back_1"] + early["back_3"] > 0.5).mean())}


def of_edits(rows: Any) -> dict[str, float]:
    """The metrics of one model's table edits; NaN where it solves no pair."""
    best = rows.groupby(["edit", "direction"])["moved"].max()
    out = {f"edit.{edit}.{direction}": float(x) for (edit, direction), x in best.items()}
    return out | {"edit.solved": float(rows["solved"].iloc[0] / rows["n"].iloc[0])}


def metrics(tables: dict[str, Any]) -> dict[str, Any]:
    """'<arm>.<metric>' -> one value a seed."""
    out: dict[str, list[float]] = {}
    of = {"tasks": of_tasks, "probes": of_probes, "heads": of_heads, "edits": of_edits}
    for table, measure in of.items():
        for (arm, _), rows in tables[f"world/{table}"].groupby(["arm", "seed"]):
            for name, value in measure(rows).items():
                out.setdefault(f"{arm}.{name}", []).append(value)
    return out
