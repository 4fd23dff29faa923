"""One TopK dictionary whose latents are divided among devices: for one too large for a GPU.

The step is that of sae/fused.py. Each shard has its latents' weights, Adam's moments and operands;
b_dec, the counts of silent rows and the history lie on the home device, the first. A step is a
chain of segments, between which shards and home exchange rows:

    shard  x_c = x - b_dec, its scores, and of each row the k largest of these
    home   of each row the k largest of all shards'
    shard  their part of the reconstruction
    home   r, the sum of the parts + b_dec - x; the loss; 2 r / B
    shard  pulls, the entries by latent, and the squared norm of each latent's gradient
    home   the factor of clipping, and Adam's step on b_dec
    shard  Adam's step on the latents

Nothing waits for a GPU, so that all devices work at the same time. On a GPU every segment is
captured as a CUDA graph. A row has k entries on every shard, of which most are not among the row's
k: they are zero, and sorted behind all latents, where no sum reads them.

Numbers differ from those of one device by the order in which the parts of a reconstruction and of
norms are summed. A checkpoint is that of an undivided dictionary, on any number of devices.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.errors import RetraceError
from pipeline.job import cli, gpus
from pipeline.sae.dead import DeadLatents
from pipeline.sae.fused import by_latent, suits
from pipeline.sae.graphs import EAGER_STEPS
from pipeline.sae.optimiser import CLIP_NORM, learning_rate
from pipeline.sae.sparse import Scratch, largest
from pipeline.sae.steps import Outcome
from pipeline.sae.train import Dictionary
from pipeline.spec.sae import SaeSpec, SaeTraining

ROOM = 0.7  # share of a GPU's memory for dictionaries; the rest is for batches and the stream
WEIGHT_BYTES = 26  # a weight, its gradient, two moments, an operand, and room to make them
MOMENTS = ("exp_avg", "exp_avg_sq")
SIDES = {"W_enc": 1, "W_dec": 0, "b_enc": 0}  # the dimension of latents


def n_bytes(spec: SaeSpec, training: SaeTraining, d_in: int) -> int:
    """Bytes of a dictionary in training: its weights with all that Adam keeps, and scores."""
    scores = training.batch_size * spec.d_sae * (2 if training.precision == "bfloat16" else 4)
    return WEIGHT_BYTES * 2 * spec.d_sae * d_in + scores


def unfit(sae: Any, training: SaeTraining, spec: SaeSpec | None = None) -> str:
    """What has to be changed before a dictionary can be divided; empty where nothing has."""
    if sae.cfg.architecture() != "topk":
        return "architecture: topk"
    if training.precision != "bfloat16":
        return "sae.training.precision: bfloat16"
    if sae.cfg.aux_loss_coefficient:
        return "aux_loss_coefficient: 0"
    if spec is not None and spec.resample_steps:
        return "no resample_steps"
    if not sae.W_dec.requires_grad:
        return "frozen_decoder: false"
    return "" if suits(sae, training) else "no output_hook"


def devices(given: list[torch.device], need: int, what: str, remedy: str) -> list[torch.device]:
    """A job's GPUs, and as many more as it takes to hold `need` bytes; where it has none, the CPU.

    Args:
        given: what the job has.
        what: that needs the bytes, for the message.
        remedy: beside a lower d_sae.

    Raises:
        RetraceError: too few GPUs are free.
    """
    if given[0].type != "cuda":
        return given[:1]
    indices = [torch.cuda.current_device() if d.index is None else d.index for d in given]
    about = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    found = [torch.device("cuda", n) for n in indices]
    room = sum(ROOM * about[n].total_memory for n in indices)
    others = gpus.others([str(gpu.uuid) for gpu in about], indices[0])
    while room < need and (n := next(others, None)) is not None:
        found.append(torch.device("cuda", n))
        room += ROOM * about[n].total_memory
    if room < need:
        raise RetraceError(
            f"sae: {what} {need / 1e9:.0f} GB in training, and the "
            f"{len(found)} free GPUs leave {room / 1e9:.0f} GB for them; lower d_sae to "
            f"{room / need:.0%} of it, or {remedy}"
        )
    return found


def shared(
    specs: dict[str, SaeSpec], training: SaeTraining, d_in: int, given: list[torch.device]
) -> dict[str, list[torch.device]]:
    """The devices of each dictionary of a job that does not fit its GPU, by name.

    Args:
        given: the job's devices, to which the dictionaries that fit one are shared out.
    """
    if given[0].type != "cuda":
        return {}
    need = {name: n_bytes(spec, training, d_in) for name, spec in specs.items()}
    room = ROOM * torch.cuda.get_device_properties(given[0]).total_memory
    large = [name for name in need if need[name] > room]
    if not large:
        return {}
    what = f"dictionary {large[0]} takes" if len(need) == 1 else f"{len(need)} dictionaries take"
    where = devices(given, sum(need.values()), what, "train fewer dictionaries in one paper")
    return dict.fromkeys(large, where)


def bounds_of(d_sae: int, n: int) -> list[int]:
    """Where each of n shards begins, then d_sae: nearly equal ones, of widths that kernels like."""
    unit = 1
    while d_sae % (2 * unit) == 0 and d_sae // (2 * unit) >= 32 * n:
        unit *= 2
    return [d_sae // unit * i // n * unit for i in range(n)] + [d_sae]


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels of Triton are launched on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Shard:
    """Some latents of a dictionary, with all that a step keeps of them, on their device.

    Args:
        span: which latents.
        first: whether b_dec's gradient counts the rows here.

    Attributes:
        weights: W_enc transposed, W_dec and b_enc.
        moments: name of a weight -> Adam's two.
        count, lr: number of steps done, and the learning rate, float32 scalars.
        operands: what a step multiplies; None: to be made from the weights.
        x, b_dec, mask, g, factor: what comes from home.
    """

    def __init__(self, sae: Any, span: slice, device: torch.device, first: bool, how: Any) -> None:
        self.cfg, self.span, self.device, self.first, self.how = sae.cfg, span, device, first, how
        self.n = span.stop - span.start
        self.weights = {name: self.taken(name, getattr(sae, name).data) for name in SIDES}
        self.moments = {
            name: [torch.zeros_like(w) for _ in MOMENTS] for name, w in self.weights.items()
        }
        self.count, self.lr = (torch.zeros((), device=device) for _ in range(2))
        self.operands: Any = None
        self.scratch: Scratch | None = None

    def taken(self, name: str, whole: Tensor) -> Tensor:
        """This shard's part of a weight or moment, as it is kept here: a copy."""
        part = whole.narrow(SIDES[name], self.span.start, self.n)
        return (part.T if SIDES[name] else part).to(self.device, copy=True).contiguous()

    def give(self, name: str, part: Tensor, whole: Tensor) -> None:
        """Write a part into the whole."""
        to = whole.narrow(SIDES[name], self.span.start, self.n)
        to.copy_(part.T if SIDES[name] else part)

    def begin(self, x: Tensor, half: bool) -> None:
        """Make the memory of a batch's shape, and the operands."""
        from pipeline.kernels import adam

        (batch, d), k, there = x.shape, self.cfg.k, {"device": self.device}
        self.scratch = Scratch(half)
        self.x, self.g = (torch.empty(batch, d, **there) for _ in range(2))
        self.b_dec, self.factor = torch.empty(d, **there), torch.empty(1, **there)
        self.mask = torch.empty(batch, k, dtype=torch.bool, **there)
        self.rows = torch.arange(batch + 1, **there) * k
        if self.operands is None:
            W_enc, W_dec, b_enc = (self.weights[name] for name in SIDES)
            rescale = self.cfg.rescale_acts_by_decoder_norm
            norm = W_dec.norm(dim=1) if rescale else torch.ones_like(b_enc)
            dtype = torch.bfloat16 if half else x.dtype
            made = (W_enc * norm[:, None], W_dec, b_enc * norm)
            self.operands = adam.Operands(*(t.to(dtype, copy=True) for t in made), norm)

    def choose(self) -> None:
        """Scores, and of each row the k largest: `latents`, `acts` and `best`, [batch k]."""
        from pipeline.kernels import adam, choice, rows

        operands, k = self.operands, self.cfg.k
        self.factors = adam.begin(self.count, self.lr, self.how)
        self.xc = rows.centred(self.x, self.b_dec, operands.enc.dtype)
        scores = self.scratch.matrix("acts", len(self.x), self.n, self.x)
        torch.addmm(operands.bias, self.xc, operands.enc.T, out=scores)
        groups = choice.groups_of(self.n, k)
        if groups:
            self.latents, self.acts = choice.largest(scores, operands.norm, k, groups)
            self.best = scores.gather(1, self.latents.long())
        else:
            self.best, latents = largest(scores, k)
            self.acts = self.best.to(operands.norm.dtype).relu() / operands.norm[latents]
            self.latents = latents.int()

    def decode(self) -> None:
        """`part` of the reconstruction, of the entries of the mask; how many are active."""
        from pipeline.kernels.bags import bags

        self.acts.mul_(self.mask)
        self.latents.masked_fill_(self.acts <= 0, 0)  # whose weights then come out of the cache
        given = self.latents.flatten(), self.rows, self.acts.flatten(), self.operands.dec
        self.part = bags(*given, most=self.cfg.k)
        self.active = (self.acts > 0).sum(dtype=torch.float32).view(1)

    def pull(self) -> None:
        """The gradients' entries; their `squares`, `fired`, and what b_dec's gradient has here."""
        from pipeline.kernels import gradients, rows
        from pipeline.kernels.bags import dots

        operands, flat = self.operands, self.latents.flatten()
        d = self.g.to(operands.dec.dtype)
        live = self.acts > 0
        pulls = dots(flat, self.rows, self.g, operands.dec).view_as(live).mul_(live)
        keys = flat.masked_fill(~live.flatten(), self.n)
        ordered, order, starts = by_latent(keys, self.n)
        at, _, a, g = rows.in_order(order, self.acts, pulls)
        # one latent more, which has no entry, for the keys of what is not live
        starts = torch.cat([starts, starts[-1:]])
        self.entries = gradients.Entries(ordered, starts, at, at, a, g, self.xc, d)
        self.parts = gradients.pieces(self.entries)
        squares, biases, fired = (t[:-1] for t in gradients.norms(self.entries, self.parts))
        self.biases, self.fired = biases, fired
        given = d if self.first else d[:0]
        self.sums, self.squares = gradients.bias_sums(
            given, operands.enc, biases, operands.norm, squares
        )

    def move(self) -> None:
        """Adam's step."""
        from pipeline.kernels import adam

        self.factors[:1].copy_(self.factor)
        moved = (adam.Moved(self.weights[name], *self.moments[name]) for name in SIDES)
        how = (*moved, self.operands, self.how, self.cfg.rescale_acts_by_decoder_norm)
        adam.update(self.entries, None, self.factors, *how)
        adam.update(self.entries, (*self.parts, self.biases), self.factors, *how)


