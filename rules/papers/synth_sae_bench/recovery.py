"""Stage `recovery`: SAEs of every architecture on one stream of synthetic samples, and how well
each recovers the true features (Chanin & Garriga-Alonso 2026).

1. The ground truth is built from its config (world.py).
2. All dictionaries are trained on the same batches (pipeline/sae/train.py, learner.py).
3. Each is measured on fresh samples (measures.py).
4. Until all is done checkpoints lie in `<saes>.partial/`: a killed job goes on there and ends with
   the same numbers.

Tables: `dictionaries` has a row for each dictionary and seed; `latents` one for each latent,
`features` one for each true feature, `history` one for about every hundredth step. The folders in
`saes` are SAELens's.
"""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pydantic import Field, model_validator

from pipeline.job import cli, own
from pipeline.sae.sae import save
from pipeline.sae.train import build, history, train
from pipeline.spec.base import Name
from pipeline.spec.sae import SaeSpec, SaeTraining
from pipeline.store import provenance
from pipeline.store.checkpoints import Checkpoints

from . import learner as learning
from . import measures
from . import world as ground

TABLES = ("dictionaries", "latents", "features", "history")
WRITES = {"saes": "folder of SAELens folders"}
TUNED = {"standard": "l1_coefficient", "gated": "l1_coefficient", "jumprelu": "l0_coefficient"}
AT_ONCE = 6  # matchings; of 4,096 latents with 16,384 features one holds 0.8 GB
SHORT = ("f1", "mcc", "uniqueness", "explained_variance", "l0", "dead_share")  # for the log


class Recipe(SaeSpec):
    """One dictionary. The last are options of SAELens that the paper sets."""

    seeds: list[int] = Field(default=[], description="of initial weights; none: the stage's")
    target_l0: float = Field(
        default=0, ge=0, description="standard, gated, jumprelu: the coefficient moves until L0 is "
        "this; 0: it stays",
    )  # fmt: skip
    start_share: float = Field(
        default=0, ge=0, lt=1,
        description="share of the steps in which the coefficient rises from 0, and after which it "
        "moves towards target_l0",
    )  # fmt: skip
    normalize: bool = Field(default=False, description="scale x to a mean norm of sqrt(d_in)")
    decoder_init_norm: float = Field(default=0.1, gt=0)
    use_matryoshka_aux_loss: bool = Field(default=False, description="AuxK level by level")
    residual_threshold: float = Field(default=0.0, ge=0, le=0, description="matching pursuit")
    stop_on_duplicate_support: bool = Field(default=False, description="matching pursuit")

    @model_validator(mode="after")
    def _tunable(self) -> "Recipe":
        if self.target_l0 and self.architecture not in TUNED:
            raise ValueError(f"target_l0: {self.architecture} takes its L0 from k")
        return self


class Options(own.Options):
    """Section own.recovery of paper.yaml."""

    world: ground.World = ground.World()
    n_samples: int = Field(ge=1, description="of the stream")
    batch_size: int = Field(default=1024, ge=1)
    bulk: int = Field(default=64, ge=1, description="batches drawn at a time")
    lr: float = Field(default=3e-4, gt=0, description="constant, without warm-up")
    dead_steps: int = Field(default=1000, ge=1, description="a latent silent for longer is dead")
    control: learning.Control = learning.Control()
    n_eval_samples: int = Field(ge=1)
    seeds: list[int] = Field(default=[0], min_length=1, description="of initial weights")
    data_seed: int = Field(default=0, ge=0)
    dictionaries: dict[Name, Recipe] = Field(min_length=1)
    checkpoint_seconds: float = Field(default=45.0, gt=0, exclude=True)


def learners(options: Options, stream: Any, d_in: int) -> list[Any]:
    """Every dictionary and seed with its initial weights, on the stream's device."""
    scale, n_steps, out = stream.norm_scale(), options.n_samples // options.batch_size, []
    for name, recipe in options.dictionaries.items():
        target = None
        if recipe.target_l0:
            coefficient = getattr(recipe, TUNED[recipe.architecture])
            start = round(recipe.start_share * n_steps)
            target = learning.Target(coefficient, recipe.target_l0, start, options.control)
        training = SaeTraining(
            n_rows=n_steps * options.batch_size, batch_size=options.batch_size, lr=options.lr,
            warmup_steps=0, decay_share=0,
            dead_rows=(options.dead_steps + 1) * options.batch_size,  # silent for more than that
        )  # fmt: skip
        normalize = "expected_average_only_in" if recipe.normalize else "none"
        for seed in recipe.seeds or options.seeds:
            spec, metadata = recipe.model_copy(update={"seed": seed}), {"hook_name": "synthetic"}
            sae = build(spec, d_in, normalize=normalize, metadata=metadata)
            about = {"dictionary": name, "seed": seed, "architecture": recipe.architecture}
            one = learning.Learner(
                about, sae.to(stream.sampler.device), training,
                scale=scale if recipe.normalize else 1.0, target=target,
            )  # fmt: skip
            one.target_l0 = recipe.target_l0 or recipe.k
            out.append(one)
    return out


