"""Train dictionaries that share a stream: each batch is read once and shown to every one of them.

1. Torch, numpy and random are seeded with the dictionary's own seed before SAELens builds it
   (SAELens reads no seed of its own), so its initial weights do not depend on its company. Decoder
   rows point in random directions, and W_enc is W_dec transposed (SAELens, `decoder_init_norm`).
2. b_dec starts at the geometric median of a sample (Gao et al. 2024, App. A.1).
3. A step is a batch, gradients (FAST), clipping to a norm of 1 as SAELens's trainer does,
   and Adam; the learning rate rises linearly, stays, and falls linearly to zero.
4. A latent is dead once `dead_rows` rows have passed since it was last active. In a run shorter
   than that, a latent that was never active counts as dead at the end.
5. A frozen decoder (null arm) keeps its random directions, at norm 1; the rest trains.
6. At `resample_steps` dead latents get new directions (sae/resample.py).
"""

import math
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import RetraceError
from pipeline.job import cli
from pipeline.sae import resample as sae_resample
from pipeline.sae import steps, steps_batch, steps_gates, steps_pursuit
from pipeline.sae.sparse import Scratch
from pipeline.sae.stream import Stream
from pipeline.sae.transcoder import training_class
from pipeline.spec.sae import SaeSpec, SaeTraining

HISTORY = ("step", "rows", "lr", "mse", "explained_variance", "l0", "dead_share", "loss")
CLIP_NORM = 1.0  # SAELens's SAETrainer, which has no option for it
# Before a step is recorded: kernels are compiled in them, and the scratch that all dictionaries
# share grows to its last size, since a recording keeps its address.
EAGER_STEPS = 3
# Steps after which a GPU is asked, at the latest, how many latents may be dead by the next time.
LOOK_EVERY = 64
LEAST_ROOM = 256  # for dead latents; above it a power of two, so that few sizes are recorded
N_RECORDS = 100  # entries of a history, about
STATIC = steps.STATIC | steps_batch.STATIC
FAST = steps.FAST | steps_batch.FAST | steps_gates.FAST | steps_pursuit.FAST


def build(
    spec: SaeSpec,
    d_in: int,
    *,
    d_out: int | None = None,
    normalize: str = "none",
    metadata: dict | None = None,
) -> Any:
    """A SAELens TrainingSAE on the CPU, its initial weights a function of the spec alone.

    Args:
        d_out: of a transcoder; default: d_in.
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


def learning_rate(step: int, n_steps: int, training: SaeTraining) -> float:
    """Learning rate of step 0 to n_steps - 1, as SAELens's `get_lr_scheduler` has it."""
    decay_steps = round(training.decay_share * n_steps)
    rise = (step + 1) / training.warmup_steps if training.warmup_steps else 1.0
    fall = (n_steps - step) / decay_steps if decay_steps else 1.0
    return training.lr * min(1.0, rise, fall)


class Replay:
    """One step, recorded as a CUDA graph: launching its kernels one by one takes longer than they.

    Args:
        step: batch -> what it did, the same kernels on every call.
        x: a batch; recording changes nothing.
        others: recordings that it shares memory with, none of which runs at the same time; it is
            added to them.
    """

    def __init__(
        self, step: Callable[[Tensor], steps.Outcome], x: Tensor, others: list[Any]
    ) -> None:
        self.x, self.graph = x.clone(), torch.cuda.CUDAGraph()
        pool = others[0].pool() if others else None
        torch.cuda.synchronize()
        # thread_local: other threads read the next rows into page-locked memory meanwhile
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.outcome = step(self.x)
        others.append(self.graph)

    def __call__(self, x: Tensor) -> steps.Outcome:
        """The outcome lies in memory that the next call, or another's, may overwrite."""
        self.x.copy_(x)
        self.graph.replay()
        return self.outcome


