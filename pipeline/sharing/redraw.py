"""Published figures, drawn again from the published tables: in seconds, without a run or torch.

    python -m pipeline redraw results/reference/topk_saes/laptop --out redrawn
    python -m pipeline redraw release.zip --figure frontier --out redrawn

1. A published figure is a CSV of the numbers that it plots, and a certificate: title, kind,
   options, and the tables that it was drawn from with their digests.
2. The tables are looked up in the same folder. One that is not as the certificate says is told,
   and its figure is not drawn.
3. The function that draws is that of this checkout: a core kind, or the paper's figures.py.
4. The numbers that it plots are compared with the published CSV, and each figure is told: the same
   numbers, perhaps in another order or under other names, or how many cells differ. Exit 1 where a
   figure differs or cannot be drawn.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from pipeline.errors import RetraceError, command, nearest
from pipeline.sharing.published import Results, opened
from pipeline.store import provenance

PAPERS = Path(__file__).parents[2] / "rules/papers"
SAME = "same numbers"
CLOSE = 1e-9  # relative: a CSV holds numbers as decimal text
FILES = {"metrics": "metrics.json", "claims": "claims.csv"}  # the others are Parquet


def published(run: Results) -> dict[str, dict[str, Any]]:
    """Name -> certificate of every figure whose numbers lie in a folder of results."""
    return {
        Path(name).stem: made
        for name, made in sorted(run.certificates.items())
        if made["stage"] == "figures" and name.endswith(".csv")
    }


def tables_of(run: Results, made: dict[str, Any]) -> list[Path]:
    """The files that a figure was drawn from, as its certificate describes them.

    Raises:
        RetraceError: one was not published, or changed since.
    """
    out = []
    for table in made["spec"]["figure"]["tables"]:
        name = FILES.get(table, f"{table}.parquet")
        file = run.folder / name
        shas = [sha for path, sha in made["inputs"].items() if path.endswith(f"/{name}")]
        if not file.is_file():
            raise RetraceError(f"{name} was not published; run snakemake to make it")
        if provenance.sha256_file(file) not in shas:
            raise RetraceError(f"{file}: changed since the figure was drawn from it")
        out.append(file)
    return out


def differing(ours: Any, theirs: Any) -> int | None:
    """Number of cells of theirs that differ in ours; None without its columns, or of other rows."""
    import numpy as np

    if set(theirs.columns) - set(ours.columns) or len(ours) != len(theirs):
        return None
    count = 0
    for name in theirs.columns:
        a, b = ours[name], theirs[name]
        if a.dtype.kind in "ifb" and b.dtype.kind in "ifb":
            same = np.isclose(a.astype(float), b.astype(float), rtol=CLOSE, atol=0, equal_nan=True)
        else:
            same = (a.isna() & b.isna()) | (a.astype(str) == b.astype(str))
        count += int((~same).sum())
    return count


def renamed(ours: Any, theirs: Any) -> dict[tuple, tuple] | None:
    """Names of theirs -> their names in ours, where each has the same numbers; None where not.

    A name is the text of a row, and its numbers are those of all rows with this text. A text that
    both have must stay with its numbers.
    """
    numbers = [c for c in theirs if theirs[c].dtype.kind in "ifb"]
    if not numbers or {*numbers} - {*ours}:
        return None
    was, now = by_text(theirs, numbers), by_text(ours, numbers)
    kept = {text for key in was for text in key} & {text for key in now for text in key}
    found: dict[tuple, tuple] = {}
    for key, rows in was.items():
        for new in now.keys() - found.values():
            if kept & {*key} == kept & {*new} and differing(now[new], rows) == 0:
                found[key] = new
                break
    return found if len(found) == len(was) == len(now) else None


def by_text(frame: Any, numbers: list[str]) -> dict[tuple, Any]:
    """The text of a row -> the numbers of all rows with this text, ascending."""
    texts = [c for c in frame if frame[c].dtype.kind not in "ifb"]
    keys = frame[texts].astype(str).agg(tuple, axis=1)
    rows = frame[numbers].sort_values(numbers).groupby(keys, sort=False)
    return {key: own.reset_index(drop=True) for key, own in rows}


def ways(name: str, shown: dict[str, Any], folder: Path, scale: str) -> list[dict[str, Any]]:
    """A figure as published, and with the kind and options of this checkout's paper.yaml: what
    was a function of the paper may be a core kind by now, of the same name or another."""
    from pipeline.figures.drawing import own_functions
    from pipeline.figures.kinds import KINDS
    from pipeline.papers import folders

    found = []
    if (shown["kind"] or name) in {*KINDS, *own_functions(folder / "figures.py")}:
        found = [shown]
    if (folder / "paper.yaml").is_file():
        figure = folders.load(folder, scale).spec.figures.get(name)
        as_now = shown | ({"kind": figure.kind, "options": figure.options} if figure else {})
        found += [as_now] if as_now not in found else []
    return found or [shown]


def drawn(run: Results, name: str, made: dict[str, Any], papers: Path) -> tuple[Any, Any]:
    """A published figure, drawn anew: the plotly figure, and the frame of its numbers.

    Raises:
        RetraceError: a table is missing or changed, or the figure's function is.
    """
    from pipeline.figures import drawing

    inputs, own = tables_of(run, made), papers / run.paper / "figures.py"
    shown = made["spec"]["figure"]
    frames = dict(zip(shown["tables"], map(drawing.read, inputs), strict=True))
    faults = []
    for described in ways(name, shown, own.parent, run.scale):
        try:
            return drawing.make(name, described, frames, own if own.is_file() else None)
        except (RetraceError, LookupError, TypeError, ValueError, AttributeError) as e:
            faults.append(e)
    said = str(faults[0]) if isinstance(faults[0], RetraceError) else repr(faults[0])
    raise RetraceError(
        f"the code of this checkout cannot draw these tables ({' '.join(said.split())}); "
        f"check out {provenance.commits(made).split(',')[0]}, which drew them"
    ) from faults[0]


def redraw(run: Results, name: str, made: dict[str, Any], papers: Path, out: Path) -> str:
    """Draw one figure into a folder; a sentence on how its numbers compare.

    Raises:
        RetraceError: as `drawn`.
    """
    import pandas as pd

    from pipeline.figures import drawing
    from pipeline.job import source
    from pipeline.store import embed, tables

    figure, frame = drawn(run, name, made, papers)
    own = papers / run.paper / "figures.py"
    code = sorted(own.parent.glob("figures*.py")) if own.is_file() else []
    code = source.job_code("figures", code)
    cert = provenance.certificate("figures", made["spec"], code, tables_of(run, made))
    shown = made["spec"]["figure"]
    page = drawing.page(name, shown["title"], shown["caption"], drawing.plain(figure), "figures.js")
    embed.write_page(out / f"{name}.html", page, cert)
    tables.write_csv(out / f"{name}.csv", frame, cert)
    return compared(
        pd.read_csv(out / f"{name}.csv"), pd.read_csv(run.folder / f"figures/{name}.csv")
    )


def compared(after: Any, before: Any) -> str:
    """How the numbers of a figure drawn again compare with the published ones."""
    cells, by = differing(after, before), list(before.columns)
    new = [c for c in after.columns if c not in before.columns]
    also = f", and new columns: {', '.join(new)}" if new else ""
    if cells == 0:
        return SAME + also
    if cells and not differing(*(t.sort_values(by, ignore_index=True) for t in (after, before))):
        return f"{SAME}, in another order{also}"
    if renamed(after, before):
        return f"{SAME}, under other names"
    return (
        f"{cells} cells differ{also}" if cells else "other rows or columns than the published ones"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline redraw",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", type=Path, help="a folder of results, or a release (.zip)")
    parser.add_argument("--figure", help="one figure; default: all that were published")
    parser.add_argument("--papers", type=Path, default=PAPERS, help="where papers' folders lie")
    parser.add_argument("--out", type=Path, required=True, help="a folder for pages and numbers")
    args = parser.parse_args()
    failed = False
    with command("redraw"):
        from pipeline.report import pages

        with opened(args.results) as found:
            for run in found:
                known = published(run)
                if args.figure and args.figure not in known:
                    hint = nearest(args.figure, known)
                    raise RetraceError(f"{run.folder}: no figure '{args.figure}'{hint}")
                to = args.out / run.scale / run.paper
                to.mkdir(parents=True, exist_ok=True)
                pages.write(to / "figures.js")
                for name in [args.figure] if args.figure else known:
                    try:
                        said = redraw(run, name, known[name], args.papers, to)
                    except RetraceError as e:
                        said = f"not drawn: {e}"
                    failed |= not said.startswith(SAME)
                    print(f"{to / name}.html  {said}")
    sys.exit(failed)
