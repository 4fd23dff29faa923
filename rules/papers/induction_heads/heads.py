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
weights, phase.py the curves.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.job import cli
from pipeline.job.source import import_file
from pipeline.store import tables

HERE = Path(__file__).parent
circuits = import_file(HERE / "circuits.py")
phase = import_file(HERE / "phase.py")
runs_and_data = import_file(HERE / "held.py")
Held, Options = runs_and_data.Held, runs_and_data.Options
TABLES = "training scores phase heads eigenvalues composition ablation patterns".split()
INDUCTION = 0.5  # prefix matching of an induction head

# --- through training ----------------------------------------------------------------------


def through_training(held: Held, told: Callable[[], None]) -> tuple[list[dict], list[dict]]:
    """Rows of the tables training and scores of one run; `told` is called after each model."""
    import torch

    losses, scores = [], []
    how, run = held.options.repeat, held.attention
    for step in held.run.steps:
        for columns, model, _ in held.models(step):
            parts, previous = [], []
            for x, y in run.pieces(model, held.tokens, held.targets):
                logits, patterns = run.forward(model, x.to(held.device))
                parts.append(run.token_losses(logits, y.to(held.device)).cpu())
                previous.append(len(x) * torch.stack([run.previous_token(p) for p in patterns]))
            found = torch.cat(parts).double().numpy()
            by_index = found.mean(0).astype(np.float32)
            losses.append(columns | held.summary(found) | {"by_index": by_index})
            previous_token = (sum(previous) / len(held.tokens)).tolist()
            for layer, pattern in enumerate(held.patterns(model)):
                matching = run.prefix_matching(pattern, how.length, how.times).tolist()
                for head, value in enumerate(matching):
                    place = {"layer": layer, "head": head, "prefix_matching": value}
                    place["previous_token"] = previous_token[layer][head]
                    scores.append(columns | place)
            told()
    return losses, scores


def phases(losses: pd.DataFrame, scores: pd.DataFrame, budget: dict[str, float]) -> list[dict]:
    """Rows of the table phase: one a model of the run, numbers of training tokens and nats.

    Args:
        budget: columns that all of them share, see Held.
    """
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
        row |= {"bump": phase.bump(tokens, rows["loss"].to_numpy(float), start, end)}
        formed = {k: phase.halfway(tokens, v.to_numpy()) for k, v in best.items()}
        if best["prefix_matching"].iloc[-1] <= INDUCTION:
            formed["prefix_matching"] = np.nan
        if of["layer"].max() == 0:  # nothing is there that it could be needed for
            formed["previous_token"] = np.nan
        row |= {f"{k}_formed": value for k, value in formed.items()}
        row |= budget
        out.append({c: rows[c].iloc[0] for c in ("run", "member", "seed")} | row)
    return out


# --- at the end ----------------------------------------------------------------------------


def previous_head(rows: pd.DataFrame) -> int | None:
    """The head of the first layer that attends most to the token before, where there are others."""
    if rows["layer"].max() == 0:
        return None
    first = rows[rows["layer"] == 0]
    return int(first.loc[first["previous_token"].idxmax(), "head"])


def read_weights(
    held: Held, columns: dict, rows: pd.DataFrame, state: dict[str, np.ndarray]
) -> tuple[list[dict], list[dict]]:
    """Rows of the tables heads and eigenvalues of one model.

    Args:
        rows: its rows of the table scores.
    """
    shape = held.run.spec.architecture
    W_E, W_U = circuits.embeddings(state, held.n_tokens)
    made = circuits.heads(state, shape.n_layers, shape.n_heads)
    previous = previous_head(rows)
    out, values = [], []
    for row in rows.itertuples():
        head = made[row.layer][row.head]
        earlier = made[0][previous] if row.layer and previous is not None else None
        found = {
            "OV": circuits.ov_eigenvalues(head, W_E, W_U),
            "QK": circuits.qk_eigenvalues(head, W_E, earlier),
        }
        place = columns | {"layer": row.layer, "head": row.head}
        smear = state.get(f"model.layers.{row.layer}.attn.k.smear")
        own_key = np.nan if smear is None else float(1 / (1 + np.exp(-smear[row.head])))
        scores = {"prefix_matching": row.prefix_matching, "previous_token": row.previous_token}
        signs = {"copying": "OV", "matching": "QK"}
        scores |= {name: circuits.positivity(found[c]) for name, c in signs.items()}
        role = "previous token" if row.layer == 0 and row.head == previous else "other"
        role = "induction" if row.prefix_matching > INDUCTION else role
        out.append(place | scores | {"own_key": own_key, "role": role})
        for circuit, eigenvalues in found.items():
            for i, value in enumerate(eigenvalues):
                number = {"circuit": circuit, "index": i, "real": value.real, "imag": value.imag}
                values.append(place | number)
    return out, values


