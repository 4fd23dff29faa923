"""What rules/common.smk needs around the answers: helpers, one-sentence faults, wildcards, GPUs."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from snake import ROOT

from pipeline.errors import RetraceError
from pipeline.papers import rule_helpers


@pytest.mark.parametrize(
    "name, fits, not_these",
    [
        ("paper", ["toy", "Toy_2"], ["2toy", "a/b", "a-b", ""]),
        ("arm", ["trained"], ["a.b", "_a"]),
        ("latents", ["topk_k32", "32", "random.topk"], ["a.b.c", ".b", "a-b"]),
        ("figure", ["cosines"], ["a.b", "figures/a"]),
        ("model", ["pythia-70m-0123456789ab"], ["pythia", "a/b-0123456789ab", "a-0123456789aB"]),
        ("sae", ["m-blocks_0-0123456789ab"], ["m-0123456789a"]),
    ],
)
def test_wildcards(name, fits, not_these):
    pattern = re.compile(rule_helpers.WILDCARDS[name])
    assert all(pattern.fullmatch(text) for text in fits)
    assert not any(pattern.fullmatch(text) for text in not_these)


def test_a_helper_answers_only_when_the_wildcards_are_known():
    calls = []
    method = lambda w, *args, **named: [w, *args, *named]  # noqa: E731
    helper = rule_helpers.asked(lambda: calls.append("before"), method, tuple)
    answer = helper("stage", file="x")
    assert calls == []
    assert answer("wildcards") == ("wildcards", "stage", "file") and calls == ["before"]


@pytest.mark.parametrize(
    "fault, said",
    [
        (RetraceError("x is 3; make it 4"), "error: x is 3; make it 4"),
        (KeyError(7), "KeyError (7)"),
    ],
)
def test_a_fault_ends_in_one_sentence(fault, said):
    def fail(_):
        raise fault

    with pytest.raises(SystemExit) as end:
        rule_helpers.asked(lambda: None, fail)()("wildcards")
    assert said in str(end.value) and str(end.value).startswith("error: ")
    assert "\n" not in str(end.value)


@pytest.mark.parametrize("name", ["claims", "all", "sae"])
def test_a_paper_cannot_take_the_name_of_a_rule(name):
    with pytest.raises(SystemExit, match=f"papers: '{name}' is the name of a rule"):
        rule_helpers.target({"claims", "all", "sae"}.__contains__, name)
    assert rule_helpers.target({"claims"}.__contains__, "toy") == "toy"


@pytest.mark.parametrize(
    "device, smoke, cluster, jobs",
    [
        ("cpu", True, False, 0), ("cpu", False, True, 0), ("auto", True, False, 5),
        ("auto", False, False, 3), ("cuda", False, False, 3), ("auto", True, True, None),
    ],
)  # fmt: skip
def test_how_many_jobs_share_the_gpus(monkeypatch, device, smoke, cluster, jobs):
    monkeypatch.setattr("os.cpu_count", lambda: 5)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    assert rule_helpers.gpu_jobs_at_once(device, smoke, cluster) == jobs


def test_jobs_find_this_checkout_first(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "theirs")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "7")
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "")
    rule_helpers.set_environment(Path("ours"))
    assert rule_helpers.os.environ["PYTHONPATH"] == "ours:theirs"
    assert rule_helpers.os.environ["MALLOC_TRIM_THRESHOLD_"] == "7"  # what is set is left


# --- what a scheduler is told --------------------------------------------------------------


@pytest.fixture
def models(tmp_path):
    """model.json of SmolLM2-135M, and of Gemma 2 9B in bfloat16."""
    about = {"small": {"n_parameters": 134_515_008},
             "large": {"n_parameters": 9_241_705_984, "dtype": "bfloat16"}}  # fmt: skip
    for name, values in about.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    return {name: str(tmp_path / f"{name}.json") for name in about}


def test_memory_grows_with_the_weights(models):
    assert rule_helpers.weights_mb(models["large"]) == pytest.approx(18_483, abs=1)
    assert rule_helpers.memory_mb(models["small"], 6000) in range(6000, 6100)
    assert rule_helpers.memory_mb(models["large"], 6000) in range(26_000, 27_000)
    both = list(models.values())
    assert rule_helpers.memory_mb(both, 6000) == rule_helpers.memory_mb(models["large"], 6000)
    assert rule_helpers.memory_mb([], 6000) == 6000


@pytest.mark.parametrize(
    ("gpu_gb", "small", "large"), [(0, 1, 1), (80, 1, 1), (16, 1, 2), (8, 1, 3)]
)
def test_a_model_that_one_gpu_is_too_small_for_asks_for_several(gpu_gb, small, large, models):
    assert rule_helpers.gpus_for(models["small"], gpu_gb) == small
    assert rule_helpers.gpus_for(models["large"], gpu_gb) == large
    assert rule_helpers.gpu_memory_mb(models["large"]) in range(23_000, 23_500)


def test_a_model_that_is_not_made_yet_is_asked_for_again(tmp_path):
    """Snakemake takes a FileNotFoundError of an input as 'not known yet'."""
    with pytest.raises(FileNotFoundError) as e:
        rule_helpers.memory_mb(str(tmp_path / "model.json"), 6000)
    assert e.value.filename == str(tmp_path / "model.json")


def test_priorities_are_left_where_somebody_chose():
    for files, rules, found in [
        (set(), set(), {"report.html"}),
        ({"other.html"}, set(), {"other.html"}),  # --prioritize says otherwise
        (set(), {"topk"}, set()),
    ]:
        dag = SimpleNamespace(priorityfiles=files, priorityrules=rules)
        rule_helpers.first_report_first(SimpleNamespace(dag=dag), "report.html")
        assert dag.priorityfiles == found
    rule_helpers.first_report_first(SimpleNamespace(dag=None), "report.html")


@pytest.mark.parametrize(
    ("first", "order"), [("a", ["a", "measured", "b"]), ("b", ["measured", "b", "a"])]
)
def test_snakemake_makes_all_that_the_first_report_needs_before_others(first, order, tmp_path):
    """Of two papers whose jobs could all run, on one core."""
    (tmp_path / "Snakefile").write_text(f"""import sys