def batches(stream: Any, n: int) -> Iterator[tuple[Any, Any]]:
    """x [batch d_in] and truth [batch n_features] of n fresh samples at least."""
    left, i = -(-n // stream.batch_size), 0
    while left > 0:
        x, parts = stream.draw(i)
        truth = stream.sampler.truth(len(x), parts)
        pairs = list(zip(x.split(stream.batch_size), truth.split(stream.batch_size), strict=True))
        yield from pairs[:left]
        left, i = left - len(pairs), i + 1


def measured(some: list[Any], stream: Any, n: int) -> dict[str, pd.DataFrame]:
    """The tables `dictionaries`, `latents` and `features` of trained learners."""
    sampler, out = stream.sampler, own.Tables(TABLES[:3])
    start = lambda one: measures.Recovery(one.sae, one.scale, sampler.directions)  # noqa: E731
    with ThreadPoolExecutor(AT_ONCE) as pool:  # a matching takes seconds without the GIL
        found = list(pool.map(start, some))
    active, count = 0, 0
    for x, truth in batches(stream, n):
        active, count = active + truth.sum(0), count + len(x)
        for recovery in found:
            recovery.add(x, truth)
    rate = (active / count).cpu().numpy()
    table = {"feature": np.arange(len(rate)), "level": sampler.level.cpu().numpy()}
    features = pd.DataFrame(table).assign(probability=rate)
    for one, recovery in zip(some, found, strict=True):
        n_samples, d_sae = one.n_steps * stream.batch_size, len(recovery.matched)
        row = {"n_samples": n_samples, "target_l0": float(one.target_l0)}
        row["coefficient"] = float(one.tuner.coefficient()) if one.tuner else np.nan
        row |= recovery.summary() | {"true_l0": rate.sum(), "true_l0_first": rate[:d_sae].sum()}
        out.add({"dictionaries": [row | {"d_sae": d_sae}]}, one.about)
        of_features = features.assign(cosine=recovery.feature_cosine)
        which = {name: one.about[name] for name in ("dictionary", "seed")}
        out.add({"latents": recovery.latents(), "features": of_features}, **which)
        said = ", ".join(f"{name} {row[name]:.4f}" for name in SHORT)
        cli.log.info("%s after %d samples: %s", one.name, n_samples, said)
    made = dict(out.frames())
    small = {"level": "int8", "cosine": "float32", "probability": "float32"}
    return made | {"features": made["features"].astype(small)}


def key_of(options: Options, job: cli.Job) -> str:
    """Digest of all that decides the result."""
    made_by = [job.code, job.hardware, provenance.versions()]
    return provenance.digest([options.model_dump(mode="json"), made_by])


def run(options: Options, job: cli.Job, partial: Path) -> tuple[list[Any], dict]:
    """Train, or go on training, and measure: the learners, and their tables."""
    torch.set_float32_matmul_precision("high")  # TF32, where the paper computes in bfloat16
    sampler = ground.Sampler(ground.build(options.world, job.torch_device))
    how = {"batch_size": options.batch_size, "bulk": options.bulk, "seed": options.data_seed}
    stream = ground.Stream(sampler, **how)
    fresh = ground.Stream(sampler, **how, kind=ground.EVALUATION)
    some = learners(options, stream, options.world.d_model)
    checkpoints, rows = Checkpoints(partial, key_of(options, job)), options.batch_size
    done, n_steps = checkpoints.load(some), options.n_samples // rows
    progress = cli.Progress("recovery", n_steps * rows, "samples", done * rows)
    train(
        some, stream, n_steps, first=done, seconds=options.checkpoint_seconds,
        save=lambda step: checkpoints.save(step, some), progress=progress.at,
    )  # fmt: skip
    checkpoints.save(n_steps, some)
    return some, measured(some, fresh, options.n_eval_samples)


def work(job: cli.Job, options: Options) -> own.Tables:
    """The stage: the dictionaries in the folder `saes`, and the rows of all tables."""
    job.torch_device = job.device()
    some, found = run(options, job, Path(f"{job.args.saes}.partial"))
    made = job.certificate([], seed=options.data_seed)
    shutil.rmtree(job.args.saes, ignore_errors=True)
    for one in some:
        save(one, Path(job.args.saes) / one.name, one.scale, made)
    out = own.Tables(TABLES)
    out.add(found | {"history": history(some)})
    return out
