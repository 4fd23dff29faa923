"""Stage `regression`: does self-attention that learned regression in context descend a gradient?

After von Oswald et al. 2023 and the authors' notebook (constructed_token_setup.ipynb); attention.py
has the tasks, the layers and the construction.

1. Train every arm on new tasks at each step: Adam, gradients clipped to `clip_grad` in norm,
   weights of variance init_scale / (layers × fan-in). All seeds of an arm are trained at once.
2. Rates, by L-BFGS on tasks that nothing else sees: `gd`, plain gradient descent of as many steps
   as layers, a rate each; `gdpp`, GD++, with η and γ (of each layer where layers differ).
3. models    on test tasks, of each model, trained and not: losses of it and of other predictors;
             cosine and distance of predictions and of sensitivities ∂ŷ/∂x; the loss of weights
             half-way to the construction after the gauge is fixed (`between`), and without that
             from A · rescale and O / rescale (`unfixed`), which are the same function.
4. curves    loss, sensitivities and predictions through training.
5. sweeps    loss where inputs or targets are larger than in training, or inputs of other laws.
6. weights   A and O, the gauge fixed: the mean of A's diagonal over the inputs is 1.
7. iterated  one trained layer applied again and again, damped, to y alone, beside GD's.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch import Tensor

from pipeline.job import cli, own
from pipeline.spec.base import Section

from . import attention
from .attention import Layers, Tasks

TABLES = ("models", "curves", "sweeps", "weights", "iterated")
TEST, TUNING, SWEEP = 1 << 31, (1 << 31) + 1, (1 << 31) + 2  # no model's data has these seeds


class Arm(Section):
    """Self-attention of one shape, trained once a seed."""

    layers: int = Field(default=1, ge=1)
    recurrent: bool = Field(default=True, description="one set of weights for all layers")
    heads: int = Field(default=1, ge=1)
    softmax: bool = False
    steps: int = Field(default=5000, ge=1)
    lr: float = Field(default=1e-3, gt=0)
    clip_grad: float = Field(default=1e-3, gt=0, description="norm of a model's gradient")
    clip: float = Field(default=0.0, ge=0, description="tokens stay within it; 0: no bound")


class Options(own.Options):
    """Section own.regression of paper.yaml."""

    arms: dict[str, Arm] = Field(min_length=1)
    inputs: int = Field(default=10, ge=1, description="entries of x")
    context: int = Field(default=10, ge=2, description="labelled tokens of a task")
    d_key: int = Field(default=11, ge=1)
    init_scale: float = Field(default=0.002, gt=0)
    batch_size: int = Field(default=2048, ge=2, description="tasks a step")
    n_tuning: int = Field(default=10_000, ge=2, description="tasks on which rates are tuned")
    n_test: int = Field(default=10_000, ge=2)
    n_sweep: int = Field(default=2000, ge=3, description="tasks of each point of a sweep")
    points: int = Field(default=50, ge=1, description="evaluations through training")
    rescale: float = Field(default=4.0, gt=1)
    sweeps: dict[str, list[float]] = Field(description="sizes of inputs, targets, laws")
    damping: float = Field(default=0.75, gt=0, le=1)
    iterations: int = Field(default=50, ge=1)
    seeds: list[int] = Field(min_length=1, description="of weights and data")


class Regression:
    """An experiment's settings, device and tasks."""

    def __init__(self, options: Options, device: torch.device) -> None:
        self.options, self.device = options, device
        self.test, self.tuning = (
            self.tasks(options.n_test, TEST),
            self.tasks(options.n_tuning, TUNING),
        )

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def tasks(self, n: int, seed: int, **more: float) -> Tasks:
        shape = (n, self.options.context, self.options.inputs)
        return attention.tasks(*shape, self.generator(seed), **more)

    def initial(self, arm: Arm) -> dict[str, Tensor]:
        """W_Q, W_K and W_V [seeds, layers, heads, d, d_key]; W_P, its last two exchanged."""
        o, sets = self.options, 1 if arm.recurrent else arm.layers
        d, out = o.inputs + 1, {}
        for name in "qkvp":
            fan_in = o.d_key * arm.heads if name == "p" else d
            deviation = math.sqrt(o.init_scale / arm.layers / fan_in) / attention.CUT
            shape = (sets, arm.heads, *((o.d_key, d) if name == "p" else (d, o.d_key)))
            drawn = []
            for seed in o.seeds:
                g = torch.Generator().manual_seed(1000 * seed + "qkvp".index(name))
                cut = {"std": deviation, "a": -2 * deviation, "b": 2 * deviation}
                drawn.append(torch.nn.init.trunc_normal_(torch.empty(shape), **cut, generator=g))
            out[name] = torch.stack(drawn).to(self.device)
        return out

    def layers(self, W: dict[str, Tensor], arm: Arm) -> Layers:
        """The models that some weights make."""
        how = {"softmax": arm.softmax, "d_key": self.options.d_key, "clip": arm.clip}
        return Layers(W["q"] @ W["k"].mT, W["v"] @ W["p"], arm.layers, **how)

    def train(self, arm: Arm, on_step: Callable[[int, Layers], None]) -> tuple[Layers, Layers]:
        """Models before and after training; `on_step` sees them before each step and at the end."""
        W = {name: w.requires_grad_() for name, w in self.initial(arm).items()}
        before = self.layers({name: w.detach().clone() for name, w in W.items()}, arm)
        adam = torch.optim.Adam(W.values(), lr=arm.lr)
        data = [self.generator(seed) for seed in self.options.seeds]
        shape = (self.options.batch_size, self.options.context, self.options.inputs)
        for step in range(arm.steps):
            with torch.no_grad():
                on_step(step, self.layers(W, arm))
            drawn = [attention.tasks(*shape, g) for g in data]
            tokens = torch.stack([t.tokens for t in drawn])
            target = torch.stack([t.target for t in drawn])
            with torch.enable_grad():
                loss = attention.half_square(self.layers(W, arm)(tokens), target).sum()
                gradients = torch.autograd.grad(loss, list(W.values()))
            squares = sum(g.square().flatten(1).sum(1) for g in gradients)
            share = (arm.clip_grad / squares.sqrt()).clamp(max=1)
            for w, g in zip(W.values(), gradients, strict=True):
                w.grad = g * share.view(-1, 1, 1, 1, 1)
            adam.step()
        after = self.layers({name: w.detach() for name, w in W.items()}, arm)
        on_step(arm.steps, after)
        return before, after

    def references(self, arm: Arm) -> dict[str, Layers]:
        """Gradient descent and GD++ of the arm's depth, at rates tuned on held-out tasks."""
        depth, inputs = arm.layers, self.options.inputs
        one = attention.closed_form(self.options.context, inputs)[0]
        sets = 1 if arm.recurrent else depth

        def plain(rates: Tensor) -> Layers:
            return attention.gradient_descent(rates[None], 0 * rates[None], inputs, depth)

        def plus(rates: Tensor) -> Layers:
            eta, gamma = rates[None, :sets], rates[None, sets:]
            return attention.gradient_descent(eta, gamma, inputs, depth)

        start = torch.full((depth,), one, device=self.device)
        shift = torch.full((sets,), one / 3, device=self.device)
        forms = {"gd": (plain, start), "gdpp": (plus, torch.cat([start[:sets], shift]))}
        return {name: form(self.tuned(form, first)) for name, (form, first) in forms.items()}

    def tuned(self, form: Callable[[Tensor], Layers], start: Tensor) -> Tensor:
        """Rates of least loss on the tuning tasks."""

        def loss(rates: Tensor) -> Tensor:
            predicted = form(rates)(self.tuning.tokens[None])
            return attention.half_square(predicted, self.tuning.target).sum()

        return attention.tuned(loss, start)


