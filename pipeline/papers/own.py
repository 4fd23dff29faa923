"""The jobs of own stages: what each reads and makes, from what its section of paper.yaml says.

    own:
      fourier: {needs: [training], tables: [progress, phases], resources: {mem_mb: 6000}}

1. `rules` lists a rule for each own stage of each paper, with the files that it makes.
2. `Own` answers what snakemake asks about one of its jobs. A need becomes the inputs that `inputs`
   names, and an option of the same name: `needs: [models]` is `--models FILE ...`. So does a
   table: `tables: [phases]` is `--phases FILE`.
3. `faults` says what a need asks for that the paper does not have.

Stages that say nothing of this are left to the rules.smk of their paper, where it has one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.errors import RetraceError, nearest
from pipeline.job import source
from pipeline.papers.folders import Paper
from pipeline.papers.papers import Run
from pipeline.papers.rule_params import Params
from pipeline.papers.workflow import CROSSED, DICTIONARIES, LAYERED, Inputs, card, home, known
from pipeline.spec.own import OwnStage, Resources, parted
from pipeline.spec.paper import PaperSpec

BESIDE = "beside_"  # begins the names of inputs that no option names: a manifest leads to them
OF_ARMS = {  # need -> (stages of the store, the file that is handed on, what has to lie beside it)
    "models": ("model", "model.json", "checkpoint"),
    "activations": ("activations", "manifest.json", "shards"),
    "saes": (DICTIONARIES, "manifest.json", "saes"),
    "transcoders": (LAYERED, "manifest.json", "saes"),
    "crosscoders": (CROSSED, "manifest.json", "saes"),
    "corpora": ("corpus", "tokens.parquet", ""),
    "labels": ("corpus", "documents.parquet", ""),
}
SECTION = {  # of paper.yaml, without which there is no such thing
    "models": "model", "activations": "activations", "saes": "sae", "transcoders": "sae",
    "crosscoders": "sae", "corpora": "corpus", "labels": "corpus", "training": "training",
}  # fmt: skip
OF_PAPER = ("corpus", "training")
OF_LENT = {
    "models": ("model", "model.json", "checkpoint"),
    "corpora": ("corpus", "tokens.parquet", ""),
}


# --- rules ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class OwnRule:
    """A rule that makes the files of an own stage at one scale; it has no wildcards.

    Snakemake holds each file against every rule whose pattern begins as the file's name does. A
    pattern begins with what stands before its first wildcard: were the scale one, a rule of each
    paper would be tried for each file of all others.
    """

    name: str
    paper: str
    scale: str
    stage: str
    outputs: dict[str, str]  # a path that ends in / is a folder

    def beside(self, kind: str, ending: str) -> str:
        """Its log or benchmark."""
        return f"results/{kind}/{self.scale}/{self.paper}/{self.stage}.{ending}"


def rules(run: Run) -> list[OwnRule]:
    """The rules of all own stages that leave theirs to the core, of every paper that can be read.

    Those of the run's own scale are named paper_stage, others paper_stage_at_scale. Papers that
    this run does not ask for are read as they are: their faults are told when somebody asks for
    them.
    """
    out = []
    for name in run.available:
        try:
            folder, sections = run.sections(name, "own")
        except RetraceError:
            continue
        has_rules = (folder / "rules.smk").exists()
        for scale, own in sections.items():
            ending = "" if scale == run.config.scale else f"_at_{scale}"
            for stage, files in _outputs(own, has_rules):
                paths = {n: f"results/{scale}/{name}/{stage}/{f}" for n, f in files.items()}
                out.append(OwnRule(f"{name}_{stage}{ending}", name, scale, stage, paths))
    return out


def _outputs(own: Any, has_rules: bool) -> Iterator[tuple[str, dict[str, str]]]:
    """(stage, name -> file that it makes) of the stages whose rule is the core's."""
    data = parted({"own": own})
    stages = data.get("stages", {})
    for stage, options in data["own"].items() if isinstance(own, dict) else ():
        if has_rules and stage not in stages:
            continue
        try:
            about = OwnStage.model_validate(stages.get(stage, {}))
            files = {name: f"{name}.parquet" for name in options["tables"]} | about.makes
        except (ValidationError, TypeError, LookupError):
            continue
        yield stage, files


def is_folder(path: str) -> bool:
    """Whether an output of `OwnRule` is a folder."""
    return path.endswith("/")


# --- jobs ----------------------------------------------------------------------------------


