"""What stands once in a paper.yaml counts for many, and a mistake in it is one sentence."""

import pytest

from pipeline.errors import RetraceError
from pipeline.papers.lint import validated
from pipeline.spec import once
from pipeline.spec.paper import PaperSpec, parse

CARD = {"title": "t", "authors": "a", "year": 2024, "url": "https://x"}
CLAIM = {"text": "t", "source": "s"}


def claims(*entries: dict) -> list:
    """The claims of a paper, as a job sees them: with what the file says and nothing else."""
    spec = parse(PaperSpec, CARD | {"claims": list(entries)}, "paper.yaml")
    return [c.model_dump(exclude_unset=True) for c in spec.claims]


def test_defaults_count_for_the_claims_below_until_the_next():
    a, b, c = (CLAIM | {"id": i, "holds": "x < y"} for i in "abc")
    found = claims(a, {"defaults": {"budget": "none", "scales": ["paper"]}}, b, {"defaults": {}}, c)
    assert found == [
        a | {"kind": "order"},
        b | {"kind": "order", "budget": "none", "scales": ["paper"]},
        c | {"kind": "order"},
    ]


def test_what_a_claim_says_itself_counts_and_null_leaves_a_default_out():
    claim = CLAIM | {"id": "a", "holds": "x < y"}
    defaults = {"defaults": {"budget": "none", "scales": ["paper"], "no_null_arm": "why"}}
    over = {"budget": None, "scales": ["smoke"], "null_arm": "z"}
    assert claims(defaults, claim | over) == [
        claim | {"kind": "order", "scales": ["smoke"], "null_arm": "z"}
    ]


def test_a_claim_may_begin_with_its_id_and_text():
    assert claims({"rises": "It rises", "source": "s", "holds": "x < y"}) == [
        {"id": "rises", "text": "It rises", "source": "s", "kind": "order", "holds": "x < y"}
    ]


def test_claims_of_rows_are_filled_row_by_row_and_numbers_stay_numbers():
    rows = [{"sae": "a", "f1": [0.25, 0.5]}, {"sae": "b", "f1": [0.7316, 0.001]}]
    made = CLAIM | {"id": "{sae}_{l0}", "text": "{f1[0]:.3f} ± {f1[1]} of {sae} and {other.key}"}
    made |= {"metric": "{sae}.f1", "paper": "{f1[0]}", "tolerance": "{f1[1]}", "reason": "r"}
    made |= {"null_arm": {"{sae}": "random"}}
    a, b = claims({"defaults": {"with": {"l0": 25}}}, {"each": rows, "claims": [made]})
    assert (a["id"], a["text"]) == ("a_25", "0.250 ± 0.5 of a and {other.key}")
    assert (b["metric"], b["paper"], b["tolerance"]) == ("b.f1", 0.7316, 0.001)
    assert b["null_arm"] == "abs(random.f1 - 0.7316) <= 0.001"


@pytest.mark.parametrize(
    "short, whole",
    [
        ("{a,b}.x > 0.5", "a.x > 0.5 and b.x > 0.5"),
        ("m.{a, b}.x > {c, d}.y and z < 1", "m.a.x > c.y and m.b.x > d.y and z < 1"),
        ("a.x > max({b,c}.x, d.x)", "a.x > max(b.x, c.x, d.x)"),
        ("{a,b}.x > min({c,d}.x)", "a.x > min(c.x, d.x) and b.x > min(c.x, d.x)"),
        ("abs(x - y) <= 0.1", "abs(x - y) <= 0.1"),
    ],
)
def test_braces_in_an_expression_are_written_out(short, whole):
    assert once.spelt_out(short) == whole
    assert once.spelt_out(whole) == whole


def test_a_null_arm_may_put_names_in_the_place_of_others():
    claim = CLAIM | {"id": "a", "holds": "two.x > 1 and two.y < text_two.y and one.x > two.x.two"}
    (found,) = claims(claim | {"null_arm": {"two": "one", "one": "two"}})
    assert found["null_arm"] == "one.x > 1 and one.y < text_two.y and two.x > one.x.two"


