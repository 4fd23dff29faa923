"""Two runs side by side: what differs and what does not, z-scores, matched latents, the page."""

import dataclasses
import json
import math
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import warm
from safetensors.numpy import save_file

from pipeline.errors import RetraceError
from pipeline.sharing import compare, matching, published, verify
from pipeline.store import provenance, tables

ROOT = Path(__file__).parents[2]
BASE = Path("results/laptop/made_up")


@pytest.fixture
def two(made_up, tmp_path) -> tuple[Path, Path]:
    """The made-up results, and a copy of them that a test may change."""
    root, _ = made_up
    shutil.copytree(root / "results", tmp_path / "results")
    return root / BASE, tmp_path / BASE


def call(*args: object) -> subprocess.CompletedProcess:
    command = [warm.python(), "-m", "pipeline", "compare", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def both(a: Path, b: Path) -> dict:
    return compare.compare(published.read(a), published.read(b))


# --- z-scores ------------------------------------------------------------------------------


def metric(*values: float) -> dict:
    from pipeline.claims.scalars import summary

    return {**summary(values), "definition": "one"}


@pytest.mark.parametrize(
    "a, b, z",
    [
        ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0), 3 / math.sqrt(1 / 3 + 1 / 3)),
        ((1.0, 2.0, 3.0), (2.0,), 0.0),
        ((1.0, 2.0, 3.0), (4.0,), 2 / math.sqrt(1 + 1 / 3)),
        ((4.0,), (1.0, 2.0, 3.0), -2 / math.sqrt(1 + 1 / 3)),
        ((1.0,), (2.0,), None),
        ((1.0, 1.0), (2.0, 2.0), math.inf),
        ((2.0, 2.0), (1.0, 1.0), -math.inf),
        ((1.0, 1.0), (1.0, 1.0), 0.0),
        ((math.nan, 1.0), (1.0, 2.0), 0.5 / math.sqrt(0.5 * 1.5)),  # one seed has it: one draw
        ((math.nan, math.nan), (1.0, 2.0), None),
    ],
)
def test_z_is_the_difference_in_standard_errors(a, b, z):
    found = compare.z_score(metric(*a), metric(*b))
    assert found == z if z is None or math.isinf(z) else found == pytest.approx(z)


def test_equal_draws_have_z_of_unit_variance():
    """The mean over many pairs of runs of one distribution; n is large, so z is nearly normal."""
    rng = np.random.default_rng(0)
    z = [compare.z_score(metric(*rng.normal(size=40)), metric(*rng.normal(size=40)))
         for _ in range(600)]  # fmt: skip
    assert abs(np.mean(z)) < 5 / math.sqrt(600) and abs(np.var(z) - 1) < 5 * math.sqrt(2 / 600)


def test_metrics_are_ordered_by_z_then_by_relative_difference():
    a = {"far": metric(0, 1), "near": metric(0, 1), "alone": metric(1), "same": metric(1)}
    b = {"far": metric(9, 10), "near": metric(1, 2), "alone": metric(3), "same": metric(1)}
    rows = compare.metric_rows(a, b)
    assert [r["name"] for r in rows] == ["far", "near", "alone"]
    assert rows[2]["relative"] == pytest.approx(2 / 3) and not rows[0]["redefined"]


# --- latents -------------------------------------------------------------------------------


def slow(a: np.ndarray, b: np.ndarray) -> list[tuple[int, int, float]]:
    """Mutual nearest rows by loops over all pairs, nearest first."""
    cosine = [[float(x @ y / np.linalg.norm(x) / np.linalg.norm(y)) for y in b] for x in a]
    out = []
    for i, row in enumerate(cosine):
        j = int(np.argmax(row))
        if max(range(len(a)), key=lambda k: cosine[k][j]) == i:
            out.append((i, j, row[j]))
    return sorted(out, key=lambda p: -p[2])


def test_pairs_are_those_of_the_slow_loops(monkeypatch):
    monkeypatch.setattr(matching, "BLOCK", 7)
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(30, 8)), rng.normal(size=(40, 8))
    found, expected = matching.match(a, b, rng), slow(a, b)
    assert [tuple(p) for p in found.pairs] == [p[:2] for p in expected]
    assert found.cosines == pytest.approx([p[2] for p in expected], abs=1e-5)


def test_a_planted_permutation_is_found_whatever_the_lengths():
    rng = np.random.default_rng(0)
    a, order = rng.normal(size=(200, 32)), rng.permutation(200)
    b = a[order] * rng.uniform(0.1, 9, (200, 1)) + rng.normal(0, 1e-3, (200, 32))
    found = matching.match(a, b, rng)
    assert found.shared == 1
    assert (order[found.pairs[:, 1]] == found.pairs[:, 0]).all()
    assert found.null < 0.7 < found.nearest.mean()


