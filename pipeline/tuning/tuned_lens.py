"""Train the translators of a tuned lens, all layers from one forward pass per batch. [torch]

Belrose et al. (2023), Section 3 and the released package (tuned-lens, scripts/train_loop.py and
scripts/ingredients.py): for the model's prediction p and the lens q_l of layer l,

    loss = sum over l of the mean over tokens of KL(p || q_l),
    q_l = softmax(W_U N(x_l + A_l x_l + b_l))

1. A_l = 0 and b_l = 0 at the start, so that the lens is the logit lens, and weight decay pulls
   towards it. Final norm and unembedding are the model's own, and frozen.
2. SGD with Nesterov momentum 0.9, its learning rate 1 · (1 - 0.9) falling linearly to 0; or Adam
   (AMSGrad) at 1e-3 with a linear warm-up over a fifth of the steps. Each layer's gradient is
   clipped to a norm of 1. The package clips that of all layers together; but translators have
   nothing to do with each other, and where one layer is far from the prediction (SmolLM2's
   embeddings by 83 nats) it would leave the others hardly a step.
3. A batch is a function of (seed, step), so that a killed run goes on as if undisturbed.
4. With `head`, the softmax runs over the tokens that the model finds likeliest in the batch, and
   over a random sample of the rest, which stands for all of it: an estimate of the same loss for
   machines without a GPU.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from pipeline.errors import RetraceError
from pipeline.job import cli
from pipeline.models import lens, places, splice
from pipeline.spec.base import Section
from pipeline.store.checkpoints import Checkpoints
from pipeline.weights.batches import seeded

WARMUP_SHARE = 5  # Adam: steps // 5 warm up


class TunedLensSpec(Section):
    """How a tuned lens is trained; the defaults are the released package's."""

    every: int = Field(default=1, ge=1, description="translators for each so-many-th layer")
    steps: int = Field(default=250, ge=1)
    tokens_per_step: int = Field(default=1 << 18, ge=1, description="whole blocks, at least one")
    optimiser: Literal["sgd", "adam"] = "sgd"
    lr_scale: float = Field(default=1.0, gt=0, description="times 1 for SGD, 1e-3 for Adam")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Adam: its first beta")
    weight_decay: float = Field(default=1e-3, ge=0)
    clip: float = Field(default=1.0, gt=0, description="largest norm of a layer's gradient")
    head: int = Field(default=0, ge=0, description="likeliest tokens in the softmax; 0: all tokens")
    tail: int = Field(default=1024, ge=1, description="with head: tokens sampled from the rest")
    skip_first: int = Field(default=0, ge=0, description="positions left out, such as BOS")
    seed: int = Field(default=0, ge=0, description="of the batches")
    save_every: int = Field(default=25, ge=1, exclude=True, description="steps between states")


def vocabulary(
    p: Float[Tensor, "tokens d_vocab"], how: TunedLensSpec, step: int
) -> tuple[Int[Tensor, " columns"] | None, Float[Tensor, " columns"] | None]:
    """Tokens in the softmax of a step and the logarithm of how many each stands for.

    Args:
        p: the model's prediction.

    Returns:
        None, None for the whole vocabulary.
    """
    d_vocab = p.shape[-1]
    if not how.head or how.head + how.tail >= d_vocab:
        return None, None
    order = p.mean(0).argsort(descending=True, stable=True)
    generator = torch.Generator().manual_seed(seeded(how.seed, step, 1))
    rest = torch.randperm(d_vocab - how.head, generator=generator)[: how.tail]
    columns = torch.cat([order[: how.head], order[how.head :][rest.to(order.device)]])
    weight = torch.zeros(len(columns), device=p.device)
    weight[how.head :] = np.log((d_vocab - how.head) / how.tail)
    return columns, weight


