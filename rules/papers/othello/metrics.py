"""Metrics of this paper, one value a seed; `moves`, the set of squares played, has one value."""

from typing import Any

import numpy as np

METRICS = {
    "*.illegal": "share of plies whose likeliest next square is illegal",
    "*.illegal_mass": "mean probability on illegal squares",
    "*.uniform": "share of illegal squares among the empty ones, mean over plies",
    "*.worst_ply": "the ply of which the likeliest square is illegal most often",
    "*.worst": "that share",
    "*.first_error": "the first ply of which one is illegal; a ply more than there are if none is",
    "*.probe.*.best": "accuracy of a linear probe, mean over squares and plies, at the best layer; "
    "bases: mine (empty, mine, theirs), colour (empty, black, white), colour_parity (the same, one "
    "probe for even and one for odd plies), is_empty, is_mine, is_theirs (of such squares), "
    "mine_taken, colour_taken (of squares that are not empty)",
    "*.probe.*.embed": "the same at the embeddings",
    "*.probe.*.gain": "best minus that at the embeddings",
    "*.flip.*.wrong": "share of squares whose legality a flipped square changes that are named "
    "wrongly, mean over plies, at the scale of which it is least; directions: none, probe, random, "
    "other_square",
    "*.flip.means.*": "the same along the difference of the means of theirs and mine",
    "*.flip.*.error": "mean number of wrong squares, missing and superfluous, at that scale",
    "*.flip.*.wrong_unchanged": "of these, squares whose legality the flip does not change",
}
FLIPS = ("wrong", "error", "wrong_unchanged")


def of_moves(rows: Any) -> dict[str, float]:
    """The metrics of one model's table moves."""
    out = {name: float(rows[name].mean()) for name in ("illegal", "illegal_mass", "uniform")}
    worst = rows.loc[rows["illegal"].idxmax()]
    some = rows.loc[rows["illegal"] > 0, "ply"]
    out |= {"worst_ply": float(worst["ply"]), "worst": float(worst["illegal"])}
    return out | {"first_error": float(some.min() if len(some) else rows["ply"].max() + 1)}


def of_probes(rows: Any) -> dict[str, float]:
    """The metrics of one model's table probes."""
    out = {}
    for basis, own in rows.groupby("basis"):
        by_layer = own.sort_values("layer")["accuracy"].to_numpy()
        best, first = float(by_layer.max()), float(by_layer[0])
        named = {"best": best, "embed": first, "gain": best - first}
        out |= {f"probe.{basis}.{name}": value for name, value in named.items()}
    return out


def of_flips(rows: Any) -> dict[str, float]:
    """The metrics of one model's table flips."""
    out = {}
    for direction, own in rows.groupby("direction"):
        at = {scale: {m: float(np.average(r[m], weights=r["n"])) for m in FLIPS}
              for scale, r in own.groupby("scale")}  # fmt: skip
        best = min(at.values(), key=lambda found: found["wrong"])
        out |= {f"flip.{direction}.{m}": value for m, value in best.items()}
    return out


def metrics(tables: dict[str, Any]) -> dict[str, Any]:
    """'<arm>.<metric>' -> one value a seed."""
    out: dict[str, list[float]] = {}
    of = {"moves": of_moves, "probes": of_probes, "flips": of_flips}
    for table, measure in of.items():
        for (arm, _), rows in tables[f"world/{table}"].groupby(["arm", "seed"]):
            for name, value in measure(rows).items():
                out.setdefault(f"{arm}.{name}", []).append(value)
    return out
