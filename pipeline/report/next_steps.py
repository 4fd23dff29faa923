"""What a reader can try next: commands that work on these very results.

What paper.yaml says under try_next comes first. The others are made from what the paper has: a
figure, a metric, published results to compare with, dictionaries to take away.
"""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.report import shown

REFERENCE = Path(__file__).parents[2] / "results/reference"
SCALES = {
    "smoke": ("laptop", "The same at laptop scale, where claims are judged"),
    "laptop": ("paper", "The same at the paper’s own scale; most papers want a GPU"),
    "paper": ("laptop", "The same on a laptop, in minutes"),
}


def steps(
    card: dict[str, Any], paper: str, scale: str, metric: str, dictionary: str, config: list[str]
) -> list[tuple[str, str]]:
    """(what it shows, command).

    Args:
        card: paper.yaml at this scale.
        metric: one that a claim names; blank where there is none.
        dictionary: 'arm.name' of one that was trained; blank where there is none.
        config: what a command of snakemake needs behind --config to find the paper.
    """
    return list(_steps(card, paper, scale, metric, dictionary, config))


def _steps(
    card: dict[str, Any], paper: str, scale: str, metric: str, dictionary: str, config: list[str]
) -> Iterator[tuple[str, str]]:
    here = f"results/{scale}/{paper}"
    for step in card.get("try_next", []):
        yield step["text"], step["command"]
    if name := shown.headline(card):
        yield (
            "Draw one figure again, after a change of its options or its function: seconds",
            snakemake(f"{here}/figures/{name}.html", config),
        )
    if metric:
        yield (
            "What a number means, in full",
            shlex.join(["python", "-m", "pipeline", "show", metric]),
        )
    if (REFERENCE / paper / scale).is_dir():
        yield (
            "These results beside the published ones: settings, verdicts, metrics",
            f"python -m pipeline compare {here} results/reference/{paper}/{scale} "
            "--out compare.html",
        )
    if dictionary:
        yield (
            "A dictionary in SAELens’s format, for your own notebook",
            snakemake(f"{here}/exports/{dictionary}/saelens", config),
        )
    other, why = SCALES[scale]
    yield why, snakemake(paper, [*config, f"scale={other}"])
    yield "All of this in one archive, to hand in or keep", snakemake(f"{here}/release.zip", config)


def snakemake(target: str, config: list[str]) -> str:
    """A command line; the target stands first, for --config takes all that follows it."""
    return shlex.join(["snakemake", "-c2", target, *(["--config", *config] if config else [])])
