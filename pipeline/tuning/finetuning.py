"""Fine-tuning a causal LM: on answers alone, and on preferences between two answers. [torch]

1. `pairs` lays prompts and answers out as (tokens, targets), with targets on the answers only, as a
   training run's data have them (batches.py).
2. `answer_loss` is supervised fine-tuning: the mean cross entropy of the answers' tokens.
3. `dpo` is direct preference optimisation (Rafailov et al. 2023, Equation 7), of log-probabilities
   of whole answers (`sequence_logps`) under the model and under the frozen one that it began as.
4. `finetune` takes the steps.
"""

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from pipeline.weights.batches import IGNORED


class Preference(NamedTuple):
    """What a step of DPO says of its pairs, [batch] each.

    Attributes:
        loss: -log sigmoid(chosen - rejected), in nats.
        chosen, rejected: implicit rewards, beta times the log ratio to the reference, in nats.
    """

    loss: Float[Tensor, " batch"]
    chosen: Float[Tensor, " batch"]
    rejected: Float[Tensor, " batch"]


def pairs(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Tokens, and the next token where it belongs to the answer; elsewhere IGNORED.

    Rows are as long as the longest; behind a shorter one stands token 0, which nothing before it
    reads.
    """
    whole = [torch.tensor([*p, *a]) for p, a in zip(prompts, answers, strict=True)]
    tokens = nn.utils.rnn.pad_sequence(whole, batch_first=True)
    at = torch.arange(1, tokens.shape[1])
    begins = torch.tensor([len(p) for p in prompts])[:, None]
    ends = torch.tensor([len(w) for w in whole])[:, None]
    answer = (at >= begins) & (at < ends)
    return tokens[:, :-1], tokens[:, 1:].masked_fill(~answer, IGNORED)


def answer_loss(
    model: nn.Module, tokens: Int[Tensor, "batch pos"], targets: Int[Tensor, "batch pos"]
) -> Float[Tensor, ""]:
    """Mean cross entropy over the targets that count, in nats."""
    return F.cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten())


def sequence_logps(
    logits: Float[Tensor, "batch pos d_vocab"], targets: Int[Tensor, "batch pos"]
) -> Float[Tensor, " batch"]:
    """Log-probability of each row's targets that count, summed, in nats."""
    known = targets != IGNORED
    found = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return (found * known).sum(-1)


def dpo(
    chosen: Float[Tensor, " batch"], rejected: Float[Tensor, " batch"],
    reference_chosen: Float[Tensor, " batch"], reference_rejected: Float[Tensor, " batch"],
    beta: float,
) -> Preference:  # fmt: skip
    """The loss of DPO and its implicit rewards (Rafailov et al. 2023, Equations 5 and 7).

    Args:
        chosen, rejected: log-probabilities of answers under the model that is trained.
        reference_chosen, reference_rejected: under the one that it began as.
        beta: weight of the divergence from the reference.
    """
    above, below = beta * (chosen - reference_chosen), beta * (rejected - reference_rejected)
    return Preference(-F.logsigmoid(above - below), above, below)


def preference(
    model: nn.Module, reference: nn.Module, beta: float,
    tokens: Int[Tensor, "twice pos"], targets: Int[Tensor, "twice pos"],
) -> Preference:  # fmt: skip
    """DPO of pairs whose chosen answers are the first half of the rows, the rejected the second."""
    with torch.no_grad():
        before = sequence_logps(reference(tokens).logits, targets).chunk(2)
    return dpo(*sequence_logps(model(tokens).logits, targets).chunk(2), *before, beta)


def finetune(
    model: nn.Module, loss: Callable[[nn.Module, int], Tensor], steps: int, lr: float,
    warmup_steps: int = 0, clip: float = 1.0,
) -> nn.Module:  # fmt: skip
    """A copy of a model, trained by AdamW without decay; the model itself stays as it is.

    Args:
        loss: (model, step) -> the loss of step 0, 1, …
        lr: reached along a line over the first warmup_steps, then falling along a line to 0.
        clip: largest norm of a gradient.
    """
    tuned = copy.deepcopy(model).train().requires_grad_()
    optimiser = torch.optim.AdamW(tuned.parameters(), lr=lr, weight_decay=0.0)
    with torch.enable_grad():
        for step in range(steps):
            rise = min((step + 1) / max(warmup_steps, 1), 1)
            optimiser.param_groups[0]["lr"] = lr * rise * (1 - step / steps)
            optimiser.zero_grad()
            loss(tuned, step).backward()
            nn.utils.clip_grad_norm_(tuned.parameters(), clip)
            optimiser.step()
    return tuned.eval().requires_grad_(False)
