"""An edit of any function of a paper's own files reruns the stages that use the file, and no other.

A paper's own files count whole. Which stages use which file is written down here from what they do;
what a stage hashes is read from the rules and from the files that load one another.
"""

import ast
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.job import definitions, source
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


def edits(text: str) -> Iterator[str]:
    """The text with a statement more in one of its functions, for each of them."""
    for function in ast.walk(ast.parse(text)):
        if not isinstance(function, ast.FunctionDef):
            continue
        last, lines = function.body[-1], text.splitlines(keepends=True)
        if last.lineno > function.lineno:  # `def f(): ...` has no line of its own
            lines.insert(last.lineno - 1, " " * last.col_offset + "edited = 1\n")
            yield "".join(lines)


def code_of(text: str) -> str:
    """What `source.file_code` says of a file with this text."""
    return definitions.file_hash(ast.parse(text), text)


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
    """A file counts whole: an edit of any other function of it is held to move its own hash."""
    name, folder, jobs, others = papers
    before, theirs = hashes(jobs), hashes(others)
    texts = {file: (folder / file).read_text() for file in USED[name]}
    edited = {file: versions for file, text in texts.items() if (versions := list(edits(text)))}
    assert len(edited) > len(texts) / 2  # the others only hand on what stands in another file
    for file, (first, *rest) in edited.items():
        source._facts.cache_clear()
        unedited = source.file_code(folder / file)
        assert code_of(texts[file]) == unedited
        for text in rest:
            assert code_of(text) != unedited
        aside = texts[file].replace("\n\n\ndef ", "\n\n\n# aside\n\n\ndef ")
        assert code_of(aside) == unedited, f"{file}: a comment"
        (folder / file).write_text(first)
        after = hashes(jobs)
        moved = {stage for stage in before if after[stage] != before[stage]}
        assert moved == set(USED[name][file].split()), file
        (folder / file).write_text(texts[file])
    for file, (first, *_) in edited.items():
        (folder / file).write_text(first)
    assert hashes(others) == theirs
    for file, text in texts.items():
        (folder / file).write_text(text)
    assert hashes(jobs) == before
