"""Training steps as CUDA graphs: launching a step's kernels one by one takes longer than running
them.

A step can be captured if it runs the same kernels on every call and never waits for the GPU. Its
shapes depend on the capacity for dead latents (sae/dead.py), so that there is one graph for each
capacity that occurs.

Many kernels of a step are too short to fill a GPU. So dictionaries take turns on a few CUDA streams
(Lanes), on which graphs of several run side by side; no number depends on it.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from pipeline.job import cli
from pipeline.sae.sparse import Scratch
from pipeline.sae.steps import Outcome

# Steps of a kind that run without a graph first: they compile the kernels and let the scratch
# memory, which dictionaries share, reach its final size, because a graph keeps fixed addresses.
# Every dictionary takes one at least, in which its own state is made.
EAGER_STEPS = 3
# CUDA streams of many dictionaries, and bytes of the [batch d_sae] matrices of all streams.
LANES, LANES_BYTES = 8, 1 << 30


class RecordedStep:
    """One step, captured as a CUDA graph.

    Args:
        step: takes a batch and says what it did, by the same kernels on every call.
        x: where every batch is copied to; it is not trained on while the step is captured.
        others: graphs to share memory with, none of which runs at the same time; the new graph is
            appended.
    """

    def __init__(
        self, step: Callable[[Tensor], Outcome], x: Tensor, others: list[torch.cuda.CUDAGraph]
    ) -> None:
        self.x, self.graph = x, torch.cuda.CUDAGraph()
        pool = others[0].pool() if others else None
        torch.cuda.synchronize()
        # thread_local: other threads read the next rows into page-locked memory meanwhile
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.outcome = step(self.x)
        others.append(self.graph)

    def __call__(self, x: Tensor) -> Outcome:
        """Train on a batch. The outcome lies in memory that the next call of any graph reuses."""
        if x is not self.x:
            self.x.copy_(x)
        self.graph.replay()
        return self.outcome


class StepGraphs:
    """The graphs of one dictionary.

    Args:
        name: the dictionary's name, for the log.
        kind: what dictionaries whose steps run the same kernels have in common; default: name.

    Attributes:
        recorded: capacity for dead latents -> its step.
        recording: False once capturing has failed; steps then run without graphs.
    """

    def __init__(self, name: str, kind: Hashable = None) -> None:
        self.name, self.kind = name, name if kind is None else kind
        self.recorded: dict[int, RecordedStep] = {}
        self.recording = True
        self._begun: set[int] = set()  # capacities with which a step ran

    def run(
        self, step: Callable[[Tensor], Outcome], x: Tensor, capacity: int, scratch: Scratch
    ) -> Outcome:
        """Run a step by its graph, which is captured after EAGER_STEPS of its kind without one."""
        kind = (self.kind, tuple(x.shape), capacity)
        warm = capacity in self._begun and scratch.eager_steps[kind] >= EAGER_STEPS
        if self.recording and warm and capacity not in self.recorded:
            try:
                held = scratch.held(x)
                self.recorded[capacity] = RecordedStep(step, held, scratch.recordings)
            except RuntimeError as e:
                cli.log.info("%s: steps cannot be recorded (%s)", self.name, str(e).splitlines()[0])
                self.recording = False
        if capacity in self.recorded:
            return self.recorded[capacity](scratch.held(x))
        self._begun.add(capacity)
        scratch.eager_steps[kind] += 1
        return step(x)


class Lanes:
    """The CUDA streams on which dictionaries take turns, each with its scratch memory.

    A single dictionary, and any number without a GPU, stay on the current stream.

    Args:
        half: see Scratch.
        n_dictionaries: how many take turns.
        n_scores: batch times d_sae of the widest.
        device: theirs.
    """

    def __init__(
        self, half: bool, n_dictionaries: int, n_scores: int, device: torch.device
    ) -> None:
        fit = max(1, LANES_BYTES // (n_scores * (2 if half else 4)))
        n = min(LANES, n_dictionaries, fit) if device.type == "cuda" else 1
        self.device, self.scratch = device, [Scratch(half) for _ in range(n)]
        self.streams = [torch.cuda.Stream(device) for _ in range(n)] if n > 1 else []

    @contextmanager
    def batch(self, x: Tensor) -> Iterator[Tensor]:
        """A batch on this device, which is the current one inside.

        What is launched inside comes after all before it, and before all behind it.
        """
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            shown = x.to(self.device, non_blocking=True)
            for stream in self.streams:
                stream.wait_stream(torch.cuda.current_stream(self.device))
            yield shown
            for stream in self.streams:
                torch.cuda.current_stream(self.device).wait_stream(stream)

    @contextmanager
    def of(self, i: int) -> Iterator[Scratch]:
        """The scratch memory of dictionary `i`, whose kernels run on its stream inside."""
        scratch = self.scratch[i % len(self.scratch)]
        if not self.streams:
            yield scratch
            return
        with torch.cuda.stream(self.streams[i % len(self.streams)]):
            yield scratch