# --- what is measured ----------------------------------------------------------------------


cosine = partial(torch.nn.functional.cosine_similarity, dim=-1)


def gauge(layers: Layers) -> Layers:
    """The same models with A's diagonal over the inputs at a mean of 1, and O scaled back."""
    c = layers.A.diagonal(dim1=-2, dim2=-1)[..., :-1].mean(-1)[..., None, None]
    return replace(layers, A=layers.A / c, O=layers.O * c)


def used(layers: Layers) -> tuple[Tensor, Tensor]:
    """The weights that can reach a prediction, flat: of one layer the query's y is 0, and only y is
    read; of more layers, all."""
    one = layers.depth == 1
    read, written = layers.A[..., :-1, :], layers.O[..., -1:]
    return tuple(w.flatten(1) for w in ((read, written) if one else (layers.A, layers.O)))


def weight_cosine(layers: Layers, reference: Layers) -> Tensor:
    """Cosine of A ⊗ O with the construction's, which no gauge changes: [models]."""
    return math.prod(cosine(a, b) for a, b in zip(used(layers), used(reference), strict=True))


def alignment(layers: Layers, reference: Layers, given: Tasks) -> dict[str, Tensor]:
    """Cosines and distances of predictions and sensitivities, [models] each."""
    predicted, sensed = layers.sensitivities(given.tokens[None])
    wanted, reached = reference.sensitivities(given.tokens[None])
    return {
        "prediction_cosine": cosine(predicted, wanted),
        "prediction_distance": (predicted - wanted).abs().mean(-1),
        "sensitivity_cosine": cosine(sensed, reached).mean(-1),
        "sensitivity_distance": (sensed - reached).norm(dim=-1).mean(-1),
    }


