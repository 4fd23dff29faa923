"""Exports: what SAELens, SAEBench and Neuronpedia are given, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import rewrite
from synthetic import call, features
from test_sae_jobs import HOOK, OUT, SPARSITY, TRANSCODERS, job, pairs, paths, specs, store

from pipeline.claims import scalars
from pipeline.errors import RetraceError
from pipeline.sharing import exports, verify
from pipeline.sharing.export_formats import CoreResult, FeatureDetails, SaeLensConfig, check_weights
from pipeline.store import provenance, tables

ROW = dict.fromkeys(scalars.SAE, 0.5) | {
    "kl_zero": 4.0, "kl_spliced": 1.0, "loss_model": 2.0, "loss_spliced": 3.0, "loss_zero": 12.0,
    "kl_zero_all": 8.0, "loss_zero_all": 7.0,
    "loss_recovered_zero": 0.9, "explained_variance": 0.75, "silent_share": 0.25, "l0": 8.0,
    "mse": 100.0, "splice_blocks": 20, "eval_rows": 600,
}  # fmt: skip

MODEL = {"name": "gpt2", "source": {"source": "hub", "repo": "openai-community/gpt2",
         "revision": "607a30d"}, "weights": "trained", "processing": "raw",
         "architecture": "GPT2LMHeadModel"}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with sae/, transcoder/ (store items), evaluation.parquet and features.parquet."""
    out = tmp_path_factory.mktemp("exports")
    x, y = pairs(1100)
    acts = store(out / "acts", {HOOK: (x[:1000], x[1000:]), OUT: (y[:1000], y[1000:])})
    call("sae", job(specs(), n_rows=1280), **paths(out / "sae", acts))
    both = job(specs(*TRANSCODERS, output_hook=OUT), OUT, n_rows=1280)
    call("sae", both, **paths(out / "transcoder", acts))
    tables.write_json(out / "model.json", MODEL, {"stage": "test"})
    frame = pd.DataFrame([ROW | {"sae": name} for name in SPARSITY])
    tables.write_table(out / "evaluation.parquet", frame, {"stage": "test"})
    described = features(10, np.random.default_rng(0))
    tables.write_table(out / "features.parquet", described, {"stage": "test"})
    return out


def export(made: Path, format: str, out: Path, name: str = "topk", **over) -> Path:
    """The stage, in this process."""
    named = {"format": format, "arm": "trained", "sae": name, "paper": "toy"}
    given = {"sae": made / "sae/manifest.json", "out": out}
    if format == "saelens":
        given["model"] = made / "model.json"
    else:
        table = "features" if format == "neuronpedia" else "evaluation"
        given["table"] = made / f"{table}.parquet"
    call("exports", {"export": named}, **(given | over))
    return out


# --- SAELens -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPARSITY)
def test_saelens_loads_the_copy_and_reconstructs_as_from_the_store(made, tmp_path, name):
    from sae_lens import SAE

    out = export(made, "saelens", tmp_path / "a/saelens", name)
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md", "cfg.json", "provenance.json", "sae_weights.safetensors"
    ]  # fmt: skip
    x = torch.from_numpy(pairs(50)[0])
    kept = SAE.load_from_disk(str(made / "sae/saes" / name))
    with torch.no_grad():
        assert torch.equal(SAE.load_from_disk(str(out))(x), kept(x))
    assert not Path(f"{out}.partial").exists()


def test_a_transcoder_is_copied_as_one(made, tmp_path):
    from sae_lens import SAE
    from sae_lens.saes.transcoder import JumpReLUTranscoder

    out = export(made, "saelens", tmp_path / "saelens", "batchtopk",
                 sae=made / "transcoder/manifest.json")  # fmt: skip
    loaded = SAE.load_from_disk(str(out))
    assert isinstance(loaded, JumpReLUTranscoder)
    assert loaded(torch.from_numpy(pairs(50)[0])).shape == (50, 10)


