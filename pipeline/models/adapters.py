"""Write families.json: the hooks of every causal model type, out of TransformerLens's adapters.

    python -m pipeline adapters             writes pipeline/spec/families.json
    python -m pipeline adapters --check     compares it with the adapters; exit code 1 if it differs

1. For each type that AutoModelForCausalLM loads, a config of a few hundred weights is made, and
   from it TransformerLens's adapter, without weights.
2. `component_mapping` names the modules, and each component's `hook_aliases` the component and
   side of a hook. `layout_of` resolves them to paths within a layer.
3. A switch of the config that changes the layout (GPT-NeoX's parallel residual) makes a variant.
4. A tiny random model is built, and only hooks whose modules it has are kept. The columns of a
   joint projection are read off by letting the adapter split a matrix of row numbers.

Importing TransformerLens takes 15 s, so that no stage does this; a test holds the file equal.
"""

import argparse
import copy
import itertools
import json
import logging
import sys
import warnings
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from pipeline.errors import RetraceError, command
from pipeline.models.tiny_models import tiny_config, tiny_model, with_architecture
from pipeline.spec import families

# Settings that are no booleans and change a layout.
VALUES = {"num_ln_in_parallel_attn": (None, 1, 2)}
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
# Joint projections of which the adapter splits columns in another way than the model does.
COLUMNS = {
    "falcon": "FalconAttention._split_heads groups by key head where new_decoder_architecture is "
    "set; TransformerLens 3.9 splits in three blocks there",
}
# Hooks that an adapter places per layer, which one layout does not express; and experts that give
# a row for each expert and token.
DROPPED = {
    "olmo_hybrid": ("hook_attn_out", "hook_mlp_out"),
    "llama4_text": ("mlp.hook_experts_out",),
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


# --- one layout ----------------------------------------------------------------------------


def joined(*paths: str | None) -> str:
    return ".".join(p for p in paths if p)


def place_of(block: Any, target: str) -> str:
    """'self_attn.o_proj in' for the alias target 'attn.o.hook_in' of a block; '' for others."""
    *names, side = target.split(".")
    component, path = block, ""
    for name in names:
        component = component.submodules.get(name)
        if component is None:
            return ""
        path = joined(path, component.name)
    if side not in ("hook_in", "hook_out"):
        return ""
    return f"{path} {side.removeprefix('hook_')}".strip()


def layout_of(adapter: Any) -> dict[str, Any]:
    """The layout of an adapter, but for the columns of joint projections.

    Raises:
        ValueError: it has no single list of layers, or no module for each hook.
    """
    mapping = adapter.component_mapping
    if "blocks" not in mapping or "embed" not in mapping:
        raise ValueError("its layers are not one list")
    block = mapping["blocks"]
    parts = {p: block.submodules[p].name or "" for p in families.PARTS if p in block.submodules}
    out: dict[str, Any] = {
        "embed": mapping["embed_ln" if "embed_ln" in mapping else "embed"].name,
        "layers": block.name,
        "final_norm": mapping["ln_final"].name if "ln_final" in mapping else "",
        "parts": {k: v for k, v in parts.items() if v},
        "hooks": {},
    }
    aliases = dict(block.hook_aliases)
    for part in ("attn", "mlp"):
        component = block.submodules.get(part)
        if component is not None:
            out["hooks"] |= hooks_of(block, part, component)
            aliases |= scaled(block, part)
    out["experts"] = "MoE" in type(block.submodules.get("mlp")).__name__
    for hook in families.LAYER_HOOKS:
        if hook in aliases and (place := place_of(block, aliases[hook])):
            out["hooks"].setdefault(hook, place)
        elif aliases.get(hook, "").endswith(" scaled"):
            out["hooks"][hook] = aliases[hook].removesuffix(" scaled")
    if not {"hook_resid_pre", "hook_resid_post"} <= set(out["hooks"]):
        raise ValueError("its layers have no stream before and behind them")
    out["bridge"] = {
        hook: target
        for hook, target in own_names(block, aliases).items()
        if hook in out["hooks"] and target != families.BRIDGE_NAMES.get(hook, hook)
    }
    for hook in DROPPED.get(adapter.cfg.model_name, ()):
        out["hooks"].pop(hook, None)
    return out | {"hooks": ordered(out["hooks"])}


def own_names(block: Any, aliases: dict[str, str]) -> dict[str, str]:
    """Hook -> what the bridge calls it itself, such as attn.o.hook_in for attn.hook_z."""
    out = {h: t for h, t in aliases.items() if isinstance(t, str) and " " not in t}
    for part in ("attn", "mlp"):
        for alias, target in getattr(block.submodules.get(part), "hook_aliases", {}).items():
            if isinstance(target, str):
                out[f"{part}.{alias}"] = f"{part}.{target}"
    return out


def scaled(block: Any, part: str) -> dict[str, str]:
    """hook_attn_out or hook_mlp_out where a block multiplies what a part writes (Granite)."""
    scale = getattr(block, "residual_contribution_scale", None)
    named = getattr(block, f"scaled_{part}_submodule", None)
    if scale is None or named not in block.submodules:
        return {}
    place = f"{block.submodules[named].name} out times residual_multiplier scaled"
    return {f"hook_{part}_out": place}


def hooks_of(block: Any, part: str, component: Any) -> dict[str, str]:
    """Hooks inside attention or MLP: hook -> place, by the component's own aliases."""
    out = {}
    if part == "mlp":
        inner = "" if component.name else "in."
        out["mlp.hook_in"] = place_of(block, f"mlp.{inner}hook_in")
    for alias, target in component.hook_aliases.items():
        hook = f"{part}.{alias}"
        if hook in families.LAYER_HOOKS and isinstance(target, str) and "." in target:
            out[hook] = place_of(block, f"{part}.{target}")
    qkv = component.submodules.get("qkv")
    if part == "attn" and qkv is not None:
        joint = joined(component.name, qkv.name)
        out |= {f"attn.hook_{s}": f"{joint} {s} of qkv" for s in "qkv"}
    if fused := getattr(component, "fused_attr", None):
        joint = joined(component.name, fused)
        out["mlp.hook_pre"] = f"{joint} first half"
        out["mlp.hook_pre_linear"] = f"{joint} second half"
    if "MoE" in type(component).__name__:  # its own aliases name the whole block; dense layers
        dense = {k: v for k, v in component.submodules.items() if k.startswith("dense_")}
        out = {k: v for k, v in out.items() if k == "mlp.hook_in"}
        if {"dense_gate", "dense_in", "dense_out"} <= set(dense):
            out["mlp.hook_pre"] = place_of(block, "mlp.dense_gate.hook_out")
            out["mlp.hook_pre_linear"] = place_of(block, "mlp.dense_in.hook_out")
            out["mlp.hook_post"] = place_of(block, "mlp.dense_out.hook_in")
    return {k: v for k, v in out.items() if v}


# --- against a tiny model ------------------------------------------------------------------


def completed(layout: dict[str, Any], hf: nn.Module, adapter: Any) -> dict[str, Any]:
    """The layout with hooks that a model of the type has, and its columns and flat modules."""

    found = list(hf.get_submodule(layout["layers"]))

    def has(path: str) -> bool:
        return any(_reach(layer, path) is not None for layer in found)

    def path_of(place: str) -> str:
        return families.PLACE.fullmatch(place)[1] or ""

    layout = layout | {
        "hooks": {h: p for h, p in layout["hooks"].items() if has(path_of(p))},
        "parts": {n: p for n, p in layout["parts"].items() if has(p)},
    }
    experts, dropped = expert_hooks(layout, found), DROPPED.get(hf.config.model_type, ())
    layout["hooks"] |= {h: p for h, p in experts.items() if h not in dropped}
    layout["hooks"] = ordered(layout["hooks"])
    if _reach(hf, layout["final_norm"]) is None or not _once_at_the_end(hf, layout["final_norm"]):
        layout["final_norm"] = ""
    base = "" if hf.base_model is hf else f"{hf.base_model_prefix}."  # Llama 4 has no base model
    if not layout["final_norm"].startswith(base):  # a part of the head (BERT)
        layout["final_norm"] = ""
    form = columns(layout, hf, adapter)
    layout["hooks"] = {h: p.replace(" of qkv", f" of {form}") for h, p in layout["hooks"].items()}
    hf.retrace_layout = families.Layout(**layout)
    layout["flat"], layout["overwritten"] = seen_in(hf)
    return {k: v for k, v in layout.items() if v}


def ordered(found: dict[str, str]) -> dict[str, str]:
    """Hooks in the order in which a layer computes them."""
    return dict(sorted(found.items(), key=lambda item: families.LAYER_HOOKS.index(item[0])))


def expert_hooks(layout: dict[str, Any], layers: list[nn.Module]) -> dict[str, str]:
    """Hooks of a mixture of experts: its router, and its experts where one module sums them."""
    path, out = layout["parts"].get("mlp", ""), {}
    for layer in layers if layout.get("experts") else []:
        for name in ("gate", "router"):
            if any(True for _ in getattr(_reach(layer, f"{path}.{name}"), "parameters", list)()):
                out["mlp.hook_expert_weights"] = f"{path}.{name} probabilities"
        if isinstance(_reach(layer, f"{path}.experts"), nn.Module):
            out["mlp.hook_experts_out"] = f"{path}.experts out"
    return out


def seen_in(hf: nn.Module) -> tuple[bool, list[str]]:
    """What a forward pass shows of a layout.

    Returns:
        Whether some module of a layer sees sequences run together, [batch*pos d] (OPT), and the
        hooks whose tensor is added to in place later (Falcon's MLP output).
    """
    from pipeline.models import hooks, proof

    tokens, names = torch.tensor([[1, 3, 4], [1, 5, 6]]), hooks.hook_names(hf)
    with torch.no_grad(), hooks.capture(hf, names) as acts:
        hf.base_model(input_ids=tokens, use_cache=False)
        late = proof.overwritten(hf, names, tokens)
    return any(x.dim() == 2 for x in acts.values()), sorted(late)


def _once_at_the_end(hf: nn.Module, path: str) -> bool:
    """Whether the final norm runs once in a pass of the base model (nanochat's runs twice)."""
    calls: list[int] = []
    handle = hf.get_submodule(path).register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        hf.base_model(input_ids=torch.tensor([[1, 3, 4]]), use_cache=False)
    handle.remove()
    return len(calls) == 1


def _reach(module: nn.Module, path: str) -> nn.Module | None:
    for part in path.split(".") if path else ():
        module = getattr(module, part, None)
    return module


def columns(layout: dict[str, Any], hf: nn.Module, adapter: Any) -> str:
    """How the columns of a joint projection lie: the adapter splits a matrix of row numbers."""
    attn = adapter.component_mapping["blocks"].submodules.get("attn")
    if attn is None or "qkv" not in attn.submodules:
        return "qkv"
    if hf.config.model_type in COLUMNS and hf.config.new_decoder_architecture:
        return "group"
    module = copy.deepcopy(hf.get_submodule(layout["layers"])[0].get_submodule(attn.name))
    joint = module.get_submodule(attn.submodules["qkv"].name)
    transposed = not isinstance(joint, nn.Linear)  # GPT-2's Conv1D
    n = joint.weight.shape[1 if transposed else 0]
    rows = torch.arange(n, dtype=torch.float32)
    with torch.no_grad():
        joint.weight.copy_(rows.expand_as(joint.weight) if transposed else rows[:, None])
    split = attn.split_qkv_matrix(module)
    got = {s: m.weight[:, 0].long().tolist() for s, m in zip("qkv", split, strict=True)}
    from pipeline.models.places import slots

    n_heads = hf.config.num_attention_heads
    for form in ("qkv", "group", "codegen"):
        ours = slots(form, n, n_heads, len(got["q"]) // n_heads)
        if ours and all(ours[s].tolist() == got[s] for s in "qkv"):
            return form
    raise RetraceError(
        f"model type '{hf.config.model_type}': its joint projection has columns in an order that "
        f"pipeline/models/places.py does not know; add it to places.slots"
    )


def variants(kind: str) -> list[dict[str, Any]]:
    """Layouts of a type: {'when': settings, 'layout': one}, the settings that matter only."""
    plain = with_architecture(tiny_config(kind))
    first = layout_of(adapter_of(plain))
    switches = {k: (v, not v) for k, v in plain.to_dict().items() if isinstance(v, bool)}
    switches |= {k: v for k, v in VALUES.items() if k in plain.to_dict()}
    others = {k: [x for x in v if x != getattr(plain, k)] for k, v in switches.items()}
    matter = {k: v for k, v in switches.items() if _matters(kind, k, others[k], first)}
    out = []
    for chosen in itertools.product(*matter.values()):
        when = dict(zip(matter, chosen, strict=True))
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


def _matters(kind: str, key: str, values: list, first: dict[str, Any]) -> bool:
    """Whether other values of a setting change the layout, or the columns of a joint projection."""
    for value in values:
        try:
            adapter = adapter_of(with_architecture(tiny_config(kind, **{key: value})))
            if layout_of(adapter) != first:
                return True
        except Exception:  # a setting that the config or the adapter does not take
            continue
    return key in ("multi_query", "new_decoder_architecture")


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
