"""A model of the store, ready to run: Hugging Face, native, or a TransformerBridge. [torch]

Weights are read from safetensors alone, each tensor is accounted for, and no code that a
repository brings is run. They are read straight to the device; where a GPU is too small for them,
layers are divided among the GPUs that no other job of this user holds.
"""

import itertools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import RetraceError
from pipeline.job import gpus
from pipeline.models import modules, native
from pipeline.spec import families
from pipeline.store import tables
from pipeline.text.tokens import checkpoint_of, load_tokenizer

OF_SENTENCES = re.compile(r"(^|\.)(pooler\.dense|cls\.seq_relationship)\.(weight|bias)$")
ROOM = 0.85  # share of a GPU's free memory that weights may take; the rest is for activations


@dataclass(frozen=True)
class Loaded:
    """A model ready to run.

    hf is a Hugging Face model in eval mode whose parameters need no gradient: a causal LM, or an
    encoder, of which activations can be stored. With
    `processing: compatibility` it is the module inside a TransformerBridge whose weights were
    folded and centred, and `bridge` is that bridge; else `bridge` is None.
    """

    hf: Any
    tokenizer: Any
    bos_id: int | None
    info: dict[str, Any]
    bridge: Any = None


def load(model_json: str | Path, device: Any = "cpu", dtype: Any = None) -> Loaded:
    """The model of a store item.

    Args:
        model_json: path of the item's model.json.
        dtype: a torch dtype; default: that of the section `model`, float32 where it says none.
    """
    import torch

    from pipeline.models import proof

    info = tables.read_json(model_json)
    dtype = dtype or getattr(torch, info.get("dtype", "float32"))
    has_tokenizer = (checkpoint_of(model_json) / "tokenizer.json").exists()
    tokenizer = load_tokenizer(model_json) if has_tokenizer else None
    if info["processing"] == "compatibility":
        wrapped = bridge(model_json, device, dtype)
        return Loaded(wrapped.original_model, tokenizer, info["bos_id"], info, wrapped)
    own = families.Layout(**info["family"]) if "family" in info else None
    hf = from_folder(checkpoint_of(model_json), dtype, device, own)
    hf.eval().requires_grad_(False)
    proof.prove(hf)
    return Loaded(hf, tokenizer, info["bos_id"], info)


def bridge(model_json: str | Path, device: Any = "cpu", dtype: Any = None) -> Any:
    """The model as a TransformerLens TransformerBridge, processed as model.json says."""
    import torch
    from transformer_lens.model_bridge import TransformerBridge

    folder = checkpoint_of(model_json)
    info = tables.read_json(model_json)
    folded, dtype = info["processing"] == "compatibility", dtype or info.get("dtype", "float32")
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if folded and native.is_native(folder):
        raise RetraceError(
            f"{model_json}: processing: compatibility, but a model that was trained here has "
            f"nothing to fold; write raw"
        )
    if native.is_native(folder):
        hf = native.from_folder(folder, dtype).to(device)
        return native.to_bridge(hf).eval().requires_grad_(False)
    out = TransformerBridge.boot_transformers(str(folder), device=str(device), dtype=dtype)
    if folded:
        out.enable_compatibility_mode()
    out.eval().requires_grad_(False)
    return out


def from_folder(
    folder: Path, dtype: Any, device: Any = "cpu", own: families.Layout | None = None
) -> Any:
    """The causal LM, or the encoder, of a local folder; safetensors only, no remote code.

    Args:
        device: where it goes; on a GPU that is too small for it, others take some of its layers.
        own: the layout that came with the model.
    """
    if native.is_native(folder):
        return native.from_folder(folder, dtype).to(device)
    from transformers import AutoModel, AutoModelForCausalLM

    check_index(folder)
    kind = AutoModel if is_encoder(folder) else AutoModelForCausalLM
    where = placement(folder, kind, dtype, device, own)
    model, found = read(kind, folder, dtype=dtype, device_map=where.map)
    check_loaded(folder, found)
    if own is not None:
        model.retrace_layout = own
    if where.layers:
        from accelerate.hooks import remove_hook_from_submodules

        remove_hook_from_submodules(model)  # hooks of ours are read and replaced at one device
        modules.spread(model, where.home, where.layers)
    return model


