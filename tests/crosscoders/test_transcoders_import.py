"""Published transcoders of all layers: the same as their formulas, refused where they cannot be."""

import pickle
from pathlib import Path

import numpy as np
import published
import pytest
import torch
from published import D, K, N, bring_layers, brought_layers, layers_of
from safetensors.torch import load_file, save_file
from synthetic import call

from pipeline.crosscoders import layered_files, transcoders_import
from pipeline.store import tables

X = 3 * torch.randn(50, 2, D, generator=torch.Generator().manual_seed(3))
CLOSE = {"rtol": 1e-5, "atol": 1e-4}
COMMIT = "a" * 40


@pytest.fixture
def model(tiny_gpt2_json) -> Path:
    return tiny_gpt2_json


def features(w: dict, x: torch.Tensor, act: str) -> torch.Tensor:
    """circuit-tracer's activations: JumpReLU and TopK without a ReLU."""
    h = x @ w["W_enc"].T + w["b_enc"]
    if act == "relu":
        return h.relu()
    if act == "jumprelu":
        return h * (h > w["threshold"])
    best = h.topk(K, dim=-1)
    return torch.zeros_like(h).scatter(-1, best.indices, best.values)


def said(found: list[dict], act: str, cross: bool) -> torch.Tensor:
    """What a set reconstructs of X, layer after layer."""
    y = [w["b_dec"].expand(len(X), -1) for w in found]
    for n, w in enumerate(found):
        f = features(w, X[:, n], act)
        for m in range(n, len(found) if cross else n + 1):
            y[m] = y[m] + f @ (w["W_dec"][:, m - n] if cross else w["W_dec"])
        if "W_skip" in w:
            y[n] = y[n] + X[:, n] @ w["W_skip"].T
    return torch.stack(y, 1)


def less(found: list[dict], name: str) -> list[dict]:
    return [{k: t for k, t in w.items() if k != name} for w in found]


# --- the same as the formulas --------------------------------------------------------------


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("act", ["relu", "jumprelu", "topk"])
def test_a_set_of_transcoders(act, skip, model, tmp_path):
    found = layers_of(skip=skip)
    found = found if act == "jumprelu" else less(found, "threshold")
    config = {"activation": "topk", "k": K} if act == "topk" else {}
    folder = published.transcoder_set(tmp_path / "set", found, **config)
    manifest = bring_layers(model, tmp_path / "item", [folder])
    ours = brought_layers(manifest)
    assert (ours.activation, ours.layers, ours.k) == (act, "each", K * (act == "topk"))
    torch.testing.assert_close(ours.forward(X), said(found, act, False), **CLOSE)
    entry = tables.read_json(manifest)["saes"]["x"]["spec"]
    assert entry == {"layers": "each", "architecture": act, "k": ours.k, "d_sae": N, "skip": skip}


@pytest.mark.parametrize("act", ["relu", "jumprelu"])
def test_a_cross_layer_transcoder(act, model, tmp_path):
    found = layers_of(cross=True)
    found = found if act == "jumprelu" else less(found, "threshold")
    folder = published.clt(tmp_path / "clt", found)
    manifest = bring_layers(model, tmp_path / "item", [folder], layers="cross")
    ours = brought_layers(manifest)
    assert (ours.activation, ours.layers) == (act, "cross")
    torch.testing.assert_close(ours.forward(X), said(found, act, True), **CLOSE)
    stored = tables.read_json(manifest)
    assert stored["original"]["differs_by"] < 1e-5 and stored["d_in"] == D
    assert set(stored["original"]["files"]) == {f.name for f in folder.iterdir()}
    assert not list((tmp_path / "item").glob("*.partial"))


