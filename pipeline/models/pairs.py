"""Prompts in pairs, and a model's runs on both, for patching one into the other. [torch]

A run on the `base` prompts gets activations of a run on the `source` prompts, and the question is
what becomes of

    m = logit(answer) - logit(foil) at the last position

Where several tokens are right or wrong, the mean of their logits stands in the place of one. m
needs no unembedding: the final norm's output times the difference of two of its rows is enough.
`Task.resumed` runs the model on a changed stream from one layer and one position on: layers below
do not run, and earlier positions give the keys and values that they gave in the base run.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.errors import RetraceError, nearest
from pipeline.models import hooks, splice
from pipeline.models.heads import Heads

TOKENS_A_PASS = {"cpu": 4096, "cuda": 32_768}


class Node(NamedTuple):
    """A part of the model.

    kind is resid (the stream before a layer), attn, mlp or head; position is a name of the pairs,
    @3 for the fourth token, or blank for all.
    """

    kind: str
    layer: int
    head: int = -1
    position: str = ""


@dataclass(frozen=True)
class Pairs:
    """Prompts in pairs that differ in some tokens, padded on the right.

    Attributes:
        base, source: [n pos] token ids, of where patches go and where they come from.
        answer, foil: [n] token ids, or [n tokens] where several are right or wrong; -1 is none.
        end: [n], the last position of each prompt.
        positions: name -> [n].
    """

    base: Tensor
    source: Tensor
    answer: Tensor
    foil: Tensor
    end: Tensor
    positions: dict[str, Tensor]

    @classmethod
    def of(cls, prompts: dict[str, Any], bos_id: int | None, device: Any, denoising: bool = False):
        """Pairs of lists of token ids, BOS put in front where the model has one.

        Args:
            prompts: clean, corrupt (lists of token ids), answer, foil (a token id each, or a list
                of them), positions (name -> places).

        Raises:
            RetraceError: a pair of unequal length.
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
        padded = {
            k: torch.tensor([ids + [ids[0]] * (max(lengths) - len(ids)) for ids in v]).to(device)
            for k, v in rows.items()
        }
        whole = lambda values: torch.tensor(list(values), device=device)  # noqa: E731
        places = {k: whole(p + len(front) for p in v) for k, v in prompts["positions"].items()}
        base, source = ("corrupt", "clean") if denoising else ("clean", "corrupt")
        return cls(
            padded[base], padded[source], whole(level(prompts["answer"])),
            whole(level(prompts["foil"])), whole(n - 1 for n in lengths), places,
        )  # fmt: skip

    def mask(self, position: str) -> Tensor:
        """Which tokens a position names, bool [n pos]."""
        index = torch.arange(self.base.shape[1], device=self.base.device)
        if not position:
            return (index >= 0).expand(self.base.shape)
        return index == self.place(position)[:, None]

    def place(self, position: str) -> Tensor:
        """Where a position lies in each prompt, [n]."""
        if position.startswith("@"):
            return torch.full_like(self.end, int(position[1:]))
        if position not in self.positions:
            raise RetraceError(
                f"circuits: no position '{position}'{nearest(position, self.positions)}; the "
                f"prompts name {', '.join(self.positions)}"
            )
        return self.positions[position]

    def differing(self) -> list[str]:
        """The positions @i at which some pair differs."""
        return [f"@{i}" for i in (self.base != self.source).any(0).nonzero()[:, 0].tolist()]


@dataclass
class Run:
    """What one forward pass leaves, by layer; every stream is [n pos d_model].

    Attributes:
        pre, mid, post: the stream before attention, between attention and MLP, and behind.
        z: [n pos n_heads*d_head].
        past: keys and values, [n n_key_heads pos d_head]; none of models trained here, nor where a
            sliding window has dropped some: then a patched run computes all positions.
    """

    pre: list[Tensor]
    mid: list[Tensor]
    post: list[Tensor]
    z: list[Tensor]
    past: list[tuple[Tensor, Tensor]]
    parallel: bool = False

    def mlp_input(self, layer: int) -> Tensor:
        """The stream that the MLP reads, before its norm."""
        return (self.pre if self.parallel else self.mid)[layer]

    def attn(self, layer: int) -> Tensor:
        return self.mid[layer] - self.pre[layer]

    def mlp(self, layer: int) -> Tensor:
        return self.post[layer] - self.mid[layer]


