"""Prompts of indirect object identification: the paper's templates, and prompts to compare with.

A prompt names an indirect object (IO) and a subject (S) once each, then the subject again (S2), and
ends before the indirect object: "When Mary and John went to the store, John gave a drink to". In
ABBA prompts the indirect object is named first, in BABA prompts the subject. p_ABC is the same
template with three other names, so that it says nothing of who gets what (Wang et al. 2022, Sec. 2
and App. A; the fifteen templates stand there).

Names, places and objects are those that are one token each in the model's vocabulary, so that a
template has one length. No prompt ends in a space: with one, the model continues another token
than it was trained to ("trailing" makes such prompts, to measure that).

Papers on this task share this module; their prompts.py hands its functions to the stage circuits.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import Field

from pipeline.errors import RetraceError
from pipeline.spec.base import Section
from pipeline.text.tokens import encode, following

# {0} and {1} are the names in the order of the variant, {S} the subject again.
TEMPLATES = (
    "Then, {0} and {1} went to the {place}. {S} gave a {object} to",
    "Then, {0} and {1} had a lot of fun at the {place}. {S} gave a {object} to",
    "Then, {0} and {1} were working at the {place}. {S} decided to give a {object} to",
    "Then, {0} and {1} were thinking about going to the {place}. {S} wanted to give a {object} to",
    "Then, {0} and {1} had a long argument, and afterwards {S} said to",
    "After {0} and {1} went to the {place}, {S} gave a {object} to",
    "When {0} and {1} got a {object} at the {place}, {S} decided to give it to",
    "When {0} and {1} got a {object} at the {place}, {S} decided to give the {object} to",
    "While {0} and {1} were working at the {place}, {S} gave a {object} to",
    "While {0} and {1} were commuting to the {place}, {S} gave a {object} to",
    "After the lunch, {0} and {1} went to the {place}. {S} gave a {object} to",
    "Afterwards, {0} and {1} went to the {place}. {S} gave a {object} to",
    "Then, {0} and {1} had a long argument. Afterwards {S} said to",
    "The {place} {0} and {1} went to had a {object}. {S} gave it to",
    "Friends {0} and {1} found a {object} at the {place}. {S} gave it to",
)
PLACES = "store garden restaurant school hospital office house station".split()
OBJECTS = "ring kiss bone basketball computer necklace drink snack".split()
NAMES = (
    "Michael Christopher Jessica Matthew Ashley Jennifer Joshua Amanda Daniel David James Robert "
    "John Joseph Andrew Ryan Brandon Jason Justin Sarah William Jonathan Stephanie Brian Nicole "
    "Nicholas Anthony Heather Eric Elizabeth Adam Megan Melissa Kevin Steven Thomas Timothy "
    "Christina Kyle Rachel Laura Lauren Amber Brittany Danielle Richard Kimberly Jeffrey Amy "
    "Crystal Michelle Tiffany Jeremy Benjamin Mark Emily Aaron Charles Rebecca Jacob Stephen "
    "Patrick Sean Erin Jamie Kelly Samantha Nathan Sara Dustin Paul Angela Tyler Scott Katherine "
    "Andrea Gregory Erica Mary Travis Lisa Kenneth Bryan Lindsey Kristen Jose Alexander Jesse "
    "Katie Lindsay Shannon Vanessa Courtney Christine Alicia Cody Allison Bradley Samuel"
).split()
# The eight prompts of TransformerLens's main demo, each pair of names in both orders.
DEMO = (
    ("When {0} and {1} went to the shops, {S} gave the bag to", "John", "Mary"),
    ("When {0} and {1} went to the park, {S} handed the ball to", "Tom", "James"),
    ("When {0} and {1} went to the office, {S} gave an apple to", "Dan", "Sid"),
    ("After {0} and {1} went to the park, {S} handed a drink to", "Martin", "Amy"),
)


class Options(Section):
    """options of `ioi`."""

    variants: list[str] = Field(default=["ABBA", "BABA"], description="orders of the names")


@dataclass
class Prompts:
    """Prompts and what is where in them, by prompt; token ids without BOS.

    Attributes:
        clean, corrupt: the prompt, and p_ABC of the same template.
        positions: IO, S1, S1+1, S2 and END.
        template, variant: which of TEMPLATES; ABBA or BABA.
    """

    text: list[str] = field(default_factory=list)
    clean: list[list[int]] = field(default_factory=list)
    corrupt: list[list[int]] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)
    foil: list[int] = field(default_factory=list)
    positions: dict[str, list[int]] = field(
        default_factory=lambda: {p: [] for p in ("IO", "S1", "S1_next", "S2", "END")}
    )
    template: list[int] = field(default_factory=list)
    variant: list[str] = field(default_factory=list)

    def data(self) -> dict[str, Any]:
        """The prompts in the form that stage circuits takes."""
        names = ("clean", "corrupt", "answer", "foil", "positions")
        return {name: getattr(self, name) for name in names}


def single(tokenizer: Any, words: list[str]) -> dict[str, int]:
    """word -> id, of the words that are one token behind a space."""
    ids = {w: following(tokenizer, "so", f" {w}") for w in words}
    return {w: i[0] for w, i in ids.items() if len(i) == 1}


def vocabulary(tokenizer: Any) -> tuple[dict[str, int], list[str], list[str]]:
    """Names (with their ids), places and objects of one token.

    Raises:
        RetraceError: fewer than six names, or no place or object.
    """
    names = single(tokenizer, NAMES)
    places, objects = (list(single(tokenizer, w)) for w in (PLACES, OBJECTS))
    if len(names) < 6 or not places or not objects:
        raise RetraceError(
            f"prompts: {len(names)} names, {len(places)} places and {len(objects)} objects are "
            f"one token of this vocabulary; six names, a place and an object are needed"
        )
    return names, places, objects


def add(made: Prompts, tokenizer: Any, text: Any, ids: tuple, template: int, variant: str) -> None:
    """Append a prompt.

    Args:
        text: (first name, second name, subject) -> prompt.
        ids: names and token ids of IO, S, and the three names of p_ABC: [(name, id), …].
    """
    (io, io_id), (s, s_id), *other = ids
    order = (io, s) if variant == "ABBA" else (s, io)
    a, b, c = (name for name, _ in other)
    clean, corrupt = encode(tokenizer, text(*order, s)), encode(tokenizer, text(a, b, c))
    s1, s2 = (i for i, t in enumerate(clean) if t == s_id)
    made.text.append(text(*order, s))
    made.clean.append(clean)
    made.corrupt.append(corrupt)
    made.answer.append(io_id)
    made.foil.append(s_id)
    places = {"IO": clean.index(io_id), "S1": s1, "S1_next": s1 + 1, "S2": s2}
    for name, place in (places | {"END": len(clean) - 1}).items():
        made.positions[name].append(place)
    made.template.append(template)
    made.variant.append(variant)


def draw(
    tokenizer: Any, n: int, seed: int, variants: tuple[str, ...] = ("ABBA", "BABA")
) -> Prompts:
    """n prompts of all templates in turn; their order, names, places and objects by the seed."""
    names, places, objects = vocabulary(tokenizer)
    rng, made = np.random.default_rng(seed), Prompts()
    order = rng.permutation(len(TEMPLATES)).tolist()
    for i in range(n):
        template = order[i // len(variants) % len(TEMPLATES)]
        chosen = [str(x) for x in rng.choice(list(names), 5, replace=False)]
        things = {"place": str(rng.choice(places)), "object": str(rng.choice(objects))}

        def text(first: str, second: str, subject: str, t=TEMPLATES[template], w=things) -> str:
            return t.format(first, second, S=subject, **w)

        ids = tuple((name, names[name]) for name in chosen)
        add(made, tokenizer, text, ids, template, variants[i % len(variants)])
    return made


def ioi(options: dict[str, Any], tokenizer: Any, n: int, seed: int) -> dict[str, Any]:
    """Prompts for the stage circuits."""
    from pipeline.spec.paper import parse

    found = parse(Options, options, "circuits.options")
    return draw(tokenizer, n, seed, tuple(found.variants)).data()


def demo(tokenizer: Any) -> Prompts | None:
    """The demo's eight prompts; corrupt has the subject again in IO's place, so the answer flips.

    None where a name is not one token.
    """
    names = single(tokenizer, [name for _, *pair in DEMO for name in pair])
    made = Prompts()
    for k, (template, *pair) in enumerate(DEMO):
        if not all(name in names for name in pair):
            return None
        for s, io in (pair, pair[::-1]):
            text = lambda a, b, c, t=template: t.format(a, b, S=c)  # noqa: E731
            variant = "ABBA" if io == pair[0] else "BABA"
            ids = [(io, names[io]), (s, names[s])]
            flipped = [(pair[0], 0), (pair[1], 0), (io, 0)]
            add(made, tokenizer, text, (*ids, *flipped), k, variant)
    return made


def trailing(tokenizer: Any, prompts: Prompts) -> list[list[int]]:
    """The prompts with a space behind them, as token ids: a trap, see this module's docstring."""
    return [encode(tokenizer, text + " ") for text in prompts.text]
