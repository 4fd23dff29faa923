"""Published transcoders of all layers in a paper.yaml: store items, faults, and a whole run."""

from pathlib import Path

import published
import pytest
import torch
import yaml
from pydantic import ValidationError
from snake import ROOT, snakemake
from test_crosscoder_papers import CARD, TEXT

from pipeline.errors import RetraceError
from pipeline.papers import papers
from pipeline.report import done
from pipeline.spec.imports import ImportedLayers
from pipeline.store import tables

D, N = 32, 48  # of the model that the card trains, and of the transcoders
HOOKS = ["blocks.{layer}.mlp.hook_in", "blocks.{layer}.hook_mlp_out"]
LAYERS = CARD | {
    "arms": {"late": {}, "early": {"step": 0}},
    "activations": {"layers": [0, 1], "hooks": HOOKS},
}
COMMIT = "a" * 40


def weights(cross: bool, skip: bool = False) -> list[dict]:
    g = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (N, D), "b_enc": (N,), "b_dec": (D,), "threshold": (N,)}
    out = []
    for n in range(2):
        wide = {"W_dec": (N, 2 - n, D) if cross else (N, D)} | ({"W_skip": (D, D)} if skip else {})
        every = (shapes | wide).items()
        found = {k: 0.3 * torch.randn(shape, generator=g) for k, shape in every}
        out.append(found | {"threshold": found["threshold"].abs()})
    return out


@pytest.fixture
def folder(tmp_path) -> Path:
    home = tmp_path / "papers/theirs"
    published.transcoder_set(home / "set", weights(False, True))
    published.clt(home / "clt", weights(True))
    (home / "text.txt").write_text(TEXT * 300)
    return tmp_path


def sets(**over) -> dict:
    return {
        "plt": {"source": "folder", "format": "circuit_tracer", "layers": "each", "path": "set"},
        "clt": {"source": "folder", "format": "circuit_tracer", "layers": "cross", "path": "clt",
                "arms": ["late"]},
    } | over  # fmt: skip


def write(root: Path, dictionaries: dict, **card) -> Path:
    section = {"dictionaries": dictionaries, "training": {"n_rows": 6400, "batch_size": 128}}
    text = yaml.safe_dump(LAYERS | card | {"sae": section})
    (root / "papers/theirs/paper.yaml").write_text(text)
    return root / "papers"


def run(root: Path, dictionaries: dict, **card) -> papers.Run:
    where = write(root, dictionaries, **card)
    config = {"papers": ["theirs"], "papers_dirs": [str(where)], "scale": "smoke"}
    return papers.Run.load(config, [root])


def test_each_is_an_item_beside_the_trained_ones(folder):
    own = {"layers": "each", "architecture": "topk", "d_sae": 48, "k": 4}
    found = run(folder, sets(own=own))
    store = found.store("theirs", "smoke", "late")
    item = store["layers:clt"]
    assert item.stage == "transcoders_import" and item == found.sae_item(
        "theirs", "smoke", "late", "clt"
    )
    assert item.folders() == {"model": f"model/{store['model'].id}"}
    job = item.spec["import"]
    assert job["layers"] == "cross" and job["pairs"][1] == (
        "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"
    )  # fmt: skip
    assert "layers:clt" not in found.store("theirs", "smoke", "early")
    assert found.sae_item("theirs", "smoke", "late", "own").stage == "transcoders"
    alone = run(folder, {"own": own}).store("theirs", "smoke", "late")
    key = "transcoders:mlp.hook_in to hook_mlp_out"
    assert alone[key].id == store[key].id
    names = set(found.paper("theirs", "smoke").tables())
    assert {"transcoders/late", "transcoders/early"} <= names
    assert not {n for n in names if n.startswith("evaluation")}


def test_its_files_decide_which_item_it_is(folder):
    def id_of() -> str:
        return run(folder, sets()).sae_item("theirs", "smoke", "late", "plt").id

    before = id_of()
    (folder / "papers/theirs/set/README.md").write_text("a card decides nothing")
    assert id_of() == before
    published.transcoder_set(folder / "papers/theirs/set", weights(False))
    assert id_of() != before


