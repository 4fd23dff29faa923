"""The JSON schemas: in step with the models, and of one mind with them on every paper."""

import json
import os
import re
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from pipeline.papers import schema
from pipeline.papers.scaffold import scaffold

ROOT = Path(__file__).parents[2]
CARDS = [*sorted((ROOT / "rules/papers").glob("*/paper.yaml")), ROOT / "tests/made_up/paper.yaml"]
PAPER = Draft202012Validator(schema.paper())


@pytest.mark.parametrize("name", ["paper.json", "config.json"])
def test_the_files_are_those_of_the_models(name):
    written = (schema.FOLDER / name).read_text()
    assert written == schema.files()[name], "run python -m pipeline schema"
    Draft202012Validator.check_schema(json.loads(written))


def faults(card: str) -> list[str]:
    return [e.json_path for e in PAPER.iter_errors(yaml.safe_load(card))]


@pytest.mark.parametrize("file", CARDS, ids=lambda f: f.parent.name)
def test_every_paper_fits(file):
    assert faults(file.read_text()) == []


def test_config_yaml_fits_and_a_mistyped_key_does_not():
    config = yaml.safe_load((ROOT / "config.yaml").read_text())
    check = Draft202012Validator(schema.config())
    assert check.is_valid(config)
    assert not check.is_valid(config | {"scal": "smoke"})
    assert not check.is_valid(config | {"scale": "not a name"})


@pytest.mark.parametrize(
    "old, new, path",
    [
        ("figures:\n", "figurs:\n", "$"),
        ("year: 2026", "year: soon", "$.year"),
        ("    source: any text", "    of: us\n    source: any text", "$.claims[0].of"),
        ("    source: any text on high-dimensional geometry\n", "", "$.claims[0]"),
        ("    own: {measure: {n_pairs: 6_000}}", "    figurs: {}", "$.scales.smoke"),
        ("  smoke:\n", "  a scale:\n", "$.scales"),
    ],
)
def test_what_the_models_refuse_an_editor_marks(tmp_path, old, new, path):
    card = (scaffold("ours", tmp_path) / "paper.yaml").read_text()
    assert card.count(old) == 1 and faults(card) == []
    assert faults(card.replace(old, new)) == [path]


def test_an_overlay_needs_no_required_key_and_may_remove_one():
    card = {"title": "t", "authors": "a", "year": 2024, "url": "https://x"}
    over = {"sae": {"training": {"n_rows": 5}}, "figures": {"f": None}, "features": None}
    assert PAPER.is_valid(card | {"scales": {"smoke": over}})
    assert not PAPER.is_valid(card | {"features": {}})  # where it is no overlay, saes are required


def test_claims_and_dictionaries_may_leave_to_defaults_what_they_share():
    card = {"title": "t", "authors": "a", "year": 2024, "url": "https://x"}
    claims = [{"defaults": {"source": "Section 3"}}, {"id": "a", "text": "t", "holds": "x < y"}]
    assert PAPER.is_valid(card | {"claims": claims})
    assert not PAPER.is_valid(card | {"claims": claims[1:]})  # nothing gives it a source
    assert not PAPER.is_valid(card | {"claims": [{"defaults": {"sourc": "Section 3"}}, claims[1]]})
    made = {"dictionaries": {"a": {"d_sae": 64, "grid": {"layer": [4, 8]}}}}
    assert PAPER.is_valid(card | {"sae": made | {"defaults": {"architecture": "topk"}}})
    assert not PAPER.is_valid(card | {"sae": made})
    assert PAPER.is_valid(
        card | {"activations": {"hooks": ["blocks.{layer}.hook_mlp_out"], "layers": [4, 8]}}
    )


def test_claims_of_rows_and_null_arms_of_other_names_are_known():
    card = {"title": "t", "authors": "a", "year": 2024, "url": "https://x"}
    claim = {"id": "{a}", "text": "t", "source": "s", "holds": "{a}.x < y", "null_arm": {"y": "z"}}
    rows = {"each": [{"a": "one"}], "claims": [claim]}
    assert PAPER.is_valid(card | {"claims": [rows]})
    assert not PAPER.is_valid(card | {"claims": [rows | {"claims": [claim | {"sorce": "s"}]}]})
    assert PAPER.is_valid(card | {"claims": [claim | {"id": "one", "with": {"a": "one"}}]})
    assert not PAPER.is_valid(card | {"claims": [claim | {"id": "one", "null_arm": 3}]})


def test_a_claim_that_begins_with_its_id_and_text_is_known():
    card = {"title": "t", "authors": "a", "year": 2024, "url": "https://x"}
    claim = {"rises": "It rises", "source": "s", "holds": "x < y"}
    assert PAPER.is_valid(card | {"claims": [claim]})
    assert not PAPER.is_valid(card | {"claims": [claim | {"tolerance": "wide"}]})
    shared = [{"defaults": {"source": "s"}}, {"rises": "It rises", "holds": "x < y"}]
    assert PAPER.is_valid(card | {"claims": shared})
    assert not PAPER.is_valid(card | {"claims": shared[1:]})  # nothing gives it a source


def test_numbers_grouped_by_underscores_are_numbers_whatever_yaml_an_editor_speaks():
    card = {"title": "t", "authors": "a", "year": 2024, "url": "https://x"}
    for n, fits in (("100_000", True), (100_000, True), ("many", False), ("1__0", False)):
        assert PAPER.is_valid(card | {"corpus": {"n_tokens": n}}) is fits


@pytest.mark.parametrize("parent", ["rules/papers", "elsewhere/of/a/group"])
def test_a_new_paper_names_the_schema(tmp_path, parent):
    folder = scaffold("ours", tmp_path / parent)
    named = re.match(
        r"# yaml-language-server: \$schema=(\S+)\n", (folder / "paper.yaml").read_text()
    )
    found = Path(os.path.normpath(folder / named[1]))
    assert found == schema.FOLDER / "paper.json" and found.is_file()
