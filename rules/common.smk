# Helpers of the rules; no rule. A helper named `..._of` returns an input or params function.
import os
import sys
from pathlib import Path

from snakemake.io import sourcecache_entry

# Without "..", which a certificate may not name: snakemake --snakefile ../other/Snakefile.
ROOT = Path(os.path.abspath(str(workflow.current_basedir))).parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
# glibc gives tensors above 32 MB back to the system after every operation, which then pays for the
# zeroing of each page again: copies of 37 MB ran at 3 GB/s, and at 20 with these (2 cores, AVX2).
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(4 << 30))
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(8 << 30))

from pipeline import gpus, kills, papers, provenance, source, summary
from pipeline.errors import RetraceError, nearest, trace_file, unexpected

PYTHON = sys.executable


def told(function, *args):
    """Call a function; tell its fault in one sentence and end, as no exception of snakemake's does."""
    try:
        return function(*args)
    except RetraceError as e:
        sys.exit(f"error: {e}")
    except Exception as e:
        sys.exit(f"error: {unexpected(e, trace_file('rules'))}")


DICTIONARIES = ("sae", "sae_import")  # the stages that make some
# Folders that a relative path of config.yaml is looked up in: beside the main Snakefile (a
# group's, where it imports this one as a module), beside this Snakefile, where snakemake was called.
BASES = [Path(os.path.abspath(workflow.basedir)), ROOT, Path(workflow.workdir_init)]
RUN = told(papers.Run.load, config, BASES)
DEVICE = RUN.config.device
# At smoke scale a job is mostly start-up, which has one thread; two such jobs share a GPU, too.
SMOKE = RUN.config.scale == "smoke"
THREADS = 1 if SMOKE else 2
if DEVICE == "cpu":  # lowers what a rule asks for to nothing
    workflow.global_resources.setdefault("gpu", 0)
elif workflow.nodes is None:  # one machine; a cluster counts its GPUs itself
    workflow.global_resources.setdefault("gpu", (os.cpu_count() or 1) if SMOKE else gpus.count())
# Where results lie in an object storage, a job has its inputs beside it and nothing else.
STORAGE = workflow.storage_settings.default_storage_provider
# Stages end with this process. The first of two runs works; what a killed one left is taken up.
kills.name_parent()
if workflow.is_main_process and not kills.only_reads(sys.argv[1:]):
    if told(kills.own, Path(".snakemake" if STORAGE else "results/store") / ".owner"):
        kills.clear_locks()
# Snakemake formats every shell command with the globals of the main Snakefile, a module's, too.
workflow.modifier_stack[0].globals.update(PYTHON=PYTHON, DEVICE=DEVICE)


wildcard_constraints:
    scale="smoke|laptop|paper",
    paper=r"[A-Za-z]\w*",
    arm=r"[A-Za-z]\w*",
    latents=r"\w+",
    figure=r"\w+",
    run=r"[A-Za-z]\w*",
    layout="sparsify|dictionary_learning|circuit_tracer",
    model=r"[^/]+-[0-9a-f]{12}",
    tokenizer=r"[^/]+-[0-9a-f]{12}",
    training=r"[^/]+-[0-9a-f]{12}",
    corpus=r"[^/]+-[0-9a-f]{12}",
    activations=r"[^/]+-[0-9a-f]{12}",
    sae=r"[^/]+-[0-9a-f]{12}",
    sae_import=r"[^/]+-[0-9a-f]{12}",


def paper_rules():
    """(name, rules.smk) of every paper that has one."""
    files = {name: papers.find(name, RUN.dirs) / "rules.smk" for name in RUN.available}
    return [(name, str(f.resolve())) for name, f in files.items() if f.exists()]


def target(name):
    """The name of a paper as a target of its own: `snakemake -c2 toy_superposition`."""
    if workflow.is_rule(name):
        sys.exit(f"error: config.yaml: papers: '{name}' is the name of a rule; rename its folder")
    return name


def products_of(*names):
    """Input: all that the reports of papers rest on, so that what was deleted is made again."""

    def paths(wildcards):
        found = []
        for name in names:
            paper = told(RUN.paper, name, RUN.config.scale)
            base = f"results/{paper.scale}/{name}"
            figures = [f"{base}/figures/{f}" for f in paper.spec.figures]
            latents = paper.spec.features.saes if paper.spec.features else []
            found += [f"{base}/{f}" for f in ("report.html", "claims.csv", "metrics.json")]
            found += [f"{f}.{kind}" for f in figures for kind in ("html", "csv")]
            found += [f"{base}/features/{s}.html" for s in latents]
            found += paper.tables().values()
        return found

    return paths


def targets():
    """What a run makes by default."""
    base = f"results/{RUN.config.scale}"
    return [f"{base}/index.html"] + [f"{base}/strict.json"] * RUN.config.strict


