"""Find, load, overlay and validate paper folders; digests of the store.

A paper is a folder with a paper.yaml. `load` lays the overlay of a scale over its sections and
validates the whole before anything runs. `Run` answers the rules' questions: which artefact of
the store a paper needs at a scale, under which digest, made from which spec.
"""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.downloads import fetch
from pipeline.errors import RetraceError, nearest
from pipeline.job.source import files_code
from pipeline.spec import paper as spec
from pipeline.spec.base import SCALES
from pipeline.spec.imports import ImportSpec, listing
from pipeline.spec.once import overlay
from pipeline.spec.paper import Config, CorpusSpec, PaperSpec
from pipeline.spec.yaml_files import load_yaml
from pipeline.store import intact
from pipeline.store.provenance import canonical, digest

CERTIFIED = {  # files of an artefact that carry a certificate, where it is not manifest.json
    "model": ["model.json"],
    "tokenizer": ["model.json"],
    "corpus": ["tokens.parquet", "documents.parquet"],
}
DIGEST_LENGTH = 12
NOTES = Path("results/store/.digests")  # below the working directory


@dataclass(frozen=True)
class Paper:
    """A validated paper at one scale."""

    name: str
    folder: Path
    scale: str
    spec: PaperSpec

    def tables(self) -> dict[str, str]:
        """Name -> path of every table that this paper's stages write, e.g. 'evaluation/trained'."""
        names = [f"{stage}/{t}" for stage, s in self.spec.own.items() for t in s["tables"]]
        names += [f"training/{run}" for run in self.spec.training]
        if self.spec.sae:
            names += [f"evaluation/{arm}" for arm in self.spec.arm_names()]
            names += [f"evaluation/{arm}_history" for arm in self.spec.arm_names()]
        if self.spec.benchmarks:
            names += [f"benchmarks/{arm}" for arm in self.spec.arm_names()]
        if self.spec.absorption:
            names += [f"absorption/{arm}" for arm in self.spec.arm_names()]
        if self.spec.features:
            names += [f"features/{s}" for s in self.spec.features.saes]
        if self.spec.attribution:
            names += ["attribution/prompts", "attribution/latents"]
        if self.spec.circuits:
            parts = ("nodes", "edges", "methods")
            names += [f"circuits/{a}_{part}" for a in self.spec.circuit_arms() for part in parts]
        return {n: f"results/{self.scale}/{self.name}/{n}.parquet" for n in names}

    def code_files(self, *names: str) -> list[str]:
        """The paper's own .py files: all, or those that fit `names`, e.g. 'figures*.py'."""
        return [str(f) for name in names or ["*.py"] for f in sorted(self.folder.glob(name))]


# --- paper folders -------------------------------------------------------------------------


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


def load(folder: Path, scale: str, raw: dict | None = None, hub: bool = False) -> Paper:
    """The paper in `folder` at `scale`, validated.

    Args:
        raw: what `load_yaml` gives of its paper.yaml, where that was read before.
        hub: whether arms may come from a hub; else those that do are left out.
    """
    file = folder / "paper.yaml"
    raw = dict(load_yaml(file) if raw is None else raw)
    scales = raw.pop("scales", None) or {}
    if not isinstance(scales, dict):
        raise RetraceError(f"{file}: scales: must be a mapping from smoke, laptop, paper")
    for key in scales:
        if key not in SCALES:
            raise RetraceError(f"{file}: scales: unknown scale '{key}'{nearest(key, SCALES)}")
    merged = overlay(raw, scales.get(scale) or {})
    if not hub and isinstance(merged, dict):
        merged = _without_hub(merged)
    parsed = spec.parse(PaperSpec, merged, f"{file} ({scale})")
    paper = Paper(folder.name, folder, scale, filled(parsed, f"{file} ({scale})"))
    from pipeline.claims import verdicts
    from pipeline.figures import drawing  # they read papers, too
    from pipeline.papers import own

    for part in (own, verdicts, drawing):
        part.check(paper)
    return paper


PLACE = re.compile(r"\{(\w+(?:\.\w+)+)\}")


