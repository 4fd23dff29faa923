"""What there is, on one page: papers, metrics, kinds of figures, methods, hooks, types of models.

The core's part is that of `python -m pipeline list` (definitions.py). Papers bring their names and
the metrics that they define; a kind of figure is shown by the first figure of this run that is one,
or else by an example out of another run, which `python -m pipeline examples` keeps.
"""

import html
import re
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.job import source
from pipeline.report import definitions, pages
from pipeline.report.thumbs import of_page
from pipeline.spec.figures import OPTIONS

EXAMPLES = pages.TEMPLATES / "examples.html"
SYMBOL = re.compile(
    r'<symbol id="example-(\w+)" viewBox="0 0 144 90" data-of="([^"]*)">(.*)</symbol>'
)
TITLES = {
    "<arm>.<dictionary>": "Dictionaries",
    "<arm>.<crosscoder>.<source>": "Crosscoders, of each source",
    "<arm>.<set of transcoders>": "Transcoders of all layers",
    "attribution.<prompt>": "Attribution of latents",
    "circuits.<arm>.<method>": "Circuits",
    "graphs.<arm>.<dictionaries>": "Attribution graphs",
    "<arm>.probes.<label>.<method>.<hook>": "Probes",
    "<arm>.steering.<direction>": "Steering",
    "training.<run>": "Models trained here",
}


class Example(NamedTuple):
    """A thumb and the run that it is of: 'TopK SAEs, laptop scale'."""

    of: str
    drawing: str


def context(spec: dict[str, Any]) -> dict[str, Any]:
    """What templates/catalogue.html is filled with.

    Args:
        spec: of the stage index. `listed`: paper -> title, year and folder of all papers that are
            known; `papers`: those with results at this scale; `kinds`: kind -> a figure's page.
    """
    listed, shown = spec.get("listed", {}), spec["papers"]
    return {
        "scale": spec["scale"],
        "papers": [{"name": n, **card, "shown": n in shown} for n, card in listed.items()],
        "metrics": metrics(listed),
        "kinds": kinds(spec.get("kinds", {})),
        "methods": definitions.methods(),
        "hooks": definitions.hooks(),
        "models": models(),
    }


def metrics(listed: dict[str, dict]) -> list[dict[str, Any]]:
    """Groups of metrics, the core's first: title, how names begin or whose they are, and rows of
    (metric, definition, id)."""
    out = []
    for start, found in definitions.METRICS.items():
        rows = [(name, text, place(start, name)) for name, text in found.items()]
        out.append({"title": TITLES.get(start, start), "names": f"{start}.…", "rows": rows})
    for name, card in listed.items():
        own = of_paper(Path(card["folder"]))
        rows = [(m, text, place(name, m)) for m, text in own.items()]
        if rows:
            out.append({"title": card["title"], "names": name, "rows": rows})
    return out


def of_paper(folder: Path) -> dict[str, str]:
    """Metric, or pattern of names, -> definition: those that a paper brings."""
    file = folder / "metrics.py"
    return source.literal(file, "METRICS") if file.is_file() else {}


def place(group: str, metric: str) -> str:
    """The id of a metric on the page: `l0` of a dictionary and `l0` of a crosscoder are two."""
    return f"metric-{pages.anchor(group)}-{pages.anchor(metric.replace('*', 'any'))}"


def places(metrics: dict[str, dict], paper: str, own: dict[str, str]) -> dict[str, str]:
    """Metric of a report -> its id on the catalogue's page, where the definition stands there.

    Args:
        metrics: of metrics.json.
        own: what the paper's metrics.py defines, see `of_paper`.
    """
    by_text: dict[str, list[tuple[str, str, str]]] = {}
    for start, found in definitions.METRICS.items():
        for m, text in found.items():
            by_text.setdefault(text, []).append((start, m, f"{start}.{m}"))
    for m, text in own.items():
        by_text.setdefault(text, []).append((paper, m, m))
    out = {}
    for name, metric in metrics.items():
        found = by_text.get(metric["definition"], [])
        fitting = (place(group, m) for group, m, whole in found if definitions.fits(name, whole))
        if there := next(fitting, ""):
            out[name] = there
    return out


def examples() -> dict[str, Example]:
    """Kind of figure -> its example, as templates/examples.html has them."""
    found = SYMBOL.findall(EXAMPLES.read_text("utf-8")) if EXAMPLES.is_file() else []
    return {kind: Example(html.unescape(of), drawing) for kind, of, drawing in found}


def kinds(here: dict[str, str]) -> list[dict[str, Any]]:
    """Kinds of figures: what each draws, its options, and a figure of this or another run."""
    out, elsewhere = [], examples()
    for name, doc in definitions.kinds().items():
        says = doc.partition("\n\n")[0]
        if "see `" in says:  # the model of its options says it
            says = OPTIONS[name].__doc__ or says
        page = Path(here.get(name, ""))
        drawn = of_page(page)
        shown = Example("", drawn) if drawn else elsewhere.get(name, Example("", ""))
        fields = OPTIONS[name].model_fields.items()
        out.append(
            {
                "name": name,
                "says": " ".join(says.split()),
                "options": [(f, info.description or "") for f, info in fields],
                "picture": pages.safe(shown.drawing),
                "of": shown.of,
                "link": "/".join(page.parts[-3:]) if drawn else "",
            }
        )
    return out


def models() -> list[tuple[str, list[str]]]:
    """(layout, types of models that have it), the layout of most types first."""
    by_layout: dict[str, list[str]] = {}
    for kind, layout in definitions.models().items():
        by_layout.setdefault(layout, []).append(kind)
    return sorted(by_layout.items(), key=lambda pair: (-len(pair[1]), pair[0]))
