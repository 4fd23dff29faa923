"""The paper circuit_tracing: its numbers on made-up tables, and its settings at every scale."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT

from pipeline.crosscoders.layered_files import LayerWeights
from pipeline.errors import RetraceError
from pipeline.families.tiny_models import tiny_config, tiny_model
from pipeline.job.source import import_file
from pipeline.papers import papers

PAPER = ROOT / "rules/papers/circuit_tracing"
METRICS, FINETUNING, GREATER = (
    import_file(PAPER / f"{name}.py") for name in ("metrics", "finetuning", "greater")
)
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


def finetuned_table() -> pd.DataFrame:
    """KL .4 before, .3 on the error and .2 on KL, .01 more for seed 1."""
    kls = {"none": 0.4, "mse": 0.3, "kl": 0.2, "shuffled": 0.5}
    return pd.DataFrame([
        {"dictionary": f"skip_k8_seed{seed}", "objective": objective, "kl": kl + 0.01 * seed,
         "unexplained": 0.2, "replacement_score": 0.7, "agreement": 0.5}
        for seed in (0, 1) for objective, kl in kls.items()
    ])  # fmt: skip


def test_measures_of_own_stages_by_family():
    made = tables() | {"finetuning/tuned": finetuned_table()}
    made["greater/effects"] = pd.DataFrame({"layer": [-1, 0, 1], "difference": [0.5, 0.2, 0.4]})
    rows = [
        {"dictionary": name, "layer": 0, "units": units, "n": n, "recovered": share}
        for name in ("plt_k32_seed0", "plt_random_k32_seed0")
        for units, share in (("latents", 0.6 if "random" not in name else 0.1), ("neurons", 0.3))
        for n in (0, 1, 8, 24)
    ]
    made["greater/kept"] = pd.DataFrame(rows)
    scores = made["graphs/trained_scores"]
    for column, value in (("answer_rank", 1.0), ("p_answer", 0.6), ("faithfulness_logits", 0.5),
                          ("faithfulness_logits_null", 0.1)):  # fmt: skip
        scores[column] = value
    found = METRICS.metrics(made)
    assert found["finetuned.skip.kl.kl"] == pytest.approx([0.2, 0.21])
    assert found["finetuned.skip.mse.kl"] == pytest.approx([0.3, 0.31])
    assert found["greater.difference"] == 0.5 and found["greater.effect"] == pytest.approx(0.3)
    assert found["greater.plt.lead"] == pytest.approx(0.3)
    assert found["greater.plt_random.lead"] == pytest.approx(-0.2)
    assert found["prompt.a.answer_rank"] == 1 and found["prompt.b.clt.faithfulness_logits"] == 0.5


def test_figures_draw_the_tables():
    figures = import_file(PAPER / "figures.py")
    made = tables()
    only = {n: made[n] for n in ("graphs/trained_scores", "graphs/trained_replacement")}
    for draw, given in (
        (figures.replaced, only),
        (figures.error, {"transcoders/trained": made["transcoders/trained"]}),
        (figures.faithful, {"graphs/trained_scores": made["graphs/trained_scores"]}),
        (figures.tuned, {"finetuning/tuned": finetuned_table()}),
    ):
        figure, numbers = draw(given, {})
        assert len(figure.data) >= 2 and len(numbers) >= 3


# --- own stages ----------------------------------------------------------------------------


def cross_set(n_layers=2, d=32, d_sae=24):
    """A cross-layer set for the tiny Llama, as it is read from files."""
    draw = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return 0.2 * torch.randn(*shape, generator=draw)

    return LayerWeights(
        "cross", [f"blocks.{i}.mlp.hook_in" for i in range(n_layers)],
        [f"blocks.{i}.hook_mlp_out" for i in range(n_layers)],
        [drawn(d_sae, d) for _ in range(n_layers)], [drawn(d_sae) for _ in range(n_layers)],
        [drawn(d_sae, n_layers - i, d) for i in range(n_layers)], drawn(n_layers, d), "topk", k=4,
    )  # fmt: skip


def greater_case():
    hf = tiny_model(tiny_config("llama"))
    draw = torch.Generator().manual_seed(2)
    prompts = GREATER.Prompts(
        torch.randint(0, 40, (10, 6), generator=draw), torch.randint(1, 9, (10,), generator=draw),
        torch.arange(10, 20),
    )  # fmt: skip
    return hf, prompts


def test_the_difference_is_of_digits_above_and_below():
    _, prompts = greater_case()
    logits = torch.randn(10, 40, generator=torch.Generator().manual_seed(3))
    p = logits.softmax(-1)
    for row, (got, ten) in enumerate(
        zip(prompts.difference(logits).tolist(), prompts.tens.tolist(), strict=True)
    ):
        above, below = p[row, 10 + ten + 1 : 20].sum(), p[row, 10 : 10 + ten].sum()
        assert got == pytest.approx(float(above - below), abs=1e-6)


def test_all_neurons_are_the_mlp_and_none_is_its_mean():
    hf, prompts = greater_case()
    units = GREATER.neurons(hf, 1)
    order = GREATER.ranked(hf, units, prompts)
    rows = GREATER.kept(hf, units, order, prompts, [0, 3, len(order)])
    effects = GREATER.effects(hf, prompts)
    assert rows[0]["difference"] == pytest.approx(effects[2]["difference"], abs=1e-5)
    assert rows[-1]["difference"] == pytest.approx(effects[0]["difference"], abs=1e-5)
    assert rows[0]["recovered"] == 0 and rows[-1]["recovered"] == pytest.approx(1, abs=1e-3)


def test_all_latents_of_a_transcoder_that_is_the_mlp_are_the_mlp():
    """Where each latent is a neuron: the hook of what is read is the neurons' own."""
    hf, prompts = greater_case()
    W = hf.model.layers[1].mlp.down_proj.weight.detach()
    n = W.shape[1]
    both = torch.cat([torch.eye(n), -torch.eye(n)])  # a neuron's positive and negative part
    weights = LayerWeights(
        "each", ["", "blocks.1.mlp.hook_post"], ["", "blocks.1.hook_mlp_out"], [both, both],
        [torch.zeros(2 * n)] * 2, [(both @ W.T)[:, None]] * 2, torch.zeros(2, 32),
    )  # fmt: skip
    units = GREATER.latents(hf, weights, 1)
    order = GREATER.ranked(hf, units, prompts)
    rows = GREATER.kept(hf, units, order, prompts, [0, 2 * n])
    of_neurons = GREATER.neurons(hf, 1)
    want = GREATER.kept(
        hf, of_neurons, GREATER.ranked(hf, of_neurons, prompts), prompts, [0, n]
    )  # fmt: skip
    for got, own in zip(rows, want, strict=True):
        assert got["difference"] == pytest.approx(own["difference"], abs=1e-5)
    with pytest.raises(RetraceError, match="a cross-layer transcoder writes later layers"):
        GREATER.latents(hf, cross_set(), 1)
