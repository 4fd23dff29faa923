"""Values and edits at hooks by plain PyTorch hooks on a Hugging Face module, without our layouts.

Modules are found by the names that modelling files give them, columns of joint projections as those
files split them, and norms by their formula. tests/models/test_settings.py holds ours equal to it.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ATTENTION = r"(self_attn|attn|attention|self_attention|attn\.attention)\."
WITHIN = {  # hook -> (pattern of a module's path within a layer, in or out)
    "attn.hook_z": (ATTENTION + r"(o_proj|out_proj|c_proj|dense|Wo)", "in"),
    "mlp.hook_in": (r"mlp|shared_mlp|feed_forward|block_sparse_moe|ffn|moe|fc1", "in"),
    "mlp.hook_post": (r"(mlp\.|ffn\.|feed_forward\.|shared_mlp\.|)"
                      r"(down_proj|c_proj|dense_4h_to_h|fc2|fc_out|w2|output_linear|Wo)", "in"),
    "mlp.hook_pre": (r"(mlp\.|ffn\.|feed_forward\.|)"
                     r"(gate_proj|c_fc|dense_h_to_4h|fc1|fc_in|w1|up_proj|Wi)", "out"),
    "mlp.hook_pre_linear": (r"(mlp|feed_forward)\.(up_proj|w3)", "out"),
    "mlp.hook_experts_out": (r"(mlp|block_sparse_moe|feed_forward)\.experts", "out"),
    "hook_attn_out": (ATTENTION[:-2] + r"|self_attention\.dense|\w*norm\w*|\w*ln\w*", "out"),
    # Bloom and MPT add the stream
    "hook_mlp_out": (r"mlp|shared_mlp|feed_forward|block_sparse_moe|ffn|moe|fc2|\w*norm\w*|"
                     r"\w*ln\w*|mlp\.dense_4h_to_h|ffn\.down_proj", "out"),
    "hook_resid_mid": (r"\w*norm\w*|\w*ln\w*|norm_\d|mlp|feed_forward", "in"),
}  # fmt: skip
SLOTS = {"q": "(q_proj|query)", "k": "(k_proj|key)", "v": "(v_proj|value)"}
JOINT = r"(qkv_proj|query_key_value|Wqkv|c_attn)"


@dataclass(frozen=True)
class Spot:
    """A module's input or output, or columns of it, times a number."""

    module: nn.Module
    side: str
    columns: Tensor | None = None
    scale: float = 1.0

    def value(self, raw: Tensor) -> Tensor:
        return (raw if self.columns is None else raw[..., self.columns]) * self.scale


def tensor_of(args: tuple, kwargs: dict) -> Tensor | None:
    """What a module reads."""
    found = args[0] if args else kwargs.get("hidden_states")
    return found if isinstance(found, Tensor) else None


def first(out: object) -> Tensor | None:
    """What a module writes; the first of several."""
    out = out[0] if isinstance(out, tuple | list) else out
    return out if isinstance(out, Tensor) else None


def layers_of(hf: nn.Module) -> nn.ModuleList:
    """The list of as many modules as the model has layers."""
    n = getattr(hf.config, "num_hidden_layers", None) or hf.config.n_layer
    return next(m for m in hf.modules() if isinstance(m, nn.ModuleList) and len(m) == n)


@contextmanager
def recorded(hf: nn.Module) -> Iterator[dict[tuple[nn.Module, str], Tensor]]:
    """Inside: a pass fills the dictionary, (module of a layer, in or out) -> its whole tensor."""
    seen: dict[tuple[nn.Module, str], Tensor] = {}

    def keep(key: tuple[nn.Module, str], x: Tensor | None) -> None:
        if x is not None:
            seen[key] = x.clone()  # Falcon adds to its MLP's output in place

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        keep((module, "in"), tensor_of(args, kwargs))

    def after(module: nn.Module, args: tuple, out: object) -> None:
        keep((module, "out"), first(out))

    with ExitStack() as stack:
        for layer in layers_of(hf):
            for module in layer.modules():
                handle = module.register_forward_pre_hook(before, with_kwargs=True)
                stack.callback(handle.remove)
                stack.callback(module.register_forward_hook(after).remove)
        yield seen


