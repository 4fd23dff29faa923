"""JSON schemas of paper.yaml and config.yaml, for completion and checks in an editor.

    python -m pipeline schema        writes pipeline/spec/schema/paper.json and config.json

They are generated from the pydantic models, and a test holds them in step. An editor
that speaks YAML's language server takes the schema that a file names in its first line:

    # yaml-language-server: $schema=../../../pipeline/spec/schema/paper.json

What the models check beyond types (a hook that is not stored, a metric that does not exist) is
told by `python -m pipeline lint_paper`.
"""

import argparse
import copy
import json
from pathlib import Path
from typing import Any

from pipeline.errors import command
from pipeline.spec.base import SCALES
from pipeline.spec.figures import OPTIONS, STANDARD
from pipeline.spec.paper import Config, PaperSpec

FOLDER = Path(__file__).parents[1] / "spec/schema"
DIALECT = "https://json-schema.org/draft/2020-12/schema"
PART = "Part"  # ends the name of a definition in which nothing is required: of an overlay
HAS_ID = {"not": {"propertyNames": {"not": {"const": "id"}}}}  # `required` goes from an overlay
NAMED = ("properties", "patternProperties", "$defs")  # their keys are names, not keywords
# 100_000 is a number in YAML 1.1, which we read, and text in YAML 1.2, which editors read.
GROUPED = {"type": "string", "pattern": r"^-?[0-9]+(_[0-9]+)+$"}


def paper() -> dict[str, Any]:
    """The schema of paper.yaml: the sections, and under `scales` parts of the same sections."""
    whole = PaperSpec.model_json_schema()
    definitions = whole.pop("$defs")
    written_once(definitions, whole)
    own_stages(definitions, whole)
    parts = {f"{n}{PART}": partial(d) for n, d in definitions.items()}
    parts[f"Paper{PART}"] = partial(whole)
    overlay = {"anyOf": [{"$ref": f"#/$defs/Paper{PART}"}, {"type": "null"}]}
    whole["properties"]["scales"] = {
        "type": "object",
        "description": "overlays: mappings merge, null removes a key, all else replaces",
        "properties": dict.fromkeys(SCALES, overlay),
        "additionalProperties": overlay,
        "propertyNames": {"pattern": r"^[A-Za-z]\w*$"},
    }
    definitions["Figure"] |= by_kind(definitions["Figure"].pop("required"))
    return finished(whole | {"$defs": definitions | parts | options()})


def written_once(definitions: dict[str, Any], whole: dict[str, Any]) -> None:
    """Add the short forms of pipeline/spec/once.py, which the models never see."""

    def defaults(part: str) -> dict[str, Any]:
        of = {"$ref": f"#/$defs/{part}{PART}", "description": "count where a key is not said"}
        return {"type": "object", "properties": {"defaults": of}, "required": ["defaults"]}

    def where_there_are(some: dict, then: dict, other: dict) -> dict[str, Any]:
        return {"if": some, "then": then, "else": other}

    claims, named = whole["properties"]["claims"], definitions["Claim"]
    one, keys = named["properties"], {"propertyNames": {"$ref": "#/$defs/ClaimKey"}}
    definitions["ClaimKey"] = {"enum": [*one, "with"]}
    exchange = {"type": "object", "additionalProperties": {"type": "string"}}
    exchange["description"] = "the claim with other names in the place of some"
    one["null_arm"] = {"anyOf": [one["null_arm"], exchange]}
    one["with"] = {"type": "object", "description": "values for {name} in this claim"}
    named |= {"required": ["source"], "additionalProperties": {"type": "string"}}  # name: text
    named |= {"if": HAS_ID, "then": {"required": ["text"], **keys}}
    row = {"type": "object", "if": HAS_ID, "then": keys}  # what is filled in has any form
    each = {
        "properties": {
            "each": {"type": "array", "items": {"type": "object"}},
            "claims": {"type": "array", "items": row},
        },
        "required": ["claims"],
        "additionalProperties": False,
    }
    entry = defaults("Claim") | {"additionalProperties": False}
    said = entry["properties"]["defaults"]
    later = {"needs": {"type": "string", "pattern": r"^\{\w+\}$"}}  # filled in by `each` below
    said |= {"anyOf": [{"$ref": said.pop("$ref")}, {"properties": later, "required": ["needs"]}]}
    said |= {"type": "object", **keys}
    filled = where_there_are({"required": ["with"]}, row, {"$ref": f"#/$defs/Claim{PART}"})
    short = where_there_are({"required": ["each"]}, each, filled)
    kinds = ("defaults", "each", "with")
    claims |= where_there_are(
        {"contains": {"anyOf": [{"required": [kind]} for kind in kinds]}},
        {"items": where_there_are({"required": ["defaults"]}, entry, short)},
        {"items": claims.pop("items")},
    )
    sae = definitions["SaeSection"]
    made = sae["properties"].pop("dictionaries")
    sae["properties"] |= defaults("SaeSpec")["properties"] | {"dictionaries": {}}
    sae |= where_there_are(
        {"required": ["defaults"]},
        {"properties": {"dictionaries": partial(made)}},
        {"properties": {"dictionaries": made}},
    )
    layers = {"type": "array", "items": {"type": "integer"}}
    stored = definitions["ActivationsSpec"]["properties"]
    stored["layers"] = layers | {"description": "for {layer} in hooks"}
    hook = stored["hooks"]["items"]
    hook["pattern"] = hook["pattern"].replace(r"\d+", r"(\d+|\{layer\})")
    definitions["SaeSpec"]["properties"]["grid"]["properties"] = {
        "layer": layers | {"description": "for {layer} in hook: name_6, name_12"},
        "hook": {"type": "array", "items": {"type": "string"}},
    }


