"""Steered directions for other programs: llama.cpp's control vectors, and decoder rows for SAELens.

    python -m pipeline directions results/laptop/my_paper/steering/directions.safetensors \\
        --activations results/store/activations/<id>/manifest.json --out directions

* `<direction>.<class>.gguf`: one file for each direction and class, with a tensor for each hook.
  llama.cpp adds `direction.<l>` to what block l leaves, at every position, and takes none for block
  0 (common_control_vector_load_one, 2026). A vector here is as long as the stream is on average at
  its hook, so that llama.cpp's scale is the coefficient of paper.yaml.
* `saelens/<hook>/`: a folder that `SAE.load_from_disk` of sae-lens 6.54 reads. Its decoder has a
  row of length 1 for each direction and class, in the order of names.json, its encoder is the same
  turned round, and there are no biases: a latent is the stream's projection, where it is positive.
"""

import argparse
import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import RetraceError, command
from pipeline.spec import families
from pipeline.store import tables

ARCHITECTURE = "controlvector"


def read(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """What steering wrote: direction/class/hook -> [d] of length 1; hook -> the stream's mean norm.

    Raises:
        RetraceError: the file is not there, or no directions of the stage steering.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise RetraceError(f"{path}: not there; run a paper with a section steering first")
    try:
        with safe_open(path, "numpy") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        norms = {name.split("/")[2]: 0.0 for name in found}
        return found, {hook: float(metadata[hook]) for hook in norms}
    except (SafetensorError, ValueError, LookupError, OSError) as e:
        raise RetraceError(
            f"{path}: no directions of the stage steering ({e}); name steering/"
            f"directions.safetensors of a paper"
        ) from None


def block_of(hook: str) -> int:
    """The block behind which a hook of the stream lies: -1 for what the first one reads."""
    layer, end = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", hook).groups()
    return int(layer) - (end == "pre")


def control_vectors(found: dict[str, np.ndarray], norms: dict[str, float]) -> dict[str, dict]:
    """File name -> tensors of a control vector, float32 [d]; hooks before block 1 are left out."""
    out: dict[str, dict[str, np.ndarray]] = {}
    for name, v in found.items():
        direction, target, hook = name.split("/")
        if block_of(hook) >= 1:
            file = f"{plain(direction)}.{plain(target)}.gguf"
            vector = np.asarray(v * norms[hook], np.float32)
            out.setdefault(file, {})[f"direction.{block_of(hook)}"] = vector
    return out


def plain(name: str) -> str:
    """A name that every file system takes."""
    return re.sub(r"[^\w-]+", "_", name)


def write_gguf(path: Path, tensors: dict[str, np.ndarray], model: str) -> None:
    """A control vector as llama.cpp's own generator writes it."""
    import gguf

    def write(to: Any) -> None:
        writer = gguf.GGUFWriter(to, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", model)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(tensors))
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    tables.atomically(path, write)


def config(hook: str, shape: tuple[int, int], manifest: dict[str, Any]) -> dict[str, Any]:
    """cfg.json of a SAELens folder with as many latents as `shape` [n d] has rows.

    Args:
        manifest: manifest.json of the activations.
    """
    metadata = {
        "sae_lens_version": version("sae-lens"),  # without it a folder is read as one of before 6
        "model_name": Path(manifest["model"]).parent.name,
        "hook_name": hook,
        "hook_name_bridge": manifest["hooks"][hook].get("bridge", families.bridge_name(hook)),
        "context_size": manifest["n_ctx"],
        "prepend_bos": manifest["prepend_bos"],
        "seqpos_slice": [manifest["skip_first"], None],
        "dataset_path": Path(manifest["corpus"]).parent.name,
    }
    return {
        "architecture": "standard", "d_in": shape[1], "d_sae": shape[0], "dtype": "float32",
        "device": "cpu", "apply_b_dec_to_input": False, "normalize_activations": "none",
        "reshape_activations": "none", "metadata": metadata,
    }  # fmt: skip


def write_saelens(folder: Path, hook: str, found: dict[str, np.ndarray], manifest: dict) -> None:
    """The decoder rows of one hook."""
    from safetensors.numpy import save_file

    names = [name for name in found if name.split("/")[2] == hook]
    W = np.stack([np.asarray(found[name], np.float32) for name in names])
    n, d = W.shape
    weights = {"W_dec": W, "W_enc": np.ascontiguousarray(W.T)}
    weights |= {"b_enc": np.zeros(n, np.float32), "b_dec": np.zeros(d, np.float32)}
    folder.mkdir(parents=True, exist_ok=True)
    tables.atomically(folder / "sae_weights.safetensors", lambda to: save_file(weights, to))
    rows = [name.rpartition("/")[0] for name in names]
    for file, data in (("cfg.json", config(hook, W.shape, manifest)), ("names.json", rows)):
        text = json.dumps(data, indent=1) + "\n"
        tables.atomically(folder / file, lambda to, text=text: to.write_text(text, "utf-8"))


def export(directions: str, activations: str, out: str) -> list[Path]:
    """Write all files, and say which.

    Raises:
        RetraceError: a file is missing, or the activations lack a hook of the directions.
    """
    found, norms = read(directions)
    manifest, folder = tables.read_json(activations), Path(out)
    missing = [hook for hook in norms if hook not in manifest.get("hooks", {})]
    if missing:
        raise RetraceError(
            f"{activations}: has no hook '{missing[0]}', of which {directions} has directions; "
            f"name the manifest.json that it was made from"
        )
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for file, tensors in control_vectors(found, norms).items():
        write_gguf(folder / file, tensors, Path(manifest["model"]).parent.name)
        written.append(folder / file)
    for hook in norms:
        write_saelens(folder / "saelens" / hook, hook, found, manifest)
        written.append(folder / "saelens" / hook)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline directions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directions", help="directions.safetensors of the stage steering")
    parser.add_argument("--activations", required=True, help="manifest.json of the activations")
    parser.add_argument("--out", required=True, help="folder to write")
    args = parser.parse_args()
    with command("directions"):
        print("\n".join(map(str, export(args.directions, args.activations, args.out))))
