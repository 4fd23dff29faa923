"""What a paper's jobs took: wall time and peak memory, out of snakemake's benchmarks.

`results/benchmarks/<scale>/<paper>/<job>.tsv` are the paper's own jobs;
`results/benchmarks/<stage>/<id>.tsv` are jobs of the store, which papers share.
"""

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cost:
    """One job: seconds of wall and processor time, peak memory in MiB; NaN where not measured."""

    job: str
    seconds: float
    cpu_seconds: float
    peak_mib: float
    shared: bool


def read(path: Path, job: str, shared: bool) -> Cost | None:
    """The last run in a benchmark file; None where it holds none."""
    try:
        with path.open(newline="", encoding="utf-8") as f:
            rows = list(csv.DictReader(f, delimiter="\t"))
    except OSError:
        return None
    if not rows:
        return None
    value = {k: _number(rows[-1].get(k)) for k in ("s", "cpu_time", "max_rss")}
    return Cost(job, value["s"], value["cpu_time"], value["max_rss"], shared)


def _number(text: str | None) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan  # snakemake writes NA or - for a job too short to be sampled


def of_paper(
    benchmarks: str | Path, scale: str, paper: str, files: Iterable[str | Path]
) -> list[Cost]:
    """The jobs that made a paper's results, longest first.

    Args:
        benchmarks: results/benchmarks.
        files: what the results were made from; its store artefacts' jobs are counted too.
    """
    base = Path(benchmarks)
    own = sorted((base / scale / paper).glob("*.tsv"))
    found = [read(f, f.stem, shared=False) for f in own]
    found += [read(base / s / f"{i}.tsv", f"{s} {i}", shared=True) for s, i in store_items(files)]
    return sorted((c for c in found if c), key=lambda c: -c.seconds)


def store_items(files: Iterable[str | Path]) -> list[tuple[str, str]]:
    """(stage, id) of the store's artefacts among these files, each once."""
    parts = [Path(f).parts for f in files]
    found = [p[i + 1 : i + 3] for p in parts for i, part in enumerate(p[:-3]) if part == "store"]
    return sorted(dict.fromkeys(found))


def duration(seconds: float) -> str:
    """'8.2 s', '3 min 20 s', '2 h 05 min'."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left:02d} min" if hours else f"{minutes} min {rest:02d} s"
