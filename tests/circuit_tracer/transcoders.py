"""Our transcoders of all layers, read by circuit-tracer's own loaders: the same reconstructions.

    PYTHONPATH=WHEEL python tests/circuit_tracer/transcoders.py    as run.sh does

WHEEL is an unpacked circuit-tracer 0.5.0, of which only the files of its loaders are imported: its
package wants other versions of ours. This release reads no TopK.
"""

import importlib.util
import sys
import tempfile
import types
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
WHEEL = next(Path(p) for p in sys.path if (Path(p) / "circuit_tracer/transcoder").is_dir())

from pipeline.crosscoders import layered_files  # noqa: E402
from pipeline.crosscoders.layered import Layered  # noqa: E402
from pipeline.sharing.export_layouts import transcoders  # noqa: E402
from pipeline.spec.sae import TranscodersSpec  # noqa: E402

L, D, F = 3, 8, 24
NEEDS = {"batchtopk": {"k": 3}, "jumprelu": {"l0_coefficient": 1.0}}


def theirs(name: str):
    """One module of circuit_tracer/transcoder, its package left out."""
    for package in ("circuit_tracer", "circuit_tracer.transcoder"):
        sys.modules.setdefault(package, types.ModuleType(package)).__path__ = []
    utils = types.ModuleType("circuit_tracer.utils")
    utils.get_default_device = lambda: torch.device("cpu")
    sys.modules["circuit_tracer.utils"] = utils
    file = WHEEL / f"circuit_tracer/transcoder/{name}.py"
    spec = importlib.util.spec_from_file_location(f"circuit_tracer.transcoder.{name}", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def written(folder: Path, architecture: str, layers: str, skip: bool):
    """Random weights as a stage writes and exports them; what our reader makes of them."""
    spec = TranscodersSpec(
        architecture=architecture, layers=layers, d_sae=F, skip=skip, **NEEDS[architecture]
    )
    model = Layered(spec, L, D)
    for p in model.parameters():
        p.data.add_(0.3 * torch.randn_like(p).abs())
    model.topk_threshold.fill_(0.5)
    hooks = [[f"blocks.{n}.{h}" for n in range(L)] for h in ("mlp.hook_in", "hook_mlp_out")]
    weights = layered_files.folded(model, *hooks, [1.0, 2.0, 0.5], [0.5, 1.0, 2.0])
    layered_files.write(folder / "own", weights, [{"model_name": "m"}] * L, {"stage": "test"})
    (folder / "out").mkdir()
    transcoders(folder / "out", folder / "own")
    return layered_files.read_layers(folder / "out")


def main() -> None:
    torch.manual_seed(0)
    theirs("activation_functions")
    single, cross = theirs("single_layer_transcoder"), theirs("cross_layer_transcoder")
    x = torch.randn(11, L, D)
    for architecture in NEEDS:
        for layers, skip in (("cross", False), ("each", False), ("each", True)):
            with tempfile.TemporaryDirectory() as at:
                ours = written(Path(at), architecture, layers, skip)
                hooks = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
                how = {"device": torch.device("cpu"), "dtype": torch.float32, **hooks}
                if layers == "cross":
                    read = cross.load_clt(f"{at}/out", lazy_decoder=False, **how)
                else:
                    files = {n: f"{at}/out/layer_{n}.safetensors" for n in range(L)}
                    read = single.load_transcoder_set(files, "scan", **how)
                inputs = x.transpose(0, 1)
                with torch.no_grad():
                    got = read.decode(read.encode(inputs), inputs)
            torch.testing.assert_close(got, ours.forward(x).transpose(0, 1), rtol=1e-4, atol=1e-5)
            print(f"{architecture}, {layers}{', skip' * skip}: the same reconstructions")


if __name__ == "__main__":
    main()
