"""Own stages whose rule is the core's: what they read, make and are handed, without snakemake."""

import json

import pytest
from snake import ROOT, inputs_of, wildcards

from pipeline.errors import RetraceError
from pipeline.papers import own, papers
from pipeline.papers.rule_params import Params

ALL = papers.available([ROOT / "rules/papers"])
CARD = {"title": "t", "authors": "a", "year": 2024, "url": "https://x"}


@pytest.fixture(scope="module")
def asked() -> own.Own:
    inputs = inputs_of(ROOT, papers=ALL, scale="smoke")
    return own.Own(inputs, Params(inputs, {}))


def test_a_rule_makes_each_table_of_the_stages_that_leave_it_to_the_core(asked):
    rules = {r.name: r for r in own.rules(asked.asked.run)}
    for name in ALL:
        paper = asked.asked.run.paper(name, "smoke")
        has_rules = (paper.folder / "rules.smk").exists()
        for stage, options in paper.spec.own.items():
            if has_rules and stage not in paper.spec.stages:
                assert f"{name}_{stage}" not in rules
                continue
            for scale in ("smoke", "laptop", "paper"):
                ending = "" if scale == "smoke" else f"_at_{scale}"  # the run's own is smoke
                rule = rules[f"{name}_{stage}{ending}"]
                assert (rule.paper, rule.scale) == (name, scale)
                tables = asked.asked.run.paper(name, scale).tables()
                made = set(rule.outputs.values())
                assert {tables[f"{stage}/{t}"] for t in options["tables"]} <= made
                files = [*made, rule.beside("logs", "log"), rule.beside("benchmarks", "tsv")]
                assert not [f for f in files if "{" in f or f"/{scale}/{name}/" not in f]


def test_what_is_needed_is_read_and_handed_on_by_its_name(asked):
    w = wildcards(paper="monosemanticity")
    found = asked.inputs(w, "latents")
    assert list(found) == [
        "models", "beside_models", "activations", "beside_activations", "saes", "beside_saes",
    ]  # fmt: skip
    assert found["models"] == asked.asked.models(w, "model.json")
    assert found["beside_activations"] == asked.asked.arms(w, "activations", "shards")
    given = {"script": "latents.py", "code": ["latents.py"], **found}
    words = own.options(given, {"near_by": "near.parquet"})
    assert words == [
        "--models", *found["models"], "--activations", *found["activations"],
        "--saes", *found["saes"], "--near-by", "near.parquet",
    ]  # fmt: skip


def test_a_job_is_handed_its_options_and_the_arms_and_nothing_of_how_it_is_called(asked):
    spec = json.loads(asked.spec(wildcards(paper="monosemanticity"), "latents"))
    assert spec.keys() == {"own.latents", "arms"}
    assert not spec["own.latents"].keys() & {"needs", "resources", "script", "makes", "code"}
    spec = json.loads(asked.spec(wildcards(paper="toy_superposition"), "superposition"))
    assert spec.keys() == {"own.superposition"}  # it reads nothing of an arm


def test_the_code_is_the_script_and_all_that_it_loads(asked):
    w = wildcards(paper="synth_sae_bench")
    files = [f.rpartition("/")[2] for f in asked.code_files(w, "recovery")]
    assert files == sorted(files) and {"recovery.py", "world.py", "learner.py"} <= set(files)
    assert asked.script(w, "recovery")[0] in asked.code_files(w, "recovery")


@pytest.mark.parametrize(
    "called, said",
    [
        ({"needs": ["model"]}, "own.a.needs: 'model' is none (did you mean 'models'?)"),
        ({"needs": ["saes"]}, "own.a.needs: saes: paper.yaml has no section sae; add it"),
        ({"needs": ["corpus"]}, "own.a.needs: corpus: paper.yaml has no section corpus"),
        ({"needs": ["a/y"]}, "own.a.needs: no table or file 'a/y' (did you mean 'a/x'?)"),
        ({"makes": {"x": "x.json"}}, "own.a.makes.x: 'x.json' is no name"),
        ({"makes": {"y": "../y.json"}}, "own.a.makes.y: '../y.json' is no name"),
        ({"script": "b.py"}, "own.a: there is no b.py beside paper.yaml"),
        ({"nedes": []}, ""),  # an option of the stage, which the stage's own section refuses
    ],
)
def test_a_need_that_the_paper_cannot_meet_is_told_before_anything_runs(tmp_path, called, said):
    raw = CARD | {"own": {"a": {"tables": ["x"]} | called}}
    if not said:
        assert papers.load(tmp_path, "smoke", raw).spec.own["a"]["nedes"] == []
        return
    with pytest.raises(RetraceError) as e:
        papers.load(tmp_path, "smoke", raw)
    assert said in str(e.value) and "\n" not in str(e.value)
