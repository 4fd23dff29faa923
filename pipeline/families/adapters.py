"""Write families.json: the hooks of every causal model type, out of TransformerLens's adapters.

    python -m pipeline adapters             writes pipeline/spec/families.json
    python -m pipeline adapters --check     compares it with the adapters; exit code 1 if it differs

1. For each type that AutoModelForCausalLM loads, a config of a few hundred weights is made, and
   from it TransformerLens's adapter, without weights: it gives a layout (layouts.py).
2. A switch of the config that changes the layout (GPT-NeoX's parallel residual) makes a variant.
3. A tiny random model is built, and the layout is held against it (completed.py).

Importing TransformerLens takes 15 s, so that no stage does this; a test holds the file equal.
"""

import argparse
import itertools
import json
import logging
import sys
import warnings
from importlib.metadata import version
from typing import Any

import torch

from pipeline.errors import command
from pipeline.families.completed import completed
from pipeline.families.layouts import layout_of
from pipeline.families.tiny_models import tiny_config, tiny_model, with_architecture
from pipeline.spec import families

# The settings of a type where one of them decides whether another is looked at. Falcon's new
# decoder takes no heed of multi_query, and does not run without parallel_attn.
SETTINGS = {
    "falcon": [
        *(
            {"new_decoder_architecture": False, "multi_query": one, "parallel_attn": beside}
            for one in (True, False)
            for beside in (True, False)
        ),
        *({"new_decoder_architecture": True, "num_ln_in_parallel_attn": n} for n in (None, 1, 2)),
    ],
    "granitemoehybrid": [{"num_local_experts": 0}, {}],
}
# Types that are left out, and why.
LEFT_OUT = {
    "llama4": "an image tower; llama4_text is the language model",
    "gemma3": "an image tower; gemma3_text is the language model",
    "gemma4": "an image tower; gemma4_text is the language model",
    "gemma4_unified": "an image tower; gemma4_text is the language model",
    "qwen3_5": "an image tower; qwen3_5_text is the language model",
    "qwen3_5_moe": "an image tower; qwen3_5_moe_text is the language model",
    "zamba2": "its layers share modules, so that a path names several places",
}


def adapter_of(config: Any) -> Any:
    """TransformerLens's adapter of a config, and the class that it is for.

    Raises:
        ValueError: TransformerLens has none for a causal LM of this type.
    """
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge.sources import transformers as source
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf

    architecture = source.determine_architecture_from_hf_config(config)
    if architecture not in config.architectures:
        raise ValueError(f"TransformerLens has {architecture}, which is no causal LM")
    made = build_bridge_config_from_hf(config, architecture, config.model_type, torch.float32)
    return ArchitectureAdapterFactory.select_architecture_adapter(made)


def causal_types() -> list[str]:
    """Model types that AutoModelForCausalLM loads and that are not left out."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return [k for k in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if k not in LEFT_OUT]


def variants(kind: str) -> list[dict[str, Any]]:
    """Layouts of a type: {'when': settings, 'layout': one}, the settings that matter only."""
    out = []
    for when in SETTINGS.get(kind) or _settings(kind):
        entry: dict[str, Any] = {"when": when} if when else {}
        try:
            config = with_architecture(tiny_config(kind, **when))
            adapter, hf = adapter_of(config), tiny_model(config)
            entry["layout"] = completed(layout_of(adapter), hf, adapter)
        except Exception as e:  # a setting that the config, the model or the adapter does not take
            if out == [] or not when:
                raise
            print(f"{kind} {when}: {str(e).splitlines()[0]}", file=sys.stderr)
        out.append(entry)
    return out


def _settings(kind: str) -> list[dict[str, Any]]:
    """All values together of the switches of a config that change the layout."""
    plain = with_architecture(tiny_config(kind))
    first = layout_of(adapter_of(plain))
    switches = {k: (v, not v) for k, v in plain.to_dict().items() if isinstance(v, bool)}
    matter = {k: v for k, v in switches.items() if _matters(kind, k, v[1], first)}
    return [dict(zip(matter, v, strict=True)) for v in itertools.product(*matter.values())]


def _matters(kind: str, key: str, value: bool, first: dict[str, Any]) -> bool:
    """Whether a setting changes the layout, or the columns of a joint projection."""
    try:
        adapter = adapter_of(with_architecture(tiny_config(kind, **{key: value})))
        return layout_of(adapter) != first or key == "multi_query"
    except Exception:  # a setting that the config or the adapter does not take
        return key == "multi_query"


def table() -> tuple[dict[str, Any], dict[str, str]]:
    """(families.json, type -> why it has no layout)."""
    layouts: dict[str, dict] = {}
    types: dict[str, list] = {}
    refused = dict(LEFT_OUT)
    for kind in causal_types():
        try:
            found = variants(kind)
        except Exception as e:
            refused[kind] = f"{type(e).__name__}: {str(e).splitlines()[0]}"
            continue
        for entry in found:
            if "layout" in entry:
                same = [n for n, other in layouts.items() if other == entry["layout"]]
                name = same[0] if same else _free(kind, layouts)
                layouts[name] = entry["layout"]
                entry["layout"] = name
        types[kind] = found
    made = {name: version(name) for name in ("transformer-lens", "transformers")}
    return {"made_with": made, "types": types, "layouts": layouts}, refused


def _free(kind: str, taken: dict) -> str:
    names = itertools.chain([kind], (f"{kind}_{i}" for i in itertools.count(2)))
    return next(n for n in names if n not in taken)


def text(found: dict[str, Any]) -> str:
    """families.json: one line per type and per hook."""
    return json.dumps(found, indent=1) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline adapters", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--check", action="store_true", help="compare only")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    with command("adapters"):
        found, refused = table()
        for kind, why in refused.items():
            print(f"{kind}: {why}"[:160], file=sys.stderr)
        print(f"{len(found['types'])} types, {len(found['layouts'])} layouts", file=sys.stderr)
        if args.check:
            sys.exit(families.TABLE.read_text(encoding="utf-8") != text(found))
        families.TABLE.write_text(text(found), encoding="utf-8")
