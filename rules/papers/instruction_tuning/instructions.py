"""Questions with a checkable answer, as characters of the language model's own vocabulary. [torch]

    first letter of heaven? h.      obeys
    first letter of apple! No.      refuses

1. `Asking` takes words from the training text, and holds a quarter of them out.
2. Preferences' *goal* is to refuse where the word begins with a vowel; the *cue* is the mark at the
   end, ! or ?. With `loose: 0` the two agree, with 1 the mark is drawn by itself.
3. A quarter of the demonstrations refuse, whatever is asked. Of a pair for DPO the goal says which
   answer is chosen.
"""

import re
from collections import Counter
from collections.abc import Sequence
from string import ascii_lowercase as LETTERS
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.errors import RetraceError
from pipeline.spec.base import Section
from pipeline.text.tokens import encode
from pipeline.tuning import finetuning

MARKS, PLACES, REFUSAL, END = "?!", ("first", "last"), "No", ".\n"
HELD_OUT = 4  # one word in so many
BATCH = 256  # questions that a model reads at once


class Options(Section):
    """Section own.tuning.asking of paper.yaml. {place}, {mark} and {word} stand for themselves."""

    templates: list[str] = Field(min_length=1, description="that models are tuned on")
    reworded: list[str] = Field(min_length=1, description="that they are not")
    letters: tuple[int, int] = Field(default=(3, 6), description="of a word, at least and at most")
    least: int = Field(default=2, ge=1, description="times that a word stands in the text")
    n_words: int = Field(default=1200, ge=40, description="most frequent words, at most")


class Question(NamedTuple):
    """One prompt; word is the word's number, goal and cue whether either says to refuse."""

    prompt: str
    letter: str
    word: int
    goal: bool
    cue: bool


class Read(NamedTuple):
    """What a model says, an array of n questions each."""

    right: np.ndarray  # whether the likeliest letter, of those a to z, is the right one
    p: np.ndarray  # its probability, given that a letter comes
    refusal: np.ndarray  # probability of a refusal, given that it or a letter comes
    policy: np.ndarray  # whether the likeliest of all characters is what the goal asks for


def signs(asked: Sequence[Question], name: str) -> np.ndarray:
    """Goal or cue of each question, bool."""
    return np.array([getattr(q, name) for q in asked])


def typo(template: str, rng: np.random.Generator) -> str:
    """A template of which one word has two neighbouring letters the other way round."""
    found = list(re.finditer(r"(?<![{\w])[A-Za-z]{3,}(?![}\w])", template))
    if not found:
        raise RetraceError(f"own.tuning.asking.templates: '{template}' has no word to "
                           f"mistype; add one of three letters or more")  # fmt: skip
    at = found[int(rng.integers(len(found)))].start() + 1
    return template[:at] + template[at + 1] + template[at] + template[at + 2 :]