def test_files_that_config_yaml_lists_decide_as_well(folder):
    """Those beside it by their digests, those of other repositories by their commits."""
    home = folder / "papers/theirs/set"

    def id_of(**over) -> str:
        plt = sets()["plt"] | over
        return run(folder, {"plt": plt}).sae_item("theirs", "smoke", "late", "plt").id

    (home / "layer_0.safetensors").rename(home / "first.safetensors")
    config = home / "config.yaml"
    about = yaml.safe_load(config.read_text())
    entries = ["first.safetensors", "hf://a/b/layer_1.safetensors"]
    config.write_text(yaml.safe_dump(about | {"transcoders": entries}))
    before = id_of(revisions={"a/b": COMMIT})
    assert id_of(revisions={"a/b": COMMIT}) == before
    assert id_of(revisions={"a/b": "b" * 40}) != before
    (home / "first.safetensors").write_bytes(b"another")
    assert id_of(revisions={"a/b": COMMIT}) != before


def test_a_folder_of_each_layer_and_some_layers(folder):
    for n in range(2):
        published.sparsify(folder / f"papers/theirs/h.{n}.mlp", transcode=True)
    both = {"source": "folder", "format": "sparsify", "path": "h.{layer}.mlp"}
    found = run(folder, {"all": both | {"layers": "each"}, "one": both | {"layers": [1]}})
    every, one = (
        found.sae_item("theirs", "smoke", "late", n).spec["import"] for n in ("all", "one")
    )
    assert [Path(p).name for p in every["paths"]] == ["h.0.mlp", "h.1.mlp"]
    assert [Path(p).name for p in one["paths"]] == ["h.1.mlp"]
    assert one["pairs"] == [("blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out")]
    said = " ".join(done.dictionaries(found.paper("theirs", "smoke").spec))
    assert "one of each layer" in said and "one of each of 1 layers" in said


def test_graphs_leave_a_set_of_some_layers_out(folder):
    """They trace every set over all layers where none is named; one of layer 1 is none of them."""
    published.sparsify(folder / "papers/theirs/h.1.mlp", transcode=True)
    one = {"source": "folder", "format": "sparsify", "path": "h.{layer}.mlp", "layers": [1]}
    found = run(folder, sets(one=one), graphs={"prompts": {"p": {"prompt": "the"}}})
    assert set(found.paper("theirs", "smoke").spec.graphs.dictionaries) == {"plt", "clt"}


HUB = {"source": "hub", "format": "circuit_tracer", "layers": "each", "repo": "a/b"}


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (HUB, "revision '' is not a full commit"),
        (HUB | {"revision": COMMIT, "path": "../other"}, "leads out of the package or repository"),
        (HUB | {"repo": "", "revision": COMMIT}, "source: hub needs repo"),
        (HUB | {"revision": COMMIT, "format": "sparsify"}, "has no {layer} in it, and format spar"),
        (HUB | {"revision": COMMIT, "format": "sparsify", "layers": "cross", "path": "{layer}"},
         "layers: cross is read in formats circuit_tracer and gemma_scope_2 alone"),
        (HUB | {"revision": COMMIT, "path": "l{layer}"}, "has all layers in one folder"),
        (HUB | {"revision": COMMIT, "path": "a", "paths": ["b"]}, "remove one of the two"),
        (HUB | {"source": "folder", "path": "a"}, "source: folder takes no repo"),
        (HUB | {"source": "folder", "repo": ""}, "source: folder needs path"),
        (HUB | {"revision": COMMIT, "layers": [3, 1]}, "[3, 1] do not rise"),
        (HUB | {"revision": COMMIT, "layers": []}, "names none"),
        (HUB | {"revision": COMMIT, "k": 3}, "unknown key 'k'"),
    ],
)  # fmt: skip
def test_a_section_that_cannot_be_meant_is_told(spec, sentence):
    with pytest.raises(ValidationError) as e:
        ImportedLayers.model_validate(spec)
    assert sentence in str(e.value)