def watched(heads: Heads, tokens: Tensor) -> Run:
    """A forward pass on tokens [n pos]; of a Hugging Face model the unembedding does not run."""
    layers = range(heads.n_layers)
    name = lambda hook: [f"blocks.{i}.{hook}" for i in layers]  # noqa: E731
    middle = "hook_attn_out" if heads.parallel else "hook_resid_mid"
    wanted = {"pre": "hook_resid_pre", "mid": middle, "post": "hook_resid_post", "z": "attn.hook_z"}
    if "blocks.0.hook_mlp_out" not in hooks.hook_names(heads.hf):
        raise RetraceError(
            f"model type '{heads.hf.config.model_type}' has no stream between attention and MLP; "
            f"circuits need layers of attention and an MLP"
        )
    with hooks.capture(heads.hf, [n for hook in wanted.values() for n in name(hook)]) as acts:
        out = heads.hf.base_model(input_ids=tokens, use_cache=True)
    streams = {k: [acts[n] for n in name(hook)] for k, hook in wanted.items()}
    if heads.parallel:  # the stream that would be there
        streams["mid"] = [a + b for a, b in zip(streams["pre"], streams["mid"], strict=True)]
    cache = getattr(out, "past_key_values", None)
    past = [(layer.keys, layer.values) for layer in cache.layers] if cache else []
    if any(keys.shape[-2] != tokens.shape[1] for keys, _ in past):
        past = []
    return Run(**streams, past=past, parallel=heads.parallel)


def level(ids: list) -> list:
    """Token ids, or lists of them filled up with -1 to one length."""
    if not isinstance(ids[0], list):
        return ids
    most = max(map(len, ids))
    return [[*some, *[-1] * (most - len(some))] for some in ids]


def mean_rows(W_U: Tensor, ids: Tensor) -> Tensor:
    """[n d_model]: the row of each token id [n], or the mean of those that are [n tokens]."""
    if ids.dim() == 1:
        return W_U[ids]
    given = (ids >= 0).to(W_U.dtype)
    return torch.einsum("ntd,nt->nd", W_U[ids.clamp(min=0)], given / given.sum(1, keepdim=True))