def read(kind: Any, folder: Path, **how: Any) -> tuple[Any, dict[str, Any]]:
    """(model, loading info) of transformers' from_pretrained; safetensors only, no remote code."""
    with told(folder):
        model, found = kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False,
            output_loading_info=True, ignore_mismatched_sizes=True, **how,
        )  # fmt: skip
    # save_pretrained would give back the names of these files: those of quantised weights, and
    # those of a model with an image tower
    model.__dict__.pop("_weight_conversions", None)
    return model, found


@contextmanager
def told(folder: Path) -> Iterator[None]:
    """Inside: whatever another library finds wrong with a model folder is one sentence."""
    try:
        yield
    except Exception as e:  # of the config's classes, of safetensors, of torch: any of theirs
        said = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise RetraceError(
            f"{folder}: not a causal LM that transformers can load from safetensors ({said}); give "
            f"a folder with config.json, model.safetensors and tokenizer.json"
        ) from e


# --- where it goes -------------------------------------------------------------------------


@dataclass(frozen=True)
class Placement:
    """Where the modules of a model go.

    Attributes:
        home: the device of all that is no layer.
        map: module -> device, as from_pretrained takes it; None: the CPU.
        layers: the device of each layer, where they differ.
    """

    home: Any
    map: dict[str, Any] | None = None
    layers: tuple = ()


def placement(
    folder: Path, kind: Any, dtype: Any, device: Any, own: families.Layout | None
) -> Placement:
    """Where a model of a folder goes: on one device, or its layers on several GPUs.

    Raises:
        RetraceError: the GPUs that are free here are too small for it.
    """
    import torch

    device = torch.device(device)
    if device.type != "cuda":
        return Placement(device, {"": device} if device.type != "cpu" else None)
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    if size * 2 <= room_of(device):  # float32 of what was stored as half of it, at most
        return Placement(device, {"": device})
    shape = on_meta(folder, kind, dtype, own)
    names, layers = modules.family(shape), modules.layers_of(shape)
    sizes = [bytes_of(layer) for layer in layers]
    rest = bytes_of(shape) - sum(sizes)
    if sum(sizes) + rest <= room_of(device):
        return Placement(device, {"": device})
    chosen, more = [device], others(device)
    while (numbers := divided(sizes, rest, [room_of(d) for d in chosen])) is None:
        if (other := next(more, None)) is not None:
            chosen.append(other)
            continue
        there = ", ".join(f"{room_of(d) / 1e9:.1f}" for d in chosen)
        raise RetraceError(
            f"{folder}: its weights take {(sum(sizes) + rest) / 1e9:.1f} GB as {dtype}, and the "
            f"GPUs that are free here have room for {there} GB; let the job have more of them "
            f"(--set-resources), or write model.dtype: bfloat16"
        )
    found = tuple(chosen[n] for n in numbers)
    where = dict.fromkeys(beside(shape, names.layers), device)
    where |= {f"{names.layers}.{i}": at for i, at in enumerate(found)}
    return Placement(device, where, found)


def on_meta(folder: Path, kind: Any, dtype: Any, own: families.Layout | None) -> Any:
    """The model of a folder without weights: its modules and their shapes."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        out = kind.from_config(config, dtype=dtype)
    if own is not None:
        out.retrace_layout = own
    return out


def bytes_of(module: Any) -> int:
    """Bytes of a module's weights, tied ones counted once."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def room_of(device: Any) -> float:
    """Bytes of weights that a GPU can take now."""
    import torch

    return ROOM * torch.cuda.mem_get_info(device)[0]


