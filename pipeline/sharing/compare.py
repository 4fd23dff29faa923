"""Two runs side by side: settings, environment, metrics, verdicts, features and files.

    python -m pipeline compare results/laptop/grokking results/reference/grokking/laptop
    python -m pipeline compare results/smoke results/laptop --out compare.html
    python -m pipeline compare release.zip results/laptop/grokking

A and B are folders of results or releases; where both hold several papers, those of one name are
a pair. A metric that either run measured over seeds has a z-score: the difference of the means in
units of its standard error. Among a hundred equal metrics some |z| exceed 2, and with three seeds
the standard error itself is rough: read a z below 3 as no difference.
"""

import argparse
import contextlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.claims.summary import cut, short, tally, width
from pipeline.errors import RetraceError, command
from pipeline.job import source
from pipeline.papers import folders
from pipeline.report import pages
from pipeline.sharing import matching
from pipeline.sharing.published import Results, flat, opened, pairs
from pipeline.store import embed, provenance

LARGE = 3  # |z| above which a difference is counted
SHOWN = 25  # rows of a table on the terminal; the page has all
SHOWN_PAIRS = 200  # matched latents a dictionary, on the page
OF_NO_RESULT = {"claims", "metrics", "figures", "feature_page", "report", "index"}
SECTIONS = (
    "model arms corpus tokenizer training activations sae evaluation features attribution own"
).split()
ABSENT = "–"
PAPERS = Path(__file__).parents[2] / "rules/papers"


# --- settings and environment --------------------------------------------------------------


def settings(run: Results) -> dict[str, dict[str, Any]]:
    """Every setting that shaped a result, by place: each file's stage, and the card.

    The card is that of report.html, defaults filled in. Published tables come without a report:
    theirs is the paper.yaml of this checkout at their scale, where it has that paper.
    """
    out: dict[str, dict[str, Any]] = {}
    for name, made in run.certificates.items():
        if made["stage"] not in OF_NO_RESULT:
            place = name.removesuffix(".parquet").removesuffix(" manifest.json")
            out[place] = flat(made["spec"])
    return out | {"card": card(run)}


def card(run: Results) -> dict[str, Any]:
    """The sections of a paper at its scale that decide a result; {} where nothing tells them."""
    report = run.certificates.get("report.html", {}).get("spec", {}).get("card")
    if isinstance(report, dict):
        found = sections(report)
    else:
        try:
            found = folders.load(PAPERS / run.paper, run.scale).spec.model_dump(mode="json")
        except RetraceError:  # a paper that is not here
            found = {}
    return flat({s: found[s] for s in SECTIONS if found.get(s) is not None})


def sections(stated: dict[str, Any]) -> dict[str, Any]:
    """The sections of a card with their defaults filled in; one of another version as it stands.

    One by one, since a certificate keeps no order of keys: the names of the dictionaries that a
    grid makes, which other sections use, cannot be told from it.
    """
    from pydantic import TypeAdapter, ValidationError

    from pipeline.spec.paper import PaperSpec

    out = {name: stated[name] for name in SECTIONS if name in stated}
    for name, found in out.items():
        kind = TypeAdapter(PaperSpec.model_fields[name].annotation)
        with contextlib.suppress(ValidationError):
            out[name] = kind.dump_python(kind.validate_python(found), mode="json")
    return out


def settings_differing(a: Results, b: Results) -> list[dict[str, str]]:
    """Rows name, a, b of the settings that differ, over all that either side states.

    Of a place that only one side has (a file, or the card) there is nothing to compare; of one
    that both have, what one side does not state is ABSENT there.
    """
    ours, theirs = settings(a), settings(b)
    sides: list[dict[str, Any]] = [{}, {}]
    for place in ours.keys() & theirs.keys():
        if not (ours[place] and theirs[place]):
            continue
        every = ours[place].keys() | theirs[place].keys()
        for side, known in zip(sides, (ours[place], theirs[place]), strict=True):
            side |= {f"{place}.{key}": known.get(key, ABSENT) for key in every}
    return different(*sides)


