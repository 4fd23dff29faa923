"""Weights of somebody else's, damaged at random; see test_fuzz.py.

Sealed files are changed and sealed again, as somebody who means it would; others lose bytes.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_fuzz import SIZES, changed, damaged, some, try_all, try_apart

from pipeline.errors import RetraceError
from pipeline.models import loader, native
from pipeline.sharing import exports, matching
from pipeline.spec import training
from pipeline.store import checkpoints, tables
from pipeline.weights import gguf_llama, model, trained


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A Llama of one layer, in two shards with an index."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("small")
    sizes = {"vocab_size": 8, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder, max_shard_size=500)
    assert (folder / model.INDEX).is_file()
    return folder


@pytest.mark.parametrize("n", [pytest.param(40, id="40"), SIZES[1]])
def test_models_in_a_folder(small, tmp_path, n):
    """config.json, the index, the shards."""
    folder = Path(shutil.copytree(small, tmp_path / "m"))
    files = {p.name: p.read_bytes() for p in sorted(folder.iterdir())}

    def once(rng):
        name = list(files)[rng.integers(len(files))]
        content = files[name]
        if name.endswith(".json") and rng.random() < 0.7:
            content = json.dumps(changed(json.loads(content), rng)).encode()
        else:
            content = damaged(content, rng)
        (folder / name).write_bytes(content)
        try:
            loader.from_folder(folder, torch.float32)
        finally:
            (folder / name).write_bytes(files[name])

    try_apart(n, once)


@pytest.mark.parametrize("n", SIZES)
def test_models_trained_here(tmp_path, n):
    sizes = {"n_layers": 1, "d_model": 4, "n_heads": 2, "d_mlp": 4, "n_ctx": 4}
    shape = training.Architecture(**sizes).model_dump()
    made = native.NativeForCausalLM(shape | {"d_vocab": 5})
    made.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    weights = (tmp_path / "model.safetensors").read_bytes()

    def once(rng):
        (tmp_path / "config.json").write_bytes(some(rng, config))
        broken = rng.random() < 0.3
        (tmp_path / "model.safetensors").write_bytes(damaged(weights, rng) if broken else weights)
        model.check_config(tmp_path / "config.json", "it")
        loader.from_folder(tmp_path, torch.float32)

    try_apart(n, once)


DICTIONARY = {
    "architecture": "topk", "d_in": 4, "d_sae": 8, "k": 2, "dtype": "float32",
    "apply_b_dec_to_input": True, "normalize_activations": "none",
    "metadata": {"model_name": "m", "hook_name": "h", "hook_name_bridge": "h", "prepend_bos": True,
                 "context_size": 16, "dataset_path": "d", "seqpos_slice": [1, None]},
}  # fmt: skip


@pytest.mark.parametrize("n", SIZES)
def test_dictionaries(tmp_path, n):
    """manifest.json of an SAE job, cfg.json and the weights, read by an export and `compare`."""
    (tmp_path / "topk").mkdir()
    file = tmp_path / "topk/sae_weights.safetensors"
    shapes = {"W_enc": (4, 8), "W_dec": (8, 4), "b_enc": (8,), "b_dec": (4,)}
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, file)
    weights = file.read_bytes()

    def once(rng):
        manifest = {"saes": {"topk": {"folder": "topk"}}, "hook": "h"}
        (tmp_path / "manifest.json").write_text(
            json.dumps(changed(manifest, rng) if rng.random() < 0.3 else manifest)
        )
        (tmp_path / "topk/cfg.json").write_bytes(some(rng, DICTIONARY))
        file.write_bytes(damaged(weights, rng) if rng.random() < 0.3 else weights)
        matching.decoder(tmp_path / "topk")
        exports.dictionary(tmp_path / "manifest.json", "topk")

    try_all(n, once)


class Thing:
    name = "a"

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"w": torch.ones(3)}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        assert torch.equal(state["w"], torch.ones(3))


@pytest.mark.parametrize("n", SIZES)
def test_checkpoints(tmp_path, n):
    """A damaged checkpoint is never used, and never in the way."""
    kept = checkpoints.Checkpoints(tmp_path, "key")
    kept.save(5, [Thing()])
    folder = tmp_path / "step-000000005"
    note, weights = ((folder / f).read_bytes() for f in ("checkpoint.json", "a.safetensors"))
    whole = json.loads(note)

    def once(rng):
        resealed = rng.random() < 0.5
        if resealed:
            data = changed({k: v for k, v in whole.items() if k != "provenance"}, rng)
            tables.write_json(folder / "checkpoint.json", dict(data or {}), {"key": "key"})
        else:
            (folder / "checkpoint.json").write_bytes(damaged(note, rng))
        broken = rng.random() < 0.3
        (folder / "a.safetensors").write_bytes(damaged(weights, rng) if broken else weights)
        if kept.load([Thing()]) == 0:
            raise RetraceError("not used")

    try_all(n, once)


@pytest.mark.parametrize("n", SIZES)
def test_ggufs(tmp_path, n):
    """The metadata and the tensors of a package's GGUF file."""
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "whole.gguf", "llama")
    writer.add_embedding_length(4)
    writer.add_head_count(2)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "ab"])
    writer.add_tensor("token_embd.weight", np.zeros((3, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole = (tmp_path / "whole.gguf").read_bytes()

    def once(rng):
        (tmp_path / "a.gguf").write_bytes(damaged(whole, rng))
        gguf_llama.read(tmp_path / "a.gguf")

    try_apart(n, once)


@pytest.mark.parametrize("n", SIZES)
def test_runs_of_a_training(tmp_path, n):
    architecture = {"n_layers": 1, "d_model": 4, "n_heads": 2, "n_ctx": 4}
    about = {"architecture": architecture, "steps": 2, "batch_size": 2,
             "optimiser": {"lr": 0.1}, "data": {"source": "corpus"}}  # fmt: skip
    members = [{"name": "a", "arm": "trained", "seed": 0}]
    whole = {"training": about, "members": members, "steps": [0, 2], "d_vocab": 5}

    def once(rng):
        tables.write_json(tmp_path / "manifest.json", dict(changed(whole, rng) or {}), {})
        run = trained.open_run(tmp_path / "manifest.json")
        assert [(run.arm(m), run.seed(m)) for m in run.members]

    try_all(n, once)
