"""Stage `world`: what a model of mazes solves, knows of walls and does by what it knows. [torch]

For every model of the section training, after its last step and before its first (the null arm
`<run>_untrained`), on mazes that no model learned from:

1. tasks   rollouts by the likeliest token from <PATH_START> on, and single tokens of the true path
           (Ivanitskiy et al. 2023, Table 1), with Wilson's 95 % intervals; beside them policies
           that see the maze: `random_walk`, which never goes where it was, and `right_hand`, which
           keeps a hand on the wall.
2. probes  logistic probes of every connection of the lattice, read at <PATH_START>, by layer.
3. heads   mean attention from semicolons to the tokens before them (Spies et al. 2024).
4. edits   connections written into the stream and out of it: edits.py, which makes `play`, too.
"""

from collections.abc import Iterator
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
from pipeline.probes.standard import Standard, streams
from pipeline.text import mazes
from pipeline.weights import trained

from . import data, edits

TABLES = ["tasks", "probes", "heads", "edits", "play"]
BATCH = 128  # mazes that a model reads at once
JUDGED = ("forkless", "depth_first", "percolated")


class Options(own.Options):
    """Section own.world of paper.yaml."""

    n_mazes: int = Field(ge=1, description="held-out mazes of each kind that are solved")
    n_probe_mazes: int = Field(ge=10, description="of the probes, whose last fifth is judged on")
    n_pairs: int = Field(ge=1, description="pairs of mazes that one connection tells apart")
    n_shown: int = Field(default=2, ge=1, description="pairs of the table play")
    l2: float = Field(default=10.0, gt=0, description="of the probes, as in the section probes")
    behind: int = Field(default=0, ge=0, description="edits: the layer behind which is written")
    scales: list[float] = Field(min_length=1, description="edits: lengths of the direction")
    seed: int = Field(default=0, ge=0, description="of policies, places and random directions")


# --- solving -------------------------------------------------------------------------------


def judged(kind: str, n: int, given: data.Options, n_ctx: int) -> data.Written:
    """n held-out mazes, without those that are too long: percolated ones may be."""
    found = mazes.mazes(kind, n, given.size, given.shortest, data.HELD_OUT)
    fits = 4 * found.connections().sum(1) + 10 + given.size**2 <= n_ctx
    if not fits.any():
        raise RetraceError(f"architecture.n_ctx: no {kind} maze of {given.size} x {given.size} "
                           f"fits into {n_ctx} tokens; raise it")  # fmt: skip
    return data.written(found.rows(fits), data.HELD_OUT)


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
    out = np.zeros((found.n, found.size**2, found.size**2), bool)
    for words, step in ((found.right, 1), (found.down, found.size)):
        i, low = np.nonzero(mazes.bits(words, found.size))
        out[i, low, low + step] = out[i, low + step, low] = True
    return out


def scored(new: np.ndarray, found: mazes.Mazes) -> dict[str, np.ndarray]:
    """Whether rollouts [n tokens] are exactly right, keep to connections, end at the target."""
    cells, rows = mazes.token_cells(found.size)[new], np.arange(len(new))
    ended = (new == mazes.PATH_END).any(1)
    n = np.where(ended, (new == mazes.PATH_END).argmax(1), new.shape[1])
    before = np.arange(new.shape[1]) < n[:, None]
    linked = joined(found)[rows[:, None], cells[:, :-1], cells[:, 1:]].all(1, where=before[:, 1:])
    valid = linked & (cells >= 0).all(1, where=before) & (cells[:, 0] == found.origin)
    same = (np.where(before, cells, -1)[:, : found.path.shape[1]] == found.path).all(1)
    target = ended & (cells[rows, n - 1] == found.target)
    return {"exact": ended & (n == found.length) & same, "valid": valid, "target": target}


def single(model: Any, given: data.Written, seed: int, device: Any) -> dict[str, np.ndarray]:
    """Whether the likeliest token is the true one, at places of the path (Figure 3)."""
    n, u = given.mazes.length, np.random.default_rng(seed).random((2, len(given.tokens)))
    at = {"path_start": 0 * n, "origin": 0 * n + 1, "first_choice": 0 * n + 2,
          "any_token": 1 + (u[0] * n).astype(int), "not_end": 2 + (u[1] * (n - 2)).astype(int),
          "last_token": n, "path_end": n + 1}  # fmt: skip
    parts = given.tokens.split(BATCH)
    likely = torch.cat([model(x.to(device)).logits.argmax(-1).cpu() for x in parts]).numpy()
    rows, where = np.arange(len(likely)), {k: given.start.numpy() + v for k, v in at.items()}
    return {k: likely[rows, v - 1] == given.tokens.numpy()[rows, v] for k, v in where.items()}


def policy(name: str, found: mazes.Mazes, seed: int) -> np.ndarray:
    """The rollouts of a policy that sees the maze, as tokens."""
    rng, most = np.random.default_rng(seed), 4 * found.size**2
    out = np.full((found.n, most + 1), mazes.PADDING)
    steps = (1, found.size, -1, -found.size)  # headings: east, south, west, north
    for i, linked in enumerate(joined(found)):
        path, heading = [int(found.origin[i])], 0
        while path[-1] != found.target[i] and len(path) < most:
            free = np.flatnonzero(linked[path[-1]]).tolist()
            if name == "right_hand":
                turns = [(heading + k) % 4 for k in (1, 0, 3, 2)]  # right, ahead, left, back
                heading = next(h for h in turns if path[-1] + steps[h] in free)
                path.append(path[-1] + steps[heading])
            elif new := [c for c in free if c not in path]:
                path.append(new[int(rng.random() * len(new))])
            else:
                break
        out[i, : len(path) + 1] = [*mazes.cell_tokens(found.size)[path], mazes.PATH_END]
    return out


