"""Dictionaries in other libraries' layouts, brought in again; with the libraries themselves:
tests/libraries/run.sh."""

import json
from pathlib import Path

import published
import pytest
import torch
from published import CODER, IN, OUT, D, K, bring, brought
from synthetic import call

from pipeline.store import provenance, tables

X = torch.randn(64, D, generator=torch.Generator().manual_seed(3)) * 2


def leave(manifest: Path, layout: str, out: Path) -> Path:
    spec = {"export": {"format": layout, "arm": "trained", "sae": "x", "paper": "toy"}}
    call("exports", spec, sae=manifest, out=out)
    return out


def again(model: Path, out: Path, path: Path, layout: str, **over):
    """The dictionary that an export gives when it is brought in; it names the same hook."""
    return brought(bring(model, out, path, layout, **over))


@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize(
    ("architecture", "layout"),
    [("standard", "dictionary_learning"), ("jumprelu", "dictionary_learning"),
     ("gated", "dictionary_learning"), ("topk", "dictionary_learning"), ("topk", "sparsify")],
)  # fmt: skip
def test_an_autoencoder_leaves_and_comes_back(
    architecture, layout, apply_b_dec, tiny_gpt2_json, tmp_path
):
    """Whichever way the library's class has b_dec, f and x_hat are the same."""
    more = {"k": K} if architecture == "topk" else {}
    folder = published.saelens(
        tmp_path / "s", architecture, apply_b_dec_to_input=apply_b_dec, **more
    )
    manifest = bring(tiny_gpt2_json, tmp_path / "first", folder, "saelens")
    out = leave(manifest, layout, tmp_path / "out")
    ours, other = brought(manifest), again(tiny_gpt2_json, tmp_path / "second", out, layout)
    f = ours.encode(X)
    assert (f > 0).any()
    torch.testing.assert_close(other.encode(X), f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other.decode(f), ours.decode(f), rtol=1e-5, atol=1e-5)
    assert other.cfg.apply_b_dec_to_input == (architecture in ("topk", "gated"))
    made = tables.read_json(out / "provenance.json")
    assert set(made["files"]) == {f.name for f in out.iterdir()} - {"provenance.json"}
    assert made["files"] == {n: provenance.sha256_file(out / n) for n in made["files"]}


@pytest.mark.parametrize("jumps", [True, False])
def test_a_transcoder_leaves_as_a_layer_of_a_set(jumps, tiny_gpt2_json, tmp_path):
    w = {k: v for k, v in published.draw().items() if jumps or k != "threshold"}
    file = published.circuit_tracer(tmp_path / "layer_1.safetensors", w)
    manifest = bring(tiny_gpt2_json, tmp_path / "first", file, "circuit_tracer", **CODER)
    out = leave(manifest, "circuit_tracer", tmp_path / "out")
    assert sorted(f.name for f in out.iterdir()) == [
        "config.yaml", "layer_1.safetensors", "provenance.json"
    ]  # fmt: skip
    other = again(tiny_gpt2_json, tmp_path / "second", out / file.name, "circuit_tracer", **CODER)
    torch.testing.assert_close(other.encode(X), brought(manifest).encode(X))
    torch.testing.assert_close(other(X), brought(manifest)(X))


def test_a_topk_transcoder_leaves_to_sparsify(tiny_gpt2_json, tmp_path):
    folder = published.sparsify(tmp_path / "h.1.mlp", transcode=True)
    manifest = bring(tiny_gpt2_json, tmp_path / "first", folder, "sparsify", **CODER)
    out = leave(manifest, "sparsify", tmp_path / "layers.1.mlp")
    assert json.loads((out / "cfg.json").read_text())["transcode"] is True
    other = again(tiny_gpt2_json, tmp_path / "second", out, "sparsify", **CODER)
    torch.testing.assert_close(other(X), brought(manifest)(X))


