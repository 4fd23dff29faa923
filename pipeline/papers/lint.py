"""Read a paper folder as a referee would, before anything runs, and list every fault.

    python -m pipeline lint_paper rules/papers/my_paper

Snakemake stops at the first fault; here all are told, each in a sentence with file and remedy:

1. unknown keys and wrong values, at every scale;
2. claims without a source, a reason, a null arm, a budget or an existing metric;
3. figures without a caption, or with a kind or a table that does not exist;
4. own stages without code or rule, and reading code that imports torch.

Where a fault hides others (a dictionary that is not one has no metrics), those are told once it is
mended. Exit status 1 where there are faults.
"""

import argparse
import ast
import copy
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.claims import expressions, verdicts
from pipeline.errors import RetraceError, command, nearest
from pipeline.figures import drawing
from pipeline.job.source import tree
from pipeline.papers import folders
from pipeline.papers import own as own_rules
from pipeline.spec import once
from pipeline.spec.base import told
from pipeline.spec.paper import PaperSpec
from pipeline.store.provenance import canonical

HEAVY = {"torch", "transformers", "transformer_lens", "sae_lens"}
STAND_IN = {"title": "-", "authors": "-", "year": 1, "url": "https://-"}
# Sections on which nothing else rests: a fault in them hides no other.
LEAVES = {*STAND_IN, "claims", "figures", "summary", "deviations", "contributions", "use_of_ai"}
PLAIN_NUMBERS = {0, 1}  # of an order: signs, and shares or counts of all


def lint(folder: Path) -> list[str]:
    """Every fault of a paper folder, a sentence each."""
    file = folder / "paper.yaml"
    try:
        raw = dict(folders.load_yaml(file))
    except RetraceError as e:
        return [str(e)]
    out = list(folders.faults_of_scales(raw, file))
    if raw.get("scales") and not isinstance(raw["scales"], dict):
        return out
    scales = folders.scales_of(raw)
    raw.pop("scales", None)
    found: dict[str, list[str]] = {}
    merged = {scale: folders.overlay(raw, over) for scale, over in scales.items()}
    for scale in scales:
        for fault in at_scale(folder, scale, merged):
            found.setdefault(fault, []).append(scale)
    for fault in budgets_of_no_scale(folder, raw, scales):
        found[fault] = list(scales)
    everywhere = len(scales)
    out += [f if len(s) == everywhere else f"{f} (at {', '.join(s)})" for f, s in found.items()]
    return out + list(reading_code(folder))


def at_scale(folder: Path, scale: str, data: dict[str, dict]) -> list[str]:
    """The faults of a paper at one scale.

    Args:
        data: scale -> what stands in paper.yaml there.
    """
    file = folder / "paper.yaml"
    spec, said, whole = validated(data[scale])
    out = [f"{file}: {s}" for s in said]
    if spec is None or not whole:
        return out

    def at(other: str) -> folders.Paper:
        """The paper at another scale; where that is faulty itself, at this one."""
        elsewhere = validated(data[other])[0] or spec
        return folders.Paper(folder.name, folder, other, folders.filled(elsewhere, str(file)), at)

    try:
        paper = at(scale)
    except RetraceError as e:
        return [*out, str(e)]
    for check in (verdicts.faults, reasons, able_to_fail, drawing.faults, own_stages, unpinned):
        try:
            out += dict.fromkeys(check(paper))
        except RetraceError as e:
            out.append(str(e))
    return out


# --- the spec ------------------------------------------------------------------------------


