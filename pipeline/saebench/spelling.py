"""Words of a vocabulary in prompts that ask for their first letter, and the stream on each. [torch]

    "\\n Paris has the first letter: P\\n tree has the first letter: T\\n cat has the first letter:"

Chanin et al. 2024 (2409.14507), Section 4, with SAEBench 0.6.0's template. A word is one token of
letters alone, with or without a space before it. The stream is read on the word itself, before the
model is asked anything, behind lines that show the task.
"""

import random
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.errors import RetraceError
from pipeline.job import cli
from pipeline.models import hooks
from pipeline.text import tokens

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Word(NamedTuple):
    """A word: its token, its letter, and the token ids of a prompt in which it stands at `at`."""

    id: int
    letter: str
    ids: list[int]
    at: int


def vocabulary(tokenizer: Any) -> dict[int, str]:
    """Token -> text, of the tokens that are letters alone, a leading space aside."""
    texts = tokens.Texts(tokenizer)
    found = {i: texts.alone(i) for i in texts.ids}
    return {i: t for i, t in found.items() if t.strip(" ").isalpha() and t.isascii() and
            t.count(" ") == t.startswith(" ")}  # fmt: skip


def line(word: str, template: str) -> str:
    return template.format(word=word) + " " + word.strip()[0].upper()


def words(
    tokenizer: Any, bos: list[int], template: str, n: int, n_examples: int, seed: int
) -> list[Word]:
    """Words drawn from the vocabulary, each behind examples that were drawn for it.

    A word that the tokenizer cuts otherwise inside its prompt is left out.

    Args:
        bos: what a prompt begins with.

    Raises:
        RetraceError: the vocabulary has too few words.
    """
    known, draw = vocabulary(tokenizer), random.Random(seed)
    if len(known) < 2 * n_examples + 2:
        raise RetraceError(
            f"absorption: the tokenizer has {len(known)} words of letters alone, and a prompt "
            f"shows {n_examples}; take a model with a vocabulary of words, or lower n_examples"
        )
    out = []
    for id in draw.sample(sorted(known), min(n, len(known))):
        shown = [known[i] for i in draw.sample(sorted(known), n_examples + 1) if i != id]
        before = "".join(f"\n{line(w, template)}" for w in shown[:n_examples]) + "\n"
        asked, _, rest = template.partition("{word}")
        ids = bos + tokens.encode(tokenizer, f"{before}{asked}{known[id]}{rest}")
        at = len(ids) - 1 - len(tokens.encode(tokenizer, rest))
        if ids[at] == id:
            out.append(Word(id, known[id].strip()[0].lower(), ids, at))
    return out


@torch.no_grad()
def states(
    hf: Any, hook: str, found: list[Word], batch_size: int, device: torch.device
) -> Float[Tensor, "words d_in"]:
    """The rows of a hook on the words; shorter prompts are padded behind, where nothing is read."""
    out, progress = [], cli.Progress("absorption, words", len(found), "words")
    for start in range(0, len(found), batch_size):
        part = found[start : start + batch_size]
        longest = max(len(word.ids) for word in part)
        ids = [word.ids + [0] * (longest - len(word.ids)) for word in part]
        seen = hooks.run_to(hf, torch.tensor(ids, device=device), [hook])[hook]
        out.append(seen[torch.arange(len(part)), [word.at for word in part]].float())
        progress.at(start + len(part))
    return torch.cat(out)
