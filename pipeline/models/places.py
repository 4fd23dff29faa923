"""What a hook takes of a module's input or output, and how a new value is put back. [torch]

    plain        the tensor itself, or the first of a tuple
    times        the output times a number of the config (Granite's residual_multiplier)
    half         one half of the columns: gate or up of a joint projection
    q, k, v      the columns of one slot of a joint projection
    normalized   n = c(x) / s(x) of a norm g n + b;   scale   s(x), one number per token

c takes the mean away in a layer norm and nothing in an RMS norm. g is measured, since models write
the gain in several ways (Gemma's is 1 + its weight), and an edit adds g (n' - n) to the output, so
that an edit which changes nothing keeps every bit.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.errors import RetraceError

PROBE = 1e3  # size of the coordinates that a norm is measured with; its epsilon vanishes beside it
Columns = slice | Tensor


def slots(form: str, width: int, n_heads: int, d_head: int) -> dict[str, Tensor]:
    """The columns of q, k and v in a joint projection, [heads*d_head] each, head by head.

    Args:
        form: qkv, group or codegen, see families.py.
        width: columns in all; n_heads queries, and as many keys as values.

    Returns:
        {} where the form does not fit the width.
    """
    n_key = (width // d_head - n_heads) // 2
    if n_key < 1 or (n_heads + 2 * n_key) * d_head != width or n_heads % n_key:
        return {}
    index = torch.arange(width)
    if form == "qkv":
        q, k, v = index.split([n_heads * d_head, n_key * d_head, n_key * d_head])
        return {"q": q, "k": k, "v": v}
    if form == "group":
        each = index.view(n_key, n_heads // n_key + 2, d_head)
        q, k, v = each[:, :-2], each[:, -2], each[:, -1]
        return {"q": q.flatten(), "k": k.flatten(), "v": v.flatten()}
    if n_key != n_heads or width % 12:
        return {}
    q, v, k = index.view(4, 3, -1).unbind(1)
    return {"q": q.flatten(), "k": k.flatten(), "v": v.flatten()}


def weight_of(module: nn.Module) -> Float[Tensor, "d_out d_in"]:
    """The weight of a linear map; GPT-2's Conv1D holds it the other way round."""
    return module.weight if isinstance(module, nn.Linear) else module.weight.T


def as_slice(columns: Tensor) -> Columns:
    """Adjacent columns as a slice, which reads without a copy."""
    first, last = int(columns[0]), int(columns[-1])
    return slice(first, last + 1) if last - first + 1 == len(columns) else columns


