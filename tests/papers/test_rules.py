"""What the rules ask, without starting snakemake: paths, params, faults."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
from snake import ROOT, edit, forget_code, inputs_of, wildcards

from pipeline.errors import RetraceError
from pipeline.papers import papers, rule_helpers
from pipeline.papers.rule_params import Params
from pipeline.papers.workflow import Inputs
from pipeline.store.provenance import sha256_file

PAPER = "rules/papers/toy"
CARD = f"{PAPER}/paper.yaml"
ALL = papers.available([ROOT / "rules/papers"])


@pytest.fixture(scope="module")
def everything() -> Inputs:
    """Inputs of all papers of this repository."""
    return inputs_of(ROOT, papers=ALL, scale="smoke")


# --- paths ---------------------------------------------------------------------------------


def test_what_a_run_makes(toy):
    inputs = inputs_of(toy)
    assert inputs.targets() == ["results/smoke/index.html"]
    assert inputs_of(toy, strict=True).targets()[1:] == ["results/smoke/strict.json"]
    base = "results/smoke/toy"
    assert inputs.products(None, "toy") == [
        f"{base}/report.html",
        f"{base}/claims.csv",
        f"{base}/metrics.json",
        f"{base}/figures/cosines.html",
        f"{base}/figures/cosines.csv",
        f"{base}/measure/cosines.parquet",
    ]


def test_paths_of_a_paper(toy):
    inputs, w = inputs_of(toy), wildcards(figure="cosines")
    base = "results/smoke/toy"
    assert inputs.tables(w) == inputs.tables(w, "figure") == [f"{base}/measure/cosines.parquet"]
    assert inputs.own_files(w, "m*.py") == [f"{PAPER}/measure.py", f"{PAPER}/metrics.py"]
    assert inputs.card(w) == [CARD]
    assert inputs.report(w, "figures") == [f"{base}/figures/cosines.html"]
    assert inputs.report(w, "numbers") == [
        f"{base}/figures/cosines.csv",
        f"{base}/figures/cosines.csv.json",
    ]
    assert inputs.report(w, "pages") == inputs.upstream(w) == []
    assert inputs.drawing(w) == [
        "pipeline/report/templates/walk.js",
        "pipeline/report/templates/play.js",
        "pipeline/report/templates/draw.js",
    ]
    assert inputs.rules_files() == []
    (toy / PAPER / "rules.smk").touch()
    assert inputs.rules_files() == [("toy", str(toy / PAPER / "rules.smk"))]


def test_a_figure_of_metrics_and_claims_reads_their_files(toy):
    edit(toy / CARD, "tables: [measure/cosines]", "tables: [metrics, claims]")
    found = inputs_of(toy).tables(wildcards(figure="cosines"), "figure")
    assert found == ["results/smoke/toy/metrics.json", "results/smoke/toy/claims.csv"]


@pytest.mark.parametrize("paper", ALL)
def test_every_path_of_the_store_is_an_artefact_that_a_rule_makes(everything, paper):
    """And the wildcards of the rules fit it."""
    found = everything.run.paper(paper, "smoke")
    w = wildcards(paper=paper)
    paths = everything.models(w, "model.json") if found.spec.model else []
    stages = ("corpus", "activations", "sae")
    paths += [p for s in stages if found.spec.model for p in everything.arms(w, s, "manifest.json")]
    paths += everything.trainings(w, "manifest.json")
    assert paths or not (found.spec.model or found.spec.training)
    for path in paths:
        stage, id = path.split("/")[2:4]
        assert re.fullmatch(rule_helpers.WILDCARDS[stage], id)
        item = everything.item(stage, SimpleNamespace(**{stage: id}))
        for made_from, folder in item.folders().items():
            below = everything.item_input(SimpleNamespace(**{stage: id}), stage, made_from, "x")
            assert below == f"results/store/{folder}/x"
            assert re.fullmatch(rule_helpers.WILDCARDS[folder.split("/")[0]], folder.split("/")[1])
        spec = Params(everything, {}).item_spec(SimpleNamespace(**{stage: id}), stage)
        assert json.loads(spec).keys() == item.spec.keys()


def test_arms_are_sorted_and_share_a_corpus(everything):
    w = wildcards(paper="topk_saes")
    arms = sorted(everything.paper(w).spec.arm_names())
    assert len(arms) > 1
    each = [everything.arm_input(wildcards(paper="topk_saes", arm=a), "model", "f") for a in arms]
    assert [path for (path,) in each] == everything.models(w, "f")
    assert len(set(everything.models(w, "f"))) == len(arms)
    assert len(set(everything.arms(w, "corpus", "f"))) == 1


def test_a_dictionary_is_found_by_a_wildcard_or_by_a_section(everything):
    spec = everything.run.paper("topk_saes", "smoke").spec
    named = wildcards(paper="topk_saes", arm=spec.attribution.arm, latents=spec.attribution.sae)
    by_section = everything.sae_input(wildcards(paper="topk_saes"), "attribution", "saes")
    assert everything.sae_input(named, None, "saes") == by_section
    assert by_section in everything.arms(named, "sae", "saes")


def test_a_training_run_is_found_by_its_name_or_by_the_wildcard(everything):
    w = wildcards(paper="grokking", run="decay")
    assert everything.training(w, None, "f") == everything.training(w, "decay", "f")
    assert everything.training(w, "decay", "f") != everything.training(w, "no_decay", "f")
    assert everything.training(w, "decay", "f") in everything.trainings(w, "f")
    id = everything.training(w, "decay", "f").split("/")[3]
    data = everything.item_source(SimpleNamespace(training=id), "training", "data")
    assert data == [str(everything.run.paper("grokking", "smoke").folder / "data.py")]
    assert everything.item_source(SimpleNamespace(training=id), "training", "text") == []


def test_runs_on_one_text_read_its_tokens_once(everything):
    w = wildcards(paper="induction_heads", scale="paper")  # at others it trains on no text
    runs = everything.paper(w).spec.training.values()
    assert sum(run.data.source == "corpus" for run in runs) > 1
    assert len(everything.trainings(w, "tokens.parquet", "corpus")) == 1


def test_models_of_another_paper_are_its_own_in_the_store(everything):
    w = wildcards(paper="lenses")
    models = everything.paper(w).spec.own["tuning"]["models"]
    lent = everything.lent(w, "tuning", "model", "model.json")
    assert len(lent) == len(models)
    for (_, model), path in zip(sorted(models.items()), lent, strict=True):
        owner = wildcards(paper=model.get("paper") or "lenses", arm=model.get("arm", "trained"))
        assert everything.arm_input(owner, "model", "model.json") == [path]


def test_a_storage_brings_what_the_certificates_of_a_page_name(everything):
    w = wildcards(paper="lenses")
    brought = Inputs(everything.run, ROOT, storage=True).upstream(w)
    assert set(everything.lent(w, "tuning", "model", "model.json")) <= set(brought)
    assert set(everything.lent(w, "tuning", "corpus", "tokens.parquet")) <= set(brought)
    assert everything.upstream(w) == []


def test_circuits_read_dictionaries_only_where_they_name_some(everything):
    for paper in ALL:
        spec = everything.run.paper(paper, "smoke").spec
        if spec.circuits:
            w = wildcards(paper=paper, arm=spec.circuit_arms()[0])
            assert bool(everything.circuit_input(w, "sae", "saes")) is bool(spec.circuits.saes)


def test_papers_named_on_the_command_line_are_the_ones_told(everything):
    assert everything.asked(["snakemake", "-c2", "grokking", "ioi"]) == ["grokking", "ioi"]
    assert everything.asked(["snakemake", "-c2"]) == ALL


def test_the_papers_that_a_job_works_for(everything):
    """That of its wildcards; of an artefact of the store, all that need it."""
    run = everything.run
    assert run.papers_of({"paper": "ioi", "arm": "x"}) == ["ioi"]
    store = run.store("topk_saes", "smoke", "trained")
    assert "topk_saes" in run.papers_of({"corpus": store["corpus"].id})
    assert run.papers_of({"activations": store["activations"].id})[-1:] == ["topk_saes"]
    assert run.papers_of({"corpus": "another-0123456789ab"}) == []


# --- params --------------------------------------------------------------------------------


def test_a_page_repeats_the_settings_by_which_the_paper_is_found(toy):
    inputs = inputs_of(toy)
    given = {"papers_dirs": ["rules/papers", "x"], "roots": ["."], "hub": True, "device": "cpu"}
    plain = json.loads(Params(inputs, {}).report_spec(wildcards()))
    assert "config" not in plain and plain["card"]["title"]
    told = json.loads(Params(inputs, given).report_spec(wildcards()))
    assert told["config"] == [
        "papers_dirs=[rules/papers,x]", "roots=[.]", "hub=True", "papers=[toy]"
    ]  # fmt: skip


def test_the_index_names_papers_that_are_not_asked_for_and_have_results(toy):
    shutil.copytree(toy / PAPER, toy / "rules/papers/later")
    inputs = inputs_of(toy)
    other = toy / "results/smoke/later/claims.csv"
    other.parent.mkdir(parents=True)
    spec = lambda: json.loads(Params(inputs, {}).index_spec(wildcards()))  # noqa: E731
    assert inputs.others(wildcards()) == [] and list(spec()["papers"]) == ["toy"]
    other.write_text("id\n")
    mine = toy / "results/smoke/toy/claims.csv"  # asked for, so an input of the index
    mine.parent.mkdir()
    mine.write_text("id\n")
    assert inputs.others(wildcards()) == ["results/smoke/later/claims.csv"]
    assert inputs.others(wildcards(scale="laptop")) == []
    assert set(spec()["papers"]) == {"toy", "later"}
    assert spec()["claims"] == {"later": sha256_file(other)}


def test_spec_holds_the_sections_and_the_dictionary_in_the_wildcards(everything):
    ask = Params(everything, {}).spec
    paper = everything.run.paper("topk_saes", "smoke").spec.model_dump(mode="json")
    plain = json.loads(ask(wildcards(paper="topk_saes"), "title", "features"))
    assert plain == {"title": paper["title"], "features": paper["features"]}
    named = json.loads(ask(wildcards(paper="topk_saes", latents="topk"), "title"))
    assert named == {"title": paper["title"], "latents": "topk"}


def test_latents_of_a_null_arm_have_its_model_and_the_same_description(everything):
    """`features.beside: random.random_weights`, beside features of the arm trained."""
    params, paper = Params(everything, {}), "topk_saes"
    section = everything.run.paper(paper, "smoke").spec.features.model_dump(mode="json")
    assert section.pop("beside") == "random.random_weights"
    for latents, arm, sae in (
        ("topk_k32_d576", "trained", "topk_k32_d576"),
        ("random.random_weights", "random", "random_weights"),
    ):
        w = wildcards(paper=paper, latents=latents)
        told = json.loads(params.features_spec(w))
        assert told == {"features": section | {"arm": arm}, "latents": sae}
        model = everything.run.store(paper, "smoke", arm)["model"]
        found = everything.arm_input(w, "model", "model.json", "features")
        assert found == [f"results/store/model/{model.id}/model.json"]
        item = everything.run.sae_item(paper, "smoke", arm, sae)
        assert everything.sae_input(w, "features", "saes") == f"results/store/sae/{item.id}/saes"
    w = wildcards(paper=paper, latents="topk_k32_d576")
    beside = "results/smoke/topk_saes/features/random.random_weights.parquet"
    assert everything.beside(w) == [beside] and beside in everything.tables(w)
    sides = json.loads(params.feature_page_spec(w))["sides"]
    assert sides == ["trained.topk_k32_d576", "random.random_weights"]
    for latents, said in (("rand.x", "no arm 'rand'"), ("random.topk_k32_d57", "no SAE")):
        with pytest.raises(RetraceError, match=said):
            w = wildcards(paper=paper, latents=latents)
            everything.sae_input(w, "features", "saes")


@pytest.mark.parametrize(
    "beside, said",
    [
        ("random.topk_k32", "features.beside: no SAE 'topk_k32'"),
        ("random.noaux", "SAE 'noaux' is not trained on arm 'random'"),
        ("random", "String should match pattern"),
    ],
)
def test_a_null_arm_without_such_latents_is_told(beside, said):
    card = papers.load_yaml(ROOT / "rules/papers/topk_saes/paper.yaml")
    card["features"]["beside"] = beside
    with pytest.raises(RetraceError, match=said):
        papers.load(ROOT / "rules/papers/topk_saes", "smoke", card)


def test_code_covers_the_files_that_are_named_and_no_other(toy):
    ask = Params(inputs_of(toy), {}).code
    before = ask(wildcards(), "metrics", "metrics.py"), ask(wildcards(), "metrics")
    (toy / PAPER / "metrics.py").write_text("x = 1\n")
    forget_code()
    after = ask(wildcards(), "metrics", "metrics.py"), ask(wildcards(), "metrics")
    assert before[0] != after[0] and before[1] == after[1] != before[0]


def test_a_training_run_is_code_of_its_data_too(everything):
    """Of a run on the paper's data.py; one on a text reaches none of it."""
    ask, found = Params(everything, {}).training_code, {}
    for paper in ("grokking", "induction_heads", "nanogpt_shakespeare"):
        w = wildcards(paper=paper)
        for path in everything.trainings(w, "manifest.json"):
            item = SimpleNamespace(training=path.split("/")[3])
            own = everything.item_source(item, "training", "data")
            found.setdefault(tuple(own), set()).add(ask(item))
    assert len(found) > 1 and all(len(codes) == 1 for codes in found.values())
    assert len(set.union(*found.values())) == len(found)