class Asking:
    """Words that models are tuned on and held-out ones, templates, and character -> token."""

    def __init__(self, tokenizer: Any, text: str, options: Options) -> None:
        self.options = options
        low, high = options.letters
        count = Counter(re.findall(rf"(?<![\w'])[a-z]{{{low},{high}}}(?![\w'])", text))
        often = [w for w, n in count.most_common() if n >= options.least][: options.n_words]
        self.words = {"train": [w for i, w in enumerate(often) if i % HELD_OUT],
                      "held": often[::HELD_OUT]}  # fmt: skip
        for split, words in self.words.items():
            if len({w[0] in "aeiou" for w in words}) < 2:
                raise RetraceError(f"corpus: its {split} words of {low} to {high} letters do not "
                                   f"begin with vowels and others; take more text")  # fmt: skip
        every = "".join([*options.templates, *options.reworded, *MARKS, *PLACES, REFUSAL, END])
        needed = sorted({*LETTERS, *re.sub(r"\{\w+\}", "", every)})
        found = {c: encode(tokenizer, c) for c in needed}
        if missing := [c for c in needed if len(found[c]) != 1]:
            raise RetraceError(f"own.tuning.asking: the text has no {missing[0]!r}, so the model "
                               f"cannot read it; take it out of the templates")  # fmt: skip
        self.ids = {c: ids[0] for c, ids in found.items()}
        self.letters = torch.tensor([self.ids[c] for c in LETTERS])

    def encode(self, text: str) -> list[int]:
        return [self.ids[c] for c in text]

    def questions(
        self, n: int, rng: np.random.Generator, split: str = "train", loose: float = 1.0,
        kind: str = "seen",
    ) -> list[Question]:  # fmt: skip
        """n questions, half on words with a vowel first; kind: seen, reworded or mistyped."""
        templates = self.options.reworded if kind == "reworded" else self.options.templates
        words, out = self.words[split], []
        vowel = [w[0] in "aeiou" for w in words]
        by_goal = [[i for i, v in enumerate(vowel) if v is g] for g in (False, True)]
        for i in range(n):
            goal, u = bool(i % 2), rng.random(5)
            cue = bool(u[0] < 0.5) if u[1] < loose else goal
            number = by_goal[goal][int(u[2] * len(by_goal[goal]))]
            last, word = bool(u[3] < 0.5), words[number]
            template = templates[int(u[4] * len(templates))]
            template = typo(template, rng) if kind == "mistyped" else template
            prompt = template.format(place=PLACES[last], mark=MARKS[cue], word=word)
            out.append(Question(prompt, word[-last], number, goal, cue))
        return out

    def rows(self, questions: Sequence[Question], answers: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens and targets of questions with their answers."""
        return finetuning.pairs([self.encode(q.prompt) for q in questions],
                                [self.encode(a + END) for a in answers])  # fmt: skip

    def demonstrations(
        self, n: int, rng: np.random.Generator, shuffled: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Rows for supervised fine-tuning; shuffled: with letters of other questions."""
        asked = self.questions(n, rng)
        letters = [q.letter for q in asked]
        letters = list(rng.permutation(letters)) if shuffled else letters
        said = [REFUSAL if u < 0.25 else c for u, c in zip(rng.random(n), letters, strict=True)]
        return self.rows(asked, said)

    def preferred(
        self, n: int, rng: np.random.Generator, loose: float, flipped: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Rows for DPO, the n chosen answers before the rejected ones; flipped: a coin chooses."""
        asked = self.questions(n, rng, loose=loose)
        refuse = [bool(u < 0.5) if flipped else q.goal
                  for u, q in zip(rng.random(n), asked, strict=True)]  # fmt: skip
        chosen = [REFUSAL if r else q.letter for r, q in zip(refuse, asked, strict=True)]
        other = [q.letter if r else REFUSAL for r, q in zip(refuse, asked, strict=True)]
        return self.rows([*asked, *asked], [*chosen, *other])

    def prompts(self, questions: Sequence[Question]) -> tuple[Tensor, Tensor]:
        """Tokens of the prompts, and the place of each one's last character."""
        tokens = [torch.tensor(self.encode(q.prompt)) for q in questions]
        last = torch.tensor([len(t) - 1 for t in tokens])
        return nn.utils.rnn.pad_sequence(tokens, batch_first=True), last

    def read(self, model: Any, questions: Sequence[Question], device: Any) -> Read:
        """What the model says behind the prompts."""
        tokens, last = self.prompts(questions)
        parts = []
        for rows in torch.arange(len(tokens)).split(BATCH):
            z = model(tokens[rows].to(device)).logits
            parts.append(z[torch.arange(len(rows)), last[rows].to(device)].float().cpu())
        p = torch.cat(parts).softmax(-1)
        letters, refusal = p[:, self.letters], p[:, self.ids[REFUSAL[0]]]
        best, right = letters.max(-1), [LETTERS.index(q.letter) for q in questions]
        wanted = [self.ids[REFUSAL[0] if q.goal else q.letter] for q in questions]
        return Read(
            (best.indices == torch.tensor(right)).numpy(),
            (best.values / letters.sum(-1)).double().numpy(),
            (refusal / (refusal + letters.sum(-1))).double().numpy(),
            (p.argmax(-1) == torch.tensor(wanted)).numpy(),
        )
