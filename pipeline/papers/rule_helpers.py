"""What rules/common.smk needs around the answers of workflow.py and rule_params.py.

A fault becomes one sentence and the end of the process, a method becomes a helper that rules call,
and a few decisions of a run are made: the wildcards, the environment of jobs, the GPUs at once.
"""

import gc
import inspect
import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pipeline.claims import terminal
from pipeline.errors import RetraceError, trace_file, unexpected
from pipeline.job import gpus

NAME = r"[A-Za-z]\w*"  # of a paper, an arm, a training run
ID = r"[^/]+-[0-9a-f]{12}"  # of an artefact of the store: <name>-<digest>
STAGES = (  # that the store holds
    "model", "tokenizer", "training", "corpus", "activations", "sae", "sae_import", "crosscoder",
    "transcoders", "transcoders_import", "crosscoder_import",
)  # fmt: skip
WILDCARDS = {
    **dict.fromkeys(("paper", "arm", "run"), NAME),
    "latents": r"(\w+\.)?\w+",  # those of an arm that the section does not name: arm.dictionary
    "figure": r"\w+",
    "layout": "sparsify|dictionary_learning|circuit_tracer|crosscoder",
    **dict.fromkeys(STAGES, ID),
}


def or_exit(function: Callable, *args: Any, **named: Any) -> Any:
    """Call a function; where it fails, say why in one sentence and end this process."""
    try:
        return function(*args, **named)
    except RetraceError as e:
        sys.exit(f"error: {e}")
    except Exception as e:
        sys.exit(f"error: {unexpected(e, trace_file('rules'))}")


SIGNATURE = inspect.signature(lambda wildcards: None)
OBJECTS = 1_000_000  # made since the last look for cycles; Python's default is 700
STARTS = (100, 1)  # of jobs, in seconds: --max-jobs-per-timespan by default


def asked(before: Callable[[], None], method: Callable, mark: Callable | None = None) -> Callable:
    """A helper: called in a rule, it returns the function that snakemake calls with the wildcards.

    Args:
        before: called in front of each answer.
        method: of `Inputs` or `Params`; it takes the wildcards, then what the rule gave the helper.
        mark: applied to each answer, which is a path, a list of paths or a param.
    """

    def helper(*args: Any, **named: Any) -> Callable:
        def answer(wildcards: Any) -> Any:
            before()
            found = or_exit(method, wildcards, *args, **named)
            return mark(found) if mark else found

        answer.__signature__ = SIGNATURE  # snakemake asks for it, several times a job
        return answer

    return helper


def seldom_collect() -> None:
    """Look for cycles of objects seldom: a graph of jobs has millions of objects, and all stay.

    With Python's defaults a third of snakemake's time went into looking, at 5,000 jobs.
    """
    gc.set_threshold(OBJECTS)


def start_at_any_rate(workflow: Any) -> None:
    """Take Snakemake's own limit, 100 starts of jobs a second, off a run on this machine.

    Under a limit it looks for jobs to start whenever one has ended, and from then on once a second
    more while any waits for a core: late in a run of 400 jobs hundreds of times a second. One that
    was asked for stays, and so does that of a cluster. It is for a moment at which snakemake has
    its settings and no scheduler yet, as when it asks for an input.
    """
    settings = workflow.scheduling_settings
    limit = getattr(settings, "max_jobs_per_timespan", None)
    if limit and workflow.nodes is None and (limit.max_jobs, limit.timespan) == STARTS:
        settings.max_jobs_per_timespan = None


def set_environment(root: Path) -> None:
    """What the jobs find in their environment: this checkout's pipeline, and memory that is kept.

    glibc gives tensors above 32 MB back to the system after every operation, which then pays for
    the zeroing of each page again: copies of 37 MB ran at 3 GB/s, and at 20 with these (2 cores,
    AVX2).
    """
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), before]))
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(4 << 30))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(8 << 30))


def gpu_jobs_at_once(device: str, smoke: bool, cluster: bool) -> int | None:
    """How many jobs that ask for a GPU may run at once; None: snakemake sets no limit.

    Args:
        device: of config.yaml; on the CPU no job is given a GPU.
        smoke: jobs of a smoke run are small, so that as many share the GPUs as there are cores.
        cluster: whether jobs run on other machines, whose scheduler counts GPUs itself.
    """
    if device == "cpu":
        return 0
    if cluster:
        return None
    return (os.cpu_count() or 1) if smoke else gpus.count()


# What the weights of a model take beside what a rule declares, which was measured with 0.54 GB.
MEASURED_MB = 540
BESIDE = 1.15  # weights and what is computed with them, over the weights
GPU_MB = 2000  # of a GPU: its context, a batch's activations and logits


def weights_mb(models: str | Iterable[str]) -> float:
    """MB of the weights of the largest of some models, in the dtype that stages compute in.

    Args:
        models: paths of model.json.

    Raises:
        FileNotFoundError: one is not made yet; snakemake then asks again before the job starts.
    """

    def size(file: str) -> float:
        with open(file, encoding="utf-8") as f:
            about = json.load(f)
        each = 4 if about.get("dtype", "float32") == "float32" else 2
        return about.get("n_parameters", 0) * each / 1e6

    return max(map(size, [models] if isinstance(models, str) else models), default=0.0)


def memory_mb(models: str | Iterable[str], base: int) -> int:
    """mem_mb of a job: what its rule declares, and what a larger model takes beyond that."""
    return base + max(0, math.ceil(BESIDE * weights_mb(models) - MEASURED_MB))


def gpu_memory_mb(models: str | Iterable[str]) -> int:
    """MB on GPUs that a job's model takes, all of them together."""
    return math.ceil(BESIDE * weights_mb(models)) + GPU_MB


def gpus_for(models: str | Iterable[str], gpu_gb: float) -> int:
    """How many GPUs a job asks for: several where one of gpu_gb is too small for its model."""
    return max(1, math.ceil(gpu_memory_mb(models) / 1e3 / gpu_gb)) if gpu_gb else 1


def target(is_rule: Callable[[str], bool], name: str) -> str:
    """The name of a paper as a target of its own: `snakemake -c2 toy_superposition`."""
    if is_rule(name):
        sys.exit(f"error: config.yaml: papers: '{name}' is the name of a rule; rename its folder")
    return name


def first_report_first(workflow: Any, report: str) -> None:
    """Have the jobs that a report needs chosen before all others that could run.

    Nothing else is made for it, and `--prioritize` has the last word. It is for a moment at which
    snakemake has its graph and has not yet counted priorities, as when it asks for an input.

    Args:
        workflow: snakemake's.
        report: of the first paper.
    """
    dag = workflow.dag
    if dag is not None and not (dag.priorityfiles or dag.priorityrules):
        dag.priorityfiles = {report}


def show_progress(workflow: Any, run: Any) -> None:
    """Show what runs in lines of ours (pipeline/claims/terminal.py).

    Args:
        workflow: snakemake's.
        run: the papers of config.yaml (papers.Run).
    """

    def is_target(rule: str) -> bool:
        """Whether a rule only names files, as `all` and the papers' names do."""
        return workflow.is_rule(rule) and workflow.get_rule(rule).norun

    names = [*run.available, "all"]
    terminal.attach(
        workflow.logger_manager, sys.argv, names, papers_of=run.papers_of, is_target=is_target
    )
