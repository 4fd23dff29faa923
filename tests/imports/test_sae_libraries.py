"""Published dictionaries against their own libraries, both ways; run by tests/libraries/run.sh."""

import json
import os
import sys
from pathlib import Path

import published
import pytest
import torch
from published import CLASSES, D, K, N
from synthetic import call

from pipeline.store import tables

LIBRARIES = os.environ.get("RETRACE_LIBRARIES")
if not LIBRARIES:
    pytest.skip("needs the libraries: tests/libraries/run.sh", allow_module_level=True)
sys.path.append(LIBRARIES)  # behind the project's own packages

IN, OUT = "blocks.{}.mlp.hook_in", "blocks.{}.hook_mlp_out"
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
X = torch.randn(64, D, generator=torch.Generator().manual_seed(3)) * 2


@pytest.fixture
def model(tiny_gpt2_json) -> Path:
    return tiny_gpt2_json


def brought_in(*args, **over):
    """Manifest and SAELens dictionary of the item that the stage makes of files."""
    manifest = published.bring(*args, **over)
    return manifest, published.brought(manifest)


def left(manifest: Path, format: str, out: Path) -> Path:
    """The folder in which the dictionary leaves again."""
    spec = {"export": {"format": format, "arm": "trained", "sae": "x", "paper": "toy"}}
    call("exports", spec, sae=manifest, out=out)
    return out


# --- dictionary_learning -------------------------------------------------------------------


def theirs_of(dict_class: str):
    """A random dictionary of a class of dictionary_learning, by its own constructor."""
    from dictionary_learning import dictionary
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    modules = [dictionary, batch_top_k, matryoshka_batch_top_k, top_k]
    cls = next(getattr(m, dict_class) for m in modules if hasattr(m, dict_class))
    more = {
        "AutoEncoderTopK": [K],
        "BatchTopKSAE": [K],
        "MatryoshkaBatchTopKSAE": [K, [10, N - 10]],
    }
    made = cls(D, N, *more.get(dict_class, []))
    made.load_state_dict(published.state_of(dict_class, published.draw()) | {
        k: v for k, v in made.state_dict().items() if k == "group_sizes"
    })  # fmt: skip
    return made


@pytest.mark.parametrize("dict_class", CLASSES)
def test_dictionary_learning_comes_in(dict_class, model, tmp_path):
    """Saved as trainSAE does, and read by the library's load_dictionary."""
    from dictionary_learning.utils import load_dictionary

    folder = published.dictionary_learning(tmp_path / "theirs", dict_class)
    torch.save(theirs_of(dict_class).state_dict(), folder / "ae.pt")
    theirs, _ = load_dictionary(str(folder), "cpu")
    _, ours = brought_in(model, tmp_path / "item", folder, "dictionary_learning")
    with torch.no_grad():
        f = theirs.encode(X)
        assert (f > 0).any()
        torch.testing.assert_close(ours.encode(X), f, **CLOSE)
        torch.testing.assert_close(ours.decode(f), theirs.decode(f), **CLOSE)


@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_dictionary_learning_reads_what_leaves(architecture, apply_b_dec, model, tmp_path):
    from dictionary_learning.utils import load_dictionary

    more = {"k": K} if architecture == "topk" else {}
    folder = published.saelens(
        tmp_path / "saelens", architecture, apply_b_dec_to_input=apply_b_dec, **more
    )
    manifest, ours = brought_in(model, tmp_path / "item", folder, "saelens")
    theirs, _ = load_dictionary(str(left(manifest, "dictionary_learning", tmp_path / "out")), "cpu")
    with torch.no_grad():
        f = ours.encode(X)
        assert (f > 0).any()
        torch.testing.assert_close(theirs.encode(X), f, **CLOSE)
        torch.testing.assert_close(theirs.decode(f), ours.decode(f), **CLOSE)


# --- sparsify ------------------------------------------------------------------------------


def dense(coder, x: torch.Tensor) -> torch.Tensor:
    """Latents [rows n] of a SparseCoder, whose encode gives the k largest alone."""
    found = coder.encode(x)
    return torch.zeros(len(x), N).scatter(1, found.top_indices, found.top_acts)


