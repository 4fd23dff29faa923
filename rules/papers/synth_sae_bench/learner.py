"""A dictionary in training whose every step is one launch, and the controller of its L0.

1. `Learner` is a `Dictionary` (pipeline/sae/train.py) whose state lies on its device, the
   coefficient and its controller included, and whose products are dense on a GPU, so that a step of
   any architecture can be a CUDA graph.
2. `Tuner` moves the coefficient of standard, gated and jumprelu until L0 is what is asked for, as
   the authors' released code does (synth-sae-bench-experiments, coefficient_autotuner).
"""

from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from pipeline.sae.graphs import StepGraphs
from pipeline.sae.optimiser import coefficients
from pipeline.sae.sparse import Scratch
from pipeline.sae.steps import Outcome
from pipeline.sae.train import FAST, Dictionary
from pipeline.spec.base import Section
from pipeline.spec.sae import SaeTraining


class Control(Section):
    """The controller's constants; the defaults are the released code's, for 195,312 steps."""

    gain: float = Field(default=3e-4, gt=0, lt=1)
    approaching: float = Field(default=0.01, gt=0, le=1, description="while L0 nears its target")
    smoothing: float = Field(default=0.99, ge=0, lt=1, description="of L0, exponential")
    rate_smoothing: float = Field(default=0.95, ge=0, lt=1, description="of its change a step")
    bounds: tuple[float, float] = (1e-2, 100.0)


@dataclass(frozen=True)
class Target:
    """How the coefficient of one dictionary finds its L0.

    Its multiplier m starts at 1. From `start` on, m <- m (1 +- gain g tanh(10 |e|)), where
    e = (smoothed L0 - l0) / l0, up where L0 is too high; g is `approaching` while L0 moves towards
    its target, else 1.
    """

    coefficient: float  # times m
    l0: float
    start: int  # step; until then the coefficient rises from 0
    control: Control


class Tuner:
    """The controller of one coefficient; its state is a float64 tensor on the device."""

    def __init__(self, target: Target, device: Any) -> None:
        self.target = target
        self.state = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64, device=device)

    def coefficient(self) -> Tensor:
        """The coefficient of the step to come: []."""
        done, _, _, multiplier = self.state
        rise = (done / self.target.start).clamp(max=1.0) if self.target.start else 1.0
        return (self.target.coefficient * multiplier * rise).float()

    def update(self, l0: Tensor) -> None:
        """Take in the L0 of the step that was done: []."""
        c, (done, smooth, rate, multiplier) = self.target.control, self.state
        first, l0 = done == 0, l0.double()
        moved = torch.where(first, l0, c.smoothing * smooth + (1 - c.smoothing) * l0)
        change = (moved - smooth) * ~first
        rate = c.rate_smoothing * rate + (1 - c.rate_smoothing) * change
        error = moved - self.target.l0
        gain = c.gain * (1 - (1 - c.approaching) * (error * rate < 0))
        by = gain * (10 * error.abs() / self.target.l0).tanh() * error.sign()
        tuned = (multiplier * (1 + by)).clamp(*c.bounds)
        multiplier = torch.where(done >= self.target.start, tuned, multiplier)
        self.state.copy_(torch.stack([done + 1, moved, rate, multiplier]))


class Learner(Dictionary):
    """A Dictionary that is trained on samples as they are drawn.

    Args:
        about: dictionary, seed and architecture.
        scale: what x is multiplied by before it is encoded.
        target: of L0, where a coefficient decides it.
    """

    LR_KEY = "own.recovery.lr"

    def __init__(
        self, about: dict, sae: Any, training: SaeTraining, *, scale: float, target: Target | None
    ) -> None:
        self.about, name = about, f"{about['dictionary']}_seed{about['seed']}"
        n_steps, device = training.n_rows // training.batch_size, sae.W_dec.device
        super().__init__(name, sae, training, n_steps, FAST[sae.cfg.architecture()])
        self.scale, self.tuner = scale, Tuner(target, device) if target else None
        self.target_l0 = 0.0  # what the recipe asks for
        self.scratch = Scratch()  # its own, which its graphs keep
        self.graphs = StepGraphs(name)
        self.graphs.recording = self.scratch.dense = device.type == "cuda"

    def step(self, x: Tensor, step: int, scratch: Scratch) -> Outcome:
        """Train on one batch [batch d_in]; `step` counts from 0."""
        return super().step(x, step, self.scratch)

    def _update(
        self, x: Tensor, step: int, dead: Tensor | None, scratch: Scratch, **more: Any
    ) -> Outcome:
        """Gradients, Adam, the counts of silent rows and the controller."""
        given = coefficients(self.sae, 0)
        if self.tuner:
            given = dict.fromkeys(given, self.tuner.coefficient())
        scaled = x * self.scale if self.scale != 1 else x
        outcome = self.gradients(
            self.sae, scaled, dead=dead, coefficients=given, step=0, scratch=scratch, **more
        )
        self.optimiser.step()
        self.dead.count(outcome.fired, len(x))
        if self.tuner:
            self.tuner.update(outcome.l0)
        return outcome

    def record(self, outcome: Outcome, x: Tensor, step: int, scale: float) -> None:
        """Add the batch of a step to the history; mse in the unit of the samples."""
        super().record(outcome, x * self.scale, step, self.scale)

    def tensors(self) -> dict[str, Tensor]:
        """All that training changes, on the CPU, for a checkpoint."""
        return super().tensors() | ({"tuner": self.tuner.state.cpu()} if self.tuner else {})

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `tensors` gave."""
        super().restore(tensors)
        if self.tuner:
            self.tuner.state.copy_(tensors["tuner"])
