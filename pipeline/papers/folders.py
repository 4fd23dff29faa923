"""Paper folders: found, overlaid with a scale, and validated.

A paper is a folder with a paper.yaml. `load` lays the overlay of a scale over its sections and
validates the whole before anything runs.
"""

import fnmatch
import functools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import RetraceError, nearest
from pipeline.spec import paper as spec
from pipeline.spec.base import SCALES, scale_name
from pipeline.spec.once import overlay
from pipeline.spec.paper import PaperSpec
from pipeline.spec.sources import on_hub
from pipeline.spec.yaml_files import load_yaml


@dataclass(frozen=True)
class Paper:
    """A validated paper at one scale.

    Attributes:
        at: scale -> the same paper there, without the checks of `load`.
    """

    name: str
    folder: Path
    scale: str
    spec: PaperSpec
    at: Callable[[str], "Paper"] | None = field(default=None, compare=False, repr=False)

    def _judged_elsewhere(self, arm: str) -> bool:
        """Whether an arm has no dictionary of its own, in a paper with crosscoders or transcoders
        of all layers, which their own stages judge."""
        spec = self.spec
        arms = spec.arm_names()
        others = any(spec.transcoders_of(a) or spec.crosscoders_of(a) for a in arms)
        return others and not spec.saes_of(arm)

    def tables(self) -> dict[str, str]:
        """Name -> path of every table that this paper's stages write, e.g. 'evaluation/trained'."""
        return dict(self._tables)

    @functools.cached_property
    def _tables(self) -> dict[str, str]:
        """`tables`, made: the rules ask for them with every job."""
        names = [f"{stage}/{t}" for stage, s in self.spec.own.items() for t in s["tables"]]
        names += [f"training/{run}" for run in self.spec.training]
        if self.spec.sae:
            arms = [a for a in self.spec.arm_names() if not self._judged_elsewhere(a)]
            names += [f"evaluation/{arm}{part}" for part in ("", "_history") for arm in arms]
            crossed = [arm for arm in self.spec.arm_names() if self.spec.crosscoders_of(arm)]
            names += [f"crosscoders/{arm}{part}" for arm in crossed for part in ("", "_latents")]
            layered = [arm for arm in self.spec.arm_names() if self.spec.transcoders_of(arm)]
            names += [f"transcoders/{arm}" for arm in layered]
        if self.spec.benchmarks:
            names += [f"benchmarks/{arm}" for arm in self.spec.arm_names()]
        if self.spec.absorption:
            names += [f"absorption/{arm}" for arm in self.spec.arm_names()]
        if self.spec.features:
            beside = [self.spec.features.beside] if self.spec.features.beside else []
            names += [f"features/{s}" for s in [*self.spec.features.saes, *beside]]
        if self.spec.attribution:
            names += ["attribution/prompts", "attribution/latents"]
        if self.spec.circuits:
            parts = ("nodes", "edges", "methods")
            names += [f"circuits/{a}_{part}" for a in self.spec.circuit_arms() for part in parts]
        if self.spec.graphs:
            parts = ("scores", "nodes", "edges", "suppressed", "heads", "qk", "replacement")
            names += [f"graphs/{a}_{part}" for a in self.spec.graph_arms() for part in parts]
        if self.spec.probes:
            names += [f"probes/{a}_{part}" for a in self.spec.probe_arms()
                      for part in ("scores", "labels")]  # fmt: skip
        if self.spec.steering:
            names += [f"steering/{part}" for part in ("effects", "samples")]
        return {n: f"results/{self.scale}/{self.name}/{n}.parquet" for n in names}

    def code_files(self, *names: str) -> list[str]:
        """The paper's own .py files: all, or those that fit `names`, e.g. 'figures*.py'."""
        there = sorted(os.listdir(self.folder))
        fitting = [file for name in names or ["*.py"] for file in fnmatch.filter(there, name)]
        return [str(self.folder / file) for file in fitting]


def find(name: str, dirs: list[Path]) -> Path:
    """The folder of a paper."""
    for folder in dirs:
        if (folder / name / "paper.yaml").is_file():
            return folder / name
    known = sorted(p.parent.name for d in dirs for p in d.glob("*/paper.yaml"))
    raise RetraceError(
        f"config.yaml: no paper '{name}'{nearest(name, known)} in {', '.join(map(str, dirs))}; "
        f"there are {', '.join(known) or 'none'}"
    )


def available(dirs: list[Path]) -> list[str]:
    """Names of all paper folders in `dirs`, sorted; what is no name for a paper is left out."""
    found = {p.parent.name for d in dirs for p in d.glob("*/paper.yaml")}
    return sorted(n for n in found if re.fullmatch(r"[A-Za-z]\w*", n))


def load(
    folder: Path, scale: str, raw: dict | None = None, hub: bool = False, sound: bool = False
) -> Paper:
    """The paper in `folder` at `scale`, validated.

    Args:
        raw: what `load_yaml` gives of its paper.yaml, where that was read before.
        hub: whether arms may come from a hub; else those that do are left out.
        sound: whether it is known to have no fault, so that only its keys are validated.
    """
    file = folder / "paper.yaml"
    raw = dict(load_yaml(file) if raw is None else raw)
    for fault in () if sound else faults_of_scales(raw, file):
        raise RetraceError(fault)
    scales = scales_of(raw)
    if scale not in scales:
        raise RetraceError(
            f"{file}: scales: no scale '{scale}'{nearest(scale, scales)}; it has "
            f"{', '.join(scales)}; add it there, or name another"
        )

    def at(scale: str) -> Paper:
        merged = overlay({k: v for k, v in raw.items() if k != "scales"}, scales[scale])
        if not hub and isinstance(merged, dict):
            merged = _without_hub(merged)
        parsed = spec.parse(PaperSpec, merged, f"{file} ({scale})")
        return Paper(folder.name, folder, scale, filled(parsed, f"{file} ({scale})"), at)

    paper = at(scale)
    if sound:
        return paper
    from pipeline.claims import verdicts
    from pipeline.figures import drawing  # they read papers, too
    from pipeline.papers import own

    for part in (own, verdicts, drawing):
        part.check(paper)
    return paper


