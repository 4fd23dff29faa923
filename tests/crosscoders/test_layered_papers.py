"""Transcoders of all layers in a paper.yaml: store items, metrics, and a run of the workflow."""

from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from snake import ROOT, snakemake
from test_crosscoder_papers import CARD, TEXT

from pipeline.claims import scalars
from pipeline.crosscoders.layered_files import read_layers
from pipeline.papers import papers
from pipeline.report import done
from pipeline.store import tables

LAYERED = CARD | {
    "arms": {"late": {}, "early": {"step": 0}},
    "activations": {
        "layers": [0, 1], "hooks": ["blocks.{layer}.mlp.hook_in", "blocks.{layer}.hook_mlp_out"],
    },
    "sae": {
        "training": {"n_rows": 12_800, "batch_size": 128, "lr": 3.0e-3, "dead_rows": 8_000},
        "defaults": {"d_sae": 48, "seed": 3},
        "dictionaries": {
            "single": {"layers": "each", "architecture": "topk", "grid": {"k": [2, 4]}},
            "skip": {"layers": "each", "architecture": "batchtopk", "k": 4, "skip": True,
                     "topk_threshold_lr": 0.1, "arms": ["late"]},
            "cross": {"layers": "cross", "architecture": "jumprelu", "l0_coefficient": 1.0},
        },
    },
}  # fmt: skip
SETS = {"single_k2", "single_k4", "skip", "cross"}


def paper(folder: Path, **over) -> Path:
    home = folder / "papers/layered"
    home.mkdir(parents=True)
    (home / "paper.yaml").write_text(yaml.safe_dump(LAYERED | over))
    (home / "text.txt").write_text(TEXT * 300)
    return folder / "papers"


def run(folder: Path) -> papers.Run:
    config = {"papers": ["layered"], "papers_dirs": [str(folder)], "scale": "smoke"}
    return papers.Run.load(config, [folder])


def test_all_sets_of_an_arm_are_one_item_that_reads_every_layer(tmp_path):
    found = run(paper(tmp_path))
    item = found.sae_item("layered", "smoke", "late", "cross")
    assert item.stage == "transcoders"
    assert item == found.sae_item("layered", "smoke", "late", "single_k4")
    assert set(item.spec["transcoders"]["dictionaries"]) == SETS
    assert item.spec["transcoders"]["pairs"] == [
        (f"blocks.{n}.mlp.hook_in", f"blocks.{n}.hook_mlp_out") for n in range(2)
    ]
    early = found.sae_item("layered", "smoke", "early", "cross")
    assert "skip" not in early.spec["transcoders"]["dictionaries"] and early != item
    names = set(found.paper("layered", "smoke").tables())
    assert {"transcoders/late", "transcoders/early"} <= names
    assert not {n for n in names if n.startswith("evaluation")}
    said = list(done.dictionaries(found.paper("layered", "smoke").spec))
    assert any("cross-layer" in text for text in said)


def test_metrics_of_sets_and_layers_have_definitions(tmp_path):
    known = scalars.known(scalars.parts(run(paper(tmp_path)).paper("layered", "smoke")))
    rows = [
        {"sae": "cross", "layer": n, **dict.fromkeys(scalars.TRANSCODERS, 0.5)} for n in (0, 1, -1)
    ]
    values = scalars.core({"transcoders/late": pd.DataFrame(rows)})
    assert values["late.cross.l1.l0"] == values["late.cross.l0"] == 0.5
    assert len(values) == 15 and all(scalars.definition(name, known) for name in values)


def test_a_set_without_its_hooks_or_in_a_section_of_one_hook_is_told(tmp_path):
    with pytest.raises(Exception, match=r"sae\.(single_k2|skip|cross): hook 'blocks\.0\.hook_mlp"):
        run(paper(tmp_path / "a", activations={"hooks": ["blocks.0.mlp.hook_in"]}))
    with pytest.raises(Exception, match="set of transcoders of all layers"):
        run(paper(tmp_path / "b", features={"saes": ["cross"], "arm": "late"}))


@pytest.mark.workflow
def test_a_paper_with_sets_of_all_layers_runs(tmp_path):
    folder = paper(tmp_path)
    left = [f"results/smoke/layered/exports/late.{n}/circuit_tracer" for n in ("cross", "skip")]
    made_by = snakemake(
        "--directory", str(tmp_path), "results/smoke/layered/transcoders/late.parquet", *left,
        cwd=ROOT, papers_dirs=f"[{folder}]", papers="[layered]", scale="smoke", device="cpu",
    )  # fmt: skip
    assert made_by.jobs.count("transcoders") == 1
    table = tables.read_table(tmp_path / "results/smoke/layered/transcoders/late.parquet")
    whole = table[table["layer"] < 0].set_index("sae")
    assert set(whole.index) == SETS
    assert (whole["explained_variance"] > 0).all()
    assert whole["l0"]["single_k2"] <= 4
    (manifest,) = tmp_path.glob("results/store/transcoders/*/manifest.json")
    entries = tables.read_json(manifest)["saes"]
    cross, skip = (read_layers(manifest.parent / entries[n]["folder"]) for n in ("cross", "skip"))
    assert cross.W_dec[0].shape == (48, 2, 32) and skip.W_skip is not None
    x = torch.randn(5, 2, 32)
    for own, folder in zip((cross, skip), left, strict=True):
        assert not (tmp_path / folder / "cfg.json").exists()
        again = read_layers(tmp_path / folder)
        assert (again.hooks, again.activation) == (own.hooks, own.activation)
        torch.testing.assert_close(again.forward(x), own.forward(x))