class Dictionary:
    """One dictionary in training: SAELens's object, Adam's state, counters and history.

    Args:
        name: the dictionary's name, for messages.
        sae: a SAELens TrainingSAE on its device.
        training: the schedule.
        n_steps: steps of the whole run.
        step: how a batch becomes gradients; default: the fast step of its architecture, or
            SAELens's own where there is none.
        spec: says when dead latents are resampled; default: never.
    """

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
        if device.type == "cuda" and self.gradients in FAST.values() and hasattr(sae, "W_enc"):
            # as these steps lay out its gradient; Adam reads and writes each where it lies
            sae.W_enc.data = sae.W_enc.data.T.contiguous().T
        self.trained = {n: p for n, p in sae.named_parameters() if p.requires_grad}
        self.adam = torch.optim.Adam(
            self.trained.values(),
            lr=training.lr,
            betas=training.betas,
            eps=training.eps,
            fused=device.type in ("cpu", "cuda"),
            capturable=device.type == "cuda",
        )
        if device.type == "cuda":  # where the replayed step finds it
            self.adam.param_groups[0]["lr"] = torch.tensor(training.lr, device=device)
        self.static = device.type == "cuda" and self.gradients in STATIC  # waits for nothing
        self.room: int | None = None  # of the dead latents, once it was asked for
        self.replays: dict[int, Replay] = {}
        self.recording = True
        self.eager_steps: Counter[int] = Counter()  # of each room
        self.silent = torch.zeros(sae.cfg.d_sae, dtype=torch.int64, device=device)
        self.dead_rows = min(training.dead_rows, n_steps * training.batch_size)
        # few of the latents that fire within three quarters of the time may die in the fourth
        self.look_every = max(1, min(LOOK_EVERY, self.dead_rows // (4 * training.batch_size)))
        self.shown = self.none_dead_before = 0  # rows since this object was made
        self.history: list[list[float]] = []
        self.unchecked: list[tuple[int, Tensor]] = []

    @property
    def dead(self) -> Tensor:
        """Latents silent for `dead_rows` rows: bool [d_sae]."""
        return self.silent >= self.dead_rows

    def _dead_if_any(self) -> Tensor | None:
        """`dead`, or None where no latent is.

        The device is asked, and waited for, only when one can have become so since the last time.
        """
        if self.shown < self.none_dead_before:
            return None
        left = self.dead_rows - int(self.silent.max())
        self.none_dead_before = self.shown + max(left, 0)
        return self.dead if left <= 0 else None

    def _clip(self) -> None:
        """Clip the gradients to CLIP_NORM; on a GPU within Adam, which reads them anyway."""
        if self.silent.is_cuda:
            given = [p.grad for p in self.trained.values() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(given)
            self.adam.grad_scale = ((norm + 1e-6) / CLIP_NORM).clamp(min=1)
        else:
            torch.nn.utils.clip_grad_norm_(self.trained.values(), CLIP_NORM)

    def coefficients(self, step: int) -> dict[str, float]:
        """SAELens's loss coefficients at a step, warmed up linearly from 0."""
        out = {}
        for name, given in self.sae.get_coefficients().items():
            value, warmup = given if isinstance(given, tuple) else (given, 0)
            out[name] = value * min(1.0, step / warmup) if warmup else value
        return out

    def step(self, x: Tensor, step: int, scratch: Scratch) -> steps.Outcome:
        """Train on one batch [batch d_in]; `step` counts from 0."""
        lr = learning_rate(step, self.n_steps, self.training)
        if self.silent.is_cuda:
            self.adam.param_groups[0]["lr"].fill_(lr)
        else:
            self.adam.param_groups[0]["lr"] = lr
        if self.static:
            outcome = self._step_unwaited(x, step, scratch)
        else:
            outcome = self._update(x, step, self._dead_if_any(), scratch)
        self.shown += len(x)
        self.unchecked.append((step, outcome.loss.clone()))
        return outcome

    def _step_unwaited(self, x: Tensor, step: int, scratch: Scratch) -> steps.Outcome:
        """A step of STATIC, recorded once for each room of dead latents."""
        room = self._room_of_dead(step, len(x))

        def update(held: Tensor) -> steps.Outcome:
            if room:
                return self._update(held, step, self.dead, scratch, room=room)
            return self._update(held, step, None, scratch)

        self.eager_steps[room] += 1
        if self.recording and room not in self.replays and self.eager_steps[room] > EAGER_STEPS:
            try:
                self.replays[room] = Replay(update, x, scratch.recordings)
            except RuntimeError as e:
                cli.log.info("%s: steps cannot be recorded (%s)", self.name, str(e).splitlines()[0])
                self.recording = False
        return self.replays[room](x) if room in self.replays else update(x)

    def _room_of_dead(self, step: int, batch_size: int) -> int:
        """A number that the dead latents do not exceed before it is asked for again; 0: no AuxK.

        It is asked for at steps that a resumed run meets, too.
        """
        if not self.sae.cfg.aux_loss_coefficient:
            return 0
        if self.room is None or step % self.look_every == 0:
            before = self.dead_rows - self.look_every * batch_size
            n, d_sae = int((self.silent >= before).sum()), len(self.silent)
            self.room = min(max(LEAST_ROOM, 1 << (n - 1).bit_length()), d_sae) if n else 0
        return self.room

    def _update(
        self, x: Tensor, step: int, dead: Tensor | None, scratch: Scratch, **more: Any
    ) -> steps.Outcome:
        """Gradients, clipping, Adam and the counters."""
        outcome = self.gradients(
            self.sae,
            x,
            dead=dead,
            coefficients=self.coefficients(step),
            step=step,
            scratch=scratch,
            **more,
        )
        self._clip()
        self.adam.step()
        self.adam.zero_grad()
        self.silent.add_(len(x)).masked_fill_(outcome.fired, 0)
        return outcome

    def due(self, done: int) -> bool:
        """Whether dead latents are resampled after `done` steps."""
        return self.spec is not None and done in self.spec.resample_steps

    def resample(self, x: Tensor, done: int) -> None:
        """Resample dead latents out of rows [rows d_in], after `done` steps."""
        dead = self.silent >= self.spec.resample_window * self.training.batch_size
        cli.log.info("%s: step %d, %d latents resampled", self.name, done, int(dead.sum()))
        l1 = self.coefficients(done)["l1"]
        rng = np.random.default_rng([self.spec.seed, done])
        sae_resample.resample(self.sae, self.adam, dead, x, l1, rng)
        self.silent[dead] = 0

    def check(self) -> None:
        """Raise where a loss since the last check is NaN or infinite.

        Not at every step: on a GPU it would wait for the device.
        """
        for step, loss in self.unchecked:
            if not torch.isfinite(loss):
                raise RetraceError(
                    f"dictionary '{self.name}': the loss is {loss.item()} at step {step + 1} of "
                    f"{self.n_steps}; lower sae.training.lr, or look for extreme activations"
                )
        self.unchecked.clear()

    def record(self, outcome: steps.Outcome, x: Tensor, step: int, scale: float) -> None:
        """Add the batch of a step to the history; mse in the unit of the activations.

        Args:
            scale: of the rows that are reconstructed.
        """
        variance = x[:, -self.sae.W_dec.shape[1] :].var(0, correction=0).sum()
        self.history.append(
            [
                step + 1,
                (step + 1) * len(x),
                learning_rate(step, self.n_steps, self.training),
                outcome.mse.item() / scale**2,
                1 - (outcome.mse / variance).item(),
                outcome.l0.item(),
                self.dead.double().mean().item(),
                outcome.loss.item(),
            ]
        )

    def tensors(self) -> dict[str, Tensor]:
        """All that training changes, on the CPU, for a checkpoint."""
        out = {f"sae.{n}": t for n, t in self.sae.state_dict().items()}
        for name, parameter in self.trained.items():
            out |= {f"adam.{name}.{k}": v for k, v in self.adam.state[parameter].items()}
        out["silent"] = self.silent
        if self.room is not None:
            out["room"] = torch.tensor(self.room)
        out["history"] = torch.tensor(self.history, dtype=torch.float64).view(-1, len(HISTORY))
        return {name: t.detach().cpu().contiguous() for name, t in out.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `tensors` gave."""
        device = self.silent.device
        part = lambda head: {  # noqa: E731
            n.removeprefix(head): t.to(device, copy=True)
            for n, t in tensors.items()
            if n.startswith(head)
        }
        self.sae.load_state_dict(part("sae."))
        for name, p in self.trained.items():
            state = part(f"adam.{name}.")
            self.adam.state[p] = {k: _laid_out_as(p, t) for k, t in state.items()}
        self.silent = tensors["silent"].to(device, copy=True)
        self.history = tensors["history"].tolist()
        if "room" in tensors:
            self.room = int(tensors["room"])


def _laid_out_as(p: Tensor, t: Tensor) -> Tensor:
    """`t` with its values where `p` has them in memory, if it has its shape."""
    return torch.empty_like(p).copy_(t) if t.shape == p.shape else t


def train(
    dictionaries: list[Dictionary],
    stream: Stream,
    n_steps: int,
    *,
    first: int = 0,
    seconds: float = float("inf"),
    save: Callable[[int], None] = lambda done: None,
    progress: Callable[[int], None] = lambda rows: None,
) -> None:
    """Show batches first to n_steps - 1 to every dictionary.

    Args:
        first: steps done before.
        seconds: call `save` with the number of steps done, this often.
        progress: called with the number of rows shown.
    """
    one = dictionaries[0]
    half = one.silent.is_cuda and one.training.precision == "bfloat16"
    scratch, every, saved = Scratch(half), max(1, n_steps // N_RECORDS), time.monotonic()
    for step, x in enumerate(stream.batches(first, n_steps), first):
        done = step + 1
        due = time.monotonic() - saved >= seconds
        told = done % every == 0 or done == n_steps
        for dictionary in dictionaries:
            outcome = dictionary.step(x, step, scratch)
            if told or due:
                dictionary.check()
            if told:
                dictionary.record(outcome, x, step, stream.target_scale)
        resample(dictionaries, stream, done)
        if due and done < n_steps:
            save(done)
            saved = time.monotonic()
        progress(done * stream.batch_size)


def resample(dictionaries: list[Dictionary], stream: Stream, done: int) -> None:
    """Resample the dead latents of the dictionaries that are due, out of the stream's next rows."""
    wanted = [d for d in dictionaries if d.due(done)]
    if not wanted:
        return
    n_rows = max(d.spec.resample_rows for d in wanted)
    n = math.ceil(n_rows / stream.batch_size)
    x = torch.cat(list(stream.batches(done, done + n)))
    for dictionary in wanted:
        dictionary.resample(x[: dictionary.spec.resample_rows], done)
