"""A model of the store, ready to run: Hugging Face, native, or a TransformerBridge. [torch]

Weights are read from safetensors alone, each tensor is accounted for, and no code that a
repository brings is run.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import RetraceError
from pipeline.models import native
from pipeline.spec import families
from pipeline.store import tables
from pipeline.text.tokens import checkpoint_of, load_tokenizer


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
        dtype: a torch dtype; default float32.
    """
    import torch

    from pipeline.models import proof

    info = tables.read_json(model_json)
    dtype = dtype or torch.float32
    has_tokenizer = (checkpoint_of(model_json) / "tokenizer.json").exists()
    tokenizer = load_tokenizer(model_json) if has_tokenizer else None
    if info["processing"] == "compatibility":
        wrapped = bridge(model_json, device, dtype)
        return Loaded(wrapped.original_model, tokenizer, info["bos_id"], info, wrapped)
    hf = from_folder(checkpoint_of(model_json), dtype).to(device).eval().requires_grad_(False)
    if "family" in info:
        hf.retrace_layout = families.Layout(**info["family"])
    proof.prove(hf)
    return Loaded(hf, tokenizer, info["bos_id"], info)


def bridge(model_json: str | Path, device: Any = "cpu", dtype: Any = None) -> Any:
    """The model as a TransformerLens TransformerBridge, processed as model.json says."""
    import torch
    from transformer_lens.model_bridge import TransformerBridge

    folder = checkpoint_of(model_json)
    folded = tables.read_json(model_json)["processing"] == "compatibility"
    if folded and native.is_native(folder):
        raise RetraceError(
            f"{model_json}: processing: compatibility, but a model that was trained here has "
            f"nothing to fold; write raw"
        )
    if native.is_native(folder):
        hf = native.from_folder(folder, dtype or torch.float32).to(device)
        return native.to_bridge(hf).eval().requires_grad_(False)
    out = TransformerBridge.boot_transformers(
        str(folder), device=str(device), dtype=dtype or torch.float32
    )
    if folded:
        out.enable_compatibility_mode()
    out.eval().requires_grad_(False)
    return out


def from_folder(folder: Path, dtype: Any) -> Any:
    """The causal LM, or the encoder, of a local folder; safetensors only, no remote code."""
    if native.is_native(folder):
        return native.from_folder(folder, dtype)
    from transformers import AutoModel, AutoModelForCausalLM

    check_index(folder)
    try:
        kind = AutoModel if is_encoder(folder) else AutoModelForCausalLM
        model, found = kind.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True,
            trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    except Exception as e:  # of the config's classes, of safetensors, of torch: any of theirs
        said = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise RetraceError(
            f"{folder}: not a causal LM that transformers can load from safetensors ({said}); give "
            f"a folder with config.json, model.safetensors and tokenizer.json"
        ) from e
    check_loaded(folder, found)
    return model


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

    transformers draws what is missing at random and leaves out what is not expected.

    Args:
        found: the loading info of `from_pretrained`.

    Raises:
        RetraceError: names of tensors that are missing, unexpected, or have another shape.
    """
    names = {
        "missing": sorted(found["missing_keys"]),
        "unexpected": sorted(found["unexpected_keys"]),
        "of another shape": sorted(str(key[0]) for key in found["mismatched_keys"]),
    }
    faults = "; ".join(
        f"{kind}: {', '.join(some[:5])}{f' and {len(some) - 5} more' if len(some) > 5 else ''}"
        for kind, some in names.items()
        if some
    )
    if faults:
        raise RetraceError(
            f"{folder}: its weights do not fit its config.json ({faults}); correct config.json, or "
            f"give all weights of the model"
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
