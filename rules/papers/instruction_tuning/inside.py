"""Stage `inside`: what tuning changed, where a choice is read, and steering it back. [torch]

The stream is read where the model answers, at the last character of the prompt.

1. probes    by layer: goal, cue, the model's choice, and a control task (Hewitt & Liang 2019).
2. changes   of each matrix: its size and rank (pipeline/tuning/change.py).
3. moved     the mean, and the difference of means by goal, before and after.
4. steering  that difference added or taken out, as the stage `steering` edits (Arditi et al. 2024).
             Null arms: random directions, and the difference of means between the marks.
"""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pipeline.errors import RetraceError, need_among
from pipeline.job import cli, own
from pipeline.models import hooks, loader
from pipeline.probes import calibration, controls
from pipeline.probes.logistic import Tasks
from pipeline.probes.standard import Standard, streams
from pipeline.probes.steered import Edit
from pipeline.spec.base import Name
from pipeline.text.tokens import load_tokenizer
from pipeline.tuning.change import changes

from . import instructions, tuning
from .instructions import Asking, Question, signs

TABLES = ("probes", "changes", "moved", "steering")
READS = {"corpus": "tokens.parquet of the text", "weights": "what stage tuning wrote"}
N_RANDOM = 3  # random directions, whose effects are pooled


class Options(own.Options):
    """Section own.inside of paper.yaml."""

    asking: instructions.Options
    arms: list[Name] = Field(min_length=1, description="tuned models that are looked into")
    changes: dict[Name, Name] = Field(description="a tuned model: the one that it began as")
    steered: list[Name] = Field(min_length=1, description="models that are steered")
    behind: int = Field(default=1, ge=0, description="the layer behind which is written")
    coefficients: list[float] = Field(min_length=1, description="mean norms of the stream")
    n_questions: int = Field(ge=40, description="of probes and directions; a third is judged on")
    l2: float = Field(default=10.0, gt=0, description="of the probes, as in the section probes")
    seed: int = Field(default=0, ge=0, description="of questions, control tasks and directions")


def probed(
    X: Tensor, asked: list[Question], choice: np.ndarray, options: Options
) -> Iterator[dict[str, Any]]:
    """Rows of the table probes; the last third of the questions is judged on."""
    goal, cut = signs(asked, "goal").astype(np.int64), len(asked) * 2 // 3
    words = np.array([q.word for q in asked])
    labels = {"goal": goal, "cue": signs(asked, "cue").astype(np.int64),
              "choice": choice.astype(np.int64),
              "control": controls.control("goal", goal, words, 2, options.seed)}  # fmt: skip
    codes = torch.from_numpy(np.stack(list(labels.values()))).to(X.device)
    probes = Standard(X[:, :cut], Tasks(codes[:, :cut], [2] * len(codes)), options.l2)
    found = torch.cat([z.argmax(-1) for z in probes.logits(X[:, cut:])], 1).cpu().numpy()
    for task, (name, label) in enumerate(labels.items()):
        often = (label[:cut].mean() > 0.5) == label[cut:]
        for layer in range(len(X)):
            card = {"label": name, "layer": layer, "majority": often.mean()}
            yield card | calibration.share(found[layer, :, task] == label[cut:])


def difference(X: Tensor, which: np.ndarray) -> Tensor:
    """Mean row of the questions that are true minus that of the others, [layers d]."""
    mask = torch.from_numpy(which).to(X.device)
    return X[:, mask].mean(1) - X[:, ~mask].mean(1)


def shifted(before: Tensor, after: Tensor, goal: np.ndarray) -> Iterator[dict[str, Any]]:
    """Rows of the table moved. Lengths are shares of the mean distance to the mean."""
    spread = [(X - X.mean(1, keepdim=True)).norm(dim=-1).mean(1) for X in (before, after)]
    apart = [difference(X, goal) for X in (before, after)]
    shift, cosine = (after - before).mean(1), torch.nn.functional.cosine_similarity
    for layer in range(len(before)):
        yield {"layer": layer, "shift": float(shift[layer].norm() / spread[0][layer]),
               "separation_before": float(apart[0][layer].norm() / spread[0][layer]),
               "separation": float(apart[1][layer].norm() / spread[1][layer]),
               "same": float(cosine(apart[0][layer], apart[1][layer], 0)),
               "along": float(cosine(shift[layer], apart[1][layer], 0).abs())}  # fmt: skip


