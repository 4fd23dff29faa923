"""Adam for one dictionary: its schedule, the clipping of gradients, and its state in a checkpoint.

1. The learning rate rises linearly, stays, and falls linearly to zero (SAELens,
   `get_lr_scheduler`).
2. The coefficients of the sparsity losses rise linearly from 0.
3. Gradients are clipped to a norm of 1, as SAELens's trainer does. On a GPU Adam divides by the
   factor while it reads the gradients, so that clipping costs no pass of its own.
"""

from typing import Any

import torch
from torch import Tensor

from pipeline.spec.sae import SaeTraining

CLIP_NORM = 1.0  # SAELens's SAETrainer, which has no option for it


def learning_rate(step: int, n_steps: int, training: SaeTraining) -> float:
    """Learning rate of step 0 to n_steps - 1, as in SAELens's `get_lr_scheduler`."""
    decay_steps = round(training.decay_share * n_steps)
    rise = (step + 1) / training.warmup_steps if training.warmup_steps else 1.0
    fall = (n_steps - step) / decay_steps if decay_steps else 1.0
    return training.lr * min(1.0, rise, fall)


def coefficients(sae: Any, step: int) -> dict[str, float]:
    """Name -> coefficient of SAELens's losses at a step, warmed up linearly from 0."""
    out = {}
    for name, given in sae.get_coefficients().items():
        value, warmup = given if isinstance(given, tuple) else (given, 0)
        out[name] = value * min(1.0, step / warmup) if warmup else value
    return out


class Optimiser:
    """Adam over the parameters of a dictionary that are trained.

    Args:
        sae: a SAELens TrainingSAE on its device.
        training: learning rate, betas and epsilon.

    Attributes:
        trained: name -> parameter.
        adam: fused; on one GPU its learning rate is a tensor, which a recorded step reads. Over
            several it is a number: fused Adam refuses a tensor that lies on another one of them.
        count: number of steps done, shared by all parameters after `begin`; else None.
    """

    def __init__(self, sae: Any, training: SaeTraining) -> None:
        self.device = device = next(sae.parameters()).device
        self.on_gpu = device.type == "cuda"
        self.count: Tensor | None = None
        self.trained = {n: p for n, p in sae.named_parameters() if p.requires_grad}
        self.adam = torch.optim.Adam(
            self.trained.values(),
            lr=training.lr,
            betas=training.betas,
            eps=training.eps,
            fused=device.type in ("cpu", "cuda"),
            capturable=self.on_gpu,
        )
        if self.on_gpu and len({p.device for p in self.trained.values()}) == 1:
            self.adam.param_groups[0]["lr"] = torch.tensor(training.lr, device=device)

    def begin(self) -> None:
        """Make Adam's state before its first step, its counts of steps one tensor: `count`."""
        self.count = torch.zeros((), device=self.device)
        for parameter in self.trained.values():
            moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            self.adam.state[parameter] = {"step": self.count} | moments

    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate of the next step."""
        if torch.is_tensor(self.adam.param_groups[0]["lr"]):
            self.adam.param_groups[0]["lr"].fill_(lr)
        else:
            self.adam.param_groups[0]["lr"] = lr

    def clip(self) -> None:
        """Clip the gradients to CLIP_NORM; on a GPU `adam` does it in its step."""
        if self.on_gpu:
            given = [p.grad for p in self.trained.values() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(given)
            self.adam.grad_scale = ((norm + 1e-6) / CLIP_NORM).clamp(min=1)
        else:
            torch.nn.utils.clip_grad_norm_(self.trained.values(), CLIP_NORM)

    def step(self) -> None:
        """Clip the gradients, update the parameters, and drop the gradients."""
        self.clip()
        self.adam.step()
        self.adam.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        """Adam's moments and step counts, for a checkpoint; these are no copies."""
        return {
            f"adam.{name}.{key}": value
            for name, parameter in self.trained.items()
            for key, value in self.adam.state[parameter].items()
        }

    def restore(self, tensors: dict[str, Tensor], device: torch.device) -> None:
        """Take up what `tensors` gave."""
        for name, parameter in self.trained.items():
            state = with_prefix(tensors, f"adam.{name}.", device)
            self.adam.state[parameter] = {k: _laid_out_as(parameter, t) for k, t in state.items()}
            if self.count is not None:
                self.count = self.adam.state[parameter]["step"]
        if self.count is not None:
            for state in self.adam.state.values():
                state["step"] = self.count


def with_prefix(tensors: dict[str, Tensor], prefix: str, device: torch.device) -> dict[str, Tensor]:
    """Copies on the device of the tensors whose name begins with a prefix, named without it."""
    return {
        name.removeprefix(prefix): tensor.to(device, copy=True)
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _laid_out_as(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A tensor of the parameter's shape with the parameter's strides; any other as it is."""
    return torch.empty_like(parameter).copy_(tensor) if tensor.shape == parameter.shape else tensor
