"""Weights in the dtypes that a checkpoint's files have, whatever its config.json says. [torch]

transformers loads a checkpoint in the dtype that its config names, or in that of its first tensor,
and rounds to it what the files hold in a wider one.

1. `dtype_of`: the dtype in which most bytes lie; a model is loaded in it.
2. `restore`: single tensors of a wider one (norms, a router's bias) are put back as they are.

Quantised weights are left to transformers, whose files hold no weights as they are used.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.store import tables

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def files_of(folder: Path) -> list[Path]:
    """The files of weights that transformers reads of a folder."""
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return [f for f in [folder / WEIGHTS] if f.is_file()]
    return [
        folder / name
        for name in sorted(set(tables.read_json(folder / INDEX)["weight_map"].values()))
    ]


def tensors_of(folder: Path) -> Iterator[tuple[str, torch.dtype, int, Any]]:
    """(name, dtype, bytes, a function that reads it) of every tensor of floats in the files."""
    from safetensors import safe_open

    for file in files_of(folder):
        with safe_open(file, "pt") as found:
            for name in found.keys():  # noqa: SIM118 - no mapping
                there = found.get_slice(name)
                if (dtype := DTYPES.get(there.get_dtype())) is not None:
                    size = dtype.itemsize * int(torch.Size(there.get_shape()).numel())
                    yield name, dtype, size, lambda f=found, n=name: f.get_tensor(n)


def is_quantised(folder: Path) -> bool:
    """Whether the config of a folder says that its weights are quantised."""
    file = folder / "config.json"
    config = tables.read_json(file) if file.is_file() else {}
    return isinstance(config, dict) and "quantization_config" in config


def dtype_of(folder: Path) -> Any:
    """The dtype of most bytes of a checkpoint; 'auto' where transformers must choose."""
    sizes: Counter = Counter()
    for _, dtype, size, _ in [] if is_quantised(folder) else tensors_of(folder):
        sizes[dtype] += size
    return sizes.most_common(1)[0][0] if sizes else "auto"


@torch.no_grad()
def restore(model: nn.Module, folder: Path, renamed: Callable[[str], str] = str) -> None:
    """Put tensors back that were rounded when the model was loaded, each in its files' dtype.

    Args:
        model: of the folder, in the dtype that `dtype_of` gave; it is changed in place.
        renamed: a tensor's name in the files -> its name in the model, but for the prefix of the
            inner model, which files may leave out.
    """
    if is_quantised(folder):
        return
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    for file_name, dtype, _, read in tensors_of(folder):
        name = renamed(file_name)
        mine = named.get(name, named.get(f"{model.base_model_prefix}.{name}"))
        if mine is None or torch.promote_types(dtype, mine.dtype) == mine.dtype:
            continue
        tensor = read()
        if tensor.shape == mine.shape:
            mine.data = tensor
