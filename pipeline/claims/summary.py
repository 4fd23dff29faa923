"""What snakemake prints at the end: the claims, costs and where the pages are, or what failed.

Standard library only, since snakemake imports it on every call; rich sets the tables, and is
imported where there is one.
"""

import csv
import io
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.errors import TRACE, RetraceError
from pipeline.job.events import read_lines

VERDICTS = (
    "reproduced",
    "not reproduced",
    "undecided",
    "says nothing",
    "not comparable",
    "not run",
    "plumbing",
)
COLUMNS = "id text kind paper_value tolerance ours verdict".split()  # that compare, too, reads
JUDGED = VERDICTS[:4]
OTHERS = {"control": "controls", "ours": "own observations"}  # whose claims are no paper's
COLOURS = dict(zip(JUDGED, ("green", "red", "yellow", "yellow"), strict=True))
MEANINGS = {
    "undecided": "the seeds disagree, and their interval holds both answers.",
    "says nothing": "the order holds on its null arm as well.",
    "not comparable": "this run cannot judge the claim; the reason stands beside it.",
    "not run": "the metric was not measured in this run.",
    "plumbing": "a smoke run shows that everything runs; its numbers judge nothing.",
}


def read_claims(path: str | Path) -> list[dict[str, str]]:
    """The rows of a claims.csv, as text; a cell that is not there is blank.

    Raises:
        RetraceError: the file is damaged, or lacks a column that every one has.
    """
    try:
        with open(path, newline="", encoding="utf-8") as f:
            table = csv.DictReader(f, restval="")
            rows, named = list(table), table.fieldnames or []
        if rows and (missing := [c for c in COLUMNS if c not in named]):
            raise ValueError(f"no column {missing[0]}")
        for row in rows:
            float(row.get("n") or 1)
    except (csv.Error, ValueError) as e:
        raise RetraceError(f"{path}: is no claims.csv ({e}); make it again") from e
    return rows


def tally(rows: list[dict[str, str]]) -> dict[str, int]:
    """How many claims of papers have each verdict, how many were judged, and what stands beside.

    second_hand: the judged ones whose source was not read itself; spread: the judged ones over
    three seeds or more; control, ours: (reproduced, judged) of claims that are no paper's.
    """
    mine = [r for r in rows if r.get("of", "paper") == "paper"]
    count: dict[str, Any] = {v: sum(r["verdict"] == v for r in mine) for v in VERDICTS}
    judged = [r for r in mine if r["verdict"] in JUDGED]
    count |= {"judged": len(judged), "spread": sum(float(r.get("n") or 1) >= 3 for r in judged)}
    count["second_hand"] = sum(r.get("provenance_kind", "R") != "R" for r in judged)
    for whose in OTHERS:
        found = [r["verdict"] for r in rows if r.get("of") == whose and r["verdict"] in JUDGED]
        count[whose] = (found.count("reproduced"), len(found))
    return count


def print_claims(base: str, papers: list[str], benchmarks: str = "results/benchmarks") -> list[str]:
    """Print the claims of the papers under `base`; return the ids of those not reproduced."""
    failed = []
    for paper in papers:
        table = Path(base) / paper / "claims.csv"
        if not table.exists():
            continue
        rows = read_claims(table)
        failed += [f"{paper}.{r['id']}" for r in rows if r["verdict"] == "not reproduced"]
        judged = any(r["verdict"] in JUDGED for r in rows)  # else the table says nothing
        print(f"\n{paper}: {headline(tally(rows))}")
        if judged:
            print("\n".join(aligned(rows, width(), sys.stdout.isatty())))
        if took := spent(table, benchmarks):
            print(f"  {cut(took, width() - 2)}")
        report = table.with_name("report.html")
        if report.exists():
            print(f"  {report.resolve()}")
    index = Path(base) / "index.html"
    if index.exists():
        print(f"\n{index.resolve()}")
    sys.stdout.flush()
    return failed


def headline(count: dict[str, int]) -> str:
    """'5 of 6 claims of the paper judged at this scale are reproduced; 2 not comparable'."""
    rest = [f"{count[v]} {v}" for v in VERDICTS[2:] if count[v]]
    rest += [f"{OTHERS[w]} {count[w][0]} of {count[w][1]}" for w in OTHERS if count[w][1]]
    if not count["judged"]:
        return "; ".join(["no claim is judged at this scale" if rest else "no claims", *rest])
    text = f"{count['reproduced']} of {count['judged']} claims judged at this scale are reproduced"
    return "; ".join([text, *rest])


def width() -> int:
    """Columns of the terminal; 120 in a log."""
    return shutil.get_terminal_size((120, 24)).columns