@pytest.mark.parametrize("transcode", [False, True])
def test_sparsify_comes_in(transcode, model, tmp_path):
    """Saved by SparseCoder.save_to_disk and read by load_from_disk."""
    from sparsify import SparseCoder, SparseCoderConfig

    w = published.draw()
    coder = SparseCoder(D, SparseCoderConfig(num_latents=N, k=K, transcode=transcode))
    coder.load_state_dict({"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"],
                           "W_dec": w["W_dec"], "b_dec": w["b_dec"]})  # fmt: skip
    folder = tmp_path / ("h.1.mlp" if transcode else "h.1")
    coder.save_to_disk(folder)
    at = {"hook": IN.format(1), "output_hook": OUT.format(1)} if transcode else {}
    _, ours = brought_in(model, tmp_path / "item", folder, "sparsify", **at)
    theirs = SparseCoder.load_from_disk(folder)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(X), dense(theirs, X), **CLOSE)
        torch.testing.assert_close(ours(X), theirs(X).sae_out, **CLOSE)


@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_sparsify_reads_what_leaves(apply_b_dec, model, tmp_path):
    from sparsify import SparseCoder

    folder = published.saelens(tmp_path / "s", "topk", k=K, apply_b_dec_to_input=apply_b_dec)
    manifest, ours = brought_in(model, tmp_path / "item", folder, "saelens")
    theirs = SparseCoder.load_from_disk(left(manifest, "sparsify", tmp_path / "out"))
    with torch.no_grad():
        torch.testing.assert_close(dense(theirs, X), ours.encode(X), **CLOSE)
        torch.testing.assert_close(theirs(X).sae_out, ours(X), **CLOSE)


def test_a_sparsify_transcoder_leaves_as_one(model, tmp_path):
    from sparsify import SparseCoder

    folder = published.sparsify(tmp_path / "h.1.mlp", transcode=True)
    at = {"hook": IN.format(1), "output_hook": OUT.format(1)}
    manifest, ours = brought_in(model, tmp_path / "item", folder, "sparsify", **at)
    out = left(manifest, "sparsify", tmp_path / "out")
    theirs = SparseCoder.load_from_disk(out)
    assert json.loads((out / "cfg.json").read_text())["transcode"] is True
    with torch.no_grad():
        torch.testing.assert_close(theirs(X).sae_out, ours(X), **CLOSE)


# --- circuit-tracer ------------------------------------------------------------------------


@pytest.mark.parametrize("jumps", [True, False])
def test_a_transcoder_set_comes_in_and_leaves_again(jumps, model, tmp_path):
    """Two layers saved by TranscoderSet.to_safetensors, brought in, exported and read as a set."""
    from circuit_tracer.transcoder.activation_functions import JumpReLU
    from circuit_tracer.transcoder.single_layer_transcoder import (
        SingleLayerTranscoder,
        TranscoderSet,
        load_transcoder_set,
    )

    layers = {}
    for layer in range(2):
        w = published.draw(layer)
        act = JumpReLU(w["threshold"], 0.1) if jumps else torch.nn.functional.relu
        layers[layer] = SingleLayerTranscoder(D, N, act, layer, dtype=torch.float32)
        state = {"W_enc": w["W_enc"].T, **{k: w[k] for k in ("W_dec", "b_enc", "b_dec")}}
        state |= {"activation_function.threshold": w["threshold"]} if jumps else {}
        layers[layer].load_state_dict(state)
    theirs = TranscoderSet(layers, "mlp.hook_in", "hook_mlp_out", scan="tiny")
    theirs.to_safetensors(str(tmp_path / "set"))
    paths, ours = {}, {}
    for layer in range(2):
        at = {"hook": IN.format(layer), "output_hook": OUT.format(layer)}
        manifest, ours[layer] = brought_in(
            model, tmp_path / f"item{layer}", tmp_path / "set" / f"layer_{layer}.safetensors",
            "circuit_tracer", **at,
        )  # fmt: skip
        out = left(manifest, "circuit_tracer", tmp_path / f"out{layer}")
        paths[layer] = str(out / f"layer_{layer}.safetensors")
    again = load_transcoder_set(
        paths, "tiny", "mlp.hook_in", "hook_mlp_out", torch.device("cpu"), torch.float32
    )
    with torch.no_grad():
        f = theirs.encode(torch.stack([X, X]))
        torch.testing.assert_close(again.encode(torch.stack([X, X])), f, **CLOSE)
        for layer in range(2):
            torch.testing.assert_close(ours[layer].encode(X), f[layer], **CLOSE)
            torch.testing.assert_close(ours[layer](X), theirs[layer](X), **CLOSE)
            torch.testing.assert_close(again[layer](X), theirs[layer](X), **CLOSE)
    assert tables.read_json(tmp_path / "item1/manifest.json")["original"]["files"]


