"""Stage `sweep`: the same dictionaries in worlds that differ in one thing (Chanin & Garriga-Alonso
2026; experiments/sweeps of the authors' repository).

A world changes some settings of `world`, and every dictionary is trained and measured in it as in
stage `recovery`. With fewer dimensions for as many features, superposition is stronger; the stream
is then shorter, by the power 0.6 of the dimensions, as the authors have it. Where a world says no
`k`, its dictionaries have that of their recipe.

Table `worlds` has a row for each world, dictionary and seed, with the settings of the world. A
killed job goes on in `<worlds>.partial/`, a folder for each world.
"""

from pathlib import Path
from typing import Any

import pandas as pd
import torch
from pydantic import Field

from pipeline.job import cli, own
from pipeline.latents.recovery import cosine
from pipeline.spec.base import Name, Section

from . import recovery
from . import world as ground

TABLES = ("worlds",)
POWER = 0.6  # of samples to convergence over dimensions, as the authors read Gao et al. (2024)


class Change(Section):
    """What sets a world apart; what is left out is that of `world`."""

    d_model: int = Field(default=0, ge=0)
    roots: int = Field(default=-1, ge=-1, description="0: no hierarchy")
    correlation_scale: float = Field(default=0, ge=0)
    k: int = Field(default=0, ge=0, description="of all dictionaries; 0: as their recipe says")


class Options(recovery.Options):
    """Section own.sweep of paper.yaml."""

    worlds: dict[Name, Change] = Field(min_length=1)

    def of(self, change: Change) -> Any:
        """The options of stage recovery in a world."""
        said = change.model_dump(exclude_defaults=True)
        k, world = said.pop("k", 0), self.world.model_copy(update=said)
        some = self.dictionaries
        if k:
            some = {name: one.model_copy(update={"k": k}) for name, one in some.items()}
        share = (world.d_model / self.world.d_model) ** POWER
        fields = {name: getattr(self, name) for name in recovery.Options.model_fields}
        n_samples = round(self.n_samples * share) // self.batch_size * self.batch_size
        changed = {"world": world, "dictionaries": some, "n_samples": n_samples}
        return recovery.Options.model_construct(**fields | changed)


@torch.no_grad()
def overlap(directions: torch.Tensor) -> float:
    """Mean over features of the largest |cos| with another one (rho_mm of the paper)."""
    return float(cosine(directions, directions).fill_diagonal_(0).amax(1).mean())


def measured(options: Any, job: cli.Job, folder: Path) -> pd.DataFrame:
    """The rows that stage recovery has of one world, with the settings of the world."""
    _, found = recovery.run(options, job, folder)
    world = options.world
    made = ground.build(world, job.torch_device)
    return found["dictionaries"].assign(
        d_model=world.d_model,
        roots=world.roots,
        correlation_scale=world.correlation_scale,
        overlap=overlap(made.feature_dict.feature_vectors),
    )


def work(job: cli.Job, options: Options) -> own.Tables:
    """The stage: every world, one after the other."""
    partial = Path(f"{job.args.worlds}.partial")
    job.torch_device = job.device()
    out = own.Tables(TABLES)
    for name, change in options.worlds.items():
        cli.log.info("world %s", name)
        out.add({"worlds": measured(options.of(change), job, partial / name)}, world=name)
    return out
