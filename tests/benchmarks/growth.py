"""What snakemake takes with nothing to do, as papers grow in number; and where the time goes.

    python tests/benchmarks/growth.py --papers 10 100 1000

Makes so many papers out of the scaffold's, in a folder of its own, and takes their results for
made: empty files with snakemake's records, as a finished run leaves them, so that every call finds
all up to date. No two papers have a file of the same bytes. Processor seconds are taken, which
other processes change less than the time. The floor is snakemake itself: growth.smk has the same
rules, files, jobs and records and nothing of ours. Both are called in turn, once before they count.

`--profile` prints which functions of snakemake and of ours took most of the largest call,
`--imports` what a stage's imports take.
"""

import base64
import json
import pstats
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import ROOT, Row, arguments, median, report

sys.path.insert(0, str(ROOT / "tests"))
from snake import copy_repository

from pipeline.job.commands import MODULES
from pipeline.papers.scaffold import scaffold

FLOOR = Path(__file__).with_suffix(".smk")
TARGET = "share_of_floor >= 0.77"  # at most 1.3 times what snakemake itself takes
# snakemake that runs no job: it makes each output an empty file and writes the record of a job that
# is done. `--touch` does so, too, in five times the time.
MADE = """
import os, sys, time
from pathlib import Path
from snakemake.cli import main
from snakemake.dag import DAG

init = DAG.init

async def made(dag, *args, **named):
    await init(dag, *args, **named)
    now = time.time()
    for job in dag.jobs:
        for file in map(Path, job.output):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
            os.utime(file, (now, now))
    dag.workflow.iocache.clear()
    for job in dag.jobs:
        if not job.rule.norun:
            await dag.workflow.persistence.finished(job)

DAG.init = made
main([*sys.argv[1:], "--dry-run", "--quiet", "all"])
"""
STAGES = "model corpus activations sae evaluation features metrics claims figures report index"


def project(folder: Path, n: int) -> Path:
    """A copy of the repository with n papers, their results made in name only."""
    copy_repository(folder)
    names = [f"p{i}" for i in range(n)]
    for name in names:
        for file in scaffold(name, folder / "rules/papers").iterdir():
            file.write_text(file.read_text() + f"# {name}\n")
    config = (folder / "config.yaml").read_text()
    config = re.sub(r"^papers: .*$", f"papers: [{', '.join(names)}]", config, flags=re.M)
    (folder / "config.yaml").write_text(re.sub("^scale: \\w+", "scale: smoke", config, flags=re.M))
    (folder / "results/store").mkdir(parents=True)
    return made(folder)


def floor(folder: Path, ours: Path, n: int) -> Path:
    """The same files, jobs and records for growth.smk; `ours` is what `project` made."""
    folder.mkdir()
    shutil.copy(FLOOR, folder / "Snakefile")
    shutil.copytree(ours / "rules/papers", folder / "rules/papers")
    outputs = {
        "metrics": "p0/metrics.json", "claims": "p0/claims.csv", "report_html": "p0/report.html",
        "figures": "p0/figures/cosines.html", "measure": "p0/measure/cosines.parquet",
        "index": "index.html",
    }  # fmt: skip
    params = {rule: params_of(ours, f"results/smoke/{file}") for rule, file in outputs.items()}
    given = {"papers": [f"p{i}" for i in range(n)], "scale": "smoke", "params": params}
    (folder / "given.json").write_text(json.dumps(given))
    return made(folder)


def params_of(folder: Path, output: str) -> list[str]:
    """[spec, code] of the job of a file, from snakemake's record of it."""
    name = base64.urlsafe_b64encode(output.encode()).decode()
    record = json.loads((folder / ".snakemake/metadata" / name).read_text())
    texts = [p[1:-1] for p in record["params"] if p[0] == "'"]
    code = next(text for text in texts if re.fullmatch("[0-9a-f]{64}", text))
    return [max(texts, key=len), code]


def made(folder: Path) -> Path:
    """The folder, its jobs recorded as done."""
    command = [sys.executable, "-c", MADE, "-c2"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
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
            bare = floor(Path(base) / f"floor{n}", folder, n)
            snakemake(folder)  # it notes what it found out
            both = [(snakemake(folder), snakemake(bare)) for _ in range(args.repeats)]
            ours, alone = map(list, zip(*both, strict=True))
            rows.append(
                Row(f"{n} papers, {5 * n + 3} jobs", median(ours), "s of processor",
                    floor=median(alone), floor_name="snakemake alone",
                    target=TARGET if n >= 1000 else "", higher_is_better=False,
                    runs={"ours": ours, "floor": alone})
            )  # fmt: skip
        if args.profile:
            profile(folder)
    report("growth", rows, args.out)


if __name__ == "__main__":
    main()