sys.path.insert(0, {str(ROOT)!r})
from pipeline.papers.rule_helpers import asked, first_report_first
settle = lambda: first_report_first(workflow, "{first}/report.html")
rule all:
    input: asked(settle, lambda wildcards: ["a/report.html", "b/report.html"])()
rule other:
    output: touch("a/report.html")
    shell: "echo a >> order"
rule report:
    input: "measured"
    output: touch("b/report.html")
    shell: "echo b >> order"
rule measure:
    output: touch("measured")
    shell: "echo measured >> order"
""")
    command = [sys.executable, "-m", "snakemake", "-c1", "--quiet", "--directory", str(tmp_path)]
    subprocess.run([*command, "-s", str(tmp_path / "Snakefile")], check=True, capture_output=True)
    assert (tmp_path / "order").read_text().split() == order


@pytest.mark.workflow
@pytest.mark.parametrize(
    ("flags", "quick"), [([], True), (["--max-jobs-per-timespan=9/1s"], False)]
)
def test_snakemake_looks_for_jobs_when_one_has_ended_and_not_ever_more_often(
    flags, quick, tmp_path
):
    """Eight jobs end and one sleeps, while another waits for the only core."""
    (tmp_path / "Snakefile").write_text(f"""import sys
sys.path.insert(0, {str(ROOT)!r})
from snakemake.scheduling.job_scheduler import JobScheduler
from pipeline.papers.rule_helpers import asked, start_at_any_rate
looked, plain = [], JobScheduler.job_selector
JobScheduler.job_selector = lambda self, jobs: looked.append(1) or plain(self, jobs)
settle = lambda: start_at_any_rate(workflow)
onsuccess:
    print(f"looked {{len(looked)}} times")
rule all:
    input: asked(settle, lambda wildcards: ["slept", "after", *[f"{{i}}.txt" for i in range(8)]])()
rule quick:
    output: touch("{{i}}.txt")
    priority: 2
rule slow:
    output: touch("slept")
    priority: 1
    shell: "sleep 4"
rule after:
    output: touch("after")
""")
    command = [sys.executable, "-m", "snakemake", "-c1", "--directory", str(tmp_path), *flags]
    done = subprocess.run(
        [*command, "-s", str(tmp_path / "Snakefile")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    looked = int(re.search(r"looked (\d+) times", done.stdout + done.stderr)[1])
    assert (looked <= 12) is quick, looked