# --- faults --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, said",
    [
        ({"scal": "smoke"}, "unknown key 'scal' (did you mean 'scale'?)"),
        ({"scale": "smal"}, "scales: no scale 'smal'; it has smoke, laptop, paper"),
        ({"papers": ["toyy"]}, "no paper 'toyy' (did you mean 'toy'?)"),
        ({"papers": []}, "papers: "),
        ({"papers": 5}, "papers: "),
        ({"papers_dirs": ["nowhere"]}, "papers_dirs: no folder 'nowhere'"),
        ({"device": "gpu"}, "device: "),
        ({"strict": "perhaps"}, "strict: "),
    ],
)
def test_faults_of_the_configuration(toy, config, said):
    with pytest.raises(RetraceError, match=re.escape(said)):
        inputs_of(toy, **config)


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("figures:\n", "figurs:\n", "unknown key 'figurs' (did you mean 'figures'?)"),
        ("    tables: [cosines]\n", "", "own.measure: needs tables"),
        ("metric: cosine.d64", "metric: cosin.d64", "claim 'value_at_64': no metric 'cosin.d64'"),
        ("holds: cosine.d256 <", "holds: cosine.d256 ==", "may not stand in a claim"),
        ("id: value_at_64", "id: falls_with_d", "claim id 'falls_with_d' stands twice"),
        ("  cosines: # a", "  cosine: # a", "'cosine'"),
        ("tables: [measure/cosines]", "tables: [measure/cosine]", "measure/cosine"),
        ("year: 2026", "year: soon", "year: Input should be a valid integer"),
        ("year: 2026", "year: [2026", "not valid YAML"),
        ("year: 2026", "year: !!python/name:os.system", "not valid YAML"),
        ("  paper:\n", "  papr:\n", "unknown scale 'papr' (did you mean 'paper'?)"),
        (
            "own: # your",
            "model: {}\ncorpus: {source: local, path: ../../../../out.txt}\nown: # your",
            "path '../../../../out.txt' lies outside the paper's folder and the roots",
        ),
        (
            "own: # your",
            "model: {}\ncorpus: {n_tokens: 500}\n"
            "activations: {hooks: [blocks.0.hook_resid_post]}\n"
            "sae: {dictionaries: {wide: {architecture: topk, d_sae: 900, k: 4}}}\nown: # your",
            "sae.wide: 900 latents are wider than 500 tokens can train",
        ),
    ],
)  # fmt: skip
def test_faults_of_a_paper(toy, old, new, said):
    edit(toy / CARD, old, new)
    with pytest.raises(RetraceError, match=re.escape(said)) as fault:
        inputs_of(toy)
    assert CARD in str(fault.value)


