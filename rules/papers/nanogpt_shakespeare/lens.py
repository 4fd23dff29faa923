"""The logit lens: what a model would say after each of its layers. [torch]

nostalgebraist, "interpreting GPT: the logit lens" (2020). For the residual stream x_l after l
blocks, and the model's own last layer norm and unembedding:

    p_l = softmax(W_U LN_f(x_l)),        p_n = the model's prediction

1. Over held-out text, for every l: KL(p_n || p_l), the cross entropy of the true next character,
   how often it is the likeliest, and how often the likeliest is the model's own.
2. For one excerpt: the likeliest character at every layer and position.
"""

from collections.abc import Iterator
from typing import Any

import pandas as pd
import torch
from pydantic import Field
from torch import Tensor

from pipeline import training_data
from pipeline.errors import RetraceError
from pipeline.spec_base import Section

BATCH = 16  # windows a forward pass
MEASURES = ("kl", "loss", "accuracy", "agreement")


class Options(Section):
    """How much held-out text is measured, and which of it is shown."""

    n_tokens: int = Field(default=20_000, ge=1, description="held-out tokens measured, at most")
    n_shown: int = Field(default=40, ge=1, description="positions of the excerpt, at most")
    window: int = Field(default=0, ge=0, description="held-out window that the excerpt ends")


@torch.no_grad()
def log_probabilities(lm: Any, tokens: Tensor) -> Iterator[Tensor]:
    """log p_l of every l from 0 (embeddings) to n (the model's prediction).

    Args:
        lm: a GPT2LMHeadModel.
        tokens: [batch pos].

    Yields:
        [batch pos d_vocab], float64.
    """
    out = lm(tokens, output_hidden_states=True)
    for x in out.hidden_states[:-1]:  # the last is behind the layer norm already
        yield lm.lm_head(lm.transformer.ln_f(x)).double().log_softmax(-1)
    yield out.logits.double().log_softmax(-1)


def measure(lm: Any, tokens: Tensor, targets: Tensor) -> pd.DataFrame:
    """One row a layer: MEASURES as means over all positions.

    Args:
        tokens, targets: [windows pos].
    """
    sums: dict[int, Tensor] = {}
    for at in range(0, len(tokens), BATCH):
        wanted = targets[at : at + BATCH, :, None]
        *inner, final = log_probabilities(lm, tokens[at : at + BATCH])
        top = final.argmax(-1)
        for layer, log_p in enumerate([*inner, final]):
            own = log_p.argmax(-1)
            found = [
                (final.exp() * (final - log_p)).sum(),
                -log_p.gather(-1, wanted).sum(),
                (own == wanted[..., 0]).sum(),
                (own == top).sum(),
            ]
            sums[layer] = sums.get(layer, 0) + torch.stack([f.double() for f in found]).cpu()
    rows = [(sums[layer] / targets.numel()).tolist() for layer in sums]
    frame = pd.DataFrame(rows, columns=list(MEASURES))
    frame.insert(0, "layer", list(sums))
    return frame.assign(n_tokens=targets.numel())


def excerpt(lm: Any, tokens: Tensor, targets: Tensor, decode: Any, shown: int) -> pd.DataFrame:
    """One row a layer and position, the last positions of one window.

    Args:
        tokens, targets: [1 pos].
        decode: token id -> its character.
    """
    first = max(tokens.shape[1] - shown, 0)
    rows = []
    for layer, log_p in enumerate(log_probabilities(lm, tokens)):
        p = log_p[0].exp().cpu()
        for at in range(first, tokens.shape[1]):
            top, true = int(p[at].argmax()), int(targets[0, at])
            rows.append(
                {"layer": layer, "position": at, "token": decode(int(tokens[0, at])),
                 "target": decode(true), "top": decode(top), "p_top": float(p[at, top]),
                 "p_target": float(p[at, true])}
            )  # fmt: skip
    return pd.DataFrame(rows)


def of_model(loaded: Any, held_out: Tensor, options: Options) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The tables of one model: over held-out text, and along the excerpt.

    Args:
        loaded: from pipeline.model.load.
        held_out: token ids [n].
    """
    n_ctx = min(loaded.info["n_ctx"], len(held_out) - 1)
    pair = training_data.windows(held_out.long(), n_ctx)
    tokens, targets = (t.to(loaded.hf.device) for t in pair)
    if options.window >= len(tokens):
        raise RetraceError(
            f"own.language.lens.window: {options.window}, but the held-out text has {len(tokens)} "
            f"windows of {n_ctx} tokens; lower it"
        )
    n, one = max(1, options.n_tokens // n_ctx), slice(options.window, options.window + 1)
    decode = lambda i: loaded.tokenizer.decode([i])  # noqa: E731
    over = measure(loaded.hf, tokens[:n], targets[:n])
    return over, excerpt(loaded.hf, tokens[one], targets[one], decode, options.n_shown)
