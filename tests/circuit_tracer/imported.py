"""Sets of transcoders that circuit-tracer's own code wrote, brought in: the same reconstructions.

    tests/circuit_tracer/imported.sh

Random transcoders of every kind that its files can hold are written by `to_safetensors` of
TranscoderSet and CrossLayerTranscoder. Features and reconstructions of its own loaders are compared
with what stage transcoders_import makes of the files. Gemma Scope 2's files go through its
`load_gemma_scope_2_transcoder`.
"""

import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import published  # noqa: E402
from circuit_tracer.transcoder import activation_functions, cross_layer_transcoder  # noqa: E402
from circuit_tracer.transcoder import single_layer_transcoder as single  # noqa: E402
from published import D, K, N  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from synthetic import call  # noqa: E402

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}
HOOKS = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
CLOSE = {"rtol": 1e-5, "atol": 1e-4}


def activation(act: str, threshold: torch.Tensor):
    """Its own module or function."""
    jump, top = activation_functions.JumpReLU, activation_functions.TopK
    return {"relu": torch.relu, "jumprelu": jump(threshold, 0.1), "topk": top(K)}[act]


def a_set(folder: Path, act: str, skip: bool) -> None:
    """Written by its TranscoderSet."""
    made = {}
    for n, w in enumerate(published.layers_of(skip=skip)):
        w["threshold"] = w["threshold"] - 0.5  # some below 0
        one = single.SingleLayerTranscoder(D, N, activation(act, w["threshold"]), n, skip, **CPU)
        state = {k: t for k, t in w.items() if k != "threshold"}
        state |= {"activation_function.threshold": w["threshold"]} if act == "jumprelu" else {}
        one.load_state_dict(state)
        made[n] = one
    config = {"activation": act, "k": K} if act == "topk" else {}
    published.about_set(folder, "transcoder_set", **config)
    single.TranscoderSet(made, **HOOKS).to_safetensors(str(folder))
    for file in folder.glob("layer_*.safetensors"):  # its reader of TopK fails on the k it writes
        save_file({name: t for name, t in load_file(file).items() if name != "k"}, file)


def a_clt(folder: Path, act: str) -> None:
    """Written by its CrossLayerTranscoder."""
    found = published.layers_of(cross=True)
    name = {"relu": "relu", "jumprelu": "jump_relu"}[act]
    made = cross_layer_transcoder.CrossLayerTranscoder(
        2, N, D, name, lazy_decoder=False, **HOOKS, **CPU
    )
    state = {k: torch.stack([w[k] for w in found]) for k in ("W_enc", "b_enc", "b_dec")}
    state |= {f"W_dec.{n}": w["W_dec"] for n, w in enumerate(found)}
    if act == "jumprelu":
        over = torch.stack([w["threshold"] for w in found])[:, None]
        state |= {"activation_function.threshold": over}
    made.load_state_dict(state)
    published.about_set(folder, "cross_layer_transcoder")
    made.to_safetensors(str(folder))


def theirs(folder: Path, layers: str, act: str):
    """Read by its own loaders."""
    if layers == "cross":
        return cross_layer_transcoder.load_clt(str(folder), lazy_decoder=False, **HOOKS, **CPU)
    files = {n: str(folder / f"layer_{n}.safetensors") for n in range(2)}
    how = {"activation": act, "k": K} if act == "topk" else {}
    return single.load_transcoder_set(
        files, "scan", **HOOKS, **how, lazy_encoder=False, lazy_decoder=False, **CPU
    )


def compare(what: str, read, ours, x: torch.Tensor) -> None:
    """Features and reconstructions of rows x [rows layers d]; stops where they differ."""
    with torch.no_grad():
        f = read.encode(x.transpose(0, 1))
        y = read.decode(f, x.transpose(0, 1))
    torch.testing.assert_close(torch.stack([ours.encode(n, x[:, n]) for n in range(2)]), f, **CLOSE)
    torch.testing.assert_close(ours.forward(x).transpose(0, 1), y, **CLOSE)
    print(f"{what}: the same features and reconstructions, {int((f < 0).sum())} features below 0")


def brought(model: Path, folder: Path, layers: str):
    """What our stage makes of it."""
    return published.brought_layers(
        published.bring_layers(model, folder / "item", [folder], layers=layers)
    )


def gemma_scope_2(model: Path, at: Path, x: torch.Tensor) -> None:
    """Folders of Gemma Scope 2, with and without an affine skip connection."""
    for skip in (False, True):
        paths, made = [], {}
        for n, w in enumerate(published.layers_of(skip=skip)):
            kept = {k: w[k] for k in ("W_dec", "b_enc", "b_dec", "threshold")}
            kept |= {"W_enc": w["W_enc"].T}
            kept |= {"affine_skip_connection": w["W_skip"].T} if skip else {}
            ends = {"in": "pre_feedforward_layernorm", "out": "post_feedforward_layernorm"}
            about = {f"hf_hook_point_{k}": f"model.layers.{n}.{v}.output" for k, v in ends.items()}
            folder = at / f"{skip}_{n}"
            paths.append(published.gemma_scope_2(folder, kept, affine_connection=skip, **about))
            file = str(folder / "params.safetensors")
            made[n] = single.load_gemma_scope_2_transcoder(file, n, **CPU)
        manifest = published.bring_layers(model, at / f"item{skip}", paths, "gemma_scope_2")
        read = single.TranscoderSet(made, **HOOKS)
        compare(f"gemma_scope_2{', affine' * skip}", read, published.brought_layers(manifest), x)


def main() -> None:
    torch.manual_seed(0)
    x = 3 * torch.randn(50, 2, D)
    with tempfile.TemporaryDirectory() as home:
        at = Path(home)
        section = {"name": "t", "source": "folder", "path": str(published.tiny_gpt2(at / "hf"))}
        model = at / "model.json"
        call("model", {"model": section}, out=model, checkpoint=at / "checkpoint")
        for act in ("relu", "jumprelu", "topk"):
            for skip in (False, True):
                a_set(folder := at / f"{act}{skip}", act, skip)
                what = f"set, {act}{', skip' * skip}"
                compare(what, theirs(folder, "each", act), brought(model, folder, "each"), x)
        for act in ("relu", "jumprelu"):
            a_clt(folder := at / f"clt_{act}", act)
            compare(f"CLT, {act}", theirs(folder, "cross", act), brought(model, folder, "cross"), x)
        gemma_scope_2(model, at, x)


if __name__ == "__main__":
    main()