def test_a_null_arm_may_stand_before_every_metric():
    claim = CLAIM | {
        "id": "a",
        "holds": "a.test > 0.99 and max(b.x, a_1.y.z) < 2 * abs(a.test - 1.5e-3)",
    }
    (found,) = claims(claim | {"null_arm": {"*": "null.*"}})
    want = "null.a.test > 0.99 and max(null.b.x, null.a_1.y.z) < 2 * abs(null.a.test - 1.5e-3)"
    assert found["null_arm"] == want
    value = CLAIM | {"id": "b", "metric": "b.x", "paper": 0.5, "tolerance": 0.1, "reason": "r"}
    (found,) = claims(value | {"null_arm": {"*": "null.*"}})
    assert found["null_arm"] == "abs(null.b.x - 0.5) <= 0.1"


def test_a_null_arm_of_the_defaults_is_left_to_a_claim_that_says_another():
    above = {"defaults": {"null_arm": {"two": "one"}}}
    rows = [
        {"id": "a", "holds": "two.x > 1"},
        {"id": "b", "holds": "three.x > 1", "null_arm": {"three": "one"}},
        {"id": "c", "holds": "three.x > 1", "no_null_arm": "why"},
        {"id": "d", "holds": "three.x > 1", "null_arm": None},
    ]
    a, b, c, d = claims(above, *(CLAIM | row for row in rows))
    assert a["null_arm"] == "one.x > 1" and b["null_arm"] == "one.x > 1"
    assert c["no_null_arm"] == "why" and not {"null_arm"} & {*c, *d}


@pytest.mark.parametrize(
    "keys, kind",
    [({"holds": "x < y"}, "order"), ({"paper": 1, "comparable": False, "reason": "r"}, "value")],
)
def test_the_kind_of_a_claim_follows_from_its_keys(keys, kind):
    assert claims(CLAIM | {"id": "a"} | keys)[0]["kind"] == kind
    assert claims(CLAIM | {"id": "a", "kind": kind} | keys)[0]["kind"] == kind


@pytest.mark.parametrize(
    "entries, said",
    [
        ([CLAIM | {"id": "a"}], "claim 'a': has neither holds: (an order) nor paper: (a publis"),
        ([CLAIM | {"id": "a", "holds": "x", "paper": 1}], "claim 'a': has both holds: (an order)"),
        ([{"defaults": {"sorce": "s"}}], "unknown key 'sorce' (did you mean 'source'?)"),
        ([CLAIM | {"id": "a", "holds": "x < y", "defaults": {}}], "unknown key 'defaults'"),
        ([{"each": [{"x": 1}]}], "claims: each: must be a list of mappings, beside claims: a li"),
        ([CLAIM | {"id": "{x:d}", "holds": "x < y", "with": {"x": "a"}}], "'{x:d}' cannot be fil"),
        ([CLAIM | {"id": "a", "holds": "{a,b}.x < {c,d,e}.y"}], "hold different numbers of names"),
        ([CLAIM | {"id": "a", "holds": "x < y", "null_arm": {"z": "w"}}], "no 'z' in 'x < y'"),
    ],
)
def test_a_mistake_is_one_sentence_and_lint_has_the_same(entries, said):
    with pytest.raises(RetraceError) as e:
        claims(*entries)
    assert said in str(e.value) and "\n" not in str(e.value)
    assert [said in s for s in validated(CARD | {"claims": entries})[1]] == [True]


def test_lint_tells_all_that_a_claim_without_id_and_source_lacks():
    said = validated(CARD | {"claims": [{"text": "t", "holds": "x < y"}]})[1]
    assert sorted(said) == [f"claims.0.{key}: is missing; add it" for key in ("id", "source")]


def test_lint_names_the_claim_that_is_at_fault_below_defaults():
    good = CLAIM | {"id": "good", "holds": "x < y"}
    entries = [{"defaults": {}}, good, good | {"id": "bad", "tolerance": "wide"}]
    (said,) = validated(CARD | {"claims": entries})[1]
    assert said.startswith("claims.bad.tolerance: ")


# --- dictionaries and hooks ----------------------------------------------------------------