class Task:
    """Pairs of prompts on a model, with the runs on both.

    Attributes:
        direction: [n d_model], what the output of the final norm is multiplied with to give m.
        constant: [n], what biases of the unembedding add to m; 0.0 where it has none.
        cap: of the logits; 0 is none.
        base, source: the runs; before: m of the base run, [n]; total: m(source) - m(base), [n].
    """

    def __init__(self, hf: nn.Module, pairs: Pairs) -> None:
        self.hf, self.pairs, self.heads = hf, pairs, Heads(hf)
        hooks.require(hf, "unembed")
        head = hf.get_output_embeddings()
        scale, self.cap = splice.tail(hf)
        answers = [mean_rows(head.weight, ids) * scale for ids in (pairs.answer, pairs.foil)]
        self.direction = answers[0] - answers[1]  # [n d_model]
        self.tokens_of = pairs.answer, pairs.foil
        self.constant: Tensor | float = 0.0
        if head.bias is not None:  # Phi, GPT-J
            each = [mean_rows(head.bias[:, None], ids)[:, 0] for ids in self.tokens_of]
            self.constant = (each[0] - each[1]) * scale
        self.norm = splice.final_norm(hf)
        self.rows = torch.arange(len(pairs.end), device=pairs.end.device)
        # now, before anybody edits the model
        self.base, self.source = (watched(self.heads, t) for t in (pairs.base, pairs.source))
        self.before = self.metric(self.at_end(self.base.post[-1]))
        self.total = self.metric(self.at_end(self.source.post[-1])) - self.before

    def metric(self, x: Tensor) -> Tensor:
        """m [... n] of the stream at the last positions before the final norm, [... n d_model]."""
        if self.cap:
            return self._capped(self.norm(x), *self.tokens_of)
        return (self.norm(x) * self.direction).sum(-1) + self.constant

    def _capped(self, y: Tensor, *tokens: Tensor) -> Tensor:
        """m [... n] of what the unembedding reads, where logits are capped by a tanh (Gemma 2)."""
        W_U, found = self.hf.get_output_embeddings().weight, []
        for ids in tokens:
            ids = ids[:, None] if ids.dim() == 1 else ids
            logits = torch.einsum("...nd,ntd->...nt", y, W_U[ids.clamp(min=0)])
            given = (ids >= 0).to(y.dtype)
            found.append((splice.capped(self.hf, logits) * given).sum(-1) / given.sum(-1))
        return found[0] - found[1]

    def at_end(self, x: Tensor) -> Tensor:
        """[... n pos d] at the last position of each prompt, [... n d]."""
        return x[..., self.rows, self.pairs.end, :]

    def suffix(self, start: Tensor) -> Tensor:
        """Places from start [n] to the last position, [n s]; short ones run over it, as padding."""
        length = int((self.pairs.end - start).max()) + 1
        return start[:, None] + torch.arange(length, device=start.device)

    def resumed(self, hook: str, x: Tensor, places: Tensor) -> Tensor:
        """m [k n] with the stream at `hook` set to x, base keys and values before it.

        Args:
            x: [k n s d_model], the stream from the first position on that differs from base.
            places: [n s], see `suffix`.
        """
        k, n = x.shape[:2]
        rows = x.flatten(0, 1)
        if not self.base.past:
            layer, stream = int(hook.split(".")[1]), hook.rsplit("_", 1)[1]
            whole = getattr(self.base, stream)[layer].repeat(k, 1, 1)
            at = places.clamp(max=whole.shape[1] - 1).repeat(k, 1)
            valid = (places < whole.shape[1]).repeat(k, 1)
            index = torch.arange(k * n, device=x.device)[:, None].expand_as(at)
            whole[index[valid], at[valid]] = rows[valid]
            end = splice.resume_stream(self.hf, hook, whole).unflatten(0, (k, n))
            return self.metric(self.at_end(end))
        from transformers import DynamicCache

        cache, first = DynamicCache(), int(hook.split(".")[1])
        for i, (keys, values) in enumerate(self.base.past):
            many = lambda t: t.repeat(k, 1, 1, 1)  # noqa: E731
            cache.update(*((many(keys), many(values)) if i >= first else (keys, values)), i)
        n_ctx = self.hf.config.max_position_embeddings - 1
        end = splice.resume_stream(
            self.hf, hook, rows, past_key_values=cache, use_cache=True,
            position_ids=places.clamp(max=n_ctx).repeat(k, 1),
            attention_mask=self._seen(places).repeat(k, 1, 1, 1),
        ).unflatten(0, (k, n))  # fmt: skip
        return self.metric(end[:, self.rows, self.pairs.end - places[:, 0]])

    def _seen(self, places: Tensor) -> Tensor:
        """Additive mask [n 1 s pos+s]: base keys before the suffix, then the suffix's own."""
        n, s = places.shape
        length = self.pairs.base.shape[1]
        index = torch.arange(length, device=places.device)
        before = (index < places[:, :1])[:, None, :].expand(n, s, length)
        own = torch.ones(s, s, dtype=torch.bool, device=places.device).tril().expand(n, s, s)
        seen = torch.cat([before, own], -1)[:, None]
        kind = self.direction.dtype
        return torch.zeros(seen.shape, dtype=kind, device=places.device).masked_fill(
            ~seen, torch.finfo(kind).min
        )

    def gathered(self, stream: Tensor, places: Tensor) -> Tensor:
        """[n s d] of a stream [n pos d] at places [n s]."""
        at = places.clamp(max=stream.shape[1] - 1)
        return stream[self.rows[:, None], at]

    def first_change(self, position: str) -> Tensor:
        """Where a patch at a position first changes a prompt, [n]; what is before is as in base.

        Behind a prompt's end nothing changes it; then it is the end.
        """
        if position:
            return torch.minimum(self.pairs.place(position), self.pairs.end)
        return (self.pairs.base != self.pairs.source).int().argmax(1)

    def pieces(self, items: list, length: int) -> Iterator[list]:
        """Items, as many as make one pass with `length` tokens of all prompts."""
        most = TOKENS_A_PASS.get(self.pairs.base.device.type, 4096)
        some = max(1, most // (length * len(self.rows)))
        for start in range(0, len(items), some):
            yield items[start : start + some]

    def changed_by(self, node: Node) -> Tensor:
        """How the node's part of the stream changes when it is patched, [n pos d_model]."""
        base, source, layer = self.base, self.source, node.layer
        if node.kind == "head":
            at = slice(node.head * self.heads.d_head, (node.head + 1) * self.heads.d_head)
            z = source.z[layer][..., at] - base.z[layer][..., at]
            change = self._written(layer, z, node.head)
        elif node.kind == "resid":
            change = source.pre[layer] - base.pre[layer]
        else:
            change = getattr(source, node.kind)(layer) - getattr(base, node.kind)(layer)
        return change * self.pairs.mask(node.position)[..., None]

    def _written(self, layer: int, z: Tensor, head: int) -> Tensor:
        """How what attention writes changes with z of one head, a norm behind it included."""
        heads = self.heads
        scale, norm = heads.post(layer, "attn")
        change = z @ heads.W_O(layer)[head]
        if norm is None:
            return change if scale == 1.0 else change * scale
        whole = self.base.z[layer].unflatten(-1, (heads.n_heads, heads.d_head))
        raw = torch.einsum("...hd,hdm->...m", whole, heads.W_O(layer)) + heads.b_O(layer)
        return (norm(raw + change) - norm(raw)) * scale
