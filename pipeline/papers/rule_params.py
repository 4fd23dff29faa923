"""What a rule's `params` say: the settings and the code that a job's results depend on.

Snakemake reruns a job when one of its params changes, so each of these is exact: `spec` is the part
of paper.yaml that the stage needs, as canonical JSON, and `code` a digest over the definitions that
the job can reach (source.py). Both are decided here, without snakemake, so that a test can compare
them before and after an edit. Paths are the business of workflow.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.claims.scalars import parts
from pipeline.claims.verdicts import for_the_job
from pipeline.errors import RetraceError
from pipeline.figures.kinds import KINDS
from pipeline.job import source
from pipeline.papers.folders import Paper, find
from pipeline.papers.papers import flow, to_json
from pipeline.papers.paths import near
from pipeline.papers.workflow import Inputs, card, home, known
from pipeline.report import done
from pipeline.report.shown import headline
from pipeline.store import provenance

CARD = ("title", "authors", "year", "url", "summary")  # fields that the index shows
HINTS = ("papers_dirs", "roots", "hub")  # settings that a command on a page has to repeat


class Params:
    """The params of a run's rules; wildcards are those of a job, as in `Inputs`."""

    def __init__(self, inputs: Inputs, given: dict[str, Any]) -> None:
        """
        Args:
            given: settings of the command line, --config.
        """
        self.inputs, self.run, self.given = inputs, inputs.run, given
        self._codes: dict[str, str] = {}  # stage -> code hash, without files of a paper

    # --- spec ------------------------------------------------------------------------------

    def item_spec(self, wildcards: Any, stage: str) -> str:
        """The spec of a store artefact, by the digest in its path."""
        return to_json(self.inputs.item(stage, wildcards).spec)

    def spec(self, wildcards: Any, *sections: str) -> str:
        """Sections of paper.yaml; 'own.<stage>' is one of the paper's own stages."""
        named = {s.partition(".")[0] for s in sections}
        spec = self.inputs.paper(wildcards).spec.model_dump(mode="json", include=named)
        picked = {s: spec["own"][s[4:]] if s.startswith("own.") else spec[s] for s in sections}
        latents = getattr(wildcards, "latents", None)
        return to_json(picked | ({} if latents is None else {"latents": latents}))

    def features_spec(self, wildcards: Any) -> str:
        """How latents are described, and which dictionary of which arm."""
        section = self.inputs.paper(wildcards).spec.features.model_dump(mode="json")
        del section["beside"]  # what stands beside them on a page changes none of them
        section["arm"] = self.inputs.arm(wildcards, "features")
        sae = wildcards.latents.rpartition(".")[2]
        return to_json({"features": section, "latents": sae})

    def feature_page_spec(self, wildcards: Any) -> str:
        """The paper's title, and where a null arm's latents stand beside: whose are whose."""
        spec = self.inputs.paper(wildcards).spec
        shown: dict[str, Any] = {"title": spec.title, "latents": wildcards.latents}
        if spec.features and spec.features.beside:
            shown["sides"] = [f"{spec.features.arm}.{wildcards.latents}", spec.features.beside]
        return to_json(shown)

    def export_spec(self, wildcards: Any, format: str = "") -> str:
        """Which dictionary is exported; the format may be a wildcard."""
        paper = self.inputs.paper(wildcards)
        features = paper.spec.features
        if format == "neuronpedia" and (features is None or features.arm != wildcards.arm):
            where = f"on arm '{features.arm}'" if features else "nowhere"
            raise RetraceError(
                f"{card(paper)}: features are described {where}, so arm '{wildcards.arm}' has none "
                f"to export; set features.arm"
            )
        named = {"arm": wildcards.arm, "sae": wildcards.latents, "paper": paper.name}
        return to_json({"export": {"format": format or wildcards.layout, **named}})

    def graph_spec(self, wildcards: Any) -> str:
        """Which graph of a paper is exported."""
        return to_json({"graph": {"name": wildcards.structure, "paper": wildcards.paper}})

    def traced_spec(self, wildcards: Any) -> str:
        """Which graph of the stage graphs is exported."""
        paper = self.inputs.paper(wildcards)
        graphs = paper.spec.graphs
        for key, names in (("dictionary", graphs and graphs.dictionaries),
                           ("prompt", graphs and graphs.prompts)):  # fmt: skip
            known(f"{key} of graphs", getattr(wildcards, key), names or (), paper)
        name = f"{wildcards.arm}.{wildcards.dictionary}.{wildcards.prompt}"
        given = {"dictionary": wildcards.dictionary, "prompt": wildcards.prompt}
        return to_json({"graph": {"name": name, "paper": wildcards.paper} | given})

    def metrics_spec(self, wildcards: Any) -> str:
        """Table names and what the names of metrics are made of."""

        def text(paper: Paper) -> str:
            return to_json({"tables": list(paper.tables()), "parts": parts(paper)})

        return self._remembered("metrics", wildcards, text)

    def claims_spec(self, wildcards: Any) -> str:
        """The claims with their null arms, the budgets and the scale."""
        return self._remembered("claims", wildcards, lambda paper: to_json(for_the_job(paper)))

    def _remembered(self, what: str, wildcards: Any, text: Callable[[Paper], str]) -> str:
        """A spec that a paper's folder decides, made where no earlier call has done it."""
        name, scale = wildcards.paper, wildcards.scale
        paper = self.inputs.paper(wildcards)
        key = [what, name, scale, *self.run.key(name)]
        return source.remembered(key, lambda: {"spec": text(paper)})["spec"]

    def figure_spec(self, wildcards: Any) -> str:
        """One figure of paper.yaml, and the title that its page names."""
        paper = self.inputs.paper(wildcards).spec
        figure = paper.figures[wildcards.figure].model_dump(mode="json")
        spec = {"name": wildcards.figure, "figure": figure, "scale": wildcards.scale}
        return to_json(spec | {"paper": paper.title})

    def report_spec(self, wildcards: Any) -> str:
        """The whole card, what its order decides, and how a command finds the paper again."""
        paper = self.inputs.paper(wildcards)
        found = [f"{k}={flow(self.given[k])}" for k in HINTS if k in self.given]
        found += [f"papers=[{paper.name}]"] if "papers_dirs" in self.given else []
        declared = paper.spec.model_dump(mode="json", exclude_unset=True)
        spec = {"paper": paper.name, "scale": wildcards.scale, "card": declared}
        spec |= {"done": done.rows(paper.spec), "headline": headline(declared)}
        spec |= {"dictionary": done.first_trained(paper.spec)}
        return to_json(spec | ({"config": found} if found else {}))

    def index_spec(self, wildcards: Any) -> str:
        """The card of every paper with results at this scale, and what the catalogue lists.

        The claims of papers that this call does not ask for are no inputs, so their digests stand
        here.
        """
        asked = [self.run.paper(name, wildcards.scale) for name in self.run.config.papers]
        cards = {paper.name: {f: getattr(paper.spec, f) for f in CARD} for paper in asked}
        claims = {Path(f).parent.name: f for f in self.inputs.others(wildcards)}
        cards |= {name: self.run.card(name, CARD) for name in claims}
        for name, fields in cards.items():
            fields["headline"] = headline(self.run.card(name, ("headline", "figures")))
        shas = {name: provenance.sha256_file(f) for name, f in claims.items()}
        spec = {"scale": wildcards.scale, "papers": cards, "claims": shas}
        return to_json(spec | {"listed": self.listed(), "kinds": kinds_of(asked)})

    def listed(self) -> dict[str, dict[str, Any]]:
        """Every paper that this run could name: title, year, folder, and its metrics' digest."""
        out = {}
        for name in self.run.available:
            folder = find(name, self.run.dirs)
            out[name] = self.run.card(name, ("title", "year"))
            out[name] |= {"folder": str(near(folder)), "metrics": _metrics(folder / "metrics.py")}
        return out

    # --- code ------------------------------------------------------------------------------

    def code(self, wildcards: Any, stage: str, *own: str) -> str:
        """The code hash of a stage, and of the paper's own files named `own`."""
        if own:
            return source.job_code(stage, self.inputs.paper(wildcards).code_files(*own))
        if stage not in self._codes:
            self._codes[stage] = source.job_code(stage)
        return self._codes[stage]

    def stream_code(self, wildcards: Any) -> str:
        """The code hash of stage sae; also that of its shards, where the job makes them itself."""
        made = ["activations"] * ("model" in self.inputs.item("sae", wildcards).inputs)
        return " ".join(source.job_code(stage) for stage in ["sae", *made])

    def training_code(self, wildcards: Any) -> str:
        """The code hash of a training run, the paper's data.py included."""
        return source.job_code("training", self.inputs.item_source(wildcards, "training", "data"))


def _metrics(file: Path) -> str:
    """A digest of METRICS of a metrics.py."""

    def read() -> dict[str, str]:
        return {"metrics": provenance.digest(source.literal(file, "METRICS"))}

    if not file.exists():
        return read()["metrics"]
    return source.remembered(["METRICS", source.file_key(file)], read)["metrics"]


def kinds_of(asked: list[Paper]) -> dict[str, str]:
    """Kind of figure -> the page of the first figure that is one."""
    out: dict[str, str] = {}
    for paper in asked:
        for name, figure in paper.spec.figures.items():
            if figure.kind in KINDS:
                out.setdefault(figure.kind, f"{home(paper)}/figures/{name}.html")
    return out
