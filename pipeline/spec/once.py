"""What stands once in a paper.yaml and counts for many: defaults, and hooks of several layers.

All of it happens on plain YAML data, before anything is validated. A validated paper holds every
claim, dictionary and hook whole, as if it had been written out.

1. `overlay` lays one mapping on another, as a scale does on the sections of a paper.
2. A claim may begin with its id and text, `- generalises: The network generalises`.
   Among the claims, `- defaults: {…}` counts for the claims below it, until the next such entry.
   `with: {name: value}` of a claim or of these defaults puts values where a claim says `{name}`,
   and `- {each: [{…}, {…}], claims: […]}` makes its claims for each row of such values.
3. In an expression `{a,b}.x > 0` is `a.x > 0 and b.x > 0`, and `max({a,b}.x)` is `max(a.x, b.x)`.
   A null arm `{a: b}` is the claim with b for the name a, `{"*": b.*}` with b. before every metric.
4. `sae.defaults` lies under every dictionary that is trained here.
5. `{layer}` in a hook stands for each layer of `activations.layers` or of a dictionary's grid.
"""

import re
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

from pipeline.errors import nearest
from pipeline.spec.claims import Claim

LAYER = "{layer}"
INSTEAD = {"null_arm": "no_null_arm", "no_null_arm": "null_arm"}  # a claim has one of the two
NAMED = re.compile(r"\{(\w+)((?:\[\d+\])?(?::[^{}]*)?)\}")  # {name}, {name[0]}, {name:.2f}
SEVERAL = re.compile(r"\{([\w.]+(?:, ?[\w.]+)+)\}")  # {a,b}
METRIC = re.compile(r"(?<![\w.])[A-Za-z_]\w*(?:\.\w+)+")  # a.b, which no number or function is
CALL = re.compile(r"\b(min|max)\(([^()]*)\)")
ROWS = {"each", "claims"}
KEYS = {*Claim.model_fields, "with", *ROWS, "defaults"}  # of an entry among the claims


def overlay(base: Any, over: Any) -> Any:
    """`over` laid on `base`: mappings merge, null removes a key, all else replaces."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    out = dict(base)
    for key, value in over.items():
        if value is None:
            out.pop(key, None)
        else:
            out[key] = overlay(base.get(key), value)
    return out


def expanded(paper: Any) -> Any:
    """The data of a paper.yaml with all written out; what is not as expected stays as it is.

    Raises:
        ValueError: defaults that no claim can have, or hooks that lack their layers.
    """
    if not isinstance(paper, dict):
        return paper
    sections: dict[str, Callable] = {
        "claims": claims, "activations": activations, "sae": dictionaries,
    }  # fmt: skip
    return paper | {key: make(paper[key]) for key, make in sections.items() if key in paper}


# --- claims --------------------------------------------------------------------------------


def claims(entries: Any) -> Any:
    """Claims, each with the defaults above it, and those of rows once a row."""
    if not isinstance(entries, list):
        return entries
    out, above = [], {}
    for entry in entries:
        if isinstance(entry, dict) and isinstance(entry.get("defaults"), dict) and len(entry) == 1:
            above = _checked(entry["defaults"])
        elif isinstance(entry, dict) and "each" in entry:
            out += [_claim(claim, above, row) for row, claim in _of_rows(entry)]
        else:
            out.append(_claim(entry, above, {}))
    return out


def _of_rows(entry: dict) -> Iterator[tuple[dict, Any]]:
    """(row, claim) of an entry `{each: rows, claims: claims}`, row by row."""
    rows, made = entry["each"], entry.get("claims")
    mappings = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    if entry.keys() != ROWS or not (mappings and isinstance(made, list)):
        raise ValueError(
            "claims: each: must be a list of mappings, beside claims: a list of claims"
        )
    return ((row, claim) for row in rows for claim in made)


def _claim(claim: Any, above: dict, row: dict) -> Any:
    """One claim with its defaults, values and expressions written out; what it says itself counts.

    Args:
        row: values beside those of its `with`.
    """
    if not isinstance(claim, dict):
        return claim
    claim = _named(claim)
    said = {key for pair in INSTEAD.items() if claim.get(pair[0]) is not None for key in pair}
    whole = overlay({k: v for k, v in above.items() if k not in said}, claim)
    if values := row | (whole.pop("with", None) or {}):
        whole = {key: v for key, v in filled(whole, values).items() if v is not None}
    whole = _spelt(whole)
    if isinstance(whole.get("needs"), dict):
        whole["needs"] = {name: _spelt(need) for name, need in whole["needs"].items()}
    if isinstance(whole.get("null_arm"), dict):
        whole["null_arm"] = _exchanged(whole)
    return whole


def filled(part: Any, values: dict[str, Any]) -> Any:
    """Values where a text says {name}, with Python's formats; other braces stay as they are."""
    if isinstance(part, dict):
        return {filled(key, values): filled(value, values) for key, value in part.items()}
    if isinstance(part, list):
        return [filled(value, values) for value in part]
    if not isinstance(part, str):
        return part

    def value(found: re.Match) -> str:
        return found[0].format(**values) if found[1] in values else found[0]

    try:
        whole = NAMED.fullmatch(part)
        if whole and whole[1] in values and ":" not in whole[2]:  # a number stays a number
            at = values[whole[1]]
            return at[int(whole[2][1:-1])] if whole[2] else at
        return NAMED.sub(value, part)
    except (LookupError, TypeError, ValueError) as e:
        raise ValueError(f"claims: '{part}' cannot be filled ({e})") from None