def validated(data: dict) -> tuple[PaperSpec | None, list[str], bool]:
    """The spec without its faulty parts, its faults, and whether no part is gone that others need.

    What is faulty is told and taken out, and the rest is validated again, until nothing is. A
    section that lost a part may be faulty for want of it: it goes as a whole and without a word,
    but for further unknown keys.
    """
    try:
        data, said, whole = once.expanded(copy.deepcopy(data)), {}, True
    except ValueError as e:
        return None, [str(e)], False
    lost: set[str] = set()  # sections out of which something was taken
    while True:
        try:
            return PaperSpec.model_validate(data), list(said), whole
        except ValidationError as e:
            faults = e.errors()
        before, touched = canonical(data), set(lost)
        for fault in reversed(faults):  # later items of a list first: the earlier keep their place
            loc = fault["loc"]
            if not loc and fault["type"] == "value_error" and not _unknown(fault):
                if whole:  # sections that contradict each other, not for want of a part taken out
                    said[fault["msg"].removeprefix("Value error, ")] = None
                return None, list(said), False
            if loc and loc[0] in touched and not _unknown(fault):
                data.pop(loc[0], None)
                continue
            said[sentence(fault, data)] = None
            if not take_out(data, fault):
                whole, lost = False, lost | set(loc[:1])
        if canonical(data) == before:
            return None, list(said), False


def _unknown(fault: Any) -> str:
    """The key that a fault calls unknown, or an empty string."""
    found = re.match(r"Value error, unknown key '(.*?)'", fault["msg"])
    return found[1] if found else ""


def sentence(fault: Any, data: dict) -> str:
    """A fault of pydantic's, with a claim named by its id and a remedy for what is missing."""
    loc = list(fault["loc"])
    if len(loc) > 1 and loc[0] == "claims" and isinstance(loc[1], int):
        claim = dict(enumerate(data["claims"])).get(loc[1])  # None: another fault took it out
        loc[1] = claim.get("id", loc[1]) if isinstance(claim, dict) else loc[1]
    where = ".".join(map(str, loc))
    return f"{where}: is missing; add it" if fault["type"] == "missing" else told(fault, where)


def take_out(data: dict, fault: Any) -> bool:
    """Take the faulty part out of `data`; whether it is one that no other part rests on."""
    loc, unknown = list(fault["loc"]), _unknown(fault)
    if unknown:
        _parent(data, loc).pop(unknown, None)
        meant = re.search(r"did you mean '(.*?)'", nearest(unknown, PaperSpec.model_fields))
        first = loc[0] if loc else meant[1] if meant else "title"
        return first in LEAVES
    if fault["type"] == "missing" and len(loc) > 1:
        loc = loc[:-1]  # an item without a key that it needs goes as a whole
    *path, last = loc
    if not path and last in STAND_IN:
        data[last] = STAND_IN[last]
        return True
    parent = _parent(data, path)
    if isinstance(parent, list) and isinstance(last, int) and last < len(parent):
        del parent[last]
    elif isinstance(parent, dict):
        parent.pop(last, None)
    return loc[0] in LEAVES


def _parent(data: Any, path: list) -> Any:
    """The mapping or list at a path; where pydantic's path leaves the data, the last on it."""
    for key in path:
        try:
            inner = data[key]
        except (KeyError, IndexError, TypeError):
            break
        if not isinstance(inner, (dict, list)):
            break
        data = inner
    return data


# --- claims, stages, code ------------------------------------------------------------------


def reasons(paper: folders.Paper) -> Iterator[str]:
    """An order that rests on a number of ours, such as `a.ev > 0.9`, says why that number."""
    for claim in paper.spec.claims:
        if claim.kind != "order" or claim.reason:
            continue
        try:
            nodes = list(ast.walk(expressions.parse(claim.holds)))
        except ValueError:
            continue  # told by verdicts.faults
        numbers = [n.value for n in nodes if isinstance(n, ast.Constant)]
        if chosen := [str(n) for n in numbers if n not in PLAIN_NUMBERS]:
            yield (
                f"{paper.folder / 'paper.yaml'}: claim '{claim.id}': holds compares with "
                f"{', '.join(chosen)} and gives no reason; add reason: why that number"
            )


