# What only snakemake knows, and the helpers `..._of`; no rule. pipeline/papers/workflow.py says
# which files a helper names, rule_params.py beside it what a param says.
import os
import sys
from functools import partial
from pathlib import Path

from snakemake.io import sourcecache_entry
from snakemake.sourcecache import LocalSourceFile

if isinstance(workflow.current_basedir, LocalSourceFile):
    # Without "..", which a certificate may not name: snakemake --snakefile ../other/Snakefile.
    ROOT = Path(os.path.abspath(str(workflow.current_basedir))).parent
    sys.path.insert(0, str(ROOT))
else:  # a module of a git reference, whose library is the one that is installed
    ROOT = Path(__import__("pipeline").__file__).parents[1]

from pipeline.claims import summary
from pipeline.job import kills
from pipeline.papers import own, papers, rule_helpers
from pipeline.papers.paths import in_spec
from pipeline.papers.rule_helpers import or_exit
from pipeline.papers.rule_params import Params
from pipeline.papers.workflow import CROSSED, DICTIONARIES, LAYERED, Inputs

rule_helpers.set_environment(ROOT)
rule_helpers.seldom_collect()
PYTHON = sys.executable
# Folders that a relative path of config.yaml is looked up in: beside the main Snakefile (a
# group's, where it imports this one as a module), beside this Snakefile, where snakemake was called.
BASES = [Path(os.path.abspath(workflow.basedir)), ROOT, Path(workflow.workdir_init)]
RUN = or_exit(papers.Run.load, config, BASES)
# Where results lie in an object storage, a job has its inputs beside it and nothing else.
STORAGE = workflow.storage_settings.default_storage_provider
INPUTS = Inputs(RUN, ROOT, bool(STORAGE))
FIRST_REPORT = f"results/{RUN.config.scale}/{INPUTS.asked(sys.argv)[0]}/report.html"
PARAMS = Params(INPUTS, workflow.config_settings.overwrite_config)
OWN = own.Own(INPUTS, PARAMS)
DEVICE = RUN.config.device
# At smoke scale a job is mostly start-up, which has one thread; two such jobs share a GPU, too.
SMOKE = RUN.config.scale == "smoke"
THREADS = 1 if SMOKE else 2
AT_ONCE = rule_helpers.gpu_jobs_at_once(DEVICE, SMOKE, workflow.nodes is not None)
if AT_ONCE is not None:  # 0 lowers what a rule asks for to nothing
    workflow.global_resources.setdefault("gpu", AT_ONCE)
# Stages end with this process. The first of two runs works; what a killed one left is taken up.
kills.name_parent()
if workflow.is_main_process and not kills.only_reads(sys.argv[1:]):
    if or_exit(kills.own, Path(".snakemake" if STORAGE else "results/store") / ".owner"):
        kills.clear_locks()
    rule_helpers.show_progress(workflow, RUN)
# Snakemake formats every shell command with the globals of the main Snakefile, a module's, too.
workflow.modifier_stack[0].globals.update(PYTHON=PYTHON, DEVICE=DEVICE)
workflow.global_wildcard_constraints(scale="|".join(RUN.scales()), **rule_helpers.WILDCARDS)


def settle():
    """What is settled when snakemake asks for the first input, since it comes after the Snakefile.

    Outputs that a killed run was writing are made again, as `--rerun-incomplete` would; and the
    first paper's report is made before the others'. Jobs start whenever a core is free.
    """
    rule_helpers.start_at_any_rate(workflow)
    if workflow.dag_settings is not None:
        workflow.dag_settings.force_incomplete = True
    if not STORAGE:
        rule_helpers.first_report_first(workflow, FIRST_REPORT)


def dated(files):
    """Files of the checkout. They come with the workflow's sources, never through an object storage;
    and unlike `local` this ties no job to this machine. Snakemake notes them from the checkout on,
    so that another clone with the same results reruns nothing."""
    far = {f: in_spec(Path(f)) for f in files if STORAGE or os.path.isabs(f)}
    return [sourcecache_entry(f, far[f]) if f in far else f for f in files]


def undated(files):
    """Files of the checkout whose dates never count: a param says when they changed."""
    return [ancient(f) for f in dated(files)]


def stored(path):
    """Mark activations as temporary where config.yaml does not keep them."""
    return path if RUN.config.keep_activations else temp(path)


def memory_of(base):
    """mem_mb of a job that runs a model, from the size that its model.json says."""

    def mem_mb(wildcards, input):
        return base if STORAGE else rule_helpers.memory_mb(input.model, base)

    return mem_mb


def gpus_of(wildcards, input):
    """How many GPUs a job that runs a model asks for."""
    return 1 if STORAGE else rule_helpers.gpus_for(input.model, RUN.config.gpu_gb)


def gpu_memory_of(wildcards, input):
    """MB that it takes on them, for a limit of `--resources gpu_mem_mb=…`."""
    return 0 if STORAGE else rule_helpers.gpu_memory_mb(input.model)


def print_claims():
    """The claims tables of the papers asked for, and where the pages are."""
    base = f"results/{RUN.config.scale}"
    if STORAGE:
        print(f"\nresults: {workflow.storage_settings.default_storage_prefix}/{base}")
    summary.print_claims(base, INPUTS.asked(sys.argv))


target = partial(rule_helpers.target, workflow.is_rule)
ask = partial(rule_helpers.asked, settle)
# Inputs, then params; where () follows, a rule names the helper without arguments.
products_of, item_input_of = ask(INPUTS.products), ask(INPUTS.item_input)
item_inputs_of, crossed_input_of = ask(INPUTS.item_inputs), ask(INPUTS.crossed_input)
training_of = ask(INPUTS.training)
arm_input_of, circuit_input_of = ask(INPUTS.arm_input), ask(INPUTS.circuit_input)
arms_of = ask(INPUTS.arms)
sae_input_of, tables_of = ask(INPUTS.sae_input), ask(INPUTS.tables)
label_files_of, probed_of = ask(INPUTS.label_files, dated), ask(INPUTS.probed)
steering_input_of = ask(INPUTS.steering_input)
item_source_of, own_file_of = ask(INPUTS.item_source, undated), ask(INPUTS.own_files, undated)
report_input, upstream_of = ask(INPUTS.report), ask(INPUTS.upstream)()
card_of, yaml_of = ask(INPUTS.card, undated)(), ask(INPUTS.card, dated)()
caption_metrics_of, beside_of = ask(INPUTS.caption_metrics)(), ask(INPUTS.beside)()
drawing_code, others_made = ask(INPUTS.drawing, dated)(), ask(INPUTS.others)()
spec_of, export_spec = ask(PARAMS.spec), ask(PARAMS.export_spec)
features_spec, feature_page_spec = ask(PARAMS.features_spec)(), ask(PARAMS.feature_page_spec)()
item_spec_of, code_of = ask(PARAMS.item_spec), ask(PARAMS.code)
metrics_spec, claims_spec = ask(PARAMS.metrics_spec)(), ask(PARAMS.claims_spec)()
figure_spec, graph_spec = ask(PARAMS.figure_spec)(), ask(PARAMS.graph_spec)()
traced_spec = ask(PARAMS.traced_spec)()
report_spec, index_spec = ask(PARAMS.report_spec)(), ask(PARAMS.index_spec)()
training_code, stream_code = ask(PARAMS.training_code)(), ask(PARAMS.stream_code)()
