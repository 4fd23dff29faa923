"""Stage `recovery`: SAEs of every architecture on one stream of synthetic samples, and how well
each recovers the true features (Chanin & Garriga-Alonso 2026).

1. The ground truth is built from its config (world.py).
2. All dictionaries are trained on the same batches (pipeline/sae/train.py, learner.py). One with
   fewer samples than the others leaves early.
3. At every milestone the dictionaries that have come so far are measured on fresh samples
   (measures.py), so that those of equal training can be compared.
4. Until all is done everything lies in `<saes>.partial/`, checkpoints and the tables of passed
   milestones among it: a killed job goes on there and ends with the same numbers.
5. With `parts` the dictionaries are divided. A process takes the first part that no other holds;
   several, one for each GPU, may be started with the same arguments and --train-only. The one
   without that flag waits for all parts and joins them.

Tables: `dictionaries` has a row for each dictionary, seed and milestone; `latents` one for each
latent of a finished dictionary, `features` one for each true feature, `history` one for about every
hundredth step. The folders in `saes` are SAELens's.
"""

import fcntl
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pydantic import Field, model_validator

from pipeline.errors import nearest
from pipeline.job import cli, own
from pipeline.job.source import import_file
from pipeline.sae.sae import save
from pipeline.sae.train import build, history, train
from pipeline.spec.base import Name, Section
from pipeline.spec.sae import SaeSpec, SaeTraining
from pipeline.store import provenance, tables
from pipeline.store.checkpoints import Checkpoints

HERE = Path(__file__).parent
ground = import_file(HERE / "world.py")
learning = import_file(HERE / "learner.py")
measures = import_file(HERE / "measures.py")
TABLES = ("dictionaries", "latents", "features", "history")
TUNED = {"standard": "l1_coefficient", "gated": "l1_coefficient", "jumprelu": "l0_coefficient"}
SHORT = ("f1", "mcc", "uniqueness", "explained_variance", "l0", "dead_share")  # for the log


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
    """Dictionaries that share a process and its GPU; all parts draw the same samples."""

    dictionaries: list[Name] = Field(min_length=1)
    seeds: list[int] = Field(default=[0], min_length=1, description="of initial weights")


