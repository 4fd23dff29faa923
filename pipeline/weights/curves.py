"""Loss and accuracy of each member on the evaluation sets, and its best weights. [torch]"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from pipeline.errors import RetraceError
from pipeline.spec.training import TrainingSpec
from pipeline.weights import batches
from pipeline.weights.adamw import learning_rate_of
from pipeline.weights.batches import Batches
from pipeline.weights.forward import Forward

LOGITS = 1 << 24  # logits held at a time, over all members
HISTORY = ("member", "step", "set", "loss", "accuracy")


class Curves:
    """What the evaluations of a run gave.

    Args:
        data: one per member.
        flat: the members' first weights.

    Attributes:
        rows: one per member, evaluation and set, with the columns HISTORY, all of them numbers.
        best, best_loss: the weights with the least loss on the set `val` or `test`, and that loss.
    """

    def __init__(
        self, spec: TrainingSpec, data: list[Batches], flat: Float[Tensor, "members n"]
    ) -> None:
        self.spec, self.data, self.members = spec, data, spec.members()
        self.rows: list[tuple[float, ...]] = []
        self.best = flat.detach().clone()
        self.best_loss = torch.full((len(self.members),), math.inf, dtype=torch.float64)

    @torch.no_grad()
    def evaluate(self, forward: Forward, flat: Float[Tensor, "members n"], step: int) -> None:
        """Evaluate all members on every set, and add a row for each.

        Raises:
            RetraceError: a loss is not finite.
        """
        forward.model.eval()
        for number, name in enumerate(self.data[0].evaluation):
            loss, accuracy = self._measured(forward, flat, name)
            if not torch.isfinite(loss).all():
                bad = self.members[int((~torch.isfinite(loss)).nonzero()[0])][0]
                raise RetraceError(
                    f"training: member {bad} has a loss that is not finite at step {step}; lower "
                    f"optimiser.lr, or set clip"
                )
            pairs = zip(loss.tolist(), accuracy.tolist(), strict=True)
            self.rows += [(i, step, number, *pair) for i, pair in enumerate(pairs)]
            if name in ("val", "test"):
                self._keep_best(flat, loss)
        forward.model.train()

    def _measured(
        self, forward: Forward, flat: Float[Tensor, "members n"], name: str
    ) -> tuple[Float[Tensor, " members"], Float[Tensor, " members"]]:
        """Mean loss in nats and accuracy of each member on a set, float64 on the CPU."""
        pairs = [d.evaluation[name] for d in self.data]
        loss, right, n = 0.0, 0.0, 0
        per = math.prod(pairs[0][0].shape[1:]) * self.data[0].d_vocab * len(self.members)
        width = max(1, LOGITS // per)
        for at in range(0, len(pairs[0][0]), width):
            tokens, targets = (
                torch.stack([pair[i][at : at + width] for pair in pairs]) for i in (0, 1)
            )
            logits = forward.each(forward.logits, flat, tokens).flatten(1, 2).double()
            wanted = targets[..., -forward.last :].flatten(1)
            counts = wanted != batches.IGNORED
            each = F.cross_entropy(logits.mT, wanted, reduction="none").sum(1)
            loss, n = loss + each, n + counts.sum(1)
            right = right + ((logits.argmax(-1) == wanted) & counts).sum(1)
        return (loss / n).cpu(), (right / n).cpu()

    def _keep_best(self, flat: Float[Tensor, "members n"], loss: Float[Tensor, " members"]) -> None:
        """Keep the weights of members whose loss is the least so far."""
        better = loss < self.best_loss
        self.best_loss = torch.where(better, loss, self.best_loss)
        where = better.to(flat.device)[:, None]
        self.best = torch.where(where, flat.detach(), self.best)

    def history(self) -> Any:
        """The DataFrame of history.parquet: one row per member, evaluation and set."""
        import pandas as pd

        sets = list(self.data[0].evaluation)
        frame = pd.DataFrame(self.rows, columns=HISTORY)
        frame = frame.astype({"member": int, "step": int, "set": int})
        members = [self.members[i] for i in frame["member"]]
        arms, steps = [arm for _, arm, _ in members], frame["step"]
        lr = [learning_rate_of(self.spec, a, s) for a, s in zip(arms, steps, strict=True)]
        tokens = math.prod(self.data[0].batch(0)[0].shape)
        return pd.DataFrame(
            {
                "member": [name for name, _, _ in members],
                "arm": arms,
                "seed": [seed for _, _, seed in members],
                "step": steps,
                "tokens": steps * tokens,
                "lr": lr,
                "set": [sets[i] for i in frame["set"]],
                "loss": frame["loss"],
                "accuracy": frame["accuracy"],
            }
        )
