"""Training runs that start from another run: their place in the store, and what is refused."""

from pathlib import Path

import pytest
import yaml

from pipeline.errors import RetraceError
from pipeline.papers import papers

SHAPE = {"family": "gpt2", "n_layers": 1, "d_model": 16, "n_heads": 2, "d_mlp": 32, "n_ctx": 16}
RUN = {"architecture": SHAPE, "data": {"source": "corpus"}, "steps": 8, "batch_size": 4,
       "seeds": [0, 1], "checkpoints": {"at": [4]}}  # fmt: skip
TUNED = RUN | {"start": {"run": "base"}, "checkpoints": {}}
CARD = {
    "title": "Fine-tuning", "authors": "A", "year": 2026, "url": "https://example.org",
    "training": {"base": RUN, "tuned": TUNED},
    "model": {"source": "training", "run": "base"},
    "arms": {"base": {}, "tuned": {"run": "tuned"}},
    "tokenizer": {"kind": "char"},
    "corpus": {"source": "local", "path": "text.txt", "licence": "none", "whole_file": True,
               "split": "tail", "n_tokens": 0, "n_eval_tokens": 0, "n_ctx": 16,
               "prepend_bos": False, "close_documents": False},
    "activations": {"hooks": ["blocks.0.hook_resid_post"]},
    "sae": {"dictionaries": {"cross": {
        "architecture": "batchtopk", "d_sae": 8, "k": 2, "models": ["base", "tuned"]}}},
}  # fmt: skip


def run(folder: Path, **training) -> papers.Run:
    home = folder / "papers/tuning"
    home.mkdir(parents=True)
    card = CARD | {"training": CARD["training"] | training}
    (home / "paper.yaml").write_text(yaml.safe_dump(card, sort_keys=False))
    (home / "text.txt").write_text("the quick brown fox. " * 200)
    config = {"papers": ["tuning"], "papers_dirs": [str(folder / "papers")], "scale": "smoke"}
    return papers.Run.load(config, [folder])


def test_a_run_is_made_from_the_run_that_it_starts_from(tmp_path):
    found = run(tmp_path / "one")
    store = found.store("tuning", "smoke", "tuned")
    base, tuned = store["training:base"], store["training:tuned"]
    assert tuned.folders()["start"] == f"training/{base.id}" and "start" not in base.inputs
    assert f"results/store/training/{base.id}/manifest.json" in found.upstream([store["model"]])
    longer = RUN | {"steps": 9}
    other = run(tmp_path / "two", base=longer).store("tuning", "smoke", "tuned")
    assert other["training:tuned"].id != tuned.id  # another start, another run
    plain = run(tmp_path / "three", tuned=RUN).store("tuning", "smoke", "base")
    assert plain["training:base"].id == base.id


@pytest.mark.parametrize(
    "start, sentence",
    [
        ({"run": "bsae"}, r"no run 'bsae' stands above it \(did you mean 'base'\?\)"),
        ({"run": "tuned"}, "no run 'tuned' stands above it"),
        ({"run": "base", "member": "s2"}, "has no member 's2'.*it has s0, s1"),
        ({"run": "base", "step": 5}, "keeps no checkpoint of step 5; add it to training.base"),
    ],
)
def test_a_start_that_is_not_there_is_told(tmp_path, start, sentence):
    with pytest.raises(RetraceError, match=f"training.tuned.start: .*{sentence}"):
        run(tmp_path, tuned=TUNED | {"start": start})


def test_a_start_of_another_shape_is_told(tmp_path):
    wide = TUNED | {"architecture": SHAPE | {"d_mlp": 64}}
    with pytest.raises(RetraceError, match="run 'base' has another architecture"):
        run(tmp_path, tuned=wide)
