"""The commands of the front door, `python -m pipeline <command>`: name -> the module that does it.

Rules and certificates name a stage by its command, so a module may move without touching them.
"""

import ast
from pathlib import Path

# One job of the workflow each, in the order of the graph: `python -m pipeline <stage> --spec JSON`.
STAGES = {
    "tokenizer": "pipeline.text.tokenizer",
    "corpus": "pipeline.text.corpus",
    "training": "pipeline.weights.training",
    "model": "pipeline.weights.model",
    "activations": "pipeline.activations.activations",
    "sae": "pipeline.sae.sae",
    "sae_import": "pipeline.imports.sae_import",
    "crosscoder": "pipeline.crosscoders.crosscoder",
    "crosscoder_import": "pipeline.crosscoders.crosscoder_import",
    "transcoders": "pipeline.crosscoders.transcoders",
    "transcoders_import": "pipeline.crosscoders.transcoders_import",
    "evaluation": "pipeline.latents.evaluation",
    "crosscoder_evaluation": "pipeline.crosscoders.crosscoder_evaluation",
    "transcoders_evaluation": "pipeline.crosscoders.transcoders_evaluation",
    "benchmarks": "pipeline.saebench.benchmarks",
    "absorption": "pipeline.saebench.absorption",
    "features": "pipeline.latents.features",
    "attribution": "pipeline.latents.attribution",
    "circuits": "pipeline.circuits.circuits",
    "graphs": "pipeline.tracing.graphs",
    "probes": "pipeline.probes.probes",
    "steering": "pipeline.probes.steering",
    "metrics": "pipeline.claims.metrics",
    "claims": "pipeline.claims.claims",
    "figures_js": "pipeline.report.figures_js",
    "figures": "pipeline.figures.figures",
    "feature_page": "pipeline.report.feature_page",
    "report": "pipeline.report.report",
    "index": "pipeline.report.index",
    "strict": "pipeline.claims.strict",
    "exports": "pipeline.sharing.exports",
    "attribution_graph": "pipeline.sharing.attribution_graph",
    "release": "pipeline.sharing.release",
}
OWN = {"own": "pipeline.job.own_stage"}  # a stage of a paper, by its name and file
# What people call.
TOOLS = {
    "scaffold": "pipeline.papers.scaffold",
    "lint_paper": "pipeline.papers.lint",
    "schema": "pipeline.papers.schema",
    "aliases": "pipeline.spec.aliases",
    "adapters": "pipeline.families.adapters",
    "progress": "pipeline.claims.progress",
    "provenance": "pipeline.sharing.provenance",
    "redraw": "pipeline.sharing.redraw",
    "compare": "pipeline.sharing.compare",
    "examples": "pipeline.papers.examples",
    "slide": "pipeline.sharing.slide",
    "crate": "pipeline.sharing.crate",
    "preview": "pipeline.papers.preview",
    "directions": "pipeline.probes.exported",
    "list": "pipeline.papers.listing",
    "show": "pipeline.papers.listing",
}
MODULES = STAGES | OWN | TOOLS


def sentence(module: str) -> str:
    """The first line of a module's docstring, read without importing it."""
    file = Path(__file__).parents[2].joinpath(*module.split(".")).with_suffix(".py")
    doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return doc.split("\n")[0].removesuffix(" [torch]")
