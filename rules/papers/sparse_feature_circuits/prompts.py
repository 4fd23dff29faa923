"""Subject-verb agreement: prompts in pairs whose subjects differ in number (Marks et al. 2024).

    simple       The teachers                     is | are, …
    within_rc    The teacher that the girls       likes | like, …
    across_rc    The teachers that the girl likes is | are, …
    across_pp    The teachers near the desk       is | are, …

after the four structures of Finlayson et al. 2021 (2106.06087) that the paper takes, made anew: the
forms of all nouns and verbs are one token each, so that the prompts of a structure have one length.
The corrupt prompt has the subject's other number, and with it the foil is right. Half of the
subjects are plural. The other noun has either number.
"""

from typing import Any, Literal

import numpy as np
from pydantic import Field

from pipeline.errors import RetraceError
from pipeline.spec.base import Section
from pipeline.text.tokens import encode, following

NOUNS = (
    "teacher athlete poet father mother farmer lawyer victim doctor singer friend author manager "
    "actor pilot senator officer student king queen artist worker writer driver parent leader "
    "scientist engineer player soldier customer judge dancer girl boy kid guy"
).split()
THINGS = "table bike car chair desk tree truck window cat dog house door".split()
RELATIVE = (  # of the relative clause: the plural form
    "like love avoid ignore help support see know follow need remember trust meet visit"
).split()
VERBS = (("is", "are"), ("has", "have"), ("does", "do"), ("goes", "go"))
PREPOSITIONS = ("near", "behind", "beside")
# structure -> template, and which noun the verb agrees with
STRUCTURES = {
    "simple": ("The {subject}", "subject"),
    "within_rc": ("The {subject} that the {other}", "other"),
    "across_rc": ("The {subject} that the {other} {clause}", "subject"),
    "across_pp": ("The {subject} {preposition} the {thing}", "subject"),
}
MISSES = 500  # prompts drawn in a row that are there already: then no more are looked for
Structure = Literal["simple", "within_rc", "across_rc", "across_pp"]


class Options(Section):
    """options of `agreement`."""

    structure: Structure = Field(default="across_rc", description="of the prompts")


def single(tokenizer: Any, pairs: Any) -> list[tuple[str, str]]:
    """The (singular, plural) pairs whose forms are one token each behind a space."""
    return [p for p in pairs if all(len(following(tokenizer, "so", f" {w}")) == 1 for w in p)]


def vocabulary(tokenizer: Any) -> dict[str, list[tuple[str, str]]]:
    """Pairs of forms of one token: subjects, things, verbs, and verbs of the relative clause;
    RetraceError where a kind has fewer than two."""
    out = {
        "subject": single(tokenizer, [(w, f"{w}s") for w in NOUNS]),
        "thing": single(tokenizer, [(w, f"{w}s") for w in THINGS]),
        "verb": single(tokenizer, VERBS),
        "clause": single(tokenizer, [(f"{w}s", w) for w in RELATIVE]),
    }
    for kind, pairs in out.items():
        if len(pairs) < 2:
            raise RetraceError(
                f"prompts.py: {len(pairs)} pairs of kind '{kind}' are one token in this "
                f"vocabulary; two are needed, so add words to its list"
            )
    return out


def draw(tokenizer: Any, structure: Structure, n: int, seed: int) -> dict[str, Any]:
    """n prompts, no two alike, and what is where in them; token ids without BOS.

    Returns:
        clean, corrupt (token ids), answer, foil, positions (as the stage circuits takes them), and
        text.

    Raises:
        RetraceError: the vocabulary has not so many.
    """
    words, rng = vocabulary(tokenizer), np.random.default_rng(seed)
    template, agrees = STRUCTURES[structure]
    out: dict[str, Any] = {k: [] for k in ("text", "clean", "corrupt", "answer", "foil")}
    seen, missed = set(), 0
    while len(seen) < n:
        if missed > MISSES:
            raise RetraceError(
                f"prompts.py: {len(seen)} different prompts of structure {structure} were found, "
                f"and {n} are asked for; lower their number"
            )
        number = len(seen) % 2
        slots, verb = filled(words, rng, structure, number)
        flipped = slots | {agrees: slots[agrees][::-1]}
        said = ({kind: forms[0] for kind, forms in some.items()} for some in (slots, flipped))
        text, corrupt = (template.format(**words) for words in said)
        if (text, verb) in seen:
            missed += 1
            continue
        missed = 0
        seen.add((text, verb))
        out["text"].append(text)
        for key, value in (("clean", text), ("corrupt", corrupt)):
            out[key].append(encode(tokenizer, value))
        for key, form in (("answer", verb[number]), ("foil", verb[1 - number])):
            out[key].append(following(tokenizer, "so", f" {form}")[0])
    return out | {"positions": positions(out["clean"], out["corrupt"])}


def filled(
    words: dict[str, list], rng: np.random.Generator, structure: Structure, number: int
) -> tuple[dict[str, tuple[str, str]], tuple[str, str]]:
    """Words of a prompt, each as (form, form of the other number), and its pair of verbs; number is
    that of the noun that the verb agrees with: 0 singular, 1 plural."""
    first, second = rng.choice(len(words["subject"]), 2, replace=False)
    pick = lambda kind: words[kind][rng.integers(len(words[kind]))]  # noqa: E731
    form = lambda pair, i: (pair[i], pair[1 - i])  # noqa: E731
    other = int(rng.integers(2))
    numbers = (other, number) if structure == "within_rc" else (number, other)
    slots = {
        "subject": form(words["subject"][first], numbers[0]),
        "other": form(words["subject"][second], numbers[1]),
        "thing": form(pick("thing"), other),
        "clause": form(pick("clause"), other),
        "preposition": (str(rng.choice(PREPOSITIONS)),) * 2,
    }
    return slots, pick("clause" if structure == "within_rc" else "verb")


def positions(clean: list[list[int]], corrupt: list[list[int]]) -> dict[str, list[int]]:
    """The noun whose number differs, and the last token."""
    both = [list(zip(*pair, strict=True)) for pair in zip(clean, corrupt, strict=True)]
    noun = [[a != b for a, b in pair].index(True) for pair in both]
    return {"noun": noun, "END": [len(ids) - 1 for ids in clean]}


def agreement(options: dict[str, Any], tokenizer: Any, n: int, seed: int) -> dict[str, Any]:
    """Prompts for the stage circuits."""
    from pipeline.spec.paper import parse

    found = draw(tokenizer, parse(Options, options, "circuits.options").structure, n, seed)
    return {k: v for k, v in found.items() if k != "text"}
