"""Stage `superposition`: every experiment of Elhage et al. 2022 that this paper replicates.

1. intro      five features in two dimensions, from dense to sparse (the article's first figure).
2. basic      a linear model and ReLU models, 20 features in 5 dimensions ("Basic Results").
3. phase      one extra feature: its importance against density ("Superposition as a Phase Change");
   theory     which of the natural solutions has the least expected loss in each cell.
4. geometry   many equal features, from dense to sparse ("Uniform Superposition"); the null arm
              `random` keeps every feature's norm and draws its direction anew.
5. pentagon   five equal features in two dimensions, the first one made denser or sparser
              ("Perturbing a Single Feature").

Each writes one table with a row per feature of a model (phase: per model; theory: per cell). The
models and their training are in toymodel.py, what is measured of their weights in measures.py.
"""

from typing import Annotated

import numpy as np
import pandas as pd
import torch
from pydantic import Discriminator, Field, Tag, model_validator

from pipeline.job import cli, own
from pipeline.spec.base import Section

from . import measures, toymodel

TABLES = ("intro", "basic", "phase", "theory", "geometry", "pentagon")
Density = Annotated[float, Field(gt=0, le=1)]


class Levels(Section):
    """Densities from `highest` down to `lowest`, evenly in log 1 / (1 − S), the article's axis.

    The k-th of them, k = 0 … levels − 1, is highest (lowest / highest)^(k / (levels − 1)).
    """

    levels: int = Field(ge=2)
    lowest: Density
    highest: Density = 1.0

    @model_validator(mode="after")
    def _falling(self) -> "Levels":
        if not self.lowest < self.highest:
            raise ValueError(f"lowest {self.lowest:g} is not below highest {self.highest:g}")
        return self

    def values(self) -> np.ndarray:
        return self.highest * (self.lowest / self.highest) ** np.linspace(0, 1, self.levels)


def _form(given: object) -> str:
    """Which of the two a section gives, so that a fault names its own keys."""
    return "list" if isinstance(given, list | tuple) else "levels"


Listed, Spaced = Annotated[list[Density], Tag("list")], Annotated[Levels, Tag("levels")]
Densities = Annotated[Listed | Spaced, Discriminator(_form)]


class Experiment(Section):
    """The part that all experiments share."""

    training: toymodel.Optimiser = toymodel.Optimiser()
    seeds: list[int] = Field(min_length=1, description="of weights and data")
    init_instances: int = Field(
        default=20, ge=1, description="models in the joint tensor of the notebook's Xavier init"
    )


class Sweep(Experiment):
    """One model per density; all its features equally dense, with importance decay^i."""

    n_features: int = Field(ge=2)
    n_hidden: int = Field(ge=1)
    densities: Densities
    decay: float = Field(default=1.0, gt=0, le=1, description="I_i = decay^i")

    def density(self) -> np.ndarray:
        given = self.densities
        return given.values() if isinstance(given, Levels) else np.asarray(given)

    def importance(self) -> np.ndarray:
        return self.decay ** np.arange(self.n_features)


class Phase(Experiment):
    """A grid of importance and density; the seeds are the models of a cell."""

    cases: list[tuple[int, int]] = Field(min_length=1, description="[n features, m dimensions]")
    importances: int = Field(ge=2, description="from 0.1 to 10, evenly in the logarithm")
    densities: Levels


class Pentagon(Experiment):
    """Five features in two dimensions; the first one's density differs."""

    density: Density = Field(default=0.05, description="of the other four")
    first: list[Density] = Field(min_length=1, description="densities of the first feature")
    fits: int = Field(ge=1, description="models of each; the one of lowest loss counts")


class Options(own.Options):
    """Section own.superposition of paper.yaml."""

    intro: Sweep
    basic: Sweep
    phase: Phase
    geometry: dict[str, Sweep] = Field(min_length=1)
    pentagon: Pentagon


def feature_steps(options: Options) -> int:
    """Features × models × seeds × steps of all experiments, for the progress line."""
    sweeps = [options.intro, options.basic, options.basic, *options.geometry.values()]
    counts = [(sweep, len(sweep.density()) * sweep.n_features) for sweep in sweeps]
    cells = options.phase.importances * options.phase.densities.levels
    counts += [(options.phase, cells * n) for n, _ in options.phase.cases]
    counts += [(options.pentagon, len(options.pentagon.first) * options.pentagon.fits * 5)]
    return sum(e.training.steps * len(e.seeds) * n for e, n in counts)


class Trainer:
    """Trains families on the job's device, and reports the progress of all of them."""

    def __init__(self, job: cli.Job, options: Options) -> None:
        self.where = {"device": job.device(), "threads": job.args.threads}
        self.progress = cli.Progress("superposition", feature_steps(options), "feature steps")

    def __call__(
        self, name: str, how: Experiment, density: np.ndarray, importance: np.ndarray,
        n_hidden: int, relu: bool = True,
    ) -> list[np.ndarray]:  # fmt: skip
        """W [seeds, models, n, m], b [seeds, models, n] and loss [seeds, models]; density and
        importance are [models, n], or what broadcasts to it."""
        pair = np.broadcast_arrays(density, importance)
        pair = [torch.tensor(a, dtype=torch.float32) for a in pair]
        family = toymodel.Family(name, *pair, n_hidden, how.init_instances, relu)
        more = self.where | {"on_step": self.progress.add}
        return [t.numpy() for t in toymodel.train(family, how.seeds, how.training, **more)]


def per_model(how: Experiment, loss: np.ndarray, **columns: object) -> pd.DataFrame:
    """One row per model, seeds outermost: seed, `columns` [models], loss."""
    models = pd.DataFrame(columns)
    frame = pd.concat([models.assign(seed=seed) for seed in how.seeds], ignore_index=True)
    return frame.assign(loss=loss.reshape(-1))


