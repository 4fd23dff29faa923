"""Patterns, heads' results and routers' probabilities through the stages: a dictionary, spliced."""

import pytest
from conftest import stage

from pipeline.store import tables

HOOKS = ["blocks.1.attn.hook_pattern", "blocks.1.attn.hook_result"]


@pytest.mark.workflow
def test_a_dictionary_of_patterns_is_trained_and_spliced(tiny_model_json, tiny_corpus, tmp_path):
    """A dictionary as wide as its rows, all latents on, learns to copy; spliced, it keeps loss."""
    given = {"device": "cpu", "threads": 1}
    stage(
        "activations", {"activations": {"hooks": HOOKS, "dtype": "float32"}}, **given,
        model=tiny_model_json, corpus=tiny_corpus, out=tmp_path / "manifest.json",
        shards=tmp_path / "shards",
    )  # fmt: skip
    saes = []
    for i, hook in enumerate(HOOKS):
        d = tables.read_json(tmp_path / "manifest.json")["hooks"][hook]["d_model"]
        one = {"architecture": "topk", "d_sae": 2 * d, "k": d, "hook": hook}
        training = {"n_rows": 30_000, "batch_size": 256, "lr": 3e-3}
        spec = {"hook": hook, "dictionaries": {"one": one}, "training": training}
        out = tmp_path / str(i)
        stage("sae", {"sae": spec}, **given, activations=tmp_path / "manifest.json",
              out=out / "manifest.json", saes=out / "saes", history=out / "h.parquet")  # fmt: skip
        saes.append(out / "manifest.json")
    stage(
        "evaluation", {"evaluation": {"n_splice_blocks": 8}}, **given, model=tiny_model_json,
        corpus=tiny_corpus, activations=tmp_path / "manifest.json", saes=saes,
        out=tmp_path / "t.parquet", history=tmp_path / "h.parquet",
    )  # fmt: skip
    table = tables.read_table(tmp_path / "t.parquet").set_index("hook")
    for hook in HOOKS:
        row = table.loc[hook]
        assert row["splice_check"] < 1e-5  # x_hat + (x - x_hat) is x
        assert row["explained_variance"] > 0.5
        assert abs(row["delta_loss"]) < abs(row["loss_zero"] - row["loss_model"])
