"""Which figure of a paper shows a claim, and which one stands at the head of its report.

A claim may name its figure; else the figure is found by the words that both use. It is a search in
a handful of short documents:

1. A figure's document is its name, title, caption, options and tables; a claim's query its text,
   id, metrics and source. Words are stemmed; a name or a title counts more than a caption.
2. A word that fewer figures have tells more (inverse document frequency, Spärck Jones 1972).
3. Where the claim's source and the caption name the same figure or section of the paper, or where
   the claim's metrics begin with the figure's name, that counts as much as several words.
4. The best figure is taken where it is clearly ahead of the next; else the claim stands alone.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

LEAST, LEAD = 4.0, 1.2  # a score below which no figure is meant, and its distance to the next
SAME = 4.0  # what a common source, or a metric with the figure's name, counts
FIELDS = (("title", 3), ("caption", 1))
STOP = set(
    "the a an of in and or to is are that it its as by for with on at from more than less not no "
    "does do be each all one two three which we our ours paper article figure fig section sec "
    "table under over when where what into has have their they them same other first at least most "
    "so every any this these those only also was were can model models value values number per "
    "between after before up down out mean".split()
)
NAME = re.compile(r"[A-Za-z]\w*(?:\.\w+)+")


def words(text: str) -> set[str]:
    """The words of a text that tell something, stemmed."""
    found = re.findall(r"[a-z]+[a-z0-9]*|\d+[a-z]?", text.lower().replace("_", " "))
    return {stem(w) for w in found if w not in STOP and len(w) > 1}


def stem(word: str) -> str:
    ending = next((e for e in ("ing", "ies", "ed", "es", "s") if word.endswith(e)), "")
    return word[: -len(ending)] if ending and len(word) > len(ending) + 3 else word


def weights(parts: list[tuple[str, int]]) -> Counter:
    """Word -> the weight of the heaviest part that has it."""
    out: Counter = Counter()
    for text, weight in parts:
        for word in words(text):
            out[word] = max(out[word], weight)
    return out


def document(name: str, figure: Mapping[str, Any]) -> Counter:
    """The words of a figure."""
    rest = json.dumps(figure.get("options", {})), " ".join(figure.get("tables", []))
    named = [(str(figure.get(f, "")), weight) for f, weight in FIELDS]
    return weights([(name, 4), *named, *((text, 1) for text in rest)])


def cited(text: str) -> set[str]:
    """The paper's figures that a text names: 'Figure 2a' -> {'2a'}."""
    return set(re.findall(r"fig(?:ure)?s?\.?\s*(\d+[a-z]?)", text.lower()))


def quoted(text: str) -> set[str]:
    """Titles in quotation marks, such as sections of the paper."""
    return {q.lower().rstrip(",.") for q in re.findall(r'["“]([^"”]+)["”]', text)}


def scores(claim: Mapping[str, Any], figures: Mapping[str, Mapping]) -> list[tuple[float, str]]:
    """(score, name) of every figure, the best first."""
    documents = {name: document(name, f) for name, f in figures.items()}
    have = Counter(word for d in documents.values() for word in d)
    text, source = str(claim.get("text", "")), str(claim.get("source", ""))
    expression = f"{claim.get('metric', '')} {claim.get('holds', '')}"
    names = NAME.findall(expression)
    query = weights([(text, 2), (claim["id"], 2), (" ".join(names), 1), (source, 1)])
    out = []
    for name, found in documents.items():
        shared = (w for w in query if w in found)
        score = sum(math.log(1 + len(figures) / have[w]) * found[w] * query[w] for w in shared)
        score /= (4 + len(found)) ** 0.35  # long captions share words by chance
        said = f"{figures[name].get('title', '')} {figures[name].get('caption', '')}"
        score += SAME * len(cited(source) & cited(said))
        score += SAME * sum(q in source.lower() for q in quoted(said))
        score += SAME * any(m.split(".")[0] == name for m in names)
        out.append((score, name))
    return sorted(out, key=lambda pair: -pair[0])


def figure_of(claim: Mapping[str, Any], figures: Mapping[str, Mapping]) -> str:
    """The name of the figure that shows a claim; blank where none does.

    Args:
        claim: of paper.yaml; `figure` names one.
        figures: name -> figure of paper.yaml.
    """
    if claim.get("figure"):
        return claim["figure"] if claim["figure"] in figures else ""
    able = {name: f for name, f in figures.items() if f.get("kind") != "verdicts"}
    if not able or not claim.get("id"):
        return ""
    (best, name), *rest = scores(claim, able)
    return name if best >= LEAST and best - max([s for s, _ in rest], default=0) >= LEAD else ""


def headline(card: Mapping[str, Any]) -> str:
    """The figure at the head of a report: the one that the card names, else its first."""
    figures = card.get("figures") or {}
    if card.get("headline") in figures:
        return card["headline"]
    return next((n for n, f in figures.items() if (f or {}).get("kind") != "verdicts"), "")
