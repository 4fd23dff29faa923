"""A model that is linear in its MLPs' outputs: patterns and norms' scales kept. [torch]

With the attention patterns A and the denominators s of all norms held at their values on a prompt,
what each layer reads is an affine function of the embedding and of what the MLPs write (Ameisen et
al. 2025, "local replacement model"):

    mid_l  = pre_l + O_l A_l V_l N_l(pre_l)        N(x) = g c(x) / s + b, with s kept
    x_l    = R_l(mid_l)                            what the dictionary of layer l reads
    post_l = mid_l + y_l                           y_l: what the MLP, or its dictionary, writes

1. `Linear.of` runs the model once and keeps A, s and the stream.
2. `forward` runs the affine map upwards, on any y; with the MLPs' own y it gives the model's stream
   (`check`).
3. `pulled_back` runs its transpose downwards for a batch of directions at once, each at a layer and
   position of its own. It is written out by hand: patterns and scales are those of one prompt,
   whatever the size of the batch, no graph of operations is kept, and positions behind the last one
   asked for are left out, since nothing flows from there.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from pipeline.errors import RetraceError
from pipeline.models import hooks, inner, modules, places, proof, splice
from pipeline.models.heads import Heads

Stream = Float[Tensor, "*batch pos d_model"]


@dataclass(frozen=True)
class Norm:
    """g c(x) / s + b with s kept; g None, s None and b None leave x as it is."""

    gain: Float[Tensor, " d_model"] | None = None
    size: Float[Tensor, "pos 1"] | None = None
    bias: Float[Tensor, " d_model"] | None = None
    centred: bool = False

    def forward(self, x: Stream) -> Stream:
        x = self.linear(x)
        return x if self.bias is None else x + self.bias

    def linear(self, x: Stream) -> Stream:
        """Without b."""
        return self._scaled(self._c(x))

    def pull(self, g: Stream) -> Stream:
        """The transpose of its linear part."""
        return self._c(self._scaled(g))

    def _c(self, x: Stream) -> Stream:
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def _scaled(self, x: Stream) -> Stream:
        if self.gain is not None:
            x = x * self.gain
        return x if self.size is None else x / self.size[: x.shape[-2]]


def norm_at(norm: nn.Module | None, x: Float[Tensor, "pos d_model"], gained: bool = True) -> Norm:
    """A norm with the scale that it has on the stream x.

    Args:
        gained: False: n = c(x) / s alone, as at hook_normalized.
    """
    if norm is None or isinstance(norm, nn.Identity):
        return Norm()
    _, size, _ = places.standardised(norm, x)
    centred = places.is_centred(norm, x)
    if not gained:
        return Norm(None, size, None, centred)
    run = places.as_function(norm)
    unit = torch.ones_like(x[:1])
    gain = places.gain(run, x[:1])[0]
    weight = getattr(norm, "weight", None)
    if weight is not None and torch.allclose(gain, weight.to(gain), rtol=1e-4):
        gain = weight.to(gain)  # without the rounding of a measurement
    return Norm(gain, size, run(torch.zeros_like(unit))[0], centred)


@dataclass(frozen=True)
class Attention:
    """Attention with its pattern kept: a linear map of the stream before it.

    Attributes:
        before, after: the norms around it; after: none in most families.
        W_V: [n_key_heads*d_head d_model]; b_V, b_O: 0.0 where there is none.
        W_O: [n_heads*d_head d_model], times what the output is multiplied with.
        pattern: [n_heads query key].
    """

    before: Norm
    W_V: Float[Tensor, "d_v d_model"]
    b_V: Float[Tensor, " d_v"] | float
    W_O: Float[Tensor, "d_z d_model"]
    b_O: Float[Tensor, " d_model"] | float
    after: Norm
    scale: float
    pattern: Float[Tensor, "n_heads query key"]

    @property
    def n_heads(self) -> int:
        return len(self.pattern)

    @property
    def d_head(self) -> int:
        return len(self.W_O) // self.n_heads

    def forward(self, x: Stream) -> Stream:
        z = self._mixed(self.before.forward(x) @ self.W_V.T + self.b_V)
        return self.after.forward(z.flatten(-2) @ self.W_O + self.b_O) * self.scale

    def linear(self, x: Stream) -> Stream:
        """Without biases."""
        return self.after.linear(self.z(x).flatten(-2) @ self.W_O) * self.scale

    def z(self, x: Stream) -> Float[Tensor, "*batch pos n_heads d_head"]:
        """z of each head, without biases."""
        return self._mixed(self.before.linear(x) @ self.W_V.T)

    def _mixed(
        self, v: Float[Tensor, "*batch pos d_v"]
    ) -> Float[Tensor, "*batch pos n_heads d_head"]:
        v = v.unflatten(-1, (-1, self.d_head))
        v = v.repeat_interleave(self.n_heads // v.shape[-2], -2)  # queries that share a key
        n = v.shape[-3]
        return torch.einsum("hqk,...khd->...qhd", self.pattern[:, :n, :n], v)

    def pull(self, g: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """The transpose of its linear part."""
        return self.before.pull(self.values(g) @ self.W_V)

    def at_z(
        self, g: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos n_heads d_head"]:
        """g, at what attention writes, as it arrives at z of each head."""
        return (self.after.pull(g * self.scale) @ self.W_O.T).unflatten(-1, (-1, self.d_head))

    def values(self, g: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_v"]:
        """g, at what attention writes, as it arrives at the values."""
        n, n_key = g.shape[1], len(self.W_V) // self.d_head
        z = self.at_z(g).unflatten(2, (n_key, -1))
        # [key heads, keys, group*queries] x [key heads, group*queries, batch*d_head]
        A = self.pattern[:, :n, :n].unflatten(0, (n_key, -1)).permute(0, 3, 1, 2).flatten(2)
        v = A @ z.permute(2, 3, 1, 0, 4).flatten(3).flatten(1, 2)
        return v.unflatten(-1, (len(g), -1)).permute(2, 1, 0, 3).flatten(2)


@dataclass(frozen=True)
class Layer:
    """One layer: attention, and how its dictionary reads the stream.

    Attributes:
        read: R_l.
        from_pre: R_l reads the stream before attention.
        W_skip: the dictionary's, zero at positions below skip_first.
    """

    attention: Attention
    read: Norm
    from_pre: bool
    W_skip: Float[Tensor, "d_model d_model"] | None = None
    skip_first: int = 0

    def skipped(self, g: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """g, at what the layer writes, as it arrives at what the dictionary reads."""
        g = g @ self.W_skip
        g[:, : self.skip_first] = 0
        return g


@dataclass(frozen=True)
class Linear:
    """The affine map of a prompt.

    Attributes:
        tokens: of the prompt.
        embed: the stream before layer 0; positions' embeddings are part of it.
        x: what each layer's dictionary reads; y: what each MLP writes.
        final: the last norm; W_U its unembedding, with the model's factor on logits.
        logits: the model's own, before any soft cap, of all positions.
    """

    tokens: Int64[Tensor, " pos"]
    embed: Float[Tensor, "pos d_model"]
    layers: list[Layer]
    x: list[Float[Tensor, "pos d_model"]]
    y: list[Float[Tensor, "pos d_model"]]
    final: Norm
    W_U: Float[Tensor, "d_vocab d_model"]
    b_U: Float[Tensor, " d_vocab"] | float
    logits: Float[Tensor, "pos d_vocab"]

    @classmethod
    @torch.no_grad()
    def of(
        cls, hf: nn.Module, tokens: Int64[Tensor, " pos"], reads: list[str],
        W_skip: list[Tensor] | None = None, skip_first: int = 0,
    ) -> "Linear":  # fmt: skip
        """The affine map of a model on a prompt.

        Args:
            reads: the hook that each layer's dictionary reads.

        Raises:
            RetraceError: attention of this type is not pattern times values, or looks ahead.
        """
        hooks.require(hf, "behind")  # what lies behind a target is left out
        heads = Heads(hf)
        at = ["hook_resid_pre", "attn.hook_pattern", "attn.hook_v", "attn.hook_z",
              "hook_attn_out", "hook_mlp_out", "hook_resid_post"]  # fmt: skip
        names = [f"blocks.{i}.{h}" for i in range(heads.n_layers) for h in at]
        acts = hooks.run_to(hf, tokens[None], [*dict.fromkeys([*names, *reads])])
        acts = {name: places.full(x[0]).clone() for name, x in acts.items()}
        skips = W_skip or [None] * heads.n_layers
        layers = [
            _layer(heads, i, acts, reads[i], skips[i], skip_first) for i in range(heads.n_layers)
        ]
        head, (scale, _) = hf.get_output_embeddings(), splice.tail(hf)
        last = acts[names[-1]]
        final = norm_at(splice.final_norm(hf), last)
        W_U = places.full(places.moved(head.weight, modules.home(hf)))
        bias = getattr(head, "bias", None)
        b_U = 0.0 if bias is None else places.full(places.moved(bias, modules.home(hf)))
        out = cls(
            tokens, acts[names[0]], layers, [acts[r] for r in reads],
            [acts[f"blocks.{i}.hook_mlp_out"] for i in range(heads.n_layers)], final,
            W_U if scale == 1.0 else W_U * scale, b_U if scale == 1.0 else b_U * scale,
            (final.forward(last) @ W_U.T + b_U) * scale,
        )  # fmt: skip
        out.check(hf.config.model_type, last, hf.dtype)
        return out

    @property
    def n_pos(self) -> int:
        return len(self.tokens)

    def check(self, kind: str, last: Float[Tensor, "pos d_model"], dtype: torch.dtype) -> None:
        """RetraceError where the affine map, on the MLPs' own outputs, is not the model's."""
        x, end = self.forward(lambda layer, _: self.y[layer])
        for layer, (ours, theirs) in enumerate(zip([*x, end], [*self.x, last], strict=True)):
            if not proof.alike(ours[None], theirs[None], dtype):
                raise RetraceError(
                    f"model type '{kind}': with patterns and norms kept, its layers do not give "
                    f"its stream at layer {layer}, so that its graphs are not known; trace another"
                )

    def forward(
        self,
        writes: Callable[[int, Tensor], Tensor],
        embed: Float[Tensor, "*batch pos d_model"] | None = None,
    ) -> tuple[list[Float[Tensor, "*batch pos d_model"]], Float[Tensor, "*batch pos d_model"]]:
        """(what each dictionary reads, the stream behind the last layer).

        Args:
            writes: layer, what its dictionary reads -> what the layer's MLP writes, skip included.
            embed: default: the prompt's.
        """
        pre, read = self.embed if embed is None else embed, []
        for i, layer in enumerate(self.layers):
            mid = pre + layer.attention.forward(pre)
            read.append(layer.read.forward(pre if layer.from_pre else mid))
            pre = mid + writes(i, read[-1])
        return read, pre

    def unembedded(
        self, last: Float[Tensor, "*batch pos d_model"]
    ) -> Float[Tensor, "*batch pos d_vocab"]:
        """Logits of the stream behind the last layer, with the last norm's scale kept."""
        return self.final.forward(last) @ self.W_U.T + self.b_U

    def pulled_back(
        self, layers: list[int], positions: Int64[Tensor, " batch"],
        directions: Float[Tensor, "batch d_model"],
        at_attention: Callable[[int, Tensor], None] = lambda *_: None,
    ) -> Iterator[tuple[int, Float[Tensor, "batch pos d_model"]]]:  # fmt: skip
        """The gradient of each direction's projection, at each place where something is written.

        Yields (l, gradient at y_l) from the highest layer that matters down to 0, and (-1, gradient
        at the embedding) at last, each of the first directions alone, those of layers above l;
        positions behind the last one are left out. A direction at layer l is of what the dictionary
        of l reads, at layer n_layers of what the unembedding reads.

        Args:
            layers: of each direction, not increasing.
            at_attention: called with a layer and the gradient at what its attention writes, of
                the directions that have one.
        """
        n_pos, top = int(positions.max()) + 1, len(self.layers)
        state = directions.new_zeros(len(layers), n_pos, directions.shape[1])

        def place(first: int, end: int) -> Tensor:
            there = torch.zeros_like(state[first:end])
            at = torch.arange(end - first, device=there.device)
            there[at, positions[first:end]] = directions[first:end]
            return there

        begun = sum(layer == top for layer in layers)
        state[:begun] = self.final.pull(place(0, begun))
        for i in range(min(max(layers), top - 1), -1, -1):
            layer, now = self.layers[i], begun + sum(at == i for at in layers)
            if begun:
                yield i, state[:begun]
            back = torch.zeros_like(state[:now])
            back[begun:] = layer.read.pull(place(begun, now))
            if layer.W_skip is not None:
                back[:begun] = layer.read.pull(layer.skipped(state[:begun]))
            mid = state[:now] if layer.from_pre else state[:now] + back
            at_attention(i, mid)
            state[:now] = mid + layer.attention.pull(mid)
            if layer.from_pre:
                state[:now] += back
            begun = now
        yield -1, state

    def pushed(
        self, embed: Float[Tensor, "batch pos d_model"],
        added: dict[int, Float[Tensor, "batch pos d_model"]],
    ) -> Iterator[tuple[int, Float[Tensor, "batch pos d_model"]]]:  # fmt: skip
        """(layer, the stream before it) of what is embedded and added alone, without biases.

        Args:
            added: layer -> what is added to what its MLP writes.
        """
        pre = embed
        for i, layer in enumerate(self.layers):
            yield i, pre
            mid = pre + layer.attention.linear(pre)
            if layer.W_skip is not None:
                skip = layer.read.linear(pre if layer.from_pre else mid) @ layer.W_skip.T
                skip[..., : layer.skip_first, :] = 0
                mid = mid + skip
            pre = mid + added[i] if i in added else mid
        yield len(self.layers), pre

    def constant(
        self, fixed: list[Float[Tensor, "pos d_model"]]
    ) -> tuple[list[Tensor], Float[Tensor, "pos d_model"]]:
        """What is read where nothing is embedded: biases alone.

        Args:
            fixed: what each layer writes whatever it reads: b_dec.

        Returns:
            (what each dictionary reads, what the unembedding reads).
        """

        def writes(i: int, read: Tensor) -> Tensor:
            layer = self.layers[i]
            if layer.W_skip is None:
                return fixed[i]
            skip = read @ layer.W_skip.T
            skip[: layer.skip_first] = 0
            return fixed[i] + skip

        read, last = self.forward(writes, torch.zeros_like(self.embed))
        return read, self.final.forward(last)


