"""One offline HTML page per paper: what was done, claims, figures, provenance and the card.

1. Read claims.csv, metrics.json and the figures' pages.
2. Follow the certificates from the verdicts back to weights and text (`provenance.chain`).
3. Say what was done (done.py), put each claim's order in words (words.py) beside the figure that
   shows it (shown.py, thumbs.py), and list the terms that occur and what to try next.
4. Fill templates/report.html; plotly.js goes in once and draws every figure.

What the jobs took, from snakemake's benchmarks, stands in costs.html beside it: unlike all else
that a run writes, the bytes of that page differ from run to run.
"""

import json
import math
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline.claims import costs
from pipeline.claims.summary import JUDGED, VERDICTS, read_claims, tally
from pipeline.errors import RetraceError
from pipeline.figures.drawing import filled
from pipeline.report import catalogue, done, glossary, next_steps, pages, shown, thumbs, words
from pipeline.report.pages import PLOT, SECOND_HAND, licences
from pipeline.store import provenance

SHORT = 12  # digits of a digest that a page shows


def figure(
    path: str | Path, card: dict[str, Any], scale: str, paper: str, config: list[str] | None = None
) -> dict[str, Any]:
    """A figure for the page: its plot, text, command, and how it was made.

    Args:
        config: what the command needs behind --config to find the paper.

    Raises:
        RetraceError: the file is not a figure.
    """
    path = Path(path)
    found = PLOT.search(path.read_text("utf-8"))
    if found is None:
        raise RetraceError(f"{path}: is not a figure; delete it and run snakemake again")
    certificate = provenance.read(path)
    plot = json.loads(found[1])
    return {
        "name": path.stem,
        "title": card["title"],
        "caption": card["caption"],
        "plot": plot,
        "thumb": pages.safe(thumbs.picture(plot)),
        "command": shlex.join(
            ["snakemake", "-c1", f"results/{scale}/{paper}/figures/{path.name}"]
            + (["--config", *config] if config else [])
        ),
        "made": how(certificate) if certificate else None,
    }


def how(certificate: dict[str, Any]) -> dict[str, Any]:
    """A certificate in words, for a fold."""
    versions = certificate["versions"]
    return {
        "stage": certificate["stage"],
        "settings": provenance.canonical(certificate["spec"]),
        "code": certificate["code"][:SHORT],
        "commit": commit(certificate),
        "versions": ", ".join(f"{k} {v}" for k, v in sorted(versions.items())),
        "inputs": [(p, sha[:SHORT]) for p, sha in sorted(certificate["inputs"].items())],
    }


def commit(certificate: dict[str, Any]) -> str:
    """The commit; a + where code stood there that was not committed; see `provenance.commits`."""
    return provenance.commits(certificate)


def chain(starts: Iterable[str | Path]) -> Iterator[dict[str, Any]]:
    """A row for every file that the page rests on, each once."""
    seen = set()
    for start in starts:
        for depth, file, certificate in provenance.chain(start):
            if file in seen:
                continue
            seen.add(file)
            row = {"depth": depth, "file": provenance.name_of(file), "stage": None}
            row |= {"certificate": certificate}
            if certificate is None:
                note = "made by hand, no certificate" if file.exists() else "not on this machine"
                yield row | {"note": note}
                continue
            yield row | {
                "stage": certificate["stage"],
                "commit": commit(certificate),
                "code": certificate["code"][:SHORT],
                "device": certificate["device"],
                "content": certificate.get("content", "")[:SHORT],
            }


def origin(certificates: list[dict]) -> str:
    """One sentence: which commits, packages and devices the results come from."""
    if not certificates:
        return "These tables carry no certificates."
    commits = sorted({commit(c) for c in certificates})
    devices = sorted({c["device"] for c in certificates if c["device"]})
    versions: dict[str, set] = {}
    for c in certificates:
        for name, version in c["versions"].items():
            versions.setdefault(name, set()).add(version)
    packages = ", ".join(f"{n} {'/'.join(sorted(v))}" for n, v in sorted(versions.items()))
    made = f"commit {commits[0]}" if len(commits) == 1 else f"{len(commits)} commits (listed below)"
    dirty = " A + marks code that was not committed." if any("+" in c for c in commits) else ""
    where = f" on {' and '.join(devices)}" if devices else ""
    return f"Made from {made}{where}, with {packages}.{dirty}"