def _named(claim: dict) -> dict:
    """A claim that begins `name: text`, with its id and text."""
    name, text = next(iter(claim.items()), ("id", ""))
    if name in KEYS or {"id", "text"} & claim.keys() or not isinstance(text, str):
        return claim
    return {"id": name, "text": text} | {k: v for k, v in claim.items() if k != name}


def _spelt(part: Any) -> Any:
    """A claim or a need with its expressions written out."""
    if not isinstance(part, dict):
        return part
    texts = {k: part[k] for k in ("holds", "null_arm") if isinstance(part.get(k), str)}
    return part | {key: spelt_out(text) for key, text in texts.items()}


def spelt_out(expression: str) -> str:
    """`{a,b}.x > 0` as `a.x > 0 and b.x > 0`, `max({a,b}.x)` as `max(a.x, b.x)`.

    Several braces of one comparison go side by side: `{a,b}.x > {c,d}.x` are two comparisons.
    """

    def terms(found: re.Match) -> str:
        args = re.split(r", ?(?![^{]*\})", found[2])
        return f"{found[1]}({', '.join(each for arg in args for each in _alternatives(arg))})"

    parts = CALL.sub(terms, expression).split(" and ")
    return " and ".join(each for part in parts for each in _alternatives(part))


def _alternatives(term: str) -> list[str]:
    """A term for each name in its braces; itself where it has none."""
    found = [re.split(", ?", names) for names in SEVERAL.findall(term)]
    if len({len(names) for names in found}) > 1:
        raise ValueError(f"claims: '{term}': its braces hold different numbers of names")
    if not found:
        return [term]
    return [SEVERAL.sub(lambda m, i=i: re.split(", ?", m[1])[i], term)
            for i in range(len(found[0]))]  # fmt: skip


def _exchanged(claim: dict) -> str:
    """The null arm of a claim: what it asks, with other names in the place of some."""
    said = claim.get("holds")
    if said is None and {"metric", "paper", "tolerance"} <= claim.keys():
        said = f"abs({claim['metric']} - {claim['paper']:g}) <= {claim['tolerance']:g}"
    if not isinstance(said, str):
        raise ValueError(f"claim '{claim.get('id')}': null_arm: it has no holds: to put names into")
    others = claim["null_arm"]
    if others.keys() == {"*"}:
        return METRIC.sub(lambda found: str(others["*"]).replace("*", found[0]), said)
    names = re.compile(rf"(?<![\w.])({'|'.join(map(re.escape, others))})\b")
    if missing := others.keys() - set(names.findall(said)):
        raise ValueError(f"claim '{claim.get('id')}': null_arm: no '{min(missing)}' in '{said}'")
    return names.sub(lambda found: str(others[found[1]]), said)


