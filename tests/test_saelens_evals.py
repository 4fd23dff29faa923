"""Our metrics against SAELens's own `run_evals`, on the same dictionaries, model and tokens."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import HOOK
from synthetic import call

from pipeline import evaluation, metrics, model, tables
from pipeline.spec_sae import SaeSpec

BOS = 0  # at position 0 of every block, and nowhere else: documents are not closed
SPECS = {
    "standard": {"architecture": "standard", "d_sae": 64, "l1_coefficient": 1.0},
    "topk": {"architecture": "topk", "d_sae": 64, "k": 6},
    "batchtopk": {"architecture": "batchtopk", "d_sae": 64, "k": 6},
}
# Ours -> SAELens's section and name. Both sum float32 numbers; the bridge's attention adds in
# another order than ours, so a pre-activation near a threshold may fall on its other side: on 600
# rows one latent on one row moves L0 by 0.002. A wrong definition is off by far more.
SAME = {
    "explained_variance": ("reconstruction_quality", "explained_variance"),
    "explained_variance_legacy": ("reconstruction_quality", "explained_variance_legacy"),
    "mse": ("reconstruction_quality", "mse"),
    "cosine_similarity": ("reconstruction_quality", "cossim"),
    "norm_in": ("shrinkage", "l2_norm_in"),
    "norm_out": ("shrinkage", "l2_norm_out"),
    "norm_ratio": ("shrinkage", "l2_ratio"),
    "relative_bias": ("shrinkage", "relative_reconstruction_bias"),
    "l0": ("sparsity", "l0"),
    "l1": ("sparsity", "l1"),
    "loss_model": ("model_performance_preservation", "ce_loss_without_sae"),
    "loss_spliced": ("model_performance_preservation", "ce_loss_with_sae"),
    "kl_spliced": ("model_behavior_preservation", "kl_div_with_sae"),
}
RELATIVE = 2e-4


class Tokens:
    """What run_evals asks of SAELens's ActivationsStore: the held-out blocks, in order."""

    def __init__(self, tokens: torch.Tensor, n_batches: int = 1) -> None:
        self.batches, self.context_size = tokens.chunk(n_batches), tokens.shape[1]
        self.store_batch_size_prompts = len(self.batches[0])
        self.reset_input_dataset()

    def reset_input_dataset(self) -> None:
        self.left = list(self.batches)

    def get_batch_tokens(self, n: int) -> torch.Tensor:
        return self.left.pop(0)


@pytest.fixture(scope="module")
def chain(tiny_model_json, tiny_text, tmp_path_factory) -> SimpleNamespace:
    """Corpus, activations, dictionaries and evaluation by our stages; bridge and tokens."""
    out = tmp_path_factory.mktemp("chain")
    corpus = {"source": "local", "path": str(tiny_text), "n_ctx": 16, "n_tokens": 3200}
    corpus |= {"n_eval_tokens": 640, "close_documents": False}
    tokens, acts, sae = out / "tokens.parquet", out / "acts/manifest.json", out / "sae"
    call("corpus", {"corpus": corpus}, tokenizer=tiny_model_json, out=tokens,
         documents=out / "documents.parquet")  # fmt: skip
    call("activations", {"activations": {"hooks": [HOOK], "dtype": "float32"}},
         model=tiny_model_json, corpus=tokens, out=acts, shards=out / "acts/shards",
         device="cpu", threads=1)  # fmt: skip
    specs = {n: SaeSpec(hook=HOOK, **s).model_dump(exclude={"grid", "arms"})
             for n, s in SPECS.items()}  # fmt: skip
    training = {"n_rows": 25_600, "batch_size": 128, "lr": 3e-3}
    call("sae", {"sae": {"hook": HOOK, "training": training, "dictionaries": specs}},
         activations=acts, out=sae / "manifest.json", saes=sae / "saes",
         history=sae / "history.parquet", device="cpu", threads=1)  # fmt: skip
    table = out / "evaluation.parquet"
    call("evaluation", {"evaluation": {"n_splice_blocks": 40}}, model=tiny_model_json,
         corpus=tokens, activations=acts, saes=[sae / "manifest.json"], out=table,
         history=out / "history.parquet", device="cpu", threads=1)  # fmt: skip
    return SimpleNamespace(
        table=tables.read_table(table).set_index("sae"),
        saes=evaluation.load_saes(sae / "manifest.json", torch.device("cpu")),
        tokens=evaluation.eval_tokens(tokens, 40),
        model_json=tiny_model_json,
        bridge=model.bridge(tiny_model_json),
    )


