"""A model as a graph of which every edge can be cut, many cut graphs in one forward pass. [torch]

Nodes and edges are those of Conmy et al. 2023 (2304.14997) in their code: the embedding, heads,
MLPs and the logits, with an input node for each query, key and value of a head.

    u -> v           v reads what u writes: into q, k, v of a head, an MLP, or the logits
    input q -> head  the head uses its query; likewise its key and value

    x_v = b + sum_u (m_uv a_u + (1 - m_uv) a_u')          m: 1 kept, 0 cut

a is what a node writes in the run itself, a' what it writes on a corrupt prompt, or 0, and b the
biases of attention, which no edge carries. A cut q is the q of a run in which every edge is cut.

1. The plain forward pass of the Hugging Face model runs under hooks; its own stream is not used.
2. Before each module that reads, its inputs are put together from the sources so far.
3. What heads and MLPs write becomes a source of all that follows.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pipeline.circuits.patching import LOGITS, Edge
from pipeline.errors import RetraceError
from pipeline.models import hooks, places
from pipeline.models.heads import SLOTS, Heads
from pipeline.models.pairs import Node

Target = tuple[int, str]  # a layer, and what of it reads: q, k, v, mlp or logits
Present = Float[Tensor, "graphs edges"]  # 1: the edge is kept, 0: it is cut
Logits = Float[Tensor, "graphs batch pos d_vocab"]


class EdgeGraph:
    """The graph of a model on some prompts.

    Attributes:
        sources: the nodes that write, in the order in which they are computed.
        targets: the nodes that read, by layer and by what they read.
        edges: in the order of ACDC: targets from the logits down; of one target the latest source
            first. Of a layer's heads v is before k before q, each cut whole before its inputs.
        clean: logits of the whole graph, [batch pos d_vocab].
        on, off: what each source writes in the run itself, and on a cut edge,
            [sources batch pos d_model]; on_inputs, off_inputs: likewise q, k and v of a layer.
        columns, gates: target -> numbers of the edges into it; of those from its inputs to heads.
    """

    def __init__(
        self,
        hf: nn.Module,
        tokens: Int[Tensor, "batch pos"],
        corrupt: Int[Tensor, "batch pos"] | None = None,
        positions: bool = False,
    ) -> None:
        """
        Args:
            tokens: prompts of one length or padded on the right.
            corrupt: what a cut edge carries comes from these; None: a cut edge carries 0.
            positions: the positional embedding is a node of its own.
        """
        self.hf, self.tokens, self.heads = hf, tokens, Heads(hf)
        hooks.require(hf, "edges")
        self.n_embeds = 1 + positions
        self.has_mlp = "blocks.0.hook_mlp_out" in hooks.hook_names(hf)
        self.check_linear()
        self.sources = self._sources()
        self.targets = self._targets()
        self.edges = list(self._edges())
        self.at = {edge: i for i, edge in enumerate(self.edges)}
        self.out_of: dict[tuple[str, int], list[int]] = {}
        for edge, i in self.at.items():
            self.out_of.setdefault(edge.source[:2], []).append(i)
        self.columns = {
            key: self._index([[Edge(s, t, slot) for s in self.before(key)] for t, slot in some])
            for key, some in self.targets.items()
        }
        self.gates = {
            key: self._index([self._gate(key[0], h, key[1]) for h in range(len(some))])
            for key, some in self.targets.items()
            if key[1] in SLOTS
        }
        shape = (len(self.sources), *tokens.shape, self.heads.d_model)
        self.off = torch.zeros(shape, device=tokens.device, dtype=next(hf.parameters()).dtype)
        self.off_inputs: dict[Target, Tensor] = {}
        whole = self.everything()
        if corrupt is not None:
            self.off = torch.stack(self.traced(whole, tokens=corrupt)[1].made).squeeze(1).detach()
        nothing = whole * 0
        nothing[:, torch.cat(list(self.gates.values()))] = 1
        cut = self.traced(nothing)[1].inputs
        self.off_inputs = {key: x.squeeze(0).detach() for key, x in cut.items()}
        logits, run = self.traced(whole)
        self.clean = logits[0]
        self.on = torch.stack(run.made).squeeze(1)
        self.on_inputs = {key: x.squeeze(0) for key, x in run.inputs.items()}

    def check_linear(self) -> None:
        """RetraceError where attention's bias passes a norm, whose scale the heads decide."""
        for i in range(self.heads.n_layers):
            _, norm = self.heads.post(i, "attn")
            if norm is not None and isinstance(self.heads.b_O(i), Tensor):
                raise RetraceError(
                    f"model type '{self.hf.config.model_type}': a norm behind attention scales its "
                    f"bias by what its heads write, so that no constant stands for it; patch nodes"
                )

    def _sources(self) -> list[Node]:
        out = [Node("embed", 0), Node("pos", 0)][: self.n_embeds]
        for i in range(self.heads.n_layers):
            out += [Node("head", i, h) for h in range(self.heads.n_heads)]
            out += [Node("mlp", i)] * self.has_mlp
        return out

    def _targets(self) -> dict[Target, list[tuple[Node, str]]]:
        """The readers of each kind and layer, in the order of computation."""
        heads, out = self.heads, {}
        for i in range(heads.n_layers):
            for slot in SLOTS:
                out[i, slot] = [(Node("head", i, h), slot) for h in range(heads.count(slot))]
            if self.has_mlp:
                out[i, "mlp"] = [(Node("mlp", i), "")]
        return out | {(heads.n_layers, "logits"): [(LOGITS, "")]}

    def before(self, key: Target) -> list[Node]:
        """The sources that a target can read."""
        layer, what = key
        n = self.n_embeds + layer * (self.heads.n_heads + self.has_mlp)
        beside = what == "mlp" and not self.heads.parallel
        return self.sources[: n + self.heads.n_heads * beside]

    def _gate(self, layer: int, head: int, slot: str) -> Edge:
        return Edge(Node("input", layer, head), Node("head", layer, head), slot)

    def _edges(self) -> Iterator[Edge]:
        def latest_first(source: Node) -> tuple:
            return -source.layer, source.kind != "mlp", source.head

        for layer in range(self.heads.n_layers, -1, -1):
            for what in ("logits", "mlp", "uses", "v", "k", "q"):
                for slot in "vkq" if what == "uses" and (layer, "v") in self.targets else "":
                    for target, _ in reversed(self.targets[layer, slot]):
                        yield self._gate(layer, target.head, slot)
                for target, name in reversed(self.targets.get((layer, what), [])):
                    parts = sorted(self.before((layer, what))[self.n_embeds :], key=latest_first)
                    for source in [*parts, *self.sources[: self.n_embeds]]:
                        yield Edge(source, target, name)

    def _index(self, edges: list) -> Int[Tensor, "*edges"]:
        """The numbers of edges, in a list or in a list of lists."""
        where = [
            [self.at[e] for e in row] if isinstance(row, list) else self.at[row] for row in edges
        ]
        return torch.tensor(where, device=self.tokens.device)

    def carriers(self, i: int) -> list[int]:
        """The edges that pass on what edge i carries: with all of them cut, i changes nothing.

        For an edge into a query, the edge from that query to its head. For that edge, all edges out
        of the layer's heads, since several heads may share a key. For an edge into the logits, the
        edge itself.
        """
        edge = self.edges[i]
        if edge.target == LOGITS:
            return [i]
        if edge.source.kind != "input" and edge.target.kind == "head":
            return [self.at[self._gate(edge.target.layer, edge.target.head, edge.slot)]]
        return self.out_of[edge.target[:2]]

    def everything(self, k: int = 1) -> Present:
        """The whole graph, k times: ones."""
        kind = next(self.hf.parameters())
        return torch.ones(k, len(self.edges), device=kind.device, dtype=kind.dtype)

    def run(self, present: Present) -> Logits:
        """Logits of cut graphs."""
        return self.traced(present)[0]

    def traced(
        self,
        present: Present,
        embeds: list[Float[Tensor, "graphs batch pos d_model"]] | None = None,
        tokens: Int[Tensor, "batch pos"] | None = None,
    ) -> tuple[Logits, "Pass"]:
        """The same, and what was read and written on the way.

        Args:
            embeds: one per embedding, in the place of what the embeddings write.
            tokens: in the place of the graph's own.
        """
        tokens = self.tokens if tokens is None else tokens
        run = Pass(self, present, embeds)
        with run.hooked():
            out = self.hf(input_ids=tokens.repeat(len(present), 1), use_cache=False)
        return run.by_graph(out.logits), run