class Own:
    """What snakemake asks about a job of an own stage; wildcards have scale and paper."""

    def __init__(self, inputs: Inputs, params: Params) -> None:
        self.asked, self.params = inputs, params
        self._code: dict[tuple[str, str, str], list[str]] = {}  # snakemake asks twice a job

    def stage(self, wildcards: Any, stage: str) -> OwnStage:
        return self.asked.paper(wildcards).spec.stage_of(stage)

    def code_files(self, wildcards: Any, stage: str) -> list[str]:
        """The script, the files of its folder that it loads, and those that it names."""
        at = (wildcards.scale, wildcards.paper, stage)
        if at not in self._code:
            paper, about = self.asked.paper(wildcards), self.stage(wildcards, stage)
            named = [about.script or f"{stage}.py", *about.code]
            found = source.with_loaded([paper.folder / f for f in named])
            self._code[at] = list(map(str, found))
        return self._code[at]

    def script(self, wildcards: Any, stage: str) -> list[str]:
        paper = self.asked.paper(wildcards)
        return [str(paper.folder / (self.stage(wildcards, stage).script or f"{stage}.py"))]

    def inputs(self, wildcards: Any, stage: str) -> dict[str, list[str]]:
        """Name -> files, of all that the stage needs."""
        out: dict[str, list[str]] = {}
        for need in self.stage(wildcards, stage).needs:
            out |= self._need(wildcards, need)
        return out

    def _need(self, wildcards: Any, need: str) -> dict[str, list[str]]:
        """The inputs of one need, under the names of the options that hand them on."""
        ask, paper = self.asked, self.asked.paper(wildcards)
        if need in OF_ARMS:
            return _handed(need, OF_ARMS[need], lambda s, f: ask.arms(wildcards, s, f))
        if need == "training":
            made = ("training", "manifest.json", "checkpoints")
            return _handed("runs", made, lambda _, f: ask.trainings(wildcards, f))
        if need == "corpus":
            tokens = ask.trainings(wildcards, "tokens.parquet", "corpus")
            tokens += ask.arms(wildcards, "corpus", "tokens.parquet") if paper.spec.corpus else []
            return {"corpus": list(dict.fromkeys(tokens))}
        if "/" in need:
            stage, _, name = need.partition("/")
            file = self.stage(wildcards, stage).makes.get(name, f"{name}.parquet").rstrip("/")
            return {name: [f"{home(paper)}/{stage}/{file}"]}
        stage, _, what = need.partition(".")
        known("need", what, OF_LENT, paper)
        return _handed(what, OF_LENT[what], lambda s, f: ask.lent(wildcards, stage, s, f))

    def spec(self, wildcards: Any, stage: str) -> str:
        """The options of the stage, of the stages whose models it reads, and the paper's arms."""
        spec, needs = self.asked.paper(wildcards).spec, self.stage(wildcards, stage).needs
        lent = [n.partition(".")[0] for n in needs if "." in n]
        arms = ["arms"] if spec.arms and OF_ARMS.keys() & set(needs) else []
        return self.params.spec(wildcards, *(f"own.{s}" for s in [stage, *lent]), *arms)

    def code(self, wildcards: Any, stage: str) -> str:
        """The code hash."""
        return source.job_code(stage, self.code_files(wildcards, stage))

    def resources(self, wildcards: Any, stage: str) -> Resources:
        return self.stage(wildcards, stage).resources


def _handed(name: str, made: tuple[Any, str, str], ask: Callable) -> dict[str, list[str]]:
    stage, file, beside = made
    return {name: ask(stage, file)} | ({BESIDE + name: ask(stage, beside)} if beside else {})


def options(inputs: Any, outputs: Any) -> list[str]:
    """The options of a command that hand a job its named files, --models a b --phases c."""
    named = [(n, f) for n, f in inputs.items() if n not in ("script", "code")]
    out: list[str] = []
    for name, files in [*named, *outputs.items()]:
        paths = [files] if isinstance(files, str) else list(files)
        if paths and not name.startswith(BESIDE):
            out += [f"--{name.replace('_', '-')}", *map(str, paths)]
    return out


# --- faults --------------------------------------------------------------------------------


def check(paper: Paper) -> None:
    """Raises RetraceError with the first of `faults`."""
    for fault in faults(paper):
        raise RetraceError(fault)


def faults(paper: Paper) -> Iterator[str]:
    """What own stages need and the paper does not have, a sentence each."""
    for stage, about in paper.spec.stages.items():
        where = f"{card(paper)}: own.{stage}"
        for need in about.needs:
            if said := _fault(paper.spec, need, paper):
                yield f"{where}.needs: {said}"
        for name, file in about.makes.items():
            if Path(file).name != file.rstrip("/") or name in paper.spec.own[stage]["tables"]:
                yield f"{where}.makes.{name}: '{file}' is no name of a file or folder/ of its own"
        for file in [about.script, *about.code]:
            if file and not (paper.folder / file).is_file():
                yield f"{where}: there is no {file} beside paper.yaml; correct its name"


def _fault(spec: PaperSpec, need: str, paper: Paper) -> str:
    """What is wrong with a need; an empty string where nothing is."""
    if need in OF_ARMS or need in OF_PAPER:
        section = SECTION.get(need)
        if section and not getattr(spec, section):
            return f"{need}: paper.yaml has no section {section}; add it, or take the need out"
        if need == "corpus" and not (spec.corpus or spec.training):
            return "corpus: paper.yaml has no section corpus; add it, or take the need out"
        return ""
    if "/" in need:
        made = [f"{s}/{file}" for s, about in spec.stages.items() for file in about.makes]
        made += paper.tables()
        return "" if need in made else f"no table or file '{need}'{nearest(need, made)}"
    stage, _, what = need.partition(".")
    if what in OF_LENT and isinstance(spec.own.get(stage, {}).get("models"), dict):
        return ""
    lent = [f"{s}.{w}" for s, o in spec.own.items() if "models" in o for w in OF_LENT]
    there = [*OF_ARMS, *OF_PAPER, *lent]
    return f"'{need}' is none{nearest(need, there)}; there are {', '.join(there)}, or stage/table"
