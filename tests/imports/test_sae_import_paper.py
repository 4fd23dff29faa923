"""Published dictionaries in a paper.yaml: which store items they are, and faults of the section."""

from pathlib import Path

import published
import pytest
import yaml
from published import RESID

from pipeline.errors import RetraceError
from pipeline.papers import papers

OURS = {"architecture": "topk", "d_sae": 32, "k": 4}
CARD = {
    "title": "T", "authors": "A", "year": 2024, "url": "https://example.org",
    "model": {"source": "folder", "path": "gpt2"},
    "corpus": {"n_tokens": 5_000}, "activations": {"hooks": [RESID]},
}  # fmt: skip


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2/config.json").write_text("{}")
    published.sparsify(tmp_path / "layers.1")
    return tmp_path


def run(root: Path, dictionaries: dict, **card) -> papers.Run:
    """The run of one paper with these dictionaries."""
    folder = root / "papers" / "p"
    folder.mkdir(parents=True, exist_ok=True)
    sae = {"dictionaries": dictionaries, "training": {"n_rows": 6400, "batch_size": 64}}
    (folder / "paper.yaml").write_text(yaml.safe_dump(CARD | card | {"sae": sae}))
    config = {"papers": ["p"], "papers_dirs": ["papers"], "roots": ["."], "scale": "laptop"}
    return papers.Run.load(config, [root])


def theirs(**over) -> dict:
    return {"source": "folder", "format": "sparsify", "path": "layers.1"} | over


def test_a_published_dictionary_beside_a_trained_one_leaves_its_id_alone(root):
    alone = run(root, {"ours": OURS}).store("p", "laptop", "trained")
    found = run(root, {"theirs": theirs(), "ours": OURS})
    both = found.store("p", "laptop", "trained")
    assert both[f"sae:{RESID}"].id == alone[f"sae:{RESID}"].id
    item = both["import:theirs"]
    assert item.stage == "sae_import" and item.folders() == {"model": f"model/{both['model'].id}"}
    assert found.sae_item("p", "laptop", "trained", "theirs") == item
    assert found.sae_item("p", "laptop", "trained", "ours").stage == "sae"
    assert item.spec["import"]["hook"] == RESID and item.spec["import"]["name"] == "theirs"


def test_its_files_decide_which_item_it_is(root):
    def ids(**over) -> str:
        return run(root, {"theirs": theirs(**over)}).store("p", "laptop", "trained")[
            "import:theirs"
        ].id  # fmt: skip

    before = ids()
    (root / "layers.1/README.md").write_text("a card decides nothing")
    assert ids() == before == ids(arms=["trained"])
    published.sparsify(root / "layers.1", published.draw(1))
    changed = ids()
    assert changed != before
    published.sparsify(root / "layers.1", published.draw(1), k=3)
    assert ids() not in (before, changed)
    (root / "layers.1").rename(root / "layers.2")
    published.sparsify(root / "layers.1", published.draw(1), k=3)
    assert ids() == ids(path="layers.2")


@pytest.mark.parametrize(
    ("over", "sentence"),
    [({"path": "layers.9"}, "path 'layers.9' does not exist"),
     ({"path": "/etc"}, "lies outside the paper's folder and the roots"),
     ({"hook": "blocks.0.hook_resid_post"}, "sae.theirs: hook 'blocks.0.hook_resid_post' is not"),
     ({"output_hook": "blocks.1.hook_mlp_out"}, "output_hook 'blocks.1.hook_mlp_out' is not store"),
     ({"arms": ["random"]}, "sae.theirs: unknown arm 'random'"),
     ({"format": "sparsfy"}, "sae.dictionaries.theirs.format: Input should be '', 'saelens'"),
     ({"k": 3}, "sae.dictionaries.theirs: unknown key 'k'"),
     ({"source": "hub"}, "sae.dictionaries.theirs: source: hub needs repo")],
)  # fmt: skip
def test_a_fault_is_one_sentence_before_anything_runs(over, sentence, root):
    with pytest.raises(RetraceError) as e:
        run(root, {"theirs": theirs(**over)})
    assert sentence in str(e.value) and "a published dictionary" not in str(e.value)


def test_circuits_take_a_published_transcoder(root):
    hooks = [RESID, "blocks.1.hook_mlp_out"]
    coder = theirs(hook=RESID, output_hook=hooks[1])
    circuits = {"prompts": "p", "methods": ["latent_ig"], "saes": ["theirs"]}
    found = run(root, {"theirs": coder}, activations={"hooks": hooks}, circuits=circuits)
    assert found.paper("p", "laptop").spec.circuits.saes == ["theirs"]
