"""What it costs to check that a job's inputs are as they were written.

    snakemake -c2                                               a run, finished or not
    python tests/benchmarks/checking.py --directory . --papers topk_saes --stages model corpus

share     seconds of the checks of all finished jobs' inputs, done again here, of the seconds that
          snakemake's benchmarks give these jobs; the target is 3 %
logged    the same by the jobs' own logs, wall time instead of processor time
stages    every finished job of --stages is done again in a copy, by the command that snakemake
          gives it, once with the checks and once without, in turn: the ratio of the two

Processor seconds are taken, which other processes change little. A stage has no switch that leaves
the checks out: a launcher puts another function in their place, and changes nothing else.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import ROOT, Row, arguments, environment, median, report

from pipeline.store import intact, provenance

NO_PATHS = {"spec", "device", "threads", "code"}

LAUNCHER = """
import atexit, json, os, runpy, sys, time
from pipeline.store import intact
from pipeline.store.shards import Rows

inside, spent = [], [0.0]

def timed(check):
    def run(*args):
        inside.append(time.process_time())
        try:
            return check(*args)
        finally:
            started = inside.pop()
            if not inside:  # one check calls another
                spent[0] += time.process_time() - started
    return run

CHECKS = [(intact, "check_inputs"), (intact, "check_alone"), (Rows, "_check_file")]
for home, name in [*CHECKS, (Rows, "_check_rows")]:
    off = os.environ["CHECKS"] == "off"
    setattr(home, name, (lambda *_: (0, 0)) if off else timed(getattr(home, name)))

def tell():
    with open(os.environ["CHECKED"], "w") as f:
        json.dump({"checks": spent[0], "all": time.process_time()}, f)

atexit.register(tell)
if sys.argv[1] == "-m":
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
COMMAND = re.compile(r"^Shell command: (.*)$", re.M)
BENCHMARK = re.compile(r"^    benchmark: (\S+)$", re.M)
DONE = re.compile(r"done: ([\d.]+) s of work, ([\d.]+) s to start.*; ([\d.]+) s to check", re.M)


