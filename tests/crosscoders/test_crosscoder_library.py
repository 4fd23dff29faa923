"""Crosscoders against the library of Minder et al. (2025): tests/libraries/crosscoders.sh."""

import importlib
import os
import sys
import types
from pathlib import Path

import published
import pytest
import torch
from published import D
from synthetic import call
from test_crosscoders import HOOK, SPARSITY, job, paths, rows_of_two, stored, two  # noqa: F401

CODE = os.environ.get("RETRACE_CROSSCODERS")
if not CODE:
    pytest.skip("needs the library: tests/libraries/crosscoders.sh", allow_module_level=True)

CLASSES = {"standard": "CrossCoder", "batchtopk": "BatchTopKCrossCoder"}


@pytest.fixture(scope="module")
def theirs():
    """dictionary.py of the library; the rest of its package needs nnsight, and is left out."""
    package = types.ModuleType("dictionary_learning")
    package.__path__ = [str(Path(CODE) / "dictionary_learning")]
    sys.modules["dictionary_learning"] = package
    sys.path.append(os.environ["RETRACE_LIBRARIES"])
    return importlib.import_module("dictionary_learning.dictionary")


@pytest.mark.parametrize("name", SPARSITY)
def test_its_reader_gives_the_same_activations(two, theirs, tmp_path, name):  # noqa: F811
    """On the same rows of both models: latents, reconstructions and relative decoder norms."""
    from sae_lens import SAE

    export = {"format": "crosscoder", "arm": "a", "sae": name, "paper": "p"}
    call("exports", {"export": export}, sae=two[0] / "manifest.json", out=tmp_path / "out")
    read = getattr(theirs, CLASSES[name]).from_pretrained(str(tmp_path / "out/model_final.pt"))
    x = torch.stack([torch.from_numpy(a[:500]) for a in rows_of_two(5000)], 1)
    ours = SAE.load_from_disk(str(two[0] / "saes" / name))
    with torch.no_grad():
        f = ours.encode(x.flatten(1))
        assert (f > 0).any() and (f == 0).any()
        torch.testing.assert_close(read.encode(x), f, rtol=1e-4, atol=1e-3)
        x_hat = read(x)
        torch.testing.assert_close(x_hat.flatten(1), ours(x.flatten(1)), rtol=1e-4, atol=1e-3)
        weighed = read.get_activations(x)
        if name == "batchtopk":
            torch.testing.assert_close(weighed, f, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["CrossCoder", "BatchTopKCrossCoder"])
@pytest.mark.parametrize("code", ["CROSSCODER", "SAE", "NONE"])
def test_what_it_wrote_comes_in_as_its_own_reader_reads_it(
    theirs, tiny_gpt2_json, tmp_path, name, code
):
    """A crosscoder of its own class, with a normalizer, saved as its trainers save one."""
    torch.manual_seed(0)
    mean, std = torch.randn(2, D), torch.rand(2, D) + 0.5
    made = getattr(theirs, name)(
        D, 40, 2, code_normalization=code, activation_mean=mean, activation_std=std
    )
    if name == "BatchTopKCrossCoder":
        made.threshold.fill_(0.5)
    (tmp_path / "theirs").mkdir()
    torch.save(made.state_dict(), tmp_path / "theirs/model_final.pt")
    read = getattr(theirs, name).from_pretrained(str(tmp_path / "theirs/model_final.pt"))
    ours = published.brought(
        published.bring_crosscoder([tiny_gpt2_json], tmp_path / "item", tmp_path / "theirs")
    )
    x = 3 * torch.randn(60, 2, D)
    with torch.no_grad():
        f = read.encode(x)
        assert (f > 0).any() and (f == 0).any()
        torch.testing.assert_close(ours.encode(x.flatten(1)), f, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours(x.flatten(1)), read(x).flatten(1), rtol=1e-5, atol=1e-4)