class SplitOptimiser:
    """What `train` and a checkpoint read of an Optimiser."""

    def __init__(self, dictionary: "SplitDictionary") -> None:
        self.dictionary, self.on_gpu = dictionary, dictionary.home.type == "cuda"

    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate of the next step."""
        for shard in self.dictionary.shards:
            shard.lr.fill_(lr)

    def tensors(self) -> dict[str, Tensor]:
        """Adam's moments and step counts, gathered on the CPU."""
        one, out = self.dictionary, {}
        count = one.shards[0].count.cpu()
        for name, parameter in one.module.named_parameters():
            out[f"adam.{name}.step"] = count.clone()
            for i, moment in enumerate(MOMENTS):
                whole = torch.empty(parameter.shape, dtype=parameter.dtype)
                if name == "b_dec":
                    whole.copy_(one.b_dec_moments[i])
                else:
                    for shard in one.shards:
                        shard.give(name, shard.moments[name][i], whole)
                out[f"adam.{name}.{moment}"] = whole
        return out


class SplitDictionary(Dictionary):
    """A TopK dictionary in training, its latents divided among devices.

    Args:
        name: the dictionary's name, for messages and checkpoints.
        sae: a SAELens TrainingSAE on the CPU, where it stays; for which `unfit` says nothing.
        training: the schedule; batches have its batch_size.
        n_steps: steps of the whole run.
        devices: one for each shard, home first; the same one may come twice.

    Attributes:
        module: the TrainingSAE, its weights as they were when they were last gathered.
        shards: the latents' shards.
        b_dec, b_dec_moments: at home.
    """

    def __init__(
        self,
        name: str,
        sae: Any,
        training: SaeTraining,
        n_steps: int,
        devices: list[torch.device],
        spec: SaeSpec | None = None,
    ) -> None:
        from pipeline.kernels import adam

        remedy = unfit(sae, training, spec)
        if remedy:
            raise RetraceError(
                f"sae.{name}: {sae.cfg.d_sae} latents are to be divided among {len(devices)} "
                f"GPUs, which TopK in bfloat16 without AuxK and resampling is alone; set {remedy}, "
                f"or lower d_sae until one GPU holds it"
            )
        bounds = bounds_of(sae.cfg.d_sae, len(devices))
        if min(b - a for a, b in pairwise(bounds)) < sae.cfg.k:
            raise RetraceError(
                f"sae.{name}: {len(devices)} shards of {sae.cfg.d_sae} latents have fewer than "
                f"k = {sae.cfg.k} each; give it fewer devices"
            )
        self.name, self.training, self.n_steps, self.spec = name, training, n_steps, spec
        self.module, self.home, self.graphs = sae.to("cpu"), devices[0], None
        self.how = adam.How(*training.betas, training.eps, CLIP_NORM)
        self.shards = [
            Shard(sae, slice(bounds[i], bounds[i + 1]), device, i == 0, self.how)
            for i, device in enumerate(devices)
        ]
        self.b_dec = sae.b_dec.data.to(self.home, copy=True)
        self.b_dec_moments = [torch.zeros_like(self.b_dec) for _ in MOMENTS]
        self.optimiser: Any = SplitOptimiser(self)
        self.dead = DeadLatents(sae.cfg.d_sae, training, n_steps, self.home)
        self.segments: dict[tuple[int, str], torch.cuda.CUDAGraph] = {}
        self._captures: dict[int, tuple[torch.cuda.Stream, Any]] = {}  # stream and pool
        self._recording, self._eager, self._shape = self.optimiser.on_gpu, 0, torch.Size()
        self._gathered = True
        self._history: list[list[float]] = []
        self._unread: list[tuple[list[float], float, Tensor]] = []
        self._unchecked: list[tuple[int, Tensor]] = []

    @property
    def sae(self) -> Any:
        """The TrainingSAE on the CPU with the weights as they are; reading it waits for GPUs."""
        if not self._gathered:
            for name in SIDES:
                for shard in self.shards:
                    shard.give(name, shard.weights[name], getattr(self.module, name).data)
            self.module.b_dec.data.copy_(self.b_dec)
            self._gathered = True
        return self.module

    @property
    def d_out(self) -> int:
        return len(self.b_dec)

    @torch.no_grad()
    def step(self, x: Float[Tensor, "batch d"], step: int, scratch: Scratch) -> Outcome:
        """Train on one batch; `step` counts from 0."""
        self.optimiser.set_learning_rate(learning_rate(step, self.n_steps, self.training))
        if x.shape != self._shape:
            self._begin(x, scratch.half)
        self._gathered = False
        for shard in self.shards:
            shard.x.copy_(x, non_blocking=True)
            shard.b_dec.copy_(self.b_dec, non_blocking=True)
        self._on_shards("choose")
        self._bring(self.found, "best")
        self._at_home("select")
        for shard, mask in zip(self.shards, self.masks, strict=True):
            shard.mask.copy_(mask, non_blocking=True)
        self._on_shards("decode")
        self._bring(self.decoded, "part")
        self._bring(self.active, "active")
        self._at_home("compare")
        for shard in self.shards:
            shard.g.copy_(self.g, non_blocking=True)
        self._on_shards("pull")
        self._bring(self.sums, "sums")
        self._bring(self.squares, "squares")
        self._bring(self.fired, "fired")
        self._at_home("clip")
        for shard in self.shards:
            shard.factor.copy_(self.shards[0].factors[:1], non_blocking=True)
        self._on_shards("move")
        self._eager += 1
        self.dead.rows_seen += len(x)
        outcome = Outcome(self.mse, self.mse, self.l0, self.has_fired)
        self._unchecked.append((step, self.mse.clone()))
        return outcome

    def _begin(self, x: Tensor, half: bool) -> None:
        """Make what lies at home of a batch's shape, and its like on the shards."""
        from pipeline.kernels.gradients import SLICE

        batch, k, n, there = len(x), self.module.cfg.k, len(self.shards), {"device": self.home}
        dtype = torch.bfloat16 if half else x.dtype
        self._shape, self._eager = x.shape, 0
        self.segments.clear()
        self._captures.clear()
        for shard in self.shards:
            with on(shard.device):
                shard.begin(x, half)
        self.found = list(torch.empty(n, batch, k, dtype=dtype, **there))
        self.decoded = list(torch.empty(n, *x.shape, **there))
        self.active = list(torch.empty(n, 1, **there))
        self.sums = list(torch.empty(n, x.shape[1], **there))
        slices = [-(-shard.n // SLICE) for shard in self.shards]
        self.all_squares = torch.empty(sum(slices), **there)
        self.squares = list(self.all_squares.split(slices))
        self.all_fired = torch.empty(self.module.cfg.d_sae, dtype=torch.int8, **there)
        self.fired = list(self.all_fired.split([s.n for s in self.shards]))

    def _bring(self, to: list[Tensor], name: str) -> None:
        """Copy what every shard has made to its place at home."""
        for shard, place in zip(self.shards, to, strict=True):
            place.copy_(getattr(shard, name), non_blocking=True)

    def _on_shards(self, name: str) -> None:
        for i, shard in enumerate(self.shards):
            self._run(i, shard.device, name, getattr(shard, name))

    def _at_home(self, name: str) -> None:
        self._run(0, self.home, name, getattr(self, f"_{name}"))

    def _run(self, i: int, device: torch.device, name: str, work: Callable[[], None]) -> None:
        """Run a segment on a shard's device, by its CUDA graph after a few steps without one."""
        key = (i, name)
        with on(device):
            if self._recording and self._eager >= EAGER_STEPS and key not in self.segments:
                try:
                    self.segments[key] = self._recorded(i, device, work)
                except RuntimeError as e:
                    about = str(e).splitlines()[0]
                    cli.log.info("%s: steps cannot be recorded (%s)", self.name, about)
                    self._recording = False
            if key in self.segments:
                self.segments[key].replay()
            else:
                work()

    def _recorded(
        self, i: int, device: torch.device, work: Callable[[], None]
    ) -> torch.cuda.CUDAGraph:
        """A segment's graph; those of a shard run one after another, and share their memory."""
        graph = torch.cuda.CUDAGraph()
        stream, pool = self._captures.get(i) or (torch.cuda.Stream(device), None)
        torch.cuda.synchronize(device)
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            work()
        self._captures[i] = stream, graph.pool()
        return graph

    def _select(self) -> None:
        """`masks`: which of the shards' entries are among the k largest of their row."""
        k, n = self.module.cfg.k, len(self.shards)
        found = torch.cat(self.found, 1)
        kept = torch.zeros_like(found, dtype=torch.bool)
        kept.scatter_(1, largest(found, k)[1], True)
        self.masks = list(kept.view(-1, n, k).transpose(0, 1).contiguous())

    def _compare(self) -> None:
        """The loss, and its gradient in the reconstructions."""
        r = self.b_dec - self.shards[0].x
        for part in self.decoded:
            r += part
        batch = len(r)
        self.mse = r.pow(2).sum(1).sum() / batch
        self.l0 = torch.cat(self.active).sum() / batch
        self.g = r.mul_(2 / batch)

    def _clip(self) -> None:
        """The factor of clipping, b_dec, and the counts of silent rows."""
        from pipeline.kernels import adam

        gradient, home = torch.stack(self.sums).sum(0), self.shards[0]
        moved = adam.Moved(self.b_dec, *self.b_dec_moments)
        adam.finish(home.factors, self.all_squares, gradient, moved, self.how)
        self.has_fired = self.all_fired.bool()
        self.dead.count(self.has_fired, self._shape[0])

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `tensors` gave, of a dictionary that is divided in any way, or in none."""
        for name in SIDES:
            for shard in self.shards:
                shard.weights[name] = shard.taken(name, tensors[f"sae.{name}"])
                shard.moments[name] = [
                    shard.taken(name, tensors[f"adam.{name}.{moment}"]) for moment in MOMENTS
                ]
        for shard in self.shards:
            shard.count.copy_(tensors["adam.W_dec.step"])
            shard.operands = None  # of other weights
        self.b_dec.copy_(tensors["sae.b_dec"])
        for kept, moment in zip(self.b_dec_moments, MOMENTS, strict=True):
            kept.copy_(tensors[f"adam.b_dec.{moment}"])
        self._shape, self._gathered = torch.Size(), False  # graphs are of other tensors
        self.dead.restore(tensors)
        self._history, self._unread = tensors["history"].tolist(), []
