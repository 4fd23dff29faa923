"""Fine-tuning of transcoders of all layers on the next tokens of their replacement model. [torch]

After Circuits Research Landscape 2025, "KL Finetuning", which follows Karvonen 2025 (2503.17272):

    loss = NMSE + KL sg(NMSE / KL)

NMSE is the sum over layers of the squared error on true inputs, divided by the variance of what the
MLPs write; KL is from the model's next tokens to those of the replacement model, in which all MLPs
are replaced at once and no error is added; sg stops gradients, so that both terms have one size.

`tuned` trains all weights of a set by Adam, the learning rate falling linearly to 0:

kl        on the loss above
mse       on NMSE alone for as many steps, which is what longer training gives by itself
shuffled  with the model's next tokens of other positions in the place of the right ones: a null
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from pipeline.models import hooks, splice
from pipeline.tracing.dictionaries import Dictionaries
from pipeline.tracing.replacement import spliced

EVERY = 10  # steps between two rows of the history
Objective = Literal["kl", "mse", "shuffled"]


@dataclass(frozen=True)
class Truth:
    """What the model itself does on some blocks.

    Attributes:
        x, y: what MLPs read and write, of each layer.
        logits: of the next tokens.
    """

    x: list[Float[Tensor, "batch pos d_model"]]
    y: list[Float[Tensor, "batch pos d_model"]]
    logits: Float[Tensor, "batch pos d_vocab"]

    @classmethod
    @torch.no_grad()
    def of(cls, hf: nn.Module, block: Int64[Tensor, "batch pos"], d: Dictionaries) -> "Truth":
        last = f"blocks.{d.n_layers - 1}.hook_resid_post"
        acts = hooks.run_to(hf, block, [*dict.fromkeys([*d.hooks, *d.output_hooks, last])])
        read, written = ([acts[h].float() for h in of] for of in (d.hooks, d.output_hooks))
        return cls(read, written, splice.unembed(hf, acts[last]))


def unexplained(d: Dictionaries, truth: Truth) -> Float[Tensor, " layers"]:
    """Share of the variance of what each MLP writes that is left, each layer fed its true input."""
    written: list[Tensor | float] = [0.0] * d.n_layers
    for layer, x in enumerate(truth.x):
        for i, part in enumerate(d.decode(layer, d.encode(layer, x))):
            written[layer + i] = written[layer + i] + part
    left = []
    for layer, (x, y) in enumerate(zip(truth.x, truth.y, strict=True)):
        rows = (y - written[layer] - d.rest(layer, x))[:, d.skip_first :].flatten(0, 1)
        whole = y[:, d.skip_first :].flatten(0, 1)
        left.append(rows.square().sum() / (whole - whole.mean(0)).square().sum())
    return torch.stack(left)


def divergence(
    theirs: Float[Tensor, "batch pos d_vocab"], ours: Float[Tensor, "batch pos d_vocab"]
) -> Float[Tensor, ""]:
    """KL(theirs || ours) in nats, mean over positions."""
    log_p, log_q = theirs.float().log_softmax(-1), ours.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def weights_of(d: Dictionaries) -> list[Tensor]:
    """All that is trained."""
    return [*d.W_enc, *d.b_enc, *d.W_dec, d.b_dec, *(d.W_skip or [])]


def adam(d: Dictionaries, lr: float) -> torch.optim.Adam:
    """Adam whose steps are shares of each tensor's size."""
    found = weights_of(d)
    size = [float(w.detach().square().mean().sqrt().clamp(min=1e-4)) for w in found]
    groups = [
        {"params": [w.requires_grad_()], "lr": lr * s} for w, s in zip(found, size, strict=True)
    ]
    return torch.optim.Adam(groups)


def batches(n: int, size: int, draw: torch.Generator) -> Iterator[Tensor]:
    """Numbers of blocks, each once before any comes again."""
    left = torch.empty(0, dtype=torch.long)
    while True:
        while len(left) < size:
            left = torch.cat([left, torch.randperm(n, generator=draw)])
        some, left = left[:size], left[size:]
        yield some


def tuned(
    hf: nn.Module, d: Dictionaries, read: Int64[Tensor, "blocks pos"], objective: Objective, *,
    n_steps: int, batch_blocks: int, lr: float, seed: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Train a set in place; rows of its history.

    Args:
        batch_blocks: blocks of text a step.
        lr: of each tensor, a share of its RMS.
        seed: of the order of blocks.
    """
    draw = torch.Generator().manual_seed(seed)
    optimiser, rows = adam(d, lr), []
    falling = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, n_steps)
    order = batches(len(read), min(batch_blocks, len(read)), draw)
    for step in range(n_steps):
        block = read[next(order).to(read.device)]
        truth = Truth.of(hf, block, d)
        loss = nmse = unexplained(d, truth).sum()
        kl = None
        if objective != "mse":
            theirs = truth.logits[:, d.skip_first :]
            if objective == "shuffled":
                flat = theirs.flatten(0, 1)
                theirs = flat[torch.randperm(len(flat), generator=draw)].view_as(theirs)
            kl = divergence(theirs, spliced(hf, block, d)[:, d.skip_first :])
            loss = nmse + kl * (nmse / kl.clamp(min=1e-6)).detach()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        falling.step()
        if not step % EVERY:
            row = {"step": step, "nmse": float(nmse.detach())}
            rows.append(row | {"kl": float("nan") if kl is None else float(kl.detach())})
    for w in weights_of(d):
        w.requires_grad_(False)
    return rows
