"""Our metrics against SAELens's own `run_evals`, on the same dictionaries, model and tokens; and
what we export, loaded and used by the programs that read it.
"""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import HOOK, stage
from synthetic import call

from pipeline.latents import fidelity, stored
from pipeline.latents.reconstruction import reconstruction
from pipeline.latents.splicer import Splicer
from pipeline.models import hooks, loader
from pipeline.sharing import verify
from pipeline.spec.sae import SaeSpec
from pipeline.store import shards, tables

pytestmark = pytest.mark.workflow  # stages, and sae_lens (seconds to import)
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
        saes=stored.load_saes(sae / "manifest.json", torch.device("cpu")),
        tokens=stored.eval_tokens(tokens, 40),
        activations=acts,
        sae=sae,
        model_json=tiny_model_json,
        bridge=loader.bridge(tiny_model_json),
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
    for metric, value in fidelity.density_shares(density).items():
        assert ours[metric] == pytest.approx(value, abs=1 / 64)
    assert ours["freq_over_1_percent"] >= ours["freq_over_10_percent"] > 0


@pytest.mark.parametrize("name", SPECS)
def test_the_saebench_file_has_saelens_ablation_of_every_position(chain, name, tmp_path):
    """loss_zero leaves tokens that no dictionary has seen as they are; SAELens sets all to zero.

    SAEBench 0.6.0's own functions are SAELens's here: `sae_bench.evals.core.main.get_recons_loss`
    gave the same six numbers on these tokens when it was tried.
    """
    theirs, ours = run_evals(chain, name), chain.table.loc[name]
    spec = {"format": "saebench", "arm": "trained", "sae": name, "paper": "toy"}
    call("exports", {"export": spec}, sae=chain.sae / "manifest.json",
         table=chain.sae.parent / "evaluation.parquet", out=tmp_path / "core.json")  # fmt: skip
    found = tables.read_json(tmp_path / "core.json")["eval_result_metrics"]
    loss, kl = "model_performance_preservation", "model_behavior_preservation"
    for section in (loss, kl):
        assert found[section].keys() == theirs[section].keys()
        for key, value in theirs[section].items():  # a score is a difference of losses
            given = {"abs": 2e-3} if key.endswith("score") else {"rel": RELATIVE}
            assert found[section][key] == pytest.approx(value, **given), key
    assert ours["loss_zero"] != pytest.approx(ours["loss_zero_all"], rel=1e-3)


