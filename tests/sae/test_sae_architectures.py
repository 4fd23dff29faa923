"""Every architecture of SAELens: spec, training, resume, and what a saved folder reconstructs."""

import copy

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from test_sae import mean_max_cosine, one_thread, planted, stream_of  # noqa: F401

from pipeline.sae import sae as stage_sae
from pipeline.sae.stream import geometric_median
from pipeline.sae.train import Dictionary, build, train
from pipeline.spec.sae import SaeSpec, SaeTraining

SPARSITY = {
    "standard": {"l1_coefficient": 1.0},
    "gated": {"l1_coefficient": 2.0},
    "topk": {"k": 3},
    "batchtopk": {"k": 3},
    "matryoshka_batchtopk": {"k": 3, "matryoshka_shares": [0.5, 1.0]},
    "jumprelu": {"l0_coefficient": 0.3},
    "matching_pursuit": {"k": 3},
}
SPECS = {n: SaeSpec(architecture=n, d_sae=96, **more) for n, more in SPARSITY.items()}


def started(name: str, stream, n_steps: int) -> Dictionary:
    sae = build(SPECS[name], 24)
    sae.b_dec.data.copy_(geometric_median(stream.sample(2000)))
    training = SaeTraining(n_rows=n_steps * 256, batch_size=256, lr=3e-3, dead_rows=20_000)
    return Dictionary(name, sae, training, n_steps)


@pytest.fixture(scope="module")
def made():
    """Name -> trained dictionary, their stream, the true directions, and the rows."""
    x, truth = planted(20_000)
    x = x - 3
    stream, _ = stream_of(x, 256, normalize=True)
    out = {name: started(name, stream, 600) for name in SPECS}
    train(list(out.values()), stream, 600)
    return out, stream, truth, torch.from_numpy(x[:500])


@pytest.mark.workflow
@pytest.mark.parametrize("name", SPECS)
def test_each_finds_planted_directions(made, name):
    """48 true directions, 3 a row; 96 random rows have a mean best cosine of 0.6."""
    dictionary = made[0][name]
    assert mean_max_cosine(dictionary.sae.W_dec, made[2]) > 0.85
    explained_variance, l0 = dictionary.history[-1][4:6]
    assert explained_variance > 0.85
    assert 2 < l0 < 12


@pytest.mark.workflow
@pytest.mark.parametrize("name", SPECS)
def test_a_saved_folder_takes_rows_as_they_are(made, tmp_path, name):
    """The same dictionary saved for a scale of 1 answers scaled rows with the scaled answer."""
    from sae_lens import SAE

    out, stream, _, x = made
    saved = {}
    for label, scale in (("raw", stream.scale), ("scaled", 1.0)):
        folder = tmp_path / label
        folder.mkdir()
        dictionary = copy.copy(out[name])
        dictionary.sae = copy.deepcopy(out[name].sae)
        stage_sae.save(dictionary, folder, scale, {"stage": "test"})
        saved[label] = SAE.load_from_disk(str(folder))
    with torch.no_grad():
        want = saved["scaled"](x * stream.scale) / stream.scale
        got = saved["raw"](x)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    explained = 1 - (got - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    assert explained > 0.8


@pytest.mark.parametrize("name", SPECS)
def test_each_resumes_exactly(name):
    """Half a run, its tensors, and the other half in a new object, against a run in one go."""
    stream, _ = stream_of(planted(3000)[0], 256, normalize=True)
    whole, half = started(name, stream, 20), started(name, stream, 20)
    train([whole], stream, 20)
    train([half], stream, 10)
    kept = {n: t.clone() for n, t in half.tensors().items()}
    again = started(name, stream, 20)
    again.restore(kept)
    train([again], stream, 20, first=10)
    for key, value in whole.tensors().items():
        assert torch.equal(value, again.tensors()[key]), key


@pytest.mark.workflow
def test_batchtopk_is_saved_with_the_threshold_that_keeps_its_l0(made, tmp_path):
    """Without its batch a row has no top k; the threshold learned in training takes its place."""
    from sae_lens import SAE

    dictionary = copy.copy(made[0]["batchtopk"])
    dictionary.sae = copy.deepcopy(dictionary.sae)
    stage_sae.save(dictionary, tmp_path, made[1].scale, {"stage": "test"})
    loaded = SAE.load_from_disk(str(tmp_path))
    assert loaded.cfg.architecture() == "jumprelu"
    with torch.no_grad():
        l0 = loaded.encode(made[3]).bool().sum(1).float().mean().item()
    assert l0 == pytest.approx(3, rel=0.25)


@pytest.mark.workflow
def test_matryoshkas_first_level_reconstructs_more_than_a_topks_first_half(made):
    """What its nested losses are for."""

    def explained(sae, x):
        with torch.no_grad():
            acts = sae.encode(x)
            acts[:, 48:] = 0
            hat = sae.decode(acts)
        return 1 - (hat - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum()

    x = made[3] * made[1].scale
    nested = explained(made[0]["matryoshka_batchtopk"].sae, x)
    assert nested > explained(made[0]["batchtopk"].sae, x) + 0.1


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"architecture": "jumprelu"}, "jumprelu needs l0_coefficient"),
        ({"architecture": "gated"}, "gated needs l1_coefficient"),
        ({"architecture": "matching_pursuit"}, "matching_pursuit needs k"),
        ({"architecture": "topk", "k": 2, "matryoshka_shares": [0.5, 0.2, 1]}, "do not rise"),
        ({"architecture": "topk", "k": 2, "matryoshka_shares": [0.5]}, "do not rise"),
    ],
)
def test_an_architecture_without_its_setting_is_refused(given, sentence):
    with pytest.raises(ValidationError, match=sentence):
        SaeSpec(d_sae=8, **given)


def test_matryoshkas_widths_double_and_end_at_the_last_latent():
    spec = SaeSpec(architecture="matryoshka_batchtopk", k=2, d_sae=4096)
    assert spec.widths == [128, 384, 896, 1920, 4096]
    assert np.diff([0, *spec.widths]).tolist() == [128, 256, 512, 1024, 2176]
    assert build(spec, 24).cfg.matryoshka_widths == spec.widths