def commands(args) -> list[tuple[list[str], Path]]:
    """(command, benchmark) of every job, as snakemake gives them; its log left out."""
    config = [f"scale={args.scale}", f"papers=[{','.join(args.papers)}]"]
    command = [sys.executable, "-m", "snakemake", "-n", "-p", "-F", "-c2"]
    command += ["--snakefile", str(ROOT / "Snakefile"), "--directory", str(args.directory)]
    done = subprocess.run([*command, "--config", *config], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    out = []
    for job in re.split(r"^(?:local)?rule ", done.stdout + done.stderr, flags=re.M)[1:]:
        command, told = COMMAND.search(job), BENCHMARK.search(job)
        if command and told:
            words = shlex.split(command[1])
            out.append((words[: words.index("2>")], args.directory / told[1]))
    return out


def stage_of(command: list[str]) -> str:
    """The stage of `python -m pipeline <stage>`, or the name of a paper's own script."""
    return command[3] if command[1:3] == ["-m", "pipeline"] else Path(command[1]).stem


def processor_seconds(benchmark: Path) -> float:
    """What a job took, by snakemake's benchmark of it; 0 where it is not finished."""
    if not benchmark.exists():
        return 0.0
    head, values = (line.split("\t") for line in benchmark.read_text().splitlines()[:2])
    return float(dict(zip(head, values, strict=True))["cpu_time"])


def check(command: list[str], directory: Path) -> float:
    """Processor seconds of checking a job's inputs, the shards that it reads included."""
    given: dict[str, list[str]] = {}
    for word in command:
        if word.startswith("--"):
            given[option := word.removeprefix("--")] = []
        elif given:
            given[option].append(str(directory / word) if option not in NO_PATHS else "")
    for cached in (intact._check_alone, intact._sha256_of):
        cached.cache_clear()
    started = time.process_time()
    intact.check_inputs(given, stage_of(command))
    for manifest in given.get("activations", []):
        for shard in json.loads(Path(manifest).read_text())["files"]:
            provenance.sha256_file(Path(manifest).parent / shard)
    return time.process_time() - started


def direct(jobs: list[tuple[list[str], Path]], directory: Path, repeats: int) -> Row:
    """Share of the checks in the processor seconds of all finished jobs."""
    runs = {}
    for command, benchmark in jobs:
        if total := processor_seconds(benchmark):
            name = f"{stage_of(command)}/{benchmark.stem}"
            runs[name] = [median([check(command, directory) for _ in range(repeats)]), total]
    if not runs:
        sys.exit(f"{directory}: no finished job; run snakemake there first")
    checks, total = (sum(values) for values in zip(*runs.values(), strict=True))
    return Row(
        f"{len(runs)} jobs of {total:.0f} s", checks / total, "of the processor time",
        target="ours <= 0.03", higher_is_better=False, runs=runs,
    )  # fmt: skip


def outputs(command: list[str], folder: Path) -> list[Path]:
    """Files and folders of the store that lie in the folder of --out."""
    out = folder / command[command.index("--out") + 1]
    return sorted(out.parent.iterdir()) if out.exists() else []


def once(command: list[str], folder: Path, checks: str) -> dict[str, float]:
    """Processor seconds of one call: inside the checks, and all."""
    for path in outputs(command, folder):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with tempfile.NamedTemporaryFile(suffix=".json") as told:
        env = environment(CHECKS=checks, CHECKED=told.name)
        call = [command[0], "-c", LAUNCHER, *command[1:]]
        done = subprocess.run(call, cwd=folder, env=env, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        return json.loads(Path(told.name).read_text())


def measured(command: list[str], folder: Path, repeats: int) -> Row:
    """One job, with the checks and without, in turn."""
    runs: dict[str, list[float]] = {"with": [], "without": [], "checks": []}
    once(command, folder, "on")  # files are in memory then, for both
    for _ in range(repeats):
        on, off = once(command, folder, "on"), once(command, folder, "off")
        runs["with"].append(on["all"])
        runs["checks"].append(on["checks"])
        runs["without"].append(off["all"])
    share = median([c / a for c, a in zip(runs["checks"], runs["with"], strict=True)])
    return Row(
        f"{stage_of(command)}: {median(runs['with']):.1f} s, {share:.2%} of them checks",
        median(runs["with"]), "s of processor", median(runs["without"]), "without checks",
        higher_is_better=False, runs=runs,
    )  # fmt: skip


def logged(directory: Path) -> Row:
    """Share of the seconds of all finished jobs in which they checked, by their logs."""
    found = [DONE.search(f.read_text(errors="replace")) for f in directory.rglob("logs/**/*.log")]
    jobs = [[float(x) for x in f.groups()] for f in found if f]
    if not jobs:
        sys.exit(f"{directory}: no log of a finished job; run snakemake there first")
    total, checks = sum(w + s for w, s, _ in jobs), sum(c for *_, c in jobs)
    return Row(
        f"logged by {len(jobs)} jobs", checks / total, "of the wall time", target="ours <= 0.03",
        higher_is_better=False, runs={"checks": [c for *_, c in jobs]},
    )  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--directory", type=Path, required=True, help="where the run lies")
    parser.add_argument("--scale", default="laptop")
    parser.add_argument("--papers", nargs="+", default=["topk_saes"])
    parser.add_argument("--stages", nargs="+", default=["model", "corpus"])
    args = parser.parse_args()
    args.directory = args.directory.resolve()
    jobs = commands(args)
    rows = [direct(jobs, args.directory, args.repeats), logged(args.directory)]
    with tempfile.TemporaryDirectory(dir=args.directory.parent) as copy:
        folder = Path(copy)
        shutil.copytree(args.directory / "results", folder / "results", symlinks=True)
        for command, _ in jobs:
            if stage_of(command) in args.stages and outputs(command, folder):
                rows.append(measured(command, folder, args.repeats))
    report("checking", rows, args.out)


if __name__ == "__main__":
    main()