def environment(certificates: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Commits, packages, devices, and the code of every stage; several are joined by ' / '."""
    found: dict[str, set[str]] = {}
    for made in certificates:
        git = made["git"]
        facts = {"retrace": made["retrace"], "device": made["device"]}
        facts["commit"] = git["commit"][:12] + ("+" if git["dirty"] else "")
        if made.get("paper"):
            facts["commit of the paper"] = provenance.commits({"git": made["paper"]})
        facts |= made["versions"] | {f"code of {made['stage']}": made["code"][:12]}
        for key, value in facts.items():
            if value:
                found.setdefault(key, set()).add(value)
    return {k: " / ".join(sorted(v)) for k, v in found.items()}


def different(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, str]]:
    """Rows name, a, b of what both have and of which the value differs; each change once.

    A setting is seen by every stage that it passes through: rows that end alike and change alike
    are one, under the first name.
    """
    rows, seen = [], set()
    for name in sorted(a.keys() & b.keys()):
        if a[name] == b[name]:
            continue
        row = {"name": name, "a": text(a[name]), "b": text(b[name])}
        change = (name.rsplit(".", 1)[-1], row["a"], row["b"])
        if change not in seen:
            seen.add(change)
            rows.append(row)
    return rows


def text(value: Any) -> str:
    return value if isinstance(value, str) else provenance.canonical(value)


# --- metrics -------------------------------------------------------------------------------


def z_score(a: dict[str, Any], b: dict[str, Any]) -> float | None:
    """(mean of b - mean of a) / its standard error; None where neither has a spread over seeds.

    With both spreads the squared standard error is s_a²/n_a + s_b²/n_b (Welch 1947). With one
    spread, the other number is held to be one more draw of it: s² (1 + 1/n).
    """
    spread = [m for m in (a, b) if m["sd"] is not None]
    gap = b["mean"] - a["mean"]
    if not spread or not math.isfinite(gap):
        return None
    counts = [sum(map(math.isfinite, m["values"])) for m in spread]  # seeds that have the metric
    if len(spread) == 2:
        variance = sum(m["sd"] * m["sd"] / n for m, n in zip(spread, counts, strict=True))
    else:
        variance = spread[0]["sd"] * spread[0]["sd"] * (1 + 1 / counts[0])
    if variance == 0:
        return math.copysign(math.inf, gap) if gap else 0.0
    return gap / math.sqrt(variance)


def metric_rows(a: dict[str, dict], b: dict[str, dict]) -> list[dict[str, Any]]:
    """Rows of the metrics that differ, largest |z| first, then by relative difference."""
    rows = []
    for name in a.keys() & b.keys():
        x, y = a[name], b[name]
        if x["values"] == y["values"] or (math.isnan(x["mean"]) and math.isnan(y["mean"])):
            continue
        gap, scale = y["mean"] - x["mean"], max(abs(x["mean"]), abs(y["mean"]))
        row = {"name": name, "a": mean(x), "b": mean(y), "difference": gap, "z": z_score(x, y)}
        row |= {"relative": gap / scale if scale else math.nan}
        row |= {"redefined": x["definition"] != y["definition"]}
        rows.append(row)
    size = lambda v: -1.0 if v is None or math.isnan(v) else abs(v)  # noqa: E731
    return sorted(rows, key=lambda r: (-size(r["z"]), -size(r["relative"]), r["name"]))


def mean(metric: dict[str, Any]) -> str:
    spread = f" ± {metric['sd']:.2g} (n {metric['n']})" if metric["sd"] is not None else ""
    return f"{metric['mean']:.4g}{spread}"


# --- claims, files, features ---------------------------------------------------------------


def verdict_rows(a: list[dict], b: list[dict]) -> list[dict[str, Any]]:
    """Rows of all claims: both verdicts and numbers, whether they changed, what was restated."""
    ours, theirs = ({r["id"]: r for r in rows} for rows in (a, b))
    out = []
    for id in dict.fromkeys([*ours, *theirs]):
        x, y = ours.get(id, {}), theirs.get(id, {})
        known = ("paper_value", "tolerance", "kind")
        both = bool(x and y)
        out.append(
            {
                "id": id,
                "text": (x or y)["text"],
                "a": x.get("verdict", ABSENT),
                "b": y.get("verdict", ABSENT),
                "ours_a": short(x.get("ours", "") or ABSENT),
                "ours_b": short(y.get("ours", "") or ABSENT),
                "changed": x.get("verdict") != y.get("verdict"),
                "restated": both and any(x[k] != y[k] for k in known),
            }
        )
    return out


def file_rows(a: Results, b: Results) -> list[dict[str, str]]:
    """Every file that both have or one has: same bytes, same content, differs, only one."""
    ours, theirs = a.files(), b.files()
    rows = []
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in theirs or name not in ours:
            verdict = "only in A" if name in ours else "only in B"
        elif ours[name].read_bytes() == theirs[name].read_bytes():
            verdict = "same bytes"
        elif provenance.content_digest(ours[name]) == provenance.content_digest(theirs[name]):
            verdict = "same content, other certificate"
        else:
            verdict = "differs"
        rows.append({"name": name, "verdict": verdict})
    return rows


def dictionaries(run: Results) -> dict[str, Path]:
    """'<arm>.<dictionary>' -> its SAELens folder, for those whose weights are here."""
    out = {}
    for name, made in run.certificates.items():
        if made["stage"] != "evaluation" or name.endswith("_history.parquet"):
            continue
        arm = Path(name).stem
        for path in made["inputs"]:
            saes = run.base / Path(path).parent / "saes"
            if "/sae/" in path and saes.is_dir():
                out |= {f"{arm}.{f.name}": f for f in sorted(saes.iterdir()) if f.is_dir()}
    return out


def feature_rows(a: Results, b: Results) -> list[dict[str, Any]]:
    """Rows of the dictionaries whose weights both have, their latents matched by cosine."""
    ours, theirs = dictionaries(a), dictionaries(b)
    rows = []
    for name in sorted(ours.keys() & theirs.keys()):
        W_a, W_b = matching.decoder(ours[name]), matching.decoder(theirs[name])
        if W_a is None or W_b is None or W_a.shape[1] != W_b.shape[1]:
            continue
        found = matching.match(W_a, W_b, np.random.default_rng(0))
        top = [
            {"a": int(i), "b": int(j), "cosine": float(c)}
            for (i, j), c in zip(
                found.pairs[:SHOWN_PAIRS], found.cosines[:SHOWN_PAIRS], strict=True
            )
        ]
        rows.append(
            {
                "name": name,
                "latents": f"{len(W_a)} and {len(W_b)}",
                "shared": found.shared,
                "mean": float(found.nearest.mean()),
                "null": found.null,
                "pairs": top,
            }
        )
    return rows


# --- the comparison ------------------------------------------------------------------------


def compare(a: Results, b: Results) -> dict[str, Any]:
    """Everything that the terminal and the page show of a pair."""
    rows, metrics = verdict_rows(a.claims, b.claims), (a.metrics, b.metrics)
    differing = metric_rows(*metrics)
    both = a.certificates.keys() & b.certificates.keys()  # of other files one side knows nothing
    return {
        "a": a.name,
        "b": b.name,
        "counts": [tally(r.claims) for r in (a, b)],
        "settings": settings_differing(a, b),
        "environment": different(
            *(environment(r.certificates[name] for name in both) for r in (a, b))
        ),
        "verdicts": rows,
        "metrics": differing,
        "n_metrics": len(a.metrics.keys() & b.metrics.keys()),
        "n_z": sum(r["z"] is not None for r in differing),
        "n_large": sum(abs(r["z"] or 0) > LARGE for r in differing),
        "large": LARGE,
        "only": [sorted(x.keys() - y.keys()) for x, y in (metrics, metrics[::-1])],
        "features": feature_rows(a, b),
        "shared_above": matching.SHARED,
        "files": file_rows(a, b),
    }


def aligned(head: list[str], rows: list[list[str]], columns: int) -> list[str]:
    """A table as lines, its widest column cut so that it fits; at most SHOWN rows."""
    cells = [head, *rows[:SHOWN]]
    wide = [max(len(r[i]) for r in cells) for i in range(len(head))]
    while sum(wide) + 3 * len(wide) > columns and max(wide) > 12:
        wide[wide.index(max(wide))] -= 1
    lines = [" | ".join(cut(c, w).ljust(w) for c, w in zip(r, wide, strict=True)) for r in cells]
    lines.insert(1, "-+-".join("-" * w for w in wide))
    more = [f"… {len(rows) - SHOWN} more; --out has all"] if len(rows) > SHOWN else []
    return [f"  {line}".rstrip() for line in [*lines, *more]]


def number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def told(found: dict[str, Any], columns: int) -> str:
    """A comparison as text."""
    counts = [f"{c['reproduced']} of {c['judged']} judged reproduced" for c in found["counts"]]
    out = [f"A  {found['a']}: {counts[0]}", f"B  {found['b']}: {counts[1]}"]

    def section(title: str, head: list[str], rows: list[list[str]]) -> None:
        out.extend(["", title, *(aligned(head, rows, columns) if rows else [])])

    changed = [r for r in found["verdicts"] if r["changed"] or r["restated"]]
    rows = [
        [r["id"] + " (restated)" * r["restated"], r["a"], r["b"], r["ours_a"], r["ours_b"]]
        for r in changed
    ]
    n = sum(r["changed"] for r in changed)
    title = f"verdicts: {n} of {len(found['verdicts'])} changed"
    section(title, ["claim", "A", "B", "number A", "number B"], rows)
    for what, key in (("settings", "settings"), ("environment", "environment")):
        rows = [[r["name"], r["a"], r["b"]] for r in found[key]]
        section(f"{what}: {len(rows)} differ", ["name", "A", "B"], rows)
    rows = []
    for r in found["metrics"]:
        name = r["name"] + " (redefined)" * r["redefined"]
        rows.append([name, r["a"], r["b"], number(r["difference"]), number(r["z"])])
    title = (
        f"metrics: {len(rows)} of {found['n_metrics']} differ; {found['n_large']} of the "
        f"{found['n_z']} with a spread over seeds by |z| > {LARGE}"
    )
    section(title, ["metric", "A", "B", "B − A", "z"], rows)
    for side, names in zip("AB", found["only"], strict=True):
        if names:
            out.append(f"  only in {side}: {len(names)}, such as {names[0]}")
    rows = [
        [r["name"], r["latents"], f"{r['shared']:.1%}", number(r["mean"]), number(r["null"])]
        for r in found["features"]
    ]
    if rows:
        head = ["dictionary", "latents", "shared", "mean cosine", "random"]
        section(f"features: shared are pairs with a cosine above {matching.SHARED}", head, rows)
    else:
        out += ["", "features: no dictionary has its weights on both sides"]
    kinds = [r["verdict"] for r in found["files"]]
    count = ", ".join(f"{kinds.count(k)} {k}" for k in sorted(set(kinds)))
    return "\n".join([*out, "", f"files: {count}"])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", type=Path, help="a folder of results, or a release (.zip)")
    parser.add_argument("b", type=Path, help="another")
    parser.add_argument("--out", type=Path, help="an HTML page of the whole comparison")
    args = parser.parse_args()
    with command("compare"):
        with opened(args.a) as ours, opened(args.b) as theirs:
            found = [compare(a, b) for a, b in pairs(ours, theirs)]
        print("\n\n".join(told(f, width()) for f in found))
        if args.out:
            page = pages.render("compare.html", title="Two runs · Retrace", pairs=found)
            spec = {"a": str(args.a), "b": str(args.b)}
            made = provenance.certificate("compare", spec, source.job_code("compare"), [])
            embed.write_page(args.out, page, made)
            print(f"\n{args.out.resolve()}")
