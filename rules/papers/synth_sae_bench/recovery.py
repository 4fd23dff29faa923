"""Stage `recovery`: SAEs of every architecture on one stream of synthetic samples, and how well
each recovers the true features (Chanin & Garriga-Alonso 2026).

1. The ground truth is built from its config (world.py).
2. All dictionaries are shown the same batches (pipeline/sae/train.py, learner.py). One with fewer
   samples than the others leaves early.
3. At every milestone the dictionaries that stand there are measured on fresh samples (measures.py);
   so those of equal training can be compared.
4. Until all is done everything lies in `<saes>.partial/`, checkpoints and the tables of passed
   milestones among it: a killed job goes on there and ends with the same numbers.
5. With `parts` the dictionaries are divided. A process takes the first part that no other holds;
   several, one a GPU, may be started with the same arguments and --train-only. The one without
   that flag waits for all parts and joins them.

Tables: `dictionaries` has one row a dictionary, seed and milestone; `latents` one a latent of a
finished dictionary, `features` one a true feature of it, `history` the batches of about a hundred
steps. The folders in `saes` are SAELens's.
"""

import fcntl
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import Field, model_validator

from pipeline.errors import nearest
from pipeline.job import cli
from pipeline.job.source import import_file
from pipeline.spec.base import Name
from pipeline.spec.paper import Section
from pipeline.spec.sae import SaeSpec, SaeTraining
from pipeline.store import provenance, tables

HERE = Path(__file__).parent
ground = import_file(HERE / "world.py")
learning = import_file(HERE / "learner.py")
TABLES = ("dictionaries", "latents", "features", "history")
TUNED = {"standard": "l1_coefficient", "gated": "l1_coefficient", "jumprelu": "l0_coefficient"}


class Recipe(SaeSpec):
    """One dictionary. The last are options of SAELens that the paper sets."""

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


