"""Crosscoders where the truth is known: which features two models share. [torch]

1. A feature has the same direction of length 1 in both models, as those of a model and its
   fine-tune, or has one in one of them alone; a weak one is shorter in the base. Rows are sums of a
   few features at random strengths, plus a constant. `copies` are twice the same rows.
2. Crosscoders are trained as stage crosscoder trains them, and judged on new rows as stage
   crosscoder_evaluation does: relative decoder norms, and latent scaling.
3. A latent stands for the feature whose direction in the tuned model it is nearest to. Called
   tuned-only by its norms, it is right where that feature is.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch import Tensor

from pipeline.crosscoders import scaling
from pipeline.crosscoders.model import crosscoder, inference_state
from pipeline.job import cli, own
from pipeline.sae.train import Dictionary, train
from pipeline.spec.base import Name, Section
from pipeline.spec.sae import SaeSpec, SaeTraining

TABLES = ("latents",)


class Features(Section):
    """True features of an arm, by kind."""

    shared: int = 12
    weak: int = Field(default=8, description="shared, with a short direction in the base")
    base: int = Field(default=4, description="of the base alone")
    tuned: int = Field(default=4, description="of the tuned model alone")
    copies: bool = Field(default=False, description="the second model is the first")


class Options(own.Options):
    """Section own.toy of paper.yaml."""

    arms: dict[Name, Features] = Field(min_length=1)
    dictionaries: dict[Name, SaeSpec] = Field(min_length=1)
    d: int = Field(default=32, ge=2, description="width of each model")
    weak: float = Field(default=0.3, gt=0, lt=1, description="length of weak directions")
    chance: float = Field(default=0.08, gt=0, lt=1, description="that a feature is active")
    steps: int = Field(default=1000, ge=1)
    batch_size: int = Field(default=256, ge=1)
    lr: float = Field(default=3e-3, gt=0)
    n_test: int = Field(default=4096, ge=1, description="rows that are judged on")
    seeds: list[int] = Field(default=[0], min_length=1)


class World:
    """Rows of two models side by side, each scaled to a mean norm of the root of its width."""

    target_scale = 1.0

    def __init__(self, features: Features, options: Options, seed: int) -> None:
        self.options, self.seed, self.batch_size = options, seed, options.batch_size
        counts = features.model_dump(exclude={"copies"})
        self.kinds = np.repeat(list(counts), list(counts.values()))
        rng = np.random.default_rng([seed, 0])
        D = rng.normal(size=(len(self.kinds), options.d))[None].repeat(2, 0)
        D /= np.linalg.norm(D, axis=-1, keepdims=True)
        D[0, self.kinds == "tuned"] = D[1, self.kinds == "base"] = 0
        D[0, self.kinds == "weak"] *= options.weak
        self.directions = D[[1, 1]] if features.copies else D
        constants = rng.normal(size=(2, options.d))
        self.constant = constants[[1, 1] if features.copies else [0, 1]].ravel()
        self.scale = np.ones(2)
        sides = self.draw(4096, 1).split(options.d, 1)
        self.scale = np.array([options.d**0.5 / float(s.norm(dim=1).mean()) for s in sides])

    def draw(self, n: int, part: int) -> Tensor:
        """n rows, float32 [n, 2 d]."""
        rng = np.random.default_rng([self.seed, 1, part])
        shape = (n, len(self.kinds))
        active = rng.random(shape) < self.options.chance
        strength = np.where(active, rng.uniform(0.5, 1.5, shape), 0)
        x = np.concatenate([strength @ D for D in self.directions], 1) + 0.2 * self.constant
        return torch.from_numpy((x * self.scale.repeat(self.options.d)).astype(np.float32))

    def batches(self, first: int, last: int) -> Iterator[Tensor]:
        """As `sae.stream.Stream.batches`."""
        for step in range(first, last):
            yield self.draw(self.batch_size, 10 + step)


@torch.no_grad()
def judged(sae: Any, world: World) -> pd.DataFrame:
    """A row per latent that fires."""
    d, x = world.options.d, world.draw(world.options.n_test, 2)
    state = {n: p.detach() for n, p in inference_state(sae, [1.0, 1.0]).items()}
    acts = torch.relu((x - state["b_dec"]) @ state["W_enc"] + state["b_enc"])
    acts = acts * (acts > state.get("threshold", torch.zeros(1)))  # of BatchTopK alone
    decoders = [W.contiguous() for W in state["W_dec"].split(d, 1)]
    sums = scaling.LatentScaling(decoders)
    sums.add(acts, x.split(d, 1), (acts @ state["W_dec"] + state["b_dec"]).split(d, 1))
    norms = np.stack([W.norm(dim=1).numpy() for W in decoders])
    nu_r, nu_e = sums.nu()
    own_source, kind = norms.argmax(0), scaling.kinds(norms)
    best = np.stack([W.numpy() @ D.T for W, D in zip(decoders, world.directions, strict=True)])
    feature = np.where(own_source, best[1].argmax(1), best[0].argmax(1))
    called = (kind == "exclusive") & (own_source == 1)
    frame = pd.DataFrame({
        "latent": np.arange(norms.shape[1]), "truth": world.kinds[feature],
        "feature": feature, "n_tuned": int((world.kinds == "tuned").sum()),
        "delta": scaling.delta(norms), "nu_r": nu_r[0], "nu_e": nu_e[0], "called": called,
        "confirmed": called & scaling.confirmed(kind, own_source, nu_r, nu_e),
        "l0": float((acts > 0).sum(1).float().mean()),
    })  # fmt: skip
    return frame[(acts > 0).any(0).numpy()]


def work(job: cli.Job, options: Options) -> own.Tables:
    out = own.Tables(TABLES)
    training = SaeTraining(
        n_rows=options.steps * options.batch_size, batch_size=options.batch_size, lr=options.lr,
        dead_rows=50 * options.batch_size,
    )  # fmt: skip
    for arm, features in options.arms.items():
        for seed in options.seeds:
            world, made = World(features, options, seed), []
            for name, given in options.dictionaries.items():
                spec = given.model_copy(update={"seed": seed})
                sae = crosscoder(spec, [options.d] * 2)
                sae.b_dec.data.copy_(world.draw(4096, 3).mean(0))
                made.append(Dictionary(name, sae, training, options.steps, spec=spec))
            train(made, world, options.steps)
            for one in made:
                first = {"arm": arm, "objective": one.name, "seed": seed}
                out.add({"latents": judged(one.sae, world)}, first=first)
            cli.log.info("%s, seed %d", arm, seed)
    return out