def test_unrelated_dictionaries_are_at_the_null():
    rng = np.random.default_rng(0)
    found = matching.match(rng.normal(size=(500, 64)), rng.normal(size=(500, 64)), rng)
    assert found.shared == 0
    error = float(found.nearest.std()) / 500**0.5
    assert abs(float(found.nearest.mean()) - found.null) < 5 * error


def test_a_dead_row_of_zeros_is_no_fault():
    a = np.eye(3)
    found = matching.match(a, np.vstack([a, np.zeros(3)]), np.random.default_rng(0))
    assert found.cosines.tolist() == [1, 1, 1]


def with_weights(root: Path, W_dec: np.ndarray) -> None:
    """Give the arm `trained` of the results in `root` a dictionary in the store."""
    item = Path("results/store/sae/tiny-0123456789ab")
    folder = root / item / "saes/topk"
    folder.mkdir(parents=True)
    save_file({"W_dec": W_dec.astype(np.float32)}, folder / "sae_weights.safetensors")
    made = provenance.certificate("sae", {"sae": {"d_sae": len(W_dec)}}, "0" * 64, [])
    tables.write_json(root / item / "manifest.json", {"files": {}}, made)
    table = root / BASE / "evaluation/trained.parquet"
    frame, made = tables.read_table(table), provenance.read(table)
    made["inputs"] = {str(item / "manifest.json"): "0" * 64}
    tables.write_table(table, frame, made)


def test_dictionaries_are_matched_where_both_have_their_weights(made_up, tmp_path):
    rng = np.random.default_rng(0)
    W_dec = rng.normal(size=(20, 8))
    for side in ("a", "b"):
        shutil.copytree(made_up[0] / "results", tmp_path / side / "results")
    a, b = tmp_path / "a", tmp_path / "b"
    with_weights(a, W_dec)
    assert both(a / BASE, b / BASE)["features"] == []
    with_weights(b, W_dec[::-1])
    found = both(a / BASE, b / BASE)
    assert [r["name"] for r in found["features"]] == ["trained.topk"]
    assert found["features"][0]["shared"] == 1
    assert {(p["a"], p["b"]) for p in found["features"][0]["pairs"]} == {
        (i, 19 - i) for i in range(20)
    }
    assert "trained.topk" in compare.told(found, 120)


# --- what differs --------------------------------------------------------------------------


def test_a_run_and_its_copy_are_the_same(two):
    found = both(*two)
    assert found["settings"] == found["environment"] == found["metrics"] == []
    assert not any(r["changed"] or r["restated"] for r in found["verdicts"])
    assert {r["verdict"] for r in found["files"]} == {"same bytes"}


def rewrite(path: Path, change, **certificate) -> None:
    """Change a JSON file, or its certificate."""
    loaded = json.loads(path.read_text())
    made = loaded.pop("provenance") | certificate
    change(loaded)
    tables.write_json(path, loaded, made)


def test_what_was_changed_is_told_and_nothing_else(two):
    a, b = two
    name = "trained.topk_k32_d4608.l0"

    def more(loaded: dict) -> None:
        loaded["metrics"][name] |= {"values": [99.0], "mean": 99.0}

    rewrite(b / "metrics.json", more, device="a GPU")
    claims = (b / "claims.csv").read_text()
    (b / "claims.csv").write_text(claims.replace(",not reproduced,", ",reproduced,", 1))
    table = b / "attribution/prompts.parquet"
    made = provenance.read(table) | {"spec": {"attribution": {"ig_steps": 8}}}
    tables.write_table(table, tables.read_table(table), made)
    found = both(a, b)
    assert [r["name"] for r in found["metrics"]] == [name]
    assert [r["id"] for r in found["verdicts"] if r["changed"]] == ["wrong_way"]
    assert [r["name"] for r in found["environment"]] == ["device"]
    differing = {r["name"]: r["verdict"] for r in found["files"] if r["verdict"] != "same bytes"}
    assert differing == {
        "metrics.json": "differs",
        "claims.csv": "differs",
        "attribution/prompts.parquet": "same content, other certificate",
    }
    said = compare.told(found, 100)
    assert "verdicts: 1 of 4 changed" in said and "wrong_way" in said and name in said
    assert max(map(len, said.splitlines())) <= 100


def test_a_setting_is_told_once_under_the_stage_that_takes_it_first():
    a = {"sae x.sae.k": 16, "evaluation/trained.k": 16, "sae x.sae.seed": 0, "only": 1}
    b = {"sae x.sae.k": 32, "evaluation/trained.k": 32, "sae x.sae.seed": 0}
    assert compare.different(a, b) == [{"name": "evaluation/trained.k", "a": "16", "b": "32"}]


def test_settings_come_from_stages_and_from_the_card(made_up):
    found = compare.settings(published.read(made_up[0] / BASE))
    assert found["card"]["attribution.sae"] and not [n for n in found["card"] if "claims" in n]


