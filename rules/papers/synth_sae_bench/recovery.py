"""Stage `recovery`: SAEs of every architecture on one stream of synthetic samples, and how well
each recovers the true features (Chanin & Garriga-Alonso 2026).

1. The ground truth is built from its config (world.py).
2. All dictionaries are shown the same batches (pipeline/sae_train.py, learner.py). One with fewer
   samples than the others leaves early.
3. At every milestone the dictionaries that stand there are measured on fresh samples (measures.py);
   so those of equal training can be compared.
4. Until all is done everything lies in `<saes>.partial/`, checkpoints and the tables of passed
   milestones among it: a killed job goes on there and ends with the same numbers.

Tables: `dictionaries` has one row a dictionary, seed and milestone; `latents` one a latent of a
finished dictionary, `features` one a true feature of it, `history` the batches of about a hundred
steps. The folders in `saes` are SAELens's.
"""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import Field, model_validator

from pipeline import cli, provenance, tables
from pipeline.source import import_file
from pipeline.spec import Section
from pipeline.spec_base import Name
from pipeline.spec_sae import SaeSpec, SaeTraining

HERE = Path(__file__).parent
ground = import_file(HERE / "world.py")
learning = import_file(HERE / "learner.py")
TABLES = ("dictionaries", "latents", "features", "history")
TUNED = {"standard": "l1_coefficient", "gated": "l1_coefficient", "jumprelu": "l0_coefficient"}


class Recipe(SaeSpec):
    """One dictionary. The last five are options of SAELens that the paper sets."""

    n_samples: int = Field(default=0, ge=0, description="0: as many as the stream has")
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