def per_feature(models: pd.DataFrame, W: np.ndarray, b: np.ndarray, weights: bool) -> pd.DataFrame:
    """One row per feature of W [seeds, models, n, m]: its model's row, feature, bias, norm,
    interference, dimensionality; with `weights` a list w of m numbers, too."""
    n, m = W.shape[-2:]
    out = models.loc[models.index.repeat(n)].reset_index(drop=True)
    out["feature"] = np.tile(np.arange(n), len(models))
    for name, values in {"bias": b, **measures.feature_measures(W)}.items():
        out[name] = values.reshape(-1).astype(np.float32)
    return out.assign(w=list(W.reshape(-1, m))) if weights else out


def drawn_whole(name: str, how: Sweep, train: Trainer, **arms: bool) -> pd.DataFrame:
    """One row per feature of every model: its measures, weights and importance. An arm says whether
    its models have a ReLU; all arms see the same data."""
    p, importance, frames = how.density(), how.importance(), []
    for arm, relu in arms.items():
        W, b, loss = train(name, how, p[:, None], importance, how.n_hidden, relu)
        frames.append(per_feature(per_model(how, loss, arm=arm, density=p), W, b, weights=True))
    out = pd.concat(frames, ignore_index=True)
    return out.assign(importance=importance[out["feature"]])


def grid(how: Phase) -> tuple[np.ndarray, np.ndarray]:
    """Importance of the extra feature and density of each cell: [cells] each."""
    importance = 10 ** np.linspace(-1, 1, how.importances)
    return tuple(a.reshape(-1) for a in np.meshgrid(importance, how.densities.values()))


def phase(options: Options, train: Trainer) -> pd.DataFrame:
    """One row per model: n and m, importance, density, loss, and the extra feature's measures."""
    how = options.phase
    extra, p = grid(how)
    frames = []
    for n, m in how.cases:
        importance = np.ones((len(extra), n))
        importance[:, -1] = extra
        W, _, loss = train(f"phase {n} {m}", how, p[:, None], importance, m)
        columns = {"n_features": n, "n_hidden": m, "importance": extra, "density": p}
        found = measures.feature_measures(W)
        last = {k: found[k][..., -1].reshape(-1) for k in ("norm", "interference")}
        state = measures.state(**last)
        frames.append(per_model(how, loss, **columns).assign(**last, state=state))
    return pd.concat(frames, ignore_index=True)


def theory(options: Options) -> pd.DataFrame:
    """One row per cell: the natural solution of least expected loss, and the state it gives."""
    extra, p = grid(options.phase)
    frames = []
    for n, m in options.phase.cases:
        losses = pd.DataFrame(measures.theory(n, extra, p))
        best = losses.idxmin(axis=1)
        cells = {"n_features": n, "n_hidden": m, "importance": extra, "density": p}
        found = {"state": best.map(measures.THEORY_STATE), "loss": losses.min(axis=1)}
        frames.append(pd.DataFrame(cells | {"solution": best} | found))
    return pd.concat(frames, ignore_index=True)


def geometry(options: Options, train: Trainer) -> pd.DataFrame:
    """One row per feature, arms `trained` and `random`, with its group: size, rank, polytope."""
    frames = []
    for name, how in options.geometry.items():
        p = how.density()
        W, b, loss = train(f"geometry {name}", how, p[:, None], how.importance(), how.n_hidden)
        models = per_model(how, loss, sweep=name, density=p, n_hidden=how.n_hidden)
        for arm, weights in (("trained", W), ("random", redrawn(W, how.seeds))):
            models["dims_per_feature"] = measures.dimensions_per_feature(weights).reshape(-1)
            found = [measures.groups(w) for w in weights.reshape(-1, *W.shape[2:])]
            size, rank, polytope = (np.concatenate(a) for a in zip(*found, strict=True))
            D = measures.represented_dimensionality(weights).reshape(-1).astype(np.float32)
            frame = per_feature(models.assign(arm=arm), weights, b, weights=False)
            frames.append(frame.assign(
                group_size=size.astype(np.int16), group_rank=rank.astype(np.int16),
                polytope=polytope, represented_dimensionality=D,
            ))  # fmt: skip
    return pd.concat(frames, ignore_index=True)


def redrawn(W: np.ndarray, seeds: list[int]) -> np.ndarray:
    """W with every feature's norm kept and its direction drawn uniformly: the null arm."""
    directions = np.stack([np.random.default_rng(s).standard_normal(W.shape[1:]) for s in seeds])
    unit = directions / np.linalg.norm(directions, axis=-1, keepdims=True)
    return unit * np.linalg.norm(W, axis=-1, keepdims=True)


def pentagon(options: Options, train: Trainer) -> pd.DataFrame:
    """One row per feature of every fit; `first` is the density of feature 0."""
    how = options.pentagon
    first = np.repeat(np.asarray(how.first), how.fits)
    density = np.full((len(first), 5), how.density)
    density[:, 0] = first
    W, b, loss = train("pentagon", how, density, np.ones(5), 2)
    fit = np.tile(np.arange(how.fits), len(how.first))
    models = per_model(how, loss, first=first, density=how.density, fit=fit)
    return per_feature(models, W, b, weights=True)


def work(job: cli.Job, options: Options) -> own.Tables:
    train, out = Trainer(job, options), own.Tables(TABLES)
    out.add({"intro": drawn_whole("intro", options.intro, train, relu=True).drop(columns="arm")})
    out.add({"basic": drawn_whole("basic", options.basic, train, linear=False, relu=True)})
    out.add({"phase": phase(options, train), "theory": theory(options)})
    out.add({"geometry": geometry(options, train), "pentagon": pentagon(options, train)})
    return out
