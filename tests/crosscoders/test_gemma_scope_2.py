"""Cross-layer transcoders and crosscoders of Gemma Scope 2, against the class of its tutorial."""

from pathlib import Path

import published
import pytest
import torch
from published import D, N, bring_crosscoder, bring_layers, brought, brought_layers, lengths
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from synthetic import call
from test_transcoders_import import no_pass, stored  # noqa: F401

from pipeline.spec.imports import ImportedCrosscoder, ImportedLayers, layer_listing
from pipeline.store import tables

X = 3 * torch.randn(60, 2, D, generator=torch.Generator().manual_seed(1))
CLOSE = {"rtol": 1e-5, "atol": 2e-4}
COMMIT = "a" * 40


class JumpReLUMultiLayerSAE:
    """The equations of Gemma Scope 2's tutorial, over tensors stacked along the layers."""

    def __init__(self, folder: Path, n: int = 2) -> None:
        parts = [load_file(folder / f"params_layer_{i}.safetensors") for i in range(n)]
        self.w = {name: torch.stack([p[name] for p in parts]) for name in parts[0]}

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.einsum("bld,ldf->blf", x, self.w["w_enc"]) + self.w["b_enc"]
        return (h > self.w["threshold"]) * torch.relu(h)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.einsum("blf,lfmd->bmd", self.encode(x), self.w["w_dec"]) + self.w["b_dec"]
        if "affine_skip_connection" in self.w:
            y = y + torch.einsum("bld,lde->ble", x, self.w["affine_skip_connection"])
        return y


def written(
    folder: Path, kind: str, n: int = 2, skip: bool = False, d: int = D, **config
) -> Path:  # fmt: skip
    """params_layer_<i>.safetensors and config.json (google/gemma-scope-2-270m-pt, clt and
    crosscoder); decoders of a clt are zero over the layers before their own."""
    folder.mkdir(parents=True)
    for i in range(n):
        g = torch.Generator().manual_seed(30 + i)
        w_dec = torch.randn(N, n, d, generator=g)
        if kind == "clt":
            w_dec[:, :i] = 0
        found = {"w_enc": torch.randn(d, N, generator=g), "w_dec": w_dec,
                 "b_enc": torch.randn(N, generator=g), "b_dec": torch.randn(d, generator=g),
                 "threshold": 2 * torch.rand(N, generator=g)}  # fmt: skip
        if skip:
            found["affine_skip_connection"] = 0.3 * torch.randn(d, d, generator=g)
        save_file(found, folder / f"params_layer_{i}.safetensors")
    at, out = ("{all}.pre_feedforward_layernorm.output", "{all}.post_feedforward_layernorm.output")
    if kind == "crosscoder":
        at = out = "{0,1}.output"
    about = {"hf_hook_point_in": f"model.layers.{at}", "hf_hook_point_out": f"model.layers.{out}",
             "width": n * N, "model_name": "google/gemma-3-270m-pt", "architecture": "jump_relu",
             "l0": 150, "affine_connection": skip, "type": kind}  # fmt: skip
    published.write_json(folder / "config.json", about | config)
    return folder


CLT = {"format": "gemma_scope_2", "layers": "cross"}


@pytest.mark.parametrize("skip", [False, True])
def test_a_cross_layer_transcoder_is_the_tutorials(skip, tiny_gpt2_json, tmp_path):
    folder = written(tmp_path / "clt", "clt", skip=skip)
    manifest = bring_layers(tiny_gpt2_json, tmp_path / "item", [folder], **CLT)
    ours, theirs = brought_layers(manifest), JumpReLUMultiLayerSAE(folder)
    f = theirs.encode(X)
    assert (f > 0).any() and (f == 0).any() and not ours.signed
    for n in range(2):
        torch.testing.assert_close(ours.encode(n, X[:, n]), f[:, n], **CLOSE)
    torch.testing.assert_close(ours.forward(X), theirs.forward(X), **CLOSE)
    said = tables.read_json(manifest)
    assert said["original"]["model_name"] == "google/gemma-3-270m-pt"
    assert said["original"]["differs_by"] < 1e-5
    assert said["saes"]["x"]["spec"]["skip"] == skip
    assert set(said["original"]["files"]) == {f.name for f in folder.iterdir()}


