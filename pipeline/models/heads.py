"""Attention heads inside the modules of a Hugging Face causal LM: z, queries, keys, values, W_O.

    q, k, v = projections(ln1(x)),   z_h = softmax(q_h k_h^T) v_h,   attn_out = sum_h z_h W_O[h] + b

A head's z is a slice of what the output projection reads, and its q, k or v a slice of what the
input projections write, so plain forward hooks reach every head without splitting the module.
Where several query heads share a key (grouped-query attention), k and v are counted by key head.

`Heads` is where circuits/ meets the names and forms of a family's modules: joint projections,
transposed weights (GPT-2), norms behind attention (Gemma 2), MLPs without a module (OPT). Nothing
there asks which family it has. hooks.py has the streams of whole layers.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pipeline.errors import RetraceError
from pipeline.models import hooks, inner, modules, places

Slot = Literal["q", "k", "v"]
SLOTS: tuple[Slot, ...] = ("q", "k", "v")


@dataclass(frozen=True)
class HeadColumns:
    """The columns of a module's output that hold one head's q, k or v."""

    module: nn.Module
    columns: slice


class Heads:
    """The attention heads of a model, and what attention and MLP of a layer read and write.

    In shapes, d_z = n_heads * d_head.

    Attributes:
        n_layers, n_heads, d_head, d_model: as in TransformerLens.
        n_key_heads: heads of keys and values; n_heads where none are shared.
        parallel: the MLP reads the stream before attention, so that there is no resid_mid.
    """

    def __init__(self, hf: nn.Module) -> None:
        hooks.require(hf, "heads")
        self.hf, self.names, self.layers = hf, modules.family(hf), modules.layers_of(hf)
        kind, known = hf.config.model_type, set(hooks.hook_names(hf))
        needed = ["hook_resid_pre", "attn.hook_z", "hook_attn_out", "hook_resid_post"]
        for i in range(len(self.layers)):
            for at in [*needed, *(f"attn.hook_{s}" for s in SLOTS)]:
                if f"blocks.{i}.{at}" not in known:
                    raise RetraceError(
                        f"model type '{kind}' has no heads here, since its layer {i} has no {at}; "
                        f"activations of its other hooks can be stored"
                    )
        modules.answer_of(hf, self.layers[0])  # now, before anybody edits the model
        self.home = modules.home(hf)
        cfg = hf.config
        self.n_layers, self.d_model = len(self.layers), cfg.hidden_size
        self.n_heads = modules.n_heads_of(hf, 0)
        self.parallel = "blocks.0.hook_resid_mid" not in known and "blocks.0.hook_mlp_out" in known
        self.d_head = places.weight_of(self.out(0)).shape[1] // self.n_heads
        self.n_key_heads = max(len(self.columns(0, "k")) // self.d_head, 1)
        for i in range(self.n_layers):
            self._check(i)

    def _check(self, layer: int) -> None:
        """RetraceError where a layer has not as many heads of one size as the first layer has."""
        d_z, n = places.weight_of(self.out(layer)).shape[1], modules.n_heads_of(self.hf, layer)
        widths = [len(self.columns(layer, slot)) / self.d_head for slot in SLOTS]
        if self.n_heads % self.n_key_heads == 0 and [n, d_z, *widths] == [
            self.n_heads, self.n_heads * self.d_head, *map(self.count, SLOTS)
        ]:  # fmt: skip
            return
        raise RetraceError(
            f"model type '{self.hf.config.model_type}' has no heads here, since its layer {layer} "
            f"has queries, keys and values of {', '.join(f'{w:g}' for w in widths)} heads of "
            f"{self.d_head}, where z has {d_z / self.d_head:g} and layer 0 {self.n_heads} and "
            f"{self.n_key_heads}; activations of its other hooks can be stored"
        )

    # --- modules -----------------------------------------------------------------------------

    def site(self, layer: int, at: str) -> places.Place:
        """The place of a hook of a layer, such as attn.hook_z."""
        return hooks.site(self.hf, f"blocks.{layer}.{at}")

    def attn(self, layer: int) -> nn.Module:
        """The module of attention."""
        return modules.submodule(self.layers[layer], self.names.attn)

    def _of_hook(self, layer: int, at: str) -> nn.Module:
        """The module whose input or output a hook is."""
        return modules.submodule(self.layers[layer], self.names.place(at)[0])

    def out(self, layer: int) -> nn.Module:
        """The output projection, which reads z [batch pos d_z]."""
        return self._of_hook(layer, "attn.hook_z")

    def module_of(self, layer: int, slot: Slot) -> nn.Module:
        """The input projection that writes a slot; one module may write all three."""
        return self._of_hook(layer, f"attn.hook_{slot}")

    def post(self, layer: int, part: str) -> tuple[float, nn.Module | None]:
        """(what a part's output is multiplied with, the norm behind it), of attn or mlp."""
        place, norm = hooks.written_by(self.hf, self.layers[layer], part)
        return place.scale, norm

    # --- weights -----------------------------------------------------------------------------

    def W_O(self, layer: int) -> Float[Tensor, "n_heads d_head d_model"]:
        """The output projection, head by head."""
        W = places.moved(places.weight_of(self.out(layer)), self.home)
        return W.T.unflatten(0, (self.n_heads, -1))

    def b_O(self, layer: int) -> Float[Tensor, " d_model"] | float:
        """What attention writes that no head does; 0.0 where there is no bias."""
        bias = getattr(self.out(layer), "bias", None)
        return 0.0 if bias is None else places.moved(bias, self.home)

    def count(self, slot: Slot) -> int:
        """How many q, k or v a layer has."""
        return self.n_heads if slot == "q" else self.n_key_heads

    def columns(self, layer: int, slot: Slot) -> Int[Tensor, " columns"]:
        """The columns of a slot in the output of its projection, head by head."""
        place, module = self.site(layer, f"attn.hook_{slot}"), self.module_of(layer, slot)
        every = torch.arange(len(places.weight_of(module)))
        return every if place.columns is None else every[place.columns]

    def place(self, layer: int, slot: Slot, head: int) -> HeadColumns:
        """Where q, k or v of a head lies."""
        mine = self.columns(layer, slot)[head * self.d_head : (head + 1) * self.d_head]
        return HeadColumns(self.module_of(layer, slot), places.as_slice(mine))

    def W_in(self, layer: int, slot: Slot, head: int) -> Float[Tensor, "d_head d_model"]:
        """The rows of the input projection that make q, k or v of a head."""
        place = self.place(layer, slot, head)
        return places.moved(places.weight_of(place.module)[place.columns], self.home)

    # --- what a layer reads ------------------------------------------------------------------

    def attn_reads(
        self, layer: int, x: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch d_model"]:
        """What the input projections read, of the stream x before the layer."""
        reader = modules.first_reader(self.names, self.layers[layer])
        return x if reader is self.attn(layer) else places.moved(reader(x), self.home)

    def read(
        self, layer: int, slot: Slot, x: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch d_slot"]:
        """q, k or v of all heads, d_slot = count * d_head, of the stream x before its layer."""
        out = places.moved(self.module_of(layer, slot)(self.attn_reads(layer, x)), self.home)
        place = self.site(layer, f"attn.hook_{slot}")
        return out if place.columns is None else out[..., place.columns]

    def read_by(
        self, layer: int, slot: Slot, head: int, x: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch d_head"]:
        """q, k or v of one head, of the stream x before its layer."""
        place = self.place(layer, slot, head)
        out = place.module(self.attn_reads(layer, x))[..., place.columns]
        return places.moved(out, self.home)

    def mlp_reads(
        self, layer: int, x: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch d_model"]:
        """What the MLP reads, of the stream before it: resid_pre in parallel, else resid_mid."""
        norm = self.mlp_norm(layer)
        return x if norm is None else places.moved(norm(x), self.home)

    def mlp_norm(self, layer: int) -> nn.Module | None:
        """The norm before the MLP; GPT-J's and Phi's is that of attention; OLMo 2 has none."""
        parts = self.names.parts
        out = (self.names.place("hook_mlp_out") or ("", ""))[0]
        name = "ln2" if "ln2" in parts else "ln1"
        if parts.get(name) == out or name not in parts:
            return None
        return modules.submodule(self.layers[layer], parts[name])

    # --- what a layer writes -----------------------------------------------------------------

    def written(
        self, z: Float[Tensor, "*batch d_z"], layer: int
    ) -> Float[Tensor, "*batch n_heads d_model"]:
        """What each head adds to the stream.

        Where a norm follows attention (Gemma 2), its scale is kept as z makes it, so that parts
        sum.
        """
        by_head = z.unflatten(-1, (self.n_heads, self.d_head))
        raw = torch.einsum("...hd,hdm->...hm", by_head, self.W_O(layer))
        scale, norm = self.post(layer, "attn")
        if norm is not None:
            raw = _kept(norm, raw.sum(-2) + self.b_O(layer), raw)
        return raw if scale == 1.0 else raw * scale

    def rest(self, z: Float[Tensor, "*batch d_z"], layer: int) -> Float[Tensor, "*batch d_model"]:
        """What attention adds to the stream beside its heads: biases."""
        scale, norm = self.post(layer, "attn")
        if norm is None:
            return (torch.zeros_like(z[..., :1]) + self.b_O(layer)).expand(
                *z.shape[:-1], self.d_model
            ) * scale
        return self.attn_writes(layer, z) - self.written(z, layer).sum(-2)

    def attn_writes(
        self, layer: int, z: Float[Tensor, "*batch d_z"]
    ) -> Float[Tensor, "*batch d_model"]:
        """What attention adds to the stream."""
        scale, norm = self.post(layer, "attn")
        whole = self._before_norm(layer, z)
        return (whole if norm is None else places.moved(norm(whole), self.home)) * scale

    def _before_norm(self, layer: int, z: Tensor) -> Tensor:
        """The output projection of z, before a norm behind it."""
        by_head = z.unflatten(-1, (self.n_heads, self.d_head))
        return torch.einsum("...hd,hdm->...m", by_head, self.W_O(layer)) + self.b_O(layer)

    def change_by(
        self,
        layer: int,
        head: int,
        change: Float[Tensor, "*batch d_head"],
        z: Float[Tensor, "*batch d_z"],
    ) -> Float[Tensor, "*batch d_model"]:
        """How what attention adds to the stream changes with z of one head.

        Args:
            change: of that head's z.
            z: of all heads before the change, which decides the scale of a norm behind attention.
        """
        scale, norm = self.post(layer, "attn")
        written = change @ self.W_O(layer)[head]
        if norm is None:
            return written if scale == 1.0 else written * scale
        raw = self._before_norm(layer, z)
        return places.moved(norm(raw + written) - norm(raw), self.home) * scale

    def mlp_writes(
        self, layer: int, x: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch d_model"]:
        """What the MLP adds to the stream, of the stream x that it reads."""
        y = self.mlp_reads(layer, x)
        if self.names.mlp:
            mlp, shape = modules.submodule(self.layers[layer], self.names.mlp), y.shape
            y = y.reshape(-1, *shape[-2:]) if self.names.experts else y  # they count dimensions
            y = mlp(y, torch.zeros_like(y)) if adds_stream(mlp) else mlp(y)
            y = y[0] if isinstance(y, tuple) else y
            y = y.view(*shape[:-1], -1)
        else:  # its maps stand in the layer itself (OPT)
            first, last = (self._of_hook(layer, f"mlp.hook_{h}") for h in ("in", "post"))
            y = last(self.layers[layer].activation_fn(first(y)))
        scale, norm = self.post(layer, "mlp")
        y = places.moved(y if norm is None else norm(y), self.home)
        return y if scale == 1.0 else y * scale

    # --- edits and patterns ------------------------------------------------------------------

    @contextmanager
    def z_edited(self, layer: int, fn: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
        """Inside: fn is called with z [batch pos d_z], and what it returns replaces z."""

        def before(_: nn.Module, args: tuple):
            new = fn(places.moved(args[0], self.home))
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
        with ExitStack() as stack:
            for (layer, slot, head), (rows, at, new) in values.items():
                place = self.place(layer, slot, head)
                columns = torch.arange(place.columns.start, place.columns.stop, device=new.device)

                def after(_: nn.Module, __: tuple, out: Tensor, r=rows, a=at, c=columns, v=new):
                    out, at = out.clone(), places.where(out)
                    r, a, c, v = (places.moved(t, at) for t in (r, a, c, v))
                    out[r[:, None], a[:, None], c] = v
                    return out

                stack.callback(place.module.register_forward_hook(after).remove)
            yield

    def patterns(
        self, tokens: Int[Tensor, "batch pos"]
    ) -> list[Float[Tensor, "batch n_heads pos pos"]]:
        """Attention of every layer, from query (third axis) to key (last)."""
        names = [f"blocks.{i}.attn.hook_pattern" for i in range(self.n_layers)]
        acts = hooks.run_to(self.hf, tokens, names)
        return [inner.by_head(acts[name], self.n_heads) for name in names]


def adds_stream(mlp: nn.Module) -> bool:
    """Whether an MLP adds the stream to its output itself, and so takes it, too (Bloom)."""
    return "residual" in inspect.signature(mlp.forward).parameters


def _kept(
    norm: nn.Module, x: Float[Tensor, "*batch d_model"], parts: Float[Tensor, "*batch n d_model"]
) -> Float[Tensor, "*batch n d_model"]:
    """A norm of x on parts of x, with the scale that x has; no bias."""
    _, size, _ = places.standardised(norm, x)
    return (places.linear_part(norm, parts) / size[..., None, :]).to(parts.dtype)
