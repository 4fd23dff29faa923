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

from pipeline.errors import RetraceError, nearest
from pipeline.models import hooks

Slot = Literal["q", "k", "v"]
SLOTS: tuple[Slot, ...] = ("q", "k", "v")
# Input projections, one each for q, k and v or one for all three; and the output projection.
LLAMA = ({"q": "q_proj", "k": "k_proj", "v": "v_proj"}, "o_proj")
PROJECTIONS = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gpt2": (dict.fromkeys(SLOTS, "c_attn"), "c_proj"),
    "retrace_native": ({"q": "q", "k": "k", "v": "v"}, "o"),
}


@dataclass(frozen=True)
class Place:
    """Where a head's q, k or v lies: in these columns of a module's output."""

    module: nn.Module
    columns: slice


class Heads:
    """The attention heads of a model.

    Attributes:
        n_layers, n_heads, d_head, d_model: as in TransformerLens.
        n_key_heads: heads of keys and values; n_heads where none are shared.
    """

    def __init__(self, hf: nn.Module) -> None:
        kind = hf.config.model_type
        if kind not in PROJECTIONS:
            raise RetraceError(
                f"model type '{kind}'{nearest(kind, PROJECTIONS)} has no heads here; supported are "
                f"{', '.join(PROJECTIONS)}; add an entry to PROJECTIONS in pipeline/models/heads.py"
            )
        self.hf, self.names = hf, hooks.family(hf)
        self.inputs, self.end = PROJECTIONS[kind]
        cfg = hf.config
        self.layers = hf.get_submodule(self.names.layers)
        self.n_layers, self.d_model = len(self.layers), cfg.hidden_size
        self.n_heads = getattr(cfg, "num_attention_heads", None) or cfg.n_heads
        self.n_key_heads = getattr(cfg, "num_key_value_heads", None) or self.n_heads
        self.d_head = self.W_O(0).shape[1]

    def attn(self, layer: int) -> nn.Module:
        return getattr(self.layers[layer], self.names.attn)

    def out(self, layer: int) -> nn.Module:
        """The output projection, which reads z [batch pos n_heads*d_head]."""
        return getattr(self.attn(layer), self.end)

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

    def place(self, layer: int, slot: Slot, head: int) -> Place:
        """Where q, k or v of a head lies."""
        start = head * self.d_head
        if len(set(self.inputs.values())) == 1:  # one module for all three
            start += SLOTS.index(slot) * self.n_heads * self.d_head
        module = getattr(self.attn(layer), self.inputs[slot])
        return Place(module, slice(start, start + self.d_head))

    def read(self, layer: int, slot: Slot, x: Tensor) -> Tensor:
        """What the input projection of a slot gives for the stream x before its layer.

        [... count*d_head]; where one module has all three slots, all of them.
        """
        module = getattr(self.attn(layer), self.inputs[slot])
        return module(getattr(self.layers[layer], self.names.ln1)(x))

    def written(self, z: Tensor, layer: int) -> Tensor:
        """What each head adds to the stream, [... n_heads d_model], of z [... n_heads*d_head]."""
        by_head = z.unflatten(-1, (self.n_heads, self.d_head))
        return torch.einsum("...hd,hdm->...hm", by_head, self.W_O(layer))

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
                self.attn(i).pattern(getattr(self.layers[i], self.names.ln1)(acts[hook]))
                for i, hook in enumerate(ln1)
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