def code_of(stage, *own):
    """Params: the code hash of a stage, and of the paper's own files named `own`."""

    def code(wildcards):
        files = paper_of(wildcards).code_files(*own) if own else []
        return told(source.job_code, stage, files)

    return code


def remake_incomplete():
    """Have outputs that a killed run was writing made again, as `--rerun-incomplete` would.

    Input functions call it: the settings come after the Snakefile, and before they are asked for.
    """
    if workflow.dag_settings is not None:
        workflow.dag_settings.force_incomplete = True


# --- the store -----------------------------------------------------------------------------


def stored(path):
    """Mark activations as temporary where config.yaml does not keep them."""
    return path if RUN.config.keep_activations else temp(path)


def unstored(path):
    """Input: a file of the checkout. It comes with the workflow's sources, never through an object
    storage; and unlike `local` it ties no job to this machine."""
    return sourcecache_entry(path, path) if STORAGE else path


def item_spec_of(stage):
    """Params: the spec of a store artefact, by the digest in its path."""
    return lambda wildcards: papers.to_json(told(RUN.item, stage, wildcards[stage]).spec)


def item_input_of(stage, made_from, file):
    """Input: a file of the artefact that a store artefact is made from; [] where it needs none."""

    def path(wildcards):
        remake_incomplete()
        folder = told(RUN.item, stage, wildcards[stage]).folders().get(made_from)
        return f"results/store/{folder}/{file}" if folder else []

    return path


def text_of(stage):
    """Input: the local copy of a text of a URL, where there is one; its coming reruns the job."""

    def path(wildcards):
        remake_incomplete()
        text = told(RUN.item, stage, wildcards[stage]).inputs.get("text")
        return [ancient(unstored(text))] if text else []

    return path


def training_data(wildcards):
    """Input: the paper's data.py that a training run learns from, if it does."""
    remake_incomplete()
    data = told(RUN.item, "training", wildcards.training).inputs.get("data")
    return [ancient(unstored(data))] if data else []


def training_code(wildcards):
    """Params: the code hash of a training run, the paper's data.py included."""
    return told(source.job_code, "training", training_data(wildcards))


def training_of(run, file):
    """Input: a file of a training run of the paper in the wildcards."""

    def path(wildcards):
        paper = paper_of(wildcards)
        known("training run", run or wildcards.run, paper.spec.training, paper)
        store = told(RUN.store, paper.name, paper.scale, paper.spec.arm_names()[0])
        return f"results/store/training/{store[f'training:{run or wildcards.run}'].id}/{file}"

    return path


def trainings_of(file, made_from="training"):
    """Input: a file of every training run of the paper, or of the artefacts they are made from."""

    def paths(wildcards):
        paper = paper_of(wildcards)
        store = told(RUN.store, paper.name, paper.scale, paper.spec.arm_names()[0])
        items = [store[f"training:{run}"] for run in paper.spec.training]
        ids = [i.id if made_from == "training" else i.inputs.get(made_from) for i in items]
        return [f"results/store/{made_from}/{id}/{file}" for id in dict.fromkeys(ids) if id]

    return paths


# --- papers --------------------------------------------------------------------------------


def paper_of(wildcards):
    """The validated paper at the scale that the wildcards name."""
    remake_incomplete()
    return told(RUN.paper, wildcards.paper, wildcards.scale)


def arm_input_of(stage, file, arm_section=None):
    """Input: a store file of an arm; the arm is a wildcard, or named by a section of paper.yaml.

    `stage` may be several: those of DICTIONARIES.
    """
    stages = (stage,) if isinstance(stage, str) else stage

    def path(wildcards):
        store = told(RUN.store, wildcards.paper, wildcards.scale, _arm(wildcards, arm_section))
        items = [i for i in store.values() if i.stage in stages]
        return [f"results/store/{i.stage}/{i.id}/{file}" for i in items]

    return path


def circuit_input_of(stage, file):
    """Input: a store file of an arm, where the section circuits names dictionaries; else []."""
    found = arm_input_of(stage, file)
    return lambda wildcards: found(wildcards) if paper_of(wildcards).spec.circuits.saes else []


def arms_of(stage, file):
    """Input: a file of every arm's artefact of a stage; arms sorted by name, as in the JSON of
    `spec`."""

    def paths(wildcards):
        paper = paper_of(wildcards)
        stores = [
            told(RUN.store, paper.name, paper.scale, arm) for arm in sorted(paper.spec.arm_names())
        ]
        items = [item for store in stores for item in store.values() if item.stage == stage]
        return [f"results/store/{stage}/{item.id}/{file}" for item in items]

    return paths


