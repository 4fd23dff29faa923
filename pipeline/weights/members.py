"""The members of a training run, and one step of all of them. [torch]

1. Every member (an arm and a seed) has its weights in one row of a tensor [members, parameters];
   `vmap` runs the model over the rows, so ten small models cost little more than one.
2. A step: batch of (seed, step), mean loss, gradient, clipping, AdamW (Loshchilov & Hutter 2019)
   written out on the rows, so that learning rate and weight decay may differ between members.
3. On a GPU the whole step is captured once as a CUDA graph and replayed. There small members run
   side by side, each on a stream: products under vmap are slower than as many of their own.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import RetraceError
from pipeline.job import cli
from pipeline.spec.training import TrainingSpec
from pipeline.weights import batches
from pipeline.weights.batches import Batches
from pipeline.weights.initial import build, initial, is_trained, learning_rate

LOGITS = 1 << 24  # of an evaluation at a time, over all members
HISTORY = ("member", "step", "set", "loss", "accuracy")


class Team:
    """The members of a run: their weights, AdamW's moments, and one step of all.

    Attributes:
        flat: [members n] trained weights, in the order of `names`.
        mean, square: [members n] AdamW's moments.
        best, best_loss: the weights of least loss on the set `val` or `test`, and that loss.
        rows: what history.parquet will hold: [evaluations 5], see HISTORY.
    """

    name = "team"

    def __init__(self, spec: TrainingSpec, data: list[Batches], device: torch.device) -> None:
        self.spec, self.data, self.device = spec, data, device
        self.members = spec.members()
        self.model = build(spec.architecture, data[0].d_vocab).float().to(device)
        named = dict(self.model.named_parameters())
        self.names = [n for n in named if is_trained(n, spec.architecture)]
        self.shapes = [named[n].shape for n in self.names]
        self.sizes = [named[n].numel() for n in self.names]
        self.flat = torch.stack([self._drawn(seed) for _, _, seed in self.members]).to(device)
        for name in named.keys() - set(self.names):
            named[name].data.zero_()
        self.flat.requires_grad_()
        self.mean, self.square = torch.zeros_like(self.flat), torch.zeros_like(self.flat)
        self.best = self.flat.detach().clone()
        self.best_loss = torch.full((len(self.members),), math.inf, dtype=torch.float64)
        self.rows: list[tuple[float, ...]] = []
        self.count = torch.zeros(1, dtype=torch.long, device=device)  # updates done
        self.plan = self._plan().to(device)
        matrix = torch.tensor([float(len(s) > 1) for s in self.shapes])
        decays = matrix if spec.optimiser.decay == "matrices" else torch.ones_like(matrix)
        self.decays = decays.repeat_interleave(torch.tensor(self.sizes)).to(device)
        self.last = _last(data)
        self.forward = self._forward
        if spec.compile and device.type == "cuda":
            self.forward = self.checked(torch.compile(self._forward))
        self.graph: Any = None
        several = spec.architecture.family == "native" and len(self.members) > 1
        apart = several and device.type == "cuda" and not spec.compile
        self.streams = [torch.cuda.Stream(device) for _ in self.members] if apart else []

    def checked(self, compiled: Callable) -> Callable:
        """`compiled` where it has the gradient of the plain forward pass, which is taken otherwise.

        A compiler's fault is not seen in a loss that falls: for two members of the grokking model
        torch 2.11 gave, on an H100, gradients of W_Q and W_K that were wrong by their own size.
        Compared on the first batch, without dropout, parameter by parameter.
        """
        part, whole = (0.01, 1e-5) if self.spec.precision == "float32" else (0.1, 1e-2)
        self.model.eval()
        batch = self.batch(0)
        want, got = (
            torch.autograd.grad(f(*batch), self.flat)[0] for f in (self._forward, compiled)
        )
        self.model.train()
        off = torch.stack([d.norm() for d in (got - want).split(self.sizes, 1)])
        size = torch.stack([w.norm() for w in want.split(self.sizes, 1)])
        worst = int((off - part * size).argmax())
        if off[worst] <= part * size[worst] + whole * want.norm():
            return compiled
        cli.log.warning(
            "torch.compile gives the gradient of %s wrong by %.2g of its size; training without it",
            self.names[worst], float(off[worst] / size[worst]),
        )  # fmt: skip
        return self._forward

    def _drawn(self, seed: int) -> Tensor:
        drawn = build(self.spec.architecture, self.data[0].d_vocab).float()
        initial(drawn, self.spec.architecture, seed)
        named = dict(drawn.named_parameters())
        return torch.cat([named[n].detach().flatten() for n in self.names])

    def _plan(self) -> Tensor:
        """[steps members 3]: step size, root of the second moment's correction, decay.

        AdamW's update n is  w <- w · decay − size · m / (sqrt(v) / root + eps)  with
        size = lr / (1 − β1^n),  root = sqrt(1 − β2^n),  decay = lr · weight_decay.
        """
        (b1, b2), steps = self.spec.optimiser.betas, self.spec.steps
        n = np.arange(1, steps + 1, dtype=np.float64)
        out = np.empty((steps, len(self.members), 3))
        for i, (_, arm, _) in enumerate(self.members):
            lr = np.array([self.learning_rate(arm, int(step)) for step in n])
            decay = self.overlaid(arm, "weight_decay")
            out[:, i] = np.stack([lr / (1 - b1**n), np.sqrt(1 - b2**n), lr * decay], 1)
        return torch.from_numpy(out).float()

    def overlaid(self, arm: str, field: str) -> float:
        """A setting of the optimiser, as the arm has it."""
        own = getattr(self.spec.arms.get(arm), field, None)
        return getattr(self.spec.optimiser, field) if own is None else own

    def learning_rate(self, arm: str, step: int) -> float:
        """Of the arm's update number `step`; 0 before the first."""
        lr = self.overlaid(arm, "lr")
        return learning_rate(self.spec.optimiser, lr, step, self.spec.steps) if step else 0.0

    # resume.Trained
    def tensors(self) -> dict[str, Tensor]:
        return {
            "flat": self.flat.detach().cpu(),
            "mean": self.mean.cpu(),
            "square": self.square.cpu(),
            "best": self.best.cpu(),
            "best_loss": self.best_loss,
            "rows": torch.tensor(self.rows, dtype=torch.float64).view(-1, len(HISTORY)),
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        for name in ("flat", "mean", "square", "best"):
            getattr(self, name).copy_(state[name])
        self.best_loss = state["best_loss"]
        self.rows = [tuple(row) for row in state["rows"].tolist()]

    # one model
    def parameters(self, flat: Tensor) -> dict[str, Tensor]:
        """Name -> parameter, views of the weights [n] of one member."""
        pieces = flat.split(self.sizes)
        return {n: p.view(s) for n, p, s in zip(self.names, pieces, self.shapes, strict=True)}

    def logits(self, flat: Tensor, tokens: Tensor) -> Tensor:
        """[batch `last` d_vocab] of one member, in the dtype of the loss; `last` 0 is all."""
        how: dict[str, Any] = {"logits_to_keep": self.last} if self.last else {}
        if self.last and self.spec.architecture.family == "native":
            how["trim"] = True
        out = torch.func.functional_call(self.model, self.parameters(flat), (tokens,), how)
        return out.logits.to(getattr(torch, self.spec.loss_dtype))

    def loss(self, flat: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy over the targets that count, nats."""
        wanted = targets[:, -self.last :].flatten()
        return F.cross_entropy(self.logits(flat, tokens).flatten(0, 1), wanted)

    def each(self, function: Callable, *args: Tensor) -> Tensor:
        """A function of one member's weights and `args`, over all members: stacked.

        GPT-2's code is not made for vmap, so its members take turns.
        """
        if len(self.members) == 1:
            return function(self.flat[0], *[a[0] for a in args])[None]
        if self.spec.architecture.family == "gpt2":
            parts = [function(*one) for one in zip(self.flat, *args, strict=True)]
            return torch.stack(parts)
        return torch.vmap(function, randomness="different")(self.flat, *args)

    # all members
    def _autocast(self) -> torch.autocast:
        half = self.spec.precision == "bfloat16" and self.device.type == "cuda"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=half)

    def _forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        with self._autocast():
            return self.each(self.loss, tokens, targets).sum()

    def update(self, tokens: Tensor, targets: Tensor) -> None:
        """One step of every member, on tokens and targets [members batch pos]."""
        if self.streams:
            self.adamw(self.side_by_side(tokens, targets))
            return
        (gradient,) = torch.autograd.grad(self.forward(tokens, targets), self.flat)
        self.adamw(gradient)

    def side_by_side(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The gradient [members n], every member's on a stream of its own."""
        here = torch.cuda.current_stream()
        parts = []
        for i, stream in enumerate(self.streams):
            stream.wait_stream(here)
            with torch.cuda.stream(stream), self._autocast():
                flat = self.flat[i].detach().requires_grad_()
                parts += torch.autograd.grad(self.loss(flat, tokens[i], targets[i]), flat)
        for stream in self.streams:
            here.wait_stream(stream)
        return torch.stack(parts)

    @torch.no_grad()
    def adamw(self, gradient: Tensor) -> None:
        """AdamW with the step sizes of `plan`; no value leaves the device."""
        how = self.spec.optimiser
        if how.clip:
            norm = gradient.norm(dim=1, keepdim=True)
            gradient = gradient * (how.clip / (norm + 1e-6)).clamp(max=1)
        size, root, decay = self.plan.index_select(0, self.count)[0].split(1, 1)
        self.count += 1
        self.mean.lerp_(gradient, 1 - how.betas[0])
        self.square.mul_(how.betas[1]).addcmul_(gradient, gradient, value=1 - how.betas[1])
        scale = (self.square.sqrt() / root).add_(how.eps)
        self.flat.sub_(self.flat * (decay * self.decays))
        self.flat.sub_(size * self.mean / scale)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        pairs = [d.batch(step) for d in self.data]
        return torch.stack([t for t, _ in pairs]), torch.stack([t for _, t in pairs])

    def step(self, step: int) -> None:
        """The update from step to step + 1."""
        if self.spec.architecture.dropout:
            torch.manual_seed(batches.seeded(self.spec.seeds[0], step))  # of what is dropped
        if self.device.type != "cuda":
            self.update(*self.batch(step))
            return
        if self.graph is None:
            self._capture(step)
        elif not self.data[0].constant:
            for held, new in zip(self.held, self.batch(step), strict=True):
                held.copy_(new)
        self.graph.replay()

    def _capture(self, step: int) -> None:
        """Record a step as a CUDA graph; the state is what it was before."""
        self.held = [t.clone() for t in self.batch(step)]
        state = [self.flat, self.mean, self.square, self.count]
        before = [t.detach().clone() for t in state]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.update(*self.held)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.update(*self.held)
        with torch.no_grad():
            for now, then in zip(state, before, strict=True):
                now.copy_(then)

    @torch.no_grad()
    def evaluate(self, step: int) -> None:
        """Loss and accuracy of every member on every evaluation set, added to `rows`."""
        self.model.eval()
        for number, name in enumerate(self.data[0].evaluation):
            pairs = [d.evaluation[name] for d in self.data]
            loss, right, n = 0.0, 0.0, 0
            per = math.prod(pairs[0][0].shape[1:]) * self.data[0].d_vocab * len(self.members)
            for at in range(0, len(pairs[0][0]), width := max(1, LOGITS // per)):
                tokens, targets = (
                    torch.stack([pair[i][at : at + width] for pair in pairs]) for i in (0, 1)
                )
                logits = self.each(self.logits, tokens).flatten(1, 2).double()
                wanted = targets[..., -self.last :].flatten(1)
                counts = wanted != batches.IGNORED
                each = F.cross_entropy(logits.mT, wanted, reduction="none").sum(1)
                loss, n = loss + each, n + counts.sum(1)
                right = right + ((logits.argmax(-1) == wanted) & counts).sum(1)
            loss, accuracy = (loss / n).cpu(), (right / n).cpu()
            if not torch.isfinite(loss).all():
                bad = self.members[int((~torch.isfinite(loss)).nonzero()[0])][0]
                raise RetraceError(
                    f"training: member {bad} has a loss that is not finite at step {step}; lower "
                    f"optimiser.lr, or set clip"
                )
            self.rows += [(i, step, number, float(loss[i]), float(accuracy[i]))
                          for i in range(len(self.members))]  # fmt: skip
            if name in ("val", "test"):
                better = loss < self.best_loss
                self.best_loss = torch.where(better, loss, self.best_loss)
                where = better.to(self.device)[:, None]
                self.best = torch.where(where, self.flat.detach(), self.best)
        self.model.train()

    def state_dict(self, flat: Tensor) -> dict[str, Tensor]:
        """Name -> [members …] of weights [members n]; what is not trained is there, too."""
        pieces = flat.detach().cpu().split(self.sizes, 1)
        out = {n: p.reshape(len(flat), *s).contiguous()
               for n, p, s in zip(self.names, pieces, self.shapes, strict=True)}  # fmt: skip
        rest = dict(self.model.named_parameters())
        for name in rest.keys() - out.keys():
            out[name] = rest[name].detach().cpu().expand(len(flat), *rest[name].shape).contiguous()
        return out

    def history(self) -> Any:
        """The frame of history.parquet."""
        import pandas as pd

        sets = list(self.data[0].evaluation)
        frame = pd.DataFrame(self.rows, columns=HISTORY)
        frame = frame.astype({"member": int, "step": int, "set": int})
        who = [self.members[i] for i in frame["member"]]
        arms = [self.members[i][1] for i in frame["member"]]
        lr = [self.learning_rate(a, s) for a, s in zip(arms, frame["step"], strict=True)]
        tokens = math.prod(self.data[0].batch(0)[0].shape)
        return pd.DataFrame(
            {
                "member": [w[0] for w in who],
                "arm": [w[1] for w in who],
                "seed": [w[2] for w in who],
                "step": frame["step"],
                "tokens": frame["step"] * tokens,
                "lr": lr,
                "set": [sets[i] for i in frame["set"]],
                "loss": frame["loss"],
                "accuracy": frame["accuracy"],
            }
        )


def _last(data: list[Batches]) -> int:
    """1 where targets stand at the last position alone; 0 where they may stand at any."""
    found = [data[0].batch(0), *data[0].evaluation.values()]
    return int(all((y[:, :-1] == batches.IGNORED).all() for _, y in found))