def test_the_copy_says_where_it_came_from_and_verifies(made, tmp_path):
    out = export(made, "saelens", tmp_path / "saelens")
    certificate = provenance.read(out / "provenance.json")
    assert certificate["stage"] == "exports"
    assert str(made / "sae/saes/topk/cfg.json") in certificate["inputs"]
    assert provenance.read(out / "cfg.json")["stage"] == "sae"
    assert verify.faults(out) == []
    (out / "cfg.json").write_text((out / "cfg.json").read_text().replace("topk", "tokp"))
    assert any("cfg.json" in fault for fault in verify.faults(out))


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("architecture", "topkk", "architecture: Input should be 'standard'"),
        ("d_in", 25, r"W_dec is \(64, 24\), and cfg.json says \(64, 25\)"),
        ("d_out", 10, "architecture topk: d_out is 10"),
        ("normalize_activations", "layer_norm", "normalize_activations: Input should be 'none'"),
        ("metadata", {"model_name": "m"}, "metadata.hook_name: Field required"),
    ],
)
def test_a_folder_that_is_not_saelens_is_refused_and_nothing_is_written(
    made, tmp_path, capsys, key, value, said
):
    shutil.copytree(made / "sae", tmp_path / "sae")
    file = tmp_path / "sae/saes/topk/cfg.json"
    rewrite(file, **{key: value})
    manifest = tmp_path / "sae/manifest.json"
    files = tables.read_json(manifest)["files"]
    rewrite(manifest, files=files | {"saes/topk/cfg.json": provenance.sha256_file(file)})
    with pytest.raises(RetraceError, match=said):
        exports.dictionary(tmp_path / "sae/manifest.json", "topk")
    with pytest.raises(SystemExit):
        export(made, "saelens", tmp_path / "out", sae=tmp_path / "sae/manifest.json")
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("error in stage exports: ") and not (tmp_path / "out").exists()


@pytest.mark.parametrize("value, said", [(np.nan, "threshold holds NaN"), (None, "is missing")])
def test_weights_that_are_broken_are_refused(made, value, said):
    _, config, weights = exports.dictionary(made / "sae/manifest.json", "jumprelu")
    assert weights.keys() == config.shapes().keys()
    weights = dict(weights)
    if value is None:
        del weights["threshold"]
    else:
        weights["threshold"] = weights["threshold"] * value
    with pytest.raises(RetraceError, match=said):
        check_weights(config, weights, "f")


def test_a_dictionary_that_is_not_there_is_told(made):
    with pytest.raises(RetraceError, match="no dictionary 'topkk' \\(did you mean 'topk'\\?\\)"):
        exports.dictionary(made / "sae/manifest.json", "topkk")


# --- SAEBench ------------------------------------------------------------------------------


def test_saebench_gets_what_evaluation_measured(made, tmp_path):
    out = export(made, "saebench", tmp_path / "saebench_core.json")
    result = tables.read_json(out)
    assert result.pop("provenance")["stage"] == "exports"
    CoreResult.model_validate(result)
    assert result["eval_type_id"] == "core" and result["sae_lens_id"] == "trained.topk"
    found = result["eval_result_metrics"]
    assert found["model_behavior_preservation"] == {
        "kl_div_score": 0.875, "kl_div_with_ablation": 8.0, "kl_div_with_sae": 1.0
    }  # fmt: skip
    assert found["model_performance_preservation"] == {
        "ce_loss_score": 0.8, "ce_loss_with_ablation": 7.0, "ce_loss_with_sae": 3.0,
        "ce_loss_without_sae": 2.0,
    }  # fmt: skip
    assert found["reconstruction_quality"]["explained_variance"] == 0.75
    assert found["misc_metrics"]["frac_alive"] == 0.75
    assert found["token_stats"] == {
        "total_tokens_eval_reconstruction": 20 * 20, "total_tokens_eval_sparsity_variance": 600,
    }  # fmt: skip
    assert result["eval_config"]["n_eval_reconstruction_batches"] == 3
    assert result["sae_cfg_dict"]["architecture"] == "topk"
    assert "provenance" not in result["sae_cfg_dict"]
    assert export(made, "saebench", tmp_path / "again.json").read_bytes() == out.read_bytes()


def test_an_ablation_that_lowers_the_loss_has_saebenchs_ratio():
    """It is negative there, and SAEBench writes it; only noise in the denominator has none."""
    ratio = exports.plain_ratio(1.5 - 3.0, 1.5 - 2.0, loss=2.0, name="ce_loss_score")
    assert ratio == 3.0
    assert exports.plain_ratio(0.5e-3, 1e-3, loss=2.0, name="kl_div_score") == 0.5


@pytest.mark.parametrize("name", SPARSITY)
def test_every_architecture_has_a_saebench_result(made, tmp_path, name):
    misc = tables.read_json(export(made, "saebench", tmp_path / "r.json", name))[
        "eval_result_metrics"
    ]["misc_metrics"]
    assert 0 < misc["average_max_decoder_cosine_sim"] < 1
    assert 0 < misc["average_max_encoder_cosine_sim"] < 1


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("explained_variance", 1.053, "explained_variance: Input should be less than or equal"),
        ("relative_bias", np.nan, "relative_reconstruction_bias: Input should be a finite"),
        ("l0", -1.0, "sparsity.l0: Input should be greater"),
        ("eval_rows", 0, "total_tokens_eval_sparsity_variance: Input should be greater"),
        ("kl_zero_all", 0.0, "t.parquet: topk: kl_div_score has no value"),
        ("kl_zero_all", 3e-8, "by 3e-08 nats, which is rounding"),
        ("kl_zero_all", -1e-9, "export a dictionary of a hook that the output depends on"),
        ("loss_zero_all", 2.0, "ce_loss_score has no value"),
        ("loss_zero_all", 2.0 + 2e-7, "ce_loss_score has no value"),
    ],
)
def test_a_number_that_cannot_be_is_refused_and_nothing_is_written(
    made, tmp_path, capsys, key, value, said
):
    table = tmp_path / "t.parquet"
    tables.write_table(table, pd.DataFrame([ROW | {"sae": "topk", key: value}]), {"stage": "t"})
    with pytest.raises(SystemExit):
        export(made, "saebench", tmp_path / "r.json", table=table)
    assert said in capsys.readouterr().err and not (tmp_path / "r.json").exists()


