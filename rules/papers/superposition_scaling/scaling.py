"""Stage `scaling`: how the loss of toy models falls with width, in weak and strong superposition.

After Liu, Liu & Gore 2025 (Superposition Yields Robust Neural Scaling, arXiv 2505.10465) and the
authors' code (liuyz0/SuperpositionScaling: exp/exp-10.py, exp/adamw.py).

1. Data: feature i is active with probability p_i ∝ 1 / i^(1 + α), Σ p_i = 1, and is then uniform on
   (0, 2).
2. Models: x̂ = ReLU(W Wᵀ x + b), n features in m dimensions, by Adam on the mean squared error.
3. Weight decay d sets how many features share dimensions. d >= 0 shrinks each row of W by 1 - lr d;
   d < 0 pulls its norm towards 1, w ← w + lr d (1 - 1 / |w|) w, so that all are represented.
4. models     a row a model, trained and not: loss on held-out rows; share of features whose norm
              is above ½; mean squared cosine among these; the loss of a model that keeps the m
              most frequent features exactly and no other, Σ_{i > m} p_i E x² / n.
"""

import math
from itertools import product

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch import Tensor

from pipeline.job import cli, own

TABLES = ("models",)
REPRESENTED = 0.5  # norm of a feature that is represented: trained norms lie near 0 or 1
MEAN_SQUARE = 4 / 3  # of a number that is uniform on (0, 2)


class Options(own.Options):
    """Section own.scaling of paper.yaml; the defaults are those of the authors' exp-10.py."""

    features: int = Field(default=1000, ge=4, description="n")
    hidden: list[int] = Field(min_length=3, description="widths m, ascending")
    alphas: list[float] = Field(min_length=1, description="p_i ∝ 1 / i^(1 + α)")
    decays: list[float] = Field(min_length=1, description="weight decays d")
    steps: int = Field(default=20_000, ge=1)
    warmup_steps: int = Field(default=2000, ge=0)
    batch_size: int = Field(default=2048, ge=1)
    lr: float = Field(default=0.01, gt=0, description="after warm-up; falls to a twentieth")
    n_eval: int = Field(default=8192, ge=1, description="held-out rows")
    at_once: int = Field(default=20, ge=1, description="models trained together")
    seeds: list[int] = Field(min_length=1, description="of weights and data")


def frequencies(n: int, alpha: float) -> Tensor:
    """p_i of the features, [n]."""
    p = torch.arange(1, n + 1, dtype=torch.float64) ** -(1 + alpha)
    return (p / p.sum()).float()


def rows(p: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """Features of every model, [models, batch, n], of frequencies p [models, n]."""
    g = {"generator": generator, "device": generator.device}
    u = torch.rand((len(p), batch, p.shape[1]), **g)
    return torch.where(u < p[:, None], 2 * u / p[:, None], 0.0)  # given u < p, u / p is uniform


def outputs(W: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """x̂ of rows x [models, batch, n]; W [models, n, m], b [models, n]."""
    return (x @ W @ W.mT + b[:, None]).relu()


def rate(step: int, options: Options) -> float:
    """The learning rate of a step, from 0: warm-up, then half a cosine to a twentieth."""
    least, warm, last = 0.05 * options.lr, options.warmup_steps, options.steps
    if step + 1 < warm < last:
        return options.lr * (step + 1) / warm
    share = (step + 1 - warm) / (last - warm) if warm < last else (step + 1) / last
    return (options.lr - least) * 0.5 * (1 + math.cos(math.pi * share)) + least


def decayed(W: Tensor, decay: Tensor, lr: float) -> Tensor:
    """The factor of each row of W [models, n, m] before a step of Adam; decay [models]."""
    d = decay[:, None, None]
    growth = 1 + lr * d * (1 - 1 / (W.norm(dim=-1, keepdim=True) + 1e-8))
    return torch.where(d >= 0, 1 - lr * d, growth)


def initial(n: int, m: int, seeds: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """W and b of a model for each seed: rows of norm about 1, biases normal."""
    W, b = [], []
    for seed in seeds:
        g = torch.Generator().manual_seed(100_003 * seed + m)
        W.append(torch.randn(n, m, generator=g) / math.sqrt(m))
        b.append(torch.randn(n, generator=g))
    return torch.stack(W).to(device), torch.stack(b).to(device)


def train(
    W: Tensor, b: Tensor, p: Tensor, decay: Tensor, options: Options, generator: torch.Generator
) -> None:
    """Train models in place."""
    adam = torch.optim.Adam([W.requires_grad_(), b.requires_grad_()], lr=options.lr)
    for step in range(options.steps):
        lr = adam.param_groups[0]["lr"] = rate(step, options)
        x = rows(p, options.batch_size, generator)
        with torch.enable_grad():
            loss = (outputs(W, b, x) - x).square().mean((1, 2)).sum()
            W.grad, b.grad = torch.autograd.grad(loss, [W, b])
        with torch.no_grad():
            W.mul_(decayed(W, decay, lr))
        adam.step()


def overlap(W: Tensor) -> list[float]:
    """Mean squared cosine among represented features of each model; NaN where fewer than two."""
    out = []
    for w in W:
        norms = w.norm(dim=1, keepdim=True)
        kept = (w / norms)[norms[:, 0] > REPRESENTED]
        n = len(kept)
        total = float((kept @ kept.T).square().sum()) - n
        out.append(total / (n * (n - 1)) if n > 1 else np.nan)
    return out


def measured(W: Tensor, b: Tensor, p: Tensor, options: Options) -> dict[str, list[float]]:
    """The columns of a group of models."""
    held = torch.Generator(W.device).manual_seed(1 << 31)
    errors, size = torch.zeros(len(W), device=W.device), min(512, options.n_eval)
    for _ in range(-(-options.n_eval // size)):
        x = rows(p, size, held)
        errors += (outputs(W, b, x) - x).square().mean((1, 2))
    kept = (W.norm(dim=-1) > REPRESENTED).float().mean(-1)
    left = p[:, W.shape[2] :].sum(1) * MEAN_SQUARE / p.shape[1]
    loss = errors / -(-options.n_eval // size)
    return {
        "loss": loss.tolist(), "represented": kept.tolist(), "overlap": overlap(W),
        "unlearned": left.tolist(),
    }  # fmt: skip


def work(job: cli.Job, options: Options) -> own.Tables:
    device, out = job.device(), own.Tables(TABLES)
    cases = list(product(options.alphas, options.decays, options.seeds))
    parts = [cases[i : i + options.at_once] for i in range(0, len(cases), options.at_once)]
    progress = cli.Progress("scaling", len(cases) * len(options.hidden), "models")
    with torch.no_grad():
        for m in options.hidden:
            for part in parts:
                card = pd.DataFrame(part, columns=["alpha", "decay", "seed"])
                p = torch.stack([frequencies(options.features, a) for a in card["alpha"]])
                p, decay = p.to(device), torch.tensor(card["decay"].to_numpy()).float().to(device)
                W, b = initial(options.features, m, card["seed"].tolist(), device)
                first = card.assign(arm="untrained", **measured(W, b, p, options))
                g = torch.Generator(device).manual_seed(7919 * int(card["seed"][0]) + m)
                train(W, b, p, decay, options, g)
                last = card.assign(arm="trained", **measured(W, b, p, options))
                out.add({"models": pd.concat([first, last])}, {"hidden": m})
                progress.add(len(part))
    return out
