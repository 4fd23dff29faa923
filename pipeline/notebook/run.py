"""What `pipeline.open` gives a notebook: all that a finished run of a paper holds, by name.

    import pipeline
    run = pipeline.open("results/laptop/topk_saes")
    run.claims, run.metrics                                  DataFrames
    run.tables["evaluation/trained"]                         a DataFrame
    run.figures["frontier"], run.numbers["frontier"]         a plotly figure, what it plots
    run.activations["trained"]["blocks.12.hook_resid_post"]  rows on the disk, see rows.py
    run.dictionaries["trained.topk_k32_d4608_seed0"]         SAELens's object
    run.models["trained"]                                    TransformerLens's bridge

1. Claims, metrics, tables and figures are files of the folder, read when they are asked for. Of
   published results, which have no pages, a figure is drawn from its tables.
2. Weights and activations lie in the store beside it. Which artefact an arm has follows from the
   paper.yaml of this checkout; one that the certificates of the folder do not name is refused,
   since paper.yaml has changed since the run.
3. Torch is imported when a model or a dictionary is asked for.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.claims.scalars import whole
from pipeline.claims.summary import read_claims
from pipeline.errors import RetraceError, nearest
from pipeline.notebook.lazy import Lazy
from pipeline.sharing import published
from pipeline.store import provenance, tables

ROOT = Path(__file__).parents[2]
NUMBERS = "sd n held margin low high confidence tolerance share".split()  # of claims.csv


class Opened:
    """A paper's results at one scale.

    Args:
        folder: where metrics.json and claims.csv lie.
        papers_dirs: folders that hold papers' folders; default: those of the config.yaml beside
            results/, else of this checkout.
        device: for models and dictionaries.
    """

    def __init__(
        self, folder: Path, papers_dirs: Sequence[str | Path] = (), device: str = "cpu"
    ) -> None:
        self.folder, self.device = folder, device
        self.paper, self.scale = published.named(folder)
        self.base = published.base_of(folder)
        self._papers_dirs = [str(d) for d in papers_dirs]
        lazy = lambda what, names, make: Lazy(f"{folder}: no {what}", names, make)  # noqa: E731
        self.tables = lazy("table", self._tables, self._table)
        self.figures = lazy("figure", self._figures, self._figure)
        self.numbers = lazy("figure", self._figures, self._numbers)
        self.models = lazy("model of an arm", lambda: self._arms("model"), self._model)
        self.activations = lazy(
            "activations of an arm", lambda: self._arms("activations"), self._activations
        )
        self.dictionaries = lazy("dictionary", self._dictionaries, self._dictionary)

    def __repr__(self) -> str:
        lines = [f"{self.paper} at scale {self.scale}, in {self.folder}"]
        lines += [f"  claims        {len(self.claims)}", f"  metrics       {len(self.metrics)}"]
        lines += [f"  tables        {', '.join(self.tables)}"]
        lines += [f"  figures       {', '.join(self.figures)}"]
        return "\n".join([*lines, "  activations, dictionaries, models: by arm, out of the store"])

    # --- files of the folder ---------------------------------------------------------------

    @cached_property
    def claims(self) -> Any:
        """A row a claim, by its id: text, source, the paper's number, ours, verdict, ..."""
        import pandas as pd

        frame = pd.DataFrame(read_claims(self.folder / "claims.csv")).set_index("id")
        found = [c for c in NUMBERS if c in frame]
        return frame.assign(**{c: pd.to_numeric(frame[c], errors="coerce") for c in found})

    @cached_property
    def metrics(self) -> Any:
        """A row a metric, by its name: mean, sd and n over seeds, definition, values."""
        import pandas as pd

        file = self.folder / "metrics.json"
        found = whole(tables.read_json(file).get("metrics"), file)
        frame = pd.DataFrame.from_dict(found, orient="index").rename_axis("metric")
        return frame[["mean", "sd", "n", "definition", "values"]]

    def _tables(self) -> list[str]:
        found = sorted(self.folder.rglob("*.parquet"))
        return [str(f.relative_to(self.folder).with_suffix("")) for f in found]

    def _table(self, name: str) -> Any:
        return tables.read_table(self.folder / f"{name}.parquet")

    def _figures(self) -> list[str]:
        return sorted(f.stem for f in (self.folder / "figures").glob("*.csv"))

    def _numbers(self, name: str) -> Any:
        import pandas as pd

        return pd.read_csv(self.folder / f"figures/{name}.csv")

    def _figure(self, name: str) -> Any:
        """A figure as its page has it, its title above it."""
        import plotly.graph_objects as go

        from pipeline.report.pages import PLOT

        file = self.folder / f"figures/{name}.html"
        made = provenance.read(file if file.is_file() else file.with_suffix(".csv"))
        drawn = PLOT.search(file.read_text("utf-8")) if file.is_file() else None
        plot = json.loads(drawn[1]) if drawn else self._redrawn(name)
        top = plot["layout"].get("margin", {}).get("t", 30)
        figure = go.Figure(plot)
        title = {"text": made["spec"]["figure"]["title"], "automargin": True, "yref": "container"}
        return figure.update_layout(title=title, margin_t=top + 40)

    def _redrawn(self, name: str) -> dict[str, Any]:
        """The plot of published results, drawn from their tables."""
        from pipeline.figures import drawing
        from pipeline.sharing import redraw

        results = published.read(self.folder)
        made = redraw.published(results)[name]
        figure, _ = redraw.drawn(results, name, made, self._paper.folder.parent)
        return drawing.plain(figure)

    # --- artefacts of the store ------------------------------------------------------------

    @cached_property
    def _run(self) -> Any:
        """The run that makes these results, of this checkout's papers."""
        from pipeline.papers.papers import Run
        from pipeline.spec.yaml_files import load_yaml

        files = [f for f in (self.base / "config.yaml", ROOT / "config.yaml") if f.is_file()]
        config = load_yaml(files[0]) | {"papers": [self.paper], "scale": self.scale, "hub": True}
        if self._papers_dirs:
            config |= {"papers_dirs": self._papers_dirs}
        return Run.load(config, [self.base, ROOT, Path.cwd()])

    @property
    def _paper(self) -> Any:
        return self._run.paper(self.paper, self.scale)

    @cached_property
    def _behind(self) -> set[str]:
        """'<stage>/<id>' of every artefact that the folder's certificates lead to."""
        starts = [self.folder / "claims.csv", *self.folder.rglob("*.parquet")]
        files = (f for start in starts for _, f, _ in provenance.chain(start, self.base))
        names = (provenance.name_of(f).rpartition("results/store/")[2].split("/") for f in files)
        return {"/".join(parts[:2]) for parts in names if len(parts) > 2}

    def _arms(self, stage: str) -> list[str]:
        """The arms that have an artefact of a stage."""
        arms = self._paper.spec.arm_names()
        return [a for a in arms if stage in self._run.store(self.paper, self.scale, a)]

    def _stored(self, item: Any, file: str) -> Path:
        """A file of an artefact.

        Raises:
            RetraceError: it is of another paper.yaml, or not there.
        """
        found = self.base / "results/store" / item.stage / item.id / file
        if f"{item.stage}/{item.id}" not in self._behind:
            raise RetraceError(
                f"{self.folder}: was not made from {item.stage} {item.id}, which "
                f"{self._paper.folder}/paper.yaml asks for now; run snakemake again, or check out "
                f"the commit that made it"
            )
        if not found.is_file():
            raise RetraceError(
                f"{found}: is not there; tables and figures of {self.folder} can be read without "
                f"it, and snakemake makes it again"
            )
        return found

    def _item(self, arm: str, stage: str, file: str) -> Path:
        return self._stored(self._run.store(self.paper, self.scale, arm)[stage], file)

    def _model(self, arm: str) -> Any:
        from pipeline.notebook import weights

        return weights.model(self._item(arm, "model", "model.json"), self.device)

    def _activations(self, arm: str) -> Lazy:
        """Hook -> rows of an arm."""
        from pipeline.notebook.rows import Activations

        manifest = self._item(arm, "activations", "manifest.json")
        documents = self._run.store(self.paper, self.scale, arm)["corpus"]
        hooks = tables.read_json(manifest)["hooks"]
        of = self.base / "results/store/corpus" / documents.id / "documents.parquet"
        where = f"{manifest}: holds no hook"
        return Lazy(where, lambda: hooks, lambda hook: Activations(manifest, hook, of))

    def _dictionaries(self) -> Iterator[str]:
        spec = self._paper.spec
        for arm in spec.arm_names() if spec.sae else []:
            yield from (f"{arm}.{sae}" for sae in spec.saes_of(arm))

    def _dictionary(self, name: str) -> Any:
        from pipeline.notebook import weights

        arm, _, sae = name.partition(".")
        item = self._run.sae_item(self.paper, self.scale, arm, sae)
        return weights.dictionary(self._stored(item, "manifest.json"), sae, self.device)


def found(folder: str | Path) -> Path:
    """A folder of results: as given, or below this checkout.

    Raises:
        RetraceError: none, or one that holds no results; those that are near are named.
    """
    given = Path(folder)
    places = [given] if given.is_absolute() else [given, ROOT / given]
    there = [p for p in places if p.is_dir()]
    for place in there:
        if all((place / name).is_file() for name in provenance.RESULTS):
            return place
    near = [n for p in places for n in _runs(p)]
    hint = nearest(str(given), near) or (f"; there are {', '.join(near)}" if near else "")
    what = "holds no metrics.json and claims.csv" if there else "is no folder"
    if given.suffix == ".zip":
        what = "is an archive; unpack it, and open the folder in it that has claims.csv"
    raise RetraceError(
        f"{folder}: {what}{hint}; name results/<scale>/<paper> of a run that is done, as "
        f"`snakemake -c2 topk_saes` makes one"
    )


def _runs(place: Path) -> list[str]:
    """Folders of results in a folder, or else in the nearest one above it that there is."""
    above = next((p for p in (place, *place.parents) if p.is_dir()), place)
    found = sorted({f.parent for depth in ("*", "*/*") for f in above.glob(f"{depth}/claims.csv")})
    return [str(f) for f in found]
