"""Jacobian lenses beside logit and tuned lens: as predictions, and on a result in between. [torch]

Gurnee et al. (2026); J is fitted by pipeline/tuning/jacobian_lens.py, and by number of prompts.

1. layers    every lens against the prediction over held-out text, and against the logit lens
2. recovery  of models of data.py: how near the top of a lens the result of the first operation is,
             at that operation, where the model is going to say another operation or "="; of
             held-out expressions of two operations that the model answers

Beside J stand what can be mistaken for it: self, of each position's effect on itself alone; future,
of that on later ones, J less self; far, J of the layer that is farthest away; and untrained, J of
the same model before its first step.
"""

from pathlib import Path
from typing import Any

import pandas as pd
import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.errors import need_among
from pipeline.job import cli, own
from pipeline.latents.stored import blocks
from pipeline.models import lens, loader
from pipeline.spec.base import Name, Section
from pipeline.spec.paper import parse
from pipeline.tuning import jacobian_lens, tuned_lens
from pipeline.weights import trained

from . import data, tuning

TABLES = ("layers", "recovery")
READS = {"translators": "what stage tuning wrote"}
ANY = -1  # the layer of what any layer shows


class Fit(Section):
    """One entry of own.jacobian.models."""

    n_prompts: int = Field(default=1000, ge=1, description="training blocks that J is the mean of")
    skip_first: int = Field(default=16, ge=0, description="positions that J leaves out")
    n_alone: int = Field(default=4, ge=1, description="positions a prompt of the lens self")
    n_tokens: int = Field(default=20_000, ge=1, description="held-out tokens measured, at most")

    def spec(self, n_alone: int = 0) -> jacobian_lens.JacobianLensSpec:
        given = self.model_dump(include={"n_prompts", "skip_first"})
        return jacobian_lens.JacobianLensSpec(**given, n_alone=n_alone)


class Options(own.Options):
    """Section own.jacobian of paper.yaml."""

    models: dict[Name, Fit] = Field(
        min_length=1, description="of own.tuning.models, and runs of training, by their names"
    )
    counts: list[int] = Field(default=[10], description="smaller numbers of prompts, lenses too")
    tuned: tuned_lens.TunedLensSpec = Field(description="tuned lenses of the runs of training")

    def check(self, known: list[str]) -> None:
        """RetraceError where an entry is neither a tuned lens's model nor a run."""
        there = "own.tuning.models and training have"
        need_among(self.models, known, "own.jacobian.models: no model", there)


def maps_of(
    name: str, hf: nn.Module, train: Tensor, layers: list[int], how: Fit, counts: list[int]
) -> dict[str, jacobian_lens.Maps]:
    """'lens n_prompts' -> J by layer. train: prompts [blocks pos]."""
    fitted = jacobian_lens.fit(name, hf, train, layers, how.spec(), counts)
    (alone,) = jacobian_lens.fit(name, hf, train, layers, how.spec(how.n_alone)).values()
    J = fitted[how.n_prompts]
    others = {
        "self": alone,
        "future": {layer: J[layer] - alone[layer] for layer in layers},
        "far": {layer: J[max(layers, key=lambda o: abs(o - layer))] for layer in layers},
    }
    out = {f"jacobian {n}": maps for n, maps in fitted.items()}
    return out | {f"{other} {how.n_prompts}": maps for other, maps in others.items()}


@torch.no_grad()
def nearness(
    hf: nn.Module, tokens: Tensor, lenses: dict[str, lens.Lens], layers: list[int], first: int
) -> pd.DataFrame:
    """One row a lens and layer: kl_logit, KL(logit lens || lens) in nats; agree_logit, the share
    of tokens at which both have the same likeliest token.

    Args:
        tokens: [windows pos]; positions below `first` do not count.
    """
    found: dict[tuple[str, int], list[Tensor]] = {}
    for (some,) in lens.passes(hf, tokens):
        streams, _ = lens.streams(hf, some)
        for layer in layers:
            x = streams[layer][:, first:].flatten(0, 1)
            log_p = lenses["logit 0"](layer, x).log_softmax(-1)
            for name, read in lenses.items():
                log_q = read(layer, x).log_softmax(-1)
                same = log_p.argmax(-1) == log_q.argmax(-1)
                both = torch.stack([lens.kl(log_p, log_q), same.float()])
                found.setdefault((name, layer), []).append(both)
    means = {key: torch.cat(parts, 1).double().mean(1).tolist() for key, parts in found.items()}
    return pd.DataFrame([{"lens": name, "layer": layer, "kl_logit": far, "agree_logit": same}
                         for (name, layer), (far, same) in means.items()])  # fmt: skip