def test_the_numbers_of_an_inference_without_config(tiny_gpt2_json, tmp_path):
    folder = written(tmp_path / "clt", "clt")
    (folder / "config.json").unlink()
    manifest = bring_layers(tiny_gpt2_json, tmp_path / "item", [folder], **CLT)
    ours = brought_layers(manifest)
    torch.testing.assert_close(ours.forward(X), JumpReLUMultiLayerSAE(folder).forward(X), **CLOSE)


def test_graphs_are_traced_through_it(stored, tmp_path):  # noqa: F811
    """With its skip connection: the edges of the graph, errors among them, sum to the logits."""
    from pipeline.models import loader
    from pipeline.spec.measured import GraphsSpec
    from pipeline.tracing import graphs
    from pipeline.tracing.graph import top_logits, trace
    from pipeline.tracing.replacement import Replacement

    folder = written(tmp_path / "clt", "clt", skip=True)
    manifest = bring_layers(stored["model"], tmp_path / "item", [folder], **CLT)
    spec = GraphsSpec.model_validate(
        {"dictionaries": {"x": "x"}, "prompts": {"p": {"prompt": "a"}}}
    )
    read = graphs.load([str(manifest)], spec, "x", 2, 0, "cpu")
    loaded = loader.load(stored["model"], "cpu")
    tokens = torch.arange(10, 17)
    model = Replacement.of(loaded.hf, tokens, read)
    with torch.no_grad():
        torch.testing.assert_close(
            model.logits(errors=True)[-1], loaded.hf(tokens[None]).logits[0, -1],
            rtol=1e-3, atol=1e-3,
        )  # fmt: skip
    graph = trace(model, top_logits(model, 0.0, 4, 0.9), batch_size=64)
    assert graph.features.activation.numel() > 0 and graph.balance() < 1e-3


def test_a_crosscoder_is_the_tutorials(tiny_gpt2_json, tmp_path):
    folder = written(tmp_path / "cc", "crosscoder")
    manifest = bring_crosscoder([tiny_gpt2_json], tmp_path / "item", folder, format="gemma_scope_2")
    ours, theirs = brought(manifest), JumpReLUMultiLayerSAE(folder)
    f = theirs.encode(X)
    assert (f > 0).any() and (f == 0).any()
    torch.testing.assert_close(ours.encode(X.flatten(1)), f.flatten(1), **CLOSE)
    torch.testing.assert_close(ours(X.flatten(1)).unflatten(1, (2, D)), theirs.forward(X), **CLOSE)
    said = tables.read_json(manifest)
    assert [s["scale"] for s in said["sources"]] == [1.0, 1.0]
    assert said["saes"]["x"]["spec"] == {"architecture": "jumprelu", "d_sae": 2 * N, "k": 0}
    assert set(said["original"]["files"]) == {f.name for f in folder.iterdir()}
    assert "hooks" not in said["original"]


def test_a_crosscoder_leaves_with_its_thresholds(tiny_gpt2_json, tmp_path):
    """Under the names of Minder et al.; their BatchTopKCrossCoder has one threshold, and no place
    for one of each latent, so that no model_final.pt says otherwise."""
    folder = written(tmp_path / "cc", "crosscoder")
    manifest = bring_crosscoder([tiny_gpt2_json], tmp_path / "item", folder, format="gemma_scope_2")
    spec = {"export": {"format": "crosscoder", "arm": "trained", "sae": "x", "paper": "toy"}}
    call("exports", spec, sae=manifest, out=tmp_path / "out")
    out = {f.name for f in (tmp_path / "out").iterdir()}
    assert out == {"crosscoder.safetensors", "config.json", "provenance.json"}
    w, theirs = load_file(tmp_path / "out/crosscoder.safetensors"), JumpReLUMultiLayerSAE(folder)
    h = torch.einsum("bld,ldf->bf", X, w["encoder.weight"]) + w["encoder.bias"]
    f = torch.relu(h) * (h > w["threshold"])
    torch.testing.assert_close(f, theirs.encode(X).flatten(1), **CLOSE)
    x_hat = torch.einsum("bf,lfd->bld", f, w["decoder.weight"]) + w["decoder.bias"]
    torch.testing.assert_close(x_hat, theirs.forward(X), **CLOSE)
    assert "trainer" not in tables.read_json(tmp_path / "out/config.json")


