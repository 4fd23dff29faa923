"""Models and dictionaries of the store as the objects of TransformerLens and SAELens.

Torch is imported when the first of them is asked for.
"""

from pathlib import Path
from typing import Any

from pipeline.errors import RetraceError
from pipeline.store import tables


def model(model_json: Path, device: str = "cpu") -> Any:
    """A model as TransformerLens's bridge: run_with_cache, run_with_hooks, hooks, generate.

    Its processing is that of the run (raw, or folded and centred).
    """
    from pipeline.models import loader

    return loader.bridge(model_json, device)


def dictionary(manifest: Path, name: str, device: str = "cpu") -> Any:
    """One dictionary of an SAE job as SAELens's object, which encodes and decodes.

    Raises:
        RetraceError: an encoder without a decoder, which SAELens has no class for.
    """
    from sae_lens import SAE

    about = tables.read_json(manifest)["saes"][name]
    folder = manifest.parent / about["folder"]
    if about.get("decoder") is False:
        raise RetraceError(
            f"{folder}: '{name}' is an encoder without a decoder, and SAELens has no class for "
            f"one; read sae_weights.safetensors itself"
        )
    return SAE.load_from_disk(str(folder), device=device).eval().requires_grad_(False)
