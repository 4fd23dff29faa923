"""config.yaml and paper.yaml: every fault is one sentence that names the key."""

import copy

import pytest

from pipeline.errors import RetraceError
from pipeline.spec import base as spec_base
from pipeline.spec import paper as spec
from pipeline.spec.paper import Config, PaperSpec
from pipeline.spec.sae import SaeSpec

HOOK = "blocks.8.hook_resid_post"
FULL = {
    "title": "T",
    "authors": "A",
    "year": 2024,
    "url": "https://example.org",
    "model": {},
    "arms": {"trained": {}, "random": {"weights": "reinit"}},
    "corpus": {"n_tokens": 20_000},
    "activations": {"hooks": [HOOK]},
    "sae": {
        "training": {"n_rows": 50_000},
        "dictionaries": {
            "topk": {"architecture": "topk", "d_sae": 512, "grid": {"k": [16, 32]}},
            "l1": {"architecture": "standard", "d_sae": 512, "l1_coefficient": 0.5},
        },
    },
    "features": {"saes": ["topk_k32"]},
    "attribution": {
        "sae": "topk_k32",
        "prompts": {"capital": {"prompt": "The", "answer": " a", "foil": " b"}},
    },
}
ORDER = {"id": "c", "text": "t", "source": "s", "kind": "order", "holds": "a < b"}
VALUE = {
    "id": "v", "text": "t", "source": "s", "kind": "value", "metric": "m", "paper": 1.0,
    "tolerance": 0.1, "reason": "r",
}  # fmt: skip


def laid(path: str, value, base: dict = FULL) -> dict:
    """A copy of `base` with the key at the dotted `path` set."""
    out = copy.deepcopy(base)
    *inner, last = path.split(".")
    at = out
    for key in inner:
        at = at[key]
    at[last] = value
    return out


def fault(data: dict, cls=PaperSpec) -> str:
    with pytest.raises(RetraceError) as e:
        spec.parse(cls, data, "paper.yaml")
    assert "\n" not in str(e.value) and str(e.value).startswith("paper.yaml: ")
    return str(e.value)


def test_a_whole_paper_is_valid():
    paper = spec.parse(PaperSpec, FULL, "paper.yaml")
    assert paper.arm_names() == ["trained", "random"]
    assert paper.model_of("random").weights == "reinit"
    assert set(paper.saes_of("random")) == {"topk_k16", "topk_k32", "l1"}
    assert {s.hook for s in paper.saes_of("trained").values()} == {HOOK}


