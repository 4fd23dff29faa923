"""The workflow in tests: on a copy of this repository or on the repository itself, run or asked."""

import json
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import warm
import yaml

from pipeline.claims import progress
from pipeline.job import source
from pipeline.papers import papers
from pipeline.papers.scaffold import scaffold
from pipeline.papers.workflow import Inputs

ROOT = Path(__file__).parent.parent
JOB = re.compile(r"^(?:local)?rule (\w+):$", re.M)


@dataclass(frozen=True)
class Done:
    """A finished run of snakemake: exit code, all that it printed, the jobs that it ran.

    Attributes:
        jobs: names of the rules whose jobs ran; `all` and its like, which do nothing, are listed
            by a dry run alone.
    """

    code: int
    said: str
    jobs: list[str]


def ran(folder: Path) -> list[str]:
    """Names of the rules whose jobs ran in the newest run in a folder, in their order."""
    events = map(json.loads, progress.newest(folder).read_text("utf-8").splitlines())
    return [event["rule"] for event in events if event["event"] == "job"]


def journals(folder: Path) -> set[Path]:
    return set((folder / ".snakemake/log").glob("*.events.jsonl"))


def snakemake(*args: str, cwd: Path, check: bool = True, timeout: int = 600, **config) -> Done:
    """Run snakemake in `cwd`.

    Args:
        args: as on the command line.
        check: fail where snakemake fails.
        config: what --config takes.
    """
    given = ["--config", *(f"{k}={v}" for k, v in config.items()), "--"] if config else []
    flags = [a for i, a in enumerate(args) if a.startswith("-") or args[i - 1] in VALUED]
    targets = [a for a in args if a not in flags]
    command = [warm.python(), "-m", "snakemake", "-c2", *flags, *given, *targets]
    folder = cwd / args[args.index("--directory") + 1] if "--directory" in args else cwd
    before = journals(folder)
    done = subprocess.run(
        command,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    if check:
        assert done.returncode == 0, done.stdout
    new = journals(folder) - before
    return Done(done.returncode, done.stdout, ran(folder) if new else JOB.findall(done.stdout))


VALUED = {"-s", "--snakefile", "--directory", "--configfile", "--report"}


def by_warm_python(line: str) -> str:
    """A line of the docs with the warm Python in the place of the environment's programs."""
    python = shlex.quote(warm.python())
    line = re.sub(r"(^|\.venv/bin/)snakemake(?= )", f"{python} -m snakemake", line)
    return re.sub(r"(^|\.venv/bin/)python(?= )", python, line)


def copy_repository(to: Path) -> Path:
    """Snakefile, config.yaml, rules and pipeline of this repository, without its papers."""
    to.mkdir(parents=True)
    for name in ("Snakefile", "config.yaml"):
        shutil.copy(ROOT / name, to)
    for name, *left_out in (("rules", "papers"), ("pipeline",)):
        ignored = shutil.ignore_patterns("__pycache__", "*.tmp", *left_out)
        shutil.copytree(ROOT / name, to / name, ignore=ignored)
    (to / "rules" / "papers").mkdir()
    return to


def toy_project(to: Path) -> Path:
    """A copy of the repository with one paper, `toy`, at smoke scale: seconds, without torch."""
    copy_repository(to)
    scaffold("toy", to / "rules" / "papers")
    config = (to / "config.yaml").read_text()
    config = re.sub(r"^papers: .*$", "papers: [toy]", config, flags=re.M)
    (to / "config.yaml").write_text(re.sub("^scale: \\w+", "scale: smoke", config, flags=re.M))
    return to


# --- what the rules ask, without snakemake -------------------------------------------------


def wildcards(**named: str) -> SimpleNamespace:
    return SimpleNamespace(**({"scale": "smoke", "paper": "toy"} | named))


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1, f"{file}: '{old}' stands {text.count(old)} times"
    file.write_text(text.replace(old, new))


def inputs_of(project: Path, **config) -> Inputs:
    """As rules/common.smk makes them; config is laid over config.yaml."""
    settings = yaml.safe_load((project / "config.yaml").read_text()) | config
    return Inputs(papers.Run.load(settings, [project]), project)


def forget_code(note: bool = True) -> None:
    """Forget what was read for code hashes: a process reads a file once.

    Args:
        note: also what is noted under the bytes of a file, and holds for another file of the same,
            and the versions of packages.
    """
    caches = [source.tree, source._facts, source._module, source.reached, source._templates]
    caches += [source._ours, *((source._remembered, source._version) if note else ())]
    for function in caches:
        function.cache_clear()
