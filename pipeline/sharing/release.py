"""A paper's results as one archive: what a reviewer needs, and what a journal keeps.

1. Take the report, claims, metrics, every table that a figure or a metric reads, the figures with
   their plotted numbers and the script that draws them, and the paper's own files. Weights and
   activations stay behind: their digests stand in the certificates.
2. Write them under the paths that they have in a checkout, inputs before what is made from them,
   with release.json (the sha256 of every file) and, at the root, README_<paper>_<scale>.md: what
   to do. Its name is its own, since a clone has a README.md.

Unpacked in a clone of Retrace, every figure is drawn anew from its tables, in seconds and without
torch; `python -m pipeline compare release.zip results/<scale>/<paper>` tells whether the bytes are
the same. The archive is a function of its files: it holds no date, user or path of a machine.
"""

import json
import zipfile
from pathlib import Path

from pipeline.job import cli
from pipeline.store import intact, provenance, tables

EPOCH = (1980, 1, 1, 0, 0, 0)  # the first date that a zip can hold
README = """\
# {title}

{authors}, {year}. {url}

A replication by Retrace {version} at scale `{scale}`, made from commit {commits}. Open
`{base}/report.html`; it is one page and loads nothing. A figure by itself, such as
`{base}/figures/{figure}.html`, is drawn by `results/{scale}/figures.js`.

In a clone of Retrace at that commit, with its requirements.lock installed, unpack this archive.
Then

    snakemake -c1 --config papers=[{paper}] scale={scale} -- {base}/figures/{figure}.html

draws that figure anew from its tables, in seconds and without torch,

    snakemake -c2 --config papers=[{paper}] scale={scale} -- {paper}

draws all of them and the report, and

    python -m pipeline compare release.zip {base}
    python -m pipeline provenance verify {base}

tell whether the bytes are the same, and whether any file was changed since it was made.
"""


def order(file: Path) -> tuple[int, str]:
    """Inputs before what is made from them: snakemake compares dates of unpacked files."""
    ranks = {"metrics.json": 2, "claims.csv": 3, "claims.csv.json": 3, "report.html": 5}
    rank = {".yaml": 0, ".py": 0, ".smk": 0, ".parquet": 1}.get(file.suffix, 4)
    return ranks.get(file.name, rank), str(file)


def commits(files: list[Path]) -> str:
    """The commits that these files come from; a + where code stood there that was not committed."""
    found = [made for f in files if (made := provenance.read(f))]
    return ", ".join(sorted({provenance.commits(c) for c in found}))


def readme(spec: dict, files: list[Path]) -> str:
    """What the archive holds and how to use it."""
    from pipeline import __version__

    card, paper, scale = spec["card"], spec["paper"], spec["scale"]
    facts = {k: card[k] for k in ("title", "authors", "year", "url")}
    return README.format(
        **facts,
        paper=paper,
        scale=scale,
        base=f"results/{scale}/{paper}",
        figure=next(iter(card.get("figures", {})), "<figure>"),
        version=__version__,
        commits=commits(files),
    )


def write(path: str | Path, members: list[tuple[str, bytes]]) -> None:
    """A zip of (name, content), in this order, sealed in its comment; a function of these."""

    def write_to(to: Path) -> None:
        with zipfile.ZipFile(to, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as z:
            for name, content in members:
                info = zipfile.ZipInfo(name, EPOCH)
                info.create_system, info.external_attr = 3, 0o644 << 16  # Unix, rw-r--r--
                z.writestr(info, content, zipfile.ZIP_DEFLATED)
            z.comment = provenance.canonical(intact.to_seal({})).encode()
        intact.seal(to, ".zip")

    tables.atomically(path, write_to)


def main() -> None:
    parser = cli.parser(
        "release",
        __doc__,
        files="results of the paper*",
        own="paper.yaml and the paper's own code*",
        script="figures.js",
        out="release.zip",
    )

    def work(job: cli.Job) -> None:
        args, paper = job.args, job.spec["paper"]
        base = f"results/{job.spec['scale']}/{paper}"
        named = {f: f"rules/papers/{paper}/{f.name}" for f in map(Path, args.own)}
        named |= {f: f"{base}/{f.relative_to(base)}" for f in map(Path, args.files)}
        named[Path(args.script)] = f"results/{job.spec['scale']}/figures.js"
        files = sorted(named, key=order)
        members = [(named[f], f.read_bytes()) for f in files]
        first = (f"README_{paper}_{job.spec['scale']}.md", readme(job.spec, files).encode())
        members.insert(0, first)
        sums = {name: provenance.sha256_bytes(content) for name, content in members}
        about = {"paper": paper, "scale": job.spec["scale"], "sha256": sums}
        made = job.certificate([]) | {"spec": {}, "content": provenance.digest(about)}
        text = json.dumps({**about, "provenance": made}, indent=1, ensure_ascii=False) + "\n"
        members.append((f"{base}/release.json", text.encode()))
        write(args.out, members)
        size = Path(args.out).stat().st_size / 2**20
        cli.log.info("%d files, %.1f MiB", len(members), size)

    cli.run("release", parser.parse_args(), work)