def unpinned(paper: folders.Paper) -> Iterator[str]:
    """A model or a text of a hub whose newest commit would be taken, whatever that is by then."""
    spec = paper.spec
    arms = spec.arm_names() if spec.model else []
    named = [("model", spec.model_of(arm)) for arm in arms]
    named += [("corpus", c) for c in map(spec.corpus_of, arms) if c]
    for section, part in named:
        if part.source == "hub" and not part.revision:
            yield (
                f"{paper.folder / 'paper.yaml'}: {section} {part.repo}: no revision is pinned, so "
                f"another run may read another commit; add the revision that the first run printed"
            )


def able_to_fail(paper: folders.Paper) -> Iterator[str]:
    """An order of the paper names where it must not hold; a published value, its budget."""
    spec = paper.spec
    for claim in (c for c in spec.claims if c.of == "paper" and c.comparable):
        where = f"{paper.folder / 'paper.yaml'}: claim '{claim.id}'"
        if claim.kind == "order" and not (claim.null_arm or claim.no_null_arm):
            yield (
                f"{where}: could it fail? Add null_arm: an arm or an expression on which it must "
                f"not hold, or no_null_arm: why there is none"
            )
        if claim.kind == "value" and not claim.scales and not spec.budget_of(claim):
            if spec.budget:
                yield f"{where}: rests on which budget? Add budget: one of {', '.join(spec.budget)}"
            else:
                yield (
                    f"{where}: is compared with a run of the paper's budget, and budget: declares "
                    f"none; add the paper's own and ours"
                )


def budgets_of_no_scale(folder: Path, raw: dict, scales: dict) -> Iterator[str]:
    """A budget may rest on settings that only some scales have, and at least one must have them."""
    specs = [validated(folders.overlay(raw, over))[0] for over in scales.values()]
    for name, budget in next((s.budget for s in specs if s), {}).items():
        try:
            wanted = expressions.names(expressions.parse(budget.ours))
        except ValueError:
            continue  # told by verdicts.faults
        for path in sorted(wanted):
            section = path.partition(".")[0] in PaperSpec.model_fields
            if section and all(s is None or verdicts.setting(s, path) is None for s in specs):
                yield (
                    f"{folder / 'paper.yaml'}: budget.{name}: ours: '{path}' is a number at no "
                    f"scale; correct the path"
                )


def own_stages(paper: folders.Paper) -> Iterator[str]:
    """Every own stage has a file, what it needs, and a rule that writes its tables."""
    yield from own_rules.faults(paper)
    file = paper.folder / "rules.smk"
    rules = file.read_text(encoding="utf-8") if file.is_file() else ""
    for stage, own in paper.spec.own.items():
        script = paper.spec.stage_of(stage).script or f"{stage}.py"
        if not (paper.folder / script).is_file():
            yield (
                f"{paper.folder / 'paper.yaml'}: own.{stage}: there is no {script} beside it; "
                f"write the stage, or correct its name"
            )
        for table in own["tables"] if rules and stage not in paper.spec.stages else ():
            if not re.search(rf"\b{table}\b", rules):
                yield (
                    f"{file}: no rule writes the table '{table}' of own.{stage}; add "
                    f"results/{{scale}}/{{paper}}/{stage}/{table}.parquet to an output, or "
                    f"own.{stage}.needs: [] for the core's rule"
                )


def reading_code(folder: Path) -> Iterator[str]:
    """Figures and metrics are made from tables alone, in seconds and without torch."""
    for file in [*sorted(folder.glob("figures*.py")), *sorted(folder.glob("metrics.py"))]:
        try:
            nodes = list(ast.walk(tree(file)))
        except RetraceError as e:
            yield str(e)
            continue
        names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
        names += [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
        for name in sorted({n.split(".")[0] for n in names} & HEAVY):
            yield f"{file}: imports {name}; compute with it in a stage, and read its table here"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline lint_paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="+", type=Path, help="paper folders")
    args = parser.parse_args()
    with command("lint_paper"):
        faults = [fault for folder in args.folders for fault in lint(folder)]
        print("\n".join(faults) or "no faults")
    sys.exit(1 if faults else 0)
