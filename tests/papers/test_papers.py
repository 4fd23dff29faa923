"""Paper folders: found, overlaid, kept inside their roots; and the digests of the store."""

import copy
import re
from pathlib import Path

import pytest
import yaml

from pipeline.errors import RetraceError
from pipeline.papers import folders, papers, paths
from pipeline.papers.folders import find, load, load_yaml, overlay
from pipeline.papers.papers import Run
from pipeline.papers.paths import near, resolve

CARD = {"title": "T", "authors": "A", "year": 2024, "url": "https://example.org"}
CHAIN = CARD | {
    "model": {},
    "corpus": {"n_tokens": 20_000},
    "activations": {"hooks": ["blocks.8.hook_resid_post"]},
    "sae": {"dictionaries": {"topk": {"architecture": "topk", "d_sae": 512, "k": 8}}},
}


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty folder of papers, as the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "papers").mkdir()
    return tmp_path


def write(home: Path, name: str, content: dict | str) -> Path:
    folder = home / "papers" / name
    folder.mkdir(exist_ok=True)
    text = content if isinstance(content, str) else yaml.safe_dump(content)
    (folder / "paper.yaml").write_text(text)
    return folder


def run_of(home: Path, *names: str, **config) -> Run:
    given = {"papers": list(names), "papers_dirs": ["papers"], "scale": "laptop"} | config
    return Run.load(given, [home])


def fault(function, *args, **kwargs) -> str:
    with pytest.raises(RetraceError) as e:
        function(*args, **kwargs)
    assert "\n" not in str(e.value)
    return str(e.value)


BOMB = "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))

# --- YAML ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, said",
    [
        ("title: [a", "not valid YAML"),
        ("title: a\n\tyear: 1", "not valid YAML"),
        ("a: 1\nb: 2\na: 3", "key 'a' stands twice"),
        ("figures:\n  geometry: 1\n  geometry: 2", "key 'geometry' stands twice"),
        ("x: !!python/object/apply:os.system ['touch pwned']", "not valid YAML"),
        ("x: !!python/name:os.system", "not valid YAML"),
        ("year: 2024-99-99", "not valid YAML"),
        ("year: 2024-01-01", "is a date; put it in quotes"),
        ("own: !!set {a}", "is a set; put it in quotes"),
        ("own: {1: a}", "key 1 must be text"),
        ("x: &x [*x]", "its aliases repeat one another without end"),
        (BOMB, "its aliases repeat one another without end"),
        ("x: " + "[" * 100_000, "nests deeper than 50 levels"),
        ("- a\n- b", "must be a mapping of sections"),
        ("just text", "must be a mapping of sections"),
        ("", "must be a mapping of sections"),
    ],
)
def test_faults_of_yaml_are_one_sentence(home, text, said):
    folder = write(home, "p", text)
    message = fault(load, folder, "smoke")
    assert said in message and "paper.yaml" in message
    assert not (home / "pwned").exists()


def test_yaml_that_is_not_text(home):
    folder = write(home, "p", "")
    (folder / "paper.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in fault(load, folder, "smoke")


def test_merge_keys_of_yaml_work(home):
    text = "base: &b {x: 1, y: 2}\nover: {<<: *b, y: 3}\n"
    assert load_yaml(write(home, "p", text) / "paper.yaml")["over"] == {"x": 1, "y": 3}


# --- overlays ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "base, over, out",
    [
        ({"a": 1}, {}, {"a": 1}),
        ({"a": 1}, {"a": 2}, {"a": 2}),
        ({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}}, {"a": {"x": 1, "y": 3}}),
        ({"a": {"x": 1}, "b": 2}, {"a": None}, {"b": 2}),
        ({"a": [1, 2]}, {"a": [3]}, {"a": [3]}),
        ({"a": 1}, {"b": {"x": 1}}, {"a": 1, "b": {"x": 1}}),
        ({"a": {"x": 1}}, {"a": 5}, {"a": 5}),
    ],
)
def test_overlay(base, over, out):
    before = copy.deepcopy(base)
    assert overlay(base, over) == out
    assert base == before


