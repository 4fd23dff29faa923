"""Training steps as CUDA graphs: launching a step's kernels one by one takes longer than running
them.

A step can be captured if it runs the same kernels on every call and never waits for the GPU. Its
shapes depend on the capacity for dead latents (sae/dead.py), so that there is one graph for each
capacity that occurs.
"""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.job import cli
from pipeline.sae.sparse import Scratch
from pipeline.sae.steps import Outcome

# Steps that run without a graph first: they compile the kernels and let the scratch memory, which
# all dictionaries share, reach its final size, because a graph keeps fixed addresses.
EAGER_STEPS = 3


class RecordedStep:
    """One step, captured as a CUDA graph.

    Args:
        step: takes a batch and says what it did, by the same kernels on every call.
        x: a batch; it is not trained on while the step is captured.
        others: graphs to share memory with, none of which runs at the same time; the new graph is
            appended.
    """

    def __init__(
        self, step: Callable[[Tensor], Outcome], x: Tensor, others: list[torch.cuda.CUDAGraph]
    ) -> None:
        self.x, self.graph = x.clone(), torch.cuda.CUDAGraph()
        pool = others[0].pool() if others else None
        torch.cuda.synchronize()
        # thread_local: other threads read the next rows into page-locked memory meanwhile
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.outcome = step(self.x)
        others.append(self.graph)

    def __call__(self, x: Tensor) -> Outcome:
        """Train on a batch. The outcome lies in memory that the next call of any graph reuses."""
        self.x.copy_(x)
        self.graph.replay()
        return self.outcome


class StepGraphs:
    """The graphs of one dictionary.

    Args:
        name: the dictionary's name, for the log.

    Attributes:
        recorded: capacity for dead latents -> its step.
        recording: False once capturing has failed; steps then run without graphs.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.recorded: dict[int, RecordedStep] = {}
        self.recording = True
        self._eager_steps: Counter[int] = Counter()  # capacity -> steps without a graph

    def run(
        self, step: Callable[[Tensor], Outcome], x: Tensor, capacity: int, scratch: Scratch
    ) -> Outcome:
        """Run a step by its graph, which is captured after EAGER_STEPS steps without one."""
        self._eager_steps[capacity] += 1
        warm = self._eager_steps[capacity] > EAGER_STEPS
        if self.recording and warm and capacity not in self.recorded:
            try:
                self.recorded[capacity] = RecordedStep(step, x, scratch.recordings)
            except RuntimeError as e:
                cli.log.info("%s: steps cannot be recorded (%s)", self.name, str(e).splitlines()[0])
                self.recording = False
        return self.recorded.get(capacity, step)(x)