# --- sets whose layers are of other kinds ---------------------------------------------------


def test_a_skip_transcoder_of_before_transcode_was_a_key(model, tmp_path):
    """EleutherAI/skip-transcoder-Llama-3.2-1B-131k: the library takes b_dec off x."""
    from sparsify import SparseCoder

    about = {"expansion_factor": 32, "normalize_decoder": True, "num_latents": N, "k": K,
             "multi_topk": False, "skip_connection": True, "d_in": D}  # fmt: skip
    folders = []
    for layer in range(2):
        skip = {"W_skip": 0.3 * torch.randn(D, D, generator=torch.Generator().manual_seed(layer))}
        folders.append(published.sparsify(tmp_path / f"layers.{layer}.mlp",
                                          published.draw(layer) | skip))  # fmt: skip
        (folders[-1] / "cfg.json").write_text(json.dumps(about))
    manifest = published.bring_layers(model, tmp_path / "item", folders, "sparsify")
    ours = published.brought_layers(manifest).forward(torch.stack([X, X], 1))
    for layer, folder in enumerate(folders):
        with torch.no_grad():
            y = SparseCoder.load_from_disk(folder)(X).sae_out
        torch.testing.assert_close(ours[:, layer], y, rtol=1e-5, atol=1e-5 * float(y.abs().max()))


@pytest.mark.parametrize("kind", ["gemma-scope", "gemma-scope-2"])
def test_a_list_of_gemma_scopes_transcoders(kind, model, tmp_path):
    """config.yaml lists their files; circuit-tracer reads the same ones."""
    from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set

    names = {"gemma-scope": "params.npz", "gemma-scope-2": "params.safetensors"}
    make = {"gemma-scope": published.gemma_scope, "gemma-scope-2": published.gemma_scope_2}[kind]
    entries = [f"l{layer}/{names[kind]}" for layer in range(2)]
    for layer in range(2):
        make(tmp_path / f"set/l{layer}", published.draw(layer))
    folder = published.about_set(tmp_path / "set", "transcoder_set", transcoders=entries)
    manifest = published.bring_layers(model, tmp_path / "item", [folder])
    theirs = load_transcoder_set(
        {n: str(folder / entry) for n, entry in enumerate(entries)}, "tiny", "mlp.hook_in",
        "hook_mlp_out", torch.device("cpu"), torch.float32, kind,
        lazy_encoder=False, lazy_decoder=False,
    )  # fmt: skip
    ours, x = published.brought_layers(manifest), torch.stack([X, X])
    with torch.no_grad():
        f = theirs.encode(x)
        assert (f > 0).any() and (f == 0).any()
        for layer in range(2):
            torch.testing.assert_close(ours.encode(layer, X), f[layer], **CLOSE)
        y = theirs.decode(f, x).transpose(0, 1)
        torch.testing.assert_close(ours.forward(x.transpose(0, 1)), y, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("skip", [False, True])
def test_a_cross_layer_transcoder_of_gemma_scope_2(skip, model, tmp_path, monkeypatch):
    """circuit-tracer 0.5.0 leaves the last layer out (range(max(paths))), so that it is given one
    more path than there are layers."""
    from circuit_tracer.transcoder.cross_layer_transcoder import load_gemma_scope_2_clt

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "crosscoders"))
    from test_gemma_scope_2 import written

    folder = written(tmp_path / "clt", "clt", skip=skip)
    manifest = published.bring_layers(
        model, tmp_path / "item", [folder], "gemma_scope_2", layers="cross"
    )
    paths = {n: str(folder / f"params_layer_{n}.safetensors") for n in range(3)}
    theirs = load_gemma_scope_2_clt(
        paths, "mlp.hook_in", "hook_mlp_out", "tiny", torch.device("cpu"), torch.float32
    )
    ours, x = published.brought_layers(manifest), torch.stack([X, X])
    with torch.no_grad():
        f = theirs.encode(x)
        assert (f > 0).any() and (f == 0).any()
        y = theirs.decode(f, x).transpose(0, 1)
        torch.testing.assert_close(ours.forward(x.transpose(0, 1)), y, rtol=1e-5, atol=1e-4)