@pytest.mark.parametrize(
    "path, value, said",
    [
        ("modle", {}, "unknown key 'modle' (did you mean 'model'?)"),
        ("corpus.n_token", 5, "corpus: unknown key 'n_token' (did you mean 'n_tokens'?)"),
        ("sae.training.learning_rate", 1, "sae.training: unknown key 'learning_rate'"),
        (
            "sae.dictionaries.topk.d_sea",
            4,
            "sae.dictionaries.topk: unknown key 'd_sea' (did you mean 'd_sae'?)",
        ),
        ("arms.random", {"wieghts": "reinit"}, "arms.random: unknown key 'wieghts' (did you mean"),
        ("arms.random", {"corpus": {"n_token": 5}}, "arms.random: corpus: unknown key 'n_token'"),
        ("arms.random", {"corpus": 5}, "arms.random: corpus: must be an overlay on a section corp"),
        ("arms.random", {"weights": "random"}, "arms.random: weights: Input should be 'trained'"),
        ("corpus.n_ctx", "many", "corpus.n_ctx: Input should be a valid integer"),
        ("corpus.n_ctx", 128.5, "corpus.n_ctx: "),
        ("corpus.n_ctx", 1, "corpus.n_ctx: Input should be greater than or equal to 2"),
        ("corpus.n_tokens", 10, "n_tokens 10 is less than one block of 128"),
        ("sae.training.lr", 0, "sae.training.lr: Input should be greater than 0"),
        ("sae.training.lr", float("nan"), "sae.training.lr: "),
        ("sae.training.betas", [0.9], "sae.training.betas"),
        ("activations.hooks", [], "activations.hooks: "),
        ("activations.hooks", ["resid_post"], "activations.hooks.0: "),
        ("activations.dtype", "float64", "activations.dtype: Input should be 'float32', 'float16'"),
        ("model", {"sha256": "abc"}, "model.sha256: "),
        ("model", {"source": "hub", "repo": "a/b", "revision": "main"}, "revision 'main' is not"),
        ("model", {"source": "hub"}, "source: hub needs repo"),
        ("model", {"source": "folder"}, "source: folder needs path"),
        (
            "model",
            {"source": "training", "run": "tiny", "weights": "init"},
            "weights: init of run 'tiny' is the model before its first step; write step: 0",
        ),
        ("model", {"name": "../up"}, "model.name: "),
        ("model", {"file": "../../x.gguf"}, "'../../x.gguf' leads out of the package"),
        ("corpus", {"file": "/etc/passwd"}, "'/etc/passwd' leads out of the package"),
        ("corpus", {"package": "../../up==1"}, "corpus.package: "),
        ("sae.dictionaries.topk.grid", {"k": [1] * 40, "d_sae": [1] * 40}, "grid makes 1600"),
        ("corpus", {"source": "local"}, "source: local needs path"),
        ("url", "javascript:alert(1)", "url: "),
        ("title", None, "title: "),
        ("sae.dictionaries.topk.grid", {"k": [16], "kk": [1]}, "grid: unknown field 'kk'"),
        ("sae.dictionaries.topk.grid", {"k": ["few"]}, "sae.dictionaries.topk.grid.k"),
        ("sae.dictionaries.topk.grid", {"k": [1.5]}, "sae: dictionaries.topk: grid: k: "),
        ("sae.dictionaries.topk.grid", {}, "architecture: topk needs k"),
        ("sae.dictionaries.l1.l1_coefficient", 0, "architecture: standard needs l1_coefficient"),
        ("sae.dictionaries.l1.d_sae", 0, "d_sae (the number of latents) is missing"),
        ("sae.dictionaries.l1.d_sae", 60_000, "l1: 60000 latents are wider than 50000 training"),
        ("sae.dictionaries.l1.d_sae", 30_000, "sae.l1: 30000 latents are wider than 20000 tokens"),
        ("sae.dictionaries.topk.d_sae", 20, "sae.topk_k32: k 32 is more than its 20 latents"),
        ("sae.dictionaries.l1.hook", "blocks.9.hook_resid_post", "is not stored (did you mean"),
        (
            "sae.dictionaries.l1.output_hook",
            "blocks.9.hook_mlp_out",
            "hook_mlp_out' is not",
        ),
        ("sae.dictionaries.topk.output_hook", "blocks.8.hook_mlp_out", "SAELens has no topk trans"),
        ("sae.dictionaries.l1.arms", ["trianed"], "unknown arm 'trianed' (did you mean"),
        ("features.saes", ["topk_k33"], "features.saes: no SAE 'topk_k33' (did you mean"),
        ("attribution.arm", "rnd", "attribution.sae: SAE 'topk_k32' is not trained on arm 'rnd'"),
        ("attribution.prompts", {}, "attribution.prompts: "),
        ("circuits", {"prompts": "p", "methods": ["epa"]}, "circuits.methods.0: Input should be"),
        ("circuits", {"prompts": "p", "methods": ["eap", "eap"]}, "methods: 'eap' stands twice"),
        ("circuits", {"prompts": "p", "seeds": [1, 2, 1]}, "circuits.seeds: seed 1 stands twice"),
        ("circuits", {"prompts": "p", "seed": 3}, "unknown key 'seed' (did you mean 'seeds'?)"),
        ("circuits", {"prompts": "p", "without": ["rnd"]}, "circuits.without: unknown arm 'rnd'"),
        ("circuits", {"propmts": "p"}, "unknown key 'propmts' (did you mean 'prompts'?)"),
        ("corpus", None, "section activations needs a section corpus"),
        ("sae.training.checkpoint_seconds", 7200, "is no setting of a paper, since it changes no"),
        ("own", {"stage": {}}, "own.stage: needs tables"),
        ("own", {"stage": {"tables": "one"}}, "own.stage: needs tables"),
        ("own", {"stage": {"tables": ["../up"]}}, "own.stage: '../up' cannot name a table"),
        ("figures", {"a b": {}}, "figures.a b"),
        ("claims", [ORDER, ORDER], "claim id 'c' stands twice"),
        ("claims", [ORDER | {"holds": ""}], "claim 'c': kind order needs holds"),
        ("claims", [VALUE | {"paper": None}], "claim 'v': kind value needs paper"),
        ("claims", [VALUE | {"reason": ""}], "claim 'v': kind value needs metric, tolerance"),
        ("claims", [VALUE | {"tolerance": -1}], "claims.0.tolerance: "),
        ("claims", [VALUE | {"paper": float("nan")}], "claims.0.paper: "),
        ("claims", [ORDER | {"comparable": False}], "claim 'c': comparable: false needs a reason"),
        (
            "claims",
            [ORDER | {"scales": ["store"]}],
            "scales.0: 'store' cannot name a scale",
        ),
    ],
)
def test_a_fault_of_paper_yaml_is_one_sentence(path, value, said):
    assert said in fault(laid(path, value))


def test_a_transcoder_needs_the_same_tokens_at_both_hooks():
    card = laid("sae.dictionaries.l1.output_hook", HOOK)
    assert spec.parse(PaperSpec, card, "paper.yaml").sae.dictionaries["l1"].output_hook == HOOK
    attributed = laid("attribution.sae", "l1", card)
    assert spec.parse(PaperSpec, attributed, "paper.yaml").attribution.sae == "l1"
    card["activations"]["max_norm_ratio"] = 2.75
    assert "max_norm_ratio drops tokens hook by hook; set it to 0" in fault(card)


