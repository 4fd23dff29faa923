"""Hooks on tensors that no module takes or returns. [torch]

    attn.hook_attn_scores    [batch pos n_heads*n_keys]   what the softmax over keys reads
    attn.hook_pattern        [batch pos n_heads*n_keys]   what it gives: attention itself
    attn.hook_result         [batch pos n_heads*d_model]  z_h W_O[h], what each head writes
    mlp.hook_expert_weights  [batch pos n_experts]        the probabilities of a router

A row belongs to a position, as at every other hook, so that these can be stored, trained on,
spliced and patched as others are; TransformerLens keeps scores and patterns as
[batch n_heads pos n_keys], which `by_head` gives. Scores of keys that a query does not see are 0
here (there, -inf), and an edit leaves them unseen.

Scores, patterns and probabilities are what `softmax` is called with and returns within the forward
pass of attention or router, whoever wrote it. Fused attention never forms them, so while one is
read the model runs its eager attention: other hooks of such a pass differ by float rounding. A
router that chooses experts first and takes the softmax of those alone (GPT-OSS, Granite) gives the
others 0, and an edit changes how much the chosen ones count, not which are chosen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pipeline.errors import RetraceError
from pipeline.models import places

SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax}
SIGMOID = {torch.sigmoid, F.sigmoid, Tensor.sigmoid}  # DeepSeek-V3's router
TOP_K = {torch.topk, Tensor.topk}
See = Callable[[Tensor], Tensor | None]  # a reader; what it returns, if anything, is put back


class Removable:
    """What `register` returns: `remove` undoes it."""

    def __init__(self, undo: Callable[[], None]) -> None:
        self.remove = undo


def by_head(
    x: Float[Tensor, "batch pos columns"], n_heads: int
) -> Float[Tensor, "batch n_heads pos each"]:
    """Scores, a pattern or results as TransformerLens has the first two: head by head."""
    return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)


def _flat(x: Float[Tensor, "batch n_heads pos each"]) -> Float[Tensor, "batch pos columns"]:
    return x.transpose(1, 2).flatten(-2)


# --- readers -------------------------------------------------------------------------------


class Readers:
    """Those who read, and may replace, tensors of one module, in the order in which they came."""

    handles: tuple = ()

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.readers = module, []

    def add(self, what: str, see: See) -> Removable:
        """Let `see` read `what` in every pass until it is removed."""
        entry = (what, see)
        self.readers.append(entry)

        def remove() -> None:
            self.readers.remove(entry)
            if not self.readers:
                for handle in self.handles:
                    handle.remove()
                del self.module.__dict__["_retrace_readers"]

        return Removable(remove)

    def seen(self, what: str, x: Tensor, value: Callable, put: Callable) -> Tensor:
        """x after all readers of `what`.

        Args:
            value, put: from the raw tensor to what a hook shows, and back.
        """
        for wanted, see in self.readers:
            if wanted == what and (new := see(value(x))) is not None:
                x = put(x, new)
        return x


def readers_of(module: nn.Module, kind: type[Readers], *args: Any) -> Readers:
    """The readers of a module; one object serves all of them."""
    if "_retrace_readers" not in module.__dict__:
        module.__dict__["_retrace_readers"] = kind(module, *args)
    return module.__dict__["_retrace_readers"]


class Results(Readers):
    """The output projection of attention, whose output is sum_h z_h W_O[h] + b_O."""

    def __init__(self, module: nn.Module, n_heads: int) -> None:
        super().__init__(module)
        self.n_heads, self.handles = n_heads, (module.register_forward_hook(self._after),)

    def _after(self, module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        z = args[0].unflatten(-1, (self.n_heads, -1))
        W_O = places.weight_of(module).T.unflatten(0, (self.n_heads, -1))
        result = torch.einsum("...hd,hdm->...hm", z, W_O).flatten(-2)
        new = self.seen("result", result, lambda x: x, lambda _, new: new)
        if new is result:
            return out
        # the change alone is added, so that an edit which changes nothing keeps every bit
        return out + (new.to(result.dtype) - result).unflatten(-1, (self.n_heads, -1)).sum(-2)


class Calls(Readers, TorchFunctionMode):
    """While it is entered, readers see what one softmax reads and gives.

    It is entered when its module's forward begins and left when that ends, an error included.
    """

    is_entered = False

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        enter = module.register_forward_pre_hook(self._enter)
        leave = module.register_forward_hook(self._leave, always_call=True)
        self.handles = (enter, leave)

    def _enter(self, *_: Any) -> None:
        self.begin()
        self.__enter__()
        self.is_entered = True

    def _leave(self, *_: Any) -> None:
        if self.is_entered:  # not where another's hook failed before
            self.is_entered = False
            self.__exit__(None, None, None)

    def begin(self) -> None:
        """Called before each forward pass."""


class Attention(Calls):
    """The softmax over keys of [batch n_heads pos n_keys].

    Attention with sinks may put a logit beside those of the keys (GPT-OSS), or scale what the
    softmax gave (Granite with sinks), so that the last tensors joined before it tell.
    """

    def begin(self) -> None:
        self.joined: list[tuple[int, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        kwargs = kwargs or {}
        if func is torch.cat and isinstance(parts := args[0] if args else None, tuple | list):
            self.joined = [tuple(x.shape) for x in parts]
        if func not in SOFTMAX or not args or args[0].dim() != 4:
            return func(*args, **kwargs)
        raw = args[0]
        sink = [(*raw.shape[:3], raw.shape[3] - 1), (*raw.shape[:3], 1)]
        n_keys = raw.shape[-1] - (hasattr(self.module, "sinks") and self.joined == sink)

        def value(x: Tensor) -> Tensor:
            return _flat(x[..., :n_keys].masked_fill(unseen(raw)[..., :n_keys], 0))

        def put(x: Tensor, new: Tensor) -> Tensor:
            new = by_head(new, x.shape[1]).to(x.dtype)
            new = torch.where(unseen(raw)[..., :n_keys], x[..., :n_keys], new)
            return torch.cat([new, x[..., n_keys:]], -1)

        scores = self.seen("attn_scores", raw, value, put)
        return self.seen("pattern", func(scores, *args[1:], **kwargs), value, put)


def unseen(
    scores: Float[Tensor, "batch n_heads pos keys"],
) -> Bool[Tensor, "batch n_heads pos keys"]:
    """Keys that a mask hides: their scores are -inf or near the least that the dtype holds.

    CodeGen divides masked scores by sqrt(d_head), and GPT-1 puts -10,000 in their place.
    """
    least, of_gpt1 = torch.finfo(scores.dtype).min, scores.new_tensor(-1e4)
    return (scores < least / 32) | (scores == of_gpt1)


class Router(Calls):
    """The softmax, or sigmoid, that makes a router's probabilities: the first of its block.

    Some blocks take it in the router, others behind it.
    """

    def __init__(self, module: nn.Module, router: nn.Module) -> None:
        super().__init__(module)
        self.n_experts = next(p for p in router.parameters() if p.dim() == 2).shape[0]

    def begin(self) -> None:
        self.chosen: Int[Tensor, "tokens k"] | None = None
        self.is_over = False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        out = func(*args, **(kwargs or {}))
        if self.is_over:
            if func in SOFTMAX and out.shape[-1:] == (self.n_experts,):
                self.module.__dict__["_retrace_sequential"] = True
            return out
        if func in TOP_K:
            self.chosen = out[1]
        if func not in SOFTMAX | SIGMOID:
            return out
        chosen = self.chosen
        if chosen is None or out.shape != chosen.shape:
            if out.shape[-1] != self.n_experts:
                return out
            self.is_over = True
            return self.seen("probabilities", out, lambda x: x, lambda x, new: new.to(x.dtype))
        self.is_over = True

        def value(x: Tensor) -> Tensor:
            return x.new_zeros(*x.shape[:-1], self.n_experts).scatter(-1, chosen, x)

        def put(x: Tensor, new: Tensor) -> Tensor:
            return new.to(x.dtype).gather(-1, chosen)

        return self.seen("probabilities", out, value, put)


def is_sequential(block: nn.Module) -> bool:
    """Whether a block's router was seen to take a second softmax over its experts."""
    return block.__dict__.get("_retrace_sequential", False)