def models_of(file):
    """Input: a file of every arm's model; arms sorted by name, as in the JSON of `spec`."""
    return arms_of("model", file)


def lent_store(paper, model):
    """The store's artefacts of an arm that own.<section>.models names, of this paper or another."""
    lender = told(RUN.paper, model.get("paper") or paper.name, paper.scale)
    arm = known("arm", model.get("arm", "trained"), lender.spec.arm_names(), lender)
    return told(RUN.store, lender.name, lender.scale, arm)


def lent_of(section, stage, file):
    """Input: a file of `stage` for each model that own.<section>.models names, sorted by name.

    A model is an arm of this paper, or of another whose name stands under `paper`: the store has it
    once for both.
    """

    def paths(wildcards):
        paper = paper_of(wildcards)
        models = paper.spec.own[section]["models"]
        found = []
        for name, model in sorted(models.items()):
            store = lent_store(paper, model)
            if stage not in store:
                sys.exit(
                    f"error: {paper.folder / 'paper.yaml'}: own.{section}.models.{name}: paper "
                    f"{model.get('paper') or paper.name} has no {stage} at scale {paper.scale}; "
                    f"name another paper"
                )
            found.append(f"results/store/{stage}/{store[stage].id}/{file}")
        return found

    return paths


def sae_input_of(section, file):
    """Input: a file beside the dictionary that a section or wildcard names, trained or imported."""

    def path(wildcards):
        arm = _arm(wildcards, section)
        name = wildcards.get("latents") or getattr(paper_of(wildcards).spec, section).sae
        spec = paper_of(wildcards).spec
        saes = spec.saes_of(arm) if spec.sae else {}
        known("SAE", name, saes, paper_of(wildcards))
        item = told(RUN.sae_item, wildcards.paper, wildcards.scale, arm, name)
        return f"results/store/{item.stage}/{item.id}/{file}"

    return path


def _arm(wildcards, section):
    paper = paper_of(wildcards)
    if section is None:
        return known("arm", wildcards.arm, paper.spec.arm_names(), paper)
    if getattr(paper.spec, section) is None:
        sys.exit(f"error: {paper.folder / 'paper.yaml'}: no section {section}, so no such file")
    return getattr(paper.spec, section).arm


def known(what, name, names, paper):
    """The name, where it is one of `names`; else one sentence, for a target that cannot be."""
    if name not in names:
        sys.exit(f"error: {paper.folder / 'paper.yaml'}: no {what} '{name}'{nearest(name, names)}")
    return name


def spec_of(*sections):
    """Params: sections of paper.yaml; 'own.<stage>' is one of the paper's own stages."""

    def params(wildcards):
        spec = paper_of(wildcards).spec.model_dump(mode="json")
        picked = {s: spec["own"][s[4:]] if s.startswith("own.") else spec[s] for s in sections}
        return papers.to_json(picked | {k: v for k, v in wildcards.items() if k == "latents"})

    return params


def tables_of(kind=None):
    """Input: the tables of a paper, or those that the figure in the wildcards names."""

    def paths(wildcards):
        paper = paper_of(wildcards)
        return (
            list(paper.tables().values())
            if kind is None
            else figure_tables(paper, wildcards.figure)
        )

    return paths


def figure_tables(paper, figure):
    """Paths of the tables that a figure names; 'metrics' is metrics.json, 'claims' claims.csv."""
    known("figure", figure, paper.spec.figures, paper)
    base = f"results/{paper.scale}/{paper.name}"
    made = {"metrics": f"{base}/metrics.json", "claims": f"{base}/claims.csv"}
    return [(paper.tables() | made)[t] for t in paper.spec.figures[figure].tables]


def own_file_of(file):
    """Input: a paper's own .py files that fit a name; the param `code` says when they changed."""
    return lambda wildcards: [ancient(unstored(f)) for f in paper_of(wildcards).code_files(file)]


def card_of(wildcards):
    """Input: paper.yaml, for its place in git alone; what it says stands in the param `spec`."""
    return [ancient(unstored(str(paper_of(wildcards).folder / "paper.yaml")))]


def drawing_code(wildcards):
    """Input: our code that figures.js holds beside plotly.js."""
    remake_incomplete()
    files = [ROOT / f"pipeline/templates/{name}.js" for name in ("walk", "draw")]
    return [unstored(str(papers.near(f))) for f in files]


def export_spec(format=None):
    """Params: which dictionary is exported; the format may be a wildcard."""

    def params(wildcards):
        paper = paper_of(wildcards)
        features = paper.spec.features
        if format == "neuronpedia" and (features is None or features.arm != wildcards.arm):
            where = f"on arm '{features.arm}'" if features else "nowhere"
            sys.exit(
                f"error: {paper.folder / 'paper.yaml'}: features are described {where}, so arm "
                f"'{wildcards.arm}' has none to export; set features.arm"
            )
        named = {"arm": wildcards.arm, "sae": wildcards.latents, "paper": paper.name}
        return papers.to_json({"export": {"format": format or wildcards.layout, **named}})

    return params