def others(device: Any) -> Any:
    """The other GPUs that this job may see and no other holds; held when they are asked for."""
    import torch

    here = torch.cuda.current_device() if device.index is None else device.index
    for i in range(torch.cuda.device_count()):
        if i != here and gpus.hold(str(torch.cuda.get_device_properties(i).uuid)):
            yield torch.device("cuda", i)


def divided(sizes: list[int], rest: int, rooms: list[float]) -> list[int] | None:
    """The number of the device of each layer: neighbours together, each as full as the others.

    Args:
        sizes: bytes of each layer.
        rest: bytes of all that is no layer, on the first device.
        rooms: bytes that fit on each device.

    Returns:
        None where they do not fit.
    """
    share = (sum(sizes) + rest) / sum(rooms)
    ends = list(itertools.accumulate(share * room for room in rooms))
    out, done = [], float(rest)
    for size in sizes:
        middle = done + size / 2
        out.append(next((n for n, end in enumerate(ends) if middle < end), len(rooms) - 1))
        done += size
    used = [sum(s for s, n in zip(sizes, out, strict=True) if n == k) for k in range(len(rooms))]
    used[0] += rest
    return None if any(u > room for u, room in zip(used, rooms, strict=True)) else out


def beside(model: Any, layers: str) -> list[str]:
    """The paths of all modules that hold no layer, the uppermost of each."""
    out, names = [], layers.split(".")
    for depth in range(len(names)):
        at = ".".join(names[:depth])
        children = modules.submodule(model, at).named_children()
        out += [f"{at}.{name}".lstrip(".") for name, _ in children if name != names[depth]]
    return out


def is_encoder(folder: Path) -> bool:
    """Whether a folder holds an encoder without a head for tokens, such as MiniLM (BertModel)."""
    from transformers.models.auto import modeling_auto as auto

    file = folder / "config.json"
    config = tables.read_json(file) if file.is_file() else {}
    kind, names = str(config.get("model_type")), config.get("architectures") or [""]
    bare = auto.MODEL_MAPPING_NAMES.get(kind)
    return kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and names[0] == bare


def check_loaded(folder: Path, found: dict[str, Any]) -> None:
    """Every tensor of the model came from the files, and every tensor of the files is used.

    transformers draws what is missing at random and leaves out what is not expected. Of the heads
    that BERT was trained with, that of the next sentence and the pooler below it are no part of a
    model of tokens.

    Args:
        found: the loading info of `from_pretrained`.

    Raises:
        RetraceError: names of tensors that are missing, unexpected, or have another shape.
    """
    names = {
        "missing": sorted(found["missing_keys"]),
        "unexpected": sorted(n for n in found["unexpected_keys"] if not OF_SENTENCES.search(n)),
        "of another shape": sorted(str(key[0]) for key in found["mismatched_keys"]),
    }
    faults = "; ".join(
        f"{kind}: {', '.join(some[:5])}{f' and {len(some) - 5} more' if len(some) > 5 else ''}"
        for kind, some in names.items()
        if some
    )
    if faults:
        fits = not names["missing"] and not names["of another shape"]
        remedy = "leave these tensors out" if fits else "give all weights of the model"
        raise RetraceError(
            f"{folder}: its weights do not fit its config.json ({faults}); correct config.json, or "
            f"{remedy}"
        )


def check_index(folder: Path) -> None:
    """RetraceError where an index of weights names anything but safetensors files beside it."""
    for index in sorted(folder.glob("*.index.json")):
        files = tables.read_json(index).get("weight_map")
        if not isinstance(files, dict) or not files:
            raise RetraceError(f"{index}: has no weight_map; give a whole copy of the model")
        for tensor, name in files.items():
            plain = isinstance(name, str) and Path(name).name == name
            if not (plain and name.endswith(".safetensors")):
                raise RetraceError(
                    f"{index}: weight_map takes {tensor} from {name!r}; only .safetensors files "
                    f"beside it are read"
                )
            if not os.path.isfile(folder / name):
                raise RetraceError(f"{index}: weight_map names {name}, which is not there")
