"""The language model of a checkpoint that has an image tower beside it. [torch]

Many models are published in that form alone (Gemma 3 from 4B on, Gemma 4, Qwen 3.5, Llama 4). Of
text such a model computes what its language model computes, to the bit; a test holds this for every
type of `families.WITH_TOWER`. So the language model is read by itself, of the type that the
config's `text_config` has, and the store holds a causal LM like any other:

1. Its tensors are those behind one of `PREFIXES` in the checkpoint, and the unembedding.
2. Tensors of towers and projectors are left out. Every other tensor must be used, and every tensor
   of the language model must come from the files.
"""

import re
from pathlib import Path
from typing import Any

from pipeline.models import loader, stored
from pipeline.spec import families
from pipeline.store import tables

# Name in a checkpoint (older and newer releases of transformers) -> name in a causal LM.
PREFIXES = {
    r"^model\.(language_model|text_model)\.": "model.",
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head": "lm_head",
}
LANGUAGE = re.compile(r"(model\.)?(language_model|text_model)\.|lm_head\.")


def has_tower(folder: Path) -> bool:
    """Whether a folder holds a model with an image tower, of which the language model is read."""
    file = folder / "config.json"
    config = tables.read_json(file) if file.is_file() else {}
    return isinstance(config, dict) and config.get("model_type") in families.WITH_TOWER


def names_of(folder: Path) -> list[str]:
    """The names of all tensors in the safetensors files of a folder."""
    from safetensors import safe_open

    names: list[str] = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as found:
            names += found.keys()
    return names


def language_model(folder: Path) -> Any:
    """The causal LM inside a model with an image tower, in the dtype of its files.

    Raises:
        RetraceError: its tensors do not fit its config, or are not all there.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    loader.check_index(folder)
    with loader.told(folder):
        names = names_of(folder)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        config = config.get_text_config()
        # said of the whole model in one release and of its text_config in another
        config.tie_word_embeddings = not any("lm_head." in name for name in names)
        dtype = stored.dtype_of(folder)
    model, found = loader.read(
        AutoModelForCausalLM, folder, dtype=dtype, config=config, key_mapping=PREFIXES
    )
    towers = {name for name in names if not LANGUAGE.match(name)}
    loader.check_loaded(folder, {**found, "unexpected_keys": {*found["unexpected_keys"]} - towers})
    stored.restore(model, folder, renamed)
    return model


def renamed(name: str) -> str:
    """The name in a causal LM of a tensor of the checkpoint."""
    for pattern, new in PREFIXES.items():
        name = re.sub(pattern, new, name)
    return name
