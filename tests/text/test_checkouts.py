"""Files of the checkout, where snakemake runs elsewhere: another clone reruns nothing.

Groups run so: `--directory`, or this workflow as a module of theirs. The spec of a job, and so its
certificate, names such a file from the checkout on.
"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import yaml
from snake import copy_repository, edit, snakemake, toy_project

from pipeline.papers import paths
from pipeline.papers.papers import Run
from pipeline.store import provenance

TEXT = "the cat sat on the mat and a dog barked at two sheep near the river\n" * 40
SHA256 = hashlib.sha256(TEXT.encode()).hexdigest()
CARD = {"title": "T", "authors": "A", "year": 2024, "url": "https://example.org"}
ARCHITECTURE = {"n_layers": 1, "d_model": 8, "n_heads": 2, "d_mlp": 16, "n_ctx": 16}
RUN = {"architecture": ARCHITECTURE, "data": {"source": "corpus"}, "batch_size": 2, "steps": 2}
PAPER = CARD | {
    "tokenizer": {"kind": "char"},
    "training": {"run": RUN},
    "model": {"source": "training", "run": "run"},
    "activations": {"hooks": ["blocks.0.hook_resid_post"]},
}
SIZE = {"n_ctx": 16, "n_tokens": 0, "n_eval_tokens": 0, "split": "tail", "whole_file": True,
        "prepend_bos": False, "close_documents": False}  # fmt: skip
CORPORA = {  # beside paper.yaml, and where the checkout has it
    "local": {"source": "local", "path": "text.txt", "licence": "mine"},
    "url": {"source": "url", "url": "https://example.org/text.txt", "sha256": SHA256,
            "path": "data/text.txt", "licence": "mine"},
}  # fmt: skip


def clone(to: Path, source: str) -> Path:
    """A checkout with one paper."""
    copy_repository(to)
    folder = to / "rules/papers/mine"
    folder.mkdir()
    (folder / "paper.yaml").write_text(yaml.safe_dump(PAPER | {"corpus": SIZE | CORPORA[source]}))
    for file in (folder / "text.txt", to / "data/text.txt"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(TEXT)
    config = yaml.safe_load((to / "config.yaml").read_text())
    (to / "config.yaml").write_text(yaml.safe_dump(config | {"papers": ["mine"]}))
    return to


@pytest.mark.workflow
@pytest.mark.parametrize("source", CORPORA)
def test_a_second_clone_elsewhere_reruns_nothing(source, tmp_path, monkeypatch):
    first = clone(tmp_path / "first", source)
    second = clone(tmp_path / "group/deep/second", source)
    here = tmp_path / "run"
    here.mkdir()
    monkeypatch.chdir(here)
    config = yaml.safe_load((first / "config.yaml").read_text())
    store = Run.load(config, [first]).store("mine", "laptop", "trained")
    target = f"results/store/corpus/{store['corpus'].id}/tokens.parquet"
    run = ["--directory", str(here), target]
    done = snakemake("-s", str(first / "Snakefile"), *run, cwd=tmp_path)
    assert sorted(done.jobs) == ["corpus", "tokenizer"]
    made = [here / target, next(here.glob("results/store/tokenizer/*/model.json"))]
    for file in made:
        said = provenance.read(file)
        assert str(tmp_path) not in json.dumps(said)
        assert said["spec"]["corpus"]["path"].startswith(provenance.IN_CHECKOUT)
    again = snakemake("-s", str(second / "Snakefile"), "-n", *run, cwd=tmp_path)
    assert again.jobs == [], again.said
    (second / "rules/papers/mine/text.txt").write_text(TEXT.upper())  # another text is another id
    (second / "data/text.txt").unlink()
    other = Run.load(config, [second]).store("mine", "laptop", "trained")["corpus"].id
    assert (other == store["corpus"].id) == (source == "url")


@pytest.mark.workflow
def test_a_second_clone_with_the_results_of_the_first_reruns_no_own_code(tmp_path):
    """A paper's files are inputs; snakemake notes them as the checkout has them."""
    first = toy_project(tmp_path / "first")
    second = tmp_path / "group/deep/second"
    shutil.copytree(first, second)
    run = ["--directory", str(tmp_path / "run"), "results/smoke/toy/report.html"]
    (tmp_path / "run").mkdir()
    done = snakemake("-s", str(first / "Snakefile"), *run, cwd=tmp_path)
    assert {"toy_measure", "metrics", "figures", "claims", "report_html"} <= set(done.jobs)
    again = snakemake("-s", str(second / "Snakefile"), "-n", *run, cwd=tmp_path)
    assert again.jobs == [], again.said
    edit(second / "rules/papers/toy/measure.py", "sum(1)", "sum(-1)")  # its code still counts
    edited = snakemake("-s", str(second / "Snakefile"), "-n", *run, cwd=tmp_path)
    assert "toy_measure" in edited.jobs


def test_what_a_spec_names_is_found_again(tmp_path, monkeypatch):
    checkout = tmp_path / "checkout"
    monkeypatch.setattr(paths, "CHECKOUT", checkout)
    monkeypatch.setattr(provenance, "CHECKOUT", checkout)
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    for file, said in (
        (checkout / "data/a.txt", "checkout:data/a.txt"),
        (tmp_path / "run/data/a.txt", "data/a.txt"),
        (tmp_path / "else/a.txt", str(tmp_path / "else/a.txt")),
    ):
        assert paths.in_spec(file) == said
        assert Path(provenance.opened(said)).absolute() == file
    assert provenance.opened("") == ""
    monkeypatch.chdir(tmp_path)
    assert paths.in_spec(checkout / "data/a.txt") == "checkout/data/a.txt"
