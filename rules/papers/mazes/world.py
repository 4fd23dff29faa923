"""Stage `world`: what a model of mazes solves, knows of walls and does by what it knows. [torch]

For every model of the section training, after its last step and before its first (the null arm
`<run>_untrained`), on mazes of every kind that no model learned from:

1. tasks   rollouts by the likeliest token from <PATH_START> on, and single tokens of the true path
           (Ivanitskiy et al. 2023, Table 1), with Wilson's 95 % intervals; beside them policies
           that see the maze: `random_walk`, which never goes where it was, and `right_hand`, which
           keeps a hand on the wall.
2. probes  logistic probes of every connection of the lattice, read at <PATH_START>, layer by layer;
           those of `counts` (layer -1) read how often each token stands in the list, and no model.
3. heads   attention from semicolons to the tokens before them (Spies et al. 2024).
4. edits   connections written into the stream and out of it: edits.py, which makes `play`, too.

Edits and the readings of `play` are of mazes of the kind that a model learned from.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from pydantic import Field
from scipy import stats
from torch import Tensor

from pipeline.errors import RetraceError
from pipeline.job import cli, own
from pipeline.models import hooks, inner
from pipeline.probes.logistic import Tasks
from pipeline.probes.standard import Standard
from pipeline.weights import trained

from . import data, edits, mazes

TABLES = ["tasks", "probes", "heads", "edits", "play"]
BATCH = 128  # mazes that a model reads at once
JUDGED = ("forkless", "depth_first", "percolated")


class Options(own.Options):
    """Section own.world of paper.yaml."""

    n_mazes: int = Field(ge=1, description="held-out mazes of each kind that are solved")
    n_probe_mazes: int = Field(ge=10, description="of the probes, whose last fifth is judged on")
    n_pairs: int = Field(ge=1, description="pairs of mazes that one connection tells apart")
    n_shown: int = Field(default=2, ge=1, le=BATCH, description="pairs of the table play")
    l2: float = Field(default=10.0, gt=0, description="of the probes, as in the section probes")
    behind: int = Field(default=0, ge=0, description="edits: the layer behind which is written")
    scales: list[float] = Field(min_length=1, description="edits: lengths of the direction")
    seed: int = Field(default=0, ge=0, description="of policies, places and random directions")


# --- solving -------------------------------------------------------------------------------


def judged(kind: str, n: int, given: data.Options, n_ctx: int) -> data.Written:
    """n held-out mazes, without those that are too long."""
    found = mazes.mazes(kind, n, given.size, given.shortest, data.HELD_OUT)
    start = 1 + 4 * found.connections().sum(1) + 7
    found = found.rows(start + given.size**2 + 1 < n_ctx)  # percolated ones may be long
    if not len(found):
        raise RetraceError(f"architecture.n_ctx: no {kind} maze of {given.size} x {given.size} "
                           f"fits into {n_ctx} tokens; raise it")  # fmt: skip
    return data.written(found, data.HELD_OUT)


def rolled(model: Any, given: data.Written, n_new: int, device: Any) -> np.ndarray:
    """The likeliest tokens behind <PATH_START>, PADDING behind <PATH_END>, [n n_new]."""
    out = torch.full((len(given.tokens), n_new), mazes.PADDING)
    for part in torch.arange(len(out)).split(BATCH):
        at, rows = given.start[part].to(device), torch.arange(len(part), device=device)
        x = torch.nn.functional.pad(given.tokens[part].to(device), (0, n_new))
        done = torch.zeros(len(part), dtype=torch.bool, device=device)
        for step in range(n_new):
            z = model(x[:, : int(at.max()) + 1]).logits[rows, at]
            new = z.argmax(-1).masked_fill(done, mazes.PADDING)
            out[part, step], at = new.cpu(), at + 1
            x[rows, at] = new
            done |= new == mazes.PATH_END
            if done.all():
                break
    return out.numpy()


def joined(found: mazes.Mazes) -> np.ndarray:
    """Which cells are connected, bool [n cells cells]."""
    out = np.zeros((len(found), found.size**2, found.size**2), bool)
    for words, step in ((found.right, 1), (found.down, found.size)):
        i, low = np.nonzero(mazes.bits(words, found.size))
        out[i, low, low + step] = out[i, low + step, low] = True
    return out


def scored(new: np.ndarray, found: mazes.Mazes) -> dict[str, np.ndarray]:
    """Whether rollouts [n tokens] are exactly right, keep to connections, end at the target."""
    cells, rows, ended = (
        mazes.token_cells(found.size)[new],
        np.arange(len(new)),
        new == mazes.PATH_END,
    )
    n = np.where(ended.any(1), ended.argmax(1), new.shape[1])
    before = np.arange(new.shape[1]) < n[:, None]
    linked = joined(found)[rows[:, None], cells[:, :-1], cells[:, 1:]] & (cells >= 0).all(
        1, where=before, keepdims=True
    )
    path = np.where(before, cells, -1)[:, : found.path.shape[1]]
    return {
        "exact": ended.any(1) & (n == found.length) & (path == found.path).all(1),
        "valid": (cells[:, 0] == found.origin) & linked.all(1, where=before[:, 1:]),
        "target": ended.any(1) & (cells[rows, n - 1] == found.target),
    }


def single(model: Any, given: data.Written, seed: int, device: Any) -> dict[str, np.ndarray]:
    """Whether the likeliest token is the true one, at places of the path (Figure 3)."""
    n, u = given.mazes.length, np.random.default_rng(seed).random((2, len(given.tokens)))
    any_token, not_end = (1 + (u[0] * n).astype(int), 2 + (u[1] * (n - 2)).astype(int))
    at = {"path_start": 0 * n, "origin": 0 * n + 1, "first_choice": 0 * n + 2, "last_token": n,
          "any_token": any_token, "not_end": not_end, "path_end": n + 1}  # fmt: skip
    parts = given.tokens.split(BATCH)
    likely = torch.cat([model(x.to(device)).logits.argmax(-1).cpu() for x in parts])
    rows, where = (
        torch.arange(len(likely)),
        {k: given.start + torch.from_numpy(v) for k, v in at.items()},
    )
    return {k: (likely[rows, v - 1] == given.tokens[rows, v]).numpy() for k, v in where.items()}


def policy(name: str, found: mazes.Mazes, seed: int) -> np.ndarray:
    """The rollouts of a policy that sees the maze, as tokens."""
    rng, most = np.random.default_rng(seed), 4 * found.size**2
    out = np.full((len(found), most + 1), mazes.PADDING)
    for i, linked in enumerate(joined(found)):
        path, heading = [int(found.origin[i])], 0
        while path[-1] != found.target[i] and len(path) < most:
            free = np.flatnonzero(linked[path[-1]]).tolist()
            if name == "random_walk":
                if not (free := [c for c in free if c not in path]):
                    break
                path.append(free[int(rng.random() * len(free))])
                continue
            steps = (1, found.size, -1, -found.size)  # headings: east, south, west, north
            turns = [(heading + k) % 4 for k in (1, 0, 3, 2)]  # right, ahead, left, back
            heading = next(h for h in turns if path[-1] + steps[h] in free)
            path.append(path[-1] + steps[heading])
        out[i, : len(path) + 1] = [*mazes.cell_tokens(found.size)[path], mazes.PATH_END]
    return out


def shares(scores: dict[str, np.ndarray], kind: str) -> Iterator[dict[str, Any]]:
    """Rows of the table tasks."""
    for task, right in scores.items():
        low, high = stats.binomtest(int(right.sum()), n := len(right)).proportion_ci(
            method="wilson"
        )
        yield {"kind": kind, "task": task, "share": right.mean(), "low": low, "high": high, "n": n}


# --- walls and heads -----------------------------------------------------------------------


def streams(
    model: Any, given: data.Written, device: Any, forward: Callable | None = None
) -> Tensor:
    """The stream at <PATH_START>, of the embeddings and behind every layer, [layers n d].

    Args:
        forward: runs the model in another way, on up to BATCH mazes.
    """
    every, parts = range(model.config.n_layers), []
    names = ["blocks.0.hook_resid_pre", *(f"blocks.{i}.hook_resid_post" for i in every)]
    for x, at in zip(given.tokens.split(BATCH), given.start.split(BATCH), strict=True):
        with hooks.capture(model, names) as acts:
            (forward or model)(x.to(device))
        rows = torch.arange(len(x), device=device)
        parts.append(torch.stack([acts[n].float()[rows, at.to(device)] for n in names]))
    return torch.cat(parts, 1)


def counted(given: data.Written, d_vocab: int) -> Tensor:
    """How often each token stands before <PATH_START>, [1 n d_vocab]."""
    before = torch.arange(given.tokens.shape[1]) < given.start[:, None]
    return (
        (torch.nn.functional.one_hot(given.tokens, d_vocab) * before[..., None])
        .sum(1)[None]
        .float()
    )


def readings(probes: Standard, X: Tensor) -> np.ndarray:
    """Probabilities of the connections of the lattice, [layers n connections]."""
    return torch.cat([z.softmax(-1)[..., 1] for z in probes.logits(X)], 1).cpu().numpy()


def probed(
    X: Tensor, found: mazes.Mazes, l2: float, **card: Any
) -> tuple[Standard, list[dict[str, Any]]]:
    """Probes, and rows of the table probes; the last fifth of the mazes is judged on."""
    there, cut = found.connections()[:, mazes.inside(found.size)], len(found) * 4 // 5
    codes = torch.from_numpy(there[:cut].T.astype(np.int64)).to(X.device)
    probes = Standard(X[:, :cut], Tasks(codes, [2] * len(codes)), l2)
    right = (readings(probes, X[:, cut:]) > 0.5) == there[cut:]
    common = ((there[:cut].mean(0) > 0.5) == there[cut:]).mean()
    first = -1 if len(X) == 1 else 0
    return probes, [card | {"layer": first + i, "accuracy": x.mean(), "majority": common,
                            "always": there[cut:].mean()} for i, x in enumerate(right)]  # fmt: skip


def head_rows(model: Any, tokens: Tensor, device: Any) -> Iterator[dict[str, Any]]:
    """Rows of the table heads: mean attention of each head from semicolons."""
    names = [f"blocks.{i}.attn.hook_pattern" for i in range(model.config.n_layers)]
    with hooks.capture(model, names) as acts:
        model(tokens.to(device))
    semicolon = tokens == mazes.SEMICOLON
    for layer, name in enumerate(names):
        for head, p in enumerate(inner.by_head(acts[name].float(), model.config.n_heads).unbind(1)):
            back = {f"back_{k}": float(p.cpu().diagonal(-k, 1, 2)[semicolon[:, k:]].mean())
                    for k in (1, 2, 3)}  # fmt: skip
            yield {"layer": layer, "head": head, **back}


# --- the stage -----------------------------------------------------------------------------


def of_model(model: Any, given: data.Options, options: Options, device: Any) -> dict[str, list]:
    """The rows of one model: table -> rows."""
    n_ctx, out = model.config.n_ctx, {name: [] for name in TABLES}
    for kind in JUDGED:
        held = judged(kind, options.n_mazes, given, n_ctx)
        new = rolled(model, held, given.size**2 + 1, device)
        scores = scored(new, held.mazes) | single(model, held, options.seed, device)
        out["tasks"] += shares(scores, kind)
    for kind in dict.fromkeys(["depth_first", given.kinds[0]]):
        held = judged(kind, options.n_probe_mazes, given, n_ctx)
        X = streams(model, held, device)
        probes, rows = probed(X, held.mazes, options.l2, kind=kind)
        out["probes"] += rows
    # the last kind is that which the model learned from
    out["heads"] = list(head_rows(model, held.tokens[:BATCH], device))
    pairs = edits.pairs(held.mazes, options.n_pairs, options.seed)
    toward = edits.directions(model, held, options.behind, device)
    out["edits"] = list(edits.rows(model, pairs, toward, options, device))

    def reading(one: data.Written, forward: Callable) -> np.ndarray:
        return readings(probes, streams(model, one, device, forward))

    out["play"] = list(edits.shown(model, pairs, toward, options, device, reading))
    return out


def work(job: cli.Job, options: Options) -> own.Tables:
    out, device = own.Tables(TABLES), job.device()
    runs = [trained.open_run(manifest) for manifest in job.args.runs]
    progress = cli.Progress("world", 2 * sum(len(run.members) for run in runs), "models")
    with torch.no_grad():
        for run in runs:
            if options.behind >= (n := run.spec.architecture.n_layers):
                raise RetraceError(f"own.world.behind: {options.behind} of {n} layers; lower it")
            given = data.Options.model_validate(run.spec.data.options)
            for arm, step in ((run.name, run.steps[-1]), (f"{run.name}_untrained", run.steps[0])):
                for member in run.members:
                    rows = of_model(run.model(member, step).to(device), given, options, device)
                    out.add(rows, {"arm": arm, "seed": run.seed(member)})
                    progress.add()
        for kind in JUDGED:  # without a model
            held = judged(kind, options.n_mazes, given, run.spec.architecture.n_ctx)
            for name in ("random_walk", "right_hand"):
                scores = scored(policy(name, held.mazes, options.seed), held.mazes)
                out.add({"tasks": list(shares(scores, kind))}, {"arm": name, "seed": -1})
        held = judged("depth_first", options.n_probe_mazes, given, run.spec.architecture.n_ctx)
        X = counted(held, run.info["d_vocab"]).to(device)
        rows = probed(X, held.mazes, options.l2, kind="depth_first")[1]
        out.add({"probes": rows}, {"arm": "counts", "seed": -1})
    return out
