"""Published crosscoders: the same as their library's formula, refused where they cannot be."""

import pickle
from pathlib import Path

import published
import pytest
import torch
from published import D, K, N, bring_crosscoder, brought
from synthetic import call

from pipeline.crosscoders import crosscoder_import
from pipeline.store import provenance, tables

X = 3 * torch.randn(60, 2, D, generator=torch.Generator().manual_seed(1))
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def features(state: dict, x: torch.Tensor) -> torch.Tensor:
    """As the library writes it: normalise, sum over sources, ReLU, hold against the threshold."""
    z = x
    if not state["activation_mean"].isnan().any():
        z = (x - state["activation_mean"]) * state["activation_global_scale"][:, None]
    f = torch.einsum("bld,ldf->bf", z, state["encoder.weight"]) + state["encoder.bias"]
    f = f.relu()
    if "threshold" in state:
        W = state["decoder.weight"]
        weighs = {1: W.norm(dim=2).sum(0), 2: W.norm(dim=(0, 2)), 4: torch.ones(N)}
        f = f * (f * weighs[int(state["code_normalization_id"])] > state["threshold"])
    return f


def rows(state: dict, f: torch.Tensor) -> torch.Tensor:
    z = torch.einsum("bf,lfd->bld", f, state["decoder.weight"]) + state["decoder.bias"]
    if state["activation_mean"].isnan().any():
        return z
    return z / state["activation_global_scale"][:, None] + state["activation_mean"]


@pytest.mark.parametrize("name", ["model_final.pt", "model.safetensors"])
@pytest.mark.parametrize(
    ("jumps", "code", "normalizer", "over"),
    [(False, 1, True, 0), (False, 5, False, 0), (True, 1, True, 6.0), (True, 2, True, 4.0),
     (True, 4, False, 2.0), (True, 1, False, -1.0)],
)  # fmt: skip
def test_a_crosscoder(jumps, code, normalizer, over, name, tiny_gpt2_json, tmp_path):
    file = tmp_path / "theirs" / name
    state = published.crosscoder(file, jumps, code, normalizer, over=over)
    path = file if file.suffix != ".pt" else file.parent
    manifest = bring_crosscoder([tiny_gpt2_json], tmp_path / "item", path)
    ours, f = brought(manifest), features(state, X)
    assert (f == 0).any() and (f > 0).any()
    torch.testing.assert_close(ours.encode(X.flatten(1)), f, **CLOSE)
    torch.testing.assert_close(ours(X.flatten(1)).unflatten(1, (2, D)), rows(state, f), **CLOSE)
    stored = tables.read_json(manifest)
    scales = [s["scale"] for s in stored["sources"]]
    assert scales == pytest.approx(state["activation_global_scale"].tolist())
    assert stored["saes"]["x"]["spec"] == {
        "architecture": "batchtopk" if jumps else "standard", "d_sae": N, "k": K * jumps
    }  # fmt: skip
    assert bool(stored["original"]["notes"]) == (over < 0)


def test_evaluation_judges_it_source_by_source(tiny_gpt2_json, tiny_text, tmp_path):
    at = {"model": tiny_gpt2_json, "corpus": tmp_path / "tokens.parquet"}
    section = {"source": "local", "path": str(tiny_text), "label_field": "label", "n_ctx": 32,
               "n_tokens": 1600, "n_eval_tokens": 640}  # fmt: skip
    call("corpus", {"corpus": section}, tokenizer=at["model"], out=at["corpus"],
         documents=tmp_path / "documents.parquet")  # fmt: skip
    hooks = ["blocks.0.hook_resid_post", published.RESID]
    stored = tmp_path / "manifest.json"
    call("activations", {"activations": {"hooks": hooks, "dtype": "float32"}}, **at, device="cpu",
         out=stored, shards=tmp_path / "shards")  # fmt: skip
    state = published.crosscoder(tmp_path / "theirs/model_final.pt")
    sources = [
        {"name": h, "hook": h, "model": 0, "activations": provenance.name_of(stored)} for h in hooks
    ]
    manifest = bring_crosscoder(
        [at["model"]], tmp_path / "item", tmp_path / "theirs", sources=sources
    )
    out = {"out": tmp_path / "t.parquet", "latents": tmp_path / "l.parquet"}
    call("crosscoder_evaluation", {}, activations=stored, saes=manifest, device="cpu", **out)
    table = tables.read_table(out["out"])
    assert list(table["source"]) == hooks and table["dead_share"].isna().all()
    latents = tables.read_table(out["latents"])
    norms = state["decoder.weight"].norm(dim=2)  # of scaled rows: as its own library has them
    for i, hook in enumerate(hooks):
        found = latents[latents["source"] == hook]["norm"].to_numpy()
        torch.testing.assert_close(torch.tensor(found).float(), norms[i], rtol=1e-4, atol=1e-4)