def _checked(defaults: dict) -> dict:
    for key in defaults:
        if key not in (*Claim.model_fields, "with"):
            raise ValueError(
                f"claims: defaults: unknown key '{key}'{nearest(key, Claim.model_fields)}; allowed "
                f"here: {', '.join(Claim.model_fields)}"
            )
    return defaults


# --- dictionaries and hooks ----------------------------------------------------------------


def activations(section: Any) -> Any:
    """The section activations with its hooks at each of its layers, layer by layer."""
    if not isinstance(section, dict) or "layers" not in section:
        return section
    rest = {key: value for key, value in section.items() if key != "layers"}
    layers, hooks = section["layers"], section.get("hooks")
    if not (isinstance(layers, list) and layers and isinstance(hooks, list)):
        raise ValueError(f"activations: layers {layers!r} must be a list of layers, beside hooks")
    if not any(LAYER in str(hook) for hook in hooks):
        raise ValueError(f"activations: layers: no hook names its layer; write blocks.{LAYER}.…")
    once = [hook for hook in hooks if LAYER not in str(hook)]
    several = [str(h).replace(LAYER, str(n)) for n in layers for h in hooks if LAYER in str(h)]
    return rest | {"hooks": once + several}


def dictionaries(section: Any) -> Any:
    """The section sae with its defaults laid under its dictionaries, one for each hook."""
    if not isinstance(section, dict) or not isinstance(section.get("dictionaries"), dict):
        return section
    below = section.get("defaults", {})
    whole = {
        name: overlay(below, made) if isinstance(made, dict) and "source" not in made else made
        for name, made in section["dictionaries"].items()
    }
    out: dict[str, Any] = {}
    for name, made in _by_layer(whole):
        if name in out:
            raise ValueError(f"the grids make two dictionaries '{name}'; rename one")
        out[name] = made
    rest = {key: value for key, value in section.items() if key != "defaults"}
    return rest | {"dictionaries": out}


def _by_layer(whole: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Dictionaries at every layer of their grids; neighbours of equal layers go layer by layer."""
    for layers, group in groupby(whole.items(), lambda item: _grid(item[1]).get("layer")):
        if layers is None:
            for name, made in group:
                yield from _by_hook(name, made)
            continue
        members = list(group)
        for layer in _listed("layer", layers):
            for name, made in members:
                yield from _by_hook(f"{name}_{layer}", _at_layer(name, made, layer))


def _at_layer(name: str, made: dict, layer: Any) -> dict:
    """A dictionary with a layer for {layer} in its hooks and in those of its grid."""
    if LAYER not in str(made):
        raise ValueError(f"dictionaries.{name}: grid: layer: no hook names its {LAYER}")
    grid = {k: v for k, v in made["grid"].items() if k != "layer"}
    if "hook" in grid:
        grid["hook"] = [str(h).replace(LAYER, str(layer)) for h in _listed("hook", grid["hook"])]
    hooks = {k: v.replace(LAYER, str(layer)) for k, v in made.items() if isinstance(v, str)}
    return _with_grid(made | hooks, grid)


def _by_hook(name: str, made: Any) -> Iterator[tuple[str, Any]]:
    """A dictionary for each hook of its grid: blocks.6.hook_mlp_out makes name_6_mlp_out."""
    grid = _grid(made)
    if "hook" not in grid:
        yield name, made
        return
    rest = {k: v for k, v in grid.items() if k != "hook"}
    for hook in _listed("hook", grid["hook"]):
        label = str(hook).removeprefix("blocks.").replace("hook_", "").replace(".", "_")
        if name.endswith(f"_{label.partition('_')[0]}"):  # the layer is in the name already
            label = label.partition("_")[2]
        yield f"{name}_{label}", _with_grid(made | {"hook": hook}, rest)


def _grid(made: Any) -> dict:
    grid = made.get("grid") if isinstance(made, dict) else None
    return grid if isinstance(grid, dict) else {}


def _with_grid(made: dict, grid: dict) -> dict:
    rest = {k: v for k, v in made.items() if k != "grid"}
    return rest | ({"grid": grid} if grid else {})


def _listed(key: str, found: Any) -> list:
    if not isinstance(found, list) or not found:
        raise ValueError(f"grid: {key}: {found!r:.80} must be a list")
    return found