def test_faults_of_a_papers_code(toy):
    (toy / PAPER / "metrics.py").write_text("def metrics(")
    with pytest.raises(RetraceError, match=f"{PAPER}/metrics.py: not valid Python"):
        inputs_of(toy)


def test_a_link_out_of_the_roots_is_refused(toy, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    (toy / PAPER / "text.txt").symlink_to(tmp_path / "secret.txt")
    text = "model: {}\ncorpus: {source: local, path: text.txt}\n"
    edit(toy / CARD, "own: # your", f"{text}own: # your")
    with pytest.raises(RetraceError, match=r"path 'text\.txt' lies outside"):
        inputs_of(toy)


ASKED = {  # what a target that cannot be made asks first, of the toy paper and of topk_saes
    "figure": lambda i, w: i.tables(w(figure="cosine"), "figure"),
    "arm": lambda i, w: i.arm_input(w(arm="randm"), "model", "model.json"),
    "section": lambda i, w: i.arm_input(w(latents="topk"), "model", "model.json", "circuits"),
    "SAE": lambda i, w: i.sae_input(w(arm="trained", latents="tpok"), None, "manifest.json"),
    "run": lambda i, w: i.training(w(run="decoy"), None, "manifest.json"),
    "paper": lambda i, w: i.paper(w(paper="tony")),
}


@pytest.mark.parametrize(
    "paper, asked, said",
    [
        ("toy", "figure", "no figure 'cosine' (did you mean 'cosines'?)"),
        ("toy", "arm", "no arm 'randm'"),
        ("toy", "SAE", "no SAE 'tpok'"),
        ("toy", "paper", "no paper 'tony' (did you mean 'toy'?)"),
        ("topk_saes", "arm", "no arm 'randm' (did you mean 'random'?)"),
        ("topk_saes", "section", "no section circuits, so no such file"),
        ("topk_saes", "SAE", "no SAE 'tpok'"),
        ("grokking", "run", "no training run 'decoy' (did you mean 'decay'?)"),
    ],
)
def test_a_target_that_cannot_be_made_is_told(toy, everything, paper, asked, said):
    inputs = inputs_of(toy) if paper == "toy" else everything
    with pytest.raises(RetraceError, match=re.escape(said)):
        ASKED[asked](inputs, lambda **w: wildcards(**({"paper": paper} | w)))


def test_a_model_of_another_paper_that_has_no_such_stage_is_told(everything, monkeypatch):
    paper = everything.run.paper("lenses", "smoke")
    name = min(paper.spec.own["tuning"]["models"])
    monkeypatch.setitem(paper.spec.own["tuning"]["models"], name, {"paper": "grokking"})
    with pytest.raises(RetraceError, match=rf"own\.tuning\.models\.{name}: paper grokking has no"):
        everything.lent(wildcards(paper="lenses"), "tuning", "corpus", "tokens.parquet")


def test_features_are_exported_from_the_arm_that_has_them(everything):
    ask = Params(everything, {}).export_spec
    features = everything.run.paper("topk_saes", "smoke").spec.features
    right = wildcards(paper="topk_saes", arm=features.arm, latents=features.saes[0])
    assert json.loads(ask(right, "neuronpedia"))["export"] == {
        "format": "neuronpedia", "arm": features.arm, "sae": features.saes[0], "paper": "topk_saes"
    }  # fmt: skip
    other = wildcards(paper="topk_saes", arm="other", latents=features.saes[0])
    assert "saelens" in ask(other, "saelens")
    with pytest.raises(RetraceError, match="arm 'other' has none to export"):
        ask(other, "neuronpedia")
    none = wildcards(paper="grokking", arm="trained", latents="x")
    with pytest.raises(RetraceError, match="features are described nowhere"):
        ask(none, "neuronpedia")