@pytest.mark.parametrize(
    ("over", "card", "sentence"),
    [
        ({"path": "gone"}, {}, "path 'gone' does not exist"),
        ({"arms": ["none"]}, {}, "sae.plt: unknown arm 'none'"),
        ({"reads": "hook_resid_mid"}, {}, "sae.plt: hook 'blocks.0.hook_resid_mid' is not stored"),
        ({"layers": [0, 5]}, {}, "sae.plt: hook 'blocks.5.mlp.hook_in' is not stored"),
        ({}, {"features": {"saes": ["plt"], "arm": "late"}}, "set of transcoders of all layers"),
        ({"layers": "every"}, {}, "sae.dictionaries.plt.layers"),
    ],
)
def test_a_fault_is_one_sentence_before_anything_runs(over, card, sentence, folder):
    with pytest.raises(RetraceError) as e:
        run(folder, {"plt": sets()["plt"] | over}, **card)
    assert sentence in str(e.value) and "published transcoders" not in str(e.value)


def over_steps(**over) -> dict:
    return {"source": "folder", "format": "dictionary_learning", "path": "steps",
            "models": ["early", "late"], "hook": "blocks.1.mlp.hook_in"} | over  # fmt: skip


def test_a_published_crosscoder_is_an_item_of_the_models_it_reads(folder):
    published.crosscoder(folder / "papers/theirs/steps/model_final.pt", d=D)
    own = {"architecture": "batchtopk", "d_sae": 48, "k": 4, "models": ["early", "late"],
           "hook": "blocks.1.mlp.hook_in"}  # fmt: skip
    found = run(folder, {"theirs": over_steps(), "own": own})
    early, late = (found.store("theirs", "smoke", arm) for arm in ("early", "late"))
    item = found.sae_item("theirs", "smoke", "early", "theirs")
    assert item.stage == "crosscoder_import" and item == early["crossed:theirs"]
    assert found.sae_item("theirs", "smoke", "early", "own").stage == "crosscoder"
    models = [f"model/{store['model'].id}" for store in (early, late)]
    stored = [f"activations/{store['activations'].id}" for store in (early, late)]
    assert list(item.folders().values()) == [*models, *stored]
    read = [s["activations"] for s in item.spec["import"]["sources"]]
    assert read == [f"results/store/{at}/manifest.json" for at in stored]
    assert {"crosscoders/early", "crosscoders/early_latents"} <= set(
        found.paper("theirs", "smoke").tables()
    )
    with pytest.raises(RetraceError, match="at least two sources"):
        run(folder, {"theirs": over_steps(models=["late"])})
    with pytest.raises(RetraceError, match=r"sae\.theirs: models: unknown arm 'gone'"):
        run(folder, {"theirs": over_steps(models=["late", "gone"])})


@pytest.mark.workflow
def test_a_paper_with_a_published_crosscoder_runs(folder):
    published.crosscoder(folder / "papers/theirs/steps/model_final.pt", d=D)
    where = write(folder, {"theirs": over_steps()})
    target = "results/smoke/theirs/crosscoders/early.parquet"
    made_by = snakemake(
        "--directory", str(folder), target, cwd=ROOT, papers_dirs=f"[{where}]",
        papers="[theirs]", scale="smoke", device="cpu",
    )  # fmt: skip
    assert made_by.jobs.count("crosscoder_import") == 1 and "crosscoder" not in made_by.jobs
    assert list(tables.read_table(folder / target)["source"]) == ["early", "late"]


@pytest.mark.workflow
def test_a_paper_with_published_sets_runs(folder):
    graphs = {"prompts": {"p": {"prompt": "the quick bro"}}, "n_blocks": 1, "n_suppressed": 2}
    where = write(folder, sets(), graphs=graphs)
    base = "results/smoke/theirs"
    made_by = snakemake(
        "--directory", str(folder), f"{base}/transcoders/late.parquet",
        f"{base}/graphs/late_scores.parquet", f"{base}/exports/late.clt/circuit_tracer",
        cwd=ROOT, papers_dirs=f"[{where}]", papers="[theirs]", scale="smoke", device="cpu",
    )  # fmt: skip
    assert made_by.jobs.count("transcoders_import") == 2 and "transcoders" not in made_by.jobs
    table = tables.read_table(folder / base / "transcoders/late.parquet")
    assert set(table["sae"]) == {"plt", "clt"} and len(table) == 6
    traced = tables.read_table(folder / base / "graphs/late_scores.parquet")
    assert set(traced["dictionary"]) == {"plt", "clt"}
    out = folder / base / "exports/late.clt/circuit_tracer"
    assert {f.name for f in out.iterdir()} >= {"W_enc_1.safetensors", "W_dec_0.safetensors"}
