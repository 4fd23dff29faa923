"""What fine-tuning does to weights: intruder dimensions, and the rank of the update. [torch]

Shuttleworth et al. (2024, 2410.21228); the rank after Biderman et al. (2024, 2405.09673).

1. Of every matrix of the layers, before (W_0) and after (W): intruder dimensions among the `top`
   first left singular vectors, and the rank of W - W_0 (weights/lora.py).
2. Null arms: a low-rank update before its first step; W_0 plus Gaussian noise, and W_0 plus noise
   of the update's rank, both of the update's norm in every matrix.
3. Intruders are scaled by λ: W - (1 - λ) Σ σ_i u_i v_i'. The losses on held-out text of the task
   and of the text before it, beside as many singular directions, drawn among the others nearest to
   the top.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipeline.job import cli, own
from pipeline.weights import batches, lora, trained

TABLES = ("intruders", "ranks", "cosines", "scaled")
PASS = 256  # windows at a time
Weights = dict[str, Tensor]


class Options(own.Options):
    """Section own.updates of paper.yaml."""

    labels: list[str] = Field(description="of the documents that are the task")
    runs: list[str] = Field(description="fine-tuned runs; those by LoRA have arms")
    noise: str = Field(description="the arm whose norms and rank the noise has")
    shown: str = Field(description="the matrix whose cosines are drawn")
    top: int = Field(default=10, ge=1, description="singular vectors looked at (Shuttleworth: 10)")
    epsilons: list[float] = Field(default=[0.5], min_length=1, description="of the cosine")
    epsilon: float = Field(default=0.5, description="the published one, of the intruders scaled")
    scaled: list[str] = Field(description="arms whose intruders are scaled")
    factors: list[float] = Field(default=[0, 0.25, 0.5, 0.75, 1], description="λ")
    seed: int = Field(default=0, ge=0, description="of noise and of directions drawn")


def others(intruders: list[int], n: int, rng: np.random.Generator) -> list[int]:
    """As many directions as there are intruders, out of the first of those that are none."""
    free = [i for i in range(n) if i not in intruders][: max(2 * len(intruders), 1)]
    return sorted(rng.choice(free, min(len(intruders), len(free)), replace=False).tolist())


def noisy(base: Weights, like: Weights, rank: int, generator: torch.Generator) -> Weights:
    """W_0 plus noise with the norm of like - W_0 in every matrix; of full rank where rank is 0."""
    out = {}
    for name, W in base.items():
        draws = torch.randn(W.shape, generator=generator)
        if rank:
            A = torch.randn(rank, W.shape[1], generator=generator)
            draws = torch.randn(W.shape[0], rank, generator=generator) @ A
        out[name] = W + draws * ((like[name] - W).norm() / draws.norm())
    return out


@torch.no_grad()
def loss(model: nn.Module, ids: np.ndarray, n_ctx: int) -> float:
    """Mean cross entropy in nats over consecutive windows of a text."""
    tokens, targets = batches.windows(torch.from_numpy(ids.astype(np.int64)), n_ctx)
    parts = zip(tokens.split(PASS), targets.split(PASS), strict=True)
    total = sum(
        F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten(), reduction="sum")
        for x, y in parts
    )
    return float(total / targets.numel())


def measured(base: Weights, tuned: Weights, options: Options) -> dict[str, list[dict]]:
    """Rows of `intruders` and `ranks`, one a matrix and ε."""
    out: dict[str, list[dict]] = {"intruders": [], "ranks": []}
    for name, W_0 in base.items():
        delta, cosines = tuned[name] - W_0, lora.best_cosines(W_0, tuned[name])[: options.top]
        out["ranks"].append({"matrix": name, "rank90": lora.rank_of(delta),
                             "size": float(delta.norm() / W_0.norm())})  # fmt: skip
        for epsilon in options.epsilons:
            n = int((cosines < epsilon).sum())
            out["intruders"].append({"matrix": name, "epsilon": epsilon, "intruders": n})
    return out


def maps(base: Weights, tuned: Weights, options: Options) -> list[dict]:
    """Rows of `cosines`: of the first singular vectors of one matrix with those of W_0."""
    n = 2 * options.top
    both = [lora.svd(W[options.shown])[0][:, :n] for W in (tuned, base)]
    found = (both[0].T @ both[1]).abs().numpy()
    return [{"tuned": i, "base": j, "cosine": float(x)} for (i, j), x in np.ndenumerate(found)]


def interventions(
    model: nn.Module, base: Weights, texts: dict[str, np.ndarray], options: Options, seed: int
) -> list[dict]:
    """Rows of `scaled`; the model's weights are put back."""
    n_ctx, rng = model.config.n_ctx, np.random.default_rng([options.seed, seed])
    before = {n: model.get_parameter(n).detach().clone() for n in base}
    found = {}
    for name, W in before.items():
        low = lora.best_cosines(base[name], W)[: options.top] < options.epsilon
        intruders = low.nonzero().flatten().tolist()
        drawn = others(intruders, min(W.shape), rng)
        found[name] = {"intruders": intruders, "random": drawn}
    rows, tuned = [], {text: loss(model, ids, n_ctx) for text, ids in texts.items()}
    for which in ("intruders", "random"):
        n = sum(len(f[which]) for f in found.values())
        for factor in options.factors:
            for name, W in before.items():
                model.get_parameter(name).data.copy_(lora.scaled(W, found[name][which], factor))
            losses = {text: loss(model, ids, n_ctx) for text, ids in texts.items()}
            about = {"which": which, "factor": factor, "n": n}
            rows += [about | {"text": t, "loss": x, "change": x - tuned[t]}
                     for t, x in losses.items()]  # fmt: skip
    for name, W in before.items():
        model.get_parameter(name).data.copy_(W)
    return rows


def weights_of(model: nn.Module) -> Weights:
    return {n: model.get_parameter(n).detach().clone() for n in lora.matrices(model)}


def work(job: cli.Job, options: Options) -> own.Tables:
    args, out = job.args, own.Tables(TABLES)
    runs = {run.name: run for run in map(trained.open_run, args.runs)}
    files = [own.by_arm(job, given) for given in (args.corpora, args.labels)]
    arm = next(iter(files[0]))
    held_out = batches.read_labelled(*(f[arm] for f in files), options.labels)
    texts = {"task": held_out["eval"], "before": held_out["other"]}
    for name in options.runs:
        run = runs[name]
        start = runs[run.spec.start.run]
        base_model = start.model(run.spec.start.member or start.members[0], run.spec.start.step)
        base = weights_of(base_model)
        for member in run.members:
            arm, seed = run.arm(member) or name, run.seed(member)
            model = run.model(member)
            kinds: dict[str, Any] = {arm: weights_of(model)}
            if arm == options.noise:
                rank = run.spec.low_rank(run.arm(member))[0]
                generator = torch.Generator().manual_seed(batches.seeded(options.seed, seed))
                kinds["untrained"] = weights_of(run.model(member, 0))
                kinds["gaussian"] = noisy(base, kinds[arm], 0, generator)
                kinds["low_rank_noise"] = noisy(base, kinds[arm], rank, generator)
            for kind, tuned in kinds.items():
                out.add(measured(base, tuned, options), first={"arm": kind, "seed": seed})
                if seed == run.seed(run.members[0]):
                    out.add({"cosines": maps(base, tuned, options)}, first={"arm": kind})
            if arm in options.scaled:
                rows = interventions(model, base, texts, options, seed)
                out.add({"scaled": rows}, first={"arm": arm, "seed": seed})
            cli.log.info("%s, seed %d", arm, seed)
    return out
