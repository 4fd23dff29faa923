"""A layout out of one of TransformerLens's adapters: where a type's modules and hooks lie. [torch]

1. `component_mapping` names the modules, and each component's `hook_aliases` the component and
   side of a hook.
2. `layout_of` resolves them to paths within a layer, in the form of `families.Layout`.

Which of these hooks a model of the type really has is seen in one: completed.py.
"""

from typing import Any

from pipeline.spec import families

# Hooks that an adapter places per layer, which one layout does not express; and experts that give
# a row for each expert and token.
DROPPED = {
    "olmo_hybrid": ("hook_attn_out", "hook_mlp_out"),
    "llama4_text": ("mlp.hook_experts_out",),
}


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


def ordered(found: dict[str, str]) -> dict[str, str]:
    """Hooks in the order in which a layer computes them."""
    return dict(sorted(found.items(), key=lambda item: families.LAYER_HOOKS.index(item[0])))