class Part(Section):
    """Dictionaries that share a process, its GPU and its stream; all parts draw the same samples.

    Processes that are given the same folder divide the parts among them.
    """

    dictionaries: list[Name] = Field(min_length=1)
    seeds: list[int] = Field(default=[0], min_length=1, description="of initial weights")


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
    parts: list[Part] = Field(
        default=[], description="in the order of their worth; default: one with all dictionaries"
    )
    checkpoint_seconds: float = Field(default=45.0, gt=0, exclude=True)
    cuda_streams: int = Field(
        default=1, ge=1, exclude=True, description="dictionaries whose steps may overlap on a GPU"
    )

    @model_validator(mode="after")
    def _ends_in_order(self) -> "Options":
        for at in [*self.milestones, *(r.n_samples for r in self.dictionaries.values())]:
            if at > self.n_samples:
                raise ValueError(f"{at} samples are more than the stream's {self.n_samples}")
        return self

    @model_validator(mode="after")
    def _parts_are_whole(self) -> "Options":
        pairs = [(n, s) for part in self.parts for n in part.dictionaries for s in part.seeds]
        names = {name for name, _ in pairs}
        if wrong := sorted(names - set(self.dictionaries)):
            known = list(self.dictionaries)
            raise ValueError(f"parts: no dictionary '{wrong[0]}'{nearest(wrong[0], known)}")
        if self.parts and (left := [n for n in self.dictionaries if n not in names]):
            raise ValueError(f"parts: none has dictionary '{left[0]}'; name it in one")
        if twice := {pair for pair in pairs if pairs.count(pair) > 1}:
            name, seed = min(twice)
            raise ValueError(f"parts: dictionary '{name}' with seed {seed} is in two; name it once")
        return self

    def divided(self) -> "list[Options]":
        """One part each, in the order of their worth."""
        rows = [
            {"dictionaries": {n: self.dictionaries[n] for n in p.dictionaries}, "seeds": p.seeds}
            for p in self.parts
        ]
        return [self.model_copy(update=row | {"parts": []}) for row in rows] or [self]

    def steps_of(self, recipe: Recipe) -> int:
        """Steps of a dictionary's whole training."""
        return (recipe.n_samples or self.n_samples) // self.batch_size

    def ends(self) -> list[int]:
        """The steps at which something is measured, ascending."""
        steps = [m // self.batch_size for m in self.milestones]
        return sorted({*steps, *map(self.steps_of, self.dictionaries.values())} - {0})


def learners(options: Options, stream: Any, d_in: int) -> list[Any]:
    """Every dictionary and seed with its initial weights, on the stream's device."""
    from pipeline.sae.train import build

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
            dead_rows=(options.dead_steps + 1) * options.batch_size,  # silent for more than that
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
            one = learning.Learner(about, sae, training, scale=own_scale, target=target)
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
        ended = {"ended": one.n_steps == step, "target_l0": float(one.target_l0)}
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
    from pipeline.sae.train import HISTORY

    frames = [pd.DataFrame(o.history, columns=HISTORY).assign(sae=o.name) for o in some]
    frame = pd.concat(frames, ignore_index=True)[["sae", *HISTORY]]
    return frame.astype({"step": "int64", "rows": "int64"})


def key_of(options: Options, job: cli.Job) -> str:
    """Digest of all that decides the result of a part."""
    made_by = [job.code, job.hardware, provenance.versions()]
    return provenance.digest([options.model_dump(mode="json"), made_by])


def run(options: Options, job: cli.Job, partial: Path) -> tuple[list[Any], list[dict]]:
    """Train, or go on training, and measure: the learners, and the tables of every milestone."""
    import torch

    from pipeline.sae.train import train
    from pipeline.store.checkpoints import Checkpoints

    device = job.torch_device
    torch.set_float32_matmul_precision("high")  # TF32, where the paper computes in bfloat16
    sampler = ground.Sampler(ground.build(options.world, device))
    how = {"batch_size": options.batch_size, "bulk": options.bulk, "seed": options.data_seed}
    stream = ground.Stream(sampler, **how)
    fresh = ground.Stream(sampler, **how, kind=ground.EVALUATION)
    some = learners(options, stream, options.world.d_model)
    learning.overlap(some, options.cuda_streams)
    key = key_of(options, job)
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


def part(options: Options, job: cli.Job, folder: Path) -> None:
    """Train and measure one part, and leave its tables and dictionaries in `folder`/done."""
    from pipeline.sae.sae import save

    some, parts = run(options, job, folder)
    made, writing = job.certificate([], seed=options.data_seed), folder / "writing-done"
    shutil.rmtree(writing, ignore_errors=True)
    found = {
        "dictionaries": pd.concat([p["dictionaries"] for p in parts], ignore_index=True),
        "latents": finished(parts, "latents"),
        "features": finished(parts, "features"),
        "history": history(some),
    }
    for name, frame in found.items():
        tables.write_table(writing / f"{name}.parquet", frame, made)
    for one in some:
        save(one, writing / "saes" / one.name, one.scale, made)
    writing.rename(folder / "done")
    for old in folder.glob("step-*"):
        shutil.rmtree(old)


def take_part(options: Options, job: cli.Job, folder: Path, *, wait: bool) -> bool:
    """Do one part, unless it is done or another process is at it; whether it is done now.

    Args:
        wait: for the other process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(
        folder / "lock", "w", encoding="utf-8"
    ) as lock:  # it ends with the process, killed or not
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        if not (folder / "done").is_dir():
            cli.log.info("part %s: %s", folder.name, ", ".join(options.dictionaries))
            part(options, job, folder)
    return True


def join(folders: list[Path], job: cli.Job, made: dict) -> None:
    """The stage's outputs out of all parts."""
    for name in TABLES:
        frames = [tables.read_table(f / "done" / f"{name}.parquet") for f in folders]
        frame = pd.concat(frames, ignore_index=True)
        tables.write_table(getattr(job.args, name), frame, made)
    shutil.rmtree(job.args.saes, ignore_errors=True)
    for folder in folders:
        for one in sorted((folder / "done/saes").iterdir()):
            shutil.copytree(one, Path(job.args.saes) / one.name)


def work(job: cli.Job) -> None:
    """The stage: every part, and with all of them done the outputs."""
    options = job.section("own.recovery", Options)
    job.torch_device = job.device()
    partial = Path(f"{job.args.saes}.partial")
    parts = [(one, partial / key_of(one, job)[:12]) for one in options.divided()]
    for one, folder in parts:
        take_part(one, job, folder, wait=False)
    if job.args.train_only:
        return
    for one, folder in parts:
        take_part(one, job, folder, wait=True)
    join([f for _, f in parts], job, job.certificate([], seed=options.data_seed))
    shutil.rmtree(partial, ignore_errors=True)


def main() -> None:
    paths = {t: f"{t}.parquet" for t in TABLES} | {"saes": "folder of SAELens folders"}
    parser = cli.parser("recovery", __doc__, **paths)
    parser.add_argument(
        "--train-only", action="store_true", help="do the parts that no process is at, no more"
    )
    cli.run("recovery", parser.parse_args(), work)


if __name__ == "__main__":
    main()
