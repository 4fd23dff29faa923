"""What one call of snakemake finds out about a paper, the next one remembers; and nothing else."""

import pytest
from snake import edit, forget_code, inputs_of, wildcards

from pipeline.errors import RetraceError
from pipeline.job import source
from pipeline.papers import papers
from pipeline.papers.rule_params import Params

TOY = "rules/papers/toy"


@pytest.fixture
def validated(toy, monkeypatch) -> list[str]:
    """The scales at which papers were validated, in turn."""
    seen, load = [], papers.load
    monkeypatch.setattr(papers, "load", lambda *a: seen.append(a[1]) or load(*a))
    (toy / "results/store").mkdir(parents=True)
    forget_code()  # the note of an earlier test's folder
    return seen


def again(toy):
    """The inputs of a new process, which has the note of the one before."""
    source._remembered().write()
    forget_code()
    return inputs_of(toy)


def test_a_sound_paper_is_validated_at_its_own_scale_alone(toy, validated):
    inputs_of(toy)
    assert validated == ["smoke", "laptop", "paper"]
    again(toy)
    assert validated[3:] == ["smoke"]


@pytest.mark.parametrize(
    "file, old, new, fault",
    [
        ("paper.yaml", "n_pairs: 200_000", "tables: [none of them]", "cannot name a table"),
        ("paper.yaml", "seeds: [0, 1, 2, 3, 4]}", "seeds: [0}", "not valid YAML"),
        ("metrics.py", '"cosine.d*"', '"sine.d*"', "no metric 'cosine.d"),
        ("figures.py", "def cosines", "def sines", "no function 'cosines'"),
    ],
)
def test_a_fault_is_told_by_every_call(toy, validated, file, old, new, fault):
    """Of scale paper alone, too, and after the paper was sound."""
    inputs_of(toy)
    edit(toy / TOY / file, old, new)
    for _ in range(2):
        with pytest.raises(RetraceError, match=fault) as e:
            again(toy)
        assert f"{TOY}/" in str(e.value)
    edit(toy / TOY / file, new, old)
    again(toy)


def test_a_script_that_is_gone_is_told_though_no_file_changed(toy, validated):
    edit(toy / TOY / "paper.yaml", "tables: [cosines]", "tables: [cosines]\n    script: measure.py")
    inputs_of(toy)
    (toy / TOY / "measure.py").unlink()
    with pytest.raises(RetraceError, match=r"there is no measure\.py"):
        again(toy)


def test_another_library_validates_anew(toy, validated):
    inputs_of(toy)
    (toy / "pipeline/spec/base.py").write_text((toy / "pipeline/spec/base.py").read_text() + "\n")
    again(toy)
    assert validated[3:] == ["smoke", "laptop", "paper"]


def test_params_of_a_changed_paper_are_its_own(toy, validated):
    """What a job's params say follows paper.yaml and metrics.py, and is what a first call says."""
    asked = (("metrics_spec", wildcards()), ("claims_spec", wildcards()),
             ("index_spec", wildcards(paper="")))  # fmt: skip

    def said(inputs) -> list[str]:
        params = Params(inputs, {})
        return [getattr(params, name)(of) for name, of in asked]

    first = said(inputs_of(toy))
    assert said(again(toy)) == first
    edit(toy / TOY / "metrics.py", '"cosine.d*": "', '"cosine.d*": "Not ')
    second = said(again(toy))
    assert all(a != b for a, b in zip(first, second, strict=True))
    edit(toy / TOY / "paper.yaml", "tolerance: 0.005", "tolerance: 0.006")
    third = said(again(toy))
    assert [a != b for a, b in zip(second, third, strict=True)] == [False, True, False]
    source._remembered.cache_clear()
    source._remembered().files.clear()
    assert said(inputs_of(toy)) == third
