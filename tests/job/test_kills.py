"""A killed run is resumed by calling it again, whatever was killed, and ends in the same bytes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from snake import ROOT, snakemake, toy_project

from pipeline.errors import RetraceError
from pipeline.job import kills

COMMAND = [sys.executable, "-m", "snakemake", "-c2", "all", "results/smoke/toy/release.zip"]


def start(project: Path) -> subprocess.Popen:
    """Snakemake in a session of its own, as a terminal has one."""
    log = (project / "said.txt").open("a")
    return subprocess.Popen(
        COMMAND, cwd=project, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        start_new_session=True,
    )  # fmt: skip


def alone(process: subprocess.Popen) -> None:
    """SIGKILL of snakemake alone."""
    process.kill()


def group(process: subprocess.Popen) -> None:
    """SIGKILL of all that it started: power, or a container's memory."""
    os.killpg(process.pid, signal.SIGKILL)


def terminal(process: subprocess.Popen) -> None:
    """SIGHUP: a closed ssh."""
    os.killpg(process.pid, signal.SIGHUP)


def members(session: int) -> list[int]:
    """Processes of a session that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def results(project: Path) -> dict[str, bytes]:
    """Every file but logs, benchmarks and costs.html, which carry times, and the note of code
    hashes, which carries those of the checkout's files."""
    base = project / "results"
    files = {str(p.relative_to(base)): p for p in base.rglob("*") if p.is_file()}
    measured = ("logs/", "benchmarks/", "smoke/toy/costs.html", "store/.digests/code.json")
    return {n: p.read_bytes() for n, p in files.items() if not n.startswith(measured)}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Path, float]:
    """A finished run of the toy paper, and the seconds that it took."""
    project = toy_project(tmp_path_factory.mktemp("undisturbed") / "retrace")
    started = time.monotonic()
    assert start(project).wait() == 0, (project / "said.txt").read_text()
    return project, time.monotonic() - started


def kill_again_and_again(project: Path, seconds: float, n: int, seed: int) -> None:
    """Call snakemake and kill it at random moments, n times, then let it end."""
    moments = random.Random(seed)
    done = 0
    while done < n:
        process = start(project)
        kill = (alone, group, terminal)[done % 3]
        try:
            process.wait(moments.uniform(0.2, 1) * seconds)
        except subprocess.TimeoutExpired:
            kill(process)
            done += 1
            process.wait()
            until = time.monotonic() + 10
            while members(process.pid) and time.monotonic() < until:
                time.sleep(0.05)
            assert members(process.pid) == [], (
                f"a stage goes on after its snakemake: {kill.__doc__}"
            )
        else:
            assert process.returncode == 0, (project / "said.txt").read_text()
            for file in results(project):  # all was done before its moment came: begin anew
                (project / "results" / file).unlink()


def killed_and_called_again(undisturbed, tmp_path, n: int, seed: int) -> None:
    whole, seconds = undisturbed
    project = toy_project(tmp_path / "retrace")
    kill_again_and_again(project, seconds, n, seed)
    assert start(project).wait() == 0, (project / "said.txt").read_text()
    said = (project / "said.txt").read_text()
    assert "LockException" not in said and "IncompleteFilesException" not in said, said
    ours, theirs = results(project), results(whole)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


@pytest.mark.workflow
def test_three_kills_and_a_call(undisturbed, tmp_path):
    killed_and_called_again(undisturbed, tmp_path, 3, seed=1)


@pytest.mark.slow
def test_thirty_kills_and_a_call(undisturbed, tmp_path):
    killed_and_called_again(undisturbed, tmp_path, 30, seed=2)


HOLDER = "import sys, time; from pathlib import Path; from pipeline.job import kills\n"
HOLDER += "kills.own(Path(sys.argv[1])); print('holds', flush=True); time.sleep(60)"


@pytest.fixture
def holder(tmp_path):
    """A process that works on the store of tmp_path."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "results/store/.owner")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "holds\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_of_two_projects_on_one_store_is_told_who_works(holder, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "results/store")
    with pytest.raises(RetraceError, match=rf"process {holder.pid} on \S+, called in {ROOT}"):
        kills.own(tmp_path / "link/.owner", patience=0.2)
    assert json.loads((tmp_path / "results/store/.owner").read_text())["process"] == holder.pid


def test_a_lock_ends_with_its_process(holder, tmp_path):
    holder.kill()
    holder.wait()
    code = "import sys; from pathlib import Path; from pipeline.job import kills\n"
    code += "print(kills.own(Path(sys.argv[1])), kills.own(Path(sys.argv[1])))"
    file = tmp_path / "results/store/.owner"
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "True True\n" and file.read_text() == ""


@pytest.mark.workflow
def test_a_run_beside_another_is_told_and_a_dry_run_is_not(undisturbed):
    project = undisturbed[0]
    file = project / "results/store/.owner"
    command = [sys.executable, "-c", HOLDER, str(file)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        done = snakemake(cwd=project, check=False)
        assert snakemake("-n", cwd=project).code == 0
        process.kill()
    assert done.code != 0 and f"process {process.pid} on " in done.said
    assert "Traceback" not in done.said and "LockException" not in done.said


@pytest.mark.parametrize(
    "argv, reads",
    [
        ("-n", True), ("-np", True), ("--dry-run all", True), ("--unlock", True),
        ("--report=out.zip", True), ("-c2 all", False), ("-c2 -k", False), ("-pF toy", False),
        ("--config scale=smoke -- nanogpt", False),
    ],
)  # fmt: skip
def test_only_calls_that_run_jobs_take_the_lock(argv, reads):
    assert kills.only_reads(argv.split()) is reads


def child(parent: int) -> subprocess.Popen:
    code = (
        "from pipeline.job import kills; import time\n"
        "kills.end_with_parent(); print('on', flush=True)"
    )
    code += "; time.sleep(60)"
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, kills.PARENT: str(parent)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("pidfd", [True, False])
def test_a_stage_ends_with_the_snakemake_above_its_shell(pidfd, tmp_path):
    off = "" if pidfd else "import os; del os.pidfd_open; "
    stage = f"{off}from pipeline.job import kills; import time; kills.end_with_parent(); "
    stage += "print('on', flush=True); time.sleep(60)"
    code = "import subprocess, sys; from pipeline.job import kills; kills.name_parent(); "
    code += "subprocess.run(['bash', '-c', f'{sys.executable} -c \"{sys.argv[1]}\"; true'])"
    process = subprocess.Popen(
        [sys.executable, "-c", code, stage], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout.readline() == "on\n"
    process.kill()
    process.wait()
    until = time.monotonic() + 10
    while members(process.pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert members(process.pid) == []


def test_a_stage_called_by_hand_watches_nobody(holder):
    process = child(holder.pid)  # not above it: the name was left in the environment
    assert process.stdout.readline() == "on\n"
    holder.kill()
    holder.wait()
    time.sleep(0.3)
    assert process.poll() is None
    process.kill()
    process.communicate()