# --- places --------------------------------------------------------------------------------


@dataclass(frozen=True)
class InnerPlace:
    """Where such a hook is read; has what `places.Place` has.

    Attributes:
        hf: the model.
        module: attention, a block of experts, the output projection of attention, or a bridge's
            hook point.
        what: attn_scores, pattern, probabilities or result.
        n_heads: of attention.
        rows: where the module sees sequences run together, a list with the last (batch, pos).
        router: of a block of experts.
        home: as of `places.Place`.
    """

    hf: nn.Module
    module: nn.Module
    what: str
    n_heads: int
    rows: list[tuple[int, int]]
    router: nn.Module | None = None
    scale: float = 1.0
    home: Any = None

    def register(self, see: See) -> Any:
        """Call `see` on the tensor; what it returns, if anything, takes its place. The handle."""
        see = places.at_home(see, self.home)
        if self.what == "result":
            results = readers_of(self.module, Results, self.n_heads)
            return results.add(self.what, self._unflattened(see))
        if type(self.module).__name__ == "HookPoint":
            return self._on_hook_point(see)
        if self.what == "probabilities":
            calls = readers_of(self.module, Router, self.router)
            return calls.add(self.what, self._unflattened(see))
        if self.what == "attn_scores" and hasattr(self.module, "sinks"):
            raise RetraceError(
                "attn.hook_attn_scores: attention with sinks shifts its scores before the softmax, "
                "so that they are known up to a number per query; take attn.hook_pattern"
            )
        restore = eager(self.hf)
        handle = readers_of(self.module, Attention).add(self.what, see)

        def remove() -> None:
            handle.remove()
            restore()

        return Removable(remove)

    def _unflattened(self, see: See) -> See:
        """`see` of [batch pos d], where the module has [batch*pos d]."""

        def flat(x: Tensor) -> Tensor | None:
            if x.dim() != 2 or not self.rows:
                return see(x)
            new = see(x.unflatten(0, self.rows[-1]))
            return None if new is None else new.flatten(0, 1)

        return flat

    def _on_hook_point(self, see: See) -> Any:
        def after(_: nn.Module, __: tuple, out: Tensor) -> Tensor | None:
            hidden = out == 0 if self.what == "pattern" else unseen(out)
            new = see(_flat(out.masked_fill(hidden, 0)))
            return None if new is None else torch.where(hidden, out, by_head(new, self.n_heads))

        return self.module.register_forward_hook(after)


def eager(hf: nn.Module) -> Callable[[], None]:
    """Let the model run eager attention until the function that comes back is called."""
    if not hasattr(hf, "set_attn_implementation"):  # a native model has no other
        return lambda: None
    count, before = hf.__dict__.get("_retrace_eager", (0, hf.config._attn_implementation))
    hf.__dict__["_retrace_eager"] = (count + 1, before)
    if before != "eager" and not count:
        _set_attention(hf, "eager")

    def restore() -> None:
        count, before = hf.__dict__["_retrace_eager"]
        hf.__dict__["_retrace_eager"] = (count - 1, before)
        if count == 1:
            del hf.__dict__["_retrace_eager"]
            if before != "eager":
                _set_attention(hf, before)

    return restore


def _set_attention(hf: nn.Module, implementation: str) -> None:
    """Switch a loaded model's attention; Falcon reads the config alone."""
    hf.set_attn_implementation(implementation)
    if hf.config._attn_implementation != implementation:
        hf.config._attn_implementation = implementation
