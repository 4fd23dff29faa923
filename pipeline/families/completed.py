"""A layout held against a tiny random model of its type. [torch]

1. Only hooks and parts whose modules the model has are kept; a router and its experts are found.
2. A final norm counts if it runs in the base model; if it runs more than once, without hooks.
3. The columns of a joint projection are read off by letting the adapter split a matrix of row
   numbers.
4. A forward pass shows flattened sequences, and tensors that are overwritten later.
"""

import copy
from typing import Any

import torch
from torch import nn

from pipeline.errors import RetraceError
from pipeline.families.layouts import DROPPED, ordered
from pipeline.models import hooks, proof
from pipeline.models.places import slots
from pipeline.spec import families

# Joint projections of which the adapter splits columns in another way than the model does.
COLUMNS = {
    "falcon": "FalconAttention._split_heads groups by key head where new_decoder_architecture is "
    "set; TransformerLens 3.9 splits in three blocks there",
}
# Norms of which the adapter names another one, or none: of these paths, the one that a model has.
NORMS = {
    "falcon": {
        "ln1": ("ln_attn", "input_layernorm"),
        "ln2": ("ln_mlp", "post_attention_layernorm"),
    },
}
# MLPs that an adapter leaves out, since experts may stand beside them: where a model has none.
ALONE = {
    "granitemoehybrid": {
        "hooks": {
            "mlp.hook_in": "shared_mlp in",
            "mlp.hook_pre": "shared_mlp.input_linear first half",
            "mlp.hook_pre_linear": "shared_mlp.input_linear second half",
            "mlp.hook_post": "shared_mlp.output_linear in",
            "hook_mlp_out": "shared_mlp out times residual_multiplier",
        },
        "parts": {"mlp": "shared_mlp"},
    },
}


def completed(layout: dict[str, Any], hf: nn.Module, adapter: Any) -> dict[str, Any]:
    """The layout with hooks that a model of the type has, and its columns and flat modules."""

    found = list(hf.get_submodule(layout["layers"]))

    def has(path: str) -> bool:
        return any(_reach(layer, path) is not None for layer in found)

    def path_of(place: str) -> str:
        return families.PLACE.fullmatch(place)[1] or ""

    kind = hf.config.model_type
    norms = NORMS.get(kind, {}).items()
    alone = {} if getattr(hf.config, "num_local_experts", 0) else ALONE.get(kind, {})
    hooks_of, parts = (layout[k] | alone.get(k, {}) for k in ("hooks", "parts"))
    parts |= {n: p for n, paths in norms for p in paths if has(p)}
    layout = layout | {
        "hooks": {h: p for h, p in hooks_of.items() if has(path_of(p))},
        "parts": {n: parts[n] for n in families.PARTS if n in parts and has(parts[n])},
    }
    experts, dropped = expert_hooks(layout, found), DROPPED.get(kind, ())
    layout["hooks"] |= {h: p for h, p in experts.items() if h not in dropped}
    layout["hooks"] = ordered(layout["hooks"])
    n_calls = _calls_of(hf, layout["final_norm"])
    layout["norm_again"] = n_calls > 1
    if not n_calls:
        layout["final_norm"] = ""
    base = "" if hf.base_model is hf else f"{hf.base_model_prefix}."  # Llama 4 has no base model
    if not layout["final_norm"].startswith(base):  # a part of the head (BERT)
        layout["final_norm"] = ""
    form = columns(layout, hf, adapter)
    layout["hooks"] = {h: p.replace(" of qkv", f" of {form}") for h, p in layout["hooks"].items()}
    hf.retrace_layout = families.Layout(**layout)
    layout["flat"], layout["overwritten"] = seen_in(hf)
    return {k: v for k, v in layout.items() if v}


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
    tokens, names = torch.tensor([[1, 3, 4], [1, 5, 6]]), hooks.hook_names(hf)
    with torch.no_grad(), hooks.capture(hf, names) as acts:
        hf.base_model(input_ids=tokens, use_cache=False)
        late = proof.overwritten(hf, names, tokens)
    return any(x.dim() == 2 for x in acts.values()), sorted(late)


def _calls_of(hf: nn.Module, path: str) -> int:
    """How often the final norm runs in a pass of the base model; nanochat's runs twice."""
    if not path or (norm := _reach(hf, path)) is None:
        return 0
    calls: list[int] = []
    handle = norm.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        hf.base_model(input_ids=torch.tensor([[1, 3, 4]]), use_cache=False)
    handle.remove()
    return len(calls)


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
    n_heads = hf.config.num_attention_heads
    for form in ("qkv", "group", "codegen"):
        ours = slots(form, n, n_heads, len(got["q"]) // n_heads)
        if ours and all(ours[s].tolist() == got[s] for s in "qkv"):
            return form
    raise RetraceError(
        f"model type '{hf.config.model_type}': its joint projection has columns in an order that "
        f"pipeline/models/places.py does not know; add it to places.slots"
    )