def test_zero_at_every_position_is_what_a_hook_of_zeros_gives(chain):
    """Six lines of transformers and torch, none of ours."""
    hf = loader.load(chain.model_json).hf
    handle = hf.model.layers[0].register_forward_hook(lambda module, args, out: (
        (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.zeros_like(out)
    ))  # fmt: skip
    with torch.no_grad():
        logits = hf(chain.tokens).logits[:, 1:-1].flatten(0, 1)
    handle.remove()
    loss = torch.nn.functional.cross_entropy(logits, chain.tokens[:, 2:].flatten())
    assert chain.table.loc["topk", "loss_zero_all"] == pytest.approx(loss.item(), rel=1e-5)


def test_of_two_batches_saelens_averages_two_relative_biases_where_ours_is_one_ratio(chain):
    """Ours: sums over the whole set. Theirs: the mean of a ratio a batch, and so legacy EV."""
    theirs = run_evals(chain, "topk", n_batches=2)
    splicer = Splicer(loader.load(chain.model_json).hf, HOOK, chain.tokens, skip_first=1)
    rows = torch.cat([x[known] for x, known in zip(splicer.streams, splicer.known, strict=True)])
    halves = [
        reconstruction({"topk": chain.saes["topk"]}, [half], 32)[0]["topk"]
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


# --- exports, used by their readers --------------------------------------------------------


@pytest.fixture(scope="module")
def exported(chain, tmp_path_factory) -> Path:
    """A folder with topk/, the export, and results/store/model/<name>/, as snakemake lays it."""
    out = tmp_path_factory.mktemp("exported")
    spec = {"format": "saelens", "arm": "trained", "sae": "topk", "paper": "toy"}
    stage("exports", {"export": spec}, cwd=out, sae=chain.sae / "manifest.json",
          model=chain.model_json, out="topk")  # fmt: skip
    name = tables.read_json(out / "topk/cfg.json")["metadata"]["model_name"]
    (out / "results/store/model").mkdir(parents=True)
    (out / "results/store/model" / name).symlink_to(chain.model_json.parent)
    return out


def dataset(chain, n: int | None = None):
    """The held-out blocks as SAELens wants a dataset of tokens."""
    from datasets import Dataset

    return Dataset.from_dict({"tokens": chain.tokens[:n].tolist()})


def loaded(exported: Path, hook: str = "hook_name"):
    """The exported SAE, to be used under its metadata's `hook`."""
    from sae_lens import SAE

    sae = SAE.load_from_disk(str(exported / "topk"))
    sae.cfg.metadata.hook_name = sae.cfg.metadata[hook]
    return sae


def bridges(exported: Path):
    """SAELens's own bridge, of the same weights."""
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    checkpoint = next(exported.glob("results/store/model/*/checkpoint"))
    return SAETransformerBridge.boot_transformers(str(checkpoint), device="cpu")


@pytest.mark.parametrize("kind", ["TransformerBridge", "SAETransformerBridge"])
def test_saelens_store_gives_the_rows_that_the_dictionary_was_trained_on(chain, exported, kind):
    from sae_lens import ActivationsStore

    own = kind == "SAETransformerBridge"
    bridge = bridges(exported) if own else chain.bridge
    sae = loaded(exported, "hook_name_bridge" if own else "hook_name")
    acts = ActivationsStore.from_sae(bridge, sae, dataset(chain), store_batch_size_prompts=4)
    found = acts.get_activations(acts.get_batch_tokens())
    assert found.shape == (4, 15, 32)
    raw, columns = shards.Rows(chain.activations, HOOK, "eval").read(0, 60)
    assert columns["position"].reshape(4, 15)[0].tolist() == list(range(1, 16))
    torch.testing.assert_close(found.reshape(60, 32), torch.from_numpy(raw.copy()),
                               atol=2e-5, rtol=2e-5)  # fmt: skip


def test_saelens_store_begins_a_block_of_text_as_ours_do(chain, exported):
    from datasets import Dataset
    from sae_lens import ActivationsStore

    texts = Dataset.from_dict({"text": ["the cat sat on a mat and saw two dogs run"] * 4})
    acts = ActivationsStore.from_sae(chain.bridge, loaded(exported), texts)
    tokens = acts.get_batch_tokens(3)
    assert tokens.shape == (3, 16) and (tokens[:, 0] == BOS).all()


@pytest.mark.parametrize("over", [{"prepend_bos": False}, {}])
def test_the_metadata_say_which_tokens_were_taken(chain, over):
    from pipeline.sae import sae

    about = {"model": "m/model.json", "corpus": "c/t", "n_ctx": 16, "skip_first": 2}
    made = sae.metadata(about | {"prepend_bos": True} | over, HOOK)
    assert made["prepend_bos"] is over.get("prepend_bos", True)
    assert list(range(16))[slice(*made["seqpos_slice"])] == list(range(2, 16))
    assert made["hook_name_bridge"] == "blocks.0.hook_out"


@pytest.mark.parametrize("kind", ["TransformerBridge", "SAETransformerBridge"])
def test_saelens_evaluation_of_an_export_moves_the_loss(chain, exported, kind):
    from sae_lens.evals import get_eval_everything_config, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler

    own = kind == "SAETransformerBridge"
    bridge = bridges(exported) if own else chain.bridge
    sae = loaded(exported, "hook_name_bridge" if own else "hook_name")
    config = get_eval_everything_config(n_eval_reconstruction_batches=1)
    found, _ = run_evals(sae, Tokens(chain.tokens), bridge, ActivationScaler(), config,
                         exclude_special_tokens=[BOS])  # fmt: skip
    loss, ours = found["model_performance_preservation"], chain.table.loc["topk"]
    plain, spliced, ablated = (loss[f"ce_loss_{k}"] for k in ("without_sae", "with_sae",
                                                              "with_ablation"))  # fmt: skip
    assert min(abs(plain - spliced), abs(plain - ablated), abs(spliced - ablated)) > 1e-2
    assert spliced == pytest.approx(ours["loss_spliced"], rel=RELATIVE)
    assert plain == pytest.approx(ours["loss_model"], rel=RELATIVE)


def test_the_card_names_both_hooks_and_its_code_runs(chain, exported, monkeypatch):
    card = (exported / "topk/README.md").read_text()
    assert "`blocks.0.hook_resid_post`" in card and "`blocks.0.hook_out`" in card
    assert "blocks of 16, BOS and then text, positions below 1 left out" in card
    monkeypatch.chdir(exported)
    space = {"texts": dataset(chain)}
    exec(re.search(r"```python\n(.*?)```", card, re.S)[1], space)
    loss = space["found"]["model_performance_preservation"]
    assert abs(loss["ce_loss_with_sae"] - loss["ce_loss_without_sae"]) > 1e-2
    assert verify.faults(exported / "topk") == []


@pytest.mark.parametrize("hook", ["hook_name", "hook_name_bridge"])
def test_saelens_bridge_attaches_an_export_under_either_name(chain, exported, hook):
    sae, hf = loaded(exported, hook), loader.load(chain.model_json).hf
    with torch.no_grad():
        theirs = bridges(exported).run_with_saes(chain.tokens[:4], saes=[sae])
        with hooks.edited(hf, HOOK, sae):
            ours = hf(chain.tokens[:4]).logits
        assert (ours - hf(chain.tokens[:4]).logits).abs().max() > 0.1
    torch.testing.assert_close(theirs, ours, atol=1e-3, rtol=1e-3)  # of a latent near its threshold


@pytest.fixture(scope="module")
def transcoder(chain, tmp_path_factory) -> Path:
    """As `exported`, with transcoder/, which reads ln2's input and writes the MLP's output."""
    out = tmp_path_factory.mktemp("transcoder")
    corpus = tables.read_json(chain.activations)["corpus"]
    read, write = "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"
    call("activations", {"activations": {"hooks": [read, write], "dtype": "float32"}},
         model=chain.model_json, corpus=chain.sae.parent / Path(corpus).name,
         out=out / "acts.json", shards=out / "shards", device="cpu", threads=1)  # fmt: skip
    spec = SaeSpec(hook=read, output_hook=write, architecture="batchtopk", d_sae=64, k=6)
    given = {"hook": read, "output_hook": write, "dictionaries": {
        "wide": spec.model_dump(exclude={"grid", "arms"})}}  # fmt: skip
    given["training"] = {"n_rows": 6400, "batch_size": 128, "lr": 3e-3}
    call("sae", {"sae": given}, activations=out / "acts.json", out=out / "manifest.json",
         saes=out / "saes", history=out / "history.parquet", device="cpu", threads=1)  # fmt: skip
    named = {"format": "saelens", "arm": "trained", "sae": "wide", "paper": "toy"}
    stage("exports", {"export": named}, cwd=out, sae="manifest.json", model=chain.model_json,
          out="transcoder")  # fmt: skip
    name = tables.read_json(out / "transcoder/cfg.json")["metadata"]["model_name"]
    (out / "results/store/model").mkdir(parents=True)
    (out / "results/store/model" / name).symlink_to(chain.model_json.parent)
    return out


def test_the_card_of_a_transcoder_attaches_it_where_it_reads_and_writes(
    chain, transcoder, monkeypatch
):
    card = (transcoder / "transcoder/README.md").read_text()
    assert "reconstructs `blocks.1.hook_mlp_out`" in card and "Do not attach an SAE" in card
    assert "At `hook_resid_mid` a bridge replaces what the MLP reads" in card
    monkeypatch.chdir(transcoder)
    space = {"tokens": chain.tokens[:4]}
    exec(re.search(r"```python\n(.*?)```", card, re.S)[1], space)
    hf = loader.load(chain.model_json).hf
    with torch.no_grad(), hooks.capture(hf, ["blocks.1.hook_resid_mid"]) as seen:
        plain = hf(chain.tokens[:4]).logits
        with hooks.edited(hf, "blocks.1.hook_mlp_out",
                          lambda _: space["sae"](seen["blocks.1.hook_resid_mid"])):  # fmt: skip
            ours = hf(chain.tokens[:4]).logits
    assert (ours - plain).abs().max() > 0.1
    torch.testing.assert_close(space["logits"], ours, atol=1e-3, rtol=1e-3)
