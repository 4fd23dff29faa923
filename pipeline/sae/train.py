"""Train dictionaries that share a stream: each batch is read once and shown to every one of them.

1. Torch, numpy and random are seeded with the dictionary's own seed before SAELens builds it
   (SAELens reads no seed of its own), so its initial weights do not depend on the other
   dictionaries. Decoder rows point in random directions, and W_enc is W_dec transposed (SAELens,
   `decoder_init_norm`).
2. b_dec starts at the geometric median of a sample (Gao et al. 2024, App. A.1).
3. A step computes the gradients of a batch (FAST), clips them, and takes a step of Adam
   (sae/optimiser.py).
4. The step counts for each latent the rows since it last fired (sae/dead.py); AuxK trains the dead
   latents, and at `resample_steps` they get new directions (sae/dead.py).
5. On a GPU, steps that never wait for it run as CUDA graphs (sae/graphs.py).
6. A frozen decoder (null arm) keeps its random directions, at norm 1; the rest trains.
"""

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.errors import RetraceError
from pipeline.job import cli
from pipeline.sae import dead as dead_latents
from pipeline.sae import steps, steps_batch, steps_gates
from pipeline.sae.fused import FusedStep, suits
from pipeline.sae.graphs import Lanes, StepGraphs
from pipeline.sae.optimiser import Optimiser, coefficients, learning_rate, with_prefix
from pipeline.sae.sparse import Scratch
from pipeline.sae.transcoder import training_class
from pipeline.spec.sae import SaeSpec, SaeTraining

HISTORY = ("step", "rows", "lr", "mse", "explained_variance", "l0", "dead_share", "loss")
N_RECORDS = 100  # entries of a history, about
STATIC = steps.STATIC | steps_batch.STATIC
FAST = steps.FAST | steps_batch.FAST | steps_gates.FAST


@runtime_checkable
class Batches(Protocol):
    """Where batches come from, as sae/stream.py's Stream.

    Attributes:
        batch_size: rows per batch.
        target_scale: factor by which the rows that are reconstructed were multiplied.
    """

    batch_size: int
    target_scale: float

    def batches(self, first: int, last: int) -> Iterator[Tensor]:
        """Batches first to last - 1."""


def build(
    spec: SaeSpec,
    d_in: int,
    *,
    d_out: int | None = None,
    normalize: str = "none",
    metadata: dict | None = None,
    variant: Callable[[type], type] | None = None,
) -> Any:
    """A SAELens TrainingSAE on the CPU, its initial weights a function of the spec alone.

    Args:
        d_out: width of the rows that a transcoder reconstructs; default: d_in.
        normalize: SAELens's `normalize_activations`, which saving folds into the weights.
        metadata: fields of SAELens's SAEMetadata.
        variant: makes the class that is built out of SAELens's (crosscoders/model.py).
    """
    from sae_lens.registry import get_sae_training_class
    from sae_lens.saes.sae import SAEMetadata

    random.seed(spec.seed)
    np.random.seed(spec.seed)
    torch.manual_seed(spec.seed)
    sae_class, config_class = get_sae_training_class(spec.architecture)
    known = {f.name for f in fields(config_class)}
    options = spec.model_dump() | {
        "l1_warm_up_steps": spec.l1_warmup_steps,
        "l0_warm_up_steps": spec.l0_warmup_steps,
        "matryoshka_widths": spec.widths,
        "max_iterations": spec.k,  # matching pursuit
    }
    if spec.architecture == "matching_pursuit":
        options["decoder_init_norm"] = 1.0  # its only choice
    if spec.output_hook:
        sae_class = training_class(sae_class, d_out or d_in)
        options["apply_b_dec_to_input"] = False
    sae_class = variant(sae_class) if variant else sae_class
    config = config_class(
        d_in=d_in,
        normalize_activations=normalize,
        metadata=SAEMetadata(**(metadata or {})),
        **{name: value for name, value in options.items() if name in known},
    )
    sae = sae_class(config)
    if spec.frozen_decoder:
        sae.W_dec.data /= sae.W_dec.data.norm(dim=1, keepdim=True)
        sae.W_dec.requires_grad_(False)
    return sae