class Options(Section):
    """Section own.recovery of paper.yaml."""

    tables: list[str]
    world: ground.World = ground.World()
    n_samples: int = Field(ge=1, description="of the stream")
    milestones: list[int] = Field(default=[], description="samples after which to measure, too")
    batch_size: int = Field(default=1024, ge=1)
    bulk: int = Field(default=64, ge=1, description="batches drawn at a time")
    lr: float = Field(default=3e-4, gt=0, description="constant, without warm-up")
    dead_steps: int = Field(default=1000, ge=1, description="a latent silent for longer is dead")
    control: learning.Control = learning.Control()
    n_eval_samples: int = Field(ge=1)
    seeds: list[int] = Field(default=[0], min_length=1, description="of initial weights")
    data_seed: int = Field(default=0, ge=0)
    dictionaries: dict[Name, Recipe] = Field(min_length=1)
    checkpoint_seconds: float = Field(default=120.0, gt=0, exclude=True)

    @model_validator(mode="after")
    def _ends_in_order(self) -> "Options":
        for at in [*self.milestones, *(r.n_samples for r in self.dictionaries.values())]:
            if at > self.n_samples:
                raise ValueError(f"{at} samples are more than the stream's {self.n_samples}")
        return self

    def steps_of(self, recipe: Recipe) -> int:
        """Steps of a dictionary's whole training."""
        return (recipe.n_samples or self.n_samples) // self.batch_size

    def ends(self) -> list[int]:
        """The steps at which something is measured, ascending."""
        steps = [m // self.batch_size for m in self.milestones]
        return sorted({*steps, *map(self.steps_of, self.dictionaries.values())} - {0})


def learners(options: Options, stream: Any, d_in: int) -> list[Any]:
    """Every dictionary and seed with its initial weights, on the stream's device."""
    from pipeline.sae_train import build

    scale = stream.norm_scale()
    out = []
    for name, recipe in options.dictionaries.items():
        n_steps = options.steps_of(recipe)
        start = round(recipe.start_share * n_steps)
        target = None
        if recipe.target_l0:
            coefficient = getattr(recipe, TUNED[recipe.architecture])
            target = learning.Target(coefficient, recipe.target_l0, start, options.control)
        training = SaeTraining(
            n_rows=n_steps * options.batch_size,
            batch_size=options.batch_size,
            lr=options.lr,
            warmup_steps=0,
            decay_share=0,
            dead_rows=options.dead_steps * options.batch_size,
        )
        for seed in options.seeds:
            sae = build(
                recipe.model_copy(update={"seed": seed}),
                d_in,
                normalize="expected_average_only_in" if recipe.normalize else "none",
                metadata={"hook_name": "synthetic"},
            ).to(stream.sampler.device)
            about = {"dictionary": name, "seed": seed, "architecture": recipe.architecture}
            own_scale = scale if recipe.normalize else 1.0
            out.append(learning.Learner(about, sae, training, scale=own_scale, target=target))
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


def measured(some: list[Any], stream: Any, n: int, step: int) -> dict[str, pd.DataFrame]:
    """The tables `dictionaries`, `latents` and `features` of some learners after `step` steps."""
    measures = import_file(HERE / "measures.py")
    sampler = stream.sampler
    start = lambda one: measures.Recovery(one.sae, one.scale, sampler.directions)  # noqa: E731
    with (
        ThreadPoolExecutor() as pool
    ):  # matching 4,096 latents takes a core seconds, without the GIL
        found = list(pool.map(start, some))
    active, count = 0, 0
    for x, truth in batches(stream, n):
        active, count = active + truth.sum(0), count + len(x)
        for recovery in found:
            recovery.add(x, truth)
    rate = (active / count).cpu().numpy()
    n_samples = step * stream.batch_size
    numbers, latents, features = [], [], []
    for one, recovery in zip(some, found, strict=True):
        key = {**one.about, "n_samples": n_samples}
        ended = {"ended": one.n_steps == step}
        tuned = {} if one.tuner is None else {"coefficient": float(one.tuner.coefficient())}
        d_sae = len(recovery.matched)
        more = {"true_l0": rate.sum(), "true_l0_first": rate[:d_sae].sum(), "d_sae": d_sae}
        numbers.append(key | ended | {"coefficient": np.nan} | tuned | recovery.told() | more)
        latents.append(recovery.latents().assign(**key))
        table = {"feature": np.arange(len(rate)), "level": sampler.level.cpu().numpy()}
        table |= {"probability": rate, "cosine": recovery.feature_cosine}
        features.append(pd.DataFrame(table).assign(**key))
        cli.log.info("%s after %d samples: %s", one.name, n_samples, _short(numbers[-1]))
    join = lambda frames: pd.concat(frames, ignore_index=True)  # noqa: E731
    small = {"level": "int8", "cosine": "float32", "probability": "float32"}
    return {
        "dictionaries": pd.DataFrame(numbers),
        "latents": join(latents),
        "features": join(features).astype(small),
    }


def _short(row: dict[str, Any]) -> str:
    names = ("f1", "mcc", "uniqueness", "explained_variance", "l0", "dead_share")
    return ", ".join(f"{n} {row[n]:.4f}" for n in names)


def history(some: list[Any]) -> pd.DataFrame:
    """The batches that were recorded in training."""
    from pipeline.sae_train import HISTORY

    frames = [pd.DataFrame(o.history, columns=HISTORY).assign(sae=o.name) for o in some]
    frame = pd.concat(frames, ignore_index=True)[["sae", *HISTORY]]
    return frame.astype({"step": "int64", "rows": "int64"})


def run(options: Options, job: cli.Job, partial: Path) -> tuple[list[Any], list[dict]]:
    """Train, or go on training, and measure: the learners, and the tables of every milestone."""
    import torch

    from pipeline.resume import Checkpoints
    from pipeline.sae_train import train

    device = job.device()
    torch.set_float32_matmul_precision("high")  # TF32, where the paper computes in bfloat16
    sampler = ground.Sampler(ground.build(options.world, device))
    how = {"batch_size": options.batch_size, "bulk": options.bulk, "seed": options.data_seed}
    stream = ground.Stream(sampler, **how)
    fresh = ground.Stream(sampler, **how, kind=ground.EVALUATION)
    some = learners(options, stream, options.world.d_model)
    made_by = [job.code, job.hardware, provenance.versions()]
    key = provenance.digest([options.model_dump(mode="json"), made_by])
    checkpoints, out = Checkpoints(partial, key), []
    done = checkpoints.load(some)
    total = options.ends()[-1] * options.batch_size
    progress = cli.Progress("recovery", total, "samples", done * options.batch_size)
    for end in options.ends():
        kept = [partial / f"{key[:12]}-{end}-{name}.parquet" for name in TABLES[:3]]
        standing = [one for one in some if one.n_steps >= end]
        if done < end:
            train(
                standing, stream, end, first=done, seconds=options.checkpoint_seconds,
                save=lambda step: checkpoints.save(step, some), progress=progress.at,
            )  # fmt: skip
            done = end
            checkpoints.save(done, some)
        if not all(path.exists() for path in kept):
            found = measured(standing, fresh, options.n_eval_samples, end)
            for path, name in zip(kept, TABLES, strict=False):
                tables.write_table(path, found[name], {})
        out.append({n: tables.read_table(p) for p, n in zip(kept, TABLES, strict=False)})
    return some, out


def finished(parts: list[dict], table: str) -> pd.DataFrame:
    """The rows of the last milestone of each dictionary."""
    frame = pd.concat([part[table] for part in parts], ignore_index=True)
    last = frame.groupby(["dictionary", "seed"])["n_samples"].transform("max")
    return frame[frame["n_samples"] == last].drop(columns=["n_samples", "architecture"])


def main() -> None:
    paths = {t: f"{t}.parquet" for t in TABLES} | {"saes": "folder of SAELens folders"}
    parser = cli.parser("recovery", __doc__, **paths)

    def work(job: cli.Job) -> None:
        from pipeline.sae import save

        options = job.section("own.recovery", Options)
        partial = Path(f"{job.args.saes}.partial")
        some, parts = run(options, job, partial)
        made = job.certificate([], seed=options.data_seed)
        every = pd.concat([p["dictionaries"] for p in parts], ignore_index=True)
        tables.write_table(job.args.dictionaries, every, made)
        for name in ("latents", "features"):
            tables.write_table(getattr(job.args, name), finished(parts, name), made)
        tables.write_table(job.args.history, history(some), made)
        shutil.rmtree(job.args.saes, ignore_errors=True)
        for one in some:
            save(one, Path(job.args.saes) / one.name, one.scale, made)
        shutil.rmtree(partial, ignore_errors=True)

    cli.run("recovery", parser.parse_args(), work)


if __name__ == "__main__":
    main()