def grids(metrics: dict[str, dict]) -> list[dict[str, Any]]:
    """Metrics as tables: names that share all but their last part are one table's rows.

    `trained.topk.l0`, `trained.topk.mse`, `random.topk.l0` become two rows under l0 and mse;
    names that share nothing with others stand in a table of one column.
    """
    by_prefix: dict[str, dict[str, str]] = {}
    for name, m in metrics.items():
        prefix, _, last = name.rpartition(".")
        by_prefix.setdefault(prefix, {})[last] = value(m)
    tables: dict[tuple, list] = {}
    single = []
    for prefix, row in by_prefix.items():
        if prefix and len(row) > 1:
            tables.setdefault(tuple(row), []).append({"name": prefix, "cells": list(row.values())})
        else:
            single += [{"name": f"{prefix}.{k}".strip("."), "cells": [v]} for k, v in row.items()]
    out = [
        {"columns": list(columns), "rows": rows, "first": rows[0]["name"]}
        for columns, rows in tables.items()
    ]
    return out + ([{"columns": ["value"], "rows": single, "first": ""}] if single else [])


def value(metric: dict[str, Any]) -> str:
    """'0.812 ± 0.004 (n = 3)'."""
    mean, sd, n = (metric[k] for k in ("mean", "sd", "n"))
    if not math.isfinite(mean):
        return "–"
    spread = f" ± {pages.number(sd, 2)} (n = {n})" if sd is not None else ""
    return pages.number(mean) + spread


def definitions(metrics: dict[str, dict]) -> list[tuple[str, str, str]]:
    """Each definition once, after the last parts of the names that have it, and before its id.

    Where a part has another definition already, the whole name stands: `l0` of the dictionaries
    and `attribution.mean.l0` of their means are two quantities.
    """
    names: dict[str, list[str]] = {}
    owner: dict[str, str] = {}
    for name, m in metrics.items():
        last, text = name.rsplit(".", 1)[-1], m["definition"]
        label = last if owner.setdefault(last, text) == text else name
        if label not in names.setdefault(text, []):
            names[text].append(label)
    return [
        (", ".join(labels), text, f"metric-{pages.anchor(labels[0])}")
        for text, labels in names.items()
    ]


def cost_rows(found: list[costs.Cost]) -> tuple[list[dict], dict]:
    """Costs as text, and their total (peak memory: the largest)."""
    row = lambda job, s, cpu, peak, shared: {  # noqa: E731
        "job": job,
        "wall": costs.duration(s),
        "cpu": costs.duration(cpu),
        "peak": f"{peak:,.0f} MiB" if math.isfinite(peak) else "–",
        "shared": shared,
    }
    rows = [row(c.job, c.seconds, c.cpu_seconds, c.peak_mib, c.shared) for c in found]
    known = lambda field: [v for c in found if math.isfinite(v := getattr(c, field))]  # noqa: E731
    sums = [sum(known(f)) for f in ("seconds", "cpu_seconds")]
    return rows, row("", *sums, max(known("peak_mib"), default=math.nan), False)


