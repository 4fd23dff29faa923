"""The papers of a run, and the artefacts of the store that they need.

`Run` answers the rules' questions: which artefact a paper needs at a scale, under which digest,
made from which spec. folders.py reads folders and scales of papers, paths.py the paths in them.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import RetraceError
from pipeline.job import source
from pipeline.job.source import files_code
from pipeline.papers.folders import Paper, available, faults_of_scales, find, load, scales_of
from pipeline.papers.paths import in_spec, near, path_digest, resolve, resolve_many
from pipeline.spec import families
from pipeline.spec.base import SCALES
from pipeline.spec.imports import (
    CONFIG,
    ImportedCrosscoder,
    ImportedLayers,
    ImportSpec,
    crosscoder_listing,
    entries_of,
    layer_listing,
    listing,
)
from pipeline.spec.once import overlay
from pipeline.spec.paper import Config, PaperSpec, parse
from pipeline.spec.sae import CrosscoderSpec, OfSources, TranscodersSpec
from pipeline.spec.sources import CorpusSpec
from pipeline.spec.yaml_files import load_yaml
from pipeline.store.provenance import canonical, digest

CERTIFIED = {  # files of an artefact that carry a certificate, where it is not manifest.json
    "model": ["model.json"],
    "tokenizer": ["model.json"],
    "corpus": ["tokens.parquet", "documents.parquet"],
}
DIGEST_LENGTH = 12


@dataclass(frozen=True)
class Item:
    """One artefact of the store: how its job is called, and what it is made from."""

    stage: str
    id: str
    spec: dict
    inputs: dict[str, str]

    def folders(self) -> dict[str, str]:
        """Input -> '<stage>/<id>' of the artefact that it is, of those that are no files."""
        stored = {k: v for k, v in self.inputs.items() if k not in ("data", "text")}
        return {k: v if "/" in v else f"{k}/{v}" for k, v in stored.items()}


def _folder(key: str, name: str, bases: list[Path]) -> Path:
    """A folder of config.yaml: the first of `bases` that holds it."""
    for base in bases:
        if os.path.isdir(found := base / name):  # an absolute name stands for itself
            return near(found)
    tried = ", ".join(str(b) for b in bases)
    raise RetraceError(f"config.yaml: {key}: no folder '{name}' in {tried}; create or correct it")


class Run:
    """All papers of a run, and the store's artefacts that they need."""

    def __init__(self, config: Config, bases: list[Path]) -> None:
        self.config = config
        self.dirs = [_folder("papers_dirs", d, bases) for d in config.papers_dirs]
        self.roots = [_folder("roots", r, bases) for r in config.roots]
        self.available = list(dict.fromkeys([*config.papers, *available(self.dirs)]))
        self._papers: dict[tuple[str, str], Paper] = {}
        self._raw: dict[Path, dict] = {}
        self._items: dict[str, dict[str, Item]] = {}
        self._stores: dict[tuple[str, str, str], dict[str, Item]] = {}
        self._owners: dict[str, dict[str, None]] = {}  # an artefact's id -> papers
        self._sound: set[str] = set()  # papers without a fault at any scale
        self._keys: dict[str, str] = {}
        for name in config.papers:  # every fault that can be known now is told now
            self._check(name)
            for arm in self.paper(name, config.scale).spec.arm_names():
                self.store(name, config.scale, arm)

    @classmethod
    def load(cls, config: dict, bases: list[Path]) -> "Run":
        """The run that a config.yaml describes; its folders are looked up in `bases`, in turn."""
        return cls(parse(Config, config, "config.yaml"), bases)

    def _check(self, name: str) -> None:
        """Raise for the first fault of a paper at any of its scales.

        A folder that an earlier call found sound is so until a file of it, or ours, changes.
        """

        def look() -> dict[str, Any]:
            for scale in dict.fromkeys([self.config.scale, *SCALES, *self.scales(name)]):
                self.paper(name, scale)
            return {}

        source.remembered(["sound", *self.key(name)], look)
        self._sound.add(name)

    def key(self, name: str) -> tuple[str, bool]:
        """What decides all that a paper says: its folder, and whether its arms may be of a hub."""
        if name not in self._keys:
            self._keys[name] = source.folder_key(find(name, self.dirs))
        return self._keys[name], self.config.hub

    def _yaml(self, name: str) -> tuple[Path, dict[str, Any]]:
        """The folder of a paper, and its paper.yaml as it stands there."""
        folder = find(name, self.dirs)
        if folder not in self._raw:
            file = folder / "paper.yaml"
            key = ["yaml", source.file_key(file)]
            self._raw[folder] = source.remembered(key, lambda: load_yaml(file))
        return folder, self._raw[folder]

    def paper(self, name: str, scale: str) -> Paper:
        """A paper at a scale, loaded and validated once; its store items become known."""
        if (name, scale) not in self._papers:
            folder, raw = self._yaml(name)
            sound = name in self._sound
            self._papers[name, scale] = load(folder, scale, raw, self.config.hub, sound)
        return self._papers[name, scale]

    def scales(self, name: str = "") -> list[str]:
        """The scales that a paper has; without a name those of any paper that can be read."""
        out = dict.fromkeys(SCALES)
        for paper in [name] if name else self.available:
            with contextlib.suppress(RetraceError):
                folder, raw = self._yaml(paper)
                if not list(faults_of_scales(raw, folder)):
                    out |= dict.fromkeys(scales_of(raw))
        return list(out)

    def card(self, name: str, fields: Iterable[str]) -> dict[str, Any]:
        """Fields of a paper.yaml as they stand there, empty where one is missing; unchecked."""
        _, raw = self._yaml(name)
        return {f: raw.get(f, "") for f in fields}

    def sections(self, name: str, section: str) -> tuple[Path, dict[str, Any]]:
        """The folder of a paper, and scale -> one of its sections as it stands there; unchecked."""
        folder, raw = self._yaml(name)
        over = raw.get("scales") if isinstance(raw.get("scales"), dict) else {}
        scales = self.scales(name)
        at = {s: o.get(section) if isinstance(o := over.get(s), dict) else None for s in scales}
        return folder, {
            s: overlay(raw.get(section), o) if o else raw.get(section) for s, o in at.items()
        }

    def item(self, stage: str, id: str) -> Item:
        """The store's artefact with this id."""
        if id not in self._items.get(stage, {}):
            for name in self.available:  # a job on another node starts from the id alone
                for scale in self.scales(name):
                    try:
                        for arm in self.paper(name, scale).spec.arm_names():
                            self.store(name, scale, arm)
                    except RetraceError:
                        continue
        try:
            return self._items[stage][id]
        except KeyError:
            raise RetraceError(
                f"results/store/{stage}/{id}: no paper of config.yaml makes this; its spec may "
                f"have changed since"
            ) from None

    def store(self, name: str, scale: str, arm: str) -> dict[str, Item]:
        """The store's artefacts of one arm: stage -> item.

        Those that are several have names: 'training:<run>', and 'sae:<hook>' or, of transcoders,
        'sae:<hook> to <output hook>'; 'import:<dictionary>' is a published one, and
        'crosscoder:<source> and <source>' those over these sources, under the first of their arms,
        'transcoders:<read> to <written>' those of all layers, 'layers:<dictionary>' and
        'crossed:<dictionary>' published ones.
        """
        if (name, scale, arm) not in self._stores:
            self._stores[name, scale, arm] = self._store(name, scale, arm)
        return self._stores[name, scale, arm]

    def papers_of(self, wildcards: dict[str, str]) -> list[str]:
        """The papers that a job works for: the one of its wildcards, or all that need its artefact.

        Only papers whose artefacts this run has asked for are known.
        """
        if "paper" in wildcards:
            return [wildcards["paper"]]
        if not self._owners:
            for (name, _, _), items in self._stores.items():
                for file in self.upstream(items.values()):
                    self._owners.setdefault(file.split("/")[3], {})[name] = None
        return [name for id in wildcards.values() for name in self._owners.get(id, ())]

    def sae_item(self, name: str, scale: str, arm: str, sae: str) -> Item:
        """The store's artefact that holds a dictionary of an arm, trained or published."""
        store, spec = self.store(name, scale, arm), self.paper(name, scale).spec
        if sae in (crossed := spec.crosscoders_of(arm)):
            sources = _sources(crossed[sae], arm, spec)
            return store.get(f"crossed:{sae}") or store[f"crosscoder:{sources}"]
        if sae in (layered := spec.transcoders_of(arm)):
            return store.get(f"layers:{sae}") or store[f"transcoders:{layered[sae].stream}"]
        dictionary = spec.saes_of(arm)[sae]
        return store.get(f"import:{sae}") or store[f"sae:{dictionary.stream}"]

    def upstream(self, items: Iterable[Item]) -> list[str]:
        """Files with certificates of some artefacts and of all that they are made from, sorted."""
        stack, files = list(items), set()
        while stack:
            item = stack.pop()
            certified = CERTIFIED.get(item.stage, ["manifest.json"])
            files |= {f"results/store/{item.stage}/{item.id}/{file}" for file in certified}
            stack += [self.item(*folder.split("/")) for folder in item.folders().values()]
        return sorted(files)

    def _store(self, name: str, scale: str, arm: str) -> dict[str, Item]:
        """`store`, made."""
        paper = self.paper(name, scale)
        out: dict[str, Item] = {}
        for run in paper.spec.training:
            out[f"training:{run}"] = self._training(paper, run)
        if paper.spec.model is None:
            return out
        model = out["model"] = self._model(paper, arm)[0]
        if paper.spec.corpus is not None:
            out["corpus"] = self._corpus(paper, paper.spec.corpus_of(arm))
        if paper.spec.activations is not None:
            out["activations"] = self._activations(paper, model, out["corpus"])
        if paper.spec.sae is not None:
            by_stream: dict[str, dict] = {}
            for sae, dictionary in paper.spec.saes_of(arm).items():
                if isinstance(dictionary, ImportSpec):
                    out[f"import:{sae}"] = self._import(paper, sae, dictionary, model.id)
                    continue
                by_stream.setdefault(dictionary.stream, {})[sae] = dictionary.model_dump(
                    exclude={"grid", "arms"}
                )
            for stream, saes in by_stream.items():
                hook, _, output_hook = stream.partition(" to ")
                section = {
                    "hook": hook,
                    **({"output_hook": output_hook} if output_hook else {}),
                    "training": paper.spec.sae.training.model_dump(),
                    "dictionaries": saes,
                }
                spec, inputs = {"sae": section}, {"activations": out["activations"].id}
                if paper.spec.activations.window:  # its rows are made in the job itself
                    spec |= out["activations"].spec
                    inputs |= out["activations"].inputs
                out[f"sae:{stream}"] = self._item(
                    "sae", f"{_slug(model.id)}-{re.sub('[. ]', '_', stream)}", spec, inputs
                )
            out |= self._crosscoders(paper, arm)
            out |= self._transcoders(paper, arm, model, out["activations"])
        return out

    def _transcoders(
        self, paper: Paper, arm: str, model: Item, activations: Item
    ) -> dict[str, Item]:
        """The transcoders of all layers of an arm; those of the same hooks share a job."""
        spec, by_stream, out = paper.spec, {}, {}
        for name, dictionary in spec.transcoders_of(arm).items():
            if isinstance(dictionary, ImportedLayers):
                out[f"layers:{name}"] = self._import_layers(paper, name, dictionary, model.id)
                continue
            by_stream.setdefault(dictionary.stream, {})[name] = dictionary
        for stream, found in by_stream.items():
            first: TranscodersSpec = next(iter(found.values()))
            kept = {"grid", "arms", "hook", "output_hook", "reads", "writes"}
            section = {
                "pairs": first.pairs(spec.activations.hooks),
                "training": spec.sae.training.model_dump(),
                "dictionaries": {n: d.model_dump(exclude=kept) for n, d in found.items()},
            }
            name = f"{_slug(model.id)}-{re.sub('[. ]', '_', stream)}"
            made_from = {"activations": activations.id}
            item = self._item("transcoders", name, {"transcoders": section}, made_from)
            out[f"transcoders:{stream}"] = item
        return out

    def _activations(self, paper: Paper, model: Item, corpus: Item) -> Item:
        section = {"activations": paper.spec.activations.model_dump()}
        made_from = {"model": model.id, "corpus": corpus.id}
        return self._item("activations", _slug(model.id), section, made_from)

    def _crosscoders(self, paper: Paper, arm: str) -> dict[str, Item]:
        """The crosscoders that stand under an arm's name; those of the same sources share a job."""
        spec, by_sources, out = paper.spec, {}, {}
        for name, dictionary in spec.crosscoders_of(arm).items():
            if isinstance(dictionary, ImportedCrosscoder):
                out[f"crossed:{name}"] = self._import_crosscoder(paper, arm, name, dictionary)
                continue
            by_sources.setdefault(_sources(dictionary, arm, spec), {})[name] = dictionary
        return out | {
            f"crosscoder:{sources}": self._crosscoder(paper, arm, dictionaries)
            for sources, dictionaries in by_sources.items()
        }

    def _read_by(
        self, paper: Paper, arm: str, dictionary: OfSources
    ) -> tuple[list[dict[str, Any]], list[str], list[str]]:
        """The sources of a crosscoder; ids of their activations, and of the model of each."""
        spec = paper.spec
        found = dictionary.sources(arm, spec.activations.hooks[0])
        arms, hooks = (list(dict.fromkeys(names)) for names in zip(*found, strict=True))
        stored, models = {}, {}  # of arms; those of one model and text have the same
        for name in arms:
            corpus, model = self._corpus(paper, spec.corpus_of(name)), self._model(paper, name)[0]
            stored[name], models[name] = self._activations(paper, model, corpus).id, model.id
        ids = list(dict.fromkeys(stored.values()))
        sources = [
            {
                "name": " ".join([a] * (len(arms) > 1) + [h] * (len(hooks) > 1)),
                "hook": h,
                "activations": ids.index(stored[a]),
            }
            for a, h in found
        ]
        return sources, ids, [models[a] for a, _ in found]

    def _crosscoder(self, paper: Paper, arm: str, dictionaries: dict[str, CrosscoderSpec]) -> Item:
        """The artefact of crosscoders that share their sources."""
        spec, first = paper.spec, next(iter(dictionaries.values()))
        sources, ids, _ = self._read_by(paper, arm, first)
        found = first.sources(arm, spec.activations.hooks[0])
        arms, hooks = (list(dict.fromkeys(names)) for names in zip(*found, strict=True))
        kept = {"grid", "arms", "hook", "hooks", "models", "output_hook"}
        section = {
            "sources": sources,
            "training": spec.sae.training.model_dump(),
            "dictionaries": {n: d.model_dump(exclude=kept) for n, d in dictionaries.items()},
        }
        name = f"{'_'.join(arms)[:60]}-{re.sub('[. ]', '_', hooks[0])}_of_{len(found)}"
        inputs = {f"activations_{i}": f"activations/{id}" for i, id in enumerate(ids)}
        return self._item("crosscoder", name, {"crosscoder": section}, inputs)

    def _model(self, paper: Paper, arm: str, over: dict | None = None) -> tuple[Item, Any]:
        """The model's item, and the identity of its source (which fixes the tokenizer)."""
        section = paper.spec.model_of(arm).model_copy(update=over or {})
        fields = {
            "package": ["source", "sha256"],
            "hub": ["source", "repo", "revision"],
            "folder": ["source"],
            "training": ["source", "member", "step"],
        }[section.source]
        source = section.model_dump(include=set(fields))
        inputs = {}
        job = section.model_dump(exclude={"name"} if section.family else {"name", "family"})
        if section.family in families.types():
            source["family"] = section.family
        elif section.family:
            path = resolve(section.family, paper.folder, [*self.roots, *self.dirs])
            source["family"], job["family"] = path_digest(path), in_spec(path)
        if section.source == "folder":
            path = resolve(section.path, paper.folder, self.roots)
            source["content"] = path_digest(path)
            job["path"] = in_spec(path)
        if section.source == "training":
            run = self._training(paper, section.run)
            source["run"], inputs["training"] = run.id, run.id
            if "tokenizer" in run.inputs:
                inputs["tokenizer"] = run.inputs["tokenizer"]
        fates = {"weights", "processing"} | ({"seed"} if section.weights != "trained" else set())
        name = (
            section.name
            or {
                "package": Path(section.file).stem,
                "hub": section.repo.split("/")[-1],
                "folder": Path(section.path).name,
                "training": f"{section.run}{section.member and '-' + section.member}-"
                f"{ {-1: 'last', -2: 'best'}.get(section.step, section.step) }",
            }[section.source]
        )
        if section.weights != "trained":
            name += f"-{section.weights}"
        identity = [source, section.model_dump(include=fates)]
        return self._item("model", name, {"model": job}, inputs, identity), source

    def _import(self, paper: Paper, name: str, section: ImportSpec, model: str) -> Item:
        """A published dictionary, checked against one model: known by its files or its commit."""
        job = section.model_dump(exclude={"arms"}) | {"name": name}
        identity = dict(job)
        if section.source == "folder":
            path = resolve(section.path, paper.folder, self.roots)
            job["path"] = in_spec(path)
            file, beside, optional = listing(section.format, path.as_posix())
            found = [Path(f) for f in (file, *beside, *optional)]
            identity["path"] = [[f.name, path_digest(f)] for f in found if f.is_file()]
        inputs = {"model": model}
        return self._item(
            "sae_import", f"{_slug(model)}-{name}", {"import": job}, inputs, [identity, model]
        )

    def _import_layers(self, paper: Paper, name: str, section: ImportedLayers, model: str) -> Item:
        """Published transcoders of all layers, known by their files or their commit."""
        pairs = section.pairs(paper.spec.activations.hooks)
        numbers = [int(written.split(".")[1]) for _, written in pairs]
        kept = {"source", "format", "repo", "revision"}
        layers = "cross" if section.cross else "each"
        job = section.model_dump(include=kept) | {"name": name, "layers": layers, "pairs": pairs}
        job |= {"revisions": section.revisions} if section.revisions else {}
        job["paths"] = section.folders(numbers)
        identity = dict(job)
        if section.source == "folder":
            found = [resolve(path, paper.folder, self.roots) for path in job["paths"]]
            job["paths"] = [in_spec(path) for path in found]
            paths = [path.as_posix() for path in found]
            files = [
                Path(file)
                for weights, beside, optional in layer_listing(
                    section.format, layers, paths, numbers
                )
                for file in (weights, *beside, *optional)
            ]
            config = Path(paths[0]) / CONFIG
            if section.format == "circuit_tracer" and config.is_file():
                files += [config.parent / e.path for e in entries_of(config) if not e.repo]
            files = list(dict.fromkeys(files))
            identity["paths"] = [[f.name, path_digest(f)] for f in files if f.is_file()]
        return self._item(
            "transcoders_import", f"{_slug(model)}-{name}", {"import": job}, {"model": model},
            [identity, model],
        )  # fmt: skip

    def _import_crosscoder(
        self, paper: Paper, arm: str, name: str, section: ImportedCrosscoder
    ) -> Item:
        """A published crosscoder over the sources of an arm, known by its files or its commit."""
        sources, ids, models = self._read_by(paper, arm, section)
        every = list(dict.fromkeys(models))
        read_by = [
            {
                "name": source["name"], "hook": source["hook"], "model": every.index(model),
                "activations": in_store("activations", ids[source["activations"]]),
            }
            for source, model in zip(sources, models, strict=True)
        ]  # fmt: skip
        kept = {"source", "format", "repo", "revision", "path"}
        job = section.model_dump(include=kept) | {"name": name, "sources": read_by}
        identity = dict(job)
        if section.source == "folder":
            path = resolve(section.path, paper.folder, self.roots)
            job["path"] = in_spec(path)
            weights, beside, optional = crosscoder_listing(
                section.format, path.as_posix(), len(read_by)
            )
            files = [Path(f) for f in (weights, *beside, *optional)]
            identity["path"] = [[f.name, path_digest(f)] for f in files if f.is_file()]
        inputs = {f"model_{i}": f"model/{id}" for i, id in enumerate(every)}
        inputs |= {f"activations_{i}": f"activations/{id}" for i, id in enumerate(ids)}
        return self._item(
            "crosscoder_import", f"{_slug(every[0])}-{name}", {"import": job}, inputs,
            [identity, every],
        )  # fmt: skip

    def _training(self, paper: Paper, name: str) -> Item:
        """A run of the section training: made from the paper's data.py, or from its corpus.

        One that starts from another run is made from that, too.
        """
        run = paper.spec.training[name]
        section, before = {"training": run.model_dump()}, {}
        if run.start:
            before = {"start": f"training/{self._training(paper, run.start.run).id}"}
        if run.data.source == "corpus":
            corpus = self._corpus(paper, paper.spec.corpus)
            inputs = {"corpus": corpus.id, "tokenizer": corpus.inputs["tokenizer"]} | before
            return self._item("training", name, section, inputs)
        data = paper.folder / "data.py"
        if not data.is_file():
            raise RetraceError(
                f"{paper.folder / 'paper.yaml'}: training.{name}: source: own needs {data}, with "
                f"a function '{run.data.function}'"
            )
        identity = [section, files_code([data]), *before.values()]
        return self._item("training", name, section, {"data": str(data)} | before, identity)

    def _tokenizer(self, paper: Paper, job: dict, identity: dict, inputs: dict) -> Item:
        """A tokenizer made from the text of the paper's corpus."""
        section = paper.spec.tokenizer.model_dump()
        text, made_from = (
            {k: v for k, v in d.items() if k in CorpusSpec.TEXT} for d in (identity, job)
        )
        made = {"tokenizer": section, "corpus": made_from}
        return self._item("tokenizer", section["kind"], made, inputs, [section, text])

    def _corpus(self, paper: Paper, section: CorpusSpec) -> Item:
        job = section.model_dump(exclude={"name"})
        identity = dict(job)
        if section.source == "local":
            path, files = resolve_many(section.path, paper.folder, self.roots)
            job["path"] = in_spec(path)
            identity["path"] = path_digest(path, files)
        inputs = {}
        if section.source == "url":  # pinned by its sha256, wherever it is read
            identity["path"] = identity["url"] = ""
            if section.path:
                path = resolve(section.path, paper.folder, self.roots, may_miss=True)
                job["path"] = in_spec(path)
                inputs |= {"text": str(near(path))} if path.exists() else {}
        name = (
            section.name
            or {
                "package": section.package.split("==")[0],
                "hub": section.repo.split("/")[-1],
                "local": Path(section.path).stem,
                "url": Path(section.url).stem,
            }[section.source]
        )
        if paper.spec.tokenizer is not None:
            tokenizer = self._tokenizer(paper, job, identity, dict(inputs))
            inputs["tokenizer"] = f"tokenizer/{tokenizer.id}"
            return self._item("corpus", name, {"corpus": job}, inputs, [identity, tokenizer.id])
        trained = {"weights": "trained", "processing": "raw"}
        tokenizer, source = self._model(paper, paper.spec.arm_names()[0], trained)
        inputs["tokenizer"] = f"model/{tokenizer.id}"
        return self._item("corpus", name, {"corpus": job}, inputs, [identity, source])

    def _item(
        self, stage: str, name: str, section: dict, inputs: dict, identity: Any = None
    ) -> Item:
        short = digest([stage, identity or section, {} if identity else inputs], DIGEST_LENGTH)
        item = Item(stage, f"{name}-{short}", section, inputs)
        self._items.setdefault(stage, {})[item.id] = item
        return item


def in_store(stage: str, id: str) -> str:
    """The manifest of an artefact, as certificates name it."""
    return f"results/store/{stage}/{id}/manifest.json"


def _sources(dictionary: OfSources, arm: str, spec: PaperSpec) -> str:
    """A crosscoder's sources, 'arm hook and arm hook'."""
    return " and ".join(map(" ".join, dictionary.sources(arm, spec.activations.hooks[0])))


def _slug(model_id: str) -> str:
    return model_id.rsplit("-", 1)[0]


def flow(value: Any) -> str:
    """A setting as --config takes it: [a, b] without spaces."""
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)


def to_json(section: Any) -> str:
    """A section as canonical JSON, for a rule's params; ASCII, since a command line carries it
    through any locale."""
    plain = json.loads(canonical(section))
    return json.dumps(plain, sort_keys=True, separators=(",", ":"))
