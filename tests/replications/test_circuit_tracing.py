"""The paper circuit_tracing: its numbers on made-up tables, and its settings at every scale."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from pipeline.job.source import import_file
from pipeline.papers import papers

PAPER = ROOT / "rules/papers/circuit_tracing"
METRICS = import_file(PAPER / "metrics.py")
GRAPH = ["replacement_score", "completeness_score", "kl_frozen", "faithfulness",
         "faithfulness_null", "pruned_l0", "balance_error"]  # fmt: skip


def tables(seeds=(0, 1)) -> dict[str, pd.DataFrame]:
    """Scores that rise by .1 for each doubling of kept features; clt is .2 above plt and keeps
    twice as many, so that at equal numbers the lead is .1."""
    scores, replaced, judged = [], [], []
    for family, lead, more in (("clt", 0.2, 2), ("plt", 0.0, 1), ("clt_random", -0.3, 1)):
        for k in (4, 8, 16):
            for seed in seeds:
                name, kept = f"{family}_k{k}_seed{seed}", more * k / 4
                score = 0.3 + lead + 0.1 * np.log2(k / 4) + 0.01 * seed
                for prompt, off in (("a", 0.05), ("b", -0.05)):
                    row = dict.fromkeys(GRAPH, score + off) | {"pruned_l0": kept}
                    row["balance_error"] = 1e-6 * k
                    scores.append({"dictionary": name, "prompt": prompt} | row)
                replaced.append({"dictionary": name, "kl": 1 / k, "agreement": 0.1 + lead})
                for layer in (0, 1, -1):
                    row = {"explained_variance": 0.5 + lead / 2, "l0": 2.0 * k, "dead_share": 0.0}
                    judged.append({"sae": name, "layer": layer} | row)
    return {
        "graphs/trained_scores": pd.DataFrame(scores),
        "graphs/trained_replacement": pd.DataFrame(replaced),
        "transcoders/trained": pd.DataFrame(judged),
    }


def test_measures_at_equal_numbers_of_kept_features_are_of_every_seed():
    found = METRICS.metrics(tables())
    assert found["equal.clt_plt.replacement_score"] == pytest.approx([0.1, 0.1])
    assert found["same_k.clt_plt.agreement"] == pytest.approx([0.2, 0.2])
    assert found["same_k.clt_plt.explained_variance"] == pytest.approx([0.1, 0.1])
    assert found["family.clt.replacement_score"] == pytest.approx([0.6, 0.61])
    assert found["graphs.balance_error_max"] == pytest.approx(1.6e-5)
    assert "equal.skip_plt.replacement_score" not in found


def test_families_of_fewer_seeds_have_as_many_values():
    both = {
        n: pd.concat([t[~t.iloc[:, 0].str.contains("random_.*seed1")]])
        for n, t in tables().items()
    }  # fmt: skip
    found = METRICS.metrics(both)
    assert len(found["equal.clt_clt_random.replacement_score"]) == 1
    assert len(found["equal.clt_plt.replacement_score"]) == 2


@pytest.mark.parametrize("scale", ["smoke", "laptop", "paper"])
def test_every_dictionary_is_traced_at_every_scale(scale):
    run = papers.Run.load({"papers": ["circuit_tracing"], "scale": scale}, [Path(ROOT)])
    spec = run.paper("circuit_tracing", scale).spec
    for arm in spec.arm_names():
        assert set(spec.graph_dictionaries(arm)) == set(spec.transcoders_of(arm))
    assert len(spec.activations.hooks) == {"smoke": 4, "laptop": 8, "paper": 60}[scale]


def test_figures_draw_the_tables():
    figures = import_file(PAPER / "figures.py")
    made = tables()
    only = {n: made[n] for n in ("graphs/trained_scores", "graphs/trained_replacement")}
    for draw, given in (
        (figures.replaced, only),
        (figures.error, {"transcoders/trained": made["transcoders/trained"]}),
        (figures.faithful, {"graphs/trained_scores": made["graphs/trained_scores"]}),
    ):
        figure, numbers = draw(given, {})
        assert len(figure.data) >= 2 and len(numbers) >= 3