@torch.no_grad()
def recovery(
    hf: nn.Module, lenses: dict[str, lens.Lens], layers: list[int], tokens: Tensor, wanted: Tensor,
    at: int,
) -> pd.DataFrame:  # fmt: skip
    """One row a lens and layer, and one of the best layer of each item (ANY).

    auc is the area below pass@k over log k, 1 where the wanted token is always first: pass@k is the
    share of items with it among the k likeliest.

    Args:
        tokens: [items pos], read at position `at`; wanted: [items].
    """
    x, d_vocab, rows = lens.streams(hf, tokens)[0], hf.config.vocab_size, []
    for name, read in lenses.items():
        logits = torch.stack([read(layer, x[layer][:, at]) for layer in layers])
        own_logit = logits.gather(-1, wanted.expand(len(layers), -1)[..., None])
        rank = (logits >= own_logit).sum(-1)  # from 1; of equal ones it is the last
        for layer, found in zip([*layers, ANY], [*rank, rank.amin(0)], strict=True):
            area = 1 - found.double().log().mean() / torch.tensor(d_vocab).double().log()
            rows.append({"lens": name, "layer": layer, "auc": float(area)})
    return pd.DataFrame(rows)


def named(frame: pd.DataFrame) -> pd.DataFrame:
    """'jacobian 10' of column lens in two columns, lens and n_prompts; whole: of all prompts."""
    parts = frame["lens"].str.split(" ", expand=True)
    frame = frame.assign(lens=parts[0], n_prompts=parts[1].astype(int))
    most = frame.groupby("lens")["n_prompts"].transform("max")
    return frame.assign(whole=frame["n_prompts"] == most)


def measured(
    hf: nn.Module, maps: dict[str, jacobian_lens.Maps], translators: lens.Translators,
    held_out: tuple[Tensor, Tensor], skip: int,
) -> tuple[dict[str, lens.Lens], pd.DataFrame]:  # fmt: skip
    """All lenses of a model, and the rows of table layers."""
    lenses = {"logit 0": lens.logit_lens(hf), "tuned 0": lens.tuned_lens(hf, translators)}
    lenses |= {name: jacobian_lens.jacobian_lens(hf, J) for name, J in maps.items()}
    layers = translators.layers
    rows = lens.measure(hf, *held_out, lenses, layers, skip)
    near = nearness(hf, held_out[0], lenses, layers, skip)
    return lenses, named(rows.merge(near, how="left", on=["lens", "layer"]))


def of_text(job: cli.Job, how: Options, tuned: tuning.Options, out: own.Tables) -> None:
    """Rows of the models that stage tuning has translators of; a seed has its share of the text."""
    args, device = job.args, job.device()
    for name, file, corpus in zip(sorted(tuned.models), args.models, args.corpora, strict=True):
        if name not in how.models:
            continue
        hf, fit, maps = loader.load(file, device).hf, how.models[name], None
        train, held_out = (blocks(corpus, split).to(device) for split in ("train", "eval"))
        for number, seed in enumerate(tuned.seeds):
            translators = tuned_lens.read(args.translators, f"{name}.{seed}", device)
            maps = maps or maps_of(name, hf, train, translators.layers, fit, how.counts)
            some = held_out[number :: len(tuned.seeds)]
            some = some[: max(1, fit.n_tokens // some.shape[1])]
            skip = tuned.models[name].skip_first
            _, rows = measured(hf, maps, translators, (some[:, :-1], some[:, 1:]), skip)
            out.add({"layers": rows}, model=name, seed=seed)


def of_run(run: trained.Run, how: Options, device: Any, out: own.Tables) -> None:
    """Rows of the models of a run on data.py, with a tuned lens and an untrained J each."""
    fit, given = how.models[run.name], parse(data.Options, run.spec.data.options, "data: options")
    layers = list(range(0, run.spec.architecture.n_layers, how.tuned.every))
    for member in run.members:
        hf, seed = run.model(member).to(device), run.seed(member)
        batches = run.batches(member, Path(data.__file__), device)
        fresh = [batches.batch(run.spec.steps + i) for i in range(how.tuned.steps + 2)]
        train = torch.cat([tokens for tokens, _ in fresh[2:]])
        tuned = tuned_lens.TunedLens(run.name, hf, train, how.tuned)
        for step in range(how.tuned.steps):
            tuned.step(step)
        maps = maps_of(run.name, hf, train, layers, fit, how.counts)
        before = run.model(member, 0).to(device)
        untrained = jacobian_lens.fit(run.name, before, train, layers, fit.spec(), how.counts)
        maps |= {f"untrained {n}": J for n, J in untrained.items()}
        held_out = tuple(torch.cat(pair) for pair in zip(*fresh[:2], strict=True))
        lenses, rows = measured(hf, maps, tuned.translators, held_out, fit.skip_first)
        tokens, wanted, answers = (t.to(device) for t in data.items(given, seed))
        with torch.no_grad():
            right = hf(input_ids=tokens).logits[:, -1].argmax(-1) == answers
        kept = right if right.any() else ~right  # of none, all: the accuracy says so
        found = named(recovery(hf, lenses, layers, tokens[kept], wanted[kept], data.F))
        found = found.assign(accuracy=float(right.float().mean()))
        out.add({"layers": rows, "recovery": found}, model=run.name, seed=seed)


def work(job: cli.Job, how: Options) -> own.Tables:
    out, tuned = own.Tables(TABLES), job.section("own.tuning", tuning.Options)
    runs = list(map(trained.open_run, job.args.runs))
    how.check([*tuned.models, *(run.name for run in runs)])
    of_text(job, how, tuned, out)
    for run in runs:
        if run.name in how.models:
            of_run(run, how, job.device(), out)
    return out