def joint_columns(config: object, slot: str, n: int, n_heads: int, d_head: int) -> Tensor:
    """Columns of q, k or v in a joint projection, as the type's modelling file splits it."""
    index, kind = torch.arange(n), config.model_type
    if kind in ("gpt_neox", "bloom") or (
        kind == "falcon" and not (config.new_decoder_architecture or config.multi_query)
    ):
        return index.view(n_heads, 3, d_head)[:, "qkv".index(slot)].flatten()
    if kind == "falcon" and config.new_decoder_architecture:
        each = index.view(config.num_kv_heads, -1, d_head)
        return {"q": each[:, :-2], "k": each[:, -2], "v": each[:, -1]}[slot].flatten()
    if kind == "codegen":
        each = index.view(4, -1)
        q, v, k = each.split(each.shape[1] // 3, dim=1)
        return {"q": q, "k": k, "v": v}[slot].flatten()
    rest = (n - n_heads * d_head) // 2  # GPT-2, MPT, GPT-BigCode, Phi-3
    return dict(zip("qkv", index.split([n_heads * d_head, rest, rest]), strict=True))[slot]


def spots(hf: nn.Module, number: int, hook: str) -> list[Spot]:
    """Where a hook of a layer may stand, by the names of modules; the value tells which it is."""
    layer, config = layers_of(hf)[number], hf.config
    if hook in ("hook_resid_pre", "hook_resid_post"):
        return [Spot(layer, "in" if hook.endswith("pre") else "out")]
    named = {name: m for name, m in layer.named_modules() if name and "dropout" not in name}
    n_heads = getattr(config, "num_attention_heads", None) or config.n_heads
    if re.fullmatch(r"attn\.hook_[qkv]", hook):
        slot = hook[-1]
        alone = [m for n, m in named.items() if re.fullmatch(ATTENTION + SLOTS[slot], n)]
        joint = [m for n, m in named.items() if re.fullmatch(ATTENTION + JOINT, n)]
        (end,) = [m for n, m in named.items() if re.fullmatch(WITHIN["attn.hook_z"][0], n)]
        d_head = weight(end).shape[1] // n_heads
        return [Spot(m, "out") for m in alone] + [
            Spot(m, "out", joint_columns(config, slot, len(weight(m)), n_heads, d_head))
            for m in joint
        ]
    pattern, side = WITHIN[hook]
    found = [m for n, m in named.items() if re.fullmatch(pattern, n)]
    scales = {1.0, float(getattr(config, "residual_multiplier", None) or 1.0)}
    scales = sorted(scales) if hook.endswith("_out") else [1.0]
    out = [Spot(m, side, None, s) for m in found for s in scales]
    if hook in ("mlp.hook_pre", "mlp.hook_pre_linear"):
        for name, m in named.items():
            if name.endswith(("gate_up_proj", "input_linear")) and isinstance(m, nn.Linear):
                half = torch.arange(len(weight(m))).chunk(2)
                out.append(Spot(m, side, half[hook.endswith("linear")]))
    return out


def weight(module: nn.Module) -> Tensor:
    """[d_out d_in] of a linear map; GPT-2's Conv1D holds it the other way round."""
    return module.weight if isinstance(module, nn.Linear) else module.weight.T


def normalised(norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """(x in units of its size, its size) of a norm, by the formulas of layer and RMS norm."""
    x = x.double()
    if "LayerNorm" in type(norm).__name__ and "RMS" not in type(norm).__name__:
        x = x - x.mean(-1, keepdim=True)
    names = ("eps", "variance_epsilon")
    eps = next((getattr(norm, n) for n in names if getattr(norm, n, None) is not None), 1e-5)
    size = (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x / size, size


@contextmanager
def edited(spot: Spot, fn: Callable[[Tensor], Tensor], batch: int) -> Iterator[None]:
    """Inside: fn of the value at a spot, [batch pos d], stands in its place."""

    def new(raw: Tensor) -> Tensor:
        rows = raw.view(batch, -1, raw.shape[-1]).clone()
        if spot.columns is None:
            rows = fn(rows * spot.scale) / spot.scale
        else:
            rows[..., spot.columns] = fn(rows[..., spot.columns])
        return rows.view(raw.shape)

    def before(_: nn.Module, args: tuple, kwargs: dict) -> tuple:
        changed = new(tensor_of(args, kwargs))
        return ((changed, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": changed})

    def after(_: nn.Module, __: tuple, out: object) -> object:
        several = isinstance(out, tuple | list)
        return type(out)([new(out[0]), *out[1:]]) if several else new(out)

    if spot.side == "in":
        handle = spot.module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = spot.module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()
