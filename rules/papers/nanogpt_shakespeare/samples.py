"""Text that a model writes, beside held-out text of the same length. [torch]

1. Start from a line break and draw character after character, as nanoGPT's sample.py does: the
   logits of the last position over a temperature, all but the top_k set to minus infinity, and a
   draw from the softmax. Only the last n_ctx characters are seen.
2. How many of the words are words: the share of those with three letters or more that stand
   somewhere in the training text. A word that the end of a sample may cut is left out.
"""

import re
from typing import Any

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch import Tensor

from pipeline.spec.base import Section

WORD = re.compile(r"[^\W\d_]{3,}")


class Options(Section):
    """Temperature, top_k and start as in nanoGPT's sample.py."""

    start: str = Field(default="\n", min_length=1)
    n_samples: int = Field(default=4, ge=1)
    n_tokens: int = Field(default=400, ge=1, description="characters drawn, a sample")
    temperature: float = Field(default=0.8, gt=0)
    top_k: int = Field(default=200, ge=1)
    seed: int = Field(default=0, ge=0)


def likely(logits: Tensor, temperature: float, top_k: int) -> Tensor:
    """Probabilities of the next token: softmax of the top_k logits [batch d_vocab] over the
    temperature."""
    logits = logits.double() / temperature
    least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < least, -torch.inf).softmax(-1)


@torch.no_grad()
def generate(lm: Any, start: Tensor, n_ctx: int, options: Options) -> Tensor:
    """Tokens drawn after `start` [batch pos], all sequences at once: [batch n_tokens].

    Draws are made on the CPU, so that a seed means the same on every device up to rounding.
    """
    generator = torch.Generator().manual_seed(options.seed)
    tokens = start
    for _ in range(options.n_tokens):
        logits = lm(tokens[:, -n_ctx:]).logits[:, -1].cpu()
        p = likely(logits, options.temperature, options.top_k)
        drawn = torch.multinomial(p, 1, generator=generator)
        tokens = torch.cat([tokens, drawn.to(tokens.device)], 1)
    return tokens[:, start.shape[1] :]


def words(text: str) -> list[str]:
    """Words of three letters or more, in small letters, without one that the end may cut."""
    found = [m for m in WORD.finditer(text) if m.end() < len(text)]
    return [m.group().lower() for m in found]


def known_share(text: str, vocabulary: set[str]) -> float:
    """Share of a text's words that stand in the vocabulary; nan where it has none."""
    found = words(text)
    return float(np.mean([w in vocabulary for w in found])) if found else float("nan")


def excerpts(tokens: np.ndarray, n: int, length: int) -> list[np.ndarray]:
    """n pieces of the held-out tokens, evenly spaced."""
    starts = np.linspace(0, max(len(tokens) - length, 0), n).astype(int)
    return [tokens[s : s + length] for s in starts]


def table(written: list[str], held_out: list[str], vocabulary: set[str]) -> pd.DataFrame:
    """One row a text: sample, who wrote it, the text, its words and the share that is known."""
    rows = [
        {"sample": i, "writer": writer, "text": t, "n_words": len(words(t)),
         "known_words": known_share(t, vocabulary)}
        for writer, texts in (("model", written), ("held out", held_out))
        for i, t in enumerate(texts)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def of_model(loaded: Any, text: dict[str, np.ndarray], options: Options) -> pd.DataFrame:
    """The table of a loaded model; text holds the token ids [n] of train and eval."""
    ids = loaded.tokenizer(options.start, add_special_tokens=False)["input_ids"]
    start = torch.tensor([ids] * options.n_samples, device=loaded.hf.device)
    drawn = generate(loaded.hf, start, loaded.info["n_ctx"], options).tolist()
    held_out = excerpts(text["eval"], options.n_samples, options.n_tokens)
    decode = loaded.tokenizer.decode
    vocabulary = set(words(decode(text["train"])))
    return table([decode(d) for d in drawn], [decode(h) for h in held_out], vocabulary)
