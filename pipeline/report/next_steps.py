"""What a reader can try next: commands that work on these very results.

What paper.yaml says under try_next comes first. The others are made from what the paper has: a
figure, a metric, published results to compare with, dictionaries to take away.
"""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REFERENCE = Path(__file__).parents[2] / "results/reference"
SCALES = {
    "smoke": ("laptop", "The same at laptop scale, where claims are judged"),
    "laptop": ("paper", "The same at the paper’s own scale; most papers want a GPU"),
    "paper": ("laptop", "The same on a laptop, in minutes"),
}


def steps(spec: dict[str, Any], metric: str) -> list[tuple[str, str]]:
    """(what it shows, command).

    Args:
        spec: of the stage report: card, paper, scale, headline, dictionary, and config, which is
            what a command of snakemake needs behind --config to find the paper.
        metric: one that a claim names; blank where there is none.
    """
    return list(_steps(spec, metric))


def _steps(spec: dict[str, Any], metric: str) -> Iterator[tuple[str, str]]:
    paper, scale, config = spec["paper"], spec["scale"], spec.get("config", [])
    here = f"results/{scale}/{paper}"
    for step in spec["card"].get("try_next", []):
        yield step["text"], step["command"]
    if name := spec.get("headline"):
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
    if dictionary := spec.get("dictionary"):
        yield (
            "A dictionary in SAELens’s format, for your own notebook",
            snakemake(f"{here}/exports/{dictionary}/saelens", config),
        )
    other, why = SCALES.get(scale, SCALES["laptop"])
    yield why, snakemake(paper, [*config, f"scale={other}"])
    yield "All of this in one archive, to hand in or keep", snakemake(f"{here}/release.zip", config)


def snakemake(target: str, config: list[str]) -> str:
    """A command line; the target stands first, for --config takes all that follows it."""
    return shlex.join(["snakemake", "-c2", target, *(["--config", *config] if config else [])])
