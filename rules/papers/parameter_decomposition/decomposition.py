"""Stage `decomposition`: does stochastic parameter decomposition find the columns of toy models?

After Bushnaq et al. 2025, "Toy Model of Superposition" with and without a hidden identity; the
method is in spd.py.

1. Targets: of `fits` models a seed the one of least loss, since one in five is no pentagon.
2. Arms: `base`; `heavy`, importance weight × 10; `wide`, twice the parts; `untrained`, the parts
   of base before training. All models of one shape are decomposed at once.
3. models      a row a matrix: MMCS and ML2R of its columns (the paper's equations), parts that
               are alive (importance above `alive` on some row) and kept (norm above `kept` of the
               matrix's mean column), share of ‖W‖² that the sum of parts misses, error of the
               one-hot importances; MMCS with the target of the next seed as null arm (`other`).
4. thresholds  number of parts above each threshold of importance and of norm.
5. curves      MMCS, ML2R, alive and kept of W through training.
6. one_hot     importance of each part for each feature alone, parts in the order of features.
7. vectors     W's columns and the parts' vectors in the plane, where there are two dimensions.
8. ablations   change of x̂ when one part of W is removed, on rows with its feature and on all.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pipeline.job import cli, own
from pipeline.spec.base import Section

from . import spd

TABLES = ("models", "thresholds", "curves", "one_hot", "vectors", "ablations")
SHOWN = 0.75  # a feature alone has this value, as in the paper's figures of importances


class Fit(Section):
    """How targets are trained; the defaults are the paper's, appendix "Training details"."""

    steps: int = Field(default=10_000, ge=1)
    batch_size: int = Field(default=1024, ge=1)
    lr: float = Field(default=5e-3, gt=0)
    decay: float = Field(default=0.01, ge=0)
    fits: int = Field(default=5, ge=1, description="models a seed, of which the best is taken")


class Target(Section):
    """A toy model and the settings of its decomposition."""

    features: int = Field(ge=2)
    hidden: int = Field(ge=1)
    identity: bool = False
    C: int = Field(ge=2, description="parts of each matrix")
    weight: float = Field(gt=0, description="β₃, of the importances")
    power: float = Field(gt=0, description="p of the importances")
    arms: list[str] = Field(default=["base"], description="of base, heavy and wide")
    fit: Fit = Fit()


class Options(own.Options):
    """Section own.decomposition of paper.yaml; the defaults are the paper's appendix."""

    targets: dict[str, Target] = Field(min_length=1)
    p: float = Field(default=0.05, gt=0, le=1, description="probability that a feature is active")
    gate: int = Field(default=16, ge=1, description="hidden units of an importance function")
    steps: int = Field(default=40_000, ge=1)
    batch_size: int = Field(default=4096, ge=1)
    lr: float = Field(default=1e-3, gt=0)
    heavier: float = Field(default=10.0, gt=1, description="arm heavy: factor of the weight")
    wider: int = Field(default=2, ge=2, description="arm wide: factor of C")
    alive: float = Field(default=0.1, gt=0, description="importance of a part that is alive")
    kept: float = Field(default=0.1, gt=0, description="norm of a part that is kept, of a column")
    n_rows: int = Field(default=20_000, ge=100, description="rows on which parts are judged")
    points: int = Field(default=40, ge=1, description="evaluations through training")
    thresholds: list[float] = Field(default=[float(t) for t in np.logspace(-3, 0, 31).round(5)])
    seeds: list[int] = Field(min_length=1, description="of targets, parts and data")


def generator(device: torch.device, *identity: int) -> torch.Generator:
    """A generator of its own for each (seed, use)."""
    seed = int(np.random.SeedSequence(identity).generate_state(1)[0])
    return torch.Generator(device).manual_seed(seed)


def fitted(target: Target, options: Options, device: torch.device) -> spd.Toy:
    """The best of each seed's fits, a model a seed, without an identity."""
    how, best = target.fit, []
    for seed in options.seeds:
        given = {"p": options.p, "steps": how.steps, "batch": how.batch_size, "lr": how.lr}
        W, b, losses = spd.train_toy(
            how.fits, target.features, target.hidden, **given, decay=how.decay,
            generator=generator(device, seed, 0),
        )  # fmt: skip
        best.append((W[losses.argmin()], b[losses.argmin()]))
    return spd.Toy(*(torch.stack(parts) for parts in zip(*best, strict=True)), False)


# --- what is measured ----------------------------------------------------------------------


def columns(part: dict[str, Tensor]) -> Tensor:
    """The column of each part and input, U_c V_cj, [models, C, d_out, d_in]."""
    return part["U"][..., None] * part["V"][:, :, None]