@pytest.mark.parametrize(
    ("architecture", "layout", "sentence"),
    [("jumprelu", "sparsify", "sparsify has no layout for jumprelu; it has one for topk"),
     ("transcoder", "dictionary_learning", "dictionary_learning has no layout for transcoder"),
     ("standard", "circuit_tracer", "it has one for transcoder, jumprelu_transcoder")],
)  # fmt: skip
def test_what_a_library_cannot_hold_is_refused(
    architecture, layout, sentence, tiny_gpt2_json, tmp_path, capsys
):
    coder = architecture == "transcoder"
    meta = {"hook_name": IN, "hook_name_out": OUT} if coder else {}
    folder = published.saelens(tmp_path / "s", architecture, meta=meta)
    at = CODER if coder else {}
    manifest = bring(tiny_gpt2_json, tmp_path / "first", folder, "saelens", **at)
    with pytest.raises(SystemExit):
        leave(manifest, layout, tmp_path / "out")
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_dictionary_learning_has_no_transcoder(tiny_gpt2_json, tmp_path, capsys):
    """Its TopK class would hold the numbers, and its readers would take y for x."""
    folder = published.sparsify(tmp_path / "h.1.mlp", transcode=True)
    manifest = bring(tiny_gpt2_json, tmp_path / "first", folder, "sparsify", **CODER)
    with pytest.raises(SystemExit):
        leave(manifest, "dictionary_learning", tmp_path / "out")
    assert "has no layout for a transcoder" in capsys.readouterr().err


@pytest.mark.parametrize("hook", ["hook_name", "hook_name_bridge"])
def test_saelens_store_reads_where_an_import_does(hook, tiny_gpt2_json, tmp_path):
    """`ActivationsStore.from_sae` takes hook, context and BOS from the exported folder."""
    from datasets import Dataset
    from sae_lens import SAE, ActivationsStore

    from pipeline.models import hooks, loader

    at = tmp_path / "gemma-scope-2b-pt-res/layer_1/width_16k/average_l0_5"
    manifest = bring(tiny_gpt2_json, tmp_path / "first", published.gemma_scope(at), "gemma_scope")
    spec = {"export": {"format": "saelens", "arm": "trained", "sae": "x", "paper": "toy"}}
    call("exports", spec, sae=manifest, model=tiny_gpt2_json, out=tmp_path / "out")
    sae = SAE.load_from_disk(tmp_path / "out")
    sae.cfg.metadata.hook_name = sae.cfg.metadata[hook]
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, 260, (4, 64), generator=draw)
    tokens[:, 0] = 0
    store = ActivationsStore.from_sae(
        loader.bridge(tiny_gpt2_json), sae, Dataset.from_dict({"tokens": tokens.tolist()}),
        store_batch_size_prompts=4,
    )  # fmt: skip
    found = store.get_activations(store.get_batch_tokens())
    hf = loader.load(tiny_gpt2_json).hf
    with torch.no_grad(), hooks.capture(hf, [published.RESID]) as seen:
        hf(tokens)
    rows = seen[published.RESID]
    torch.testing.assert_close(found.reshape(rows.shape), rows, rtol=1e-4, atol=1e-4)
    size = float(rows.abs().max())
    torch.testing.assert_close(sae.encode(found.reshape(-1, D)),
                               brought(manifest).encode(rows.reshape(-1, D)),
                               rtol=1e-4, atol=1e-4 * size)  # fmt: skip


def test_a_published_dictionary_leaves_as_saelens_reads_it(tiny_gpt2_json, tmp_path):
    """With a card, and the publisher's files in its certificate."""
    from sae_lens import SAE

    folder = published.sparsify(tmp_path / "layers.1")
    manifest = bring(tiny_gpt2_json, tmp_path / "first", folder, "sparsify")
    spec = {"export": {"format": "saelens", "arm": "trained", "sae": "x", "paper": "toy"}}
    call("exports", spec, sae=manifest, model=tiny_gpt2_json, out=tmp_path / "out")
    other = SAE.load_from_disk(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(other(X), brought(manifest)(X))
    meta = other.cfg.metadata  # which SAELens drops of a folder of before 6.0
    assert (meta.hook_name, meta.context_size, meta.prepend_bos) == (published.RESID, 64, True)
    said = provenance.read(tmp_path / "out/sae_weights.safetensors")["source"]
    assert said["files"]["sae.safetensors"] == provenance.sha256_file(folder / "sae.safetensors")
