"""One model, run with the weights of each member of a training run: logits, loss, gradient. [torch]

`vmap` runs the model over the rows of weights, so that ten small models cost little more than one.
GPT-2's code does not work under vmap, so its members are run one after another. On a GPU small
members are run side by side, each on its own CUDA stream: products under vmap are slower there than
separate ones.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from pipeline.errors import RetraceError
from pipeline.job import cli
from pipeline.spec.training import TrainingSpec
from pipeline.weights import batches
from pipeline.weights.batches import Batches
from pipeline.weights.flat import Layout
from pipeline.weights.initial import build
from pipeline.weights.lora import LowRank


class Forward:
    """The model of a run as a function of weights.

    Args:
        data: the data of one member; all have targets at the same positions.
        start: name -> weight that training starts from; empty: those of `drawn`.

    Attributes:
        model: its trained parameters are replaced on every call; the others are those of `start`,
            or zero.
        layout: which parameters a row of weights holds.
        last: 1 if all targets stand at the last position, else 0.
        streams: a CUDA stream per member, if they are run side by side.
    """

    def __init__(
        self,
        spec: TrainingSpec,
        data: Batches,
        device: torch.device,
        start: dict[str, Tensor] | None = None,
    ) -> None:
        self.spec, self.device = spec, device
        self.n_members = len(spec.members())
        self.model = build(spec.architecture, data.d_vocab).float()
        if start:
            load(self.model, start, spec.start.run)
        self.model.to(device)
        self.layout = Layout.of(self.model, spec.architecture)
        named = dict(self.model.named_parameters())
        for name in named.keys() - set(self.layout.names):
            named[name].data.zero_()
        if spec.lora:
            self.layout = LowRank.of(self.model.requires_grad_(False), spec)
        self.last = last_only(data)
        self._total: Callable[..., Tensor] = self.total_loss
        several = spec.architecture.family == "native" and self.n_members > 1
        apart = several and device.type == "cuda" and not spec.compile
        self.streams = [torch.cuda.Stream(device) for _ in range(self.n_members)] if apart else []

    def logits(
        self, flat: Float[Tensor, " n"], tokens: Int64[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch last d_vocab"]:
        """Logits of one member in the dtype of the loss, at the last position or at all."""
        how: dict[str, Any] = {"logits_to_keep": self.last} if self.last else {}
        if self.last and self.spec.architecture.family == "native":
            how["trim"] = True
        out = torch.func.functional_call(self.model, self.layout.named(flat), (tokens,), how)
        return out.logits.to(getattr(torch, self.spec.loss_dtype))

    def loss(
        self,
        flat: Float[Tensor, " n"],
        tokens: Int64[Tensor, "batch pos"],
        targets: Int64[Tensor, "batch pos"],
    ) -> Float[Tensor, ""]:
        """Mean cross entropy of one member over the targets that count, in nats."""
        wanted = targets[:, -self.last :].flatten()
        return F.cross_entropy(self.logits(flat, tokens).flatten(0, 1), wanted)

    def each(
        self, function: Callable[..., Tensor], flat: Float[Tensor, "members n"], *args: Tensor
    ) -> Tensor:
        """A function of one member's weights and part of `args`, for all members, stacked."""
        if self.n_members == 1:
            return function(flat[0], *[a[0] for a in args])[None]
        if self.spec.architecture.family == "gpt2":
            parts = [function(*one) for one in zip(flat, *args, strict=True)]
            return torch.stack(parts)
        return torch.vmap(function, randomness="different")(flat, *args)

    def total_loss(
        self,
        flat: Float[Tensor, "members n"],
        tokens: Int64[Tensor, "members batch pos"],
        targets: Int64[Tensor, "members batch pos"],
    ) -> Float[Tensor, ""]:
        """The sum of all members' losses, whose gradient in a row is that of one member's loss."""
        with self._autocast():
            return self.each(self.loss, flat, tokens, targets).sum()

    def _autocast(self) -> torch.autocast:
        half = self.spec.precision == "bfloat16" and self.device.type == "cuda"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=half)

    def gradient(
        self,
        flat: Float[Tensor, "members n"],
        tokens: Int64[Tensor, "members batch pos"],
        targets: Int64[Tensor, "members batch pos"],
    ) -> Float[Tensor, "members n"]:
        """The gradient of each member's loss in its weights."""
        with repeatable(self.device):
            if self.streams:
                return self.side_by_side(flat, tokens, targets)
            return torch.autograd.grad(self._total(flat, tokens, targets), flat)[0]

    def side_by_side(
        self,
        flat: Float[Tensor, "members n"],
        tokens: Int64[Tensor, "members batch pos"],
        targets: Int64[Tensor, "members batch pos"],
    ) -> Float[Tensor, "members n"]:
        """The same gradient, each member's on its own CUDA stream."""
        here = torch.cuda.current_stream()
        parts = []
        for i, stream in enumerate(self.streams):
            stream.wait_stream(here)
            with torch.cuda.stream(stream), self._autocast():
                row = flat[i].detach().requires_grad_()
                parts += torch.autograd.grad(self.loss(row, tokens[i], targets[i]), row)
        for stream in self.streams:
            here.wait_stream(stream)
        return torch.stack(parts)

    def compile(
        self,
        flat: Float[Tensor, "members n"],
        tokens: Int64[Tensor, "members batch pos"],
        targets: Int64[Tensor, "members batch pos"],
    ) -> None:
        """Use torch.compile from now on, if it gives the right gradient on this batch."""
        compiled = torch.compile(self.total_loss)
        self._total = self.checked(compiled, flat, tokens, targets)

    def checked(
        self, compiled: Callable[..., Tensor], flat: Float[Tensor, "members n"], *batch: Tensor
    ) -> Callable[..., Tensor]:
        """`compiled` if its gradient is that of `total_loss`, else `total_loss`.

        A compiler's fault does not show in a loss that falls: for two members of the grokking model
        torch 2.11 gave, on an H100, gradients of W_Q and W_K that were wrong by their own size. The
        gradients are compared without dropout, parameter by parameter.
        """
        part, whole = (0.01, 1e-5) if self.spec.precision == "float32" else (0.1, 1e-2)
        self.model.eval()
        want, got = (
            torch.autograd.grad(f(flat, *batch), flat)[0] for f in (self.total_loss, compiled)
        )
        self.model.train()
        sizes = self.layout.sizes
        off = torch.stack([d.norm() for d in (got - want).split(sizes, 1)])
        size = torch.stack([w.norm() for w in want.split(sizes, 1)])
        worst = int((off - part * size).argmax())
        if off[worst] <= part * size[worst] + whole * want.norm():
            return compiled
        cli.log.warning(
            "torch.compile gives the gradient of %s wrong by %.2g of its size; training without it",
            self.layout.names[worst], float(off[worst] / size[worst]),
        )  # fmt: skip
        return self.total_loss

    def state_dict(self, flat: Float[Tensor, "members n"]) -> dict[str, Tensor]:
        """Name -> [members …], parameters that are not trained included."""
        out = self.layout.stacked(flat)
        rest = dict(self.model.named_parameters())
        for name in rest.keys() - out.keys():
            out[name] = rest[name].detach().cpu().expand(len(flat), *rest[name].shape).contiguous()
        return out


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """On a GPU, gradients have the same bits in every run; fused attention's have not otherwise."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = False  # it takes time, and shows nothing
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when a product is first made
    torch.use_deterministic_algorithms(before or device.type == "cuda", warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def load(model: torch.nn.Module, state: dict[str, Tensor], run: str) -> None:
    """Put the weights of a training run into a model; RetraceError where they do not fit."""
    try:
        found = model.load_state_dict(state, strict=False)  # tied weights are not in it
    except RuntimeError as e:
        said = str(e).splitlines()[-1].strip()
        raise RetraceError(
            f"training: the weights of run '{run}' do not fit ({said}); start from a run with the "
            f"same architecture and vocabulary"
        ) from None
    assert not found.unexpected_keys, found


def last_only(data: Batches) -> int:
    """1 if targets stand at the last position only; 0 if they may stand at any."""
    found = [data.batch(0), *data.evaluation.values()]
    return int(all((y[:, :-1] == batches.IGNORED).all() for _, y in found))
