"""The logit lens of the arms, over held-out text and along one excerpt. [torch]"""

from typing import Any

import pandas as pd
from pydantic import Field
from torch import Tensor

from pipeline.errors import RetraceError
from pipeline.models import lens
from pipeline.spec.base import Section
from pipeline.text.tokens import Texts
from pipeline.weights import batches


class Options(Section):
    """How much held-out text is measured, and which of it is shown."""

    n_tokens: int = Field(default=20_000, ge=1, description="held-out tokens measured, at most")
    n_shown: int = Field(default=40, ge=1, description="positions of the excerpt, at most")
    window: int = Field(default=0, ge=0, description="held-out window that the excerpt ends")


def excerpt(hf: Any, tokens: Tensor, behind: int, decode: Any, shown: int) -> pd.DataFrame:
    """One row a layer and position: the likeliest character at the last positions of a window of
    tokens [pos], which the token `behind` follows; decode: token id -> its character."""
    found = lens.trajectory(
        hf, tokens, {"logit": lens.logit_lens(hf)}, decode,
        first=max(len(tokens) - shown, 0), n_top=1, behind=behind,
    )  # fmt: skip
    found = found.assign(**{c: found[c].str[0] for c in ("top", "p_top")})
    return found[["layer", "position", "token", "target", "top", "p_top", "p_target"]]


def of_model(loaded: Any, held_out: Tensor, options: Options) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The tables of a loaded model: over held-out token ids [n], and along the excerpt."""
    n_ctx = min(loaded.info["n_ctx"], len(held_out) - 1)
    held_out = held_out.long().to(loaded.hf.device)
    tokens, targets = batches.windows(held_out, n_ctx)
    if options.window >= len(tokens):
        raise RetraceError(
            f"own.language.lens.window: {options.window}, but the held-out text has {len(tokens)} "
            f"windows of {n_ctx} tokens; lower it"
        )
    n, at = max(1, options.n_tokens // n_ctx), options.window
    logit = {"logit": lens.logit_lens(loaded.hf)}
    over = lens.measure(loaded.hf, tokens[:n], targets[:n], logit).drop(columns="lens")
    decode = Texts(loaded.tokenizer).alone
    behind = int(targets[at, -1])
    return over, excerpt(loaded.hf, tokens[at], behind, decode, options.n_shown)