def test_a_dictionary_at_each_layer_neighbours_layer_by_layer():
    resid, mlp = ("blocks.{layer}.hook_" + what for what in ("resid_post", "mlp_out"))
    made = once.dictionaries(
        {
            "defaults": {"architecture": "topk", "k": 8},
            "dictionaries": {
                "mlp": {"hook": mlp, "grid": {"layer": [4, 8]}},
                "resid": {"hook": resid, "k": 16, "grid": {"layer": [4, 8], "d_sae": [32, 64]}},
                "one": {"hook": "blocks.4.hook_mlp_out", "k": None},
                "theirs": {"source": "hub", "repo": "a/b"},
            },
        }
    )
    sizes = {"grid": {"d_sae": [32, 64]}}
    topk = {"architecture": "topk", "k": 8}
    assert list(made) == ["dictionaries"]
    assert list(made["dictionaries"].items()) == [
        ("mlp_4", topk | {"hook": "blocks.4.hook_mlp_out"}),
        ("resid_4", topk | {"hook": "blocks.4.hook_resid_post", "k": 16} | sizes),
        ("mlp_8", topk | {"hook": "blocks.8.hook_mlp_out"}),
        ("resid_8", topk | {"hook": "blocks.8.hook_resid_post", "k": 16} | sizes),
        ("one", {"architecture": "topk", "hook": "blocks.4.hook_mlp_out"}),
        ("theirs", {"source": "hub", "repo": "a/b"}),
    ]


def test_a_transcoder_at_each_layer_has_both_its_hooks_there():
    hooks = {
        "hook": "blocks.{layer}.ln2.hook_normalized",
        "output_hook": "blocks.{layer}.hook_mlp_out",
    }
    made = once.dictionaries({"dictionaries": {"t": {**hooks, "grid": {"layer": [3]}}}})
    assert made["dictionaries"] == {
        "t_3": {"hook": "blocks.3.ln2.hook_normalized", "output_hook": "blocks.3.hook_mlp_out"}
    }


def test_a_grid_of_hooks_names_each_by_its_hook():
    hooks = ["blocks.{layer}.hook_mlp_out", "blocks.{layer}.hook_resid_post"]
    grid = {"hook": hooks, "layer": [2, 5]}
    made = once.dictionaries({"dictionaries": {"a": {"d_sae": 8, "grid": grid}}})["dictionaries"]
    assert list(made) == ["a_2_mlp_out", "a_2_resid_post", "a_5_mlp_out", "a_5_resid_post"]
    assert made["a_5_mlp_out"] == {"d_sae": 8, "hook": "blocks.5.hook_mlp_out"}
    grid = {"hook": ["blocks.2.hook_mlp_out", "ln_final.hook_normalized"]}
    made = once.dictionaries({"dictionaries": {"a": {"grid": grid}}})["dictionaries"]
    assert list(made) == ["a_2_mlp_out", "a_ln_final_normalized"]


def test_hooks_are_stored_at_each_layer():
    hooks = ["hook_embed", "blocks.{layer}.hook_mlp_out", "blocks.{layer}.hook_resid_post"]
    assert once.activations({"hooks": hooks, "layers": [4, 8], "dtype": "float32"}) == {
        "hooks": [
            "hook_embed",
            "blocks.4.hook_mlp_out",
            "blocks.4.hook_resid_post",
            "blocks.8.hook_mlp_out",
            "blocks.8.hook_resid_post",
        ],
        "dtype": "float32",
    }


@pytest.mark.parametrize(
    "sections, said",
    [
        ({"activations": {"hooks": ["blocks.1.hook_mlp_out"], "layers": [1]}}, "no hook names its"),
        (
            {"activations": {"hooks": ["blocks.{layer}.hook_mlp_out"], "layers": 1}},
            "list of layers",
        ),
        ({"sae": {"dictionaries": {"a": {"grid": {"layer": [1]}}}}}, "no hook names its {layer}"),
        ({"sae": {"dictionaries": {"a": {"hook": "{layer}", "grid": {"layer": 1}}}}}, "be a list"),
        (
            {"sae": {"dictionaries": {"a": {"hook": "{layer}", "grid": {"layer": [1, 1]}}}}},
            "the grids make two dictionaries 'a_1'",
        ),
    ],
)
def test_layers_that_nothing_takes_are_refused(sections, said):
    with pytest.raises(RetraceError) as e:
        parse(PaperSpec, CARD | sections, "paper.yaml")
    assert said in str(e.value)


def test_what_is_written_out_stays_as_it_is():
    paper = CARD | {"claims": [CLAIM | {"id": "a", "holds": "x < y"}], "sae": {"dictionaries": {}}}
    assert once.expanded(once.expanded(paper)) == paper
    assert once.expanded(["no mapping"]) == ["no mapping"]