def shares(scores: dict[str, np.ndarray], kind: str) -> Iterator[dict[str, Any]]:
    """Rows of the table tasks."""
    for task, right in scores.items():
        n, k = len(right), int(right.sum())
        low, high = stats.binomtest(k, n).proportion_ci(method="wilson")
        yield {"kind": kind, "task": task, "share": k / n, "low": low, "high": high, "n": n}


# --- walls and heads -----------------------------------------------------------------------


def readings(probes: Standard, X: Tensor) -> np.ndarray:
    """Probabilities of the connections of the lattice, [layers n connections]."""
    return torch.cat([z.softmax(-1)[..., 1] for z in probes.logits(X)], 1).cpu().numpy()


def probed(
    X: Tensor, found: mazes.Mazes, l2: float, **card: Any
) -> tuple[Standard, list[dict[str, Any]]]:
    """Probes, and rows of the table probes; the last fifth of the mazes is judged on."""
    there, cut = found.connections()[:, mazes.inside(found.size)], found.n * 4 // 5
    codes = torch.from_numpy(there[:cut].T.astype(np.int64)).to(X.device)
    probes = Standard(X[:, :cut], Tasks(codes, [2] * len(codes)), l2)
    right = ((readings(probes, X[:, cut:]) > 0.5) == there[cut:]).mean((1, 2))
    card |= {"majority": ((there[:cut].mean(0) > 0.5) == there[cut:]).mean()}
    return probes, [card | {"layer": i, "accuracy": x} for i, x in enumerate(right)]


def head_rows(model: Any, tokens: Tensor, device: Any) -> Iterator[dict[str, Any]]:
    """Rows of the table heads."""
    names = [f"blocks.{i}.attn.hook_pattern" for i in range(model.config.n_layers)]
    with hooks.capture(model, names) as acts:
        model(tokens.to(device))
    semicolon = tokens == mazes.SEMICOLON
    for layer, name in enumerate(names):
        patterns = inner.by_head(acts[name].float().cpu(), model.config.n_heads).unbind(1)
        for head, p in enumerate(patterns):
            back = {
                f"back_{k}": float(p.diagonal(-k, 1, 2)[semicolon[:, k:]].mean()) for k in (1, 3)
            }
            yield {"layer": layer, "head": head, **back}


# --- the stage -----------------------------------------------------------------------------


def of_model(model: Any, given: data.Options, options: Options, device: Any) -> dict[str, list]:
    """The rows of one model: table -> rows."""
    n_ctx, tasks, probe_rows = model.config.n_ctx, [], []
    for kind in JUDGED:
        held = judged(kind, options.n_mazes, given, n_ctx)
        new = rolled(model, held, given.size**2 + 1, device)
        tasks += shares(scored(new, held.mazes) | single(model, held, options.seed, device), kind)
    for kind in dict.fromkeys(["depth_first", given.kind]):
        held = judged(kind, options.n_probe_mazes, given, n_ctx)
        X = streams(model, held.tokens, device, held.start)
        probes, rows = probed(X, held.mazes, options.l2, kind=kind)
        probe_rows += rows
    # `held` and `probes` are now of the kind that the model learned from
    pairs = edits.pairs(held.mazes, options.n_pairs, options.seed)
    toward = edits.directions(model, held, options.behind, device)

    def reading(some: data.Written, forward: Any) -> np.ndarray:
        return readings(probes, streams(model, some.tokens, device, some.start, forward))

    made = list(edits.rows(model, pairs, toward, options, device))
    add = edits.best(made) * toward
    return {"tasks": tasks, "probes": probe_rows, "edits": made,
            "heads": list(head_rows(model, held.tokens[:BATCH], device)),
            "play": list(edits.shown(model, pairs, add, options, device, reading))}  # fmt: skip


def work(job: cli.Job, options: Options) -> own.Tables:
    out, device = own.Tables(TABLES), job.device()
    runs = [trained.open_run(manifest) for manifest in job.args.runs]
    progress = cli.Progress("world", 2 * sum(len(run.members) for run in runs), "models")
    with torch.no_grad():
        for run in runs:
            if options.behind >= (n := run.spec.architecture.n_layers):
                raise RetraceError(f"own.world.behind: {options.behind} of {n} layers; lower it")
            given, n_ctx = data.Options(**run.spec.data.options), run.spec.architecture.n_ctx
            for arm, step in ((run.name, run.steps[-1]), (f"{run.name}_untrained", run.steps[0])):
                for member in run.members:
                    rows = of_model(run.model(member, step).to(device), given, options, device)
                    out.add(rows, {"arm": arm, "seed": run.seed(member)})
                    progress.add()
        for kind in JUDGED:  # without a model
            found = judged(kind, options.n_mazes, given, n_ctx).mazes
            for name in ("random_walk", "right_hand"):
                scores = scored(policy(name, found, options.seed), found)
                out.add({"tasks": list(shares(scores, kind))}, {"arm": name, "seed": -1})
    return out