def composed(held: Held, columns: dict, state: dict[str, np.ndarray]) -> list[dict]:
    """Rows of the table composition of one model of two layers."""
    shape = held.run.spec.architecture
    made = circuits.heads(state, shape.n_layers, shape.n_heads)
    random = circuits.baseline(shape.d_model, shape.head_size, np.random.default_rng(0))
    out = []
    for i, earlier in enumerate(made[0]):
        for j, later in enumerate(made[1]):
            for kind, score in circuits.composition(earlier, later).items():
                mean, sd = random[kind]
                place = {"kind": kind, "earlier": i, "later": j, "score": score}
                out.append(columns | place | {"baseline": mean, "baseline_sd": sd})
    return out


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
        losses = held.attention.ablated(model, x, y, groups, keep)
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
        place = {"shown": shown, "layer": row["layer"], "head": row["head"]}
        place |= {k: row[k] for k in ("prefix_matching", "previous_token")}
        tokens = held.repeated[0].tolist()
        out.append(columns | place | {"sequence": tokens, "attention": pattern.ravel()})
    return out


def at_the_end(held: Held, scores: pd.DataFrame) -> dict[str, list[dict]]:
    """Rows of the other tables of one run; heads also before training."""
    made: dict[str, list[dict]] = {t: [] for t in TABLES[3:]}
    for step in (held.run.steps[0], held.run.steps[-1]):
        for columns, model, state in held.models(step):
            own = (scores["member"] == columns["member"]) & (scores["step"] == step)
            rows, eigenvalues = read_weights(held, columns, scores[own], state)
            places = held.places(model)
            rows = [row | places[row["layer"]][row["head"]] for row in rows]
            made["heads"] += rows
            if step == held.run.steps[0]:
                continue
            made["eigenvalues"] += eigenvalues
            if held.run.spec.architecture.n_layers == 2:
                made["composition"] += composed(held, columns, state)
            made["ablation"] += ablations(held, columns, rows, model)
            made["patterns"] += drawn_patterns(held, columns, rows, model)
    return made


def measure(runs: list[Held]) -> dict[str, pd.DataFrame]:
    """All tables of all runs."""
    made: dict[str, list[dict]] = {t: [] for t in TABLES}
    total = sum(len(h.run.steps) * len(h.run.members) for h in runs)
    progress, done = cli.Progress("heads", total, "models"), itertools.count(1)
    for held in runs:
        losses, scores = through_training(held, lambda: progress.at(next(done)))
        made["training"] += losses
        made["scores"] += scores
        made["phase"] += phases(pd.DataFrame(losses), pd.DataFrame(scores), held.budget)
        for name, rows in at_the_end(held, pd.DataFrame(scores)).items():
            made[name] += rows
    return {name: pd.DataFrame(rows) for name, rows in made.items()}


def main() -> None:
    paths = {t: f"{t}.parquet" for t in TABLES}
    parser = cli.parser(
        "heads", __doc__, runs="manifest.json of every run*",
        corpus="tokens.parquet, where a run learns from text*", **paths,
    )  # fmt: skip

    def work(job: cli.Job) -> None:
        import torch

        args, options = job.args, job.section("own.heads", Options)
        device = job.device()
        with torch.inference_mode():
            frames = measure([Held(m, args.corpus, options, device) for m in args.runs])
        certificate = job.certificate([*args.runs, *args.corpus])
        for name, frame in frames.items():
            tables.write_table(getattr(args, name), frame, certificate)

    cli.run("heads", parser.parse_args(), work)


if __name__ == "__main__":
    main()