def _layer(
    heads: Heads, i: int, acts: dict[str, Tensor], read: str, W_skip: Tensor | None, skip_first: int
) -> Layer:
    at = f"blocks.{i}."
    pre, attn_out = acts[at + "hook_resid_pre"], acts[at + "hook_attn_out"]
    reader = modules.first_reader(heads.names, heads.layers[i])
    before = norm_at(None if reader is heads.attn(i) else reader, pre)
    module, columns = heads.module_of(i, "v"), heads.columns(i, "v").to(pre.device)
    W_V = places.full(places.moved(places.weight_of(module), heads.home))[columns]
    bias = getattr(module, "bias", None)
    b_V = 0.0 if bias is None else places.full(places.moved(bias, heads.home))[columns]
    W_O, b_O = places.full(heads.W_O(i)).flatten(0, 1), heads.b_O(i)
    scale, post = heads.post(i, "attn")
    z = acts[at + "attn.hook_z"]
    after = norm_at(post, z @ W_O + b_O)
    pattern = inner.by_head(acts[at + "attn.hook_pattern"][None], heads.n_heads)[0]
    attention = Attention(before, W_V, b_V, W_O, b_O, after, scale, pattern)
    name = read.removeprefix(at)
    from_pre = name in ("hook_resid_pre", "ln1.hook_normalized") or (
        name.startswith(("ln2.", "mlp.")) and heads.parallel
    )
    stream = pre if from_pre else pre + attn_out
    if name.startswith("hook_resid"):
        reads = Norm()
    elif name.endswith("hook_normalized"):
        norm = modules.submodule(heads.layers[i], heads.names.parts[name.partition(".")[0]])
        reads = norm_at(norm, stream, gained=False)
    else:
        reads = norm_at(heads.mlp_norm(i), stream)
    return Layer(attention, reads, from_pre, W_skip, skip_first)
