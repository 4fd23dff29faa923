"""Processes of the tests are forked off a Python that has their libraries: tests/warm.py."""

import importlib
import os

import pytest
import warm
from conftest import TORCH_ROOMS, checked_modules

from pipeline.job import commands


def test_every_stage_with_torch_has_a_python_with_torch():
    """One that is not named works, too, but imports torch anew for each of its jobs."""
    with_torch = {s for s, m in commands.STAGES.items() if m.split(".")[1] in TORCH_ROOMS}
    assert len(with_torch) > 10 and with_torch <= warm.WITH.keys()


@pytest.mark.parametrize(
    "line, libraries",
    [
        ("-m snakemake -n", "light"),
        ("-m pipeline metrics --spec {}", "light"),
        ("-m pipeline activations --spec {}", "transformers"),
        ("-m pipeline evaluation --spec {}", "sae_lens"),
        ("-m pipeline own measure {folder}/plain.py --spec {}", "light"),
        ("-m pipeline own measure {folder}/torches.py --spec {}", "transformers"),
        ("{folder}/saes.py --spec {}", "sae_lens"),
        ("-m pytest", ""),
        ("-c pass", ""),
    ],
)
def test_a_command_line_has_the_libraries_that_it_uses(line, libraries, tmp_path, monkeypatch):
    monkeypatch.delenv("RETRACE_WITH", raising=False)
    (tmp_path / "plain.py").write_text("import numpy\n")
    (tmp_path / "torches.py").write_text("import torch\n")
    (tmp_path / "saes.py").write_text("from pipeline.latents.stored import load_saes\n")
    assert warm.needs(line.replace("{folder}", str(tmp_path)).split()) == libraries


@pytest.mark.workflow
def test_a_test_that_has_imported_the_libraries_still_has_their_python():
    """What they and our modules set in the environment is no reason to start from one without."""
    folder = os.path.dirname(warm.python())
    libraries = [module for modules in warm.LIBRARIES.values() for module in modules.split()]
    for module in [*libraries, *checked_modules()]:
        importlib.import_module(module)
    assert [warm.richest(name, folder) for name in warm.LIBRARIES] == list(warm.LIBRARIES)


def test_lines_of_the_docs_are_run_by_that_python(monkeypatch):
    from snake import by_warm_python

    monkeypatch.setenv("RETRACE_PYTHON", "/a b/python")
    assert by_warm_python(".venv/bin/snakemake -c2 x") == "'/a b/python' -m snakemake -c2 x"
    assert by_warm_python("snakemake -n") == "'/a b/python' -m snakemake -n"
    line = ".venv/bin/python -m pipeline provenance show python"
    assert by_warm_python(line) == "'/a b/python' -m pipeline provenance show python"


def test_the_first_job_of_a_stage_of_the_library_starts_afresh(tmp_path, monkeypatch):
    sae, own = "-m pipeline sae --spec {}".split(), "-m pipeline own measure own.py".split()
    assert not warm.is_first(sae)
    monkeypatch.setenv("RETRACE_COLD", str(tmp_path))
    assert [warm.is_first(sae), warm.is_first(sae), warm.is_first(own)] == [True, False, False]
    assert warm.is_first("-m pipeline corpus --spec {}".split())


def test_a_download_is_kept_and_a_failure_is_not(tmp_path, monkeypatch):
    """In the place of pip stands a program that writes what it was given, and its process's id."""
    program = tmp_path / "pip"
    program.write_text(
        '#!/bin/sh\ntest -z "$PIP_FAILS" || exit 3\n'
        'while [ "$1" != --dest ]; do shift; done\nmkdir -p "$2"; echo $$ > "$2/wheel"\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr(warm.sys, "executable", str(program))

    def got(requirement: str, dest: str) -> str | int:
        args = ["-m", "pip", "download", requirement, "--dest", str(tmp_path / dest), "--no-deps"]
        code = warm.download(str(tmp_path), args)
        return code or (tmp_path / dest / "wheel").read_text()

    monkeypatch.setenv("PIP_FAILS", "1")
    assert got("a==1", "none") == 3 and not (tmp_path / "none").exists()
    monkeypatch.delenv("PIP_FAILS")
    first = got("a==1", "one")
    assert got("a==1", "two") == first and got("b==1", "three") != first
    monkeypatch.setenv("PIP_INDEX_URL", "elsewhere")
    assert got("a==1", "four") != first