def filled(paper: PaperSpec, where: str) -> PaperSpec:
    """The paper with the numbers of its scale in the text of its deviations and captions.

    '{sae.training.dead_rows}' is that setting at this scale, with commas: '100,000'. What is no
    setting stays in a caption, since it may be a metric (pipeline/figures/captions.py).

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

    Published dictionaries that only such arms have are left out, too.
    """
    arms = raw.get("arms")
    if not isinstance(arms, dict):
        return raw

    def from_hub(arm: Any) -> bool:
        return isinstance(arm, dict) and spec.on_hub(arm).get("source") == "hub"

    here = {name: arm for name, arm in arms.items() if not from_hub(arm)} or arms
    gone = set(map(str, arms)) - set(map(str, here))
    circuits = raw.get("circuits")
    if isinstance(circuits, dict) and isinstance(circuits.get("without"), list):
        left = [arm for arm in circuits["without"] if arm in here or arm not in arms]
        raw = raw | {"circuits": circuits | {"without": left}}
    section = raw.get("sae")
    if isinstance(section, dict) and isinstance(section.get("dictionaries"), dict):
        kept = {name: sae for name, sae in section["dictionaries"].items() if not _of(sae, gone)}
        raw = raw | {"sae": section | {"dictionaries": kept}}
    return raw | {"arms": here}


def _of(sae: Any, arms: set[str]) -> bool:
    """Whether a published dictionary belongs to some of these arms and to no other."""
    own = sae.get("arms") if isinstance(sae, dict) and "source" in sae else None
    return isinstance(own, list) and bool(own) and arms.issuperset(map(str, own))


# --- digests and the store -----------------------------------------------------------------


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


def resolve(path: str, folder: Path, roots: list[Path], may_miss: bool = False) -> Path:
    """A path of a paper.yaml, made absolute: relative to the paper's folder or a root.

    Args:
        may_miss: a path that does not exist is given back where a root would have it.

    Raises:
        RetraceError: it lies outside the paper's folder and the roots of config.yaml, or is
            missing.
    """
    try:
        tried = [(base / path).resolve() for base in [folder, *roots]]
        inside = [p for p in tried if any(p.is_relative_to(r.resolve()) for r in [folder, *roots])]
        found = next((p for p in tried if p.exists()), None)
    except (OSError, ValueError) as e:  # a name that is too long, or holds a null byte
        raise RetraceError(
            f"{folder / 'paper.yaml'}: path {path[:80]!r} is none ({e!r:.80})"
        ) from e
    if not inside or (found and found not in inside):
        raise RetraceError(
            f"{folder / 'paper.yaml'}: path '{path}' lies outside the paper's folder and the roots "
            f"{', '.join(map(str, roots))}; add its folder to roots in config.yaml if you trust it"
        )
    if found:
        _no_way_out(found, folder, roots)
        return found
    if may_miss:
        return inside[-1]
    raise RetraceError(
        f"{folder / 'paper.yaml'}: path '{path}' does not exist; looked at {inside[0]}"
    )


def _no_way_out(path: Path, folder: Path, roots: list[Path]) -> None:
    """No link inside a folder leads out of the allowed ones."""
    allowed = [r.resolve() for r in [folder, path, *roots]]
    for file in path.rglob("*") if path.is_dir() else []:
        if file.is_symlink() and not any(file.resolve().is_relative_to(r) for r in allowed):
            raise RetraceError(
                f"{folder / 'paper.yaml'}: {file} is a link to {file.resolve()}, outside the "
                f"paper's folder and the roots; add its folder to roots in config.yaml if you "
                f"trust it"
            )


def resolve_many(path: str, folder: Path, roots: list[Path]) -> tuple[Path, list[Path]]:
    """`resolve` for a path that may have * in its last part, and the files that fit it, if so."""
    head, _, last = path.rpartition("/")
    if "*" not in last:
        return resolve(path, folder, roots), []
    pattern = resolve(head or ".", folder, roots) / last
    try:
        return pattern, fetch.fitting(pattern)
    except RetraceError as e:
        raise RetraceError(f"{folder / 'paper.yaml'}: {e}") from None


def path_digest(path: Path, files: list[Path] | None = None) -> str:
    """Digest of a file's bytes, or of the names and bytes of a folder's files.

    Args:
        files: those of them that count; default: all.
    """
    if files:
        return digest([[f.name, intact.noted_sha256(f, NOTES)] for f in files])
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return digest([[str(f.relative_to(path)), intact.noted_sha256(f, NOTES)] for f in files])