def columns_of(module: nn.Module, what: str, end: nn.Module | None, n_heads: int) -> Columns:
    """The columns of a joint projection that 'q of qkv' or 'first half' means.

    Args:
        end: the output projection, whose width is that of all heads; halves need none.

    Raises:
        RetraceError: the projection does not hold these heads in this form.
    """
    width = len(weight_of(module))
    if what.endswith(" half"):
        return slice(0, width // 2) if what.startswith("first") else slice(width // 2, width)
    slot, _, form = what.split()
    d_head = weight_of(end).shape[1] // n_heads
    found = slots(form, width, n_heads, d_head)
    if not found:
        raise RetraceError(
            f"attn.hook_{slot}: a joint projection of {width} columns does not hold {n_heads} "
            f"heads of {d_head} in the form '{form}'; correct the model's layout"
        )
    return as_slice(found[slot])


# --- devices -------------------------------------------------------------------------------


def where(x: Tensor) -> Any:
    """The device of a tensor."""
    return x.device


def moved(x: Tensor, device: Any) -> Tensor:
    """x on a device; None leaves it where it is."""
    return x if device is None else x.to(device)


def full(x: Tensor) -> Tensor:
    """x in float32 where it is a half one: what is summed up outside of a model is not rounded."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def at_home(see: Callable[[Tensor], Tensor | None], home: Any) -> Callable:
    """`see` on one device, wherever the layer is; home None: the model has one device."""
    if home is None:
        return see

    def seen(x: Tensor) -> Tensor | None:
        new = see(moved(x, home))
        return None if new is None else moved(new, where(x))

    return seen


# --- norms ---------------------------------------------------------------------------------


def probe_of(like: Tensor) -> tuple[Tensor, Tensor]:
    """(coordinates [1 d] of mean 0 without a zero, their root mean square), no half numbers."""
    d = like.shape[-1]
    n = (d + 1) // 2
    probe = full(like).new_full((1, d), PROBE)  # its square is more than float16 holds
    probe[:, n:] *= -n / max(d - n, 1)
    return probe, probe.square().mean().sqrt()


def centres(norm: Callable[[Tensor], Tensor], like: Tensor) -> bool:
    """Whether a norm takes the mean of the coordinates away, measured: a layer norm does.

    Args:
        like: [... d], of the norm's width, dtype and device.
    """
    probe, _ = probe_of(like)
    return torch.allclose(norm(probe), norm(probe + PROBE), rtol=1e-2)


def gain(norm: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """g [1 d] of a norm g n + b, measured; `like` as of `centres`."""
    probe, size = probe_of(like)
    return (norm(probe) - norm(-probe)) / 2 * size / probe


def linear_part(norm: nn.Module, rows: Tensor) -> Tensor:
    """g * c(row) of a norm g c(x) / s(x) + b, of rows [... d]."""
    if isinstance(norm, nn.Identity):
        return rows
    g, weight = gain(as_function(norm), rows), getattr(norm, "weight", None)
    weight = None if weight is None else moved(weight, where(g))
    if weight is not None and torch.allclose(g[0], weight.to(g.dtype), rtol=1e-4):
        g = weight  # the same, but for the rounding of a measurement
    return (rows - rows.mean(-1, keepdim=True) if is_centred(norm, rows) else rows) * g


def as_function(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """A norm in float32 without its hooks, to be measured; it answers where its input lies."""
    dtype = next((p.dtype for p in norm.parameters()), torch.float32)
    if dtype in (torch.float16, torch.bfloat16):
        norm = copy.deepcopy(norm).float()
    return lambda x: moved(norm.forward(x), where(x))


def epsilon(norm: nn.Module, like: Tensor) -> float:
    """What a norm adds to the mean square; measured where it does not say (OLMo's).

    A vector of mean square m comes out shorter by sqrt(m / (m + eps)) than a very long one.
    """
    for name in ("eps", "variance_epsilon", "epsilon", "norm_eps"):
        value = getattr(norm, name, None)
        if isinstance(value, int | float):
            return float(value)
    run, m = as_function(norm), 1e-5
    probe, size = probe_of(like)
    short = run(probe / size * m**0.5) - run(-probe / size * m**0.5)
    ratio = (short.norm() / (run(probe) - run(-probe)).norm()).item()
    return m * (ratio**-2 - 1)


def measured(norm: nn.Module, x: Tensor) -> tuple[bool, float]:
    """(whether a norm centres, its epsilon): properties of its class, so measured once."""
    if "_retrace_norm" not in norm.__dict__:
        with torch.no_grad():
            like = x.detach().float()
            norm.__dict__["_retrace_norm"] = centres(as_function(norm), like), epsilon(norm, like)
    return norm.__dict__["_retrace_norm"]


def is_centred(norm: nn.Module, x: Tensor) -> bool:
    """Whether a norm takes the mean of its input x away."""
    return measured(norm, x)[0]


def standardised(norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(c(x) [... d], s(x) [... 1], n = c(x) / s(x)) of a norm's input x, in float32 or better."""
    if isinstance(norm, nn.Identity):
        return x, torch.ones_like(x[..., :1]), x
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    centred, eps = measured(norm, x)
    c = x - x.mean(-1, keepdim=True) if centred else x
    square = c.pow(2).mean(-1, keepdim=True) + eps
    return c, square.sqrt(), c * torch.rsqrt(square)


# --- places --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where the stream at a hook is read.

    Attributes:
        module: whose input or output it is.
        side: input, output, or norm (of a norm, both).
        scale: what the output is multiplied with.
        columns: which columns are meant; None for all.
        what: normalized or scale, of a norm.
        kept: False where the layer changes the tensor in place later, so that a copy is read.
        rows: where the module sees sequences run together, a function that gives (batch, pos).
        home: where values are read, of a model that is spread over devices.
    """

    module: nn.Module
    side: str
    scale: float = 1.0
    columns: Columns | None = None
    what: str = ""
    kept: bool = True
    rows: list[tuple[int, int]] = field(default_factory=list)
    home: Any = None

    def value(self, raw: Tensor) -> Tensor:
        """[batch pos d] at the hook, of the module's whole tensor."""
        if raw.dim() == 2 and self.rows:
            raw = raw.unflatten(0, self.rows[-1])
        if isinstance(self.columns, Tensor):
            return raw.index_select(-1, self.columns.to(raw.device))
        raw = raw if self.columns is None else raw[..., self.columns]
        raw = raw if self.scale == 1.0 else raw * self.scale
        return raw if self.kept else raw.clone()

    def put(self, raw: Tensor, new: Tensor) -> Tensor:
        """The module's whole tensor, with a new value at the hook, in the model's own dtype."""
        new = new.to(raw.dtype)
        new = new if self.scale == 1.0 else new / self.scale
        new = new if self.kept else new.clone()  # the reader's own stays as it is
        flat = raw.dim() == 2 and bool(self.rows)
        new = new.flatten(0, 1) if flat else new
        if self.columns is None:
            return new
        whole = raw.clone()
        columns = self.columns
        whole[..., columns.to(raw.device) if isinstance(columns, Tensor) else columns] = new
        return whole

    def register(self, see: Callable[[Tensor], Tensor | None]) -> Any:
        """Call `see` on the stream; what it returns, if anything, takes its place. The handle."""
        see = at_home(see, self.home)
        if self.side == "norm":
            return self._on_norm(see)
        if self.side == "input":

            def before(_: nn.Module, args: tuple, kwargs: dict):
                raw = stream_of(args, kwargs)
                new = see(self.value(raw))
                if new is None:
                    return None
                new = self.put(raw, new)
                if args:
                    return (new, *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": new}

            return self.module.register_forward_pre_hook(before, with_kwargs=True)

        def after(_: nn.Module, __: tuple, out):
            several = isinstance(out, tuple | list)
            raw = out[0] if several else out
            new = see(self.value(raw))
            if new is None:
                return None
            new = self.put(raw, new)
            return type(out)([new, *out[1:]]) if several else new

        return self.module.register_forward_hook(after)

    def _on_norm(self, see: Callable[[Tensor], Tensor | None]) -> Any:
        def after(norm: nn.Module, args: tuple, kwargs: dict, out: Tensor):
            raw = moved(stream_of(args, kwargs), where(out))
            c, s, n = standardised(norm, raw)
            new = see(self.value(s if self.what == "scale" else n))
            if new is None:
                return None
            if raw.dim() == 2 and new.dim() == 3:
                new = new.flatten(0, 1)
            change = (c / new if self.what == "scale" else new) - n
            if isinstance(norm, nn.Identity):
                return (out + change).to(out.dtype)
            return (out + gain(as_function(norm), n.detach()) * change).to(out.dtype)

        return self.module.register_forward_hook(after, with_kwargs=True)


def stream_of(args: tuple, kwargs: dict) -> Tensor:
    """The stream among a module's arguments: the first, or hidden_states."""
    return args[0] if args else kwargs["hidden_states"]