@pytest.mark.parametrize("piece", [3, 1000])
def test_mean_max_cosine_is_the_plain_one(piece, monkeypatch):
    monkeypatch.setattr(exports, "PIECE", piece)
    rows = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    best = [max(float(unit[i] @ unit[j]) for j in range(10) if j != i) for i in range(10)]
    assert exports.mean_max_cosine(rows) == pytest.approx(np.mean(best), rel=1e-5)
    assert exports.mean_max_cosine(np.eye(4, dtype=np.float32)[[0, 0, 1]]) == pytest.approx(2 / 3)


# --- Neuronpedia ---------------------------------------------------------------------------


def test_neuronpedia_gets_every_latent(made, tmp_path):
    out = export(made, "neuronpedia", tmp_path / "neuronpedia")
    frame = tables.read_table(made / "features.parquet").set_index("latent", drop=False)
    assert {p.name for p in out.iterdir()} == {"provenance.json"} | {f"{i}.json" for i in range(10)}
    for i, row in frame.iterrows():
        one = json.loads((out / f"{i}.json").read_text())
        FeatureDetails.model_validate(one)
        assert one["index"] == i and one["transcoder_id"] == "toy-trained-topk"
        assert one["act_max"] == pytest.approx(row["max_act"])
        assert one["activation_frequency"] == row["density"]
        fires = sum(row["histogram"]) > 0
        assert len(one["quantile_values"]) == 100 * fires
        assert not fires or one["quantile_values"][-1] == pytest.approx(one["act_max"])
        assert one["top_logits"] == [p["token"] for p in row["top_logits"]]
        examples = one["examples_quantiles"][0]["examples"]
        assert len(examples) == len(row["examples"])
        for got, want in zip(examples, row["examples"], strict=True):
            assert got["tokens"] == list(want["tokens"])
            assert got["train_token_ind"] == want["peak"]
    assert verify.faults(out) == []


@pytest.mark.parametrize("n", [1, 7, 1000])
def test_percentiles_are_right_to_within_a_bin_of_the_histogram(n):
    acts = np.random.default_rng(0).gamma(2, 3, n)
    counts, edges = np.histogram(acts, 25, (0, acts.max()))
    found = exports.quantile_values(counts, float(acts.max()))
    exact = np.percentile(acts, range(1, 101), method="inverted_cdf")
    assert np.abs(np.array(found) - exact).max() <= edges[1] + 1e-9
    assert found[-1] == pytest.approx(acts.max())
    assert exports.quantile_values(counts * 0, 0.0) == []


@pytest.mark.parametrize(
    "change, said",
    [
        ({"density": 1.5}, "latent 3: not FeatureDetails: activation_frequency: "),
        ({"max_act": np.inf}, "latent 3: not FeatureDetails: act_max: Input should be a finite"),
        ({"examples": [{"tokens": ["a"], "acts": [1.0, 2.0], "peak": 0}]}, "1 tokens, 2 activat"),
        ({"examples": [{"tokens": ["a"], "acts": [1.0], "peak": 1}]}, "1 activations, peak at 1"),
    ],
)
def test_a_latent_that_does_not_fit_is_refused_and_nothing_is_written(
    made, tmp_path, capsys, change, said
):
    frame = tables.read_table(made / "features.parquet")
    for key, value in change.items():
        frame.at[3, key] = value
    tables.write_table(tmp_path / "f.parquet", frame, {"stage": "t"})
    with pytest.raises(SystemExit):
        export(made, "neuronpedia", tmp_path / "out", table=tmp_path / "f.parquet")
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("transcoder", [False, True])
def test_shapes_of_every_architecture_are_those_of_its_file(made, transcoder):
    item = "transcoder" if transcoder else "sae"
    for name in TRANSCODERS if transcoder else SPARSITY:
        _, config, weights = exports.dictionary(made / item / "manifest.json", name)
        assert isinstance(config, SaeLensConfig)
        assert config.shapes().keys() == weights.keys(), name