def run_evals(chain, name: str, n_batches: int = 1) -> dict:
    """SAELens's metrics of a dictionary, BOS left out, by section."""
    from sae_lens.evals import get_eval_everything_config, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler

    config = get_eval_everything_config(
        n_eval_reconstruction_batches=n_batches, n_eval_sparsity_variance_batches=n_batches
    )
    store = Tokens(chain.tokens, n_batches)
    found, latents = run_evals(chain.saes[name], store, chain.bridge, ActivationScaler(), config,
                               exclude_special_tokens=[BOS])  # fmt: skip
    return found | {"latents": latents}


def test_the_tokens_are_all_of_the_held_out_blocks_and_bos_stands_first_alone(chain):
    assert chain.tokens.shape == (40, 16)
    assert (chain.tokens[:, 0] == BOS).all() and (chain.tokens[:, 1:] != BOS).all()


@pytest.mark.parametrize("name", SPECS)
def test_each_metric_is_saelens_metric(chain, name):
    theirs, ours = run_evals(chain, name), chain.table.loc[name]
    assert 0.2 < ours["explained_variance"] < 1  # trained, and not perfectly
    assert ours["kl_spliced"] > 1e-3
    for metric, (section, key) in SAME.items():
        assert ours[metric] == pytest.approx(theirs[section][key], rel=RELATIVE), metric


@pytest.mark.parametrize("name", SPECS)
def test_latents_that_fire_never_or_often_are_those_of_saelens_densities(chain, name):
    density = np.array(run_evals(chain, name)["latents"]["feature_density"])
    density = (density * 600).round() / 600  # theirs are float32, in which 60 / 600 > 0.1
    ours = chain.table.loc[name]
    assert ours["silent_share"] == pytest.approx((density == 0).mean(), abs=1 / 64)
    for metric, value in metrics.density_shares(density).items():
        assert ours[metric] == pytest.approx(value, abs=1 / 64)
    assert ours["freq_over_1_percent"] >= ours["freq_over_10_percent"] > 0


@pytest.mark.parametrize("name", SPECS)
def test_zero_ablation_is_saelens_once_bos_is_ablated_too(chain, name):
    """Ours leaves tokens that no dictionary has seen as they are; SAELens sets all to zero."""
    theirs, ours = run_evals(chain, name), chain.table.loc[name]
    hf = model.load(chain.model_json).hf
    splicer = evaluation.Splicer(hf, HOOK, chain.tokens, skip_first=1)
    assert splicer.loss(torch.zeros_like) == pytest.approx(ours["loss_zero"], rel=1e-5)
    splicer.known = [torch.ones_like(k) for k in splicer.known]
    (loss_model, _), (loss_zero, kl_zero) = splicer.measure([lambda x: x, torch.zeros_like])
    loss, kl = theirs["model_performance_preservation"], theirs["model_behavior_preservation"]
    assert loss_zero == pytest.approx(loss["ce_loss_with_ablation"], rel=RELATIVE)
    assert kl_zero == pytest.approx(kl["kl_div_with_ablation"], rel=RELATIVE)
    assert ours["loss_zero"] != pytest.approx(loss_zero, rel=1e-3)
    recovered = (loss_zero - ours["loss_spliced"]) / (loss_zero - loss_model)
    assert recovered == pytest.approx(loss["ce_loss_score"], rel=2e-3, abs=2e-3)
    assert 1 - ours["kl_spliced"] / kl_zero == pytest.approx(kl["kl_div_score"], rel=1e-3)


def test_of_two_batches_saelens_averages_two_relative_biases_where_ours_is_one_ratio(chain):
    """Ours: sums over the whole set. Theirs: the mean of a ratio a batch, and so legacy EV."""
    theirs = run_evals(chain, "topk", n_batches=2)
    splicer = evaluation.Splicer(model.load(chain.model_json).hf, HOOK, chain.tokens, skip_first=1)
    rows = torch.cat([x[known] for x, known in zip(splicer.streams, splicer.known, strict=True)])
    halves = [
        evaluation.reconstruction({"topk": chain.saes["topk"]}, [half], 32)[0]["topk"]
        for half in rows.chunk(2)
    ]
    whole = chain.table.loc["topk"]
    for metric in ("relative_bias", "explained_variance_legacy"):
        section, key = SAME[metric]
        mean = sum(half[metric] for half in halves) / 2
        assert theirs[section][key] == pytest.approx(mean, rel=RELATIVE)
        assert mean != pytest.approx(whole[metric], rel=1e-7)
    for metric in ("explained_variance", "l0", "mse", "loss_spliced"):  # the same in any batches
        section, key = SAME[metric]
        assert theirs[section][key] == pytest.approx(whole[metric], rel=RELATIVE)
