"""TransformerLens's hook names on the modules of a Hugging Face causal LM.

The forward pass runs on the plain Hugging Face model with PyTorch's own forward hooks: on
2 cores that is about ten times as fast as the bridge's `run_with_cache` (design, decision 6).
A test holds every hook of every family equal to TransformerBridge's.

    x ──┬─ ln ─ attn ─(+)─┬─ ln ─ mlp ─(+)── out
    resid_pre   attn_out  resid_mid  mlp_out  resid_post

`capture` reads the stream, `stop_after` ends the forward pass behind the last hook that is
needed, `edited` replaces the stream. Everything here keeps gradients where the caller has them.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import RetraceError, nearest

Side = Literal["input", "output"]

# In the order in which a layer computes them.
LAYER_HOOKS = ("hook_resid_pre", "attn.hook_z", "hook_attn_out", "hook_resid_mid", "mlp.hook_in",
               "mlp.hook_post", "hook_mlp_out", "hook_resid_post")  # fmt: skip
# What TransformerBridge calls a hook itself, every family alike; the names above are its aliases.
BRIDGE_NAMES = {
    "hook_embed": "embed.hook_out",
    "hook_resid_pre": "hook_in",
    "attn.hook_z": "attn.o.hook_in",
    "hook_attn_out": "attn.hook_out",
    "hook_resid_mid": "ln2.hook_in",
    "mlp.hook_post": "mlp.out.hook_in",
    "hook_mlp_out": "mlp.hook_out",
    "hook_resid_post": "hook_out",
}


@dataclass(frozen=True)
class Family:
    """Where the modules of an architecture lie."""

    embed: str
    layers: str
    ln1: str
    attn: str
    ln2: str
    mlp: str
    mlp_end: str  # the last linear map of the MLP: its input is mlp.hook_post
    attn_end: str  # the output projection: its input is attn.hook_z, all heads side by side


LLAMA = Family(
    "model.embed_tokens", "model.layers", "input_layernorm", "self_attn",
    "post_attention_layernorm", "mlp", "down_proj", "o_proj",
)  # fmt: skip
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gpt2": Family(
        "transformer.wte", "transformer.h", "ln_1", "attn", "ln_2", "mlp", "c_proj", "c_proj"
    ),
    "retrace_native": Family(
        "model.tok_embed", "model.layers", "ln1", "attn", "ln2", "mlp", "fc_out", "o"
    ),
    "gpt_neox": Family(
        "gpt_neox.embed_in", "gpt_neox.layers", "input_layernorm", "attention",
        "post_attention_layernorm", "mlp", "dense_4h_to_h", "dense",
    ),
}  # fmt: skip


def family(hf: nn.Module) -> Family:
    """The family of a model; RetraceError for one that has no entry here."""
    check_type(hf.config.model_type)
    return FAMILIES[hf.config.model_type]


def check_type(kind: str, where: str = "") -> None:
    """RetraceError for a model type that has no entry here.

    Args:
        where: the file that names it, if one does.
    """
    if kind not in FAMILIES:
        raise RetraceError(
            f"{where and where + ': '}model type '{kind}'{nearest(kind, FAMILIES)} has no hooks "
            f"here; supported are {', '.join(FAMILIES)}; add an entry to FAMILIES in "
            f"pipeline/models/hooks.py"
        )


def hook_names(hf: nn.Module) -> list[str]:
    """Every hook of this model that can be read, in the order of computation."""
    has_mid = not getattr(hf.config, "use_parallel_residual", False)  # GPT-NeoX: attn beside mlp
    has_mlp = getattr(hf.config, "d_mlp", 1) != 0  # models trained here may have none
    without = {"hook_resid_mid"} if not (has_mid and has_mlp) else set()
    without |= set() if has_mlp else {"mlp.hook_in", "mlp.hook_post", "hook_mlp_out"}
    layer = [h for h in LAYER_HOOKS if h not in without]
    n_layers = len(hf.get_submodule(family(hf).layers))
    return ["hook_embed", *(f"blocks.{i}.{h}" for i in range(n_layers) for h in layer)]


def bridge_name(hook: str) -> str:
    """TransformerBridge's own name of a hook: blocks.8.hook_out for blocks.8.hook_resid_post.

    SAELens's SAETransformerBridge (6.54) ignores aliases in run_with_hooks and run_with_cache.
    """
    layer, at = re.fullmatch(r"(blocks\.\d+\.|)(.+)", hook).groups()
    return layer + BRIDGE_NAMES.get(at, at)


def check(hf: nn.Module, hook: str) -> None:
    """RetraceError where the model has no such hook, naming the nearest that it has."""
    known = hook_names(hf)
    if hook in known:
        return
    n_layers = len(hf.get_submodule(family(hf).layers))
    layer = re.match(r"blocks\.(\d+)\.", hook)
    if layer and int(layer[1]) >= n_layers:
        raise RetraceError(
            f"hook '{hook}': the model has {n_layers} layers; use blocks.0 to blocks.{n_layers - 1}"
        )
    here = [k for k in known if layer and k.startswith(layer[0])] or known
    raise RetraceError(
        f"hook '{hook}': the model has not{nearest(hook, here)}; a layer has "
        f"{', '.join(sorted({k.split('.', 2)[2] for k in known if k.startswith('blocks.')}))}"
    )


def site(hf: nn.Module, hook: str) -> tuple[nn.Module, Side]:
    """The module whose input or output is the stream at a hook.

    Args:
        hf: a Hugging Face causal LM.
        hook: TransformerLens's name, such as blocks.8.hook_resid_post.
    """
    check(hf, hook)
    names = family(hf)
    if hook == "hook_embed":
        return _submodule(hf, names.embed), "output"
    _, number, rest = hook.split(".", 2)
    layer = _submodule(hf, names.layers)[int(number)]
    if rest == "mlp.hook_post":
        mlp = _submodule(layer, names.mlp)
        if hasattr(mlp, "out"):  # inside a bridge: folded weights bypass the last linear module
            return mlp.out.hook_in, "output"
        return _submodule(mlp, names.mlp_end), "input"
    if rest == "attn.hook_z":
        attn = _submodule(layer, names.attn)
        if hasattr(attn, "o") and hasattr(attn.o, "hook_in"):  # inside a bridge, likewise
            return attn.o.hook_in, "output"
        return _submodule(attn, names.attn_end), "input"
    path, side = {
        "hook_resid_pre": ("", "input"),
        "hook_attn_out": (names.attn, "output"),
        "hook_resid_mid": (names.ln2, "input"),
        "mlp.hook_in": (names.mlp, "input"),
        "hook_mlp_out": (names.mlp, "output"),
        "hook_resid_post": ("", "output"),
    }[rest]
    return (_submodule(layer, path) if path else layer), side


def width(hf: nn.Module, hook: str) -> int:
    """Length of a row at a hook, read off the weights without a forward pass.

    Behind an MLP's nonlinearity and before the output projection of attention it is what the next
    linear map reads; elsewhere it is d_model.
    """
    module, _ = site(hf, hook)
    if not hook.endswith(("mlp.hook_post", "attn.hook_z")):
        return hf.config.hidden_size
    weight = module.weight
    return weight.shape[1] if isinstance(module, nn.Linear) else weight.shape[0]  # GPT-2: Conv1D


def _submodule(module: nn.Module, path: str) -> nn.Module:
    for part in path.split("."):  # not get_submodule: a bridge's wrappers delegate by getattr
        module = getattr(module, part)
    return module


def stream_of(args: tuple, kwargs: dict) -> Tensor:
    """The stream among a module's arguments: the first, or hidden_states."""
    return args[0] if args else kwargs["hidden_states"]