def matched(part: dict[str, Tensor], W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each column of W the largest cosine, its part, and the ratio of lengths there.

    Their means over columns are MMCS and ML2R. W: [models, d_out, d_in]; each [models, d_in].
    """
    made = columns(part)
    best, at = torch.nn.functional.cosine_similarity(made, W[:, None], dim=2).max(1)
    length = made.norm(dim=2).gather(1, at[:, None])[:, 0]
    return best, at, length / W.norm(dim=1)


def part_norms(part: dict[str, Tensor], W: Tensor) -> Tensor:
    """Norm of each part over the mean norm of W's columns, [models, C]."""
    return part["U"].norm(dim=-1) * part["V"].norm(dim=-1) / W.norm(dim=1).mean(1, keepdim=True)


def one_hot(toy: spd.Toy, parts: spd.Parts) -> dict[str, Tensor]:
    """matrix -> importance of every part for each feature alone, [models, features, C]."""
    x = SHOWN * torch.eye(toy.W.shape[2]).to(toy.W).expand(len(toy.W), -1, -1)
    read = spd.inputs_of(toy, x).items()
    return {name: spd.raw_importance(parts[name], a).clamp(0, 1) for name, a in read}


def aligned(importance: np.ndarray) -> np.ndarray:
    """The parts in the order of the features that they serve, the others behind, [features, C]."""
    features, at = linear_sum_assignment(-importance)
    first = at[np.argsort(features)]
    rest = np.setdiff1d(np.arange(importance.shape[1]), first)
    return importance[:, [*first, *rest]]


def identity_error(importance: np.ndarray, tolerance: float = 0.2) -> float:
    """Number of one-hot importances that are further from the identity than `tolerance`."""
    own = aligned(importance)
    return float((np.abs(own - np.eye(*own.shape)) > tolerance).sum())


class Judge:
    """Rows of a decomposed group of models.

    Args:
        names: (arm, seed) of each model.
    """

    def __init__(self, toy: spd.Toy, names: list[tuple[str, int]], options: Options) -> None:
        self.toy, self.options = toy, options
        self.names = pd.DataFrame(names, columns=["arm", "seed"])
        g, shape = generator(toy.W.device, options.seeds[0], 9), (1, options.n_rows, toy.W.shape[2])
        self.x = spd.rows(shape, options.p, g).expand(len(names), -1, -1)

    def frame(self, **values: Any) -> pd.DataFrame:
        """A row a model, of values [models]."""
        plain = {k: v.cpu().numpy() if isinstance(v, Tensor) else v for k, v in values.items()}
        return self.names.assign(**plain)

    def largest(self, parts: spd.Parts) -> dict[str, Tensor]:
        """matrix -> each part's largest importance over the rows, [models, C]."""
        out = {}
        for name, a in spd.inputs_of(self.toy, self.x).items():
            found = [spd.raw_importance(parts[name], rows).amax(1) for rows in a.split(2048, 1)]
            out[name] = torch.stack(found).amax(0).clamp(0, 1)
        return out

    def models(self, parts: spd.Parts, largest: dict[str, Tensor]) -> pd.DataFrame:
        """Rows of the table models."""
        frames, alone = [], one_hot(self.toy, parts)
        for name, W in self.toy.matrices().items():
            part = parts[name]
            best, _, ratio = matched(part, W)
            missing = W - part["U"].mT @ part["V"]
            others = W.roll(1, 0) if name != "identity" else W.flip(-1)
            frames.append(self.frame(
                matrix=name, mmcs=best.mean(1), ml2r=ratio.mean(1),
                mmcs_other=matched(part, others)[0].mean(1),
                alive=(largest[name] > self.options.alive).sum(1),
                kept=(part_norms(part, W) > self.options.kept).sum(1),
                unfaithful=missing.square().sum((1, 2)) / W.square().sum((1, 2)),
                identity_error=[identity_error(i) for i in alone[name].cpu().numpy()],
            ))  # fmt: skip
        return pd.concat(frames)

    def thresholds(self, parts: spd.Parts, largest: dict[str, Tensor]) -> pd.DataFrame:
        """Rows of the table thresholds."""
        frames = []
        for name, W in self.toy.matrices().items():
            found = {"importance": largest[name], "norm": part_norms(parts[name], W)}
            for measure, values in found.items():
                for t in self.options.thresholds:
                    count = (values > t).sum(1)
                    more = {"matrix": name, "measure": measure, "threshold": t}
                    frames.append(self.frame(**more, parts=count))
        return pd.concat(frames)

    def curve(self, step: int, parts: spd.Parts) -> pd.DataFrame:
        """Rows of the table curves."""
        part, W = parts["embed"], self.toy.W
        best, _, ratio = matched(part, W)
        alive = (one_hot(self.toy, parts)["embed"].amax(1) > self.options.alive).sum(1)
        kept = (part_norms(part, W) > self.options.kept).sum(1)
        return self.frame(step=step, mmcs=best.mean(1), ml2r=ratio.mean(1), alive=alive, kept=kept)

    def one_hots(self, parts: spd.Parts) -> pd.DataFrame:
        """Rows of the table one_hot, of each arm's first model, as many parts as features + 2."""
        frames = []
        for name, values in one_hot(self.toy, parts).items():
            for model in self.names.drop_duplicates("arm").index:
                shown = aligned(values[model].cpu().numpy())[:, : self.toy.W.shape[2] + 2]
                feature, place = np.indices(shown.shape).reshape(2, -1)
                card = {"matrix": name, "feature": feature + 1, "part": place + 1}
                own = self.names.loc[model].to_dict()
                frames.append(pd.DataFrame(own | card | {"importance": shown.ravel()}))
        return pd.concat(frames)

    def vectors(self, parts: spd.Parts) -> pd.DataFrame:
        """Rows of the table vectors: columns of W, and of each part its longest column."""
        if self.toy.W.shape[1] != 2:
            return pd.DataFrame()
        made, frames = columns(parts["embed"]), []
        longest = made.norm(dim=2).argmax(2)[:, :, None, None].expand(-1, -1, 2, 1)
        for kind, xy in (("target", self.toy.W.mT), ("part", made.gather(3, longest)[..., 0])):
            for model, points in enumerate(xy.cpu().numpy()):
                place = {"kind": kind, "number": range(len(points)), "x": points[:, 0]}
                own = self.names.loc[model].to_dict()
                frames.append(pd.DataFrame(own | place | {"y": points[:, 1]}))
        return pd.concat(frames)

    def ablations(self, parts: spd.Parts, largest: dict[str, Tensor]) -> pd.DataFrame:
        """Rows of the table ablations: a part of W each, with its feature where it is matched."""
        models, C = largest["embed"].shape
        x, part = self.x[:, :4000], parts["embed"]
        ones = torch.ones(models, 1, C).to(x)
        whole, frames = spd.masked(self.toy, parts, {"embed": ones}, x), []
        at = matched(part, self.toy.W)[1]
        for c in range(C):
            mask = ones.clone()
            mask[..., c] = 0
            change = (spd.masked(self.toy, parts, {"embed": mask}, x) - whole).square()
            serves = (at == c).float()  # [models, features]
            on = ((x * serves[:, None]).sum(-1) > 0).float()
            every = change.sum(-1)
            own = (every * on).sum(1) / on.sum(1)
            alive = largest["embed"][:, c] > self.options.alive
            frames.append(self.frame(part=c, alive=alive, own=own, mean=every.mean(1)))
        return pd.concat(frames)


# --- the stage -----------------------------------------------------------------------------


def of_group(
    toy: spd.Toy, target: Target, arms: list[str], options: Options, progress: cli.Progress
) -> dict[str, list[pd.DataFrame]]:
    """The rows of arms of one C, which are decomposed together."""
    n, device = len(options.seeds), toy.W.device
    factor = {"heavy": options.heavier}
    weight = torch.tensor([target.weight * factor.get(arm, 1) for arm in arms for _ in range(n)])
    every = replace(toy, W=toy.W.repeat(len(arms), 1, 1), b=toy.b.repeat(len(arms), 1))
    judge = Judge(every, [(a, s) for a in arms for s in options.seeds], options)
    out: dict[str, list[pd.DataFrame]] = {name: [] for name in TABLES}
    how = {"gate": options.gate, "weight": weight.to(device), "power": target.power}
    how |= {"p": options.p, "steps": options.steps, "batch": options.batch_size, "lr": options.lr}
    C = target.C * (options.wider if arms == ["wide"] else 1)
    g = generator(device, options.seeds[0], 1, C)
    apart = max(1, options.steps // options.points)
    for step, live in spd.decompose(judge.toy, C, **how, generator=g):
        if step % apart and step != options.steps:
            continue
        parts = {m: {k: w.detach() for k, w in part.items()} for m, part in live.items()}
        out["curves"].append(judge.curve(step, parts))
        if step == 0 and "base" in arms:
            largest = judge.largest(parts)
            first = judge.models(parts, largest)
            base = first[first["arm"] == "base"]
            out["models"].append(base.assign(arm="untrained"))
        progress.add(apart if step else 0)
    largest = judge.largest(parts)
    for name in ("models", "thresholds", "ablations"):
        out[name].append(getattr(judge, name)(parts, largest))
    return out | {"one_hot": [judge.one_hots(parts)], "vectors": [judge.vectors(parts)]}


def work(job: cli.Job, options: Options) -> own.Tables:
    device, out = job.device(), own.Tables(TABLES)
    groups = {n: [[a for a in t.arms if a != "wide"], ["wide"] if "wide" in t.arms else []]
              for n, t in options.targets.items()}  # fmt: skip
    total = sum(bool(arms) for found in groups.values() for arms in found) * options.steps
    progress = cli.Progress("decomposition", total, "steps")
    with torch.no_grad():
        known: dict[str, spd.Toy] = {}  # an identity in the middle changes no target
        for name, target in options.targets.items():
            key = f"{target.features}, {target.hidden}, {target.fit}"
            known[key] = known.get(key) or fitted(target, options, device)
            toy = replace(known[key], identity=target.identity)
            for arms in filter(None, groups[name]):
                for table, frames in of_group(toy, target, arms, options, progress).items():
                    for frame in frames:
                        if table == "one_hot":  # what a figure lets the reader choose
                            frame["case"] = name + ", " + frame["arm"] + ", " + frame["matrix"]
                        out.add({table: frame}, {"target": name})
    return out
