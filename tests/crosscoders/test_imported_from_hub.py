"""Published transcoders and crosscoders that a hub has, as a small hub on loopback serves them."""

from pathlib import Path

import published
import pytest
from conftest import stage
from loopback_hub import COMMIT, serving

from pipeline.store import tables

CARD = b"---\nlicense: mit\n---\n"
PAIRS = [[f"blocks.{n}.mlp.hook_in", f"blocks.{n}.hook_mlp_out"] for n in range(2)]


def files_of(folder: Path, at: str) -> dict[str, bytes]:
    """A repository's files, with those of a folder at `at`, and more than is asked for."""
    found = {f"{at}/{p.name}": p.read_bytes() for p in folder.iterdir() if p.is_file()}
    return found | {"README.md": CARD, f"{at}/more/layer_0.safetensors": b"not asked for"}


@pytest.mark.workflow
@pytest.mark.parametrize("layers", ["each", "cross"])
def test_a_set_of_a_hub_is_that_of_its_folder(layers, tiny_gpt2_json, tmp_path, monkeypatch):
    make = published.transcoder_set if layers == "each" else published.clt
    folder = make(tmp_path / "set", published.layers_of(cross=layers == "cross"))
    from_folder = published.bring_layers(tiny_gpt2_json, tmp_path / "a", [folder], layers=layers)
    out = tmp_path / "b"
    job = {"name": "x", "source": "hub", "format": "circuit_tracer", "layers": layers,
           "paths": ["sets/mine"], "pairs": PAIRS, "repo": "owner/set",
           "revision": COMMIT}  # fmt: skip
    files = {"model": tiny_gpt2_json, "out": out / "manifest.json", "saes": out / "saes"}
    with serving({"owner/set": files_of(folder, "sets/mine")}, tmp_path / "hf", monkeypatch) as hub:
        stage("transcoders_import", {"import": job}, cwd=tmp_path, **files)
        asked = [a.removeprefix("owner/set/") for a in hub.asked]
    assert not any("more/" in a for a in asked) and len(asked) == len(set(asked))
    theirs, ours = (published.brought_layers(m) for m in (from_folder, out / "manifest.json"))
    assert all(a.equal(b) for a, b in zip(ours.W_dec, theirs.W_dec, strict=True))
    original = tables.read_json(out / "manifest.json")["original"]
    assert original["licence"] == "mit"
    assert original["revision"] == COMMIT


@pytest.mark.workflow
def test_a_layer_that_the_hub_lacks_is_told(tiny_gpt2_json, tmp_path, monkeypatch):
    folder = published.transcoder_set(tmp_path / "set", published.layers_of())
    (folder / "layer_1.safetensors").unlink()
    job = {"name": "x", "source": "hub", "format": "circuit_tracer", "layers": "each",
           "paths": ["set"], "pairs": PAIRS, "repo": "owner/set", "revision": COMMIT}  # fmt: skip
    files = {"out": tmp_path / "out/manifest.json", "saes": tmp_path / "out/saes"}
    with serving({"owner/set": files_of(folder, "set")}, tmp_path / "hf", monkeypatch) as hub:
        done = stage("transcoders_import", {"import": job}, cwd=tmp_path, check=False,
                     model=tiny_gpt2_json, **files)  # fmt: skip
        assert not [a for a in hub.asked if a.endswith(".safetensors")]
    assert done.returncode and "set/layer_1.safetensors: is not there" in done.stderr
    assert not files["out"].exists()


@pytest.mark.workflow
def test_a_crosscoder_of_a_hub(tiny_gpt2_json, tmp_path, monkeypatch):
    file = tmp_path / "cc/model_final.pt"
    published.crosscoder(file)
    sources = [
        {"name": hook, "hook": hook, "model": 0, "activations": "activations/manifest.json"}
        for hook in ("blocks.0.hook_resid_post", published.RESID)
    ]
    job = {"name": "x", "source": "hub", "format": "dictionary_learning", "path": "cc",
           "sources": sources, "repo": "owner/cc", "revision": COMMIT}  # fmt: skip
    files = {"out": tmp_path / "out/manifest.json", "saes": tmp_path / "out/saes"}
    with serving({"owner/cc": files_of(file.parent, "cc")}, tmp_path / "hf", monkeypatch):
        stage("crosscoder_import", {"import": job}, cwd=tmp_path, models=[tiny_gpt2_json], **files)
    original = tables.read_json(files["out"])["original"]
    assert original["repo"] == "owner/cc" and original["differs_by"] < 1e-5
