"""What snakemake takes with nothing to do, as papers grow in number; and where the time goes.

    python tests/benchmarks/growth.py --papers 10 100 1000

Makes so many papers out of the scaffold's, in a folder of its own, and takes their results for made
(`snakemake --touch` on empty files), so that every call finds all up to date. Processor seconds are
taken, which other processes change little. `--profile` prints which functions of snakemake and of
ours took most of the largest call, `--imports` what a stage's imports take.
"""

import pstats
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import ROOT, Row, arguments, median, report

sys.path.insert(0, str(ROOT / "tests"))
from snake import copy_repository

from pipeline.job.commands import MODULES
from pipeline.papers.scaffold import scaffold

# snakemake --touch, less the tenth of a second that it sleeps for each job.
TOUCH = """
import sys
from types import SimpleNamespace
from snakemake.cli import main
from snakemake.executors import touch
touch.time = SimpleNamespace(sleep=lambda seconds: None)
main(sys.argv[1:])
"""
STAGES = "model corpus activations sae evaluation features metrics claims figures report index"


def project(folder: Path, n: int) -> Path:
    """A copy of the repository with n papers, their results made in name only."""
    copy_repository(folder)
    names = [f"p{i}" for i in range(n)]
    for name in names:
        scaffold(name, folder / "rules/papers")
    config = (folder / "config.yaml").read_text()
    config = re.sub(r"^papers: .*$", f"papers: [{', '.join(names)}]", config, flags=re.M)
    (folder / "config.yaml").write_text(re.sub("^scale: \\w+", "scale: smoke", config, flags=re.M))
    for name in names:
        base = folder / "results/smoke" / name
        for file in (
            "measure/cosines.parquet", "metrics.json", "claims.csv", "claims.csv.json",
            "figures/cosines.html", "figures/cosines.csv", "figures/cosines.csv.json",
            "report.html",
        ):  # fmt: skip
            (base / file).parent.mkdir(parents=True, exist_ok=True)
            (base / file).touch()
    for file in ("figures.js", "index.html"):
        (folder / "results/smoke" / file).touch()
    touch = [sys.executable, "-c", TOUCH, "-c2", "--touch"]
    subprocess.run(touch, cwd=folder, capture_output=True, check=True)
    return folder


def snakemake(folder: Path) -> float:
    """Processor seconds of one call, user and system."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "snakemake", "-c2"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode or "Nothing to be done" not in done.stdout + done.stderr:
        sys.exit(done.stdout + done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def profile(folder: Path) -> None:
    """Print the functions of the largest cumulative time: of snakemake's modules, and of ours."""
    with tempfile.NamedTemporaryFile(suffix=".prof") as out:
        command = [sys.executable, "-m", "cProfile", "-o", out.name, "-m", "snakemake", "-c2"]
        subprocess.run(command, cwd=folder, capture_output=True, check=True)
        stats = pstats.Stats(out.name).sort_stats("cumulative")
    stats.print_stats("snakemake/", 30)
    stats.print_stats(r"/pipeline/|\.smk|/Snakefile", 30)


def imports() -> None:
    """Print what each stage's imports take, and the slowest of them."""
    for stage in STAGES.split():
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", f"import {MODULES[stage]}"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        rows = re.findall(r"^import time:\s+(\d+) \|\s+(\d+) \| (\s*)(\S+)", done.stderr, re.M)
        total = sum(int(own) for own, *_ in rows) / 1e6
        slowest = sorted(((int(own), name) for own, _, _, name in rows), reverse=True)[:3]
        told = ", ".join(f"{name} {own / 1e3:.0f} ms" for own, name in slowest)
        print(f"{stage:12} {total:5.2f} s of imports; by themselves: {told}")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--papers", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--imports", action="store_true")
    args = parser.parse_args()
    if args.imports:
        imports()
    rows = []
    with tempfile.TemporaryDirectory() as base:
        for n in args.papers:
            folder = project(Path(base) / str(n), n)
            runs = [snakemake(folder) for _ in range(args.repeats)]
            rows.append(
                Row(f"{n} papers, {5 * n + 3} jobs", median(runs), "s of processor",
                    higher_is_better=False,
                    runs={"ours": runs})
            )  # fmt: skip
        if args.profile:
            profile(folder)
    report("growth", rows, args.out)


if __name__ == "__main__":
    main()