def own_stages(definitions: dict[str, Any], whole: dict[str, Any]) -> None:
    """Let an own stage say how it is called beside its options: `spec.own.parted`."""
    del whole["properties"]["stages"]
    tables = {"type": "array", "items": {"type": "string"}, "minItems": 1}
    called = definitions.pop("OwnStage")["properties"] | {"tables": tables}
    (stage,) = whole["properties"]["own"]["patternProperties"].values()
    stage["properties"] = called


def by_kind(required: list[str]) -> dict[str, Any]:
    """What depends on the kind of a figure: its options, and what it must say itself."""
    of = lambda kind: {"properties": {"kind": {"const": kind}}, "required": ["kind"]}  # noqa: E731
    alike = {"not": {"anyOf": [of(kind) for kind in STANDARD]}}
    rules: list[dict] = [{"if": alike, "then": {"required": required}}]
    for kind, model in OPTIONS.items():
        ref = {"$ref": f"#/$defs/{model.__name__}Options"}
        rules.append({"if": of(kind), "then": {"properties": {"options": ref}}})
    return {"allOf": rules}


def options() -> dict[str, Any]:
    """The schemas of the options of all core kinds of figures, by name."""
    out: dict[str, Any] = {}
    for model in OPTIONS.values():
        schema = model.model_json_schema()
        out |= schema.pop("$defs", {})
        out[f"{model.__name__}Options"] = schema
    return out


def config() -> dict[str, Any]:
    """The schema of config.yaml."""
    return finished(Config.model_json_schema())


def partial(node: Any) -> Any:
    """A schema as an overlay has it: no key is required, null removes one, references likewise."""
    node = copy.deepcopy(node)
    if isinstance(node, list):
        return [partial(n) for n in node]
    if not isinstance(node, dict):
        return node
    node.pop("required", None)
    node.pop("default", None)
    named = ("properties", "patternProperties")
    out = {k: partial(v) for k, v in node.items() if k not in named}
    if "$ref" in out:
        out["$ref"] = out["$ref"].removesuffix(PART) + PART
    for key in named:
        if key in node:
            absent = {"type": "null"}
            out[key] = {n: {"anyOf": [partial(p), absent]} for n, p in node[key].items()}
    return out


def finished(schema: dict[str, Any]) -> dict[str, Any]:
    """With the dialect, numbers grouped by underscores allowed, and pydantic's titles left out."""

    def tidied(node: Any) -> Any:
        if isinstance(node, list):
            return [tidied(n) for n in node]
        if not isinstance(node, dict):
            return node
        out = {
            k: {n: tidied(p) for n, p in v.items()} if k in NAMED else tidied(v)
            for k, v in node.items()
            if k != "title" or not isinstance(v, str)
        }
        if "oneOf" in out:  # an overlay of a few keys may fit both kinds of dictionaries
            out["anyOf"] = out.pop("oneOf")
        if out.get("type") in ("integer", "number"):
            kept = {k: out.pop(k) for k in ("description", "default") if k in out}
            return {"anyOf": [out, GROUPED], **kept}
        return out

    return {"$schema": DIALECT, **tidied(schema)}


def files() -> dict[str, str]:
    """File name -> content."""
    made = {"paper.json": paper(), "config.json": config()}
    return {n: json.dumps(s, indent=1, ensure_ascii=False) + "\n" for n, s in made.items()}


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m pipeline schema",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    with command("schema"):
        FOLDER.mkdir(exist_ok=True)
        for name, content in files().items():
            (FOLDER / name).write_text(content, encoding="utf-8")
            print(FOLDER / name)
