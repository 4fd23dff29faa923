"""Attention heads inside the modules of a Hugging Face causal LM: z, queries, keys, values, W_O.

    q, k, v = projections(ln1(x)),   z_h = softmax(q_h k_h^T) v_h,   attn_out = sum_h z_h W_O[h] + b

A head's z is a slice of what the output projection reads, and its q, k or v a slice of what the
input projections write, so plain forward hooks reach every head without splitting the module.
Where several query heads share a key (grouped-query attention), k and v are counted by key head.
hooks.py has the streams of whole layers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.errors import RetraceError
from pipeline.models import hooks, places

Slot = Literal["q", "k", "v"]
SLOTS: tuple[Slot, ...] = ("q", "k", "v")


@dataclass(frozen=True)
class Place:
    """Where a head's q, k or v lies: in these columns of a module's output."""

    module: nn.Module
    columns: slice


class Heads:
    """The attention heads of a model, and what attention and MLP of a layer read and write.

    Attributes:
        n_layers, n_heads, d_head, d_model: as in TransformerLens.
        n_key_heads: heads of keys and values; n_heads where none are shared.
        parallel: the MLP reads the stream before attention, so that there is no resid_mid.
    """

    def __init__(self, hf: nn.Module) -> None:
        hooks.require(hf, "heads")
        self.hf, self.names, self.layers = hf, hooks.family(hf), hooks.layers_of(hf)
        kind, known = hf.config.model_type, set(hooks.hook_names(hf))
        needed = ["hook_resid_pre", "attn.hook_z", "hook_attn_out", "hook_resid_post"]
        for i in range(len(self.layers)):
            for at in [*needed, *(f"attn.hook_{s}" for s in SLOTS)]:
                if f"blocks.{i}.{at}" not in known:
                    raise RetraceError(
                        f"model type '{kind}' has no heads here, since its layer {i} has no {at}; "
                        f"activations of its other hooks can be stored"
                    )
        hooks.answer_of(hf, self.layers[0])  # now, before anybody edits the model
        cfg = hf.config
        self.n_layers, self.d_model = len(self.layers), cfg.hidden_size
        self.n_heads = getattr(cfg, "num_attention_heads", None) or cfg.n_heads
        self.parallel = "blocks.0.hook_resid_mid" not in known and "blocks.0.hook_mlp_out" in known
        self.d_head = self.W_O(0).shape[1]
        widths = [len(self.columns(0, slot)) // self.d_head for slot in SLOTS]
        self.n_key_heads = widths[1]
        if widths[0] != self.n_heads or widths[1] != widths[2] or self.n_heads % widths[1]:
            raise RetraceError(
                f"model type '{kind}' has no heads here, since its layer 0 has queries, keys and "
                f"values of {', '.join(map(str, widths))} heads, where z has {self.n_heads}"
            )

    def site(self, layer: int, at: str) -> places.Place:
        """The place of a hook of a layer, such as attn.hook_z."""
        return hooks.site(self.hf, f"blocks.{layer}.{at}")

    def attn(self, layer: int) -> nn.Module:
        return hooks.submodule(self.layers[layer], self.names.attn)

    def out(self, layer: int) -> nn.Module:
        """The output projection, which reads z [batch pos n_heads*d_head]."""
        return hooks.submodule(self.layers[layer], self.names.place("attn.hook_z")[0])

    def W_O(self, layer: int) -> Tensor:
        """[n_heads d_head d_model]."""
        out = self.out(layer)
        weight = out.weight.T if isinstance(out, nn.Linear) else out.weight  # GPT-2: transposed
        return weight.unflatten(0, (self.n_heads, -1))

    def b_O(self, layer: int) -> Tensor | float:
        """[d_model]: what attention writes that no head does; 0 where there is no bias."""
        bias = getattr(self.out(layer), "bias", None)
        return 0.0 if bias is None else bias

    def count(self, slot: Slot) -> int:
        """How many q, k or v a layer has."""
        return self.n_heads if slot == "q" else self.n_key_heads

    def module_of(self, layer: int, slot: Slot) -> nn.Module:
        """The input projection that writes a slot; one module may write all three."""
        return hooks.submodule(self.layers[layer], self.names.place(f"attn.hook_{slot}")[0])

    def columns(self, layer: int, slot: Slot) -> Tensor:
        """The columns of a slot in the output of its projection, head by head."""
        place, module = self.site(layer, f"attn.hook_{slot}"), self.module_of(layer, slot)
        width = module.weight.shape[0 if isinstance(module, nn.Linear) else 1]
        every = torch.arange(width)
        return every if place.columns is None else every[place.columns]

    def place(self, layer: int, slot: Slot, head: int) -> Place:
        """Where q, k or v of a head lies."""
        mine = self.columns(layer, slot)[head * self.d_head : (head + 1) * self.d_head]
        return Place(self.module_of(layer, slot), places.as_slice(mine))

    def read(self, layer: int, slot: Slot, x: Tensor) -> Tensor:
        """Queries, keys or values [... count*d_head] of the stream x before its layer."""
        out = self.module_of(layer, slot)(self.attn_reads(layer, x))
        place = self.site(layer, f"attn.hook_{slot}")
        return out if place.columns is None else out[..., place.columns]

    def attn_reads(self, layer: int, x: Tensor) -> Tensor:
        """What the input projections read, of the stream x before the layer."""
        reader = hooks.first_reader(self.names, self.layers[layer])
        return x if reader is self.attn(layer) else reader(x)

    def post(self, layer: int, part: str) -> tuple[float, nn.Module | None]:
        """(what a part's output is multiplied with, the norm behind it), of attn or mlp."""
        place, norm = hooks.written_by(self.hf, self.layers[layer], part)
        return place.scale, norm

    def written(self, z: Tensor, layer: int) -> Tensor:
        """What each head adds to the stream, [... n_heads d_model], of z [... n_heads*d_head].

        Where a norm follows attention (Gemma 2), its scale is kept as z makes it, so that parts
        sum.
        """
        by_head = z.unflatten(-1, (self.n_heads, self.d_head))
        raw = torch.einsum("...hd,hdm->...hm", by_head, self.W_O(layer))
        scale, norm = self.post(layer, "attn")
        if norm is not None:
            raw = _kept(norm, raw.sum(-2) + self.b_O(layer), raw)
        return raw if scale == 1.0 else raw * scale

    def rest(self, z: Tensor, layer: int) -> Tensor:
        """What attention adds to the stream beside its heads: biases, [... d_model]."""
        scale, norm = self.post(layer, "attn")
        if norm is None:
            return (torch.zeros_like(z[..., :1]) + self.b_O(layer)).expand(
                *z.shape[:-1], self.d_model
            ) * scale
        return self.attn_writes(layer, z) - self.written(z, layer).sum(-2)

    def attn_writes(self, layer: int, z: Tensor) -> Tensor:
        """What attention adds to the stream, [... d_model], of z [... n_heads*d_head]."""
        by_head = z.unflatten(-1, (self.n_heads, self.d_head))
        whole = torch.einsum("...hd,hdm->...m", by_head, self.W_O(layer)) + self.b_O(layer)
        scale, norm = self.post(layer, "attn")
        return (whole if norm is None else norm(whole)) * scale

    def mlp_reads(self, layer: int, x: Tensor) -> Tensor:
        """What the MLP reads, of the stream before it: resid_pre in parallel, else resid_mid."""
        norm = self.mlp_norm(layer)
        return x if norm is None else norm(x)

    def mlp_norm(self, layer: int) -> nn.Module | None:
        """The norm before the MLP; GPT-J's and Phi's is that of attention; OLMo 2's has none."""
        parts, module = self.names.parts, self.layers[layer]
        out = (self.names.place("hook_mlp_out") or ("", ""))[0]
        name = "ln2" if "ln2" in parts else "ln1"
        if parts.get(name) == out or name not in parts:
            return None
        return hooks.submodule(module, parts[name])

    def mlp_writes(self, layer: int, x: Tensor) -> Tensor:
        """What the MLP adds to the stream, of the stream x that it reads, [... d_model]."""
        module, y = self.layers[layer], self.mlp_reads(layer, x)
        if self.names.mlp:
            y = hooks.submodule(module, self.names.mlp)(y)
            y = y[0] if isinstance(y, tuple) else y
        else:  # its maps stand in the layer itself (OPT)
            first, last = (self.names.place(f"mlp.hook_{h}")[0] for h in ("in", "post"))
            act = module.activation_fn
            y = hooks.submodule(module, last)(act(hooks.submodule(module, first)(y)))
        scale, norm = self.post(layer, "mlp")
        y = y if norm is None else norm(y)
        return y if scale == 1.0 else y * scale

    @contextmanager
    def z_edited(self, layer: int, fn: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
        """Inside: fn sees z [batch pos n_heads*d_head], and what it returns replaces it."""

        def before(_: nn.Module, args: tuple):
            new = fn(args[0])
            return None if new is None else (new, *args[1:])

        handle = self.out(layer).register_forward_pre_hook(before)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def set_inputs(self, values: dict[Any, tuple[Tensor, Tensor, Tensor]]) -> Iterator[None]:
        """Inside: q, k or v of some heads are replaced at some rows and positions.

        Args:
            values: (layer, slot, head) -> rows [m], positions [m] and new values [m d_head].
        """
        handles = []
        for (layer, slot, head), (rows, at, new) in values.items():
            place = self.place(layer, slot, head)
            columns = torch.arange(place.columns.start, place.columns.stop, device=new.device)

            def after(_: nn.Module, __: tuple, out: Tensor, r=rows, a=at, c=columns, v=new):
                out = out.clone()
                out[r[:, None], a[:, None], c] = v
                return out

            handles.append(place.module.register_forward_hook(after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def patterns(self, tokens: Tensor) -> list[Tensor]:
        """Attention of every layer, [batch n_heads query key], of tokens [batch pos]."""
        if self.hf.config.model_type == "retrace_native":
            ln1 = [f"blocks.{i}.hook_resid_pre" for i in range(self.n_layers)]
            acts = hooks.run_to(self.hf, tokens, ln1)
            return [
                self.attn(i).pattern(self.attn_reads(i, acts[hook])) for i, hook in enumerate(ln1)
            ]
        before = self.hf.config._attn_implementation
        self.hf.set_attn_implementation("eager")  # the others never form the pattern
        seen: list[Tensor] = []

        def after(_: nn.Module, __: tuple, out: Any) -> None:
            seen.append(out[1])

        handles = [self.attn(i).register_forward_hook(after) for i in range(self.n_layers)]
        try:
            self.hf.base_model(input_ids=tokens, use_cache=False)
        finally:
            self.hf.set_attn_implementation(before)
            for handle in handles:
                handle.remove()
        return seen


def _kept(norm: nn.Module, x: Tensor, parts: Tensor) -> Tensor:
    """A norm of x [... d] on parts [... n d] of x, with the scale that x has; no bias."""
    _, size, _ = places.standardised(norm, x)
    return places.linear_part(norm, parts) / size[..., None, :]