def rows(seeds: list[int], **columns: Any) -> pd.DataFrame:
    """A row a seed, of columns [seeds], or of numbers that all of them share."""
    plain = {k: v.cpu().numpy() if isinstance(v, Tensor) else v for k, v in columns.items()}
    return pd.DataFrame({"seed": seeds, **plain})


def half_way(layers: Layers, target: Layers, rescale: float) -> dict[str, Layers]:
    """Weights half-way to the construction: with the gauge fixed, and in another gauge."""
    other = replace(layers, A=layers.A * rescale, O=layers.O / rescale)
    return {name: replace(one, A=(one.A + target.A) / 2, O=(one.O + target.O) / 2)
            for name, one in (("between", gauge(layers)), ("unfixed", other))}  # fmt: skip


def model_rows(layers: Layers, references: dict[str, Layers], world: Regression) -> pd.DataFrame:
    """Rows of the table models, of one arm."""
    given, options, gd = world.test, world.options, references["gd"]
    tokens, loss = given.tokens[None], partial(attention.half_square, target=given.target)
    losses = {"": loss(layers(tokens)), "shuffled_": loss(layers(given.shuffled().tokens[None]))}
    fixed = {"zero_": loss(0 * given.target), "lstsq_": loss(attention.least_squares(given))}
    fixed |= {f"{name}_": loss(made(tokens))[0] for name, made in references.items()}
    for name, factor in (("half", 0.5), ("double", 2.0)):
        fixed[f"gd_{name}_"] = loss(replace(gd, O=gd.O * factor)(tokens))[0]
    out = {f"{name}loss": value for name, value in losses.items()}
    out |= {f"{name}loss": float(value) for name, value in fixed.items()}
    for name, made in references.items():
        out |= {f"{name}_{k}": v for k, v in alignment(layers, made, given).items()}
    if not layers.softmax and layers.A.shape[1] == 1:
        best = references["gd" if layers.depth == 1 else "gdpp"]
        ways = half_way(layers, best, options.rescale)
        out |= {f"{name}_loss": loss(made(tokens)) for name, made in ways.items()}
        out |= {"weight_cosine": weight_cosine(layers, best)}
    eta, gamma = (-references["gdpp"].O[0, :, 0, i, i] for i in (-1, 0))
    _, step, zero = attention.closed_form(options.context, options.inputs)
    out |= {"eta": float(eta[0]), "gamma": float(gamma[0])}
    out |= {"theory_loss": step, "theory_zero_loss": zero}
    return rows(options.seeds, **out)


def weight_rows(layers: Layers, seeds: list[int]) -> pd.DataFrame:
    """Rows of the table weights, the gauge fixed."""
    fixed, parts = gauge(layers), []
    for name in ("A", "O"):
        values = getattr(fixed, name)[:, 0, 0].cpu().numpy()
        seed, row, column = np.indices(values.shape).reshape(3, -1)
        place = {"seed": np.asarray(seeds)[seed], "matrix": name, "row": row, "column": column}
        parts.append(pd.DataFrame(place | {"value": values.ravel()}))
    return pd.concat(parts)