def test_features_below_zero_stay(model, tmp_path):
    """Few features, so that TopK takes negative ones, and thresholds below 0."""
    found = [w | {"b_enc": w["b_enc"] - 8} for w in less(layers_of(), "threshold")]
    folder = published.transcoder_set(tmp_path / "k", found, activation="topk", k=N // 2)
    ours = brought_layers(bring_layers(model, tmp_path / "a", [folder]))
    assert ours.signed and (ours.encode(0, X[:, 0]) < 0).any()
    negative = [w | {"threshold": -w["threshold"]} for w in layers_of(cross=True)]
    folder = published.clt(tmp_path / "j", negative)
    ours = brought_layers(bring_layers(model, tmp_path / "b", [folder], layers="cross"))
    assert ours.signed and (ours.encode(1, X[:, 1]) < 0).any()
    torch.testing.assert_close(ours.forward(X), said(negative, "jumprelu", True), **CLOSE)


def one_of_saelens(folder: Path, number: int, skip: bool) -> Path:
    meta = {"hook_name": f"blocks.{number}.mlp.hook_in",
            "hook_name_out": f"blocks.{number}.hook_mlp_out"}  # fmt: skip
    w = published.draw(number)
    kind = "jumprelu_skip_transcoder" if skip else "jumprelu_transcoder"
    return published.saelens(folder, kind, w, meta=meta)


def test_folders_of_saelens_with_a_skip_connection(model, tmp_path):
    """Equal to SAELens's own forward, which adds W_skip; its decode leaves it out."""
    from sae_lens import SAE

    paths = [one_of_saelens(tmp_path / f"l{n}", n, True) for n in range(2)]
    ours = brought_layers(bring_layers(model, tmp_path / "item", paths, "saelens"))
    with torch.no_grad():
        theirs = torch.stack([SAE.load_from_disk(p)(X[:, n]) for n, p in enumerate(paths)], 1)
    torch.testing.assert_close(ours.forward(X), theirs, **CLOSE)


def test_gemma_scope_2_with_an_affine_skip_connection(model, tmp_path):
    """It lies there as [d_in d_out] (SAELens's loader gemma_3, circuit-tracer's own)."""
    points = {"hf_hook_point_in": "model.layers.{}.pre_feedforward_layernorm.output",
              "hf_hook_point_out": "model.layers.{}.post_feedforward_layernorm.output"}  # fmt: skip
    found, paths = layers_of(skip=True), []
    for n, w in enumerate(found):
        kept = {k: w[k] for k in ("W_dec", "b_enc", "b_dec", "threshold")}
        kept |= {"W_enc": w["W_enc"].T, "affine_skip_connection": w["W_skip"].T}
        config = {key: point.format(n) for key, point in points.items()}
        at = tmp_path / f"layer_{n}"
        paths.append(published.gemma_scope_2(at, kept, affine_connection=True, **config))
    ours = brought_layers(bring_layers(model, tmp_path / "item", paths, "gemma_scope_2"))
    torch.testing.assert_close(ours.forward(X), said(found, "jumprelu", False), **CLOSE)


def test_one_layer_of_sparsify_with_a_skip_connection(model, tmp_path):
    """A transcoder of layer 1 alone; its row in the table of metrics is that of layer 1."""
    w = published.draw(4) | {"W_skip": 0.2 * torch.randn(D, D)}
    folder = published.sparsify(tmp_path / "h.1.mlp", w, transcode=True, skip_connection=True)
    pair = [["blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"]]
    manifest = bring_layers(model, tmp_path / "item", [folder], "sparsify", pairs=pair)
    ours = brought_layers(manifest)
    x = X[:, :1]
    h = (x[:, 0] @ w["W_enc"] + w["b_enc"]).relu()
    best = h.topk(K, dim=-1)
    f = torch.zeros_like(h).scatter(-1, best.indices, best.values)
    y = f @ w["W_dec"] + w["b_dec"] + x[:, 0] @ w["W_skip"].T
    torch.testing.assert_close(ours.forward(x)[:, 0], y, **CLOSE)
    assert (tmp_path / "item/saes/x/layer_1.safetensors").is_file()


# --- read by the stages that read our own --------------------------------------------------


@pytest.fixture(scope="module")
def stored(tiny_gpt2_json, tiny_text, tmp_path_factory) -> dict[str, Path]:
    """Tokens, and what the tiny GPT-2's MLPs read and write."""
    root = tmp_path_factory.mktemp("layers")
    at = {"model": tiny_gpt2_json, "corpus": root / "tokens.parquet",
          "activations": root / "manifest.json"}  # fmt: skip
    section = {"source": "local", "path": str(tiny_text), "label_field": "label", "n_ctx": 32,
               "n_tokens": 1600, "n_eval_tokens": 640}  # fmt: skip
    call("corpus", {"corpus": section}, tokenizer=at["model"], out=at["corpus"],
         documents=root / "documents.parquet")  # fmt: skip
    hooks = [f"blocks.{n}.{h}" for n in range(2) for h in ("mlp.hook_in", "hook_mlp_out")]
    same = {"device": "cpu", "model": at["model"], "corpus": at["corpus"]}
    call("activations", {"activations": {"hooks": hooks, "dtype": "float32"}}, **same,
         out=at["activations"], shards=root / "shards")  # fmt: skip
    return at


def test_evaluation_judges_them_layer_by_layer(stored, tmp_path):
    """A skip connection that is the whole of a linear map explains all of the variance it can."""
    from pipeline.store.shards import Rows

    def read(hook: str) -> np.ndarray:
        rows = Rows(stored["activations"], hook, "eval")
        return rows.read(0, len(rows))[0]

    found, best = layers_of(skip=True), {}
    for n in range(2):
        x, y = (read(f"blocks.{n}.{h}") for h in ("mlp.hook_in", "hook_mlp_out"))
        wide = np.concatenate([x, np.ones((len(x), 1))], 1).astype(np.float64)
        # a LayerNorm's rows sum to 0, but for rounding, which no map should read
        A = np.linalg.lstsq(wide, y.astype(np.float64), rcond=1e-5)[0]
        found[n] |= {"W_dec": torch.zeros(N, D), "W_skip": torch.tensor(A[:-1].T).float(),
                     "b_dec": torch.tensor(A[-1]).float()}  # fmt: skip
        left = ((wide @ A - y) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
        best[n] = 1 - left
    folder = published.transcoder_set(tmp_path / "set", found)
    manifest = bring_layers(stored["model"], tmp_path / "item", [folder])
    call("transcoders_evaluation", {}, activations=stored["activations"], saes=manifest,
         device="cpu", out=tmp_path / "t.parquet")  # fmt: skip
    table = tables.read_table(tmp_path / "t.parquet").set_index("layer")
    for n in range(2):
        assert table["explained_variance"][n] == pytest.approx(best[n], abs=1e-4)
        assert table["explained_variance"][n] > 0.01
    assert table["dead_share"].isna().all()


@pytest.mark.parametrize("layers", ["each", "cross"])
def test_graphs_are_traced_through_them(layers, stored, tmp_path):
    """The edges of the graph, its errors among them, sum to what they explain."""
    from pipeline.models import loader
    from pipeline.spec.measured import GraphsSpec
    from pipeline.tracing import graphs
    from pipeline.tracing.dictionaries import check
    from pipeline.tracing.graph import top_logits, trace
    from pipeline.tracing.replacement import Replacement

    write = {"each": published.transcoder_set, "cross": published.clt}[layers]
    found = layers_of(cross=layers == "cross", skip=layers == "each")
    folder = write(tmp_path / "set", found)
    manifest = bring_layers(stored["model"], tmp_path / "item", [folder], layers=layers)
    spec = GraphsSpec.model_validate(
        {"dictionaries": {"x": "x"}, "prompts": {"p": {"prompt": "a"}}}
    )
    read = graphs.load([str(manifest)], spec, "x", 2, 0, "cpu")
    loaded = loader.load(stored["model"], "cpu")
    check(loaded.hf, read, "x")
    tokens = torch.arange(10, 17)
    model = Replacement.of(loaded.hf, tokens, read)
    whole = model.logits(errors=True)[-1]
    with torch.no_grad():
        torch.testing.assert_close(
            whole, loaded.hf(tokens[None]).logits[0, -1], rtol=1e-3, atol=1e-3
        )
    graph = trace(model, top_logits(model, 0.0, 4, 0.9), batch_size=64)
    assert graph.features.activation.numel() > 0 and graph.balance() < 1e-3


# --- refused -------------------------------------------------------------------------------


@pytest.fixture
def no_pass(monkeypatch):
    """No module of the model may run."""
    from transformers import GPT2LMHeadModel

    def ran(*_, **__):
        raise AssertionError("a forward pass")

    monkeypatch.setattr(GPT2LMHeadModel, "forward", ran)


def without(folder: Path, name: str) -> Path:
    (folder / name).unlink()
    return folder


def changed(folder: Path, name: str, **tensors) -> Path:
    """The folder, with tensors of a file changed or, where None, left out."""
    found = load_file(folder / name) | {k.replace("__", "."): t for k, t in tensors.items()}
    save_file({k: t for k, t in found.items() if t is not None}, folder / name)
    return folder


def cut(folder: Path, name: str) -> Path:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) * 2 // 3])
    return folder


def pickled(folder: Path, name: str) -> Path:
    (folder / name).write_bytes(pickle.dumps({"W_enc": Path("any")}))
    return folder


def of_two_sizes(folder: Path) -> Path:
    found = layers_of()
    found[1] = {k: t[: N // 2] if k not in ("b_dec",) else t for k, t in found[1].items()}
    return published.transcoder_set(folder, found)


def silent(folder: Path) -> Path:
    found = [w | {"b_enc": torch.full((N,), -1e9)} for w in layers_of()]
    return published.transcoder_set(folder, found)


def of_width(folder: Path) -> Path:
    half = D // 2
    cuts = {"W_enc": lambda t: t[:, :half], "W_dec": lambda t: t[:, :half],
            "b_dec": lambda t: t[:half]}  # fmt: skip
    found = [{k: cuts.get(k, lambda t: t)(t) for k, t in w.items()} for w in layers_of()]
    return published.transcoder_set(folder, found)


S, C = published.transcoder_set, published.clt
BAD = {  # what is wrong -> files, more of the section, the sentence
    "a layer is missing": (lambda at: without(S(at), "layer_1.safetensors"), {},
                           "layer_1.safetensors: is not there, and format circuit_tracer needs it "
                           "of layer 1 of 2"),
    "half of a layer is missing": (lambda at: without(C(at), "W_dec_0.safetensors"),
                                   {"layers": "cross"}, "W_dec_0.safetensors: is not there"),
    "no config.yaml": (lambda at: without(S(at), "config.yaml"), {},
                       "config.yaml: is not there, and format circuit_tracer needs it"),
    "a layer too many": (lambda at: S(at, layers_of(3)), {}, "holds layer 2, and activations.hooks "
                         "names 2 layers"),
    "a CLT of more layers": (
        lambda at: without(without(C(at, layers_of(3, True)), "W_enc_2.safetensors"),
                           "W_dec_2.safetensors"),
        {"layers": "cross"}, "W_dec_0 is (40, 3, 16), and layer 0 of 2 writes (40, 2, 16)",
    ),
    "a set as a CLT": (S, {"layers": "cross"}, "W_enc_0.safetensors: is not there"),
    "a kind that is not said": (lambda at: S(at, model_kind="cross_layer_transcoder"), {},
                                "model_kind is cross_layer_transcoder, and layers says each"),
    "another hook": (lambda at: S(at, feature_input_hook="hook_resid_mid"), {},
                     "was made for blocks.0.hook_resid_mid, and reads says blocks.0.mlp.hook_in"),
    "another output": (lambda at: S(at, feature_output_hook="hook_resid_post"), {},
                       "was made for blocks.0.hook_resid_post, and writes says"),
    "another width": (of_width, {}, "reads rows of 8, and the model's blocks.0.mlp.hook_in has 16"),
    "two sizes": (of_two_sizes, {}, "layer_1.safetensors: has d_sae 20, and the first layer 40"),
    "a cut file": (lambda at: cut(S(at), "layer_1.safetensors"), {},
                   "layer_1.safetensors: cannot be read"),
    "a pickle": (lambda at: pickled(S(at), "layer_0.safetensors"), {},
                 "layer_0.safetensors: cannot be read"),
    "no decoder": (lambda at: changed(S(at), "layer_0.safetensors", W_dec=None), {},
                   "holds no tensor 'W_dec' (a decoder)"),
    "no numbers": (lambda at: changed(C(at), "W_dec_1.safetensors",
                                      W_dec_1=torch.full((N, 1, D), torch.inf)),
                   {"layers": "cross"}, "'W_dec_1' holds no finite numbers"),
    "a tensor without a place": (
        lambda at: changed(C(at), "W_enc_0.safetensors", W_skip_0=torch.ones(D, D)),
        {"layers": "cross"}, "holds 'W_skip_0', which format circuit_tracer has no place for",
    ),
    "shapes that do not fit": (
        lambda at: changed(S(at), "layer_0.safetensors", b_enc=torch.ones(N - 1)), {},
        "b_enc is (39,) beside an encoder of 16 to 40",
    ),
    "a threshold and TopK": (lambda at: S(at, activation="topk", k=3), {}, "holds a threshold, and "
                             "config.yaml says topk with k 3"),
    "TopK without k": (lambda at: S(at, less(layers_of(), "threshold"), activation="topk"), {},
                       "has no 'k'"),
    "another k": (lambda at: changed(S(at, less(layers_of(), "threshold"), activation="topk", k=3),
                                     "layer_0.safetensors", k=torch.tensor(4)), {},
                  "holds k 4, and config.yaml says topk with k 3"),
    "ReLU with thresholds": (lambda at: S(at, activation="relu"), {}, "is jumprelu by its tensors"),
    "a TopK CLT": (lambda at: C(at, less(layers_of(cross=True), "threshold"), activation="topk",
                                k=3), {"layers": "cross"}, "circuit-tracer itself reads as ReLU"),
    "nothing fires": (silent, {}, "no latent fires on any row of the check"),
    "an autoencoder": (lambda at: published.sparsify(at / "h.1.mlp"),
                       {"format": "sparsify", "pairs": [["blocks.1.mlp.hook_in",
                                                         "blocks.1.hook_mlp_out"]]},
                       "and no transcoder"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(what, model, tmp_path, no_pass, capsys):
    make, over, sentence = BAD[what]
    folder = make(tmp_path / "theirs")
    with pytest.raises(SystemExit):
        bring_layers(model, tmp_path / "item", [folder], **over)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(told) == 1 and "full trace" not in told[0], told
    assert sentence in told[0]
    assert not list((tmp_path / "item").glob("*")) or not (tmp_path / "item/saes").exists()
    assert not (tmp_path / "item/manifest.json").exists()


PARTS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")


@pytest.mark.parametrize(
    ("layers", "part"), [(k, p) for k in ("each", "cross") for p in PARTS] + [("each", "W_skip")]
)
def test_a_weight_a_little_off_is_not_brought_in(part, layers, model, tmp_path, monkeypatch):
    """The check can fail: one number of one tensor, changed between the file and our folder."""
    before = layered_files.layer_files

    def written(layers, n, found):
        found = dict(found)
        tensor = found[part] = found[part].clone()
        tensor.view(-1)[tensor.abs().argmax()] *= 1.1 if part != "threshold" else 1e3
        return before(layers, n, found)

    monkeypatch.setattr(transcoders_import.layered_files, "layer_files", written)
    if layers == "each":
        folder = published.transcoder_set(tmp_path / "set", layers_of(skip=True))
    else:
        folder = published.clt(tmp_path / "set")
    with pytest.raises(SystemExit):
        bring_layers(model, tmp_path / "item", [folder], layers=layers)
    assert not (tmp_path / "item/manifest.json").exists()
    assert not (tmp_path / "item/saes").exists()


def test_layers_that_lack_a_tensor_of_others_are_told(tmp_path):
    """In a folder that is read, not only at import."""
    found = layers_of(skip=True)
    del found[1]["W_skip"]
    folder = published.transcoder_set(tmp_path / "set", found)
    with pytest.raises(Exception, match="has W_skip of 1 of 2 layers"):
        layered_files.read_layers(folder)