@pytest.fixture
def no_pass(monkeypatch):
    """No module of the model may run."""
    from transformers import GPT2LMHeadModel

    def ran(*_, **__):
        raise AssertionError("a forward pass")

    monkeypatch.setattr(GPT2LMHeadModel, "forward", ran)


def changed(file: Path, **tensors) -> Path:
    """The file, with tensors changed or, where None, left out; __ stands for a dot."""
    named = {k.replace("__", "."): t for k, t in tensors.items()}
    found = torch.load(file, weights_only=True) | named
    torch.save({k: t for k, t in found.items() if t is not None}, file)
    return file


def made(at: Path, **how) -> Path:
    published.crosscoder(at / "model_final.pt", **how)
    return at / "model_final.pt"


def cut(file: Path) -> Path:
    file.write_bytes(file.read_bytes()[:2000])
    return file


def pickled(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pickle.dumps({"encoder.weight": Path("any")}))
    return file


BAD = {  # what is wrong -> the file, the sentence
    "not there": (lambda at: at / "model_final.pt", "model_final.pt: is not there"),
    "cut": (lambda at: cut(made(at)), "cannot be read"),
    "a pickle": (lambda at: pickled(at / "model_final.pt"), "would run pickled code"),
    "three sources": (lambda at: made(at, n=3), "has 3 sources, and hooks and models name 2"),
    "another width": (lambda at: made(at, d=8), "reads rows of 8, and blocks.0.hook_resid_post of"),
    "a dictionary of one source": (
        lambda at: published.dictionary_learning(at) / "ae.pt",
        "of format dictionary_learning, but b_dec, decoder.weight",
    ),
    "no decoder": (lambda at: changed(made(at), decoder__weight=None),
                   "holds no tensor 'decoder.weight' (a decoder)"),
    "a bias that does not fit": (lambda at: changed(made(at), encoder__bias=torch.ones(3)),
                                 "encoder.bias (3,), and not (2, 16) and (40,)"),
    "a tensor without a place": (lambda at: changed(made(at), more=torch.ones(3)), "holds 'more'"),
    "a threshold of each source": (lambda at: made(at, code=5), "code normalization DECOUPLED"),
    "a normalizer of one": (
        lambda at: changed(made(at), activation_global_scale=torch.ones(1)), "scales (1,) for 2",
    ),
    "two code normalizations": (lambda at: made(at, trainer={"code_normalization": "SAE"}),
                                "code normalization is CROSSCODER and SAE"),
    "nothing fires": (lambda at: changed(made(at), encoder__bias=torch.full((N,), -1e9)),
                      "no latent fires on any row"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    what, tiny_gpt2_json, tmp_path, no_pass, capsys
):
    make, sentence = BAD[what]
    file = make(tmp_path / "theirs")
    with pytest.raises(SystemExit):
        bring_crosscoder([tiny_gpt2_json], tmp_path / "item", file)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(told) == 1 and "full trace" not in told[0], told
    assert sentence in told[0]
    assert not (tmp_path / "item/manifest.json").exists()
    assert not (tmp_path / "item/saes").exists()


@pytest.mark.parametrize("part", ["W_enc", "W_dec", "b_enc", "b_dec", "threshold"])
def test_a_weight_a_little_off_is_not_brought_in(part, tiny_gpt2_json, tmp_path, monkeypatch):
    before = crosscoder_import.write

    def write(original, *rest):
        tensor = original.weights[part] = original.weights[part].clone()
        tensor.view(-1)[tensor.abs().argmax()] *= 1.1 if part != "threshold" else 1e3
        before(original, *rest)

    monkeypatch.setattr(crosscoder_import, "write", write)
    with pytest.raises(SystemExit):
        bring_crosscoder([tiny_gpt2_json], tmp_path / "item", made(tmp_path / "theirs"))
    assert not (tmp_path / "item/manifest.json").exists()
