"""A task for a model: prompts in pairs, the logit difference, and the runs on both. [torch]

The question that every method of circuits/ asks is what becomes of

    m = logit(answer) - logit(foil)   at the last position of each prompt

when activations of the run on the `source` prompts are put into the run on the `base` prompts.
All of this is data: `Task.of` runs the model once on each prompt. rerun.py runs it with a patch.

A patch at one position changes nothing at earlier ones, since attention looks back only. So what
has to be computed again of each prompt is a suffix, from the first change to the last position:

    base     the cat sat on the mat        first change of a patch at position 2
    suffix           sat on the mat        places [2 3 4 5]
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from pipeline.errors import RetraceError, nearest
from pipeline.models import hooks, inner, places, splice
from pipeline.models.heads import Heads
from pipeline.models.taps import Taps, tapped

Stream = Float[Tensor, "batch pos d_model"]
# What a Run keeps of each layer, and the hook where it is read.
KEPT = {
    "pre": "hook_resid_pre",
    "mid": "hook_resid_mid",
    "post": "hook_resid_post",
    "z": "attn.hook_z",
}


class Node(NamedTuple):
    """A part of the model.

    kind is resid (the stream before a layer), attn, mlp, head or pattern (what a head attends to,
    with its values as they are); position is a name of the pairs, @3 for the fourth token, or blank
    for all. That of a pattern is the query's.
    """

    kind: str
    layer: int
    head: int = -1
    position: str = ""


@dataclass(frozen=True)
class Pairs:
    """Prompts in pairs of one length, padded on the right.

    Attributes:
        base, source: token ids of the prompts that are patched, and of those that patches are from.
        answer, foil: the token id that is right, and the one that is wrong, of each prompt; or
            several of them, filled up with -1.
        end: the last position of each prompt.
        positions: name -> a position in each prompt.
    """

    base: Int[Tensor, "batch pos"]
    source: Int[Tensor, "batch pos"]
    answer: Int[Tensor, " batch *answers"]
    foil: Int[Tensor, " batch *foils"]
    end: Int[Tensor, " batch"]
    positions: dict[str, Int[Tensor, " batch"]]

    @classmethod
    def of(
        cls, prompts: dict[str, Any], bos_id: int | None, device: Any, denoising: bool = False
    ) -> "Pairs":
        """Pairs of lists of token ids; where the model has a BOS token, it is put in front.

        Args:
            prompts: clean and corrupt (lists of token ids), answer and foil (one token id per
                prompt, or a list of them), positions (name -> one position per prompt).
            denoising: patches go from the clean prompts into the corrupt ones, not the other way.

        Raises:
            RetraceError: the two prompts of a pair differ in length.
        """
        front = [] if bos_id is None else [bos_id]
        rows = {k: [[*front, *ids] for ids in prompts[k]] for k in ("clean", "corrupt")}
        lengths = [len(ids) for ids in rows["clean"]]
        for i, (ids, other) in enumerate(zip(rows["clean"], rows["corrupt"], strict=True)):
            if len(ids) != len(other):
                raise RetraceError(
                    f"prompts: pair {i} has {len(ids)} and {len(other)} tokens; a patch needs "
                    f"prompts of one length"
                )

        def tensor(values: Any) -> Tensor:
            return torch.tensor(list(values), device=device)

        padded = {
            k: tensor(ids + [ids[0]] * (max(lengths) - len(ids)) for ids in some)
            for k, some in rows.items()
        }
        base, source = ("corrupt", "clean") if denoising else ("clean", "corrupt")
        return cls(
            base=padded[base],
            source=padded[source],
            answer=tensor(filled(prompts["answer"])),
            foil=tensor(filled(prompts["foil"])),
            end=tensor(n - 1 for n in lengths),
            positions={
                name: tensor(p + len(front) for p in where)
                for name, where in prompts["positions"].items()
            },
        )

    @cached_property
    def rows(self) -> Int[Tensor, " batch"]:
        """The numbers of the prompts, to index with."""
        return torch.arange(len(self.end), device=self.end.device)

    def place(self, position: str) -> Int[Tensor, " batch"]:
        """Where a position, such as 'subject' or '@3', lies in each prompt."""
        if position.startswith("@"):
            return torch.full_like(self.end, int(position[1:]))
        if position not in self.positions:
            raise RetraceError(
                f"circuits: no position '{position}'{nearest(position, self.positions)}; the "
                f"prompts name {', '.join(self.positions)}"
            )
        return self.positions[position]

    def mask(self, position: str) -> Bool[Tensor, "batch pos"]:
        """Which tokens a position means; blank means all."""
        index = torch.arange(self.base.shape[1], device=self.base.device)
        if not position:
            return (index >= 0).expand(self.base.shape)
        return index == self.place(position)[:, None]

    def differing(self) -> list[str]:
        """The positions @i at which the prompts of some pair differ."""
        return [f"@{i}" for i in (self.base != self.source).any(0).nonzero()[:, 0].tolist()]

    def first_change(self, position: str) -> Int[Tensor, " batch"]:
        """The first position at which a patch changes each prompt's run.

        A patch everywhere changes nothing before the first token that differs. A patch behind a
        prompt's last position does not count; then it is the last position.
        """
        if position:
            return torch.minimum(self.place(position), self.end)
        return (self.base != self.source).int().argmax(1)

    def suffix(self, start: Int[Tensor, " batch"]) -> Int[Tensor, "batch suffix"]:
        """The places from `start` to the last position, as many for every prompt.

        The places of a short prompt run on behind its end, like padding.
        """
        length = int((self.end - start).max()) + 1
        return start[:, None] + torch.arange(length, device=start.device)

    def gathered(
        self, x: Shaped[Tensor, "batch pos d"], places: Int[Tensor, "batch suffix"]
    ) -> Shaped[Tensor, "batch suffix d"]:
        """x at places; at those behind the padding it is that of the last token."""
        return x[self.rows[:, None], places.clamp(max=x.shape[1] - 1)]

    def at_end(self, x: Shaped[Tensor, "*runs batch pos d"]) -> Shaped[Tensor, "*runs batch d"]:
        """x at the last position of each prompt."""
        return x[..., self.rows, self.end, :]


def filled(ids: list) -> list:
    """Token ids as they are; lists of them filled up with -1 to one length."""
    if not isinstance(ids[0], list):
        return ids
    most = max(map(len, ids))
    return [[*some, *[-1] * (most - len(some))] for some in ids]


@dataclass(frozen=True)
class Run:
    """What one forward pass leaves, one entry per layer.

    Attributes:
        pre, mid, post: the stream before attention, between attention and MLP, and behind the MLP.
        z: what the output projection reads, d_z = n_heads * d_head.
        past: keys and values [batch n_key_heads pos d_head]. Models trained here give none, nor do
            those whose sliding window has dropped some or that use ALiBi, or whose proof shows
            that a run on them is another: then a patched run computes all positions.
        parallel: attention and MLP both read `pre`; `mid` is what the stream between them would be.
    """

    pre: list[Stream]
    mid: list[Stream]
    post: list[Stream]
    z: list[Float[Tensor, "batch pos d_z"]]
    past: list[tuple[Tensor, Tensor]]
    parallel: bool = False

    @classmethod
    def of(cls, heads: Heads, tokens: Int[Tensor, "batch pos"]) -> "Run":
        """A forward pass; the unembedding of a Hugging Face model does not run.

        Raises:
            RetraceError: layers without an MLP, or without a stream before it.
        """
        if "blocks.0.hook_mlp_out" not in hooks.hook_names(heads.hf):
            raise RetraceError(
                f"model type '{heads.hf.config.model_type}' has no stream between attention and "
                f"MLP; circuits need layers of attention and an MLP"
            )
        wanted = KEPT | ({"mid": "hook_attn_out"} if heads.parallel else {})
        names = {
            key: [f"blocks.{i}.{hook}" for i in range(heads.n_layers)]
            for key, hook in wanted.items()
        }
        with hooks.capture(heads.hf, [n for some in names.values() for n in some]) as acts:
            out = heads.hf.base_model(input_ids=tokens, use_cache=True)
        kept = {key: [acts[name] for name in some] for key, some in names.items()}
        if heads.parallel:
            kept["mid"] = [x + attn for x, attn in zip(kept["pre"], kept["mid"], strict=True)]
        cache = getattr(out, "past_key_values", None)
        past = [(layer.keys, layer.values) for layer in getattr(cache, "layers", [])]
        config = heads.hf.config
        numbered = hasattr(config, "max_position_embeddings")
        wrong = getattr(heads.hf, "retrace_past_fails", False)  # its own proof said so
        if getattr(config, "alibi", False) or not numbered or wrong:
            past = []  # ALiBi counts positions in a mask of whole prompts (Bloom, MPT, Falcon)
        local = "local" in getattr(config, "attention_layers", ())
        if local and 2 * tokens.shape[1] > config.window_size:
            past = []  # GPT-Neo counts its window over stored keys, those behind a patch among them
        tuned = getattr(config, "attn_temperature_tuning", False)
        if tuned and 2 * tokens.shape[1] >= config.floor_scale:
            past = []  # Llama 4 counts positions over stored keys, and scales queries by them
        if any(keys.shape[-2] != tokens.shape[1] for keys, _ in past):
            past = []
        return cls(**kept, past=past, parallel=heads.parallel)

    @classmethod
    def with_slopes(
        cls,
        heads: Heads,
        tokens: Int[Tensor, "batch pos"],
        m_of: Callable[[Stream], Float[Tensor, ""]],
        names: tuple[str, ...],
    ) -> tuple["Run", Taps, Taps]:
        """`of`, what that forward pass goes on with, and the gradient of m by each of them.

        Args:
            m_of: m of the stream that the final norm reads.
            names: of Taps.
        """
        with (
            torch.enable_grad(),
            tapped(heads) as taps,
            hooks.edited(heads.hf, "hook_embed", lambda x: x.detach().requires_grad_(True)),
        ):
            run = cls.of(heads, tokens)
            grads = taps.gradients(m_of(taps.end[0]), names)
        return run.detached(), taps.detached(), grads

    def detached(self) -> "Run":
        """The same numbers without the graph that made them."""
        kept = {name: [x.detach() for x in getattr(self, name)] for name in KEPT}
        past = [(keys.detach(), values.detach()) for keys, values in self.past]
        return Run(**kept, past=past, parallel=self.parallel)

    def at(self, hook: str) -> Stream:
        """The stream at a hook such as blocks.3.hook_resid_mid."""
        _, layer, name = hook.split(".")
        return getattr(self, name.removeprefix("hook_resid_"))[int(layer)]

    def mlp_input(self, layer: int) -> Stream:
        """The stream that the MLP reads, before its norm."""
        return (self.pre if self.parallel else self.mid)[layer]

    def attn(self, layer: int) -> Stream:
        """What attention adds to the stream."""
        return self.mid[layer] - self.pre[layer]

    def mlp(self, layer: int) -> Stream:
        """What the MLP adds to the stream."""
        return self.post[layer] - self.mid[layer]


@dataclass(frozen=True)
class LogitDifference:
    """m = logit(answer) - logit(foil) as a function of the stream before the final norm N.

        m(x) = N(x) · direction + constant,   direction = scale (W_U[answer] - W_U[foil])

    so that no other logit is computed. Where several tokens are right or wrong, the mean of their
    logits stands in the place of one. Where logits are capped by a tanh (Gemma 2), m is not linear
    in N(x), and the logits of these tokens are computed.

    Attributes:
        hf: the model, whose unembedding is read.
        norm: N.
        answer, foil: as in `Pairs`.
        constant: what biases of the unembedding add to m; 0.0 where it has none.
        cap: of the logits; 0 is none.
    """

    hf: nn.Module
    norm: nn.Module
    answer: Int[Tensor, " batch *answers"]
    foil: Int[Tensor, " batch *foils"]
    direction: Float[Tensor, "batch d_model"]
    constant: Float[Tensor, " batch"] | float
    cap: float

    @classmethod
    def of(cls, hf: nn.Module, pairs: Pairs) -> "LogitDifference":
        hooks.require(hf, "unembed")
        head, (scale, cap) = hf.get_output_embeddings(), splice.tail(hf)
        answer, foil = (
            places.full(mean_rows(head.weight, t)) * scale for t in (pairs.answer, pairs.foil)
        )
        constant: Tensor | float = 0.0
        if head.bias is not None:  # Phi, GPT-J
            bias = places.full(head.bias)[:, None]
            right, wrong = (mean_rows(bias, t)[:, 0] for t in (pairs.answer, pairs.foil))
            constant = (right - wrong) * scale
        norm = splice.final_norm(hf)
        return cls(hf, norm, pairs.answer, pairs.foil, answer - foil, constant, cap)

    def __call__(self, x: Float[Tensor, "*runs batch d_model"]) -> Float[Tensor, "*runs batch"]:
        """m of the stream at the last position of each prompt."""
        y = places.full(self.norm(x))
        if self.cap:
            return self._mean_logit(y, self.answer) - self._mean_logit(y, self.foil)
        return (y * self.direction).sum(-1) + self.constant

    def _mean_logit(
        self, y: Float[Tensor, "*runs batch d_model"], tokens: Int[Tensor, " batch *tokens"]
    ) -> Float[Tensor, "*runs batch"]:
        """The mean of the capped logits of some tokens, of what the unembedding reads."""
        tokens = tokens[:, None] if tokens.dim() == 1 else tokens
        W_U = places.full(self.hf.get_output_embeddings().weight[tokens.clamp(min=0)])
        logits = splice.capped(self.hf, torch.einsum("...nd,ntd->...nt", y, W_U))
        given = (tokens >= 0).to(y.dtype)
        return (logits * given).sum(-1) / given.sum(-1)


def mean_rows(
    W_U: Float[Tensor, "d_vocab d"], tokens: Int[Tensor, " batch *tokens"]
) -> Float[Tensor, "batch d"]:
    """The row of each prompt's token, or the mean of the rows of several."""
    if tokens.dim() == 1:
        return W_U[tokens]
    given = (tokens >= 0).to(W_U.dtype)
    weights = given / given.sum(1, keepdim=True)
    return torch.einsum("ntd,nt->nd", W_U[tokens.clamp(min=0)], weights)


