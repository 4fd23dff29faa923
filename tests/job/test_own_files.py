"""An edit of any function of a paper's own files reruns the stages that use the file, and no other.

A paper's own files count whole. Which stages use which file is written down here from what they do;
what a stage hashes is read from the rules and from the files that load one another.
"""

import ast
import re
import shutil
from pathlib import Path

import pytest

from pipeline.job import source
from pipeline.papers.folders import load

ROOT = source.PIPELINE.parent
LISTED = re.compile(r'code_of\(\s*"(\w+)"\s*((?:,\s*"[^"]+"\s*)*),?\s*\)')
USED = {
    "grokking": {
        "fourier.py": "fourier", "measured.py": "fourier", "waves.py": "fourier",
        "circuit.py": "fourier", "ablations.py": "fourier", "phases.py": "fourier metrics",
        "data.py": "fourier training", "metrics.py": "metrics", "figures.py": "figures",
        "figures_waves.py": "figures",
    },
    "ioi": {
        "circuit.py": "circuit", "discovery.py": "circuit", "measures.py": "circuit",
        "prompts.py": "circuits", "judged.py": "circuit", "metrics.py": "metrics",
        "figures.py": "figures", "figures_graph.py": "figures",
    },
}  # fmt: skip


def stages(folder: Path) -> dict[str, list[Path]]:
    """Stage -> the paper's own files that its rule hands to the code hash."""
    rules = [f for f in [*ROOT.glob("rules/*.smk"), folder / "rules.smk"] if f.is_file()]
    found = {"training": [folder / "data.py"]}  # `training_code`: data.py, which it learns from
    for stage, about in load(folder, "laptop").spec.stages.items():  # rules/own.smk
        found[stage] = [folder / (about.script or f"{stage}.py"), *(folder / f for f in about.code)]
    for stage, names in LISTED.findall("".join(f.read_text() for f in rules)):
        globs = re.findall(r'"([^"]+)"', names)
        found[stage] = [f for glob in globs for f in sorted(folder.glob(glob))]
    return {s: [f for f in files if f.is_file()] for s, files in found.items()}


def hashes(jobs: dict[str, list[Path]]) -> dict[str, str]:
    """The code hash of every stage that is handed own files."""
    for cached in (source._facts, source._module, source.reached):
        cached.cache_clear()
    return {stage: source.job_code(stage, files) for stage, files in jobs.items() if files}


def functions(text: str) -> list[ast.FunctionDef]:
    return [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]


@pytest.fixture(scope="module", params=USED)
def papers(request, tmp_path_factory):
    """(name, its folder, stages of its own, those of the other paper), in copies."""
    base = tmp_path_factory.mktemp("papers")
    for name in USED:
        shutil.copytree(ROOT / "rules/papers" / name, base / name)
    other = next(name for name in USED if name != request.param)
    yield request.param, base / request.param, stages(base / request.param), stages(base / other)
    hashes({})


def test_the_table_names_every_file(papers):
    name, folder, jobs, _ = papers
    assert set(USED[name]) == {f.name for f in folder.glob("*.py")}
    for stage, files in jobs.items():
        wanted = {f for f, used in USED[name].items() if stage in used.split()}
        assert {f.name for f in source.with_loaded(files)} == wanted, stage


def test_an_edit_of_a_function_moves_the_stages_that_use_its_file(papers):
    name, folder, jobs, others = papers
    before, theirs = hashes(jobs), hashes(others)
    for file, used in USED[name].items():
        text = (folder / file).read_text()
        for function in functions(text):
            last = function.body[-1]
            lines = text.splitlines(keepends=True)
            if last.lineno == function.lineno:
                continue  # `def f(): ...` has no line of its own
            lines.insert(last.lineno - 1, " " * last.col_offset + "edited = 1\n")
            (folder / file).write_text("".join(lines))
            after = hashes(jobs)
            moved = {stage for stage in before if after[stage] != before[stage]}
            assert moved == set(used.split()), f"{file}: {function.name}"
        assert hashes(others) == theirs
        (folder / file).write_text(text.replace("\n\n\ndef ", "\n\n\n# told\n\n\ndef "))
        assert hashes(jobs) == before, f"{file}: a comment"
        (folder / file).write_text(text)