def sweep_rows(made: dict[str, tuple[Layers, list[int]]], world: Regression) -> pd.DataFrame:
    """Rows of the table sweeps: losses of several predictors, and of least squares and 0.

    Args:
        made: predictor -> its models, and their seeds.
    """
    parts, options = [], world.options
    for quantity, sizes in options.sweeps.items():
        for size in sizes:
            shape = (options.n_sweep, options.context, options.inputs)
            if quantity == "laws":
                given = attention.other_tasks(*shape, world.generator(SWEEP), size)
            else:
                key = {"inputs": "reach", "targets": "weights"}[quantity]
                given = attention.tasks(*shape, world.generator(SWEEP), **{key: size})
            found = {name: (m(given.tokens[None]), seeds) for name, (m, seeds) in made.items()}
            found["least_squares"] = (attention.least_squares(given)[None], [-1])
            found["zero"] = (0 * given.target[None], [-1])
            for name, (predicted, seeds) in found.items():
                loss = attention.half_square(predicted, given.target)
                parts.append(rows(seeds, loss=loss).assign(
                    quantity=quantity, size=size, predictor=name))  # fmt: skip
    return pd.concat(parts)


def iterated_rows(
    made: dict[str, tuple[Layers, list[int]]], given: Tasks, options: Options
) -> pd.DataFrame:
    """Rows of the table iterated: the loss after each application of one layer."""
    parts = []
    for name, (layers, seeds) in made.items():
        again = replace(layers, damping=options.damping, only_y=True)
        predicted = again.steps(given.tokens[None], options.iterations)
        losses = attention.half_square(predicted, given.target)
        for step, loss in enumerate(losses, 1):
            parts.append(rows(seeds, loss=loss).assign(predictor=name, step=step))
    return pd.concat(parts)


# --- the stage -----------------------------------------------------------------------------


def of_arm(name: str, arm: Arm, world: Regression, out: own.Tables, progress: cli.Progress) -> None:
    """The rows of one arm, in every table."""
    options, test = world.options, world.test
    references = world.references(arm)
    some = Tasks(test.tokens[: options.n_sweep], test.target[: options.n_sweep])
    every = max(1, arm.steps // options.points)
    known = {f"{r}_loss": float(attention.half_square(m(some.tokens[None]), some.target)[0])
             for r, m in references.items()}  # fmt: skip

    def on_step(step: int, layers: Layers) -> None:
        if step % every == 0 or step == arm.steps:
            loss = attention.half_square(layers(some.tokens[None]), some.target)
            made = {"step": step, "loss": loss, **known}
            for r, m in references.items():
                made |= {f"{r}_{k}": v for k, v in alignment(layers, m, some).items()}
            out.add({"curves": rows(options.seeds, **made)}, arm=name)
        progress.add()

    before, after = world.train(arm, on_step)
    models = {name: after, f"untrained_{name}": before}
    for title, layers in models.items():
        out.add({"models": model_rows(layers, references, world)}, arm=title)
    swept = {"model": (after, options.seeds), "untrained": (before, options.seeds)}
    swept |= {r: (m, [-1]) for r, m in references.items()}
    if not arm.softmax and arm.recurrent:
        best = references["gd" if arm.layers == 1 else "gdpp"]
        middle = half_way(after, best, options.rescale)["between"]
        swept["between"] = (middle, options.seeds)
        out.add({"weights": weight_rows(after, options.seeds)}, arm=name)
        out.add({"weights": weight_rows(best, [-1])}, arm=name)
    out.add({"sweeps": sweep_rows(swept, world)}, arm=name)
    if arm.layers == 1 and not arm.softmax:
        once = {k: swept[k] for k in ("model", "untrained", "gd", "between")}
        out.add({"iterated": iterated_rows(once, test, options)}, arm=name)


def work(job: cli.Job, options: Options) -> own.Tables:
    world, out = Regression(options, job.device()), own.Tables(TABLES)
    total = sum(arm.steps + 1 for arm in options.arms.values())
    progress = cli.Progress("regression", total, "steps")
    with torch.no_grad():
        for name, arm in options.arms.items():
            of_arm(name, arm, world, out, progress)
    return out