# --- refused -------------------------------------------------------------------------------


def changed(folder: Path, i: int = 0, **tensors) -> Path:
    file = folder / f"params_layer_{i}.safetensors"
    save_file(lengths(**load_file(file) | tensors), file)
    return folder


def less(folder: Path, name: str) -> Path:
    (folder / name).unlink()
    return folder


BAD = {  # what is wrong -> kind, the files, the sentence
    "a layer is missing": (
        "clt", lambda at: less(written(at, "clt"), "params_layer_1.safetensors"),
        "params_layer_1.safetensors: is not there, and format gemma_scope_2 needs it of layer 1",
    ),
    "a layer too many": (
        "clt", lambda at: written(at, "clt", 3), "holds layer 2, and activations.hooks names 2",
    ),
    "a layer of a larger one": (
        "clt", lambda at: less(written(at, "clt", 3), "params_layer_2.safetensors"),
        "w_dec is (40, 3, 16), and not (40, 2, 16), as 2 layers have it",
    ),
    "a decoder that writes back": (
        "clt", lambda at: changed(written(at, "clt"), 1, w_dec=torch.ones(N, 2, D)),
        "w_dec of layer 1 writes to layers before its own",
    ),
    "a crosscoder as one": (
        "clt", lambda at: written(at, "crosscoder"), "is of type crosscoder, and a clt is wanted",
    ),
    "another hook": (
        "clt", lambda at: written(at, "clt", hf_hook_point_in="model.layers.{all}.output"),
        "was made for blocks.0.hook_resid_post, and reads says blocks.0.mlp.hook_in",
    ),
    "a skip connection that is said": (
        "clt", lambda at: written(at, "clt", affine_connection=True),
        "its configuration says that it has a skip connection",
    ),
    "another architecture": (
        "clt", lambda at: written(at, "clt", architecture="topk"), "architecture 'topk' is not rea",
    ),
    "one more weight": (
        "clt", lambda at: changed(written(at, "clt"), gate=torch.ones(N)),
        "'gate', which format gemma_scope_2 has no place for",
    ),
    "no numbers": (
        "clt", lambda at: changed(written(at, "clt"), w_dec=torch.full((N, 2, D), torch.nan)),
        "'w_dec' holds no finite numbers",
    ),
    "another width": ("clt", lambda at: written(at, "clt", d=8), "reads rows of 8, and the model"),
    "a transcoder of one layer": (
        "clt", lambda at: changed(written(at, "clt"), w_dec=torch.ones(N, D)),
        "w_dec is (40, 16), and not (40, 2, 16)",
    ),
    "a clt as a crosscoder": (
        "crosscoder", lambda at: written(at, "clt"), "is of type clt, and a crosscoder is wanted",
    ),
    "a source is missing": (
        "crosscoder", lambda at: less(written(at, "crosscoder"), "params_layer_1.safetensors"),
        "params_layer_1.safetensors: is not there, and format gemma_scope_2 needs it",
    ),
    "more sources than are named": (
        "crosscoder", lambda at: written(at, "crosscoder", 3),
        "w_dec is (40, 3, 16), and not (40, 2, 16), as 2 layers have it; name as many as it has",
    ),
    "other layers": (
        "crosscoder",
        lambda at: written(at, "crosscoder", hf_hook_point_in="model.layers.{0,5}.output"),
        "was made for blocks.5.hook_resid_post, and source 2 says blocks.1.hook_resid_post",
    ),
    "a crosscoder's skip connection": (
        "crosscoder", lambda at: written(at, "crosscoder", skip=True), "has a skip connection",
    ),
    "a crosscoder's width": (
        "crosscoder", lambda at: written(at, "crosscoder", d=8), "reads rows of 8, and blocks.0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    what, tiny_gpt2_json, tmp_path, capsys, no_pass  # noqa: F811
):  # fmt: skip
    kind, make, sentence = BAD[what]
    folder = make(tmp_path / "at")
    with pytest.raises(SystemExit):
        if kind == "clt":
            bring_layers(tiny_gpt2_json, tmp_path / "item", [folder], **CLT)
        else:
            bring_crosscoder([tiny_gpt2_json], tmp_path / "item", folder, format="gemma_scope_2")
    (said,) = [s for s in capsys.readouterr().err.splitlines() if s.startswith("error")]
    assert sentence in said and "full trace" not in said
    assert not (tmp_path / "item/manifest.json").exists()
    assert not list((tmp_path / "item").glob("**/*.safetensors"))


def test_a_skip_connection_does_not_leave_without_a_word(tiny_gpt2_json, tmp_path):
    """circuit-tracer's load_clt reads no W_skip, so that its reconstruction would lack it."""
    from pipeline.errors import RetraceError
    from pipeline.sharing.exports import Export, check_kind

    for skip in (False, True):
        at = tmp_path / str(skip)
        folder = written(at / "clt", "clt", skip=skip)
        manifest = bring_layers(tiny_gpt2_json, at / "item", [folder], **CLT)
        out = Export(paper="p", arm="a", sae="x", format="circuit_tracer")
        if skip:
            with pytest.raises(RetraceError, match="hold no W_skip"):
                check_kind(str(manifest), out)
        else:
            check_kind(str(manifest), out)


def test_both_come_from_a_hub(tiny_gpt2_json, tmp_path, monkeypatch):
    """The hub's cache holds the commit; a layer more than is asked for is told by its names."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = "google/gemma-scope-2-270m-pt"
    at = tmp_path / "hub" / f"models--{repo.replace('/', '--')}/snapshots" / COMMIT
    clt = written(at / "clt/width_262k_l0_big", "clt")
    cc = written(at / "crosscoder/layer_0_1_width_1m_l0_big", "crosscoder")
    hub = {"source": "hub", "repo": repo, "revision": COMMIT}
    manifest = bring_layers(tiny_gpt2_json, tmp_path / "a", ["clt/width_262k_l0_big"], **CLT | hub)
    theirs = JumpReLUMultiLayerSAE(clt).forward(X)
    torch.testing.assert_close(brought_layers(manifest).forward(X), theirs, **CLOSE)
    assert tables.read_json(manifest)["original"]["revision"] == COMMIT
    path = "crosscoder/layer_0_1_width_1m_l0_big"
    manifest = bring_crosscoder(
        [tiny_gpt2_json], tmp_path / "b", path, **hub, format="gemma_scope_2"
    )
    x_hat = brought(manifest)(X.flatten(1)).unflatten(1, (2, D))
    torch.testing.assert_close(x_hat, JumpReLUMultiLayerSAE(cc).forward(X), **CLOSE)


# --- the section ---------------------------------------------------------------------------


def test_the_section_names_one_folder():
    hub = {"source": "hub", "repo": "google/gemma-scope-2-1b-pt", "revision": COMMIT} | CLT
    spec = ImportedLayers(**hub, path="clt/width_262k_l0_medium_affine")
    assert spec.folders([0, 1]) == ["clt/width_262k_l0_medium_affine"]
    files = layer_listing("gemma_scope_2", "cross", spec.folders([0, 1]), [0, 1])
    assert files[1] == ("clt/width_262k_l0_medium_affine/params_layer_1.safetensors", [],
                        ["clt/width_262k_l0_medium_affine/config.json"])  # fmt: skip
    with pytest.raises(ValidationError, match="has all layers in one folder"):
        ImportedLayers(**hub, path="clt/layer_{layer}")
    with pytest.raises(ValidationError, match="read in formats circuit_tracer and gemma_scope_2"):
        ImportedLayers(**hub | {"format": "gemma_scope", "path": "{layer}"})
    hooks = ["blocks.5.hook_resid_post", "blocks.9.hook_resid_post"]
    ImportedCrosscoder(source="folder", format="gemma_scope_2", path="cc", hooks=hooks)