def aligned(rows: list[dict[str, str]], columns: int, colour: bool = False) -> list[str]:
    """The claims as lines: claim, paper, ours, verdict, cut to so many columns.

    Names and verdicts are never cut.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    head = {"id": "claim", "paper_value": "paper", "ours": "ours", "verdict": "verdict"}
    cells = [{k: shown(r, k) for k in head} for r in rows]
    fixed = [max(len(c[k]) for c in [head, *cells]) for k in ("id", "verdict")]
    beside = 2 + sum(fixed) + 3 * 3  # the margin, both columns, three gaps
    room = max((columns - beside) // 2, 10)  # of each of the two numbers
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for key, title in head.items():
        most = None if key in ("id", "verdict") else room
        table.add_column(title, max_width=most, no_wrap=True, overflow="ellipsis")
    for cell in cells:
        style = COLOURS.get(cell["verdict"], "dim")
        *first, verdict = (Text(cell[k]) for k in head)
        table.add_row(*first, Text(verdict.plain, style))
    wide = max(columns, beside + 2 * room)
    return [f"  {line}" for line in set_out(table, wide - 2, colour)]


def set_out(table: Any, columns: int, colour: bool) -> list[str]:
    """A table as lines, with the codes of a terminal's colours or without."""
    from rich.console import Console

    out = io.StringIO()
    system = "standard" if colour else None
    Console(file=out, width=columns, force_terminal=colour, color_system=system).print(table)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def shown(row: dict[str, str], key: str) -> str:
    """A cell as text: numbers short, ours with its sd."""
    text = short(row[key] or "")
    return f"{text} ± {short(row['sd'])}" if key == "ours" and row.get("sd") else text or "-"


def short(text: str) -> str:
    """A number with four significant digits; other text as it is."""
    try:
        return f"{float(text):.4g}"
    except ValueError:
        return text


def cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def spent(claims: Path, benchmarks: str) -> str:
    """'made in 6 min 12 s of jobs: sae 3 min 20 s, …': the paper's jobs and the three longest."""
    from pipeline.claims import costs
    from pipeline.store import provenance

    try:
        files = [file for _, file, _ in provenance.chain(claims)]
    except RetraceError:
        return ""
    scale, paper = claims.parts[-3:-1]
    found = [c for c in costs.of_paper(benchmarks, scale, paper, files) if c.seconds >= 0]
    if not found:
        return ""
    total = costs.duration(sum(c.seconds for c in found))
    most = ", ".join(f"{c.job.split()[0]} {costs.duration(c.seconds)}" for c in found[:3])
    return f"made in {total} of jobs; the longest: {most}"


def print_failures(failed: Iterable[Any], command: str, log: str | Path) -> None:
    """Print the end of each failed job's log, what it said, and the command that runs it alone.

    Args:
        failed: jobs with a rule, a log and an output; see `events.JobState`.
        command: the command line that ran, without targets; see `without_targets`.
        log: snakemake's own log.
    """
    for job in failed:
        end = "".join(f"  | {line}\n" for line in (tail(Path(job.log)) if job.log else []))
        print(f"\n  log: {job.log or 'none'}\n{end}", end="", file=sys.stderr)
        print(f"  by hand, in a debugger: see shell: in {short_path(log)}", file=sys.stderr)
        print(said(job.rule, Path(job.log) if job.log else None), file=sys.stderr)
        if command and job.output:
            alone = f"{command} -- {shlex.quote(job.output)}"
            print(f"  this job alone: {alone}", file=sys.stderr)
    sys.stderr.flush()


def short_path(path: str | Path) -> str:
    """A path relative to the working directory, where it lies in it."""
    path, here = Path(path), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def tail(log: Path, most: int = 6) -> list[str]:
    """The last lines of a log, without the sentence that `said` gives and without a trace."""
    lines = [x for x in read_lines(log) if not x.startswith(("error in stage", TRACE))]
    return without_traces(lines)[-most:]


def without_traces(lines: list[str]) -> list[str]:
    """Lines but for tracebacks, such as a library's own thread or a stage's import may print."""
    out, inside = [], False
    for line in lines:
        if line.lstrip().startswith("Traceback (most recent call last)"):
            inside = True
        elif not (inside and line.startswith((" ", "\t"))):
            out += [] if inside else [line]
            inside = False
    return out


def said(rule: str, log: Path | None) -> str:
    """The sentence with which a stage failed, else the last line of its log."""
    lines = read_lines(log) if log else []
    told = [line for line in lines if line.startswith("error in stage")]
    if told:
        return told[-1]
    last = f"; its log ends: {lines[-1].strip()}" if lines else " and left no log"
    return f"rule {rule} failed{last}"


def without_targets(argv: list[str], names: list[str]) -> str:
    """The command line of this snakemake, its targets left out, so that another can follow.

    Args:
        argv: sys.argv.
        names: targets that are names; files below results/ are targets, too.
    """
    program, *args = argv[: argv.index("--")] if "--" in argv else argv
    start = [sys.executable, "-m", "snakemake"] if program.endswith("__main__.py") else [program]
    kept = [a for a in args if a not in names and not a.startswith("results/")]
    return shlex.join([*start, *kept])