class TunedLens:
    """The translators of one model in training.

    Args:
        name: the model's name, for error messages and files.
        hf: the model.
        blocks: training tokens.
    """

    def __init__(
        self, name: str, hf: nn.Module, blocks: Int[Tensor, "blocks pos"], how: TunedLensSpec
    ) -> None:
        self.name, self.hf, self.blocks, self.how = name, hf, blocks, how
        self.layers = list(range(0, lens.n_layers(hf), how.every))
        d = hf.config.hidden_size
        new = lambda *shape: nn.Parameter(torch.zeros(*shape, device=blocks.device))  # noqa: E731
        self.A = {layer: new(d, d) for layer in self.layers}
        self.b = {layer: new(d) for layer in self.layers}
        self.history = torch.full((how.steps, len(self.layers)), torch.nan)
        self.parameters = [*self.A.values(), *self.b.values()]
        if how.optimiser == "sgd":
            self.optimiser = torch.optim.SGD(
                self.parameters, lr=how.lr_scale * (1 - how.momentum), momentum=how.momentum,
                nesterov=how.momentum > 0, weight_decay=how.weight_decay,
            )  # fmt: skip
        else:
            self.optimiser = torch.optim.Adam(
                self.parameters, lr=how.lr_scale * 1e-3, betas=(how.momentum, 0.999),
                amsgrad=True, weight_decay=how.weight_decay,
            )  # fmt: skip
        self.lr = self.optimiser.param_groups[0]["lr"]
        self._order = lru_cache(2)(self._shuffled)

    @property
    def translators(self) -> lens.Translators:
        return lens.Translators(
            {k: v.detach() for k, v in self.A.items()}, {k: v.detach() for k, v in self.b.items()}
        )

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        warmup = self.how.steps // WARMUP_SHARE if self.how.optimiser == "adam" else 0
        if step < warmup:
            return self.lr * (step + 1) / warmup
        return self.lr * (self.how.steps - step) / (self.how.steps - warmup)

    def _shuffled(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(seeded(self.how.seed, epoch))
        return torch.randperm(len(self.blocks), generator=generator)

    def batch(self, step: int) -> Int[Tensor, "blocks pos"]:
        """The blocks of a step; every block once per epoch."""
        n = max(1, self.how.tokens_per_step // self.blocks.shape[1])
        places = range(step * n, (step + 1) * n)
        ids = [self._order(i // len(self.blocks))[i % len(self.blocks)] for i in places]
        return self.blocks[torch.stack(ids).to(self.blocks.device)]

    def step(self, step: int) -> None:
        """One update of all layers."""
        batch = self.batch(step)
        n = batch[:, self.how.skip_first :].numel()
        found = torch.zeros(len(self.layers), dtype=torch.float64)
        self.optimiser.zero_grad(set_to_none=True)
        for (tokens,) in lens.passes(self.hf, batch):
            found += self.gradients(tokens, step, n)
        for layer in self.layers:
            nn.utils.clip_grad_norm_([self.A[layer], self.b[layer]], self.how.clip)
        self.optimiser.param_groups[0]["lr"] = self.learning_rate(step)
        self.optimiser.step()
        self.history[step] = found.float()
        if not found.isfinite().all():
            raise RetraceError(
                f"tuned lens of {self.name}: the KL of step {step} is not finite; lower "
                f"lr_scale {self.how.lr_scale:g}"
            )

    def gradients(
        self, tokens: Int[Tensor, "batch pos"], step: int, n: int
    ) -> Float[Tensor, " layers"]:
        """Add a pass's part of the gradient; the KL of each layer summed over it, over n.

        The gradient of the KL by the lens's logits is q - p: the unembedding is applied by hand, so
        that no layer's logits are kept.
        """
        with torch.no_grad():
            x, logits = lens.streams(self.hf, tokens)
            flat = lambda t: t[:, self.how.skip_first :].flatten(0, 1)  # noqa: E731
            log_p = flat(logits).log_softmax(-1)
            p = log_p.exp()
            head = self.hf.get_output_embeddings()
            W, bias = (None if t is None else places.full(t) for t in (head.weight, head.bias))
            columns, weight = vocabulary(p, self.how, step)
            if columns is not None:
                W, bias = W[columns], None if bias is None else bias[columns]
                p = p[:, columns] * weight.exp()
                p, log_p = p / p.sum(-1, keepdim=True), log_p[:, columns] + weight
            negative_entropy = torch.linalg.vecdot(p, log_p)
        found = []
        for layer in self.layers:
            h = flat(x[layer])
            moved = (h + F.linear(h, self.A[layer], self.b[layer])).to(head.weight.dtype)
            y = places.full(splice.final_norm(self.hf)(moved))
            with torch.no_grad():
                z = F.linear(y, W, bias)
                log_q = (z if weight is None else z.add_(weight)).log_softmax(-1)
                kl = negative_entropy - torch.linalg.vecdot(p, log_q)
                dy = log_q.exp_().sub_(p) @ W / n
            y.backward(dy)
            found.append(kl.sum(dtype=torch.float64) / n)
        return torch.stack(found).cpu()

    def tensors(self) -> dict[str, Tensor]:
        """The whole state, for a checkpoint."""
        out = {f"{i}": p.detach() for i, p in enumerate(self.parameters)}
        out["history"] = self.history
        for i, p in enumerate(self.parameters):
            out |= {f"{i}.{k}": v for k, v in self.optimiser.state[p].items()}
        return {name: t.contiguous() for name, t in out.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up a state that `tensors` gave."""
        self.history.copy_(state["history"])
        for name, t in state.items():
            number, _, key = name.partition(".")
            if number == "history":
                continue
            p = self.parameters[int(number)]
            if key:  # a counter of steps stays on the CPU, where Adam wants it
                self.optimiser.state[p][key] = t.clone() if key == "step" else t.to(p.device)
            else:
                p.data.copy_(t)


def train(tuned: TunedLens, checkpoints: Checkpoints) -> None:
    """Train to the end, from the newest state that a killed run left."""
    how = tuned.how
    per_step = tuned.batch(0).numel()
    first = checkpoints.load([tuned])
    progress = cli.Progress(tuned.name, how.steps * per_step, "tokens", first * per_step)
    for step in range(first, how.steps):
        tuned.step(step)
        if (step + 1) % how.save_every == 0 or step + 1 == how.steps:
            checkpoints.save(step + 1, [tuned])
        progress.at((step + 1) * per_step)


def history(tuned: TunedLens) -> dict[str, Any]:
    """Columns step, tokens, lr, layer, kl: one row per step and layer."""
    steps, layers = np.arange(tuned.how.steps), np.asarray(tuned.layers)
    rates = [tuned.learning_rate(s) for s in steps.tolist()]
    n = len(layers)
    return {
        "step": steps.repeat(n) + 1,
        "tokens": (steps.repeat(n) + 1) * tuned.batch(0).numel(),
        "lr": np.repeat(rates, n),
        "layer": np.tile(layers, len(steps)),
        "kl": tuned.history.flatten().numpy(),
    }


def packed(found: lens.Translators, name: str) -> dict[str, Tensor]:
    """Translators as tensors of a file that holds those of several lenses, see `read`."""
    maps = {"A": found.A, "b": found.b}
    return {f"{name}.{kind}.{i}": t.cpu() for kind, of in maps.items() for i, t in of.items()}


def read(file: str | Path, name: str, device: torch.device) -> lens.Translators:
    """The translators of one name, out of a file of `packed` tensors."""
    from safetensors.torch import load_file

    found: dict[str, dict[int, Tensor]] = {"A": {}, "b": {}}
    for key, t in load_file(file).items():
        of, kind, layer = key.rsplit(".", 2)
        if of == name:
            found[kind][int(layer)] = t.to(device)
    return lens.Translators(**{k: dict(sorted(v.items())) for k, v in found.items()})