def graph_spec(wildcards):
    """Params: which graph of a paper is exported."""
    return papers.to_json({"graph": {"name": wildcards.structure, "paper": wildcards.paper}})


def metrics_spec(wildcards):
    """Params: table names and what the names of metrics are made of."""
    from pipeline.metrics import parts

    paper = paper_of(wildcards)
    return papers.to_json({"tables": list(paper.tables()), "parts": parts(paper)})


def claims_spec(wildcards):
    """Params: the claims with their null arms, the budgets and the scale."""
    from pipeline.claims import for_the_job

    return papers.to_json(for_the_job(paper_of(wildcards)))


def figure_spec(wildcards):
    """Params: one figure of paper.yaml."""
    figure = paper_of(wildcards).spec.figures[wildcards.figure].model_dump(mode="json")
    return papers.to_json({"name": wildcards.figure, "figure": figure, "scale": wildcards.scale})


def report_spec(wildcards):
    """Params: the whole card, and where it came from."""
    paper = paper_of(wildcards)
    card = paper.spec.model_dump(mode="json", exclude_unset=True)
    # What a command that is read on the page needs to find the same paper again.
    given = workflow.config_settings.overwrite_config
    found = [f"{k}={papers.flow(given[k])}" for k in ("papers_dirs", "roots", "hub") if k in given]
    found += [f"papers=[{paper.name}]"] if "papers_dirs" in given else []
    called = {"config": found} if found else {}
    return papers.to_json({"paper": paper.name, "scale": wildcards.scale, "card": card} | called)


def report_input(kind):
    """Input: 'figures', their 'numbers', 'pages' (of features) or 'yaml' of a paper."""

    def paths(wildcards):
        paper = paper_of(wildcards)
        base = f"results/{paper.scale}/{paper.name}"
        latents = paper.spec.features.saes if paper.spec.features else []
        return {
            "figures": [f"{base}/figures/{f}.html" for f in paper.spec.figures],
            "numbers": [
                f"{base}/figures/{f}.{e}" for f in paper.spec.figures for e in ("csv", "csv.json")
            ],
            "pages": [f"{base}/features/{s}.html" for s in latents],
            "yaml": unstored(str(paper.folder / "paper.yaml")),
        }[kind]

    return paths


def upstream_of(wildcards):
    """Input: the files whose certificates a page follows, where a storage has to bring them."""
    paper = paper_of(wildcards)
    if not STORAGE:
        return []
    arms = paper.spec.arm_names()
    items = [i for a in arms for i in told(RUN.store, paper.name, paper.scale, a).values()]
    for own in paper.spec.own.values():
        models = own.get("models")
        for model in models.values() if isinstance(models, dict) else []:
            if isinstance(model, dict) and "paper" in model:
                store = lent_store(paper, model)
                items += [store[stage] for stage in ("model", "corpus") if stage in store]
    return told(RUN.upstream, items)


def others_made(wildcards):
    """Params: claims.csv of papers that this call does not ask for and that have results.

    No input: the index shows them as they lie there, and makes none of them again.
    """
    made = {f.parent.name: str(f) for f in Path(f"results/{wildcards.scale}").glob("*/claims.csv")}
    return [made[p] for p in RUN.available if p in made and p not in RUN.config.papers]


def index_spec(wildcards):
    """Params: name and title of every paper with results at this scale, and what the claims are
    of those that are no inputs."""
    fields = ("title", "authors", "year", "url", "summary")
    asked = [told(RUN.paper, name, wildcards.scale) for name in RUN.config.papers]
    cards = {c.name: {f: getattr(c.spec, f) for f in fields} for c in asked}
    claims = {Path(f).parent.name: f for f in others_made(wildcards)}
    cards |= {name: told(RUN.card, name, fields) for name in claims}
    shas = {name: provenance.sha256_file(f) for name, f in claims.items()}
    return papers.to_json({"scale": wildcards.scale, "papers": cards, "claims": shas})


def print_claims():
    """The claims tables of the papers asked for, and where the pages are."""
    base = f"results/{RUN.config.scale}"
    if STORAGE:
        print(f"\nresults: {workflow.storage_settings.default_storage_prefix}/{base}")
    asked = [name for name in RUN.available if name in sys.argv]
    summary.print_claims(base, asked or RUN.config.papers)


def print_failure(log):
    """After a failure: the log lines that say what to do, and how to run the job alone."""
    if RUN.config.strict:
        print_claims()
    summary.print_failure(log, summary.without_targets(sys.argv, [*RUN.available, "all"]))
