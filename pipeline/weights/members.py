"""The members of a training run, and one step of all of them. [torch]

1. A member is an arm with a seed. Its weights are one row of a tensor [members n] (flat.py).
2. A step takes the batch of (seed, step), computes the gradient of the mean loss (forward.py), and
   updates the rows by AdamW (adamw.py).
3. On a GPU the whole step is captured once as a CUDA graph and replayed.
4. At some steps the members are evaluated (curves.py).
"""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from pipeline.spec.training import TrainingSpec
from pipeline.weights import batches
from pipeline.weights.adamw import AdamW
from pipeline.weights.batches import Batches
from pipeline.weights.curves import HISTORY, Curves
from pipeline.weights.forward import Forward
from pipeline.weights.initial import build, initial

WARM_UP = 3  # steps before the capture, as PyTorch asks for


class Members:
    """All members of a run.

    Args:
        data: one per member, in the order of spec.members().
        start: name -> weight of the model that all members start from; empty: each draws its own.

    Attributes:
        flat: trained weights, [members n].
        forward: the model as a function of weights.
        optimiser: AdamW and its moments.
        curves: what the evaluations gave.
    """

    name = "members"  # the name of their file in a checkpoint

    def __init__(
        self,
        spec: TrainingSpec,
        data: list[Batches],
        device: torch.device,
        start: dict[str, Tensor] | None = None,
    ) -> None:
        self.spec, self.data, self.device = spec, data, device
        self.forward = Forward(spec, data[0], device, start)
        drawn = [self._first(arm, seed) for _, arm, seed in spec.members()]
        self.flat = torch.stack(drawn).to(device).requires_grad_()
        self.optimiser = AdamW(spec, self.flat.detach(), self.forward.layout)
        self.curves = Curves(spec, data, self.flat)
        if spec.compile and device.type == "cuda":
            self.forward.compile(self.flat, *self.batch(0))
        self._graph: Any = None
        self._batch: list[Tensor] = []  # where the graph reads its batch

    def _first(self, arm: str, seed: int) -> Float[Tensor, " n"]:
        """The first weights of a member."""
        if self.spec.lora:
            return self.forward.layout.drawn(*self.spec.low_rank(arm), seed)
        if self.spec.start:
            return self.forward.layout.flat(self.forward.model).cpu()
        model = build(self.spec.architecture, self.data[0].d_vocab).float()
        initial(model, self.spec.architecture, seed)
        return self.forward.layout.flat(model)

    # store.checkpoints.Trained
    def tensors(self) -> dict[str, Tensor]:
        return {
            "flat": self.flat.detach().cpu(),
            "mean": self.optimiser.mean.cpu(),
            "square": self.optimiser.square.cpu(),
            "best": self.curves.best.cpu(),
            "best_loss": self.curves.best_loss,
            "rows": torch.tensor(self.curves.rows, dtype=torch.float64).view(-1, len(HISTORY)),
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        self.flat.copy_(state["flat"])
        self.optimiser.mean.copy_(state["mean"])
        self.optimiser.square.copy_(state["square"])
        self.curves.best.copy_(state["best"])
        self.curves.best_loss = state["best_loss"]
        self.curves.rows = [tuple(row) for row in state["rows"].tolist()]

    def batch(
        self, step: int
    ) -> tuple[Int64[Tensor, "members batch pos"], Int64[Tensor, "members batch pos"]]:
        """Tokens and targets of a step."""
        pairs = [d.batch(step) for d in self.data]
        return torch.stack([t for t, _ in pairs]), torch.stack([t for _, t in pairs])

    def step(self, step: int) -> None:
        """The update from step to step + 1."""
        if self.spec.architecture.dropout:
            torch.manual_seed(batches.seeded(self.spec.seeds[0], step))  # seeds the dropout masks
        if self.device.type != "cuda":
            self._update(*self.batch(step))
            return
        if self._graph is None:
            self._capture(step)
        elif not self.data[0].constant:
            for held, new in zip(self._batch, self.batch(step), strict=True):
                held.copy_(new)
        self._graph.replay()

    def _update(self, tokens: Tensor, targets: Tensor) -> None:
        """One update on a batch."""
        self.optimiser.step(self.flat, self.forward.gradient(self.flat, tokens, targets))

    def _capture(self, step: int) -> None:
        """Capture an update as a CUDA graph; the state is afterwards what it was before."""
        self._batch = [t.clone() for t in self.batch(step)]
        state = [self.flat, self.optimiser.mean, self.optimiser.square, self.optimiser.count]
        before = [t.detach().clone() for t in state]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._update(*self._batch)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._update(*self._batch)
        with torch.no_grad():
            for now, then in zip(state, before, strict=True):
                now.copy_(then)

    def evaluate(self, step: int) -> None:
        """Evaluate all members after `step` updates."""
        self.curves.evaluate(self.forward, self.flat, step)

    def state_dict(self) -> dict[str, Tensor]:
        """Name -> [members …] of the weights as they are now."""
        return self.forward.state_dict(self.flat)