@dataclass(frozen=True)
class Task:
    """Pairs of prompts on a model, with the runs on both.

    Attributes:
        hf, heads: the model, and its attention heads.
        metric: m of the stream at the last positions.
        base, source: the runs on the prompts.
        before: m of the base run.
        total: m(source) - m(base), the effect of patching everything.
        slopes: values of the base run and gradients of m, summed over prompts, by them; None where
            the task was made without.
    """

    hf: nn.Module
    heads: Heads
    pairs: Pairs
    metric: Callable[[Tensor], Tensor]
    base: Run
    source: Run
    before: Float[Tensor, " batch"]
    total: Float[Tensor, " batch"]
    slopes: tuple[Taps, Taps] | None = None

    @cached_property
    def turned(self) -> list[Float[Tensor, "batch pos d_z"]]:
        """How z of each layer changes with the patterns of the source run: (A' - A) v of base.

        Raises:
            RetraceError: a model whose attention forms no pattern.
        """
        heads, out = self.heads, []
        both = (heads.patterns(tokens) for tokens in (self.pairs.base, self.pairs.source))
        for i, (before, after) in enumerate(zip(*both, strict=True)):
            v = inner.by_head(heads.read(i, "v", self.base.pre[i]), heads.n_key_heads)
            v = v.repeat_interleave(heads.n_heads // heads.n_key_heads, 1)
            out.append(((after - before).to(v.dtype) @ v).transpose(1, 2).flatten(2))
        return out

    @classmethod
    def of(cls, hf: nn.Module, pairs: Pairs, slopes: tuple[str, ...] = ()) -> "Task":
        """Run the model on both prompts of every pair.

        Args:
            slopes: names of Taps by which to take the gradient of m on the base run. With them
                attribution patching needs no forward pass of its own.

        Raises:
            RetraceError: a model without heads, without an MLP, or whose logits its own proof could
                not reproduce (proof.py).
        """
        hooks.require(hf, "behind")  # a patched run starts at the position that is patched
        heads, metric = Heads(hf), LogitDifference.of(hf, pairs)
        source, found = Run.of(heads, pairs.source), None
        if slopes:
            m_of = lambda x: metric(pairs.at_end(x)).sum()  # noqa: E731
            base, *found = Run.with_slopes(heads, pairs.base, m_of, slopes)
        else:
            base = Run.of(heads, pairs.base)
        before, after = (metric(pairs.at_end(run.post[-1])) for run in (base, source))
        kept = tuple(found) if found else None
        return cls(hf, heads, pairs, metric, base, source, before, after - before, kept)
