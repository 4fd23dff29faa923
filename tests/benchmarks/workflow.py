"""What the workflow costs beside the work: doing nothing, one figure, start-up in a whole run.

    PYTHONPROFILEIMPORTTIME=1 snakemake -c2                  a whole run, imports timed in its logs
    python tests/benchmarks/workflow.py --directory .

nothing   snakemake where all is up to date, against `snakemake --version`
figure    one figure from existing tables, the slowest of all, where importing torch is an error
clone     with --clone: seconds from a fresh clone to its first figure, packages installed
share     share of a run's wall time in which a stage did its own work. A stage's own work is what
          its log calls work, less the imports that fall into it; jobs side by side count once.
          It is read from the logs of the last run that had more than --jobs jobs, and told job by
          job: seconds of own work, and of start-up and imports.

The directory holds a finished run; it is left as it is, but for figures drawn anew.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from harness import ROOT, Row, arguments, environment, interleaved, median, report

DONE = re.compile(r"done: ([\d.]+) s of work, ([\d.]+) s to start")
IMPORT = re.compile(r"^import time:\s+(\d+) \|", re.M)  # self time, microseconds
ELAPSED = re.compile(r"^Elapsed time: (?:(\d+) days?, )?(\d+):(\d+):([\d.]+)", re.M)
LOG = re.compile(r"^    log: (\S+)", re.M)


def snakemake(args, *more: str, env: dict | None = None) -> None:
    """Run snakemake on the finished run."""
    config = [f"scale={args.scale}", *args.config]
    command = [sys.executable, "-m", "snakemake", "-c2", "--snakefile", str(ROOT / "Snakefile")]
    command += ["--directory", str(args.directory), "--config", *config, "--", *more]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    if not more and "Nothing to be done" not in done.stdout + done.stderr:
        sys.exit(f"{args.directory}: was not finished; it is now, so call this again")


def nothing(args) -> Row:
    """snakemake with nothing to do."""
    bare = [sys.executable, "-m", "snakemake", "--version"]
    seconds = interleaved(
        {
            "ours": lambda: snakemake(args),
            "version": lambda: subprocess.run(bare, capture_output=True, check=True),
        },
        args.repeats,
    )
    ours, version = median(seconds["ours"]), median(seconds["version"])
    return Row(
        "nothing to do", ours, "s", version, "snakemake --version",
        target=f"ours <= {1.5 * version + 1:.2f}", higher_is_better=False, runs=seconds,
    )  # fmt: skip


def figure(args) -> Row:
    """The slowest figure, drawn anew from its tables."""
    figures = sorted(args.directory.glob(f"results/{args.scale}/*/figures/*.html"))
    if not figures:
        sys.exit(f"{args.directory}: no figures at scale {args.scale}; run snakemake there first")
    runs = {}
    with tempfile.TemporaryDirectory() as behind:
        Path(behind, "torch.py").write_text("raise ImportError('a figure needs no torch')")
        env = environment()
        env["PYTHONPATH"] = os.pathsep.join([behind, env["PYTHONPATH"]])
        for path in figures:
            target = str(path.relative_to(args.directory))
            started = time.perf_counter()
            path.unlink()
            snakemake(args, target, env=env)
            runs[f"{path.parts[-3]}/{path.stem}"] = [time.perf_counter() - started]
    slowest = max(runs, key=lambda name: runs[name][0])
    return Row(
        f"one figure ({slowest})", runs[slowest][0], "s", target="ours <= 5",
        higher_is_better=False, runs=runs,
    )  # fmt: skip


def last_run(directory: Path, jobs: int) -> tuple[float, list[Path]]:
    """(wall seconds, logs of its jobs) of the last run that had more than so many jobs."""
    for log in sorted((directory / ".snakemake/log").glob("*.snakemake.log"), reverse=True):
        text = log.read_text(errors="replace")
        logs, elapsed = dict.fromkeys(LOG.findall(text)), ELAPSED.search(text)
        if len(logs) > jobs and elapsed:
            days, hours, minutes, seconds = (float(g or 0) for g in elapsed.groups())
            wall = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
            return wall, [directory / path for path in logs]
    sys.exit(f"{directory}: no finished run of more than {jobs} jobs in .snakemake/log")


def seconds_of(log: Path) -> tuple[float, float] | None:
    """(of own work, of start-up and imports) of a job; None for a log that does not end in work."""
    text = log.read_text(errors="replace") if log.exists() else ""
    if not (done := DONE.search(text)):
        return None
    work, start = map(float, done.groups())
    later = max(sum(map(int, IMPORT.findall(text))) / 1e6 - start, 0)  # imports that fall into work
    return max(work - later, 0), start + later


def own_work(log: Path) -> tuple[float, float] | None:
    """(start, end) of a stage's own work; None for a log that does not end in work."""
    if not (seconds := seconds_of(log)):
        return None
    end = log.stat().st_mtime  # the closing line is the last that a stage writes
    return end - seconds[0], end


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0)
        reached = max(reached, end)
    return total


def share(args) -> Row:
    """Share of a run's wall time inside stages' own work."""
    wall, logs = last_run(args.directory, args.jobs)
    spans = [span for log in logs if (span := own_work(log))]
    timed = any(IMPORT.search(log.read_text(errors="replace")) for log in logs if log.exists())
    about = f"share of {wall:,.0f} s, {len(spans)} stages" + ("" if timed else ", imports untimed")
    base = args.directory / "results/logs"
    jobs = {str(log.relative_to(base)): s for log in logs if (s := seconds_of(log))}
    for name, (work, start) in sorted(jobs.items(), key=lambda job: -job[1][1]):
        print(f"{start:6.1f} s to start, {work:7.1f} s of own work, {name}")
    return Row(
        about, covered(spans) / wall, "of the wall time", target="ours >= 0.85",
        runs={name: list(seconds) for name, seconds in jobs.items()},
    )  # fmt: skip


def clone(args) -> Row:
    """Seconds from `git clone` to a figure of the first paper, at smoke scale."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        subprocess.run(["git", "clone", "-q", str(ROOT), folder], check=True)
        command = [sys.executable, "-m", "snakemake", "-c2", "--config", "scale=smoke", "--"]
        subprocess.run([*command, args.clone], cwd=folder, capture_output=True, check=True)
        seconds = time.perf_counter() - started
    return Row(
        f"a fresh clone's {args.clone}", seconds, "s", target="ours <= 60", higher_is_better=False
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--directory", type=Path, required=True, help="where a finished run lies")
    parser.add_argument("--scale", default="laptop")
    parser.add_argument("--config", nargs="*", default=[], help="as snakemake's, key=value")
    parser.add_argument(
        "--clone", help="a figure, as results/smoke/toy_superposition/figures/geometry.html"
    )
    parser.add_argument("--jobs", type=int, default=15)
    args = parser.parse_args()
    args.directory = args.directory.resolve()
    rows = [share(args), nothing(args), figure(args)]
    if args.clone:
        rows.append(clone(args))
    report("workflow", rows, args.out)


if __name__ == "__main__":
    main()