@pytest.mark.parametrize(
    "data, said",
    [
        ({"papers": ["a"], "scal": "smoke"}, "unknown key 'scal' (did you mean 'scale'?)"),
        ({"papers": ["a"], "scale": "a b"}, "scale: String should match pattern"),
        ({"papers": ["a"], "device": "gpu"}, "device: "),
        ({"papers": ["../a"]}, "papers.0: "),
        ({"papers": 5}, "papers: "),
        ({"papers": []}, "papers: "),
        ({"papers": ""}, "papers: "),
        ({"papers": ["a", "a"]}, "papers: 'a' stands twice"),
        ({"papers": ["a"], "strict": "perhaps"}, "strict: "),
        ({}, "papers: Field required"),
    ],
)
def test_a_fault_of_config_yaml_is_one_sentence(data, said):
    assert said in fault(data, Config)


def test_papers_may_be_given_as_one_string():
    assert Config.model_validate({"papers": "a,b"}).papers == ["a", "b"]


def test_a_grid_expands_to_every_combination():
    sae = SaeSpec(architecture="topk", grid={"k": [16, 32], "d_sae": [64, 128]})
    out = sae.expand("topk")
    assert list(out) == ["topk_k16_d64", "topk_k16_d128", "topk_k32_d64", "topk_k32_d128"]
    assert (out["topk_k32_d64"].k, out["topk_k32_d64"].d_sae) == (32, 64)
    assert all(s.grid == {} for s in out.values())


def test_names_of_a_grid_are_names():
    sae = SaeSpec(architecture="standard", d_sae=8, grid={"l1_coefficient": [0.5, 1e-5, 3]})
    assert list(sae.expand("l1")) == ["l1_c0p5", "l1_c1em05", "l1_c3"]


def test_two_dictionaries_of_one_name_are_refused():
    twin = {"architecture": "topk", "d_sae": 512, "k": 8}
    assert "two dictionaries 'topk_k16'" in fault(laid("sae.dictionaries.topk_k16", twin))


def test_sections_are_immutable():
    paper = spec.parse(PaperSpec, FULL, "paper.yaml")
    with pytest.raises(ValueError):
        paper.corpus.n_ctx = 7


@pytest.mark.parametrize(
    "over, judged",
    [
        ({}, [True, True, True]),
        ({"scales": ["paper"]}, [False, False, True]),
    ],
)
def test_where_an_order_is_judged(over, judged):
    claim = spec.Claim.model_validate(ORDER | over)
    assert [claim.judged_at(s) for s in spec_base.SCALES] == judged
    assert claim.judged_at("cluster") == (not over)  # a scale of the paper's own


def test_a_value_is_judged_at_the_papers_scale_alone():
    claim = spec.Claim.model_validate(VALUE)
    assert [claim.judged_at(s) for s in spec_base.SCALES] == [False, False, True]


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ({"hook": ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]},
         "f: grid.hook.0: only numbers vary in a grid, got 'blocks.0.hook_resid_post'; write a"),
        ({"k": 8}, "f: grid.k: Input should be a valid list, got '8'"),
        ({"k": [True]}, "f: grid.k.0: only numbers vary in a grid, got 'True'"),
        ([8, 16], "f: grid: Input should be a valid dictionary"),
    ],
)  # fmt: skip
def test_a_grid_of_something_else_is_one_sentence(grid, said):
    with pytest.raises(RetraceError) as e:
        section = {"architecture": "topk", "hook": "h", "d_sae": 8, "k": 1, "grid": grid}
        spec.parse(SaeSpec, section, "f")
    assert said in str(e.value) and "\n" not in str(e.value) and "union" not in str(e.value)


def test_nothing_of_a_model_trained_here_can_be_folded():
    section = {"source": "training", "run": "r", "processing": "compatibility"}
    with pytest.raises(RetraceError, match="trained here have nothing to fold, so write raw"):
        spec.parse(spec.ModelSpec, section, "f")


@pytest.mark.parametrize(
    ("given", "want"),
    [("false", False), ("true", True), ("False", False), ("0", False), ("no", False)],
)
def test_switches_of_the_command_line_mean_what_they_say(given, want):
    """--config hub=false hands over the text 'false', which Python takes for true."""
    from snakemake.cli import parse_config

    raw = parse_config([f"{key}={given}" for key in ("hub", "strict", "keep_activations")])
    config = spec.parse(spec.Config, {"papers": ["ioi"], **raw}, "config.yaml")
    assert {config.hub, config.strict, config.keep_activations} == {want}


@pytest.mark.parametrize("given", ["hub=maybe", "scale=12e45", "papers=[1]", "strict=", "papers="])
def test_a_setting_of_the_command_line_that_is_none_is_one_sentence(given):
    from snakemake.cli import parse_config

    raw = {"papers": ["ioi"]} | parse_config([given])
    with pytest.raises(RetraceError, match=rf"^config.yaml: {given.split('=')[0]}"):
        spec.parse(spec.Config, raw, "config.yaml")
