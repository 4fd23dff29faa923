"""What there is, on one page: papers, metrics, kinds of figures, methods, hooks, types of models.

The core's part is that of `python -m pipeline list` (definitions.py). Papers bring their names and
the metrics that they define; a kind of figure is shown by the first figure of this run that is one.
"""

from pathlib import Path
from typing import Any

from pipeline.job import source
from pipeline.report import definitions, pages
from pipeline.report.thumbs import of_page
from pipeline.spec.figures import OPTIONS

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
        "hooks": list(definitions.hooks()),
        "models": models(),
    }


def metrics(listed: dict[str, dict]) -> list[dict[str, Any]]:
    """Groups of metrics, the core's first: title, how names begin or whose they are, and rows of
    (metric, definition, id)."""
    out = []
    for start, found in definitions.METRICS.items():
        rows = [(name, text, f"metric-{pages.anchor(name)}") for name, text in found.items()]
        out.append({"title": TITLES.get(start, start), "names": f"{start}.…", "rows": rows})
    for name, card in listed.items():
        file = Path(card["folder"]) / "metrics.py"
        own = source.literal(file, "METRICS") if file.is_file() else {}
        rows = [(m, text, f"metric-{name}-{pages.anchor(m)}") for m, text in own.items()]
        if rows:
            out.append({"title": card["title"], "names": name, "rows": rows})
    return out


def kinds(examples: dict[str, str]) -> list[dict[str, Any]]:
    """Kinds of figures: what each draws, its options, and a figure of this run."""
    out = []
    for name, doc in definitions.kinds().items():
        says = doc.partition("\n\n")[0]
        if "see `" in says:  # the model of its options says it
            says = OPTIONS[name].__doc__ or says
        example = Path(examples[name]) if name in examples else None
        fields = OPTIONS[name].model_fields.items()
        out.append(
            {
                "name": name,
                "says": " ".join(says.split()),
                "options": [(f, info.description or "") for f, info in fields],
                "picture": pages.safe(of_page(example)) if example else "",
                "link": "/".join(example.parts[-3:]) if example else "",
            }
        )
    return out


def models() -> list[tuple[str, list[str]]]:
    """(layout, types of models that have it), the layout of most types first."""
    by_layout: dict[str, list[str]] = {}
    for kind, layout in definitions.models().items():
        by_layout.setdefault(layout, []).append(kind)
    return sorted(by_layout.items(), key=lambda pair: (-len(pair[1]), pair[0]))
