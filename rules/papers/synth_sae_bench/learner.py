"""A dictionary in training whose every step is one launch, and the controller of its L0.

1. `Learner` is a `Dictionary` (pipeline/sae/train.py) whose state lies on its device, the
   coefficient and its controller included. On a GPU a step of STEPS (steps.py) is recorded once as
   a CUDA graph and replayed: at 1,024 rows a step, launching its kernels one by one takes longer
   than running them. The first replay is held against the plain step, which is used where they
   differ or where nothing can be recorded.
2. AuxK runs over as many latents as can be dead before the host looks again, a power of two, and
   is left out while none can: one graph for each such capacity (pipeline/sae/dead.py).
3. Dictionaries may have CUDA streams of their own: a step's kernels are short, so those of several
   dictionaries fill the GPU better than those of one. Their numbers do not depend on it.
4. `Tuner` moves the coefficient of standard, gated and jumprelu until L0 is what is asked for, as
   the authors' released code does (synth-sae-bench-experiments, coefficient_autotuner).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from pipeline.errors import RetraceError
from pipeline.job import cli
from pipeline.job.source import import_file
from pipeline.sae.optimiser import coefficients
from pipeline.sae.sparse import Scratch
from pipeline.sae.steps import Outcome
from pipeline.sae.train import Dictionary
from pipeline.spec.paper import Section
from pipeline.spec.sae import SaeTraining

steps = import_file(Path(__file__).parent / "steps.py")
WARM_UP = 3  # plain steps before a graph is recorded, as PyTorch asks for
# Of the norm of a parameter's change. Adam's first step has the sign of every gradient, however
# small, so rounding shows; a step that is wrong is off by a half and more.
AGREEMENT = 0.1


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
    """A Dictionary that is shown samples as they are drawn.

    Args:
        about: dictionary, seed and architecture.
        scale: what x is multiplied by before it is encoded.
        target: of L0, where a coefficient decides it.
    """

    def __init__(
        self, about: dict, sae: Any, training: SaeTraining, *, scale: float, target: Target | None
    ) -> None:
        self.about, name = about, f"{about['dictionary']}_seed{about['seed']}"
        n_steps = training.n_rows // training.batch_size
        own = steps.STEPS.get(sae.cfg.architecture())
        super().__init__(name, sae, training, n_steps, own)
        self.device, self.scale = sae.W_dec.device, scale
        self.tuner = Tuner(target, self.device) if target else None
        self.bad = torch.zeros((), dtype=torch.bool, device=self.device)
        self.own_step, self.scratch = own is not None, Scratch()
        self.target_l0 = 0.0  # what the recipe asks for
        self.x: Tensor | None = None  # where every graph reads its batch
        self.stream: Any = None  # a CUDA stream of its own; None: the current one
        self.recorded: dict[int, Any] = {}  # capacity for dead latents -> a graph and its Outcome
        self.recording = self.own_step and self.device.type == "cuda"

    def step(self, x: Tensor, step: int, scratch: Scratch) -> Outcome:
        """Train on one batch [batch d_in]; `step` counts from 0."""
        if self.stream is None:
            return self._step(x, step)
        self.stream.wait_stream(torch.cuda.current_stream())
        x.record_stream(self.stream)  # its memory is not given away before it was read
        with torch.cuda.stream(self.stream):
            return self._step(x, step)

    def _step(self, x: Tensor, step: int) -> Outcome:
        if self.own_step and hasattr(self.sae.cfg, "aux_loss_coefficient"):
            self.dead_capacity(step, len(x))
        if not self.recording:
            return self.whole(x)
        room = self.dead.capacity or 0
        if room not in self.recorded:
            self.recorded[room] = self.record_graph(x)
        if not self.recording:
            return self.whole(x)
        graph, outcome = self.recorded[room]
        self.x.copy_(x)
        graph.replay()
        return outcome

    def whole(self, x: Tensor) -> Outcome:
        """A step, all of it on the device."""
        given, fixed = {}, coefficients(self.sae, 0)
        for name in fixed:
            given[name] = self.tuner.coefficient() if self.tuner else fixed[name]
        capacity = self.dead.capacity if self.own_step else None
        room = {"room": capacity} if capacity else {}
        outcome = self.gradients(
            self.sae,
            x * self.scale if self.scale != 1 else x,
            dead=self.dead.mask if room or not self.own_step else None,
            coefficients=given,
            step=0,
            scratch=self.scratch,
            **room,
        )
        self.optimiser.clip()
        self.optimiser.adam.step()
        if not self.own_step:
            self.optimiser.adam.zero_grad()
        self.dead.count(outcome.fired, len(x))
        self.bad |= ~outcome.loss.isfinite()
        if self.tuner:
            self.tuner.update(outcome.l0)
        return outcome

    def record_graph(self, x: Tensor) -> tuple[Any, Outcome] | None:
        """A CUDA graph of `whole`, checked against it; None, and no recording, where it fails."""
        self.x = x.clone() if self.x is None else self.x.copy_(x)
        before = {name: t.clone() for name, t in self.live().items()}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.whole(self.x)
                self.put_back(before)
            self.whole(self.x)
        torch.cuda.current_stream().wait_stream(side)
        plain = {n: p.detach().clone() for n, p in self.optimiser.trained.items()}
        self.put_back(before)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool(), stream=self.stream):
                outcome = self.whole(self.x)
            graph.replay()
        except RuntimeError as e:
            return self.without_graph(str(e).splitlines()[0], before)
        for name, want in plain.items():
            off = (self.optimiser.trained[name].detach() - want).norm()
            if not off <= AGREEMENT * (want - before[f"sae.{name}"]).norm():
                return self.without_graph(f"{name} is off by {off.item():.3g}", before)
        self.put_back(before)
        return graph, outcome

    def pool(self) -> Any:
        """The memory that this dictionary's graphs share; no two of them run at once."""
        return next((graph.pool() for graph, _ in self.recorded.values()), None)

    def without_graph(self, why: str, before: dict[str, Tensor]) -> None:
        """Go on with plain steps."""
        cli.log.info("%s: no CUDA graph (%s); steps are launched one by one", self.name, why)
        self.recording = False
        self.put_back(before)

    def live(self) -> dict[str, Tensor]:
        """Every tensor that a step changes, itself and not a copy."""
        out = {f"sae.{n}": t.detach() for n, t in self.sae.state_dict(keep_vars=True).items()}
        out |= self.optimiser.tensors()
        out |= {"silent": self.dead.rows_since_fired, "bad": self.bad}
        return out | ({"tuner": self.tuner.state} if self.tuner else {})

    def put_back(self, before: dict[str, Tensor]) -> None:
        """Set the live tensors to what they were; those that were not yet there, to zero."""
        for name, tensor in self.live().items():
            tensor.copy_(before[name]) if name in before else tensor.zero_()

    def check(self) -> None:
        """Wait for the steps that were launched; raise where a loss was NaN or infinite."""
        if self.stream is not None:
            self.stream.synchronize()
        if self.bad:
            raise RetraceError(
                f"dictionary '{self.name}': the loss is not finite; lower own.recovery.lr"
            )

    def record(self, outcome: Outcome, x: Tensor, step: int, scale: float) -> None:
        """Add the batch of a step to the history; mse in the unit of the samples."""
        super().record(outcome, x * self.scale, step, self.scale)

    def tensors(self) -> dict[str, Tensor]:
        """All that training changes, on the CPU, for a checkpoint."""
        out = super().tensors() | {"bad": self.bad.cpu()}
        return out | ({"tuner": self.tuner.state.cpu()} if self.tuner else {})

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `tensors` gave."""
        super().restore(tensors)
        self.bad.copy_(tensors["bad"])
        if self.tuner:
            self.tuner.state.copy_(tensors["tuner"])


def overlap(some: list[Learner], n: int) -> None:
    """Give dictionaries on a GPU one of n CUDA streams each, in turn; 1: they share the current."""
    if n > 1 and some[0].device.type == "cuda":
        streams = [torch.cuda.Stream() for _ in range(n)]
        for i, one in enumerate(some):
            one.stream = streams[i % n]