def scales_of(raw: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Scale -> its overlay: smoke, laptop and paper, and those of the paper's own."""
    given = raw.get("scales")
    return {s: {} for s in SCALES} | {s: o or {} for s, o in (given or {}).items()}


def faults_of_scales(raw: dict[str, Any], file: Path) -> Iterator[str]:
    """What is wrong with the names of the scales of a paper.yaml, and with those of its claims."""
    given = raw.get("scales") or {}
    if not isinstance(given, dict):
        yield f"{file}: scales: must be a mapping from {', '.join(SCALES)} or names of your own"
        return
    for key in given:
        try:
            scale_name(str(key))
        except ValueError as e:
            yield f"{file}: scales: {e}"
            continue
        hint = "" if key in SCALES else nearest(key, SCALES)
        if hint:
            yield f"{file}: scales: unknown scale '{key}'{hint}; one of your own needs another name"
    known = scales_of(raw)
    for scale in dict.fromkeys(_scales_of_claims(raw)):
        if scale not in known:
            yield f"{file}: claims: unknown scale '{scale}'{nearest(scale, known)}"


def _scales_of_claims(raw: dict[str, Any]) -> Iterator[str]:
    """The scales that claims, or defaults among them, name."""
    for claim in raw["claims"] if isinstance(raw.get("claims"), list) else []:
        several = claim.get("claims") if isinstance(claim, dict) else None
        parts = [claim, claim.get("defaults")] if isinstance(claim, dict) else []
        for part in parts + (several if isinstance(several, list) else []):
            scales = part.get("scales") if isinstance(part, dict) else None
            if isinstance(scales, list):
                yield from (s for s in scales if isinstance(s, str))


PLACE = re.compile(r"\{(\w+(?:\.\w+)+)\}")


def filled(paper: PaperSpec, where: str) -> PaperSpec:
    """The paper with the numbers of its scale in the text of its deviations and captions.

    '{sae.training.dead_rows}' is that setting at this scale, with commas: '100,000'. What is no
    setting stays in a caption, since it may be a metric (pipeline/figures/drawing.py).

    Raises:
        RetraceError: a deviation names no setting, or one that is no number and no word.
    """
    texts = [*paper.deviations, *(f.caption for f in paper.figures.values())]
    if not any(PLACE.search(text) for text in texts):
        return paper
    settings = paper.model_dump(mode="json")

    def value(found: re.Match) -> str | None:
        at: Any = settings
        for key in found[1].split("."):
            at = at.get(key) if isinstance(at, dict) else None
        if isinstance(at, (int, float)) and not isinstance(at, bool):
            return f"{at:,}"
        return at if isinstance(at, str) else None

    def in_deviation(found: re.Match) -> str:
        if (said := value(found)) is not None:
            return said
        raise RetraceError(
            f"{where}: no setting '{found[1]}' for the text '{found[0]}'; correct it"
        )

    def in_caption(found: re.Match) -> str:
        said = value(found)
        return found[0] if said is None else said

    figures = {
        name: f.model_copy(update={"caption": PLACE.sub(in_caption, f.caption)})
        for name, f in paper.figures.items()
    }
    deviations = [PLACE.sub(in_deviation, text) for text in paper.deviations]
    return paper.model_copy(update={"deviations": deviations, "figures": figures})


def _without_hub(raw: dict) -> dict:
    """A paper.yaml without the arms whose weights come from a hub, where others are left.

    Published dictionaries that only such arms have are left out, too, and crosscoders of such an
    arm's model.
    """
    arms = raw.get("arms")
    if not isinstance(arms, dict):
        return raw

    def from_hub(arm: Any) -> bool:
        return isinstance(arm, dict) and on_hub(arm).get("source") == "hub"

    here = {name: arm for name, arm in arms.items() if not from_hub(arm)} or arms
    gone = set(map(str, arms)) - set(map(str, here))
    for name in ("circuits", "graphs"):
        section = raw.get(name)
        if isinstance(section, dict) and isinstance(section.get("without"), list):
            left = [arm for arm in section["without"] if arm in here or arm not in arms]
            raw = raw | {name: section | {"without": left}}
    section = raw.get("sae")
    if isinstance(section, dict) and isinstance(section.get("dictionaries"), dict):
        kept = {name: sae for name, sae in section["dictionaries"].items() if not _of(sae, gone)}
        raw = raw | {"sae": section | {"dictionaries": kept}}
    return raw | {"arms": here}


def _of(sae: Any, arms: set[str]) -> bool:
    """Whether a published dictionary belongs to some of these arms and to no other, or a
    crosscoder reads one of them."""
    models = sae.get("models") if isinstance(sae, dict) else None
    if isinstance(models, list):
        return not arms.isdisjoint(map(str, models))
    own = sae.get("arms") if isinstance(sae, dict) and "source" in sae else None
    return isinstance(own, list) and bool(own) and arms.issuperset(map(str, own))