def test_a_scale_lies_over_the_sections(home):
    over = {"smoke": {"corpus": {"n_tokens": 500}, "sae": None}, "paper": {"title": "Whole"}}
    folder = write(home, "p", CHAIN | {"scales": over})
    assert load(folder, "smoke").spec.corpus.n_tokens == 500
    assert load(folder, "smoke").spec.sae is None
    assert load(folder, "laptop").spec.corpus.n_tokens == 20_000
    assert load(folder, "paper").spec.title == "Whole"


@pytest.mark.parametrize(
    "scales, said",
    [
        ({"smok": {}}, "unknown scale 'smok' (did you mean 'smoke'?)"),
        ({"store": {}}, "'store' cannot name a scale"),
        ({"a/b": {}}, "'a/b' cannot name a scale"),
        (["smoke"], "scales: must be a mapping"),
        ({"smoke": {"corpuss": {}}}, "unknown key 'corpuss' (did you mean 'corpus'?)"),
        ({"smoke": 7}, "Input should be"),
    ],
)
def test_faults_of_an_overlay(home, scales, said):
    folder = write(home, "p", CHAIN | {"scales": scales})
    assert said in fault(load, folder, "smoke")


def test_a_paper_may_have_scales_of_its_own(home):
    folder = write(home, "p", CHAIN | {"scales": {"cluster": {"corpus": {"n_tokens": 700}}}})
    write(home, "q", CHAIN)
    found = load(folder, "cluster")
    assert found.spec.corpus.n_tokens == 700 and found.scale == "cluster"
    assert load(folder, "laptop").spec.corpus.n_tokens == 20_000
    run = run_of(home, "p", scale="cluster")
    assert run.scales("p") == run.scales() == ["smoke", "laptop", "paper", "cluster"]
    assert run.scales("q") == ["smoke", "laptop", "paper"]
    said = fault(run_of, home, "p", "q", scale="cluster")
    assert "q/paper.yaml: scales: no scale 'cluster'; it has smoke, laptop, paper" in said
    assert "'logs' cannot name a scale" in fault(run_of, home, "p", scale="logs")


def test_a_claim_names_scales_that_there_are(home):
    claim = {"id": "c", "text": "t", "source": "s", "of": "ours", "holds": "trained.topk.l0 > 0"}
    claims = [{"defaults": {"scales": ["laptop", "clustr"]}}, claim]
    given = CHAIN | {"scales": {"cluster": {}}, "claims": claims}
    said = fault(load, write(home, "p", given), "laptop")
    assert "claims: unknown scale 'clustr' (did you mean 'cluster'?)" in said


def test_an_overlay_is_checked_though_its_scale_does_not_run(home):
    write(home, "p", CHAIN | {"scales": {"paper": {"corpus": {"n_token": 1}}}})
    message = fault(run_of, home, "p", scale="smoke")
    assert "paper.yaml (paper): corpus: unknown key 'n_token'" in message


# --- folders -------------------------------------------------------------------------------


def test_find_takes_the_first_folder_that_has_the_paper(home):
    write(home, "p", CARD)
    other = home / "more" / "p"
    other.mkdir(parents=True)
    (other / "paper.yaml").write_text(yaml.safe_dump(CARD))
    assert find("p", [home / "papers", home / "more"]) == home / "papers" / "p"
    assert find("p", [home / "more", home / "papers"]) == other


def test_a_paper_that_is_nowhere_names_the_nearest(home):
    write(home, "toy_superposition", CARD)
    message = fault(find, "toy_supperposition", [home / "papers"])
    assert "did you mean 'toy_superposition'?" in message


def test_a_folder_of_papers_that_is_missing(home):
    message = fault(run_of, home, "p", papers_dirs=["paper"])
    assert "papers_dirs: no folder 'paper'" in message