def test_versions_of_several_certificates_are_joined(made_up):
    made = provenance.read(made_up[0] / BASE / "metrics.json")
    other = made | {"versions": made["versions"] | {"numpy": "0.1"}, "device": "a GPU"}
    found = compare.environment([made, other])
    assert found["numpy"] == f"0.1 / {made['versions']['numpy']}" and found["device"] == "a GPU"


# --- where results lie ---------------------------------------------------------------------


@pytest.mark.parametrize("folder, paper, scale", [
    ("results/laptop/grok", "grok", "laptop"), ("results/reference/grok/paper", "grok", "paper"),
])  # fmt: skip
def test_paper_and_scale_out_of_the_path(made_up, tmp_path, folder, paper, scale):
    shutil.copytree(made_up[0] / BASE, tmp_path / folder)
    found = published.read(tmp_path / folder)
    assert (found.paper, found.scale, found.base) == (paper, scale, tmp_path)


def test_papers_are_paired_by_name_then_scale(made_up, tmp_path):
    for folder in ("a/laptop/x", "a/laptop/y", "b/x/laptop", "b/x/paper", "b/z/laptop"):
        shutil.copytree(made_up[0] / BASE, tmp_path / folder)
    with published.opened(tmp_path / "a") as a, published.opened(tmp_path / "b") as b:
        assert [(x.name, y.name) for x, y in published.pairs(a, b)] == [("x, laptop", "x, laptop")]
        with pytest.raises(RetraceError, match="no paper is on both sides"):
            published.pairs(a, [r for r in b if r.paper == "z"] * 2)


def test_faults_are_one_sentence(made_up, tmp_path):
    folder = made_up[0] / BASE
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.zip").write_text("no zip")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as z:
        z.writestr("readme", "")
    for path, said in (
        ("empty", "holds no metrics.json"),
        ("nowhere", "neither a folder of results nor a release"),
        ("bad.zip", "cannot be unpacked"),
        ("other.zip", "holds no metrics.json"),
    ):
        done = call(folder, tmp_path / path)
        assert done.returncode == 1 and said in done.stderr and done.stderr.count("\n") == 1
        assert str(tmp_path / path) in done.stderr


def test_the_command_prints_the_tables_and_writes_the_page(two, tmp_path):
    out = tmp_path / "compare.html"
    done = call(*two, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "verdicts: 0 of 4 changed" in done.stdout and str(out) in done.stdout
    page = out.read_text()
    assert "Two runs side by side" in page and provenance.read(out)["stage"] == "compare"
    assert verify.faults(out) == []


def test_text_of_a_run_does_not_become_markup(two, tmp_path):
    a, b = two
    nasty = "<img src=x onerror=alert(1)>"
    claims = (b / "claims.csv").read_text()
    (b / "claims.csv").write_text(claims.replace("wrong_way", nasty))
    assert call(a, b, "--out", tmp_path / "out.html").returncode == 0
    assert nasty not in (tmp_path / "out.html").read_text()


def test_settings_that_one_side_leaves_to_their_defaults_are_told(made_up):
    """A card that states less is compared with its defaults filled in, over the union."""
    run = published.read(made_up[0] / BASE)
    report = run.certificates["report.html"]
    stated = json.loads(json.dumps(report))
    section = stated["spec"]["card"]["corpus"]
    section |= {"n_ctx": 96, "n_tokens": 123_456}
    other = dataclasses.replace(run, certificates=run.certificates | {"report.html": stated})
    rows = {r["name"]: (r["a"], r["b"]) for r in compare.settings_differing(run, other)}
    assert rows["card.corpus.n_tokens"][1] == "123456"
    assert rows["card.corpus.n_ctx"] == ("128", "96")  # a default, and what differs from it


def test_what_one_card_does_not_know_is_named(made_up):
    run = published.read(made_up[0] / BASE)
    report = json.loads(json.dumps(run.certificates["report.html"]))
    report["spec"]["card"]["sae"]["of_another_version"] = 1
    other = dataclasses.replace(run, certificates=run.certificates | {"report.html": report})
    rows = {r["name"]: (r["a"], r["b"]) for r in compare.settings_differing(run, other)}
    assert rows["card.sae.of_another_version"] == (compare.ABSENT, "1")


def test_published_results_are_compared_by_tokens_rows_and_widths():
    reference = Path(__file__).parents[2] / "results/reference/topk_saes"
    a, b = (published.read(reference / scale) for scale in ("laptop", "paper"))
    names = {r["name"] for r in compare.settings_differing(a, b)}
    wanted = {"corpus.n_tokens", "sae.training.n_rows", "sae.dictionaries.topk.grid.d_sae"}
    assert {f"card.{n}" for n in wanted} <= names