def _on(hf: nn.Module, hook: str, see: Callable[[Tensor], Tensor | None]):
    """Call `see` on the stream at a hook; what it returns, if anything, takes its place."""
    module, side = site(hf, hook)
    if side == "input":

        def before(_: nn.Module, args: tuple, kwargs: dict):
            new = see(stream_of(args, kwargs))
            if new is None:
                return None
            if args:
                return (new, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": new}

        return module.register_forward_pre_hook(before, with_kwargs=True)

    def after(_: nn.Module, args: tuple, out):
        new = see(out[0] if isinstance(out, tuple) else out)
        if new is None:
            return None
        return (new, *out[1:]) if isinstance(out, tuple) else new

    return module.register_forward_hook(after)


@contextmanager
def capture(hf: nn.Module, hooks: list[str]) -> Iterator[dict[str, Tensor]]:
    """Inside: every forward pass fills the dictionary, hook -> [batch pos d].

    Tensors keep their graph; detach them where it is not wanted. Inside `edited` of the same
    hook, entered first, the edited stream is seen.
    """
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for hook in hooks:
            keep = lambda x, hook=hook: seen.__setitem__(hook, x)  # noqa: E731
            stack.callback(_on(hf, hook, keep).remove)
        yield seen


class Stopped(Exception):
    """Ends a forward pass from inside a hook."""


@contextmanager
def stop_after(hf: nn.Module, hooks: list[str]) -> Iterator[None]:
    """Inside: one forward pass, which ends behind the last of `hooks`; the block ends there, too.

    with capture(hf, hooks) as acts, stop_after(hf, hooks):
        hf(tokens)                                            # what stands behind this never runs
    """
    order = hook_names(hf)
    for hook in hooks:
        check(hf, hook)

    def stop(_: Tensor) -> None:
        raise Stopped

    handle = _on(hf, max(hooks, key=order.index), stop)
    try:
        yield
    except Stopped:
        pass
    finally:
        handle.remove()


def run_to(hf: nn.Module, tokens: Tensor, hooks: list[str]) -> dict[str, Tensor]:
    """The stream at `hooks`, from a forward pass that stops behind the last of them.

    Args:
        tokens: [batch pos] token ids on the model's device.

    Returns:
        hook -> [batch pos d].
    """
    with capture(hf, hooks) as acts, stop_after(hf, hooks):
        hf.base_model(input_ids=tokens, use_cache=False)
    return acts


@contextmanager
def edited(hf: nn.Module, hook: str, fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside: the stream x at `hook` is replaced by fn(x) in every forward pass.

    resid_mid is read by ln2 and by the skip connection, so it is edited where both begin:
    attn_out becomes fn(resid_pre + attn_out) - resid_pre.

    Args:
        fn: [batch pos d] -> [batch pos d]; gradients flow through it.
    """
    if not hook.endswith("hook_resid_mid"):
        handle = _on(hf, hook, fn)
        try:
            yield
        finally:
            handle.remove()
        return
    check(hf, hook)
    names = family(hf)
    layer = _submodule(hf, names.layers)[int(hook.split(".")[1])]
    seen: dict[str, Tensor] = {}

    def before_ln1(_: nn.Module, args: tuple, kwargs: dict) -> None:
        seen["resid_pre"] = stream_of(args, kwargs)

    handle = _submodule(layer, names.ln1).register_forward_pre_hook(before_ln1, with_kwargs=True)
    attn_out = hook.replace("resid_mid", "attn_out")
    try:
        with edited(hf, attn_out, lambda a: fn(seen["resid_pre"] + a) - seen["resid_pre"]):
            yield
    finally:
        handle.remove()


def to_tensor(raw: np.ndarray, dtype: str, device: torch.device | str = "cpu") -> Tensor:
    """Stored rows as a tensor of the stored dtype.

    Args:
        raw: [rows d] float16 or float32, or uint16 bit patterns of bfloat16; may be read-only.
        dtype: float16, bfloat16 or float32.
    """
    if not raw.flags.writeable:
        raw = raw.copy()  # torch cannot share memory that is mapped read-only
    if dtype == "bfloat16":
        return torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(raw).to(device)


def to_numpy(x: Tensor, dtype: str) -> np.ndarray:
    """A tensor in the form that shards hold: the inverse of `to_tensor`, rounding to `dtype`."""
    x = x.detach().to(getattr(torch, dtype)).cpu().contiguous()
    return x.view(torch.int16).numpy().view(np.uint16) if dtype == "bfloat16" else x.numpy()