def test_folders_are_looked_up_in_the_bases_in_turn(home, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    write(home, "p", CARD)
    run = Run.load({"papers": ["p"], "papers_dirs": ["papers"]}, [other, home])
    assert run.dirs == [Path("papers")]


def test_near_is_relative_inside_the_working_directory_alone(home):
    assert near(home / "papers" / "p") == Path("papers/p")
    assert near(Path("papers/p")) == Path("papers/p")
    assert near(home.parent) == home.parent


# --- roots ---------------------------------------------------------------------------------


@pytest.fixture
def outside(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("outside")
    (folder / "secret.txt").write_text("secret")
    return folder


def test_paths_inside_the_folder_or_a_root_are_found(home, outside):
    folder = write(home, "p", CARD)
    (folder / "text.txt").write_text("text")
    assert resolve("text.txt", folder, []) == (folder / "text.txt").resolve()
    assert resolve(str(outside / "secret.txt"), folder, [outside]) == outside / "secret.txt"
    assert resolve("secret.txt", folder, [outside]) == outside / "secret.txt"


@pytest.mark.parametrize("how", ["absolute", "up", "link", "link in folder", "link to folder"])
def test_a_path_outside_the_roots_is_refused(home, outside, how):
    folder = write(home, "p", CARD)
    if how == "absolute":
        path = str(outside / "secret.txt")
    elif how == "up":
        path = f"../../../{outside.name}/secret.txt"
        assert (folder / path).exists()
    elif how == "link":
        (folder / "text.txt").symlink_to(outside / "secret.txt")
        path = "text.txt"
    elif how == "link to folder":
        (folder / "texts").symlink_to(outside)
        path = "texts"
    else:
        (folder / "texts").mkdir()
        (folder / "texts" / "a.txt").symlink_to(outside / "secret.txt")
        path = "texts"
    message = fault(resolve, path, folder, [])
    assert "outside the paper's folder" in message and "roots in config.yaml" in message


def test_a_path_that_is_missing(home):
    folder = write(home, "p", CARD)
    assert "path 'text.txt' does not exist" in fault(resolve, "text.txt", folder, [])


def test_a_path_outside_the_roots_is_told_before_anything_runs(home, outside):
    corpus = {"source": "local", "path": str(outside / "secret.txt")}
    write(home, "p", CARD | {"model": {}, "corpus": corpus})
    assert "outside the paper's folder" in fault(run_of, home, "p")
    assert run_of(home, "p", roots=[str(outside)]).store("p", "laptop", "trained")["corpus"]


# --- the store -----------------------------------------------------------------------------


def ids(home: Path, content: dict, name: str = "p") -> dict[str, str]:
    write(home, name, content)
    items = run_of(home, name).store(name, "laptop", "trained")
    return {stage.split(":")[0]: item.id for stage, item in items.items()}


def changed(home: Path, section: str, key: str, value) -> set[str]:
    """Stages whose digest moves with one key."""
    edited = copy.deepcopy(CHAIN)
    edited[section][key] = value
    before, after = ids(home, CHAIN), ids(home, edited)
    return {stage for stage in before if before[stage] != after[stage]}


@pytest.mark.parametrize(
    "section, key, value, moved",
    [
        ("model", "weights", "reinit", {"model", "activations", "sae"}),
        ("model", "weights", "init", {"model", "activations", "sae"}),
        ("model", "processing", "compatibility", {"model", "activations", "sae"}),
        ("model", "seed", 3, set()),  # trained weights have no seed
        ("model", "sha256", "0" * 64, {"model", "corpus", "activations", "sae"}),
        ("corpus", "n_tokens", 30_000, {"corpus", "activations", "sae"}),
        ("corpus", "seed", 1, {"corpus", "activations", "sae"}),
        ("corpus", "prepend_bos", False, {"corpus", "activations", "sae"}),
        ("activations", "dtype", "float32", {"activations", "sae"}),
        ("activations", "hooks", ["blocks.9.hook_resid_post"], {"activations", "sae"}),
        ("sae", "training", {"lr": 1e-3}, {"sae"}),
    ],
)
def test_a_digest_covers_what_determines_the_content_and_nothing_else(
    home, section, key, value, moved
):
    assert changed(home, section, key, value) == moved


def test_papers_share_what_is_equal(home):
    assert ids(home, CHAIN, "one") == ids(home, CHAIN | {"title": "Another"}, "two")


def test_spelling_out_a_default_changes_nothing(home):
    spelled = copy.deepcopy(CHAIN)
    spelled["corpus"]["n_ctx"] = 128
    spelled["model"]["source"] = "package"
    assert ids(home, CHAIN) == ids(home, spelled)


def test_arms_share_tokens_and_differ_in_weights(home):
    write(home, "p", CHAIN | {"arms": {"trained": {}, "random": {"weights": "reinit"}}})
    run = run_of(home, "p")
    trained, random = (run.store("p", "laptop", arm) for arm in ("trained", "random"))
    assert trained["corpus"] == random["corpus"]
    for stage in ("model", "activations", "sae:blocks.8.hook_resid_post"):
        assert trained[stage].id != random[stage].id


def test_null_arms_have_their_variant_and_seed_in_their_identity(home):
    arms = {v: {"weights": v} for v in ("init", "reinit", "reinit_keep_embeddings")}
    write(
        home,
        "p",
        CHAIN | {"arms": {"trained": {}, **arms, "again": {"weights": "init", "seed": 1}}},
    )
    run = run_of(home, "p")
    found = {arm: run.store("p", "laptop", arm)["model"].id for arm in (*arms, "again")}
    assert len(set(found.values())) == 4
    for variant in arms:
        assert f"-{variant}-" in found[variant]


def test_transcoders_have_a_job_of_their_own(home):
    hook, output_hook = "blocks.8.hook_resid_mid", "blocks.8.hook_mlp_out"
    more = {"architecture": "standard", "d_sae": 64, "l1_coefficient": 1.0, "hook": hook}
    dictionaries = {"sae": more, "transcoder": more | {"output_hook": output_hook}}
    card = copy.deepcopy(CHAIN)
    card |= {"activations": {"hooks": [hook, output_hook]}, "sae": {"dictionaries": dictionaries}}
    write(home, "p", card)
    store = run_of(home, "p").store("p", "laptop", "trained")
    plain, pair = store[f"sae:{hook}"], store[f"sae:{hook} to {output_hook}"]
    assert list(plain.spec["sae"]["dictionaries"]) == ["sae"]
    assert "output_hook" not in plain.spec["sae"]
    assert list(pair.spec["sae"]["dictionaries"]) == ["transcoder"]
    assert pair.spec["sae"]["output_hook"] == output_hook
    assert re.fullmatch(r"[\w.-]+", pair.id)


def test_an_arm_may_have_another_corpus_and_the_same_weights(home):
    write(
        home, "p", CHAIN | {"arms": {"trained": {}, "shuffled": {"corpus": {"shuffle": "tokens"}}}}
    )
    run = run_of(home, "p")
    trained, shuffled = (run.store("p", "laptop", arm) for arm in ("trained", "shuffled"))
    assert trained["model"] == shuffled["model"]
    for stage in ("corpus", "activations", "sae:blocks.8.hook_resid_post"):
        assert trained[stage].id != shuffled[stage].id
    assert trained["corpus"].inputs == shuffled["corpus"].inputs
    assert "shuffle" not in trained["corpus"].spec["corpus"]  # which keeps its digest


def local(path: str) -> dict:
    return CHAIN | {"corpus": {"source": "local", "path": path, "n_tokens": 20_000}}


def test_local_text_counts_by_its_bytes_wherever_it_lies(home):
    folder = write(home, "p", CARD)
    (folder / "a.txt").write_text("one text")
    first = ids(home, local("a.txt"))
    (folder / "sub").mkdir()
    (folder / "sub" / "a.txt").write_text("one text")
    assert ids(home, local("sub/a.txt"))["corpus"] == first["corpus"]
    (folder / "a.txt").write_text("another")
    second = ids(home, local("a.txt"))
    assert second["corpus"] != first["corpus"] and second["model"] == first["model"]


def test_a_folder_of_texts_counts_by_names_and_bytes(home):
    folder = write(home, "p", CARD)
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("a")
    first = ids(home, local("texts"))["corpus"]
    (folder / "texts" / "a.txt").touch()
    assert ids(home, local("texts"))["corpus"] == first
    (folder / "texts" / "b.txt").write_text("b")
    assert ids(home, local("texts"))["corpus"] != first


URL_TEXT = {
    "source": "url",
    "url": "https://example.org/play.txt",
    "sha256": "0" * 64,
    "path": "data/play.txt",
    "prepend_bos": False,
    "close_documents": False,
    "n_tokens": 20_000,
}


def of_url(home: Path, **over):
    """The run of a paper whose corpus is a text of a URL, and its corpus's item."""
    section = {"corpus": URL_TEXT | over, "tokenizer": {"kind": "char"}}
    write(home, "p", CHAIN | section)
    run = run_of(home, "p", roots=["."])
    return run, run.store("p", "laptop", "trained")["corpus"]


def test_a_text_of_a_url_counts_by_its_digest_and_a_local_copy_is_an_input(home):
    _, absent = of_url(home)
    assert absent.id.startswith("play-")
    assert absent.spec["corpus"]["path"] == "data/play.txt" and "text" not in absent.inputs
    (home / "data").mkdir()
    (home / "data" / "play.txt").write_text("text")
    _, present = of_url(home)
    assert (present.id, present.spec) == (absent.id, absent.spec)
    assert present.inputs == absent.inputs | {"text": "data/play.txt"}
    assert of_url(home, url="https://example.org/a/play.txt")[1].id == absent.id
    assert of_url(home, sha256="1" * 64)[1].id != absent.id


def test_a_local_copy_outside_the_roots_is_refused(home, outside):
    assert "outside the paper's folder" in fault(of_url, home, path=str(outside / "secret.txt"))


def test_corpora_of_one_text_share_its_tokenizer(home):
    def tokenizer(**over):
        run, item = of_url(home, **over)
        return run.item(*item.inputs["tokenizer"].split("/"))

    assert tokenizer() == tokenizer(n_tokens=30_000, split="tail", n_ctx=64)
    assert tokenizer().id != tokenizer(whole_file=True).id


def test_upstream_of_an_artefact_is_all_that_it_is_made_from(home):
    run, corpus = of_url(home)
    tokenizer = f"results/store/{corpus.inputs['tokenizer']}/model.json"
    assert "/tokenizer/char-" in tokenizer
    own = [f"results/store/corpus/{corpus.id}/{n}" for n in ("documents.parquet", "tokens.parquet")]
    assert run.upstream([corpus]) == [*own, tokenizer]
    sae = run.store("p", "laptop", "trained")["sae:blocks.8.hook_resid_post"]
    above = run.upstream([sae])
    assert [f.split("/")[2] for f in above] == [
        "activations", "corpus", "corpus", "model", "sae", "tokenizer",
    ]  # fmt: skip
    assert set(run.upstream([corpus])) < set(above)


def test_upstream_follows_the_raw_model_whose_tokenizer_made_the_tokens(home):
    write(home, "p", CHAIN | {"model": {"processing": "compatibility"}})
    run = run_of(home, "p")
    store = run.store("p", "laptop", "trained")
    raw = store["corpus"].inputs["tokenizer"]
    assert raw != f"model/{store['model'].id}"
    assert f"results/store/{raw}/model.json" in run.upstream(store.values())


def test_a_large_file_is_hashed_anew_when_it_changes(home):
    folder = write(home, "p", CARD)
    big = folder / "big.txt"
    big.write_bytes(b"x" * (2 << 20))
    first, again = paths.path_digest(big), paths.path_digest(big)
    big.write_bytes(b"y" * (2 << 20))
    assert first == again != paths.path_digest(big)


def test_an_item_is_found_by_its_id_at_any_scale(home):
    scales = {"smoke": {"corpus": {"n_tokens": 500}, "sae": None}}
    write(home, "p", CHAIN | {"scales": scales})
    small = run_of(home, "p", scale="smoke").store("p", "smoke", "trained")["corpus"]
    assert run_of(home, "p").item("corpus", small.id) == small
    assert "no paper of config.yaml makes this" in fault(
        run_of(home, "p").item, "corpus", "wiki-000000000000"
    )


def test_tables_of_a_paper(home):
    own = {"toy": {"tables": ["runs", "cells"]}}
    folder = write(home, "p", CHAIN | {"own": own, "features": {"saes": ["topk"]}})
    tables = load(folder, "smoke").tables()
    assert tables == {
        name: f"results/smoke/p/{name}.parquet"
        for name in (
            "toy/runs",
            "toy/cells",
            "evaluation/trained",
            "evaluation/trained_history",
            "features/topk",
        )
    }


def test_texts_state_the_numbers_of_their_scale():
    """A caption that names a setting shows what it is at the scale of the page."""
    folder = Path(__file__).parents[2] / "rules/papers/topk_saes"
    for scale in ("smoke", "laptop", "paper"):
        spec = papers.load(folder, scale).spec
        wanted = f"last {spec.sae.training.dead_rows:,} training rows"
        assert any(wanted in " ".join(f.caption.split()) for f in spec.figures.values())
        assert f"after {spec.sae.training.dead_rows:,} silent rows" in " ".join(spec.deviations)


@pytest.mark.parametrize("place", ["sae.training.no_rows", "model.nothing", "sae.training", "a.b"])
def test_a_text_that_names_no_setting_is_told(place):
    spec = papers.load(Path(__file__).parents[2] / "rules/papers/topk_saes", "smoke").spec
    wrong = spec.model_copy(update={"deviations": [f"after {{{place}}} rows, {{k}} of {{}}"]})
    with pytest.raises(RetraceError, match=f"no setting '{place}'"):
        folders.filled(wrong, "paper.yaml (smoke)")


def test_a_caption_may_name_a_metric():
    spec = papers.load(Path(__file__).parents[2] / "rules/papers/topk_saes", "smoke").spec
    caption = "{trained.topk.l0} of {sae.training.batch_size} rows"
    figure = spec.figures["scaling"].model_copy(update={"caption": caption})
    kept = folders.filled(spec.model_copy(update={"figures": {"scaling": figure}}), "p")
    assert kept.figures["scaling"].caption == "{trained.topk.l0} of 256 rows"


def test_a_layout_of_ones_own_is_part_of_the_models_id(home):
    """It lies beside paper.yaml, or in a folder of papers_dirs, and its bytes count."""
    model = {"source": "folder", "path": "weights", "family": "own.json"}
    folder = write(home, "p", CARD | {"model": model, "scales": {}})
    (folder / "weights").mkdir()
    (folder / "weights" / "config.json").write_text("{}")
    (home / "papers" / "own.json").write_text("{}")
    shared = run_of(home, "p").store("p", "laptop", "model")["model"]
    assert shared.spec["model"]["family"].endswith("papers/own.json")
    (folder / "own.json").write_text("{}")
    own = run_of(home, "p").store("p", "laptop", "model")["model"]
    assert own.spec["model"]["family"].endswith("papers/p/own.json") and own.id == shared.id
    (folder / "own.json").write_text("{ }")
    assert run_of(home, "p").store("p", "laptop", "model")["model"].id != own.id
    (folder / "paper.yaml").write_text(
        yaml.safe_dump(CARD | {"model": model | {"family": "none.json"}, "scales": {}})
    )
    said = fault(run_of, home, "p")
    assert "none.json" in said and "does not exist" in said
    ids = {}
    for kind in ("llama", "mistral"):  # types of the table need no file
        (folder / "paper.yaml").write_text(
            yaml.safe_dump(CARD | {"model": model | {"family": kind}, "scales": {}})
        )
        item = run_of(home, "p").store("p", "laptop", "model")["model"]
        assert item.spec["model"]["family"] == kind
        ids[kind] = item.id
    assert len({own.id, *ids.values()}) == 3