def directions(X: Tensor, asked: list[Question], options: Options) -> dict[str, list[Tensor]]:
    """Name -> directions of length 1 at the layer that is written to."""
    draw = torch.Generator().manual_seed(options.seed)
    rows, d = X[options.behind + 1 : options.behind + 2], X.shape[-1]
    found = {name: [difference(rows, signs(asked, name))[0]] for name in ("goal", "cue")}
    found["random"] = [torch.randn(d, generator=draw).to(X.device) for _ in range(N_RANDOM)]
    return {name: [v / v.norm().clamp(min=1e-9) for v in vs] for name, vs in found.items()}


def steered(
    model: Any, ask: Asking, asked: list[Question], X: Tensor, options: Options, device: Any
) -> Iterator[dict[str, Any]]:
    """Rows of the table steering: directions of the first two thirds, effects on the others."""
    cut = len(asked) * 2 // 3
    ways = directions(X[:, :cut], asked[:cut], options)
    norm, judged = float(X[options.behind + 1].norm(dim=-1).mean()), asked[cut:]
    hook, goal = f"blocks.{options.behind}.hook_resid_post", signs(judged, "goal")
    modes = [("add", c) for c in options.coefficients] + [("ablate", 0.0)]
    for name, vectors in ways.items():
        for mode, coefficient in modes:
            parts = []
            for v in vectors:
                edit = Edit(hook, mode, v, coefficient)
                with hooks.edited(model, hook, lambda x, e=edit: e.on(x, norm, 0)):
                    parts.append(ask.read(model, judged, device))
            refuses = np.stack([p.refusal > 0.5 for p in parts])
            obeys = np.stack([p.right for p in parts]) & ~refuses
            card = {"direction": name, "mode": mode, "coefficient": coefficient}
            for group, of in (("goal", goal), ("others", ~goal)):
                share = calibration.share(refuses[:, of].ravel())
                yield card | {"group": group, "obeys": float(obeys[:, of].mean())} | share


def models_of(base: Any, weights: dict[str, Tensor], seed: int) -> dict[str, Any]:
    """Arm -> model, of one seed."""
    out = {arm: copy.deepcopy(base) for arm in sorted({name.split("/")[0] for name in weights})}
    for arm, model in out.items():
        model.load_state_dict({k: weights[f"{arm}/{seed}/{k}"] for k in model.state_dict()})
    return out


def of_seed(
    models: dict[str, Any], ask: Asking, options: Options, seed: int, device: Any
) -> Iterator[tuple[str, dict[str, list]]]:
    """(arm, table -> rows) of the models of one seed."""
    asked = ask.questions(options.n_questions, tuning.rng_of(options.seed, "inside"), "held")
    tokens, last = ask.prompts(asked)
    X = {arm: streams(model, tokens, device, last) for arm, model in models.items()}
    goal = signs(asked, "goal")
    for arm in options.arms:
        choice = ask.read(models[arm], asked, device).refusal > 0.5
        yield arm, {"probes": list(probed(X[arm], asked, choice, options))}
    for arm, was in options.changes.items():
        yield arm, {"changes": list(changes(models[was], models[arm], seed=seed)),
                    "moved": list(shifted(X[was], X[arm], goal))}  # fmt: skip
    for arm in options.steered:
        yield arm, {"steering": list(steered(models[arm], ask, asked, X[arm], options, device))}


def work(job: cli.Job, options: Options) -> own.Tables:
    from safetensors.torch import load_file

    args, device, out = job.args, job.device(), own.Tables(TABLES)
    weights = load_file(args.weights)
    wanted = (*options.arms, *options.changes, *options.changes.values(), *options.steered)
    known = sorted({name.split("/")[0] for name in weights})
    need_among(wanted, known, "own.inside: no tuned model", "own.tuning has")
    progress = cli.Progress("inside", len(args.models), "seeds")
    for seed, file in enumerate(own.by_arm(job, args.models).values()):
        base = loader.load(file, device).hf
        ask = tuning.asking(load_tokenizer(file), args.corpus, options.asking)
        if options.behind >= base.config.n_layers:
            raise RetraceError(f"own.inside.behind: {options.behind} of {base.config.n_layers} "
                               f"layers; lower it")  # fmt: skip
        with torch.no_grad():
            for arm, rows in of_seed(models_of(base, weights, seed), ask, options, seed, device):
                out.add(rows, {"arm": arm, "seed": seed})
        progress.add()
    return out