def claim_rows(claims: list[dict], card: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of claims.csv with what a page adds: orders in words, and the figure that shows it."""
    declared = {c["id"]: c for c in card.get("claims", [])}
    figures = card.get("figures", {})
    out = []
    for row in claims:
        claim = declared.get(row["id"], row)
        extra = {"figure": shown.figure_of(claim, figures), "metric": claim.get("metric", "")}
        extra["budget"] = words.decimal(row.get("budget") or "")
        if row["kind"] == "order":
            holds = row["paper_value"] or claim["holds"]
            extra |= {"conditions": words.conditions(holds, row["ours"])}
            extra |= {"paper_value": holds, "seeds": words.seeds(row["ours"])}
        out.append({**row, **extra})
    return out


def grouped(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Claims in the order of a page: the paper's that are judged, others, and what is folded."""
    folded = [v for v in VERDICTS if v not in JUDGED]
    judged = [r for r in rows if r["verdict"] in JUDGED]
    mine = [r for r in judged if r.get("of", "paper") == "paper"]
    return {
        "total": len(rows),
        "all": rows,
        "judged": mine,
        "aside": [r for r in judged if r not in mine],
        "folded": [(v, some) for v in folded if (some := [r for r in rows if r["verdict"] == v])],
    }


def figures_of(job: Any, rows: list[dict[str, Any]], metrics: dict) -> list[dict[str, Any]]:
    """The figures of a page, each with its caption filled in and the claims that it shows."""
    spec = job.spec
    cards = spec["card"].get("figures", {})
    out = []
    for file in job.args.figures:
        name = Path(file).stem
        made = figure(file, cards[name], spec["scale"], spec["paper"], spec.get("config"))
        made["caption"] = filled(made["caption"], metrics)
        shows = [
            {"id": r["id"], "short": r["id"].replace("_", " "), "text": r["text"]}
            for r in rows
            if r["figure"] == name
        ]
        out.append(made | {"shows": shows})
    return out


def texts(card: dict[str, Any], rows: list[dict[str, Any]]) -> Iterator[str]:
    """What a reader reads in a report, for the list of terms."""
    yield from (card["title"], card["summary"], *card["deviations"])
    for made in card.get("figures", {}).values():
        yield from (made.get("title", ""), made.get("caption", ""))
    for row in rows:
        yield from (row["text"], row.get("reason", ""), row.get("discussion", ""))
        yield row.get("null_arm", "") and "null arm"


def to_try(spec: dict[str, Any], rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What a reader can try next; see next_steps.py."""
    names = [p.metric for r in rows for c in r.get("conditions", []) for p in c.pieces if p.metric]
    metric = next((r["metric"] for r in rows if r["metric"]), next(iter(names), ""))
    return next_steps.steps(spec, metric)


def context(job: Any) -> dict[str, Any]:
    """What templates/report.html is filled with."""
    from pipeline import __version__
    from pipeline.store import tables

    args, spec = job.args, job.spec
    card = {"summary": "", "deviations": [], "contributions": "", "use_of_ai": "", **spec["card"]}
    metrics = tables.read_json(args.metrics)["metrics"]
    claims = claim_rows(read_claims(args.claims), spec["card"])
    rows = list(chain([args.claims, *args.tables]))
    certificates = [r.pop("certificate") for r in rows]
    certificates = [c for c in certificates if c]
    figures = figures_of(job, claims, metrics)
    defined = definitions(metrics)
    ids = {text: id for _, text, id in defined}
    return {
        "title": f"{card['title']} · Retrace",
        "paper": spec["paper"],
        "scale": spec["scale"],
        "card": card,
        "done": [
            *spec.get("done", []),
            *done.of_run(claims, (c["device"] for c in certificates)),
        ],
        "claims": grouped(claims),
        "count": tally(claims),
        "second_hand": SECOND_HAND,
        "figures": figures,
        "headline": spec.get("headline", ""),
        "thumbs": {f["name"]: f["title"] for f in figures if f["thumb"]},
        "pages": [Path(p).stem for p in args.pages],
        "next": to_try(spec, claims),
        "terms": glossary.used(texts(card, claims)),
        "n_metrics": len(metrics),
        "grids": grids(metrics),
        "definitions": defined,
        "defined": {name: ids[m["definition"]] for name, m in metrics.items()},
        "listed": catalogue.places(
            metrics, spec["paper"], catalogue.of_paper(Path(args.yaml).parent)
        ),
        "chain": rows,
        "origin": origin(certificates),
        "licences": licences(certificates),
        "yaml": Path(args.yaml).read_text("utf-8"),
        "version": __version__,
    }


def cost_page(job: Any) -> str:
    """costs.html: what the jobs behind the tables took. It carries no certificate."""
    from pipeline import __version__

    args, spec = job.args, job.spec
    files = [row["file"] for row in chain([args.claims, *args.tables])]
    found, total = cost_rows(costs.of_paper(args.benchmarks, spec["scale"], spec["paper"], files))
    return pages.render(
        "costs.html",
        title=f"Cost of {spec['card']['title']} · Retrace",
        paper=spec["paper"],
        scale=spec["scale"],
        costs=found,
        total=total,
        version=__version__,
    )


def main() -> None:
    from pipeline.job import cli
    from pipeline.store import embed, tables

    parser = cli.parser(
        "report",
        __doc__,
        figures="pages of the figures*",
        pages="pages of features*",
        claims="claims.csv",
        metrics="metrics.json",
        tables="the paper's tables*",
        yaml="paper.yaml",
        benchmarks="folder of snakemake's benchmarks",
        out="report.html",
        costs="costs.html",
    )

    def work(job: cli.Job) -> None:
        args = job.args
        page = pages.render("report.html", **context(job))
        inputs = [args.claims, args.metrics, *args.figures, *args.tables, args.yaml]
        costs_of_run = cost_page(job)
        tables.atomically(args.costs, lambda to: to.write_text(costs_of_run, "utf-8") and None)
        embed.write_page(args.out, page, job.certificate(inputs))

    cli.run("report", parser.parse_args(), work)