def near(path: Path) -> Path:
    """A path as seen from the working directory where it lies in it, else absolute.

    Such paths stand in the inputs and parameters of jobs, and a checkout that moves must not
    rerun them.
    """
    path, here = path.absolute(), Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


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
        for name in config.papers:  # every fault that can be known now is told now
            for scale in SCALES:
                self.paper(name, scale)
            for arm in self.paper(name, config.scale).spec.arm_names():
                self.store(name, config.scale, arm)

    @classmethod
    def load(cls, config: dict, bases: list[Path]) -> "Run":
        """The run that a config.yaml describes; its folders are looked up in `bases`, in turn."""
        return cls(spec.parse(Config, config, "config.yaml"), bases)

    def paper(self, name: str, scale: str) -> Paper:
        """A paper at a scale, loaded and validated once; its store items become known."""
        if (name, scale) not in self._papers:
            folder = find(name, self.dirs)
            if folder not in self._raw:
                self._raw[folder] = load_yaml(folder / "paper.yaml")
            self._papers[name, scale] = load(folder, scale, self._raw[folder], self.config.hub)
        return self._papers[name, scale]

    def card(self, name: str, fields: Iterable[str]) -> dict[str, Any]:
        """Fields of a paper.yaml as they stand there, empty where one is missing; unchecked."""
        folder = find(name, self.dirs)
        if folder not in self._raw:
            self._raw[folder] = load_yaml(folder / "paper.yaml")
        return {f: self._raw[folder].get(f, "") for f in fields}

    def sections(
        self, name: str, section: str, scales: Iterable[str]
    ) -> tuple[Path, dict[str, Any]]:
        """The folder of a paper, and scale -> one of its sections as it stands there; unchecked."""
        folder = find(name, self.dirs)
        if folder not in self._raw:
            self._raw[folder] = load_yaml(folder / "paper.yaml")
        raw = self._raw[folder]
        over = raw.get("scales") if isinstance(raw.get("scales"), dict) else {}
        at = {s: o.get(section) if isinstance(o := over.get(s), dict) else None for s in scales}
        return folder, {
            s: overlay(raw.get(section), o) if o else raw.get(section) for s, o in at.items()
        }

    def item(self, stage: str, id: str) -> Item:
        """The store's artefact with this id."""
        if id not in self._items.get(stage, {}):
            for name in self.available:  # a job on another node starts from the id alone
                for scale in SCALES:
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
        'sae:<hook> to <output hook>'; 'import:<dictionary>' is a published one.
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
        store = self.store(name, scale, arm)
        dictionary = self.paper(name, scale).spec.saes_of(arm)[sae]
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
            section = paper.spec.activations.model_dump()
            made_from = {"model": model.id, "corpus": out["corpus"].id}
            out["activations"] = self._item(
                "activations", _slug(model.id), {"activations": section}, made_from
            )
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
                out[f"sae:{stream}"] = self._item(
                    "sae",
                    f"{_slug(model.id)}-{re.sub('[. ]', '_', stream)}",
                    {"sae": section},
                    {"activations": out["activations"].id},
                )
        return out

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
        if section.family:
            path = resolve(section.family, paper.folder, [*self.roots, *self.dirs])
            source["family"], job["family"] = path_digest(path), str(near(path))
        if section.source == "folder":
            path = resolve(section.path, paper.folder, self.roots)
            source["content"] = path_digest(path)
            job["path"] = str(near(path))
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
            job["path"] = str(near(path))
            file, beside, optional = listing(section.format, path.as_posix())
            found = [Path(f) for f in (file, *beside, *optional)]
            identity["path"] = [[f.name, path_digest(f)] for f in found if f.is_file()]
        inputs = {"model": model}
        return self._item(
            "sae_import", f"{_slug(model)}-{name}", {"import": job}, inputs, [identity, model]
        )

    def _training(self, paper: Paper, name: str) -> Item:
        """A run of the section training: made from the paper's data.py, or from its corpus."""
        run = paper.spec.training[name]
        section = {"training": run.model_dump()}
        if run.data.source == "corpus":
            corpus = self._corpus(paper, paper.spec.corpus)
            inputs = {"corpus": corpus.id, "tokenizer": corpus.inputs["tokenizer"]}
            return self._item("training", name, section, inputs)
        data = paper.folder / "data.py"
        if not data.is_file():
            raise RetraceError(
                f"{paper.folder / 'paper.yaml'}: training.{name}: source: own needs {data}, with "
                f"a function '{run.data.function}'"
            )
        identity = [section, files_code([data])]
        return self._item("training", name, section, {"data": str(data)}, identity)

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
            job["path"] = str(near(path))
            identity["path"] = path_digest(path, files)
        inputs = {}
        if section.source == "url":  # pinned by its sha256, wherever it is read
            identity["path"] = identity["url"] = ""
            if section.path:
                path = resolve(section.path, paper.folder, self.roots, may_miss=True)
                job["path"] = str(near(path))
                inputs |= {"text": job["path"]} if path.exists() else {}
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
