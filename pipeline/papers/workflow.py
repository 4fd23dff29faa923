"""Which files a rule reads, and what a call of snakemake makes.

The rules name a helper, `arms_of("sae", "manifest.json")`, and snakemake asks it for paths once it
knows the wildcards of a job. What a helper answers is decided here, without snakemake:

1. `Inputs` knows the papers of a run (`papers.Run`) and where this checkout lies.
2. A method takes the wildcards, any object with the attributes scale, paper, arm, …, and returns
   paths relative to the working directory: of the store, results/store/<stage>/<id>/<file>, or of
   a paper, results/<scale>/<paper>/<file>.
3. A name that does not exist is a RetraceError with the nearest one that does.

rules/common.smk turns methods into helpers (rule_helpers.py) and adds what only snakemake knows:
files whose dates do not count, temporary files, object storage. What `params` say is decided in
rule_params.py.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.errors import RetraceError, nearest
from pipeline.figures.drawing import metrics_in
from pipeline.papers.folders import Paper, find
from pipeline.papers.papers import Item, Run
from pipeline.papers.paths import near, resolve

DRAWING = ("walk", "play", "draw")  # our code beside plotly.js, in this order

DICTIONARIES = ("sae", "sae_import")  # the stages that make some
LAYERED = ("transcoders", "transcoders_import")  # … that make transcoders of all layers
CROSSED = ("crosscoder", "crosscoder_import")  # … that make crosscoders


class Inputs:
    """Paths that rules read, of the papers of one run."""

    def __init__(self, run: Run, root: Path, storage: bool = False) -> None:
        """
        Args:
            root: the checkout, with pipeline/ and rules/.
            storage: whether results lie in an object storage, so that a job has its inputs beside
                it and nothing else.
        """
        self.run, self.root, self.storage = run, root, storage
        self._saes: dict[tuple[str, str, str], list[str]] = {}

    # --- a run -----------------------------------------------------------------------------

    def targets(self) -> list[str]:
        """What a run makes by default, the papers' own products aside."""
        base = f"results/{self.run.config.scale}"
        return [f"{base}/index.html"] + [f"{base}/strict.json"] * self.run.config.strict

    def products(self, _: Any, *names: str) -> list[str]:
        """All that the reports of papers rest on, so that what was deleted is made again."""
        found: list[str] = []
        for name in names:
            paper = self.run.paper(name, self.run.config.scale)
            base = home(paper)
            found += [f"{base}/{f}" for f in ("report.html", "claims.csv", "metrics.json")]
            figures = [f"{base}/figures/{f}" for f in paper.spec.figures]
            found += [f"{f}.{kind}" for f in figures for kind in ("html", "csv")]
            found += pages(paper)
            found += paper.tables().values()
        return found

    def rules_files(self) -> list[tuple[str, str]]:
        """(name, rules.smk) of every paper that has one."""
        files = {n: find(n, self.run.dirs) / "rules.smk" for n in self.run.available}
        return [(name, str(f.resolve())) for name, f in files.items() if f.exists()]

    def asked(self, argv: Iterable[str]) -> list[str]:
        """The papers that a command line names, or all of this run."""
        words = set(argv)
        return [n for n in self.run.available if n in words] or self.run.config.papers

    def others(self, wildcards: Any) -> list[str]:
        """claims.csv of papers that this call does not ask for and that have results.

        The index shows them as they lie there, and makes none of them again.
        """
        found = Path(f"results/{wildcards.scale}").glob("*/claims.csv")
        made = {f.parent.name: str(f) for f in found}
        asked = self.run.config.papers
        return [made[p] for p in self.run.available if p in made and p not in asked]

    # --- the store -------------------------------------------------------------------------

    def item(self, stage: str, wildcards: Any) -> Item:
        """The artefact whose digest is in the path of a job of the store."""
        return self.run.item(stage, getattr(wildcards, stage))

    def item_input(self, wildcards: Any, stage: str, made_from: str, file: str) -> str | list[str]:
        """A file of the artefact that a store artefact is made from; [] where it needs none."""
        folder = self.item(stage, wildcards).folders().get(made_from)
        return f"results/store/{folder}/{file}" if folder else []

    def item_inputs(self, wildcards: Any, stage: str, file: str, of: str = "") -> list[str]:
        """A file of every artefact that a store artefact is made from, in order.

        Args:
            of: the stage of these; default: any.
        """
        found = dict.fromkeys(self.item(stage, wildcards).folders().values())
        return [f"results/store/{at}/{file}" for at in found if not of or at.split("/")[0] == of]

    def item_source(self, wildcards: Any, stage: str, what: str) -> list[str]:
        """A file that no job makes: the local copy of a 'text', the paper's data.py as 'data'.

        A text outside of the working directory is named by the spec alone, and the artefact's id
        holds its digest: as an input its place would rerun the job in another clone.
        """
        found = self.item(stage, wildcards).inputs.get(what)
        if found and what == "text" and Path(found).is_absolute() and not self.storage:
            return []
        return [found] if found else []

    def training(self, wildcards: Any, run: str | None, file: str) -> str:
        """A file of a training run of the paper; without `run`, of the one in the wildcards."""
        paper = self.paper(wildcards)
        run = known("training run", run or wildcards.run, paper.spec.training, paper)
        return in_store(self._first_store(paper)[f"training:{run}"], file)

    def trainings(self, wildcards: Any, file: str, made_from: str = "training") -> list[str]:
        """A file of every training run of the paper, or of the artefacts they are made from."""
        paper = self.paper(wildcards)
        store = self._first_store(paper)
        items = [store[f"training:{run}"] for run in paper.spec.training]
        ids = [i.id if made_from == "training" else i.inputs.get(made_from) for i in items]
        return [f"results/store/{made_from}/{id}/{file}" for id in dict.fromkeys(ids) if id]

    def _first_store(self, paper: Paper) -> dict[str, Item]:
        """The store of one arm: training runs are the same in all."""
        return self.run.store(paper.name, paper.scale, paper.spec.arm_names()[0])

    # --- arms ------------------------------------------------------------------------------

    def paper(self, wildcards: Any) -> Paper:
        """The validated paper at the scale that the wildcards name."""
        return self.run.paper(wildcards.paper, wildcards.scale)

    def arm(self, wildcards: Any, section: str | None) -> str:
        """The arm in the wildcards, or the one that a section of paper.yaml is about."""
        paper = self.paper(wildcards)
        if section == "features" and "." in wildcards.latents:
            return known("arm", wildcards.latents.split(".")[0], paper.spec.arm_names(), paper)
        if section is None:
            return known("arm", wildcards.arm, paper.spec.arm_names(), paper)
        if getattr(paper.spec, section) is None:
            raise RetraceError(f"{card(paper)}: no section {section}, so no such file")
        return getattr(paper.spec, section).arm

    def arm_input(
        self, wildcards: Any, stage: str | tuple[str, ...], file: str,
        arm_section: str | None = None,
    ) -> list[str]:  # fmt: skip
        """A store file of an arm; the arm is a wildcard, or named by a section of paper.yaml.

        Args:
            stage: or several, as DICTIONARIES.
        """
        arm = self.arm(wildcards, arm_section)
        store = self.run.store(wildcards.paper, wildcards.scale, arm)
        stages = (stage,) if isinstance(stage, str) else stage
        return [in_store(item, file) for item in store.values() if item.stage in stages]

    def circuit_input(self, wildcards: Any, stage: str | tuple[str, ...], file: str) -> list[str]:
        """A store file of an arm, where the section circuits names dictionaries; else []."""
        needed = self.paper(wildcards).spec.circuits.saes
        return self.arm_input(wildcards, stage, file) if needed else []

    def arms(self, wildcards: Any, stage: str | tuple[str, ...], file: str) -> list[str]:
        """A file of every arm's artefact of a stage; arms sorted by name, as in `spec`'s JSON.

        Args:
            stage: or several, as DICTIONARIES.
        """
        paper = self.paper(wildcards)
        names = sorted(paper.spec.arm_names())
        stores = [self.run.store(paper.name, paper.scale, arm) for arm in names]
        stages = (stage,) if isinstance(stage, str) else stage
        items = [item for store in stores for item in store.values()]
        return [in_store(item, file) for item in items if item.stage in stages]

    def models(self, wildcards: Any, file: str) -> list[str]:
        """A file of every arm's model; arms sorted by name, as in `spec`'s JSON."""
        return self.arms(wildcards, "model", file)

    def crossed_input(self, wildcards: Any, file: str) -> list[str]:
        """A file of all activations that the crosscoders of the arm in the wildcards read."""
        store = self.run.store(wildcards.paper, wildcards.scale, self.arm(wildcards, None))
        items = [item for item in store.values() if item.stage in CROSSED]
        found = dict.fromkeys(folder for item in items for folder in item.folders().values())
        read = [folder for folder in found if folder.startswith("activations/")]
        return [f"results/store/{folder}/{file}" for folder in read]

    def sae_input(self, wildcards: Any, section: str | None, file: str) -> str:
        """A file beside the dictionary that a section or wildcard names, trained or imported."""
        paper, arm = self.paper(wildcards), self.arm(wildcards, section)
        name = getattr(wildcards, "latents", None) or getattr(paper.spec, section).sae
        name = name.rpartition(".")[2] if section == "features" else name
        known("SAE", name, self._saes_of(paper, arm), paper)
        return in_store(self.run.sae_item(paper.name, paper.scale, arm, name), file)

    def _saes_of(self, paper: Paper, arm: str) -> list[str]:
        """The names of an arm's dictionaries, expanded once for all of its pages."""
        at, spec = (paper.name, paper.scale, arm), paper.spec
        if at not in self._saes:
            found = (spec.saes_of(arm) | spec.crosscoders_of(arm)) if spec.sae else {}
            self._saes[at] = [*found, *spec.transcoders_of(arm)]
        return self._saes[at]

    # --- models of other papers ------------------------------------------------------------

    def lent_store(self, paper: Paper, model: dict) -> dict[str, Item]:
        """The artefacts of an arm that own.<section>.models names, of this paper or another."""
        lender = self.run.paper(model.get("paper") or paper.name, paper.scale)
        arm = known("arm", model.get("arm", "trained"), lender.spec.arm_names(), lender)
        return self.run.store(lender.name, lender.scale, arm)

    def lent(self, wildcards: Any, section: str, stage: str, file: str) -> list[str]:
        """A file of `stage` for each model that own.<section>.models names, sorted by name.

        A model is an arm of this paper, or of another whose name stands under `paper`: the store
        has it once for both.
        """
        paper = self.paper(wildcards)
        found = []
        for name, model in sorted(paper.spec.own[section]["models"].items()):
            store = self.lent_store(paper, model)
            if stage not in store:
                raise RetraceError(
                    f"{card(paper)}: own.{section}.models.{name}: paper "
                    f"{model.get('paper') or paper.name} has no {stage} at scale {paper.scale}; "
                    f"name another paper"
                )
            found.append(in_store(store[stage], file))
        return found

    def upstream(self, wildcards: Any) -> list[str]:
        """The files whose certificates a page follows, where a storage has to bring them."""
        paper = self.paper(wildcards)
        if not self.storage:
            return []
        stores = [self.run.store(paper.name, paper.scale, a) for a in paper.spec.arm_names()]
        items = [item for store in stores for item in store.values()]
        for own in paper.spec.own.values():
            models = own.get("models")
            for model in models.values() if isinstance(models, dict) else []:
                if isinstance(model, dict) and "paper" in model:
                    store = self.lent_store(paper, model)
                    items += [store[stage] for stage in ("model", "corpus") if stage in store]
        return self.run.upstream(items)

    # --- a paper's own files and products --------------------------------------------------

    def own_files(self, wildcards: Any, file: str) -> list[str]:
        """A paper's own .py files that fit a name; the param `code` says when they changed."""
        return self.paper(wildcards).code_files(file)

    def label_files(self, wildcards: Any) -> list[str]:
        """The files that labels of the section probes name."""
        paper = self.paper(wildcards)
        found = paper.spec.probes.label_files() if paper.spec.probes else []
        return [str(near(resolve(file, paper.folder, self.run.roots))) for file in found]

    def steering_input(self, wildcards: Any, stage: str | tuple[str, ...], file: str) -> list[str]:
        """A store file of steering's arm, where a direction is a row of a dictionary; else []."""
        directions = self.paper(wildcards).spec.steering.directions.values()
        needed = any(d.source == "dictionary" for d in directions)
        return self.arm_input(wildcards, stage, file, "steering") if needed else []

    def probed(self, wildcards: Any) -> list[str]:
        """The linear probes of steering's arm."""
        arm = self.arm(wildcards, "steering")
        return [f"{home(self.paper(wildcards))}/probes/{arm}_directions.safetensors"]

    def card(self, wildcards: Any) -> list[str]:
        """paper.yaml, for its place in git alone; what it says stands in the param `spec`."""
        return [str(card(self.paper(wildcards)))]

    def drawing(self, _: Any) -> list[str]:
        """Our code that figures.js holds beside plotly.js."""
        return [str(near(self.root / f"pipeline/report/templates/{name}.js")) for name in DRAWING]

    def tables(self, wildcards: Any, kind: str | None = None) -> list[str]:
        """The tables of a paper, or those that the figure in the wildcards names.

        A figure may also name 'metrics', which is metrics.json, and 'claims', claims.csv.
        """
        paper = self.paper(wildcards)
        if kind is None:
            return list(paper.tables().values())
        figure = known("figure", wildcards.figure, paper.spec.figures, paper)
        base = home(paper)
        made = {"metrics": f"{base}/metrics.json", "claims": f"{base}/claims.csv"}
        return [(paper.tables() | made)[t] for t in paper.spec.figures[figure].tables]

    def caption_metrics(self, wildcards: Any) -> list[str]:
        """metrics.json, where the caption of the figure in the wildcards has numbers."""
        paper = self.paper(wildcards)
        figure = known("figure", wildcards.figure, paper.spec.figures, paper)
        named = metrics_in(paper.spec.figures[figure].caption)
        return [f"{home(paper)}/metrics.json"] if named else []

    def beside(self, wildcards: Any) -> list[str]:
        """The table of the null arm's latents that a page of features shows beside its own."""
        paper = self.paper(wildcards)
        named = paper.spec.features and paper.spec.features.beside
        return [f"{home(paper)}/features/{named}.parquet"] if named else []

    def report(self, wildcards: Any, kind: str) -> list[str]:
        """'figures', their 'numbers' or 'pages' (of features) of a paper."""
        paper = self.paper(wildcards)
        figures = [f"{home(paper)}/figures/{f}" for f in paper.spec.figures]
        return {
            "figures": [f"{f}.html" for f in figures],
            "numbers": [f"{f}.{ending}" for f in figures for ending in ("csv", "csv.json")],
            "pages": pages(paper),
        }[kind]


def card(paper: Paper) -> Path:
    """Its paper.yaml."""
    return paper.folder / "paper.yaml"


def home(paper: Paper) -> str:
    """Folder of its results."""
    return f"results/{paper.scale}/{paper.name}"


def pages(paper: Paper) -> list[str]:
    """Its pages of features."""
    saes = paper.spec.features.saes if paper.spec.features else []
    return [f"{home(paper)}/features/{sae}.html" for sae in saes]


def in_store(item: Item, file: str) -> str:
    """A file of an artefact of the store."""
    return f"results/store/{item.stage}/{item.id}/{file}"


def known(what: str, name: str, names: Iterable[str], paper: Paper) -> str:
    """The name, where it is one of `names`; else one sentence, for a target that cannot be."""
    if name not in names:
        raise RetraceError(f"{card(paper)}: no {what} '{name}'{nearest(name, names)}")
    return name