class Pass:
    """One forward pass of several cut graphs on all prompts.

    Attributes:
        made: what each source so far writes, [graphs batch pos d_model].
        read: what each target reads, [graphs targets batch pos d_model].
        inputs: queries, keys and values that the heads use, [graphs batch pos heads*d_head].
    """

    def __init__(self, graph: EdgeGraph, present: Present, embeds: list[Tensor] | None) -> None:
        self.graph, self.embeds = graph, embeds
        self.present = present.to(graph.off.dtype)
        self.made: list[Tensor] = []
        self.read: dict[Target, Tensor] = {}
        self.inputs: dict[Target, Tensor] = {}
        self.embed: Tensor | None = None

    def by_graph(self, x: Float[Tensor, " rows *rest"]) -> Float[Tensor, "graphs batch *rest"]:
        return x.unflatten(0, (len(self.present), -1))

    def reads(self, key: Target) -> Float[Tensor, "graphs targets batch pos d_model"]:
        """x_v of the targets of a kind and layer."""
        graph, (layer, what) = self.graph, key
        m = self.present[:, graph.columns[key]]  # [graphs targets sources]
        n = m.shape[-1]
        x = torch.einsum("kts,sknpd->ktnpd", m, torch.stack(self.made[:n]))
        x = x + torch.einsum("kts,snpd->ktnpd", 1 - m, graph.off[:n])
        for i in range(layer + (what == "mlp" and not graph.heads.parallel)):
            bias = graph.heads.b_O(i)
            x = x + bias * graph.heads.post(i, "attn")[0]
        self.read[key] = x
        return x

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Inside: the next forward pass of the model is that of the graphs."""
        graph = self.graph
        layers, heads = graph.heads.layers, graph.heads
        with ExitStack() as stack:

            def add(handle: Any) -> None:
                stack.callback(handle.remove)

            add(hooks.site(graph.hf, "hook_embed").register(self._keep_embed))
            add(layers[0].register_forward_pre_hook(self._begin, with_kwargs=True))
            for i in range(heads.n_layers):
                modules = {s: heads.module_of(i, s) for s in SLOTS}
                for module in dict.fromkeys(modules.values()):
                    slots = [s for s in SLOTS if modules[s] is module]
                    add(module.register_forward_hook(self._projection(i, slots)))
                add(heads.site(i, "attn.hook_z").register(self._heads_write(i)))
                if graph.has_mlp:
                    reads = self._stream((i, "mlp"), partial(heads.mlp_reads, i))
                    add(heads.site(i, "mlp.hook_in").register(reads))
                    add(heads.site(i, "hook_mlp_out").register(self._mlp_writes))
            end = (heads.n_layers, "logits")
            last = heads.site(heads.n_layers - 1, "hook_resid_post")
            add(last.register(self._stream(end, lambda x: x)))
            yield

    def _keep_embed(self, out: Tensor) -> None:
        self.embed = out

    def _begin(self, _: nn.Module, args: tuple, kwargs: dict) -> None:
        stream = places.moved(places.stream_of(args, kwargs), self.graph.heads.home)
        parts = [stream] if self.graph.n_embeds == 1 else [self.embed, stream - self.embed]
        self.made = [*(self.embeds or map(self.by_graph, parts))]

    def _projection(self, layer: int, slots: list[str]) -> Callable:
        """A hook: what a projection writes, each head's part of what that head reads."""
        heads = self.graph.heads
        order = torch.cat([heads.columns(layer, s) for s in slots])
        back = None if bool((order.diff() == 1).all()) else order.argsort()

        def after(module: nn.Module, _: tuple, out: Tensor) -> Tensor:
            columns = []
            for slot in slots:
                x = heads.attn_reads(layer, self.reads((layer, slot)))
                each = [
                    module.forward(x[:, h].contiguous())[..., heads.place(layer, slot, h).columns]
                    for h in range(heads.count(slot))
                ]
                made = places.moved(torch.cat(each, -1), heads.home)
                columns.append(self._gated((layer, slot), made))
            whole = torch.cat(columns, -1).flatten(0, 1)
            whole = whole if back is None else whole[..., back.to(whole.device)]
            return places.moved(whole, places.where(out))

        return after

    def _gated(
        self, key: Target, value: Float[Tensor, "graphs batch pos d_slot"]
    ) -> Float[Tensor, "graphs batch pos d_slot"]:
        """Queries, keys or values, cut where their edge is."""
        if self.graph.off_inputs:
            m = self.present[:, self.graph.gates[key]].repeat_interleave(
                self.graph.heads.d_head, -1
            )[:, None, None]
            value = m * value + (1 - m) * self.graph.off_inputs[key]
        self.inputs[key] = value
        return value

    def _heads_write(self, layer: int) -> Callable:
        """A hook at z: what each head writes becomes a source."""

        def see(z: Tensor) -> None:
            self.made += self.by_graph(self.graph.heads.written(z, layer)).unbind(-2)

        return see

    def _stream(self, key: Target, norm: Callable[[Tensor], Tensor]) -> Callable:
        """A hook: a norm of what the one target of a key reads."""
        return lambda _: norm(self.reads(key)[:, 0]).flatten(0, 1)

    def _mlp_writes(self, out: Tensor) -> None:
        self.made.append(self.by_graph(out))