class Options(own.Options):
    """Section own.recovery of paper.yaml."""

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
        """The options of each part."""
        chosen = [({n: self.dictionaries[n] for n in p.dictionaries}, p.seeds) for p in self.parts]
        return [
            self.model_copy(update={"dictionaries": some, "seeds": seeds, "parts": []})
            for some, seeds in chosen
        ] or [self]

    def steps_of(self, recipe: Recipe) -> int:
        """Steps of a dictionary's whole training."""
        return (recipe.n_samples or self.n_samples) // self.batch_size

    def ends(self) -> list[int]:
        """The steps at which something is measured, ascending."""
        steps = [m // self.batch_size for m in self.milestones]
        return sorted({*steps, *map(self.steps_of, self.dictionaries.values())} - {0})


def learners(options: Options, stream: Any, d_in: int) -> list[Any]:
    """Every dictionary and seed with its initial weights, on the stream's device."""
    scale, out = stream.norm_scale(), []
    for name, recipe in options.dictionaries.items():
        n_steps, target = options.steps_of(recipe), None
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
        for seed in options.seeds:
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


def measured(some: list[Any], stream: Any, n: int, step: int) -> dict[str, pd.DataFrame]:
    """The tables `dictionaries`, `latents` and `features` of some learners after `step` steps."""
    sampler, out = stream.sampler, own.Tables(TABLES[:3])
    start = lambda one: measures.Recovery(one.sae, one.scale, sampler.directions)  # noqa: E731
    with ThreadPoolExecutor() as pool:  # matching 4,096 latents takes seconds without the GIL
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
        key = {**one.about, "n_samples": step * stream.batch_size}
        d_sae = len(recovery.matched)
        row = {"ended": one.n_steps == step, "target_l0": float(one.target_l0)}
        row["coefficient"] = float(one.tuner.coefficient()) if one.tuner else np.nan
        row |= recovery.summary() | {"true_l0": rate.sum(), "true_l0_first": rate[:d_sae].sum()}
        out.add({"dictionaries": [row | {"d_sae": d_sae}]}, key)
        of_features = features.assign(cosine=recovery.feature_cosine)
        out.add({"latents": recovery.latents(), "features": of_features}, **key)
        said = ", ".join(f"{name} {row[name]:.4f}" for name in SHORT)
        cli.log.info("%s after %d samples: %s", one.name, key["n_samples"], said)
    made = dict(out.frames())
    small = {"level": "int8", "cosine": "float32", "probability": "float32"}
    return made | {"features": made["features"].astype(small)}


def key_of(options: Options, job: cli.Job) -> str:
    """Digest of all that decides the result of a part."""
    made_by = [job.code, job.hardware, provenance.versions()]
    return provenance.digest([options.model_dump(mode="json"), made_by])


def run(options: Options, job: cli.Job, partial: Path) -> tuple[list[Any], list[dict]]:
    """Train, or go on training, and measure: the learners, and the tables of every milestone."""
    torch.set_float32_matmul_precision("high")  # TF32, where the paper computes in bfloat16
    sampler = ground.Sampler(ground.build(options.world, job.torch_device))
    how = {"batch_size": options.batch_size, "bulk": options.bulk, "seed": options.data_seed}
    stream = ground.Stream(sampler, **how)
    fresh = ground.Stream(sampler, **how, kind=ground.EVALUATION)
    some = learners(options, stream, options.world.d_model)
    key, ends, out = key_of(options, job), options.ends(), []
    checkpoints = Checkpoints(partial, key)
    done, rows = checkpoints.load(some), options.batch_size
    progress = cli.Progress("recovery", ends[-1] * rows, "samples", done * rows)
    for end in ends:
        kept = {n: partial / f"{key[:12]}-{end}-{n}.parquet" for n in TABLES[:3]}
        standing = [one for one in some if one.n_steps >= end]
        if done < end:
            train(
                standing, stream, end, first=done, seconds=options.checkpoint_seconds,
                save=lambda step: checkpoints.save(step, some), progress=progress.at,
            )  # fmt: skip
            done = end
            checkpoints.save(done, some)
        if not all(path.exists() for path in kept.values()):
            for name, frame in measured(standing, fresh, options.n_eval_samples, end).items():
                tables.write_table(kept[name], frame, {})
        out.append({name: tables.read_table(path) for name, path in kept.items()})
    return some, out


def finished(parts: list[dict], table: str) -> pd.DataFrame:
    """The rows of the last milestone of each dictionary."""
    frame = pd.concat([part[table] for part in parts], ignore_index=True)
    last = frame.groupby(["dictionary", "seed"])["n_samples"].transform("max")
    return frame[frame["n_samples"] == last].drop(columns=["n_samples", "architecture"])


def part(options: Options, job: cli.Job, folder: Path) -> None:
    """Train and measure one part, and leave its tables and dictionaries in `folder`/done."""
    some, parts = run(options, job, folder)
    made, writing = job.certificate([], seed=options.data_seed), folder / "writing-done"
    shutil.rmtree(writing, ignore_errors=True)
    found = {name: finished(parts, name) for name in ("latents", "features")}
    found["dictionaries"] = pd.concat([p["dictionaries"] for p in parts], ignore_index=True)
    for name, frame in (found | {"history": history(some)}).items():
        tables.write_table(writing / f"{name}.parquet", frame, made)
    for one in some:
        save(one, writing / "saes" / one.name, one.scale, made)
    writing.rename(folder / "done")
    for old in folder.glob("step-*"):
        shutil.rmtree(old)


def take_part(options: Options, job: cli.Job, folder: Path, *, wait: bool) -> None:
    """Do one part, unless it is done or another process is at it.

    Args:
        wait: for the other process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w", encoding="utf-8") as lock:  # it ends with the process
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return
        if not (folder / "done").is_dir():
            cli.log.info("part %s: %s", folder.name, ", ".join(options.dictionaries))
            part(options, job, folder)


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
    options, partial = job.section("own.recovery", Options), Path(f"{job.args.saes}.partial")
    job.torch_device = job.device()
    parts = {partial / key_of(one, job)[:12]: one for one in options.divided()}
    for wait in (False,) if job.args.train_only else (False, True):
        for folder, one in parts.items():
            take_part(one, job, folder, wait=wait)
    if not job.args.train_only:
        join(list(parts), job, job.certificate([], seed=options.data_seed))
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
