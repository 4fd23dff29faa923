"""Stage `heads`: what Elhage et al. 2021 and Olsson et al. 2022 measure of attention heads. [torch]

For every run of the section training, from its checkpoints:

1. training     loss by token index, on the first and second copy, and the in-context learning
                score: loss at early tokens minus loss at late ones, positive as in Argument 1 of
                Olsson et al. (their definition under Key Concepts has the other sign).
2. scores       prefix matching and previous-token attention of every head, at every checkpoint.
3. heads        the same at the first and last checkpoint, with copying and matching (signs of
                the OV and QK eigenvalues), how much of the key is the present token's, and what a
                head looks at instead (by_offset, by_lag);
   eigenvalues  the eigenvalues themselves, at the last checkpoint.
4. phase        when the score forms, and what forms first (phase.py).
5. composition  Q-, K- and V-composition of every pair of heads, beside random matrices.
6. ablation     losses without each head, without all induction heads, and without all others.
7. patterns     attention of the heads that matter on one repeated sequence.

held.py says what the models are measured on; attention.py runs them, circuits.py reads their
weights (both with pipeline/circuits/head_circuits.py), phase.py the curves.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch

from pipeline.circuits import head_circuits
from pipeline.job import cli, own

from . import attention, circuits, phase
from .held import Held, Options

TABLES = "training scores phase heads eigenvalues composition ablation patterns".split()

# --- through training ----------------------------------------------------------------------


def through_training(held: Held, done: Callable[[], None]) -> tuple[list[dict], list[dict]]:
    """Rows of the tables training and scores of one run; `done` is called after each model."""
    losses, scores, how = [], [], held.options.repeat
    for columns, model, _ in (found for step in held.run.steps for found in held.models(step)):
        parts, previous = [], []
        for x, y in attention.pieces(model, held.tokens, held.targets):
            logits, patterns = attention.forward(model, x.to(held.device))
            parts.append(attention.token_losses(logits, y.to(held.device)).cpu())
            seen = torch.stack([head_circuits.previous_token(p) for p in patterns])
            previous.append(len(x) * seen)
        found = torch.cat(parts).double().numpy()
        by_index = found.mean(0).astype(np.float32)
        losses.append(columns | held.summary(found) | {"by_index": by_index})
        previous_token = (sum(previous) / len(held.tokens)).tolist()
        for layer, pattern in enumerate(held.patterns(model)):
            matching = head_circuits.prefix_matching(pattern, how.length, how.times).tolist()
            for head, value in enumerate(matching):
                place = {"layer": layer, "head": head, "prefix_matching": value}
                scores.append(columns | place | {"previous_token": previous_token[layer][head]})
        done()
    return losses, scores


def phases(losses: pd.DataFrame, scores: pd.DataFrame, budget: dict[str, float]) -> list[dict]:
    """Rows of the table phase: one per model of the run, numbers of training tokens and nats, and
    the columns of Held.budget, which all share."""
    out = []
    for member, rows in losses.groupby("member", sort=False):
        tokens, icl = (rows[c].to_numpy(float) for c in ("tokens", "icl"))
        start, end, share = phase.doubling(tokens, icl)
        before, after = np.interp([start, end], tokens, icl)
        of = scores[scores["member"] == member]
        best = {
            "prefix_matching": of.groupby("step")["prefix_matching"].max(),
            "previous_token": of[of["layer"] == 0].groupby("step")["previous_token"].max(),
        }
        row = {"start": start, "end": end, "share": share}
        row |= {"icl_before": before, "icl_after": after}
        row["bump"] = phase.bump(tokens, rows["loss"].to_numpy(float), start, end)
        formed = {k: phase.halfway(tokens, v.to_numpy()) for k, v in best.items()}
        if best["prefix_matching"].iloc[-1] <= circuits.INDUCTION:
            formed["prefix_matching"] = np.nan
        if of["layer"].max() == 0:  # nothing is there that it could be needed for
            formed["previous_token"] = np.nan
        row |= {f"{k}_formed": value for k, value in formed.items()} | budget
        out.append({c: rows[c].iloc[0] for c in ("run", "member", "seed")} | row)
    return out


# --- at the end ----------------------------------------------------------------------------


def ablations(held: Held, columns: dict, rows: list[dict], model: Any) -> list[dict]:
    """Rows of the table ablation of one model: removed is a head, a group of heads, or nothing."""
    every = {(r["layer"], r["head"]): r["role"] for r in rows}
    groups: dict[str, list] = {"nothing": []}
    groups |= {f"head {layer}.{head}": [(layer, head)] for layer, head in every}
    induction = [h for h, role in every.items() if role == "induction"]
    if induction:
        groups |= {"induction heads": induction}
        groups |= {"all other heads": [h for h in every if h not in induction]}
    out = []
    for keep in (True, False):
        x, y = held.tokens.to(held.device), held.targets.to(held.device)
        losses = attention.ablated(model, x, y, groups, keep)
        for name, found in losses.items():
            one = groups[name][0] if name.startswith("head ") else (-1, -1)
            place = {"patterns": "kept" if keep else "free", "removed": name}
            place |= {"layer": one[0], "head": one[1], "role": every.get(one, "")}
            out.append(columns | place | held.summary(found.double().cpu().numpy()))
    return out


def drawn_patterns(held: Held, columns: dict, rows: list[dict], model: Any) -> list[dict]:
    """Rows of the table patterns: the heads of best scores on the first repeated sequence."""
    best = {"prefix matching": max(rows, key=lambda r: r["prefix_matching"])}
    if previous := [r for r in rows if r["role"] == "previous token"]:
        best["previous token"] = previous[0]
    found, out = held.patterns(model), []
    for shown, row in best.items():
        pattern = found[row["layer"]][0, row["head"]].cpu().numpy()
        place = {"shown": shown}
        place |= {k: row[k] for k in ("layer", "head", "prefix_matching", "previous_token")}
        place |= {"sequence": held.repeated[0].tolist(), "attention": pattern.ravel()}
        out.append(columns | place)
    return out


def at_the_end(held: Held, scores: pd.DataFrame, out: own.Tables) -> None:
    """Add the rows of the other tables of one run; those of heads also before training."""
    shape, how, (first, *_, last) = held.run.spec.architecture, held.options.repeat, held.run.steps
    for step in (first, last):
        for columns, model, state in held.models(step):
            scored = scores[(scores["member"] == columns["member"]) & (scores["step"] == step)]
            rows, eigenvalues = circuits.read_weights(shape, held.n_tokens, columns, scored, state)
            places = [head_circuits.by_place(p, how.length, how.times)
                      for p in held.patterns(model)]  # fmt: skip
            rows = [row | places[row["layer"]][row["head"]] for row in rows]
            out.add({"heads": rows})
            if step == first:
                continue
            out.add({"eigenvalues": eigenvalues, "ablation": ablations(held, columns, rows, model)})
            out.add({"patterns": drawn_patterns(held, columns, rows, model)})
            if shape.n_layers == 2:
                out.add({"composition": circuits.composed(shape, columns, state)})


def work(job: cli.Job, options: Options) -> own.Tables:
    device, out = job.device(), own.Tables(TABLES)
    runs = [Held(manifest, job.args.corpus, options, device) for manifest in job.args.runs]
    total = sum(len(h.run.steps) * len(h.run.members) for h in runs)
    progress = cli.Progress("heads", total, "models")
    with torch.inference_mode():
        for held in runs:
            losses, scores = through_training(held, progress.add)
            found = [pd.DataFrame(rows) for rows in (losses, scores)]
            out.add({"training": losses, "scores": scores, "phase": phases(*found, held.budget)})
            at_the_end(held, found[1], out)
    return out