class Dictionary:
    """One dictionary in training.

    Args:
        name: the dictionary's name, for messages and checkpoints.
        sae: a SAELens TrainingSAE on its device.
        training: the schedule.
        n_steps: steps of the whole run.
        step: computes the gradients of a batch; default: the fast step of its architecture, or
            SAELens's own where there is none.
        spec: says when dead latents are resampled; default: never.

    Attributes:
        optimiser: Adam and its state.
        fused: the step that stores no gradient; None where `gradients` and `optimiser` are used.
        dead: which latents are dead.
        graphs: CUDA graphs of the step; None if a step may wait for the device.
    """

    LR_KEY = "sae.training.lr"  # of paper.yaml

    def __init__(
        self,
        name: str,
        sae: Any,
        training: SaeTraining,
        n_steps: int,
        step: Callable[..., steps.Outcome] | None = None,
        spec: SaeSpec | None = None,
    ) -> None:
        self.name, self.sae, self.training, self.n_steps = name, sae, training, n_steps
        self.spec = spec
        self.gradients = step or FAST.get(sae.cfg.architecture(), steps.reference)
        device = sae.W_dec.device
        on_gpu = device.type == "cuda"
        if on_gpu and self.gradients in FAST.values() and hasattr(sae, "W_enc"):
            # The fast steps give W_enc's gradient transposed; Adam is fastest on equal layouts.
            sae.W_enc.data = sae.W_enc.data.T.contiguous().T
        self.optimiser = Optimiser(sae, training)
        fused = on_gpu and step is None and suits(sae, training)
        self.fused = FusedStep(sae, self.optimiser, training) if fused else None
        self.dead = dead_latents.DeadLatents(sae.cfg.d_sae, training, n_steps, device)
        kind = (self.gradients, repr(sae.cfg), self.fused is None)
        self.graphs = StepGraphs(name, kind) if on_gpu and self.gradients in STATIC else None
        self._history: list[list[float]] = []
        self._unread: list[tuple[list[float], float, Tensor]] = []
        self._unchecked: list[tuple[int, Tensor]] = []  # step, loss

    def step(self, x: Float[Tensor, "batch d"], step: int, scratch: Scratch) -> steps.Outcome:
        """Train on one batch; `step` counts from 0."""
        self.optimiser.set_learning_rate(learning_rate(step, self.n_steps, self.training))
        if self.graphs is None:
            outcome = self._update(x, step, self.dead.mask_if_any(), scratch)
        else:
            outcome = self._step_without_waiting(self.graphs, x, step, scratch)
        self.dead.rows_seen += len(x)
        self._unchecked.append((step, outcome.loss.clone()))
        return outcome

    def _step_without_waiting(
        self, graphs: StepGraphs, x: Tensor, step: int, scratch: Scratch
    ) -> steps.Outcome:
        """A step of STATIC, on as many latents in AuxK as can be dead."""
        capacity = self.dead_capacity(step, len(x))

        def update(batch: Tensor) -> steps.Outcome:
            if capacity:
                return self._update(batch, step, self.dead.mask, scratch, capacity=capacity)
            return self._update(batch, step, None, scratch)

        return graphs.run(update, x, capacity, scratch)

    def dead_capacity(self, step: int, batch_size: int) -> int:
        """For how many latents AuxK keeps a place at a step; 0 where the loss has no AuxK."""
        if not getattr(self.sae.cfg, "aux_loss_coefficient", 0):
            return 0
        return self.dead.capacity_at(step, batch_size)

    def _update(
        self, x: Tensor, step: int, dead: Tensor | None, scratch: Scratch, **more: Any
    ) -> steps.Outcome:
        """Gradients, Adam, and the counts of silent rows."""
        if self.fused is not None:
            outcome = self.fused(x, dead=dead, scratch=scratch, **more)
        else:
            outcome = self.gradients(
                self.sae,
                x,
                dead=dead,
                coefficients=coefficients(self.sae, step),
                step=step,
                scratch=scratch,
                **more,
            )
            self.optimiser.step()
        self.dead.count(outcome.fired, len(x))
        return outcome

    def resamples_after(self, done: int) -> bool:
        """Whether dead latents are resampled after `done` steps."""
        return self.spec is not None and done in self.spec.resample_steps

    def resample(self, x: Float[Tensor, "rows d_in"], done: int) -> None:
        """Resample dead latents from some rows, after `done` steps."""
        window = self.spec.resample_window * self.training.batch_size
        dead = self.dead.rows_since_fired >= window
        cli.log.info("%s: step %d, %d latents resampled", self.name, done, int(dead.sum()))
        l1 = coefficients(self.sae, done)["l1"]
        rng = np.random.default_rng([self.spec.seed, done])
        dead_latents.resample(self.sae, self.optimiser.adam, dead, x, l1, rng)
        self.dead.rows_since_fired[dead] = 0

    def check(self) -> None:
        """Raise RetraceError if a loss since the last check is NaN or infinite.

        Not called after every step: on a GPU it waits for the device.
        """
        losses = (
            torch.stack([loss for _, loss in self._unchecked]).tolist() if self._unchecked else []
        )
        for (step, _), loss in zip(self._unchecked, losses, strict=True):
            if not math.isfinite(loss):
                raise RetraceError(
                    f"dictionary '{self.name}': the loss is {loss} at step {step + 1} of "
                    f"{self.n_steps}; lower {self.LR_KEY}, or look for extreme activations"
                )
        self._unchecked.clear()

    @property
    def d_out(self) -> int:
        """Width of the rows that are reconstructed."""
        return self.sae.W_dec.shape[1]

    def record(
        self, outcome: steps.Outcome, x: Float[Tensor, "batch d"], step: int, scale: float
    ) -> None:
        """Append the batch of a step to the history, its MSE in the unit of the activations.

        It does not wait for the device.

        Args:
            scale: factor by which the rows that are reconstructed were multiplied.
        """
        variance = x[:, -self.d_out :].var(0, correction=0).sum()
        dead = self.dead.mask.double().mean()
        found = (outcome.mse, outcome.mse / variance, outcome.l0, dead, outcome.loss)
        about = [step + 1, (step + 1) * len(x), learning_rate(step, self.n_steps, self.training)]
        self._unread.append((about, scale, torch.stack([value.double() for value in found])))

    @property
    def history(self) -> list[list[float]]:
        """About N_RECORDS rows of the columns HISTORY. Reading them waits for the device."""
        for about, scale, found in self._unread:
            mse, unexplained, l0, dead, loss = found.tolist()
            self._history.append([*about, mse / scale**2, 1 - unexplained, l0, dead, loss])
        self._unread.clear()
        return self._history

    def tensors(self) -> dict[str, Tensor]:
        """All that training changes, on the CPU, for a checkpoint."""
        out = {f"sae.{n}": t for n, t in self.sae.state_dict().items()}
        out |= self.optimiser.tensors() | self.dead.tensors()
        out["history"] = torch.tensor(self.history, dtype=torch.float64).view(-1, len(HISTORY))
        return {name: t.detach().cpu().contiguous() for name, t in out.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `tensors` gave."""
        device = self.sae.W_dec.device
        self.sae.load_state_dict(with_prefix(tensors, "sae.", device))
        self.optimiser.restore(tensors, device)
        if self.fused is not None:
            self.fused.operands = None  # of other weights
        self.dead.restore(tensors)
        self._history, self._unread = tensors["history"].tolist(), []


def history(dictionaries: list[Dictionary]) -> Any:
    """The dictionaries' histories as one DataFrame, one row per dictionary and recorded step."""
    import pandas as pd

    frames = [pd.DataFrame(d.history, columns=HISTORY).assign(sae=d.name) for d in dictionaries]
    frame = pd.concat(frames, ignore_index=True)[["sae", *HISTORY]]
    return frame.astype({"step": "int64", "rows": "int64"})


def summary(dictionary: Dictionary, spec: SaeSpec) -> dict[str, Any]:
    """The entry of a trained dictionary in the manifest."""
    dead = dictionary.dead.mask.cpu()
    return {
        "folder": f"saes/{dictionary.name}",
        "dead_share": dead.double().mean().item(),
        "dead": dead.nonzero()[:, 0].tolist(),
        "steps": dictionary.n_steps,
        "rows": dictionary.n_steps * dictionary.training.batch_size,
        "spec": spec.model_dump(mode="json", exclude={"grid", "arms"}),
    }


def train(
    dictionaries: list[Dictionary],
    stream: Batches,
    n_steps: int,
    *,
    first: int = 0,
    seconds: float = float("inf"),
    save: Callable[[int], None] = lambda done: None,
    progress: Callable[[int], None] = lambda rows: None,
) -> None:
    """Train every dictionary on the batches first to n_steps - 1.

    A batch is read once, and copied to the other devices on which dictionaries lie.

    Args:
        first: number of steps that are already done.
        seconds: time between two calls of `save`.
        save: called with the number of steps done.
        progress: called with the number of rows shown.
    """
    one = dictionaries[0]
    half = one.optimiser.on_gpu and one.training.precision == "bfloat16"
    n_scores = stream.batch_size * max(len(d.dead.rows_since_fired) for d in dictionaries)
    groups = [(own, Lanes(half, len(own), n_scores, device))
              for device, own in by_device(dictionaries).items()]  # fmt: skip
    every, saved = max(1, n_steps // N_RECORDS), time.monotonic()
    for step, x in enumerate(stream.batches(first, n_steps), first):
        done = step + 1
        due = time.monotonic() - saved >= seconds
        recorded = done % every == 0 or done == n_steps
        for own, lanes in groups:
            with lanes.batch(x) as shown:
                for i, dictionary in enumerate(own):
                    with lanes.of(i) as scratch:
                        outcome = dictionary.step(shown, step, scratch)
                        if recorded:
                            dictionary.record(outcome, shown, step, stream.target_scale)
        if recorded or due:
            for dictionary in dictionaries:
                dictionary.check()
        resample(dictionaries, stream, done)
        if due and done < n_steps:
            save(done)
            saved = time.monotonic()
        progress(done * stream.batch_size)


def by_device(dictionaries: list[Dictionary]) -> dict[torch.device, list[Dictionary]]:
    """The dictionaries of each device."""
    out: dict[torch.device, list[Dictionary]] = {}
    for dictionary in dictionaries:
        out.setdefault(dictionary.dead.rows_since_fired.device, []).append(dictionary)
    return out


def shared_out(
    dictionaries: dict[str, SaeSpec], devices: list[torch.device]
) -> dict[str, torch.device]:
    """The device of each dictionary: the widest first, each to the one with the fewest latents."""
    load = dict.fromkeys(devices, 0)
    out = {}
    for name in sorted(dictionaries, key=lambda n: -dictionaries[n].d_sae):
        out[name] = min(devices, key=lambda device: load[device])
        load[out[name]] += dictionaries[name].d_sae
    return out


def resample(dictionaries: list[Dictionary], stream: Batches, done: int) -> None:
    """Resample dead latents where a dictionary asks for it, from the stream's next rows."""
    wanted = [d for d in dictionaries if d.resamples_after(done)]
    if not wanted:
        return
    n_rows = max(d.spec.resample_rows for d in wanted)
    n = math.ceil(n_rows / stream.batch_size)
    x = torch.cat(list(stream.batches(done, done + n)))
    for dictionary in wanted:
        some = x[: dictionary.spec.resample_rows]
        dictionary.resample(some.to(dictionary.dead.rows_since_fired.device), done)
